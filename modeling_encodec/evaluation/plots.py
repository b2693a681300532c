"""Figures that the command line, the notebooks, the web page and the cards share.

Every `plot_` function returns a Matplotlib `Figure` of no window: a notebook shows it, `save_figure` writes it.
Matplotlib is an extra: `pip install "modeling-encodec[plots]"`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from modeling_encodec.models.inputs_encodec import (
    as_python,
    audio_array,
    check_rate,
    plain_array,
    real_number,
    whole_number,
)
from modeling_encodec.processors.mel_filters import mel_filters
from modeling_encodec.system.atomic import atomic_path


if TYPE_CHECKING:
    from matplotlib.figure import Figure

WINDOW, HOP, BANDS = 1024, 256, 80  # of the mel spectrograms
BLOCK, FLOOR = 4096, 1e-5  # windows computed at a time; the smallest amplitude
RANGE_DB = 80  # shown below a clip's loudest band
COLUMNS = 1200  # of a waveform: more cannot be seen


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, drawn without a display.

    Raises:
        ImportError: without Matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "modeling-encodec[plots]"') from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure as PNG, whole or not at all. The same figure gives the same bytes.

    Args:
        figure: of a `plot_` function, or any other of Matplotlib.
        path: of the file; missing folders are made.

    Examples:
        >>> import numpy as np
        >>> from pathlib import Path
        >>> from modeling_encodec import plot_codes, save_figure
        >>> save_figure(plot_codes(np.array([[0, 1], [2, 3]]), 4), "codes.png")
        >>> Path("codes.png").read_bytes()[:4]
        b'\\x89PNG'
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})


def as_label(text: str) -> str:
    """A name as Matplotlib shows it: `$` would begin a formula, and `_` at the start would hide it."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def mel_spectrogram_db(audio: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Mel spectrogram in dB, float32 (80 bands, frames), of 1024-sample windows every 256.

    Args:
        audio: samples of one channel, (T,), from one up.
        sampling_rate: in Hz.
    """
    filters, hann = mel_filters(WINDOW, BANDS, sampling_rate, slaney=True), np.hanning(WINDOW + 1)[:-1]
    audio = np.pad(audio, (0, max(0, WINDOW - len(audio))))
    audio = np.pad(audio, WINDOW // 2, mode="reflect")  # the first window's middle is the first sample
    windows = np.lib.stride_tricks.sliding_window_view(audio, WINDOW)[::HOP]
    bands = [
        np.abs(np.fft.rfft(windows[first : first + BLOCK] * hann)) @ filters for first in range(0, len(windows), BLOCK)
    ]
    return (20 * np.log10(np.concatenate(bands).T.clip(min=FLOOR))).astype(np.float32)


def plot_audio(clips: Mapping[str, Mapping[str, np.ndarray]], sampling_rate: int, *, waveforms: bool = True) -> Figure:
    """Versions of clips side by side: waveform over mel spectrogram, in each clip to one scale.

    Args:
        clips: clip name -> version name -> audio (T,) or (channels, T), of which the mean of the channels is shown.
            The first version of a clip sets the colour scale.
        sampling_rate: of all of them, in Hz. Audio of integer PCM is scaled to [-1, 1).
        waveforms: False leaves the spectrograms alone.

    Raises:
        ValueError: without clips, or if one has no versions or no samples.
        ImportError: without Matplotlib.

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec import plot_audio
        >>> noise = np.random.default_rng(0).normal(0, 0.1, 24000)
        >>> figure = plot_audio({"noise": {"original": noise, "half as loud": 0.5 * noise}}, 24000)
        >>> [axis.get_title() for axis in figure.axes if axis.get_title()]
        ['noise: original', 'noise: half as loud']
    """
    sampling_rate = check_rate("sampling_rate", sampling_rate)
    if not clips or not all(clips.values()):
        raise ValueError("there is no audio to show, allowed: at least one version of each clip")
    clips = {
        name: {version: _as_mono(audio, f"{name}: {version}") for version, audio in versions.items()}
        for name, versions in clips.items()
    }
    columns, lines = max(map(len, clips.values())), 2 if waveforms else 1
    figure = new_figure(1 + 3.2 * columns, 0.4 + (3.4 if waveforms else 2.6) * len(clips))
    heights = ([1, 2.2] if waveforms else [1]) * len(clips)
    axes = figure.subplots(lines * len(clips), columns, squeeze=False, sharey="row", height_ratios=heights)
    for axis in axes.flat:
        axis.set_visible(False)
    for index, (clip, versions) in enumerate(clips.items()):
        if waveforms:
            _draw_waveforms(axes[lines * index], versions, sampling_rate)
        _draw_spectrograms(figure, axes[lines * index + lines - 1], versions, sampling_rate)
        for axis, version in zip(axes[lines * index], versions):
            axis.set_title(as_label(f"{clip}: {version}" if clip else version), fontsize="medium")
    return figure


def _as_mono(audio, name: str) -> np.ndarray:
    audio = audio_array(name, audio)
    audio = audio.mean(axis=0) if audio.ndim == 2 else audio
    if audio.ndim != 1 or not len(audio):
        raise ValueError(f"{name} has shape {audio.shape}, allowed: (samples,) or (channels, samples), at least 1")
    return audio


def _draw_waveforms(axes: np.ndarray, versions: Mapping[str, np.ndarray], sampling_rate: int) -> None:
    peak = max(float(np.abs(audio).max()) for audio in versions.values())
    for axis, audio in zip(axes, versions.values()):
        axis.set_visible(True)
        starts = np.linspace(0, len(audio), min(COLUMNS, len(audio)), endpoint=False).astype(int)
        low, high = np.minimum.reduceat(audio, starts), np.maximum.reduceat(audio, starts)
        axis.fill_between(starts / sampling_rate, low, high, linewidth=0.5, color="C0")
        axis.set(xlim=(0, len(audio) / sampling_rate), ylim=(-1.05 * peak or -1, 1.05 * peak or 1))
        axis.tick_params(labelbottom=False)
    axes[0].set_ylabel("amplitude")


def _draw_spectrograms(figure: Figure, axes: np.ndarray, versions: Mapping[str, np.ndarray], sampling_rate: int):
    pictures = [mel_spectrogram_db(audio, sampling_rate) for audio in versions.values()]
    top = pictures[0].max()
    for axis, picture, audio in zip(axes, pictures, versions.values()):
        axis.set_visible(True)
        look = {"extent": (0, len(audio) / sampling_rate, 0, len(picture)), "vmin": top - RANGE_DB, "vmax": top}
        image = axis.imshow(picture, origin="lower", aspect="auto", cmap="magma", **look)
        axis.set_xlabel("seconds")
    axes[0].set_ylabel("mel band")
    figure.colorbar(image, ax=list(axes), label="dB")


def plot_codes(codes: np.ndarray, codebook_size: int, *, frame_rate: float | None = None) -> Figure:
    """Codes as an image: frames from left to right, the first codebook at the bottom, entries by colour.

    Args:
        codes: (codebooks, frames), from 0 below `codebook_size`; what is negative is no code and stays blank.
        codebook_size: entries of a codebook.
        frame_rate: frames per second; without it the axis counts frames.

    Raises:
        ValueError: for codes of another shape or range.
        ImportError: without Matplotlib.

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec import plot_codes
        >>> image = plot_codes(np.array([[0, 1, -1], [2, 3, -1]]), 4).axes[0].images[0].get_array()
        >>> image.shape, int(image.mask.sum())  # the last frame is blank
        ((2, 3), 2)
    """
    codebook_size = whole_number("codebook_size", codebook_size, 1)
    frame_rate = None if frame_rate is None else real_number("frame_rate", frame_rate)
    codes = _checked_codes(codes, codebook_size)
    frames = codes.shape[1]
    figure = new_figure(9, 1.4 + 0.14 * len(codes))
    axis = figure.subplots()
    extent = (0, max(frames, 1) / (frame_rate or 1), 0.5, len(codes) + 0.5)
    look = {"extent": extent, "vmin": 0, "vmax": codebook_size - 1, "interpolation": "nearest"}
    shown = np.ma.masked_less(codes, 0) if frames else np.ma.masked_all((len(codes), 1))
    image = axis.imshow(shown, origin="lower", aspect="auto", cmap="viridis", **look)
    axis.set(xlabel="seconds" if frame_rate else "frame", ylabel="codebook")
    axis.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axis, label="code")
    return figure


def codebook_counts(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    """How often each entry of each codebook was chosen, int64 (codebooks, codebook_size); negative codes are left out.

    Args:
        codes: (codebooks, frames). Counts of several clips may be added.
        codebook_size: entries of a codebook.

    Raises:
        ValueError: for codes of another shape or range.

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec import codebook_counts
        >>> codebook_counts(np.array([[0, 0, 3], [1, 2, -1]]), 4).tolist()
        [[2, 0, 0, 1], [0, 1, 1, 0]]
    """
    codebook_size = whole_number("codebook_size", codebook_size, 1)
    codes = _checked_codes(codes, codebook_size)
    return np.stack([np.bincount(row[row >= 0], minlength=codebook_size) for row in codes])


def _checked_codes(codes, codebook_size: int) -> np.ndarray:
    codes = plain_array("codes", codes)
    if codes.ndim != 2 or not len(codes) or codes.dtype.kind not in "iu":
        raise ValueError(f"codes are {codes.dtype} {codes.shape}, allowed: whole numbers (codebooks, frames)")
    codes = codes.astype(np.int64)
    if codes.size and codes.max() >= codebook_size:
        raise ValueError(f"codes go up to {codes.max()}, allowed: below the codebook size, {codebook_size}")
    return codes


def plot_codebook_use(counts: np.ndarray) -> Figure:
    """How evenly each codebook is used: the share of its entries in falling order, and how many bits that leaves.

    The entropy of a codebook is what its codes cost at best when each is coded by itself; the dashed line is what they
    cost packed. Two to that power is the perplexity.

    Args:
        counts: (codebooks, codebook_size), of `codebook_counts`.

    Raises:
        ValueError: for counts of another shape, or of nothing.
        ImportError: without Matplotlib.

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec import plot_codebook_use
        >>> figure = plot_codebook_use(np.array([[2, 2, 2, 2], [4, 4, 0, 0]]))
        >>> [float(bar.get_height()) for bar in figure.axes[1].patches]  # entropy, bits
        [2.0, 1.0]
    """
    counts = plain_array("counts", counts)
    if (
        counts.dtype.kind not in "iuf"
        or counts.ndim != 2
        or counts.shape[1] < 2
        or (counts < 0).any()
        or not counts.sum(1, dtype=float).all()
    ):
        raise ValueError(f"counts are {counts.shape}, allowed: (codebooks, codebook_size), codes in every codebook")
    count, size = counts.shape
    shares = counts / counts.sum(1, keepdims=True)
    entropy = -(shares * np.log2(shares, where=shares > 0, out=np.zeros_like(shares))).sum(1)
    figure = new_figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    for index, row in enumerate(-np.sort(-shares)):
        left.plot(np.arange(1, size + 1), np.where(row > 0, row, np.nan), color=_colour(index, count), linewidth=1)
    left.axhline(1 / size, color="grey", linestyle=":", linewidth=1)
    left.set(xscale="log", yscale="log", xlabel="entry, by falling share", ylabel="share of the codes")
    left.set_title("dark: first codebook; dotted: all entries alike", fontsize="small")
    numbers, used = np.arange(1, count + 1), (counts > 0).mean(1)
    right.bar(numbers, entropy, color=[_colour(index, count) for index in range(count)])
    right.axhline(np.ceil(np.log2(size)), color="black", linestyle="--", linewidth=1)
    right.set(xlabel="codebook", ylabel="entropy (bits a code)", ylim=(0, 1.15 * np.ceil(np.log2(size))))
    right.set_title(f"used entries: {used.min():.0%} to {used.max():.0%}; dashed: packed", fontsize="small")
    right.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _colour(index: int, count: int):
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * index / max(1, count - 1))


# What the curves show, in this order, and what their axes are called.
RATE_DISTORTION_METRICS = {
    "si_snr": "SI-SNR (dB)",
    "visqol_audio": "ViSQOL, audio (MOS-LQO)",
    "mel_distance": "mel distance (lower is closer)",
}


def plot_rate_distortion(results: dict, category: str = "all") -> Figure:
    """A panel for each metric, over the measured bitrate: the model with and without its language model, and the
    anchors, with 95 % intervals.

    Args:
        results: what an evaluation's `evaluation.json` holds.
        category: one of its categories, or "all".

    Raises:
        ValueError: for a category that it does not have.
        ImportError: without Matplotlib.

    Examples:
        >>> from modeling_encodec import plot_rate_distortion
        >>> score = {"mean": 8.0, "low": 7.0, "high": 9.0}
        >>> row = {"system": "encodec", "category": "all", "measured_kbps": 6.2, "lm_kbps": None}
        >>> results = {
        ...     "model": {"name": "mine"}, "method": {"metrics": {"si_snr": "SI-SNR"}},
        ...     "results": [row | {"metrics": {"si_snr": score}}],
        ... }
        >>> axis = plot_rate_distortion(results).axes[0]
        >>> axis.get_ylabel(), axis.get_legend_handles_labels()[1]
        ('SI-SNR (dB)', ['mine'])
    """
    known = list(dict.fromkeys(row["category"] for row in results["results"]))
    if category not in known:
        raise ValueError(f"category is {category!r}, allowed: {', '.join(known)}")
    names = [name for name in RATE_DISTORTION_METRICS if name in results["method"]["metrics"]]
    rows = [row for row in results["results"] if row["category"] == category and row["measured_kbps"] is not None]
    figure = new_figure(4.2 * max(1, len(names)), 3.6)
    for axis, name in zip(figure.subplots(1, max(1, len(names)), squeeze=False)[0], names):
        for system in dict.fromkeys(row["system"] for row in rows):
            label = results["model"]["name"] if system == "encodec" else system
            points = [row for row in rows if row["system"] == system and name in row["metrics"]]
            _draw_curve(axis, points, name, "measured_kbps", label, "-")
            if points and all(row["lm_kbps"] is not None for row in points):
                _draw_curve(axis, points, name, "lm_kbps", f"{label}, entropy coded", "--")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel("kbps, measured")
        axis.set_ylabel(RATE_DISTORTION_METRICS[name])
        axis.grid(alpha=0.3)
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.axes[0].legend(fontsize="small")
    return figure


def _draw_curve(axis, points: list[dict], metric: str, rate: str, label: str, style: str) -> None:
    points = sorted(points, key=lambda row: row[rate])
    scores = [row["metrics"][metric] for row in points]
    means = [score["mean"] for score in scores]
    halves = [0.0 if score["low"] is None else score["mean"] - score["low"] for score in scores]
    rates, look = [row[rate] for row in points], {"fmt": f"o{style}", "markersize": 4, "capsize": 2}
    axis.errorbar(rates, means, halves, label=as_label(label), **look)


def read_log(path: str | os.PathLike) -> list[dict]:
    """The records of a training run's `log.jsonl`. A last line that a killed run left unfinished is left out.

    Args:
        path: of the file.

    Returns:
        A dictionary for each line: its `update`, and values by name.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a line that is no record, by its number.

    Examples:
        >>> from pathlib import Path
        >>> from modeling_encodec import read_log
        >>> _ = Path("log.jsonl").write_text('{"update": 50, "train/mel": 2.5}\\n{"update": 100, "tra')
        >>> read_log("log.jsonl")
        [{'update': 50, 'train/mel': 2.5}]
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.readlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines) and not line.endswith("\n"):
                break
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("update"), int):
            raise ValueError(f"{os.fspath(path)}: line {number} is no record of a training run")
        records.append(record)
    return records


