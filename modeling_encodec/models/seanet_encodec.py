# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""SEANet encoder and decoder (paper section 3.1): layers in order, over whole signals or piece by piece.

One code path serves both. `step` takes a piece and the state before it, a tuple of one tensor a layer, and returns the
state after it. A first piece must have `net.start` samples, or be the whole signal; after that every `net.hop` samples
give as many outputs as the last ones did, and states keep their shapes. A last piece may have any length, 0 included.

Layers are called as modules are, so hooks on them, adapters inside them and offloading work. A layer that somebody has
put in the place of one of ours is given whole signals.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .batching_encodec import refuse_tracing, to_device
from .configuration_encodec import EncodecConfig
from .kernels_encodec import ELU
from .layers_encodec import EncodecConv1d, EncodecConvTranspose1d, EncodecLSTM, EncodecResnetBlock, Layer, Step
from .weight_cache_encodec import unchanged_weights


# Frames of a row computed at a time, which bounds memory; on a CPU the high-rate layers take fewer, to stay in the
# cache.
CPU_BLOCK_FRAMES = 600
CPU_FINE_FRAMES = 50
ACCELERATOR_BLOCK_FRAMES = 4096


def block_frames(device: torch.device) -> int:
    """Frames that are computed at a time there."""
    return CPU_BLOCK_FRAMES if device.type == "cpu" else ACCELERATOR_BLOCK_FRAMES


