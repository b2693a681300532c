# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""From the float language model to the tables of its integer form (`integer_lm_encodec`).

Every quantity gets a unit, a power of two: weights one per output channel, activations one per place (or attention
head), the one that loses least on real codes. This runs once, in floats, wherever a model is quantised; what it puts
out is stored and never computed again.
"""

import math
from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import nn

from .configuration_encodec import EncodecLMConfig
from .integer_lm_encodec import (
    ATTENTION_ENTRIES,
    ATTENTION_ONE,
    ATTENTION_STEP_BITS,
    FORM,
    GAIN_BITS,
    GELU_ENTRIES,
    INVERSE_BITS,
    MOST_ACTIVATION,
    OUTPUT_ENTRIES,
    OUTPUT_ONE,
    OUTPUT_STEP_BITS,
    RESIDUAL_BITS,
    RESIDUAL_LIMIT,
)
from .precision_encodec import exact_float32


# Values of one place that are kept to find its unit.
SAMPLES = 200_000
# What sums of squares have room for, see `integer_lm_encodec`.
MOST_WIDTH = 4096
# So that the sum of their embeddings stays within 2 RESIDUAL_LIMIT.
MOST_CODEBOOKS = 2 * RESIDUAL_LIMIT // MOST_ACTIVATION
# Of what goes in and out of layers, so that exponents stay within those that `integer_lm_encodec` knows.
MOST_VALUE = 2.0**40
EXPONENTS = {"min": -64, "max": 63}


@torch.no_grad()
def integer_tables(lm: nn.Module, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of the `IntegerLM` that computes what `lm` does, with units found on `batches` of codes (B, K, F).

    Raises:
        ValueError: for weights that are not finite or absurdly large, a model too wide, or no codes.
    """
    check_size(lm.config)
    for name, parameter in lm.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} holds NaN or infinity, allowed: finite weights")
    if not batches:
        raise ValueError("codes are none, allowed: at least one batch")
    with exact_float32():
        tables = _tables(lm, _watch(lm, batches))
    return {name: table.cpu() for name, table in tables.items()}


