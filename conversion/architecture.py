"""The configuration of a codec from its weights, as far as shapes tell, and from what else says the rest.

Shapes tell sizes: filters, strides, kernels, layers, codebooks. They do not tell how the layers are run (sampling
rate, padding, loudness, chunks). That is taken, in this order, from what the caller sets, what the checkpoint says of
itself, and the released model whose architecture is exactly this one. What nobody says is asked for, never assumed.

Each size is read at every place that shows it, and the most frequent wins, so that one wrong tensor is named as wrong
and does not make all others look so.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from modeling_encodec.checkpoints.released import RELEASED, ReleasedCheckpoint
from modeling_encodec.conversion.key_mapping import check_shapes, to_original, wrong_shapes
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel


# What shapes tell. How many codebooks there are they tell too, the configuration by way of `target_bandwidths`.
SIZES = (
    *("audio_channels", "hidden_size", "num_filters", "num_residual_layers", "upsampling_ratios", "norm_type"),
    *("kernel_size", "last_kernel_size", "residual_kernel_size", "compress", "num_lstm_layers", "codebook_size"),
    "use_conv_shortcut",
)
# What they do not.
BEHAVIOUR = (
    *("sampling_rate", "normalize", "chunk_length_s", "overlap", "dilation_growth_rate", "use_causal_conv"),
    *("pad_mode", "trim_right_ratio"),
)


@dataclass
class Said:
    """Fields that somebody says, and who."""

    who: str
    fields: Mapping[str, object]


def codec_shapes(config: EncodecConfig, *, original: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a codec's weights, the original's names or ours."""
    with torch.device("meta"):
        state = EncodecModel(config).state_dict()
    state = to_original(state, config) if original else state
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def released_with_shapes(state: Mapping[str, torch.Tensor], *, original: bool) -> ReleasedCheckpoint | None:
    """The released codec that has exactly these names and shapes; `None` if there is none."""
    known = _released_shapes(original)
    return next((entry for entry, shapes in known.items() if _faults(state, shapes) == 0), None)


@functools.cache
def _released_shapes(original: bool) -> dict[ReleasedCheckpoint, dict[str, tuple[int, ...]]]:
    codecs = [entry for entry in RELEASED if not entry.is_language_model]
    return {entry: codec_shapes(entry.make_config(), original=original) for entry in codecs}


def codec_config(
    ours: Mapping[str, torch.Tensor],
    said: Sequence[Said],
    *,
    state: Mapping[str, torch.Tensor] | None = None,
    all_halves: bool = False,
) -> tuple[EncodecConfig, dict[str, str]]:
    """The configuration for weights, and who said each field that is not in their shapes.

    Args:
        ours: the weights under our names.
        said: fields that somebody says, who comes first first.
        state: the same weights under the original's names, in which errors are told then.
        all_halves: the model is trained for half of its codebooks, a quarter and so on, too.

    Raises:
        ValueError: for weights that are missing, unexpected or of another shape, for fields that contradict the
            weights, and for fields that nobody says.
    """
    original, named = state is not None, ours if state is None else state
    found = released_with_shapes(named, original=original)
    sizes = codec_sizes(ours) if found is None else {name: getattr(found.make_config(), name) for name in SIZES}
    codebooks = _count(ours, r"quantizer\.layers\.(\d+)\.")
    fields, who = dict(sizes), {}
    if found is not None and found.describes_behaviour:
        config = found.make_config()
        likeness = {name: getattr(config, name) for name in (*BEHAVIOUR, "target_bandwidths")}
        said = [*said, Said(f"as {found.name}", likeness)]
    for one in reversed(said):
        fields |= one.fields
        who |= dict.fromkeys(one.fields, one.who)
    who = {name: one for name, one in who.items() if name not in SIZES}
    if found is None:
        _check_against_nearest(named, sizes, codebooks, original=original)
    _check_said(named, sizes, fields, said, codebooks, original=original)
    _check_complete(fields)
    if "target_bandwidths" not in fields:
        fields["target_bandwidths"] = _bandwidths(fields, codebooks, all_halves)
        who["target_bandwidths"] = "the codebooks there are"
    config = EncodecConfig(**fields)
    if config.num_quantizers != codebooks:
        raise ValueError(
            f"target_bandwidths is {list(config.target_bandwidths)}, which takes {config.num_quantizers} codebooks, "
            f"allowed: up to {_full_bandwidth(fields, codebooks):g} kbps, as the weights have {codebooks}"
        )
    check_shapes(named, codec_shapes(config, original=original), "codec")
    return config, who


