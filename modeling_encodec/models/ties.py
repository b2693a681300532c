"""Telling a tie from an error: where two codings of a latent part, was the choice within the rounding of float32?"""

import torch


# How far, relative to its length, a latent may move by the rounding of some 25 layers of float32.
ROUNDING = 2e-5


def first_apart(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """The first codebook, from 0 on, in which a frame's codes (K,) differ; later ones code another residual."""
    return int((ours != theirs).nonzero()[0])


def is_tie(model, latent: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two codings (K,) of a `latent` (D,) part where two entries are equally near, so that rounding may
    change which is the nearest."""
    stage = first_apart(ours, theirs)
    embeds = [layer.codebook.embed.double() for layer in model.quantizer.layers[: stage + 1]]
    latent = latent.double()
    residual = latent - sum((embed[code] for embed, code in zip(embeds[:-1], ours.tolist())), torch.zeros_like(latent))
    a, b = embeds[-1][int(ours[stage])], embeds[-1][int(theirs[stage])]
    gap = ((residual - a).square().sum() - (residual - b).square().sum()).abs()
    # The border between the two entries' cells is gap / (2 |a - b|) away.
    return bool(gap <= 2 * (a - b).norm() * ROUNDING * latent.norm())
