"""The codec's losses (paper section 3.4). Each is a mean over the examples of a batch of what it is for one example.

That makes them, and their gradients, the same however a batch is divided among processes and accumulation steps. Where
the sources disagree, the paper's form is the default and the other one has a name.
"""

from typing import Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modeling_encodec.processors.mel import MelSpectrogram


# Under a division by a norm that may be 0.
EPSILON = 1e-8

# Power of what is too quiet to be told apart, for the "log" mel loss: -80 dB.
QUIET = 1e-8

Logits = list[torch.Tensor]
Features = list[list[torch.Tensor]]


class MelLoss(nn.Module):
    """Distance of 64-band mel spectrograms at several window lengths (paper eq. 1), of (B, channels, T) signals; a
    mean over all of them.

    `paper`: windows 2^5 to 2^11; L1 plus L2 norm of the difference, each divided so that it does not grow with the
    spectrogram's size, averaged over both and all scales. The paper does not say whether L2 is on a logarithm; it is
    not here.

    `audiocraft`: windows 2^6 to 2^10, bands from 64 Hz; L1 plus the mean square of the difference of log10.

    `log`: windows 2^6 to 2^11 with 5 to 160 bands, the longer the more; L1 of the difference of log10 down to -80 dB.
    The other two hardly hear what is 40 dB below the loudest, which is most of speech above 4 kHz.
    """

    def __init__(self, sampling_rate: int, kind: Literal["paper", "audiocraft", "log"] = "paper"):
        super().__init__()
        self.kind = kind
        if kind == "log":
            scales = [(2**i, 5 * 2 ** (i - 6), 0.0) for i in range(6, 12)]
        elif kind == "audiocraft":
            scales = [(2**i, 64, 64.0) for i in range(6, 11)]
        else:
            scales = [(2**i, 64, 0.0) for i in range(5, 12)]
        self.scales = nn.ModuleList([MelSpectrogram(sampling_rate, *scale) for scale in scales])

    def forward(self, decoded: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        total = 0
        for scale in self.scales:
            ours, real = scale(decoded), scale(target)
            if self.kind == "log":
                total = total + 2 * ((ours + QUIET).log10() - (real + QUIET).log10()).abs().mean()
                continue
            total = total + (ours - real).abs().mean()
            if self.kind == "audiocraft":
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
        x, y = (z.unflatten(0, (examples, -1)) for z in (x.detach(), y))
        distance = _MeanOfMagnitudes.apply(y - x)
        if kind == "relative":
            distance = distance / _MeanOfMagnitudes.apply(x).clamp(min=EPSILON)
        losses.append(distance.mean())
    return torch.stack(losses).mean()


class _MeanOfMagnitudes(torch.autograd.Function):
    """Mean |x| of each row of (B, ...), in float32 at least, without a float32 copy of it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.count = x[0].numel()
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.linalg.vector_norm(x, 1, tuple(range(1, x.dim())), dtype=dtype) / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return x.sign().mul_((gradient / ctx.count).to(x.dtype).view(-1, *[1] * (x.dim() - 1)))


def _root_mean_square(x: torch.Tensor) -> torch.Tensor:
    """Of each row of (B, N); its gradient at 0 is 0 and not infinite."""
    return (x.square().mean(1) + EPSILON**2).sqrt()
