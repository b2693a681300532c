"""Telling a tie from an error: where two codings differ, was the choice within float32 rounding?"""

import torch

from modeling_encodec.models.modeling_encodec import EncodecModel


# How far, relative to its length, a latent may move through rounding in some 25 layers of float32.
ROUNDING = 2e-5


def count_ties(model: EncodecModel, latents: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """Frames in which two codings (..., K, F) of `latents` (..., D, F) part, each checked to be a tie.

    In a frame the first differing stage decides (later stages code another residual). There the two entries must be so
    equally near that moving the latent by float32 rounding changes the winner.
    """
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    codes_a, codes_b = (codes.transpose(-1, -2).reshape(-1, codes.shape[-2]) for codes in (ours, theirs))
    vectors = latents.transpose(-1, -2).reshape(-1, latents.shape[-2]).double()
    frames = (codes_a != codes_b).any(1).nonzero().flatten().tolist()
    for frame in frames:
        stage = int((codes_a[frame] != codes_b[frame]).nonzero()[0])
        residual = vectors[frame]
        for k in range(stage):
            residual = residual - model.quantizer.layers[k].codebook.embed[codes_a[frame, k]].double()
        embed = model.quantizer.layers[stage].codebook.embed.double()
        a, b = embed[codes_a[frame, stage]], embed[codes_b[frame, stage]]
        gap = ((residual - a).square().sum() - (residual - b).square().sum()).abs()
        move = gap / (2 * (a - b).norm())  # distance from the residual to the border between the two cells
        assert move <= ROUNDING * vectors[frame].norm(), f"frame {frame}, stage {stage}: no tie, border at {move:.2e}"
    return len(frames)
