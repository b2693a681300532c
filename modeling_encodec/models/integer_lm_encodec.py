# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""The language model in whole numbers: probabilities that are the same on every machine.

A range coder's two ends need *equal* probabilities. Floats depend on thread counts, batch shapes, kernels and devices;
sums of whole numbers do not. Everything here is a whole number, or a whole number times a power of two, carried in
floats, and every operation on it is exact, so neither order, nor fusion, nor TF32, nor how many frames are computed at
once can change a result:

- Products of weights and activations, both within 127: float32. Calibration makes sure that no sum of their sizes,
  bias included, reaches 2**24, below which float32 has every whole number. A CPU takes its int8 product, several times
  as fast, if a probe with the greatest values shows that it is exact there (some processors' instructions saturate).
- Scaling: by powers of two, then `floor`. Halves for rounding are in the biases.
- Everything else, scores included: float64, below 2**53.
- Quotients and roots are the only inexact ones, and only their floor is used: of an odd number over an even one, or of
  a whole number and a half. Those stay further from any whole number than a careless division or root could be off.
- exp and GELU: tables, which lie in the checkpoint. Nothing is computed by `exp` or `sin` here.

On a CPU the same lines run on numpy arrays instead of tensors, for at one frame a time the work is small and what each
operation costs besides it counts. The form needs float64, which Apple's GPUs lack: it then runs on the CPU. The price
in bits is measured in `tests/benchmarks/bench_lm_bits.py`.
"""

import functools
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import torch
from torch import nn

from .batching_encodec import refuse_tracing
from .configuration_encodec import EncodecLMConfig
from .weight_cache_encodec import WeightCache


# What is computed from the tables, and how. A change that changes any result takes a new number.
FORM = 1
# The numbers of a code's distribution sum to this, in every version of the form.
TOTAL = 1 << 24
# Activations that enter a product are within this.
MOST_ACTIVATION = 127
# The residual stream counts units of 2**-RESIDUAL_BITS, within RESIDUAL_LIMIT of them; sums before a norm, twice that.
RESIDUAL_BITS = 10
RESIDUAL_LIMIT = (1 << 15) - 1
# Gain and offset of a norm: a gain counts 2**-GAIN_BITS, the normalised value 2**-INVERSE_BITS.
GAIN_BITS = 8
INVERSE_BITS = 30
# exp(-x) for x in steps of 2**-STEP_BITS; what lies beyond the table's end is 0.
ATTENTION_STEP_BITS, ATTENTION_ENTRIES, ATTENTION_ONE = 6, 1024, 1 << 16
OUTPUT_STEP_BITS, OUTPUT_ENTRIES, OUTPUT_ONE = 7, 2048, 1 << 20
GELU_ENTRIES = 1024
# Frames, and numbers of their distributions, computed at once: that bounds memory.
BLOCK_FRAMES, BLOCK_NUMBERS = 128, 1 << 22
# Multiplications of one matrix product, above which numpy might use threads.
SMALL_PRODUCT = 9000
# Below every score, and exact in float32.
HIDDEN_SCORE = -(2.0**40)


class Tables(nn.Module):
    """Buffers that are read, and never computed with here. Calling it gives them by name; so do they come back where
    they are offloaded."""

    def forward(self) -> dict[str, torch.Tensor]:
        """Its own tensors."""
        return dict(self._buffers)


class IntegerLinear(Tables):
    """floor((weight x + bias) 2**exponent): `weight` (out, in) int8, `bias` int32 and `exponent` int8 (out,)."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(width_out, width_in, dtype=torch.int8))
        self.register_buffer("bias", torch.zeros(width_out, dtype=torch.int32))
        self.register_buffer("exponent", torch.zeros(width_out, dtype=torch.int8))


class IntegerNorm(Tables):
    """Layer norm: `gain` int32 and `offset` int64 (D,); `epsilon` int64 () is what is added to the sum of squares."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("gain", torch.zeros(width, dtype=torch.int32))
        self.register_buffer("offset", torch.zeros(width, dtype=torch.int64))
        self.register_buffer("epsilon", torch.zeros((), dtype=torch.int64))


class IntegerLMLayer(Tables):
    """Tables of one Transformer layer. Exponents turn units of one place into those of the next."""

    def __init__(self, config: EncodecLMConfig):
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.register_buffer("input_exponent", torch.zeros(width, dtype=torch.int8))
        self.qkv_proj = IntegerLinear(width, 3 * width)
        self.register_buffer("score_exponent", torch.zeros(heads, dtype=torch.int8))
        self.register_buffer("attended_exponent", torch.zeros(heads, dtype=torch.int8))
        self.o_proj = IntegerLinear(width, width)
        self.attention_norm = IntegerNorm(width)
        self.register_buffer("middle_exponent", torch.zeros(width, dtype=torch.int8))
        self.up_proj = IntegerLinear(width, config.intermediate_size)
        self.register_buffer("gelu", torch.zeros(GELU_ENTRIES, dtype=torch.int8))
        self.down_proj = IntegerLinear(config.intermediate_size, width)
        self.output_norm = IntegerNorm(width)


@dataclass
class IntegerLMCache:
    """What the frames so far leave for the next ones: each layer's keys and values, and how many frames there were."""

    program: "_Program"
    memories: list["_Memory"]
    frames: int = 0


class IntegerLM(Tables):
    """The tables, as they lie in a checkpoint, and `frequencies`."""

    def __init__(self, config: EncodecLMConfig):
        super().__init__()
        self.config = config
        width, books = config.hidden_size, config.num_codebooks
        self.register_buffer("embeddings", torch.zeros(books * (config.codebook_size + 1), width, dtype=torch.int8))
        self.register_buffer("embedding_exponent", torch.zeros(books, dtype=torch.int8))
        self.input_norm = IntegerNorm(width)
        self.register_buffer("positions", torch.zeros(config.max_positions, width, dtype=torch.int16))
        self.layers = nn.ModuleList(IntegerLMLayer(config) for _ in range(config.num_hidden_layers))
        self.register_buffer("head_exponent", torch.zeros(width, dtype=torch.int8))
        self.head = IntegerLinear(width, books * config.codebook_size)
        self.register_buffer("form", torch.zeros((), dtype=torch.int32))
        self.register_buffer("attention_exp", torch.zeros(ATTENTION_ENTRIES, dtype=torch.int32))
        self.register_buffer("output_exp", torch.zeros(OUTPUT_ENTRIES, dtype=torch.int32))
        self.cache = WeightCache()

    def frequencies(
        self, previous: torch.Tensor, cache: IntegerLMCache | None = None
    ) -> tuple[torch.Tensor, IntegerLMCache]:
        """See `EncodecLM.frequencies`; (B, K, F, codebook_size) int32."""
        shares, cache = self.shares(previous, cache)
        return torch.as_tensor(shares + 1, device=cache.program.device).to(torch.int32).transpose(1, 2), cache

    @torch.compiler.disable
    def shares(
        self, previous: torch.Tensor, cache: IntegerLMCache | None = None, *, device: str | None = None
    ) -> "tuple[Array, IntegerLMCache]":
        """Frequencies less 1, as float64 (B, F, K, codebook_size), computed where the tables are, or on `device`: a
        numpy array on a CPU, else a tensor."""
        refuse_tracing("EncodecLM")
        rows = len(previous)
        # Outside of inference mode, whatever the caller is in: of tensors made there none could be written to later.
        with torch.inference_mode(False), torch.no_grad():
            if cache is None:
                program = self._current_program(device)
                cache = IntegerLMCache(program, program.first_memories(rows))
            elif not isinstance(cache, IntegerLMCache) or cache.memories[0].pairs.shape[1] != rows:
                raise ValueError(f"cache is not of {rows} rows, allowed: what frequencies() returned for these rows")
            return self._run(previous, cache)

    def _run(self, previous: torch.Tensor, cache: IntegerLMCache) -> "tuple[Array, IntegerLMCache]":
        program, blocks = cache.program, []
        with torch.autocast(program.device.type, enabled=False):
            numbers = previous.shape[0] * previous.shape[1] * program.config.codebook_size
            for block in previous.split(max(1, min(BLOCK_FRAMES, BLOCK_NUMBERS // numbers)), dim=2):
                hidden, memories = program.hidden(block, cache)
                cache = IntegerLMCache(program, memories, cache.frames + block.shape[2])
                blocks.append(program.shares(hidden, block.shape[1]))
        return program.xp.concatenate(blocks, axis=1) if len(blocks) > 1 else blocks[0], cache

    def _current_program(self, device: str | None = None) -> "_Program":
        """The tables in the numbers they are computed in, made anew when they have changed or moved."""
        if device is not None and torch.device(device) == self.embeddings.device:
            device = None
        make = functools.partial(_Program, self, device)
        return self.cache.get(("program", device), list(self.buffers()), make, trained=False)


Array = np.ndarray | torch.Tensor


@dataclass
class _Memory:
    """Keys and values (2, B, heads, room, head_dim) of one layer, of which the first `length` count.

    Later frames are written behind them. Of two continuations of one cache the second finds the place taken, by
    `taken`, and copies: a cache stays what it is.
    """

    pairs: Array
    length: int
    taken: list[int] = field(default_factory=lambda: [0])

    def extended(self, pairs: Array, reach: int, place: "_Place") -> tuple["_Memory", Array]:
        """The memory for the frames after these, and all keys and values that these may see."""
        frames, length, room, taken = pairs.shape[3], self.length, self.pairs, self.taken
        if taken[0] != length or length + frames > room.shape[3]:
            kept = min(length, reach)
            room = place.zeros(*pairs.shape[:3], 2 * reach + frames + 1, pairs.shape[4])
            room[:, :, :, :kept] = self.pairs[:, :, :, length - kept : length]
            length, taken = kept, [0]
        end = length + frames
        room[:, :, :, length:end] = pairs
        taken[0] = end
        return _Memory(room, end, taken), room[:, :, :, max(0, length - reach) : end]


@functools.cache
def int8_products_are_exact(width_in: int, width_out: int) -> bool:
    """Whether `torch._int_mm` gives exact products of these sizes on this CPU, tried with the greatest factors."""
    if not hasattr(torch, "_int_mm"):
        return False
    most = torch.full((width_in,), MOST_ACTIVATION, dtype=torch.int8, device="cpu")
    signs = most * torch.tensor([1, -1], dtype=torch.int8, device="cpu").repeat(width_in)[:width_in]
    pairs = most * torch.tensor([1, 1, -1, -1], dtype=torch.int8, device="cpu").repeat(width_in)[:width_in]
    patterns = torch.stack([most, -most, signs, -signs, pairs, -pairs])
    weight = patterns.repeat(-(-width_out // 6), 1)[:width_out]
    given = patterns.repeat(-(-BLOCK_FRAMES // 6), 1)[:BLOCK_FRAMES]
    expected = patterns.double() @ patterns.double().t()
    expected = expected.repeat(-(-BLOCK_FRAMES // 6), -(-width_out // 6))[:BLOCK_FRAMES, :width_out]
    try:
        return all(
            torch.equal(torch._int_mm(given[:rows], weight.t()).double(), expected[:rows])
            for rows in (1, 2, 7, 16, BLOCK_FRAMES)
        )
    except (RuntimeError, NotImplementedError):
        return False


class _Place:
    """Where a program computes, on numpy arrays or on tensors, and what the two write differently."""

    def __init__(self, device: torch.device):
        self.device, self.on_cpu = device, device.type == "cpu"
        self.xp: ModuleType = np if self.on_cpu else torch
        self.float64 = self.xp.float64
        self._numerators: dict[float, torch.Tensor] = {}
        self.half = torch.full((), 0.5, dtype=torch.float64, device=device)
        self._powers = torch.tensor([2.0**exponent for exponent in range(-64, 64)], dtype=torch.float64, device=device)

    def array(self, table: torch.Tensor, dtype: torch.dtype = torch.float64) -> Array:
        """A table in the numbers it is computed in."""
        table = table.detach().to(self.device).to(dtype)  # in this order: not every device has every type
        return table.numpy() if self.on_cpu else table

    def powers(self, exponents: torch.Tensor) -> Array:
        """2**exponents, exactly: `ldexp` may be computed by way of `pow`."""
        powers = self._powers[exponents.detach().to(self.device).long() + 64]
        return powers.numpy() if self.on_cpu else powers

    def number(self, value: float) -> np.float64 | float:
        """What `limit`, `at_least` and `at_most` take."""
        return np.float64(value) if self.on_cpu else float(value)

    def zeros(self, *shape: int) -> Array:
        """Zeros, float64."""
        return np.zeros(shape) if self.on_cpu else torch.zeros(shape, dtype=torch.float64, device=self.device)

    def limit(self, x: Array, least: float, most: float) -> Array:
        """`x` within [least, most], in place."""
        if not self.on_cpu:
            return x.clamp_(least, most)
        np.maximum(x, least, out=x)
        return np.minimum(x, most, out=x)

    def at_least(self, x: Array, least: float) -> Array:
        """In place."""
        return np.maximum(x, least, out=x) if self.on_cpu else x.clamp_(min=least)

    def at_most(self, x: Array, most: float) -> Array:
        """In place."""
        return np.minimum(x, most, out=x) if self.on_cpu else x.clamp_(max=most)

    def nearest(self, x: Array, scale: Array) -> Array:
        """The whole numbers nearest to `x` times powers of two; halves go up."""
        if not self.on_cpu:
            return torch.addcmul(self.half, x, scale).floor_()
        x = x * scale
        x += 0.5
        return np.floor(x, out=x)

    def floor(self, x: Array) -> Array:
        """In place."""
        return self.xp.floor(x, out=x)

    def quotient(self, one: float, x: Array) -> Array:
        """The floor of one / x, which must be far enough from whole numbers."""
        if self.on_cpu:
            return self.floor(one / x)
        if one not in self._numerators:  # a number would be multiplied with a reciprocal
            self._numerators[one] = torch.tensor(one, dtype=torch.float64, device=self.device)
        return self.floor(self._numerators[one] / x)

    def root(self, x: Array) -> Array:
        """The floor of the root of `x`, which must be far enough from squares, in place."""
        return self.floor(self.xp.sqrt(x, out=x))

    def product(self, a: Array, b: Array) -> Array:
        """Matrix product. numpy's is the faster one, but where it is large it starts threads of its own."""
        if self.on_cpu and a.shape[2] * b.shape[2] * b.shape[3] > SMALL_PRODUCT:
            return torch.matmul(torch.from_numpy(a), torch.from_numpy(b)).numpy()
        return a @ b

    def transposed(self, x: Array, order: tuple[int, ...]) -> Array:
        """`x` with its dimensions in this order."""
        return x.transpose(order) if self.on_cpu else x.permute(order)

    def looked_up(self, table: Array, index: Array) -> Array:
        """Entries of a table at whole numbers that floats hold."""
        if self.on_cpu:
            return table.take(index.astype(np.int64))
        return table.index_select(0, index.flatten().long()).view(index.shape)


class _Linear:
    """Activations (B, F, in), whole numbers within MOST_ACTIVATION, to (B, F, out); its first `rows` outputs alone."""

    def __init__(self, tables: IntegerLinear, place: _Place, rows: int | None = None):
        tables = tables()
        self.place, weight = place, tables["weight"][:rows].to(place.device)
        self.int8 = place.on_cpu and int8_products_are_exact(weight.shape[1], weight.shape[0])
        self.weight = (weight if self.int8 else weight.float()).t()
        self.bias, self.scale = place.array(tables["bias"][:rows]), place.powers(tables["exponent"][:rows])
        self.scaled_bias = self.bias * self.scale  # as exact as the product's sum with it

    def __call__(self, x: Array) -> Array:
        if self.place.on_cpu:
            rows = torch.from_numpy(x.reshape(-1, x.shape[2]).astype(np.int8 if self.int8 else np.float32))
            product = (torch._int_mm(rows, self.weight) if self.int8 else rows @ self.weight).numpy()
        else:
            product = x.flatten(0, 1).float() @ self.weight
            x = torch.addcmul(self.scaled_bias, product, self.scale).view(*x.shape[:2], -1)
            return self.place.floor(x)
        x = product.reshape(*x.shape[:2], -1) + self.bias
        x *= self.scale
        return self.place.floor(x)


class _Norm:
    def __init__(self, tables: IntegerNorm, place: _Place):
        self.place, tables = place, tables()
        # With this the product of gain and normalised value counts residual units.
        unit = 2.0 ** (RESIDUAL_BITS - GAIN_BITS - INVERSE_BITS)
        self.gain, self.offset = place.array(tables["gain"]) * unit, place.array(tables["offset"]) * unit
        self.epsilon, self.share = float(tables["epsilon"]) + 0.5, 1 / len(self.gain)
        self.one, self.limits = place.number(1), (place.number(-RESIDUAL_LIMIT), place.number(RESIDUAL_LIMIT))

    def __call__(self, x: Array) -> Array:
        """Whole numbers within 2 RESIDUAL_LIMIT to residual units."""
        place = self.place
        mean = x.sum(axis=-1, keepdims=True)
        mean += 0.5
        mean *= self.share
        x = x - place.floor(mean)
        square = (x * x).sum(axis=-1, keepdims=True)
        square += self.epsilon
        root = place.root(square)
        x *= place.quotient(2.0**INVERSE_BITS + 0.5, place.at_least(root, self.one))
        x *= self.gain
        x += self.offset
        return place.limit(place.floor(x), *self.limits)


class _Activations:
    """The residual stream, or another place's whole numbers, in the units of the product it enters."""

    def __init__(self, exponent: torch.Tensor, place: _Place):
        self.place, self.scale = place, place.powers(exponent)
        self.limits = (place.number(-MOST_ACTIVATION), place.number(MOST_ACTIVATION))

    def __call__(self, x: Array) -> Array:
        return self.place.limit(self.place.nearest(x, self.scale), *self.limits)


class _Layer:
    def __init__(self, tables: IntegerLMLayer, config: EncodecLMConfig, place: _Place):
        self.place, self.heads, self.reach = place, config.num_attention_heads, config.context_frames
        for name in ("qkv_proj", "o_proj", "up_proj", "down_proj"):
            setattr(self, name, _Linear(getattr(tables, name), place))
        self.attention_norm, self.output_norm = _Norm(tables.attention_norm, place), _Norm(tables.output_norm, place)
        tables = tables()
        self.into, self.middle = (_Activations(tables[f"{name}_exponent"], place) for name in ("input", "middle"))
        self.score_scale = place.powers(tables["score_exponent"])[:, None, None]
        self.attended = _Activations(tables["attended_exponent"][:, None, None], place)
        self.attended.scale *= 2.0**-40
        self.gelu = place.array(tables["gelu"])
        self.limits = (place.number(-2 * RESIDUAL_LIMIT), place.number(2 * RESIDUAL_LIMIT))
        self.entries = (place.number(0), place.number(GELU_ENTRIES - 1))
        self.last_step = place.number(ATTENTION_ENTRIES - 1)

    def split(self, x: Array) -> Array:
        """Queries, keys and values (3, B, heads, F, head_dim) of activations (B, F, D)."""
        qkv = self.place.limit(self.qkv_proj(x), *self.attended.limits)
        return self.place.transposed(qkv.reshape(*x.shape[:2], 3, self.heads, -1), (2, 0, 3, 1, 4))

    def __call__(self, hidden: Array, memory: _Memory, unseen, exp) -> tuple[Array, _Memory]:
        place = self.place
        qkv = self.split(self.into(hidden))
        memory, (keys, values) = memory.extended(qkv[1:], self.reach, place)
        attended = self._attend(qkv[0], keys, values, unseen, exp)
        total = self.o_proj(attended.swapaxes(1, 2).reshape(hidden.shape))
        total += hidden
        hidden = self.attention_norm(place.limit(total, *self.limits))
        index = place.limit(self.up_proj(self.middle(hidden)), *self.entries)
        total = self.down_proj(place.looked_up(self.gelu, index))
        total += hidden
        return self.output_norm(place.limit(total, *self.limits)), memory

    def _attend(self, query: Array, keys: Array, values: Array, unseen, exp) -> Array:
        """Means of values (B, heads, F, head_dim), weighted by a table's exp of the scores."""
        place = self.place
        scores = place.product(query, keys.swapaxes(2, 3))
        if unseen is not None:
            scores = place.xp.where(unseen, HIDDEN_SCORE, scores)
        distance = place.xp.amax(scores, axis=-1, keepdims=True) - scores
        distance *= self.score_scale
        weights = place.looked_up(exp, place.at_most(distance, self.last_step))
        mean = place.product(weights, values)
        mean *= place.quotient(2.0**40 + 0.5, weights.sum(axis=-1, keepdims=True))
        return self.attended(mean)


class _Program:
    """The tables in the numbers they are computed in, in one place: where they are, or on `device`."""

    def __init__(self, tables: IntegerLM, device: str | None = None):
        config, own = tables.config, tables()
        if own["form"].item() != FORM:
            raise ValueError(f"the integer form is version {own['form'].item()}, allowed: {FORM}")
        device = own["embeddings"].device if device is None else torch.device(device)
        place = _Place(torch.device("cpu") if device.type == "mps" else device)  # which has no float64
        self.config, self.place, self.device, self.xp = config, place, place.device, place.xp
        rows = config.codebook_size + 1
        scale = torch.as_tensor(place.powers(own["embedding_exponent"]), device=place.device)[:, None, None]
        embeddings = own["embeddings"].to(place.device).unflatten(0, (config.num_codebooks, rows)) * scale
        self.embeddings = place.array(embeddings.flatten(0, 1), torch.float32)
        self.starts = place.array(rows * torch.arange(config.num_codebooks, device="cpu") + 1, torch.int64)
        self.input_norm = _Norm(tables.input_norm, place)
        self.positions = place.array(own["positions"])
        self.layers = [_Layer(layer, config, place) for layer in tables.layers]
        self.head_activations = _Activations(own["head_exponent"], place)
        self.head = functools.cache(lambda books: _Linear(tables.head, place, books * config.codebook_size))
        self.attention_exp, self.output_exp = place.array(own["attention_exp"]), place.array(own["output_exp"])
        self.last_step = place.number(OUTPUT_ENTRIES - 1)

    def first_memories(self, batch: int) -> list[_Memory]:
        """Memories before the first frame: empty, or with what a zero vector gives (`zero_past_key`)."""
        zeros, count = self.place.zeros(batch, 1, self.config.hidden_size), int(self.config.zero_past_key)
        return [_Memory(layer.split(zeros)[1:, :, :, :count], count, [-1]) for layer in self.layers]

    def hidden(self, previous: torch.Tensor, cache: IntegerLMCache) -> tuple[Array, list[_Memory]]:
        """The last layer's residual stream (B, F, D) for frames whose predecessors are `previous` (B, K, F)."""
        place, (books, frames) = self.place, previous.shape[1:]
        index = place.array(previous, torch.int64).swapaxes(1, 2) + self.starts[:books]
        hidden = self.input_norm(self.embeddings[index].sum(axis=2, dtype=place.float64))
        hidden += self._positions(cache.frames, frames)
        hidden = place.limit(hidden, *self.input_norm.limits)
        unseen, memories = None, []
        past, reach = min(cache.memories[0].length, self.config.context_frames), self.config.context_frames
        if frames > 1:
            positions = torch.arange(past + frames, device=self.device)
            distance = positions[past:, None] - positions
            unseen = place.array((distance < 0) | (distance > reach), torch.bool)
        for layer, memory in zip(self.layers, cache.memories):
            hidden, memory = layer(hidden, memory, unseen, self.attention_exp)
            memories.append(memory)
        return hidden, memories

    def _positions(self, start: int, frames: int) -> Array:
        """Rows of the table of positions, which begins again after its end."""
        start %= len(self.positions)
        if start + frames <= len(self.positions):
            return self.positions[start : start + frames]
        return self.positions[self.xp.arange(start, start + frames) % len(self.positions)]

    def shares(self, hidden: Array, books: int) -> Array:
        """What is shared out by exp of the logits (B, F, K, V): all of TOTAL but 1 for each code."""
        weights = self.weights(hidden, books)
        rest = TOTAL - self.config.codebook_size
        # In 2**-24 of a share; with this the quotient is far enough from whole numbers to be floored safely.
        inverse = self.place.quotient(2.0**24 * rest + 0.5, weights.sum(axis=-1, keepdims=True))
        inverse *= 2.0**-24
        weights *= inverse
        shares = self.place.floor(weights)
        shares[..., -1] += rest - shares.sum(axis=-1)  # what rounding down left, a few millionths
        return shares

    def weights(self, hidden: Array, books: int) -> Array:
        """A table's exp of the logits (B, F, K, V), relative to the greatest of a code."""
        logits = self.logits(hidden, books)
        distance = self.xp.amax(logits, axis=-1, keepdims=True) - logits
        return self.place.looked_up(self.output_exp, self.place.at_most(distance, self.last_step))

    def logits(self, hidden: Array, books: int) -> Array:
        """(B, F, K, V), in steps of 2**-OUTPUT_STEP_BITS nats."""
        return self.head(books)(self.head_activations(hidden)).reshape(*hidden.shape[:2], books, -1)
