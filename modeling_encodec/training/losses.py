"""The codec's losses (paper section 3.4). Each is a mean over the examples of a batch of what it is for one example.

That makes them, and their gradients, the same however a batch is divided among processes and accumulation steps. Where
the sources disagree, the paper's form is the default and the other one has a name.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from modeling_encodec.evaluation.mel import MelSpectrogram


# Under a division by a norm that may be 0.
EPSILON = 1e-8

Logits = list[torch.Tensor]
Features = list[list[torch.Tensor]]


class MelLoss(nn.Module):
    """Distance of 64-band mel spectrograms at several window lengths (paper eq. 1), of (B, channels, T) signals; a
    mean over all of them.

    `paper`: windows 2^5 to 2^11; L1 plus L2 norm of the difference, each divided so that it does not grow with the
    spectrogram's size, averaged over both and all scales. The paper does not say whether L2 is on a logarithm; it is
    not here.

    `audiocraft`: windows 2^6 to 2^10, bands from 64 Hz; L1 plus the mean square of the difference of log10.
    """

    def __init__(self, sampling_rate: int, kind: Literal["paper", "audiocraft"] = "paper"):
        super().__init__()
        self.logarithm = kind == "audiocraft"
        exponents, lowest = (range(6, 11), 64.0) if self.logarithm else (range(5, 12), 0.0)
        self.scales = nn.ModuleList([MelSpectrogram(sampling_rate, 2**i, lowest=lowest) for i in exponents])

    def forward(self, decoded: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        total = 0
        for scale in self.scales:
            ours, real = scale(decoded), scale(target)
            total = total + (ours - real).abs().mean()
            if self.logarithm:
                total = total + F.mse_loss((ours + 1e-5).log10(), (real + 1e-5).log10())
            else:
                total = total + _root_mean_square((ours - real).flatten(1)).mean()
        return total / (2 * len(self.scales))


def generator_loss(logits: Logits, kind: Literal["hinge", "linear"] = "hinge") -> torch.Tensor:
    """What the codec wants of the discriminators' `logits` for decoded audio: mean over scales of max(0, 1 - D) (paper
    3.4).

    `linear` is audiocraft's -D, which does not stop pulling once the discriminator is convinced.
    """
    losses = [F.relu(1 - x).mean() if kind == "hinge" else -x.mean() for x in map(torch.Tensor.float, logits)]
    return torch.stack(losses).mean()


def discriminator_loss(real: Logits, fake: Logits) -> torch.Tensor:
    """Hinge loss of the discriminators (paper 3.4): mean over scales of max(0, 1 - D(real)) + max(0, 1 + D(fake)).
    Other numbers of scales are a ValueError."""
    if not real or len(real) != len(fake):
        raise ValueError(f"fake has {len(fake)} scales, allowed: as many as real, {len(real)}, not 0")
    losses = [F.relu(1 - x.float()).mean() + F.relu(1 + y.float()).mean() for x, y in zip(real, fake)]
    return torch.stack(losses).mean()


def feature_loss(
    real: Features, fake: Features, examples: int, kind: Literal["relative", "absolute"] = "relative"
) -> torch.Tensor:
    """Feature matching (paper eq. 2): mean over scales and layers of |D(x) - D(x')| / mean |D(x)|.

    Args:
        real: feature maps of each scale, with the batch's `examples` times the channels along the first axis.
        fake: those of decoded audio, in the same shapes.
        examples: in the batch; the mean in the denominator is over one of them.
        kind: `absolute` leaves the division out, as audiocraft does (there, by mistake).

    Raises:
        ValueError: if the two have other numbers of scales or maps.
    """
    ours, theirs = ([len(scale) for scale in features] for features in (fake, real))
    if not sum(theirs) or ours != theirs:
        raise ValueError(
            f"fake has {ours} feature maps, one number a scale, allowed: as many as real, {theirs}, not 0"
        )
    losses = []
    for x, y in zip((x for scale in real for x in scale), (y for scale in fake for y in scale)):
        # Not flattened: that would copy maps in channels-last memory.
        x, y = (z.float().unflatten(0, (examples, -1)) for z in (x.detach(), y))
        distance = (x - y).abs().mean((1, 2, 3, 4))
        if kind == "relative":
            distance = distance / x.abs().mean((1, 2, 3, 4)).clamp(min=EPSILON)
        losses.append(distance.mean())
    return torch.stack(losses).mean()


def _root_mean_square(x: torch.Tensor) -> torch.Tensor:
    """Of each row of (B, N); its gradient at 0 is 0 and not infinite."""
    return (x.square().mean(1) + EPSILON**2).sqrt()
