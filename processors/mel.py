"""Mel spectrograms that gradients pass through, for losses and for the distance that evaluation reports."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modeling_encodec.processors.mel_filters import mel_filters


def rfft(frames: torch.Tensor) -> torch.Tensor:
    """`torch.fft.rfft` along the last axis, of even length; its gradient is real from the start, which takes half the
    time of PyTorch's own."""
    if frames.shape[-1] % 2 or not (torch.is_grad_enabled() and frames.requires_grad):
        return torch.fft.rfft(frames)
    return _RealFFT.apply(frames)


def power_spectrum(frames: torch.Tensor) -> torch.Tensor:
    """The square of what `rfft` gives."""
    if frames.shape[-1] % 2 or not (torch.is_grad_enabled() and frames.requires_grad):
        return _power(torch.fft.rfft(frames))
    return _PowerSpectrum.apply(frames)


def _power(spectrum: torch.Tensor) -> torch.Tensor:
    real, imaginary = torch.view_as_real(spectrum).square().unbind(-1)
    return real + imaginary  # `sum` over two numbers at a time is slow


def _passed_back(gradient: torch.Tensor) -> torch.Tensor:
    """To the frames whose spectrum has this gradient, which is lost."""
    # x[n] sums Re(g[k] e^(2 pi i k n / N)) over bins; `irfft` counts all but the first and last twice.
    gradient[..., 0] *= 2
    gradient[..., -1] *= 2
    return torch.fft.irfft(gradient, norm="forward")


class _RealFFT(torch.autograd.Function):
    @staticmethod
    def forward(ctx, frames):
        return torch.fft.rfft(frames)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _passed_back(gradient * 0.5)


class _PowerSpectrum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, frames):
        spectrum = torch.fft.rfft(frames)
        ctx.save_for_backward(spectrum)
        return _power(spectrum)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (spectrum,) = ctx.saved_tensors
        return _passed_back(spectrum * gradient)  # twice that for the square, and half of it as above


class MelSpectrogram(nn.Module):
    """Power mel spectrogram, (..., T) to (..., frames, bands), one frame every quarter window.

    Divided by the window's energy, so that windows of all lengths give like values; HTK scale. The signal is mirrored
    at both ends so that the first frame is centred on the first hop. Below a window of 512 samples some of 64 bands
    hold no bin and stay 0.

    Args:
        sampling_rate: in Hz.
        window: in samples.
        bands: mel bands, up to half the sampling rate.
        lowest: Hz that the first one begins at.

    Examples:
        >>> import torch
        >>> from modeling_encodec.processors.mel import MelSpectrogram
        >>> mel = MelSpectrogram(24000, 1024)(torch.sin(torch.arange(24000) * 2 * torch.pi * 3000 / 24000))
        >>> mel.shape, mel[50].argmax().item()  # the middle of band 36, counted from 0, is 2.94 kHz
        (torch.Size([94, 64]), 36)
    """

    def __init__(self, sampling_rate: int, window: int, bands: int = 64, lowest: float = 0.0):
        super().__init__()
        self.window, self.hop = window, window // 4
        hann = torch.hann_window(window, dtype=torch.float32, device="cpu")
        self.register_buffer("analysis", hann / hann.norm(), persistent=False)
        filters = mel_filters(window, bands, sampling_rate, lowest)
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        shape = audio.shape
        audio = audio.reshape(-1, 1, shape[-1]).float()
        side = (self.window - self.hop) // 2
        if audio.shape[-1] <= side:
            audio = F.pad(audio, (0, side + 1 - audio.shape[-1]))
        audio = F.pad(audio, (side, side), mode="reflect")
        audio = F.pad(audio, (0, -(audio.shape[-1] - self.window) % self.hop))
        frames = audio.squeeze(1).unfold(1, self.window, self.hop)
        with torch.autocast(audio.device.type, enabled=False):
            mel = power_spectrum(frames * self.analysis) @ self.filters
        return mel.view(*shape[:-1], *mel.shape[1:])
