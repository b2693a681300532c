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

The price is measured in `tests/benchmarks/bench_lm.py`. The form needs float64, which Apple's GPUs lack: it then runs
on the CPU.
"""

import functools
from dataclasses import dataclass, field

import torch
from torch import nn

from .configuration_encodec import EncodecLMConfig


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
# Frames computed at once, which bounds memory.
BLOCK_FRAMES = 128
# Below every score, and exact in float32.
HIDDEN_SCORE = -(2.0**40)


class IntegerLinear(nn.Module):
    """floor((weight x + bias) 2**exponent): `weight` (out, in) int8, `bias` int32 and `exponent` int8 (out,)."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(width_out, width_in, dtype=torch.int8))
        self.register_buffer("bias", torch.zeros(width_out, dtype=torch.int32))
        self.register_buffer("exponent", torch.zeros(width_out, dtype=torch.int8))


class IntegerNorm(nn.Module):
    """Layer norm: `gain` int32 and `offset` int64 (D,); `epsilon` int64 () is what is added to the sum of squares."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("gain", torch.zeros(width, dtype=torch.int32))
        self.register_buffer("offset", torch.zeros(width, dtype=torch.int64))
        self.register_buffer("epsilon", torch.zeros((), dtype=torch.int64))


class IntegerLMLayer(nn.Module):
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


class IntegerLM(nn.Module):
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
        self.register_buffer("attention_exp", torch.zeros(ATTENTION_ENTRIES, dtype=torch.int32))
        self.register_buffer("output_exp", torch.zeros(OUTPUT_ENTRIES, dtype=torch.int32))
        self._program = None

    def frequencies(
        self, previous: torch.Tensor, cache: IntegerLMCache | None = None
    ) -> tuple[torch.Tensor, IntegerLMCache]:
        """See `EncodecLM.frequencies`; (B, K, F, codebook_size) int32."""
        rows = len(previous)
        # Outside of inference mode, whatever the caller is in: of tensors made there none could be written to later.
        with torch.inference_mode(False), torch.no_grad():
            if cache is None:
                program = self._current_program()
                cache = IntegerLMCache(program, program.first_memories(rows))
            elif not isinstance(cache, IntegerLMCache) or cache.memories[0].pairs.shape[1] != rows:
                raise ValueError(f"cache is not of {rows} rows, allowed: what frequencies() returned for these rows")
            return self._run(previous, cache)

    def _run(self, previous: torch.Tensor, cache: IntegerLMCache) -> tuple[torch.Tensor, IntegerLMCache]:
        program = cache.program
        with torch.autocast(program.device.type, enabled=False):
            blocks = []
            for block in previous.to(program.device).split(BLOCK_FRAMES, dim=2):
                hidden, memories = program.hidden(block, cache)
                cache = IntegerLMCache(program, memories, cache.frames + block.shape[2])
                blocks.append(program.distributions(hidden, block.shape[1]))
        return torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0], cache

    def _current_program(self) -> "_Program":
        """The tables as float tensors, made anew when they have changed or moved."""
        key = tuple((b.data_ptr(), None if b.is_inference() else b._version) for b in self.buffers())
        if self._program is None or self._program[0] != key:
            self._program = (key, _Program(self))
        return self._program[1]

    def __getstate__(self):
        return self.__dict__ | {"_program": None}


@dataclass
class _Memory:
    """Keys and values (2, B, heads, room, head_dim) of one layer, of which the first `length` count.

    Later frames are written behind them. Of two continuations of one cache the second finds the place taken, by
    `taken`, and copies: a cache stays what it is.
    """

    pairs: torch.Tensor
    length: int
    taken: list[int] = field(default_factory=lambda: [0])

    def extended(self, pairs: torch.Tensor, reach: int) -> tuple["_Memory", torch.Tensor]:
        """The memory for the frames after these, and all keys and values that these may see."""
        frames, length, room, taken = pairs.shape[3], self.length, self.pairs, self.taken
        if taken[0] != length or length + frames > room.shape[3]:
            kept = min(length, reach)
            room = pairs.new_zeros(*pairs.shape[:3], 2 * reach + frames + 1, pairs.shape[4])
            room[:, :, :, :kept] = self.pairs[:, :, :, length - kept : length]
            length, taken = kept, [0]
        end = length + frames
        room.narrow(3, length, frames).copy_(pairs)
        taken[0] = end
        first = max(0, length - reach)
        return _Memory(room, end, taken), room.narrow(3, first, end - first)


@functools.cache
def int8_products_are_exact(width_in: int, width_out: int, device: str) -> bool:
    """Whether `torch._int_mm` gives exact products of these sizes here, tried with the greatest factors there are."""
    if device != "cpu" or not hasattr(torch, "_int_mm"):
        return False
    most = torch.full((width_in,), MOST_ACTIVATION, dtype=torch.int8)
    signs = most * torch.tensor([1, -1], dtype=torch.int8).repeat(width_in)[:width_in]
    pairs = most * torch.tensor([1, 1, -1, -1], dtype=torch.int8).repeat(width_in)[:width_in]
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


class _Linear:
    """Activations (B, F, in), whole numbers within MOST_ACTIVATION, to (B, F, out); its first `rows` outputs alone."""

    def __init__(self, tables: IntegerLinear, device: torch.device, rows: int | None = None):
        weight = tables.weight[:rows]
        self.int8 = int8_products_are_exact(weight.shape[1], weight.shape[0], device.type)
        kind = (torch.int8, torch.int32) if self.int8 else (torch.float32, torch.float32)
        weight = weight.to(device, kind[0])
        self.weight = weight.t() if self.int8 else weight
        self.bias, self.scale = tables.bias[:rows].to(device, kind[1]), _powers(tables.exponent[:rows], device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.int8:
            product = (
                torch._int_mm(x.to(torch.int8).flatten(0, 1), self.weight).add_(self.bias).unflatten(0, x.shape[:2])
            )
        else:
            product = nn.functional.linear(x.float(), self.weight, self.bias)
        return (product * self.scale).floor_()


class _Norm:
    def __init__(self, tables: IntegerNorm, device: torch.device):
        # With this the product of gain and normalised value counts residual units.
        unit = 2.0 ** (RESIDUAL_BITS - GAIN_BITS - INVERSE_BITS)
        self.gain = tables.gain.to(device, torch.float64) * unit
        self.offset = tables.offset.to(device, torch.float64) * unit
        self.epsilon = float(tables.epsilon) + 0.5
        self.share = 1 / len(self.gain)
        self.one = torch.tensor(2.0**INVERSE_BITS + 0.5, dtype=torch.float64, device=device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Whole numbers within 2 RESIDUAL_LIMIT to residual units."""
        x = x - x.sum(-1, keepdim=True).add_(0.5).mul_(self.share).floor_()
        root = (x * x).sum(-1, keepdim=True).add_(self.epsilon).sqrt_().floor_().clamp_(min=1)
        x = x.mul_(torch.div(self.one, root).floor_())
        return torch.addcmul(self.offset, x, self.gain).floor_().clamp_(-RESIDUAL_LIMIT, RESIDUAL_LIMIT)


