"""How close a decoded signal is to the original."""

import functools

import torch

from modeling_encodec.evaluation.mel import MelSpectrogram


def si_snr(reference: torch.Tensor, estimate: torch.Tensor) -> torch.Tensor:
    """Scale-invariant signal-to-noise ratio in dB over the last axis, (..., T) -> (...).

    Both signals lose their mean; the estimate's part along the reference is signal, the rest noise (paper 4.3).
    Infinite for an exact copy up to gain; NaN where the reference is silent.
    """
    if reference.shape != estimate.shape:
        raise ValueError(f"shapes are {tuple(reference.shape)} and {tuple(estimate.shape)}, allowed: equal ones")
    reference, estimate = (x.double() - x.double().mean(-1, keepdim=True) for x in (reference, estimate))
    gain = (estimate * reference).sum(-1, keepdim=True) / reference.square().sum(-1, keepdim=True)
    signal = gain * reference
    return 10 * torch.log10(signal.square().sum(-1) / (estimate - signal).square().sum(-1))


def mel_distance(reference: torch.Tensor, estimate: torch.Tensor, sampling_rate: int) -> torch.Tensor:
    """How far spectra are apart, (..., T) -> (...): mean |difference| of log10 mel power (64 bands, windows 2^5 to
    2^11 samples, each divided by its window's energy; powers below 1e-5 count as 1e-5). 0 for an exact copy."""
    if reference.shape != estimate.shape:
        raise ValueError(f"shapes are {tuple(reference.shape)} and {tuple(estimate.shape)}, allowed: equal ones")
    distances = []
    for exponent in range(5, 12):
        mel = _mel_spectrogram(sampling_rate, 2**exponent, reference.device)
        ours, theirs = (mel(x).clamp(min=1e-5).log10() for x in (reference, estimate))
        distances.append((ours - theirs).abs().mean((-2, -1)))
    return torch.stack(distances).mean(0)


@functools.lru_cache(maxsize=32)
def _mel_spectrogram(sampling_rate: int, window: int, device: torch.device) -> MelSpectrogram:
    return MelSpectrogram(sampling_rate, window).to(device)