def codec_sizes(state: Mapping[str, torch.Tensor]) -> dict[str, object]:
    """The fields of `SIZES` for weights under our names.

    Raises:
        ValueError: if the weights show none of a size, so are no EnCodec model's.
    """
    encoder, decoder = (_numbers(state, rf"{side}\.layers\.(\d+)\.conv\.") for side in ("encoder", "decoder"))
    first_in, last_in = (
        f"encoder.layers.{index}.conv" for index in (min(encoder, default=0), max(encoder, default=0))
    )
    first_out, last_out = (
        f"decoder.layers.{index}.conv" for index in (min(decoder, default=0), max(decoder, default=0))
    )
    levels = max(1, _most("resampling layers", [len(decoder) - 2, len(encoder) - 2]))
    conv = _Convolutions(state)
    deepest = 2**levels
    filters = _most(
        "width of the first convolution",
        [conv(first_in, 0), conv(last_out, 1), *(_divide(n, deepest) for n in (conv(first_out, 0), conv(last_in, 1)))],
    )
    ratios = []
    for up, down in zip(decoder[1:-1], reversed(encoder[1:-1])):
        kernels = [conv(f"decoder.layers.{up}.conv", 2), conv(f"encoder.layers.{down}.conv", 2)]
        ratios.append(max(1, _most("stride", kernels) // 2))
    blocks = {side: _numbers(state, rf"{side}\.layers\.(\d+)\.block\.") for side in ("encoder", "decoder")}
    units = _most("residual units", [len(layers) // levels for layers in blocks.values()])
    return {
        "audio_channels": _most("audio channels", [conv(first_in, 1), conv(last_out, 0)]),
        "hidden_size": _most("latent width", [conv(last_in, 0), conv(first_out, 1), *_codebooks(state, 1)]),
        "num_filters": filters,
        "num_residual_layers": units,
        "upsampling_ratios": ratios,
        "norm_type": _norm_type(state),
        "kernel_size": _most("first kernel", [conv(first_in, 2), conv(first_out, 2)]),
        "last_kernel_size": _most("last kernel", [conv(last_in, 2), conv(last_out, 2)]),
        **_residual_sizes(conv, filters, levels, blocks["encoder"], units),
        "num_lstm_layers": _lstm_layers(state),
        "codebook_size": _most("codebook size", _codebooks(state, 0)),
        "use_conv_shortcut": units == 0 or any(".shortcut." in name for name in state),
    }


# ---- sizes -------------------------------------------------------------------------------------------------------


class _Convolutions:
    """Shapes of convolution weights, whose norm splits them in two or not."""

    def __init__(self, state: Mapping[str, torch.Tensor]):
        self.state = state

    def __call__(self, layer: str, axis: int) -> int | None:
        """Size along `axis`; `None` where the weight is not there or is no convolution's."""
        for name in (f"{layer}.parametrizations.weight.original1", f"{layer}.weight"):
            if name in self.state and self.state[name].dim() == 3:
                return self.state[name].shape[axis]
        return None


def _residual_sizes(conv: _Convolutions, filters: int, levels: int, blocks: list[int], units: int) -> dict[str, int]:
    """Kernel and narrowing of the residual units; the usual ones, within limits, where there are none."""
    usual = {"residual_kernel_size": 3, "compress": min(2, filters)}
    if units == 0:
        return usual
    kernels, narrow = [], []
    for place, index in enumerate(blocks[: levels * units]):
        layer = f"encoder.layers.{index}.block.1.conv"
        kernels.append(conv(layer, 2))
        if conv(layer, 0) is not None:
            narrow.append((filters * 2 ** (place // units), conv(layer, 0)))
    # Several may do where widths are small, and are the same then.
    candidates = [usual["compress"], *range(1, filters + 1)]
    compress = max(candidates, key=lambda c: sum(wide // c == hidden for wide, hidden in narrow))
    return {"residual_kernel_size": _most("kernel of the residual units", kernels), "compress": compress}


def _norm_type(state: Mapping[str, torch.Tensor]) -> str:
    weight_norm = sum(name.endswith("weight.original0") for name in state)
    group_norm = sum(name.endswith(".norm.weight") for name in state)
    if weight_norm == group_norm == 0:
        raise ValueError("the codec's convolutions have no norm, allowed: weight norm or group norm")
    return "weight_norm" if weight_norm >= group_norm else "time_group_norm"


def _lstm_layers(state: Mapping[str, torch.Tensor]) -> int:
    counts = [_count(state, rf"{side}\.layers\.\d+\.lstm\.\w+_l(\d+)$") for side in ("encoder", "decoder")]
    if max(counts) == 0:
        raise ValueError("the codec has no LSTM, allowed: at least one layer of it")
    return max(counts)


def _codebooks(state: Mapping[str, torch.Tensor], axis: int) -> list[int]:
    names = [name for name in state if re.fullmatch(r"quantizer\.layers\.\d+\.codebook\.embed", name)]
    return [state[name].shape[axis] for name in names if state[name].dim() == 2]


def _most(what: str, sizes: list[int | None]) -> int:
    """The most frequent of sizes that should be one, of equally frequent ones the first."""
    counted = Counter(size for size in sizes if size is not None and size >= 0)
    if not counted:
        raise ValueError(f"the codec's weights do not show the {what}: those that do are missing")
    return counted.most_common(1)[0][0]


def _divide(size: int | None, by: int) -> int | None:
    return None if size is None else size // by


def _numbers(state: Mapping[str, torch.Tensor], pattern: str) -> list[int]:
    """The different numbers that names have there, ascending."""
    return sorted({int(match[1]) for match in (re.match(pattern, name) for name in state) if match})


def _count(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    return len(_numbers(state, pattern))


# ---- checks ------------------------------------------------------------------------------------------------------


def _faults(state, expected) -> int:
    return sum(map(len, wrong_shapes(state, expected).values()))


def _check_against_nearest(named, sizes: dict, codebooks: int, *, original: bool) -> None:
    """Refuse names and shapes that are none that `sizes` makes, in the words of the nearest architecture known."""
    own = codec_shapes(_any_behaviour(sizes, codebooks), original=original)
    candidates = [own, *_released_shapes(original).values()]
    check_shapes(named, min(candidates, key=lambda shapes: _faults(named, shapes)), "codec")


def _any_behaviour(sizes: dict, codebooks: int) -> EncodecConfig:
    """A configuration of these sizes, whatever it does with them."""
    fields = sizes | {"sampling_rate": math.prod(sizes["upsampling_ratios"]), "use_causal_conv": False}
    return EncodecConfig(**fields, target_bandwidths=[_full_bandwidth(fields, codebooks)])


def _check_said(named, sizes: dict, fields: dict, said: Sequence[Said], codebooks: int, *, original: bool) -> None:
    """Refuse a size that somebody says and the weights do not have."""
    other = [name for name in SIZES if _plain(fields[name]) != _plain(sizes[name])]
    if not other:
        return
    told = _any_behaviour({name: fields[name] for name in SIZES}, codebooks)
    if _faults(named, codec_shapes(told, original=original)) == 0:
        return  # sizes of what is not there, as a kernel without residual units
    name = other[0]
    who = next(one.who for one in said if name in one.fields)
    raise ValueError(
        f"{name} is {_plain(fields[name])!r} ({who}), allowed: {_plain(sizes[name])!r}, as in the weights"
    )


def _check_complete(fields: dict) -> None:
    """Refuse fields that nobody says and that make a difference."""
    unneeded = {
        "overlap": fields.get("chunk_length_s") is None,
        "dilation_growth_rate": fields["num_residual_layers"] <= 1,
        "trim_right_ratio": fields.get("use_causal_conv") is False,
    }
    missing = [name for name in BEHAVIOUR if name not in fields and not unneeded.get(name, False)]
    if missing:
        raise ValueError(
            f"the weights do not tell {', '.join(missing)}: give --set FIELD=VALUE for each, or --like encodec_24khz "
            "or encodec_48khz"
        )


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


# ---- bandwidths --------------------------------------------------------------------------------------------------


def _bandwidths(fields: dict, codebooks: int, all_halves: bool) -> list[float]:
    """That of all codebooks, and of half of them, a quarter and so on."""
    counts = [codebooks]
    while all_halves and counts[-1] > 1:
        counts.append(counts[-1] // 2)
    return [_full_bandwidth(fields, count) for count in reversed(counts)]


def _full_bandwidth(fields: dict, codebooks: int) -> float:
    """kbps of so many codebooks, rounded so that it pays for them."""
    frame_rate = math.ceil(fields["sampling_rate"] / math.prod(fields["upsampling_ratios"]))
    bits = max(1, frame_rate * math.ceil(math.log2(max(2, fields["codebook_size"]))))
    bandwidth = codebooks * bits / 1000
    while int(1000 * bandwidth // bits) < codebooks:
        bandwidth = math.nextafter(bandwidth, math.inf)
    return bandwidth
