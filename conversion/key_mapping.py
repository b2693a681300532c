"""State-dict names of the `encodec` package and of Transformers' EncodecModel, as renaming rules; its discriminator's.

The two lay out the same layers under the same numbers; only the wrappers round a convolution differ, and the names of
weight norm. Shapes are equal, so renaming is all there is to it.
"""

import re
from collections.abc import Mapping, Sequence

import torch

from modeling_encodec.configuration_encodec import EncodecConfig
from modeling_encodec.training.discriminator import WINDOWS


# (pattern in the original's name, replacement): applied in order.
FROM_ORIGINAL = [
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"\.(conv|convtr)\.\1\.", ".conv."),
    (r"\.(conv|convtr)\.norm\.", ".norm."),
    (r"^quantizer\.vq\.layers\.(\d+)\._codebook\.", r"quantizer.layers.\1.codebook."),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
]
# The way back; `convtr` is put in where the layer upsamples.
TO_ORIGINAL = [
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
    (r"^quantizer\.layers\.(\d+)\.codebook\.", r"quantizer.vq.layers.\1._codebook."),
    (r"\.conv\.", ".conv.conv."),
    (r"\.norm\.", ".conv.norm."),
    (r"^(encoder|decoder)\.layers\.", r"\1.model."),
]
# The original's discriminator also keeps each scale's window, which is a Hann window and so not kept here.
DISCRIMINATOR_TO_ORIGINAL = [
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
    (r"\.(convs\.\d+|conv_post)\.", r".\1.conv."),
]
WINDOW = "discriminators.{}.spec_transform.window"


def from_original(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The original's state dict under our names."""
    return {_rename(name, FROM_ORIGINAL): tensor for name, tensor in state.items()}


def to_original(state: Mapping[str, torch.Tensor], config: EncodecConfig) -> dict[str, torch.Tensor]:
    """Our state dict under the original's names."""
    block = 2 + config.num_residual_layers  # ELU, upsampling, residual units
    upsampling = tuple(f"decoder.model.{3 + block * i}." for i in range(len(config.upsampling_ratios)))
    renamed = {}
    for name, tensor in state.items():
        name = _rename(name, TO_ORIGINAL)
        renamed[
            name.replace(".conv.conv.", ".convtr.convtr.").replace(".conv.norm.", ".convtr.norm.")
            if name.startswith(upsampling)
            else name
        ] = tensor
    return renamed


def discriminator_from_original(
    state: Mapping[str, torch.Tensor], windows: Sequence[int] = WINDOWS
) -> dict[str, torch.Tensor]:
    """State dict of the original's `MultiScaleSTFTDiscriminator` of these `windows` under our names.

    Raises:
        ValueError: with what is missing, unexpected or of another shape.
    """
    shapes = _discriminator_shapes(state.get("discriminators.0.convs.0.conv.bias"), len(windows))
    names = {_rename(name, DISCRIMINATOR_TO_ORIGINAL): name for name in shapes}
    expected = {name: shapes[ours] for name, ours in names.items()}
    _check_shapes(state, expected | {WINDOW.format(scale): (window,) for scale, window in enumerate(windows)})
    return {ours: state[name] for name, ours in names.items()}


def discriminator_to_original(
    state: Mapping[str, torch.Tensor], windows: Sequence[int] = WINDOWS
) -> dict[str, torch.Tensor]:
    """State dict of our `MultiScaleSTFTDiscriminator` of these `windows` under the original's names.

    Raises:
        ValueError: with what is missing, unexpected or of another shape.
    """
    _check_shapes(state, _discriminator_shapes(state.get("discriminators.0.convs.0.bias"), len(windows)))
    renamed = {_rename(name, DISCRIMINATOR_TO_ORIGINAL): tensor for name, tensor in state.items()}
    return renamed | {WINDOW.format(scale): torch.hann_window(window) for scale, window in enumerate(windows)}


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


def _check_shapes(state: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(state[name].shape)}, allowed: {shape}"
            for name, shape in expected.items()
            if name in state and tuple(state[name].shape) != shape
        ],
    }
    found = [f"{kind}: {'; '.join(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"discriminator weights are {' | '.join(found)}")


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
