"""How close a decoded signal is to the original, by its samples and spectra. Judgements by models of hearing are in
`perceptual.py`."""

import functools
import math

import torch
from torch.nn import functional as F

from modeling_encodec.models.batching_encodec import as_audio
from modeling_encodec.models.inputs_encodec import check_rate, real_number
from modeling_encodec.processors.mel import MelSpectrogram


def si_snr(reference: torch.Tensor, estimate: torch.Tensor) -> torch.Tensor:
    """Scale-invariant signal-to-noise ratio in dB over the last axis, (..., T) -> (...).

    Both signals lose their mean; the estimate's part along the reference is signal, the rest noise (paper 4.3).
    Infinite for an exact copy up to gain, minus infinity for silence; NaN where the reference is silent.

    Raises:
        ValueError: for shapes that differ.

    Examples:
        >>> import torch
        >>> from modeling_encodec.evaluation.metrics import si_snr
        >>> reference = torch.tensor([1.0, -1.0, 1.0, -1.0])
        >>> noise = torch.tensor([0.1, 0.1, -0.1, -0.1])
        >>> si_snr(reference, 3 * (reference + noise))  # in any gain
        tensor(20.0000, dtype=torch.float64)
    """
    reference, estimate = _signals(reference, estimate)
    return _si_snr(reference.double(), estimate.double())


def windowed_si_snr(
    reference: torch.Tensor, estimate: torch.Tensor, sampling_rate: int, seconds: float = 5.0
) -> torch.Tensor:
    """Mean SI-SNR in dB of windows of `seconds`, (..., T) -> (...), as audiocraft computes it (with the sign of a
    ratio, not of a loss).

    A window begins every half window as long as there is audio, filled up with zeros, so the last holds half a window
    of audio at most; energies have the float32 epsilon times the window's length added, so that silence gives a
    number: 0 dB for a silent estimate, far below for sound where the reference is silent.

    Raises:
        ValueError: for shapes that differ.
    """
    reference, estimate = _signals(reference, estimate)
    seconds, sampling_rate = (
        real_number("seconds", seconds),
        check_rate("sampling_rate", sampling_rate),
    )
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds is {seconds}, allowed: a finite number above 0")
    window = max(2, int(seconds * sampling_rate))
    stride, length = window // 2, reference.shape[-1]
    padding = (-(-length // stride) - 1) * stride + window - length
    windows = [F.pad(x.double(), (0, padding)).unfold(-1, window, stride) for x in (reference, estimate)]
    return _si_snr(*windows, epsilon=torch.finfo(torch.float32).eps * window).mean(-1)


def mel_distance(reference: torch.Tensor, estimate: torch.Tensor, sampling_rate: int) -> torch.Tensor:
    """How far spectra are apart, (..., T) -> (...): mean |difference| of log10 mel power (64 bands, windows 2^5 to
    2^11 samples, each divided by its window's energy; powers below 1e-5 count as 1e-5). 0 for an exact copy.

    Raises:
        ValueError: for shapes that differ.

    Examples:
        >>> import torch
        >>> from modeling_encodec.evaluation.metrics import mel_distance
        >>> audio = torch.randn(24000)
        >>> mel_distance(audio, audio, 24000)
        tensor(0.)
        >>> 1.5 < mel_distance(audio, 0.1 * audio, 24000).item() < 2  # 2, but for bands without a bin
        True
    """
    reference, estimate = _signals(reference, estimate)
    sampling_rate = check_rate("sampling_rate", sampling_rate)
    distances = []
    for exponent in range(5, 12):
        mel = _mel_spectrogram(sampling_rate, 2**exponent, reference.device)
        ours, theirs = (mel(x).clamp(min=1e-5).log10() for x in (reference, estimate))
        distances.append((ours - theirs).abs().mean((-2, -1)))
    return torch.stack(distances).mean(0)


def _signals(reference, estimate) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as tensors of audio of one shape."""
    reference, estimate = as_audio("reference", reference), as_audio("estimate", estimate)
    if reference.shape != estimate.shape:
        raise ValueError(f"shapes are {tuple(reference.shape)} and {tuple(estimate.shape)}, allowed: equal ones")
    return reference, estimate


def _si_snr(reference: torch.Tensor, estimate: torch.Tensor, epsilon: float = 0.0) -> torch.Tensor:
    reference, estimate = (x - x.mean(-1, keepdim=True) for x in (reference, estimate))
    energy = reference.square().sum(-1, keepdim=True) + epsilon
    signal = (estimate * reference).sum(-1, keepdim=True) / energy * reference
    noise = (estimate - signal).square().sum(-1) + epsilon
    power = signal.square().sum(-1) + epsilon
    nothing = (power == 0) & (energy[..., 0] > 0)  # and not 0 / 0, where there is no noise either
    return 10 * torch.log10(torch.where(nothing, 0.0, power / noise))


@functools.lru_cache(maxsize=32)
def _mel_spectrogram(sampling_rate: int, window: int, device: torch.device) -> MelSpectrogram:
    return MelSpectrogram(sampling_rate, window).to(device)
