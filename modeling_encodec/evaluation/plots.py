"""Figures. Matplotlib is an extra: `pip install "modeling-encodec[demo]"`."""

import os

import numpy as np
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function


def mel_spectrogram_db(audio: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Mel spectrogram of audio (T,) in dB, (80 bands, frames), 1024-sample windows every 256."""
    filters = mel_filter_bank(513, 80, 0, sampling_rate / 2, sampling_rate, norm="slaney", mel_scale="slaney")
    return spectrogram(audio, window_function(1024), 1024, 256, mel_filters=filters, mel_floor=1e-5, log_mel="dB")


def new_figure(width: float, height: float):
    """An empty figure of so many inches, drawn without a display.

    Raises:
        ImportError: without Matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "modeling-encodec[demo]"') from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_label(text: str) -> str:
    """A name as Matplotlib shows it: `$` would begin a formula, and `_` at the start would hide it."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def save_spectrograms(rows: dict[str, dict[str, np.ndarray]], sampling_rate: int, path: str | os.PathLike) -> None:
    """One PNG: a row for each clip, and in it the mel spectrograms of its versions side by side, to one colour scale.

    Args:
        rows: clip name -> version name -> audio (T,); every clip has the same versions.
    """
    columns = max(len(versions) for versions in rows.values())
    figure = new_figure(1 + 3.2 * columns, 0.6 + 2.6 * len(rows))
    axes = figure.subplots(len(rows), columns, squeeze=False, sharey=True)
    for line, (clip, versions) in zip(axes, rows.items()):
        pictures = [mel_spectrogram_db(audio, sampling_rate) for audio in versions.values()]
        top = pictures[0].max()
        for axis, title, picture, audio in zip(line, versions, pictures, versions.values()):
            extent = (0, len(audio) / sampling_rate, 0, len(picture))
            image = axis.imshow(picture, origin="lower", aspect="auto", extent=extent, vmin=top - 80, vmax=top)
            axis.set_title(as_label(f"{clip}: {title}"))
            axis.set_xlabel("seconds")
        line[0].set_ylabel("mel band")
        figure.colorbar(image, ax=line, label="dB")
    figure.savefig(path, dpi=110, format="png")


# What the curves show, in this order, and what their axes are called.
RATE_DISTORTION_METRICS = {
    "si_snr": "SI-SNR (dB)",
    "visqol_audio": "ViSQOL, audio (MOS-LQO)",
    "mel_distance": "mel distance (lower is closer)",
}


def save_rate_distortion(results: dict, path: str | os.PathLike, category: str = "all") -> None:
    """One PNG of an `evaluation.json`'s results: a panel for each metric, over the measured bitrate; the model with
    and without its language model, and the anchors, with 95 % intervals."""
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
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})


def _draw_curve(axis, points: list[dict], metric: str, rate: str, label: str, style: str) -> None:
    points = sorted(points, key=lambda row: row[rate])
    scores = [row["metrics"][metric] for row in points]
    means = [score["mean"] for score in scores]
    halves = [0.0 if score["low"] is None else score["mean"] - score["low"] for score in scores]
    rates, look = [row[rate] for row in points], {"fmt": f"o{style}", "markersize": 4, "capsize": 2}
    axis.errorbar(rates, means, halves, label=as_label(label), **look)
