"""State-dict names of the `encodec` package and of Transformers' EncodecModel, as renaming rules.

The two lay out the same layers under the same numbers; only the wrappers round a convolution differ, and the names of
weight norm. Shapes are equal, so renaming is all there is to it.
"""

import re
from collections.abc import Mapping

import torch

from modeling_encodec.configuration_encodec import EncodecConfig


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


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