class _Layer:
    def __init__(self, tables: IntegerLMLayer, config: EncodecLMConfig, device: torch.device):
        self.heads, self.reach = config.num_attention_heads, config.context_frames
        for name in ("qkv_proj", "o_proj", "up_proj", "down_proj"):
            setattr(self, name, _Linear(getattr(tables, name), device))
        self.attention_norm = _Norm(tables.attention_norm, device)
        self.output_norm = _Norm(tables.output_norm, device)
        self.input_scale = _powers(tables.input_exponent, device)
        self.middle_scale = _powers(tables.middle_exponent, device)
        self.score_scale = _powers(tables.score_exponent, device)[:, None, None]
        self.attended_scale = _powers(tables.attended_exponent, device)[:, None, None] * 2.0**-40
        self.one = torch.tensor(2.0**40 + 0.5, dtype=torch.float64, device=device)
        self.gelu = tables.gelu.to(device, torch.float64)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values (3, B, heads, F, head_dim) of activations (B, F, D)."""
        qkv = self.qkv_proj(x).clamp_(-MOST_ACTIVATION, MOST_ACTIVATION)
        return qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def __call__(self, hidden: torch.Tensor, memory: _Memory, unseen, exp) -> tuple[torch.Tensor, _Memory]:
        qkv = self.split(_activations(hidden, self.input_scale))
        memory, pairs = memory.extended(qkv[1:], self.reach)
        attended = self._attend(qkv[0], *pairs.unbind(), unseen, exp).transpose(1, 2).flatten(2)
        hidden = self.attention_norm(_limited(self.o_proj(attended).add_(hidden)))
        index = self.up_proj(_activations(hidden, self.middle_scale)).clamp_(0, GELU_ENTRIES - 1)
        return self.output_norm(_limited(self.down_proj(_looked_up(self.gelu, index)).add_(hidden))), memory

    def _attend(self, query, keys, values, unseen, exp) -> torch.Tensor:
        """Means of values (B, heads, F, head_dim), weighted by a table's exp of the scores."""
        scores = query @ keys.transpose(2, 3)
        if unseen is not None:
            scores.masked_fill_(unseen, HIDDEN_SCORE)
        distance = (scores.amax(-1, keepdim=True) - scores).mul_(self.score_scale)
        weights = _looked_up(exp, distance.clamp_(max=ATTENTION_ENTRIES - 1))
        inverse = torch.div(self.one, weights.sum(-1, keepdim=True)).floor_()
        mean = (weights @ values).mul_(inverse).mul_(self.attended_scale).add_(0.5).floor_()
        return mean.clamp_(-MOST_ACTIVATION, MOST_ACTIVATION)


