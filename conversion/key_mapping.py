"""State-dict names of the `encodec` package and of Transformers' EncodecModel, as renaming rules, and of its
language model.

The two lay out the same layers under the same numbers; only the wrappers round a convolution differ, and the names of
weight norm. Shapes are equal, so renaming is all there is to it; but the language model's tables and heads are one
tensor each here and one for each codebook there.
"""

import re
from collections.abc import Mapping

import torch

from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig


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
# Of each kind of wrong weights so many are named.
MOST_NAMED = 10
# (start of our name, start of the original's): the rest is the same.
LM_LAYER = {
    "qkv_proj.": "self_attn.in_proj_",
    "o_proj.": "self_attn.out_proj.",
    "attention_norm.": "norm1.",
    "up_proj.": "linear1.",
    "down_proj.": "linear2.",
    "output_norm.": "norm2.",
}
# Ours, and what the original calls the part of one codebook.
LM_STACKED = {"embeddings.weight": "emb.{}.weight", "head.weight": "linears.{}.weight", "head.bias": "linears.{}.bias"}


def from_original(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The original's state dict under our names."""
    return {rename(name, FROM_ORIGINAL): tensor for name, tensor in state.items()}


def to_original(state: Mapping[str, torch.Tensor], config: EncodecConfig) -> dict[str, torch.Tensor]:
    """Our state dict under the original's names."""
    block = 2 + config.num_residual_layers  # ELU, upsampling, residual units
    upsampling = tuple(f"decoder.model.{3 + block * i}." for i in range(len(config.upsampling_ratios)))
    renamed = {}
    for name, tensor in state.items():
        name = rename(name, TO_ORIGINAL)
        renamed[
            name.replace(".conv.conv.", ".convtr.convtr.").replace(".conv.norm.", ".convtr.norm.")
            if name.startswith(upsampling)
            else name
        ] = tensor
    return renamed


def check_shapes(state: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Refuse weights `state` of `what` whose names and shapes are not exactly the `expected`.

    Raises:
        ValueError: with what is missing, unexpected or of another shape; of each kind ten names, and how many more.
    """
    found = [f"{kind}: {_some(names)}" for kind, names in wrong_shapes(state, expected).items() if names]
    if found:
        raise ValueError(f"{what} weights are {' | '.join(found)}")


def wrong_shapes(state: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """What `state` has wrong beside the `expected` names and shapes, by kind of fault."""
    return {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(state[name].shape)}, allowed: {tuple(shape)}"
            for name, shape in expected.items()
            if name in state and tuple(state[name].shape) != tuple(shape)
        ],
    }


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return "; ".join(names[:MOST_NAMED]) + more


def lm_config_from_original(state: Mapping[str, torch.Tensor], frame_rate: int) -> EncodecLMConfig:
    """Configuration for a state dict of the original's `LMModel`, used at `frame_rate` frames per second.

    Sizes are read from shapes. Heads and context leave none: 8 and 3.5 seconds, as in the released models.

    Raises:
        ValueError: if the shapes make no working model.
    """
    return EncodecLMConfig(
        codebook_size=_size_of(state, "linears.0.bias", 0, 1024),
        num_codebooks=_count_of(state, r"(?:emb|linears)\.(\d+)\.") or 32,
        hidden_size=_size_of(state, "transformer.norm_in.bias", 0, 200),
        num_hidden_layers=_count_of(state, r"transformer\.layers\.(\d+)\.") or 5,
        intermediate_size=_size_of(state, "transformer.layers.0.linear1.bias", 0, 800),
        frame_rate=frame_rate,
    )


def lm_from_original(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of the original's `LMModel` for our `EncodecLM`.

    Raises:
        ValueError: with what is missing, unexpected or of another shape.
    """
    config = lm_config_from_original(state, frame_rate=75)
    shapes, count = _lm_shapes(config), config.num_codebooks
    expected = {_lm_name(name): shape for name, shape in shapes.items() if name not in LM_STACKED}
    for name, parts in LM_STACKED.items():
        rows, *rest = shapes[name]
        expected |= {parts.format(number): (rows // count, *rest) for number in range(count)}
    check_shapes(state, expected, "language model")
    ours = {name: state[_lm_name(name)] for name in shapes if name not in LM_STACKED}
    for name, parts in LM_STACKED.items():
        ours[name] = torch.cat([state[parts.format(number)] for number in range(count)])
    return ours


def lm_to_original(state: Mapping[str, torch.Tensor], config: EncodecLMConfig) -> dict[str, torch.Tensor]:
    """State dict of our `EncodecLM` for the original's `LMModel`. The integer form, if there, is left out.

    Raises:
        ValueError: with what is missing, unexpected or of another shape, or for a model without the zero key, which
            the original always has.
    """
    if not config.zero_past_key:
        raise ValueError("zero_past_key is False, allowed: True, as the original knows no other")
    state = {name: tensor for name, tensor in state.items() if not name.startswith("integer.")}
    check_shapes(state, _lm_shapes(config), "language model")
    theirs = {_lm_name(name): tensor for name, tensor in state.items() if name not in LM_STACKED}
    for name, parts in LM_STACKED.items():
        for number, part in enumerate(state[name].chunk(config.num_codebooks)):
            theirs[parts.format(number)] = part.clone()  # no view: saved alone it would take all others along
    return theirs


def _lm_shapes(config: EncodecLMConfig) -> dict[str, tuple[int, ...]]:
    """Our names and shapes of a language model's float form."""
    width, inner, count = config.hidden_size, config.intermediate_size, config.num_codebooks
    linears = {"qkv_proj": (3 * width, width), "o_proj": (width, width)}
    linears |= {"up_proj": (inner, width), "down_proj": (width, inner)}
    numbers = range(config.num_hidden_layers)
    linears = {f"layers.{number}.{name}": shape for number in numbers for name, shape in linears.items()}
    linears["head"] = (count * config.codebook_size, width)
    norms = [f"layers.{number}.{name}" for number in numbers for name in ("attention_norm", "output_norm")]
    shapes = {"embeddings.weight": (count * (config.codebook_size + 1), width)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in ("input_norm", *norms):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def _lm_name(ours: str) -> str:
    """The original's name of a weight that is not stacked."""
    if ours.startswith("input_norm."):
        return f"transformer.{ours.replace('input_norm', 'norm_in')}"
    layer, number, part = ours.split(".", 2)
    start = part.split(".")[0] + "."
    return f"transformer.{layer}.{number}.{part.replace(start, LM_LAYER[start])}"


def _size_of(state: Mapping[str, torch.Tensor], name: str, dim: int, otherwise: int) -> int:
    """A size read from the weights; `otherwise` where that weight is not as it must be, which is found out later."""
    return state[name].shape[dim] if name in state and state[name].dim() > dim else otherwise


def _count_of(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    """How many different numbers names have there."""
    return len({match[1] for match in (re.match(pattern, name) for name in state) if match})


def rename(name: str, rules: list[tuple[str, str]]) -> str:
    """A name after all rules, one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