def _tables(lm: nn.Module, seen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    config = lm.config
    for name, values in seen.items():
        if not values.abs().max() <= MOST_VALUE:
            raise ValueError(f"{name} reaches {values.abs().max():g}, allowed for the integer form: {MOST_VALUE:g}")
    tables = _embedding_tables(lm)
    tables["positions"] = _rounded(lm.position_table(), -RESIDUAL_BITS).to(torch.int16)
    units = [_unit(seen[f"layers.{n}.qkv_proj.input"]) for n in range(config.num_hidden_layers)]
    for number, layer in enumerate(lm.layers):
        own = _layer_tables(layer, units[number], {k: seen[f"layers.{number}.{k}"] for k in LAYER_PLACES})
        tables |= {f"layers.{number}.{name}": table for name, table in own.items()}
    unit = _unit(seen[f"layers.{config.num_hidden_layers - 1}.output_norm.output"])
    tables["head_exponent"] = _filled(-RESIDUAL_BITS - unit, config.hidden_size)
    head = _linear_tables(lm.head.weight, lm.head.bias, unit, -OUTPUT_STEP_BITS)
    tables |= {f"head.{name}": table for name, table in head.items()}
    tables["attention_exp"] = _exp_table(ATTENTION_ENTRIES, ATTENTION_STEP_BITS, ATTENTION_ONE, centred=True)
    tables["output_exp"] = _exp_table(OUTPUT_ENTRIES, OUTPUT_STEP_BITS, OUTPUT_ONE, centred=False)
    tables["form"] = torch.tensor(FORM, dtype=torch.int32, device="cpu")
    return tables


def check_size(config: EncodecLMConfig) -> None:
    """Refuse a model that there is no integer form for.

    Raises:
        ValueError: with what is too large.
    """
    for name, most in (("hidden_size", MOST_WIDTH), ("num_codebooks", MOST_CODEBOOKS)):
        if getattr(config, name) > most:
            raise ValueError(f"{name} is {getattr(config, name)}, allowed for the integer form: up to {most}")


# ---- what the float model does on real codes ---------------------------------------------------------------------

LAYER_PLACES = ("qkv_proj.output", "o_proj.input", "up_proj.input", "up_proj.output", "down_proj.input")


def _watch(lm: nn.Module, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs and outputs (N, width) of every linear layer and norm, a sample of them.

    With all codebooks, half of them, a quarter and so on: fewer make another sum of embeddings.
    """
    halvings = range(max(codes.shape[1] for codes in batches).bit_length())
    batches = [codes[:, : codes.shape[1] >> n] for codes in batches for n in halvings if codes.shape[1] >> n]
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, values: torch.Tensor) -> None:
        rows = values.detach().float().flatten(0, -2)
        most = max(1, SAMPLES // rows.shape[1])
        seen.setdefault(name, []).append(rows[:: max(1, len(rows) * len(batches) // most)].cpu())

    with _hooks(lm, keep):
        for codes in batches:
            lm.hidden(codes)
    return {name: torch.cat(rows) for name, rows in seen.items()}


@contextmanager
def _hooks(lm: nn.Module, keep):
    """`keep` gets what goes in and out while the block lasts; the model is in eval mode."""
    training, handles = lm.training, []
    for name, module in lm.named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):

            def hook(module, inputs, output, name=name):
                keep(f"{name}.input", inputs[0])
                keep(f"{name}.output", output)

            handles.append(module.register_forward_hook(hook))
    lm.eval()
    try:
        yield
    finally:
        lm.train(training)
        for handle in handles:
            handle.remove()


# ---- tables ------------------------------------------------------------------------------------------------------


def _layer_tables(layer: nn.Module, unit: int, seen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tables of one layer whose input has this `unit` (its exponent)."""
    width, heads = layer.o_proj.in_features, layer.num_heads
    share = width // heads
    # Queries take the 1 / sqrt(head_dim) of the scores, so that a score's unit is a power of two too.
    factor = torch.ones(3 * width, dtype=torch.float32, device="cpu")
    factor[:width] = 1 / math.sqrt(share)
    qkv_seen = (seen["qkv_proj.output"] * factor).unflatten(1, (3 * heads, share))
    qkv_units = _exponents(_unit(values) for values in qkv_seen.unbind(1))
    query, key, value = qkv_units.view(3, heads)
    # A score's unit must not be so much finer than the table's steps that float32 would have to round.
    query = query.clamp(min=-12 - ATTENTION_STEP_BITS - key)
    qkv_units = torch.cat([query, key, value]).repeat_interleave(share)
    attended = _exponents(_unit(one) for one in seen["o_proj.input"].unflatten(1, (heads, share)).unbind(1))
    middle = _unit(seen["up_proj.input"])
    # GELU's table spans what goes in on real codes; its output gets a unit of its own.
    gelu_unit = math.ceil(math.log2(seen["up_proj.output"].abs().max().clamp(min=2**-20).item() / (GELU_ENTRIES // 2)))
    down = _unit(seen["down_proj.input"])
    steps = torch.arange(GELU_ENTRIES, dtype=torch.float64, device="cpu") - GELU_ENTRIES // 2
    steps *= 2.0**gelu_unit
    weight, bias = layer.qkv_proj.weight.cpu() * factor[:, None], layer.qkv_proj.bias.cpu() * factor
    parts = {
        "qkv_proj": _linear_tables(weight, bias, unit, qkv_units),
        "o_proj": _linear_tables(
            layer.o_proj.weight, layer.o_proj.bias, attended.repeat_interleave(share), -RESIDUAL_BITS
        ),
        "up_proj": _linear_tables(
            layer.up_proj.weight, layer.up_proj.bias, middle, gelu_unit, offset=GELU_ENTRIES // 2
        ),
        "down_proj": _linear_tables(layer.down_proj.weight, layer.down_proj.bias, down, -RESIDUAL_BITS),
        "attention_norm": _norm_tables(layer.attention_norm, -RESIDUAL_BITS),
        "output_norm": _norm_tables(layer.output_norm, -RESIDUAL_BITS),
    }
    tables = {f"{part}.{name}": table for part, own in parts.items() for name, table in own.items()}
    return tables | {
        "input_exponent": _filled(-RESIDUAL_BITS - unit, width),
        "middle_exponent": _filled(-RESIDUAL_BITS - middle, width),
        "score_exponent": (query + key + ATTENTION_STEP_BITS).clamp(**EXPONENTS).to(torch.int8),
        "attended_exponent": (value - attended).clamp(**EXPONENTS).to(torch.int8),
        "gelu": _rounded(nn.functional.gelu(steps), down).clamp(-MOST_ACTIVATION, MOST_ACTIVATION).to(torch.int8),
    }


def _embedding_tables(lm: nn.Module) -> dict[str, torch.Tensor]:
    """Embeddings, one unit per codebook, and the norm over their sum, which must stay within 2 RESIDUAL_LIMIT."""
    config = lm.config
    books = lm.embeddings.weight.detach().double().cpu().unflatten(0, (config.num_codebooks, -1))
    exponents = _exponents(_weight_unit(book.flatten()[None]).item() for book in books)
    # The sum's unit: as fine as the room allows, and no codebook's unit finer than it.
    unit = exponents.min().item() - 20
    while (MOST_ACTIVATION * 2.0 ** (exponents.clamp(min=unit) - unit).double()).sum() > 2 * RESIDUAL_LIMIT:
        unit += 1
    exponents = exponents.clamp(min=unit)
    rounded = torch.stack([_rounded(book, exponent) for book, exponent in zip(books, exponents.tolist())])
    return {
        "embeddings": rounded.clamp(-MOST_ACTIVATION, MOST_ACTIVATION).flatten(0, 1).to(torch.int8),
        "embedding_exponent": (exponents - unit).to(torch.int8),
        **{f"input_norm.{name}": table for name, table in _norm_tables(lm.input_norm, unit).items()},
    }


def _linear_tables(weight, bias, unit_in, unit_out, offset: int = 0) -> dict[str, torch.Tensor]:
    """Tables of a linear layer (out, in) from and to activations of these units (exponents, one or one per channel).

    The bias also carries `offset`, in units of the output, and the half that makes `floor` round.
    """
    weight, bias = weight.detach().double().cpu(), bias.detach().double().cpu()
    weight = weight * _power(unit_in)
    unit_out = torch.as_tensor(unit_out, device="cpu").expand(len(weight))
    exponents = _weight_unit(weight)
    while True:
        rounded = _rounded(weight, exponents[:, None]).clamp(-MOST_ACTIVATION, MOST_ACTIVATION)
        ratio = 2.0 ** (unit_out - exponents).double()
        shift = (offset * ratio + ratio / 2).floor()
        constant = _rounded(bias, exponents) + shift
        # No partial sum, in whatever order, may leave what float32 has exactly.
        full = MOST_ACTIVATION * rounded.abs().sum(1) + constant.abs() >= 2**24
        if not full.any():
            break
        exponents = exponents + full.long()
    return {
        "weight": rounded.to(torch.int8),
        "bias": constant.to(torch.int32),
        "exponent": (exponents - unit_out).clamp(**EXPONENTS).to(torch.int8),
    }


def _norm_tables(norm: nn.LayerNorm, unit: int) -> dict[str, torch.Tensor]:
    """Tables of a layer norm over whole numbers of this unit."""
    width, bits = len(norm.weight), GAIN_BITS + INVERSE_BITS
    gain = _rounded(norm.weight.detach().double().cpu() * math.sqrt(width), -GAIN_BITS).clamp(-(2**20), 2**20)
    half = 2.0 ** (bits - RESIDUAL_BITS - 1)
    offset = (_rounded(norm.bias.detach().double().cpu(), -bits) + half).clamp(-(2.0**51), 2.0**51)
    epsilon = min(round(norm.eps * width * 4.0**-unit), 2**43)
    return {
        "gain": gain.to(torch.int32),
        "offset": offset.to(torch.int64),
        "epsilon": torch.tensor(epsilon, dtype=torch.int64, device="cpu"),
    }


def _exp_table(entries: int, step_bits: int, one: int, centred: bool) -> torch.Tensor:
    """one * exp(-x) at steps of 2**-step_bits; `centred`: in the middle of each step but the first. Ends with 0."""
    x = torch.arange(entries, dtype=torch.float64, device="cpu")
    if centred:
        x[1:] += 0.5
    table = (one * (-x * 2.0**-step_bits).exp()).round()
    table[-1] = 0
    return table.to(torch.int32)


# ---- units -------------------------------------------------------------------------------------------------------


def _unit(values: torch.Tensor) -> int:
    """Exponent of the unit in which activations lose least: too coarse rounds them, too fine cuts the greatest."""
    values = values.double().flatten()
    top = _exponent_for(values.abs().max())
    losses = {unit: _loss(values, unit) for unit in range(top - 5, top + 1)}
    return min(losses, key=losses.get)


def _weight_unit(weight: torch.Tensor) -> torch.Tensor:
    """Exponents of the units in which each row of `weight` loses least."""
    top = _exponents(_exponent_for(row.abs().max()) for row in weight)
    finer = _loss(weight, (top - 1)[:, None], 1) < _loss(weight, top[:, None], 1)
    return top - finer.long()


def _loss(values: torch.Tensor, unit, *dims: int) -> torch.Tensor:
    step = _power(unit)
    kept = (values / step).round().clamp(-MOST_ACTIVATION, MOST_ACTIVATION) * step
    return (kept - values).square().sum(dims)


def _exponent_for(greatest: torch.Tensor) -> int:
    """The finest unit in which `greatest` is within MOST_ACTIVATION."""
    return math.ceil(math.log2(max(greatest.item(), 2.0**-40) / MOST_ACTIVATION))


def _rounded(values: torch.Tensor, exponent) -> torch.Tensor:
    return (values.double() / _power(exponent)).round()


def _power(exponent) -> torch.Tensor:
    """2**exponent, of one or a tensor of them, float64."""
    return 2.0 ** torch.as_tensor(exponent, dtype=torch.float64, device="cpu")


def _exponents(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device="cpu")


def _filled(value: int, width: int) -> torch.Tensor:
    return torch.full((width,), value, dtype=torch.int8, device="cpu")