class _Seanet(nn.Module):
    """A list of layers, run over whole signals (`forward`) or piece by piece (`step`).

    The layers form two stages: those at high rates have small weights and large activations, those near the latents
    the opposite. The first kind is best run in blocks that stay in the cache, the second in few calls.

    Attributes:
        hop (int): inputs, samples or latent frames, that a frame takes once the signal has begun.
        start (int): inputs that a first piece must have at least, or be the whole signal.
        lookahead (int): inputs after the first output's own hop that it depends on, the beginning aside.
    """

    layers: nn.ModuleList
    stages: tuple[tuple[range, int | None], ...]  # layers, and samples per frame at the input of a high-rate stage

    def _set_geometry(self, config: EncodecConfig, hop: int) -> None:
        self.hop, self.looks_at_whole = hop, config.norm_type == "time_group_norm"
        self.with_state = [index for index, layer in enumerate(self.layers) if not isinstance(layer, nn.ELU)]
        steady, first = self._inputs(first=False), self._inputs(first=True)
        self.lookahead = steady - hop
        self.start = steady + -(-(first - steady) // hop) * hop

    def _inputs(self, first: bool) -> int:
        """Inputs that the first output needs; `first` where the signal's beginning must be reflected."""
        count = 1
        for index in reversed(self.with_state):
            count = self.layers[index].inputs(count, first)
        return count

    def outputs(self, count: int) -> int:
        """Outputs that the first `count` inputs of a longer signal give, `start` of them at least."""
        for index in self.with_state:
            count = self.layers[index].outputs(count)
        return count

    def quiet_state(self, batch: int = 1, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
        """The state of `batch` rows that have heard nothing but zeros; of its shapes is every state."""
        parameter, count, state = next(self.parameters()), self.start, []
        for index in self.with_state:
            state.append(parameter.new_zeros(batch, *self.layers[index].state_shape(count), dtype=dtype))
            count = self.layers[index].outputs(count)
        return tuple(state)

    def forward(
        self,
        x: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *,
        step: Step | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """(B, C, T), whole signals, of `lengths` (B,) where rows end early, or pieces of signals as `step` says ->
        (B, C', T') in the parameters' dtype. `dtype` is what the layers compute in, the parameters' by default.

        Where no gradient is wanted it goes block by block, which bounds memory; layers are called once a block.
        """
        refuse_tracing(type(self).__name__)
        own = self.dtype
        x = x.to(dtype or own)  # float32 audio and latents go into a half-precision model
        if torch.compiler.is_compiling():
            if step is None and lengths is None:
                return self._forward_any_length(x).to(own)
            return self._forward_blocks(x, step or Step(lengths=lengths)).to(own)
        if self.foreign() is not None:
            if step is not None or lengths is not None:
                self.check_pieces()
            return self._forward_whole(x)
        with unchanged_weights():
            return self._forward_blocks(x, step or Step(lengths=lengths)).to(own)

    def step(
        self, x: torch.Tensor, state: tuple | None = None, end: bool = True, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, tuple]:
        """The next piece (B, C, T) of each row's signal -> (B, C', T') and the state after it, a new value."""
        step = Step(state, end)
        return self(x, step=step, dtype=dtype), step.state

    def rows(self, x: torch.Tensor, lengths: list[int], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Whole signals of `lengths`, in ascending order, padded to (B, C, T) -> (B, C', T'), of which each row has
        its `row_outputs`."""
        if lengths[0] == lengths[-1]:
            return self(x, dtype=dtype) if dtype else self(x)
        if lengths[-1] > self.hop * block_frames(x.device) and len(self.blocks(x, begun=False)) > 1:
            return self._rows_in_blocks(x, lengths, dtype)
        return self(x, to_device(torch.tensor(lengths, dtype=torch.int64, device="cpu"), x.device), dtype=dtype)

    def row_outputs(self, y: torch.Tensor, lengths: list[int]) -> list[int]:
        """How many of the outputs `y` of `rows` are each row's."""
        if lengths[0] == lengths[-1]:
            return [y.shape[2]] * len(y)
        return [self.output_lengths(length) for length in lengths]

    def _rows_in_blocks(self, x: torch.Tensor, lengths: list[int], dtype: torch.dtype | None) -> torch.Tensor:
        """Long signals, block by block. Shortly before a row ends there is a cut; the row takes its last piece by
        itself from there, and the others go on without it."""
        last = [self.start + (n - self.start) // self.hop * self.hop if n >= self.start else 0 for n in lengths]
        block = self.hop * block_frames(x.device)
        cuts = sorted({*last, *range(self.start + block, last[-1], block)} - {0})
        y, state, at, filled = None, None, 0, 0
        first = last.count(0)
        pieces = [(row, row + 1, self(x[row : row + 1, :, : lengths[row]], dtype=dtype)) for row in range(first)]
        for cut in cuts:
            piece, state = self.step(x[first:, :, at:cut], state, False, dtype)
            if y is None:
                y = piece.new_zeros(len(x), piece.shape[1], self.output_lengths(lengths[-1]))
            y[first:, :, filled : filled + piece.shape[2]] = piece
            at, filled = cut, filled + piece.shape[2]
            while first < len(x) and last[first] == cut:
                same = lengths.count(lengths[first])
                ended = tuple(part[:same] for part in state)
                piece, _ = self.step(x[first : first + same, :, at : lengths[first]], ended, True, dtype)
                y[first : first + same, :, filled : filled + piece.shape[2]] = piece
                first, state = first + same, tuple(part[same:] for part in state)
        for start, stop, piece in pieces:
            y[start:stop, :, : piece.shape[2]] = piece
        return y

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.layers[0].parameters()).dtype

    def foreign(self) -> str | None:
        """The name of a layer that somebody has put here, which knows whole signals alone; `None` without one."""
        for index in self.with_state:
            layer = self.layers[index]
            inner = layer.foreign() if isinstance(layer, Layer) else ""
            if inner is not None:
                return f"layers.{index}.{inner}".rstrip(".")
        return None

    def check_pieces(self) -> None:
        """Refuse with a ValueError what cannot be computed piece by piece, nor in rows of different lengths."""
        if (name := self.foreign()) is not None:
            kind = type(self.get_submodule(name)).__name__
            raise ValueError(f"{name} is a {kind}, which computes whole signals alone, allowed in streams: our layers")

    def _forward_whole(self, x: torch.Tensor) -> torch.Tensor:
        """Layers as they come, one after the other."""
        for layer in self.layers:
            x = layer(x)
        return x.to(self.dtype)

    def _forward_any_length(self, x: torch.Tensor) -> torch.Tensor:
        """A whole signal as one graph for all lengths: whole frames, at least two since compilers treat a size of 1
        apart, and `lengths` to tell what is signal, for which no layer branches on a length."""
        length = x.shape[2]
        frames = torch.sym_max((length + self.hop - 1) // self.hop, 2)
        step = Step(lengths=torch.full((x.shape[0],), length, dtype=torch.int64, device=x.device))
        y = self._forward_blocks(F.pad(x, (0, frames * self.hop - length)), step)
        return y[..., : self.output_lengths(length)]

    def _forward_blocks(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        is_whole = step.state is None and step.end and step.lengths is None
        outputs, whole, filled = [], None, 0
        blocks = [(0, x.shape[2])] if step.lengths is not None else self.blocks(x, step.state is not None)
        for start, stop in blocks:
            part = Step(step.state, step.end and stop == x.shape[2], step.lengths)
            y = self._advance(x[..., start:stop], part)
            step.state = part.state
            if len(blocks) == 1:
                step.lengths = part.lengths
                return y
            if not is_whole:
                outputs.append(y)
                continue
            if whole is None:  # not joined at the end, which would need twice the memory
                whole = y.new_empty(*y.shape[:2], self.output_lengths(x.shape[2]))
            whole[..., filled : filled + y.shape[2]] = y
            filled += y.shape[2]
        return torch.cat(outputs, dim=2) if whole is None else whole

    def blocks(self, x: torch.Tensor, begun: bool) -> list[tuple[int, int]]:
        """(start, stop) of the inputs computed at a time, of a piece `x` (B, C, T) of a signal that has `begun` or
        begins with it. Blocks have a bounded number of frames, counted from the signal's beginning."""
        if torch.is_grad_enabled() or self.looks_at_whole or torch.compiler.is_compiling():
            return [(0, x.shape[2])]
        size = self.hop * block_frames(x.device)
        first = size if begun else self.start + max(0, size - self.start) // self.hop * self.hop
        return split_blocks(x.shape[2], size, first)

    def block_outputs(self, x: torch.Tensor, begun: bool, total: int) -> list[int]:
        """How many of the `total` outputs for `x` each block of it gave."""
        before = self.start if begun else 0
        ends = [before + stop for _, stop in self.blocks(x, begun)[:-1]]
        ends = [self.outputs(end) - (self.outputs(before) if begun else 0) for end in ends] + [total]
        return [stop - start for start, stop in zip([0, *ends], ends)]

    def _advance(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """One block. The high-rate layers take it in finer blocks on a CPU."""
        fine = CPU_FINE_FRAMES if x.device.type == "cpu" and step.lengths is None else None
        if torch.is_grad_enabled() or self.looks_at_whole or torch.compiler.is_compiling():
            fine = None
        fine = fine and max(fine, -(-self.start // self.hop))
        x = x.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        states = dict.fromkeys(self.with_state) if step.state is None else dict(zip(self.with_state, step.state))
        for layers, rate in self.stages:
            blocks = split_blocks(x.shape[3], fine * rate) if fine and rate else [(0, x.shape[3])]
            outputs = []
            for start, stop in blocks:
                last = step.end and stop == x.shape[3]
                y, lengths = self._run_layers(layers, x[..., start:stop].squeeze(2), states, last, step.lengths)
                outputs.append(y.unsqueeze(2))
            x, step.lengths = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=3), lengths
        step.state = tuple(states.values())
        return x.squeeze(2)

    def _run_layers(self, layers: range, x, states: dict, end: bool, lengths):
        """One stage's layers; their `states` are replaced."""
        for index in layers:
            if index not in states:
                x = self.layers[index](x)
                continue
            step = Step(states[index], end, lengths)
            x = self.layers[index](x, step=step)
            states[index], lengths = step.state, step.lengths
        return x, lengths

    def output_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Lengths of what comes out for rows of `lengths`."""
        for index in self.with_state:
            lengths = self.layers[index].output_lengths(lengths)
        return lengths


class EncodecEncoder(_Seanet):
    """Audio (B, channels, T) to latents (B, D, ceil(T / hop)) (paper 3.1)."""

    def __init__(self, config: EncodecConfig):
        super().__init__()
        dim = config.num_filters
        layers = [EncodecConv1d(config, config.audio_channels, dim, config.kernel_size)]
        for ratio in reversed(config.upsampling_ratios):
            for j in range(config.num_residual_layers):
                layers.append(EncodecResnetBlock(config, dim, config.dilation_growth_rate**j))
            layers += [ELU(), EncodecConv1d(config, dim, 2 * dim, 2 * ratio, stride=ratio)]
            dim *= 2
        layers += [EncodecLSTM(config, dim), ELU()]
        layers.append(EncodecConv1d(config, dim, config.hidden_size, config.last_kernel_size))
        self.layers = nn.ModuleList(layers)
        # The low-rate stage begins after the last downsampling but one.
        cut = len(layers) - 5 - config.num_residual_layers
        self.stages = (range(cut), config.hop_length), (range(cut, len(layers)), None)
        self._set_geometry(config, config.hop_length)


class EncodecDecoder(_Seanet):
    """Latents (B, D, F) to audio (B, channels, F * hop) (paper 3.1)."""

    def __init__(self, config: EncodecConfig):
        super().__init__()
        dim = config.num_filters * 2 ** len(config.upsampling_ratios)
        layers = [EncodecConv1d(config, config.hidden_size, dim, config.kernel_size), EncodecLSTM(config, dim)]
        for ratio in config.upsampling_ratios:
            layers += [ELU(), EncodecConvTranspose1d(config, dim, dim // 2, 2 * ratio, stride=ratio)]
            dim //= 2
            for j in range(config.num_residual_layers):
                layers.append(EncodecResnetBlock(config, dim, config.dilation_growth_rate**j))
        layers += [ELU(), EncodecConv1d(config, dim, config.audio_channels, config.last_kernel_size)]
        self.layers = nn.ModuleList(layers)
        # The low-rate stage ends with the first upsampling and its residual units.
        cut = 4 + config.num_residual_layers
        self.stages = (range(cut), None), (range(cut, len(layers)), config.upsampling_ratios[0])
        self._set_geometry(config, 1)


def split_blocks(length: int, block: int, first: int | None = None) -> list[tuple[int, int]]:
    """(start, stop) of consecutive blocks of `length` samples, the `first` of its own size, the last one shorter."""
    starts = [0, *range(block if first is None else first, length, block)]
    return list(zip(starts, [*starts[1:], length]))
