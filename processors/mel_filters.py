"""Triangular mel filters, of the losses, of the distance that evaluation reports, and of pictures."""

import numpy as np


def mel_filters(
    window: int, bands: int, sampling_rate: int, lowest: float = 0.0, *, slaney: bool = False
) -> np.ndarray:
    """What the bins of a spectrum count for in each mel band: float64 (window // 2 + 1, bands), from `lowest` Hz up to
    half the `sampling_rate`.

    Each band rises from the middle of the one before to 1 at its own, and falls to the middle of the next. The scale
    is HTK's, 2595 log10(1 + f / 700). `slaney`: Slaney's, linear below 1 kHz and logarithmic above, with bands of
    equal area. Where bands are narrower than bins, some hold none and stay 0.

    Examples:
        >>> from modeling_encodec.processors.mel_filters import mel_filters
        >>> filters = mel_filters(1024, 64, 24000)
        >>> filters.shape, int(filters[:, 36].argmax())  # the bin at 2.95 kHz, in the middle of band 36
        ((513, 64), 126)
    """
    to_mel, to_hertz = (_slaney_mel, _slaney_hertz) if slaney else (_htk_mel, _htk_hertz)
    edges = to_hertz(np.linspace(to_mel(lowest), to_mel(sampling_rate / 2), bands + 2))
    left, middle, right = edges[:-2], edges[1:-1], edges[2:]
    bins = np.linspace(0, sampling_rate // 2, window // 2 + 1)[:, None]
    filters = np.minimum((bins - left) / (middle - left), (right - bins) / (right - middle)).clip(min=0)
    return filters * (2 / (right - left)) if slaney else filters


def _htk_mel(hertz: float) -> float:
    return 2595 * np.log10(1 + hertz / 700)


def _htk_hertz(mel: np.ndarray) -> np.ndarray:
    return 700 * (10 ** (mel / 2595) - 1)


# Slaney's scale: 3 mel for 200 Hz below 1 kHz, which is 15 mel; above, 27 mel for a factor of 6.4.
def _slaney_mel(hertz: float) -> float:
    return 3 * hertz / 200 if hertz < 1000 else 15 + np.log(hertz / 1000) * 27 / np.log(6.4)


def _slaney_hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))
