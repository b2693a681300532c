"""State-dict names of the `encodec` package's discriminator, there and back."""

from collections.abc import Mapping, Sequence

import torch

from modeling_encodec.conversion.key_mapping import check_shapes, rename
from modeling_encodec.training.discriminator import WINDOWS


DISCRIMINATOR_TO_ORIGINAL = [
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
    (r"\.(convs\.\d+|conv_post)\.", r".\1.conv."),
]
# The original's discriminator also keeps each scale's window, which is a Hann window and so not kept here.
WINDOW = "discriminators.{}.spec_transform.window"


def discriminator_from_original(
    state: Mapping[str, torch.Tensor], windows: Sequence[int] = WINDOWS
) -> dict[str, torch.Tensor]:
    """State dict of the original's `MultiScaleSTFTDiscriminator` of these `windows` under our names.

    Raises:
        ValueError: with what is missing, unexpected or of another shape.
    """
    shapes = _discriminator_shapes(state.get("discriminators.0.convs.0.conv.bias"), len(windows))
    names = {rename(name, DISCRIMINATOR_TO_ORIGINAL): name for name in shapes}
    expected = {name: shapes[ours] for name, ours in names.items()}
    check_shapes(
        state, expected | {WINDOW.format(scale): (window,) for scale, window in enumerate(windows)}, "discriminator"
    )
    return {ours: state[name] for name, ours in names.items()}


def discriminator_to_original(
    state: Mapping[str, torch.Tensor], windows: Sequence[int] = WINDOWS
) -> dict[str, torch.Tensor]:
    """State dict of our `MultiScaleSTFTDiscriminator` of these `windows` under the original's names.

    Raises:
        ValueError: with what is missing, unexpected or of another shape.
    """
    check_shapes(
        state, _discriminator_shapes(state.get("discriminators.0.convs.0.bias"), len(windows)), "discriminator"
    )
    renamed = {rename(name, DISCRIMINATOR_TO_ORIGINAL): tensor for name, tensor in state.items()}
    hann = [torch.hann_window(window, dtype=torch.float32, device="cpu") for window in windows]
    return renamed | {WINDOW.format(scale): window for scale, window in enumerate(hann)}


def _discriminator_shapes(bias: torch.Tensor | None, scales: int) -> dict[str, tuple[int, ...]]:
    """Our names and shapes of a discriminator with as many filters as its first layer's `bias` (none: 32)."""
    filters = 32 if bias is None else bias.numel()
    layers = {"convs.0": (filters, 2, 3, 9)}
    layers |= {f"convs.{number}": (filters, filters, 3, 9) for number in (1, 2, 3)}
    layers |= {"convs.4": (filters, filters, 3, 3), "conv_post": (1, filters, 3, 3)}
    shapes = {}
    for layer in (f"discriminators.{scale}.{layer}" for scale in range(scales) for layer in layers):
        shape = layers[layer.split(".", 2)[2]]
        shapes[f"{layer}.bias"] = shape[:1]
        if layer.endswith("convs.0"):
            shapes[f"{layer}.weight"] = shape
        else:
            shapes[f"{layer}.parametrizations.weight.original0"] = (shape[0], 1, 1, 1)
            shapes[f"{layer}.parametrizations.weight.original1"] = shape
    return shapes
