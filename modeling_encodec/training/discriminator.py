"""Multi-scale STFT discriminator (paper section 3.4): a small 2-D network on the complex STFT at each of five windows.

Weights of the `encodec` package's module of that name can be loaded (`conversion.key_mapping`), and it is followed
where it differs from the paper's text: kernels of 3 x 9 instead of 3 x 8, a first layer without weight norm, and one
more 3 x 3 convolution before the last.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from modeling_encodec.models.pickling_encodec import PickledByWeights
from modeling_encodec.processors.mel import rfft


# Windows at 24 kHz; 48 kHz doubles them, so that they last as long (paper 3.4).
WINDOWS = (2048, 1024, 512, 256, 128)


def windows_for(sampling_rate: int) -> tuple[int, ...]:
    """STFT windows in samples at `sampling_rate` Hz: the paper's for 24 kHz, doubled from 48 kHz on."""
    return tuple(window * 2 for window in WINDOWS) if sampling_rate >= 48_000 else WINDOWS


class STFTDiscriminator(PickledByWeights):
    """One scale: (B, 1, T) audio to logits (B, 1, time, frequency) and the five feature maps before them."""

    def __init__(self, window: int, filters: int = 32, slope: float = 0.2):
        super().__init__()
        self.window, self.slope = window, slope
        # Divided by the window's norm: loudness does not depend on the scale.
        hann = torch.hann_window(window, dtype=torch.float32)
        self.register_buffer("analysis", hann / hann.norm(), persistent=False)
        layers = [nn.Conv2d(2, filters, (3, 9), padding=(1, 4), dtype=torch.float32)]
        for dilation in (1, 2, 4):
            padding = (dilation, 4)
            layers.append(nn.Conv2d(filters, filters, (3, 9), (1, 2), padding, (dilation, 1), dtype=torch.float32))
        layers.append(nn.Conv2d(filters, filters, 3, padding=1, dtype=torch.float32))
        self.convs = nn.ModuleList([layers[0], *(weight_norm(layer) for layer in layers[1:])])
        self.conv_post = weight_norm(nn.Conv2d(filters, 1, 3, padding=1, dtype=torch.float32))

    def made_with(self) -> tuple:
        """Window, filters and slope."""
        return self.window, self.conv_post.in_channels, self.slope

    def spectrogram(self, audio: torch.Tensor) -> torch.Tensor:
        """Complex STFT of (B, 1, T) as (B, 2, time, frequency) in channels-last memory, real part first."""
        frames = audio.squeeze(1).unfold(1, self.window, self.window // 4)
        spectrum = rfft(frames * self.analysis)  # (B, time, frequency)
        return torch.view_as_real(spectrum).permute(0, 3, 1, 2)

    def forward(self, audio: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        with torch.autocast(audio.device.type, enabled=False):
            x = self.spectrogram(audio.float())
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), self.slope, inplace=True)
            features.append(x)
        return self.conv_post(x), features


class MultiScaleSTFTDiscriminator(PickledByWeights):
    """A discriminator for each window. Stereo channels are judged separately (paper 3.4): they join the batch.

    Args:
        windows: STFT windows in samples; each hop is a quarter of its window.
        filters: channels of every convolution.
        slope: of the leaky ReLUs; `encodec` 0.2, audiocraft 0.3.
    """

    def __init__(self, windows: Sequence[int] = WINDOWS, filters: int = 32, slope: float = 0.2):
        super().__init__()
        self.windows = tuple(windows)
        self.discriminators = nn.ModuleList([STFTDiscriminator(window, filters, slope=slope) for window in windows])
        self.to(memory_format=torch.channels_last)

    def made_with(self) -> tuple:
        """Windows, filters and slope."""
        return self.windows, *self.discriminators[0].made_with()[1:]

    def forward(self, audio: torch.Tensor) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        """Logits (B * channels, 1, time, frequency) and five feature maps of every scale, for (B, channels, T) audio.

        Raises:
            ValueError: for audio shorter than the largest window.
        """
        if audio.shape[-1] < max(self.windows):
            raise ValueError(f"audio has {audio.shape[-1]} samples, allowed: at least {max(self.windows)}, one window")
        audio = audio.flatten(0, 1).unsqueeze(1)
        logits, features = zip(*(discriminator(audio) for discriminator in self.discriminators))
        return list(logits), list(features)