def plot_training(records: Iterable[Mapping]) -> Figure:
    """Training curves: a panel for each quantity, over the updates; warnings as dotted lines at their update.

    `train/…` are means since the record before. What a run says of every codebook or bandwidth shares one panel.

    Args:
        records: of one run, as `read_log` reads them.

    Raises:
        ValueError: for records without any number.
        ImportError: without Matplotlib.

    Examples:
        >>> from modeling_encodec import plot_training
        >>> figure = plot_training([{"update": 50, "train/mel": 2.5}, {"update": 100, "train/mel": 2.0}])
        >>> len(figure.axes)
        1
    """
    panels, warnings = _panels(records)
    if not panels:
        raise ValueError("there is no number in the records, allowed: a log with at least one")
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = new_figure(3.3 * columns, 2.3 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for (title, curves), axis in zip(panels.items(), axes):  # in this order, or zip takes an axis too many
        for index, (name, points) in enumerate(curves.items()):
            # A colour for each codebook in order; nine and more would fill the panel with their names.
            look = {"color": _colour(index, len(curves))} if len(curves) > 8 else {"label": as_label(name)}
            axis.plot(*zip(*points), marker="." if len(points) < 20 else "", linewidth=1, **look)
        for update in warnings:
            axis.axvline(update, color="red", linestyle=":", linewidth=0.8)
        axis.set_title(as_label(f"{title} (dark: first)" if len(curves) > 8 else title), fontsize="small")
        axis.tick_params(labelsize="x-small")
        axis.xaxis.get_major_locator().set_params(nbins=4)
        axis.grid(alpha=0.3)
        if 1 < len(curves) <= 8:
            axis.legend(fontsize="x-small")
    for axis in list(axes):
        axis.set_visible(False)
    figure.supxlabel("update", fontsize="small")
    return figure


Curves = dict[str, list[tuple[int, float]]]


def _panels(records: Iterable[Mapping]) -> tuple[dict[str, Curves], list[int]]:
    """Panel title -> curve -> points, and the updates that warn of something."""
    panels: dict[str, Curves] = {}
    warnings = []
    for record in records:
        if record.get("warnings"):
            warnings.append(record["update"])
        for name, value in record.items():
            value = as_python(value)
            if name == "update" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            head, _, tail = name.rpartition("/")
            title, curve = (name, tail) if head in ("", "train") else (head, tail)
            panels.setdefault(title, {}).setdefault(curve, []).append((record["update"], value))
    return {title: dict(sorted(curves.items(), key=_in_order)) for title, curves in panels.items()}, warnings


def _in_order(item: tuple[str, Sequence]) -> tuple[float, str]:
    """Codebooks and bandwidths by number, not as text."""
    name = item[0]
    return (float(name), "") if name.replace(".", "", 1).isdigit() else (-1, name)
