# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""SEANet encoder and decoder (paper section 3.1): layers in order, over whole signals or piece by piece.

One code path serves both. `step` takes a piece and the state before it, a tuple of one tensor a layer, and returns the
state after it. A first piece must have `net.start` samples, or be the whole signal; after that every `net.hop` samples
give as many outputs as the last ones did, and states keep their shapes. A last piece may have any length, 0 included.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .batching_encodec import refuse_tracing
from .configuration_encodec import EncodecConfig
from .layers_encodec import EncodecConv1d, EncodecConvTranspose1d, EncodecLSTM, EncodecResnetBlock, elu


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

    def _set_geometry(self, hop: int) -> None:
        self.hop = hop
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

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C, T) whole signals, of `lengths` (B,) where rows end early -> (B, C', T')."""
        if torch.compiler.is_compiling() and lengths is None:
            return self._forward_any_length(x)
        return self.step(x, lengths=lengths)[0].to(self.layers[0].conv.bias.dtype)

    def _forward_any_length(self, x: torch.Tensor) -> torch.Tensor:
        """The same as one graph for all lengths: whole frames, at least two since compilers treat a size of 1 apart,
        and `lengths` to tell what is signal, for which no layer branches on a length."""
        length = x.shape[2]
        frames = torch.sym_max((length + self.hop - 1) // self.hop, 2)
        lengths = torch.full((x.shape[0],), length, dtype=torch.int64, device=x.device)
        y, _ = self.step(F.pad(x, (0, frames * self.hop - length)), lengths=lengths)
        return y[..., : self.output_lengths(length)]

    def step(
        self,
        x: torch.Tensor,
        state: tuple | None = None,
        end: bool = True,
        lengths: torch.Tensor | None = None,
        *,
        block: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, tuple]:
        """The next piece (B, C, T) of each row's signal -> (B, C', T') and the state after it, a new value.

        `block` is the number of frames that the high-rate layers take at a time, all by default; `dtype` what they
        compute in, the parameters' own by default.
        """
        refuse_tracing(type(self).__name__)
        x = x.to(dtype or self.layers[0].conv.bias.dtype)  # float32 audio and latents go into a half-precision model
        x = x.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        block = block and max(block, -(-self.start // self.hop))
        states = dict.fromkeys(self.with_state) if state is None else dict(zip(self.with_state, state))
        for layers, rate in self.stages:
            blocks = split_blocks(x.shape[3], block * rate) if block and rate else [(0, x.shape[3])]
            outputs = []
            for start, stop in blocks:
                last = end and stop == x.shape[3]
                y, lengths = self._advance(layers, x[..., start:stop], states, last, lengths)
                outputs.append(y)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=3)
        return x.squeeze(2), tuple(states.values())

    def _advance(self, layers: range, x, states: dict, end: bool, lengths):
        """One stage's layers over one block; their `states` are replaced."""
        for index in layers:
            layer = self.layers[index]
            if isinstance(layer, nn.ELU):
                x = elu(x)
                continue
            x, states[index] = layer.step(x, states[index], end, lengths)
            lengths = None if lengths is None else layer.output_lengths(lengths)
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
            layers += [nn.ELU(), EncodecConv1d(config, dim, 2 * dim, 2 * ratio, stride=ratio)]
            dim *= 2
        layers += [EncodecLSTM(config, dim), nn.ELU()]
        layers.append(EncodecConv1d(config, dim, config.hidden_size, config.last_kernel_size))
        self.layers = nn.ModuleList(layers)
        # The low-rate stage begins after the last downsampling but one.
        cut = len(layers) - 5 - config.num_residual_layers
        self.stages = (range(cut), config.hop_length), (range(cut, len(layers)), None)
        self._set_geometry(config.hop_length)


class EncodecDecoder(_Seanet):
    """Latents (B, D, F) to audio (B, channels, F * hop) (paper 3.1)."""

    def __init__(self, config: EncodecConfig):
        super().__init__()
        dim = config.num_filters * 2 ** len(config.upsampling_ratios)
        layers = [EncodecConv1d(config, config.hidden_size, dim, config.kernel_size), EncodecLSTM(config, dim)]
        for ratio in config.upsampling_ratios:
            layers += [nn.ELU(), EncodecConvTranspose1d(config, dim, dim // 2, 2 * ratio, stride=ratio)]
            dim //= 2
            for j in range(config.num_residual_layers):
                layers.append(EncodecResnetBlock(config, dim, config.dilation_growth_rate**j))
        layers += [nn.ELU(), EncodecConv1d(config, dim, config.audio_channels, config.last_kernel_size)]
        self.layers = nn.ModuleList(layers)
        # The low-rate stage ends with the first upsampling and its residual units.
        cut = 4 + config.num_residual_layers
        self.stages = (range(cut), None), (range(cut, len(layers)), config.upsampling_ratios[0])
        self._set_geometry(1)


def split_blocks(length: int, block: int, first: int | None = None) -> list[tuple[int, int]]:
    """(start, stop) of consecutive blocks of `length` samples, the `first` of its own size, the last one shorter."""
    starts = [0, *range(block if first is None else first, length, block)]
    return list(zip(starts, [*starts[1:], length]))