class _Program:
    """The tables in the numbers they are computed in, on one device."""

    def __init__(self, tables: IntegerLM):
        config, device = tables.config, tables.embeddings.device
        if device.type == "mps":  # has no float64
            device = torch.device("cpu")
        self.config, self.device = config, device
        rows = config.codebook_size + 1
        scale = _powers(tables.embedding_exponent, device).repeat_interleave(rows).float()
        self.embeddings = tables.embeddings.to(device, torch.float32) * scale[:, None]
        self.starts = rows * torch.arange(config.num_codebooks, device=device) + 1
        self.input_norm = _Norm(tables.input_norm, device)
        self.positions = tables.positions.to(device, torch.float64)
        self.layers = [_Layer(layer, config, device) for layer in tables.layers]
        self.head_scale = _powers(tables.head_exponent, device)
        self.head = functools.cache(lambda books: _Linear(tables.head, device, books * config.codebook_size))
        self.attention_exp = tables.attention_exp.to(device, torch.float64)
        self.output_exp = tables.output_exp.to(device, torch.float64)
        self.rest = torch.tensor(2.0**24 * (TOTAL - config.codebook_size) + 0.5, dtype=torch.float64, device=device)

    def first_memories(self, batch: int) -> list[_Memory]:
        """Memories before the first frame: empty, or with what a zero vector gives (`zero_past_key`)."""
        config = self.config
        zeros = torch.zeros(batch, 1, config.hidden_size, dtype=torch.float64, device=self.device)
        count = int(config.zero_past_key)
        return [_Memory(layer.split(zeros)[1:, ..., :count, :], count, [-1]) for layer in self.layers]

    def hidden(self, previous: torch.Tensor, cache: IntegerLMCache) -> tuple[torch.Tensor, list[_Memory]]:
        """The last layer's residual stream (B, F, D) for frames whose predecessors are `previous` (B, K, F)."""
        books, frames = previous.shape[1:]
        index = (previous.transpose(1, 2) + self.starts[:books]).flatten(0, 1)
        summed = nn.functional.embedding_bag(index, self.embeddings, mode="sum").unflatten(0, (-1, frames))
        hidden = self.input_norm(summed.double())
        hidden = (hidden + self._positions(cache.frames, frames)).clamp_(-RESIDUAL_LIMIT, RESIDUAL_LIMIT)
        unseen, memories = None, []
        past, reach = min(cache.memories[0].length, self.config.context_frames), self.config.context_frames
        if frames > 1:
            distance = torch.arange(past, past + frames, device=self.device)[:, None]
            distance = distance - torch.arange(past + frames, device=self.device)
            unseen = (distance < 0) | (distance > reach)
        for layer, memory in zip(self.layers, cache.memories):
            hidden, memory = layer(hidden, memory, unseen, self.attention_exp)
            memories.append(memory)
        return hidden, memories

    def _positions(self, start: int, frames: int) -> torch.Tensor:
        """Rows of the table of positions, which begins again after its end."""
        start %= len(self.positions)
        if start + frames <= len(self.positions):
            return self.positions.narrow(0, start, frames)
        return self.positions[torch.arange(start, start + frames, device=self.device) % len(self.positions)]

    def distributions(self, hidden: torch.Tensor, books: int) -> torch.Tensor:
        """Frequencies (B, K, F, V) of the codes, int32: 1 each, and the rest of TOTAL by exp of the logits."""
        size = self.config.codebook_size
        weights = self.weights(hidden, books)
        # In 2**-24 of a share; with this the quotient is far enough from whole numbers to be floored safely.
        inverse = torch.div(self.rest, weights.sum(-1, keepdim=True)).floor_().mul_(2.0**-24)
        shares = weights.mul_(inverse).floor_()
        shares[..., -1] += TOTAL - size - shares.sum(-1)  # what rounding down left, a few millionths
        return shares.add_(1).to(torch.int32).transpose(1, 2)

    def weights(self, hidden: torch.Tensor, books: int) -> torch.Tensor:
        """A table's exp of the logits (B, F, K, V), relative to the greatest of a code."""
        logits = self.head(books)(_activations(hidden, self.head_scale)).unflatten(2, (books, -1))
        distance = (logits.amax(-1, keepdim=True) - logits).clamp_(max=OUTPUT_ENTRIES - 1)
        return _looked_up(self.output_exp, distance)


def _activations(hidden: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The residual stream in the units of the product it enters."""
    return (hidden * scale).add_(0.5).floor_().clamp_(-MOST_ACTIVATION, MOST_ACTIVATION)


def _looked_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries of a table at whole numbers that floats hold."""
    return table.index_select(0, index.flatten().long()).view(index.shape)


def _limited(total: torch.Tensor) -> torch.Tensor:
    return total.clamp_(-2 * RESIDUAL_LIMIT, 2 * RESIDUAL_LIMIT)


def _powers(exponents: torch.Tensor, device: torch.device) -> torch.Tensor:
    """2**exponents, exactly: `ldexp` may be computed by way of `pow`."""
    table = torch.tensor([2.0**exponent for exponent in range(-64, 64)], dtype=torch.float64)
    return table[exponents.cpu().long() + 64].to(device)
