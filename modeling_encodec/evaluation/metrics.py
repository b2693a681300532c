"""How close a decoded signal is to the original."""

import torch


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
