"""Figures. Matplotlib is an extra: `pip install "modeling-encodec[demo]"`."""

import os

import numpy as np
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function


def mel_spectrogram_db(audio: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Mel spectrogram of audio (T,) in dB, (80 bands, frames), 1024-sample windows every 256."""
    filters = mel_filter_bank(513, 80, 0, sampling_rate / 2, sampling_rate, norm="slaney", mel_scale="slaney")
    return spectrogram(audio, window_function(1024), 1024, 256, mel_filters=filters, mel_floor=1e-5, log_mel="dB")


def save_spectrograms(rows: dict[str, dict[str, np.ndarray]], sampling_rate: int, path: str | os.PathLike) -> None:
    """One PNG: a row for each clip, and in it the mel spectrograms of its versions side by side, to one colour scale.

    Args:
        rows: clip name -> version name -> audio (T,); every clip has the same versions.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "modeling-encodec[demo]"') from None
    columns = max(len(versions) for versions in rows.values())
    figure = Figure(figsize=(1 + 3.2 * columns, 0.6 + 2.6 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False, sharey=True)
    for line, (clip, versions) in zip(axes, rows.items()):
        pictures = [mel_spectrogram_db(audio, sampling_rate) for audio in versions.values()]
        top = pictures[0].max()
        for axis, title, picture, audio in zip(line, versions, pictures, versions.values()):
            extent = (0, len(audio) / sampling_rate, 0, len(picture))
            image = axis.imshow(picture, origin="lower", aspect="auto", extent=extent, vmin=top - 80, vmax=top)
            axis.set_title(f"{clip}: {title}")
            axis.set_xlabel("seconds")
        line[0].set_ylabel("mel band")
        figure.colorbar(image, ax=line, label="dB")
    figure.savefig(path, dpi=110, format="png")
