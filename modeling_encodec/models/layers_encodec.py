# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""Layers of the SEANet encoder and decoder (paper section 3.1), for whole signals or piece by piece.

Every layer is called as any module is, `layer(x)` with x (B, C, T), so hooks, adapters and offloading work as they do
with other models. Beside `x` it may be given a `Step`: what the pieces of the signal before this one left, and whether
it is the last. The layer leaves there what the next piece needs.

Inside, time runs along the last axis of (B, C, 1, T) in channels-last memory (see `kernels_encodec`).

Rows of a batch that end at different places travel with `lengths` (B,): each row is padded at its own end and
GroupNorm looks at its own samples, so that a row gives what it gives alone. Past its end a row holds anything.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module
from torch.nn.utils.parametrizations import weight_norm

from .configuration_encodec import EncodecConfig
from .kernels_encodec import ELU, Conv1d, ConvTranspose1d, GroupNorm, join, lstm, lstm_steps, operator
from .training_kernels_encodec import residual_unit
from .weight_cache_encodec import WeightCache


# Frames that an LSTM's steps are written out for: PyTorch's own arranges the weights anew at each call, 4 ms long.
FEW_FRAMES = 16


@dataclass
class Step:
    """What a piece of a signal comes with, and after the call, what it leaves.

    Args:
        state: of the pieces before, `None` at the signal's beginning; then that after this piece. A tensor for a
            layer, rows first; a tuple of them for a network.
        end: whether the signal ends with this piece.
        lengths: of each row (B,), where rows of whole signals end early; then those of the output.
    """

    state: Any = None
    end: bool = True
    lengths: Tensor | None = None


class Layer(nn.Module):
    """A layer that can go on where the last piece of a signal ended."""

    def forward(self, x: Tensor, *, step: Step | None = None) -> Tensor:
        """(B, C, T), a whole signal or as `step` says -> (B, C', T')."""
        step = Step() if step is None else step
        x = x.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        y, step.state = self.advance(x, step.state, step.end, step.lengths)
        if step.lengths is not None:
            step.lengths = self.output_lengths(step.lengths)
        return y.squeeze(2)

    def advance(self, x, state, end, lengths):
        """(B, C, 1, T) and the state before -> the output and the state after."""
        raise NotImplementedError  # each layer has its own

    def foreign(self) -> str | None:
        """The name of a part that somebody has put here, which knows whole signals alone."""
        return None

    def output_lengths(self, lengths):
        """Of the output, for inputs of these `lengths` (tensor or int): the same, unless a layer says otherwise."""
        return lengths

    def outputs(self, count: int) -> int:
        """Outputs that the first `count` inputs of a longer signal give."""
        return count

    def inputs(self, count: int, first: bool) -> int:
        """Inputs that give `count` outputs; at a signal's beginning (`first`) they must be enough to be reflected."""
        return count

    def state_shape(self, count: int) -> tuple[int, ...]:
        """Of one row's state after `count` inputs."""
        raise NotImplementedError  # each layer has its own


class NormedConvolution(Layer):
    """A (weight-normed) convolution `conv`, and its GroupNorm if it has one."""

    def __init__(self, config: EncodecConfig, conv: nn.Module):
        super().__init__()
        self.conv = weight_norm(conv) if config.norm_type == "weight_norm" else conv
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        if config.norm_type == "time_group_norm":
            self.norm = GroupNorm(1, conv.out_channels)

    def foreign(self):
        return None if isinstance(getattr(self, "norm", None), (GroupNorm, type(None))) else "norm"

    def normalise(self, y: Tensor, lengths: Tensor | None) -> Tensor:
        """The norm of (B, C', T'), if there is one."""
        if not hasattr(self, "norm"):
            return y
        return self.norm(y) if lengths is None else self.norm(y, lengths)


class EncodecConv1d(NormedConvolution):
    """Convolution whose output has ceil(T / stride) samples: padded on the left (causal) or on both sides."""

    def __init__(self, config, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dilation=1):
        super().__init__(config, Conv1d(in_channels, out_channels, kernel_size, stride, dilation=dilation))
        self.stride, self.pad_mode = stride, config.pad_mode
        self.window = (kernel_size - 1) * dilation + 1
        padding = self.window - stride
        self.right = 0 if config.use_causal_conv else padding // 2
        self.left = padding - self.right
        # Samples kept beyond what the next frame needs: the reflection of a signal's end reaches back as far.
        self.spare = max(0, stride - self.left) if self.right + stride > 1 else 0

    def forward(self, x, *, step=None, extended: bool = False):
        """(B, C, T) -> (B, C', T'). `extended`: `x` has what comes before and after it already (see `extend`)."""
        if extended:
            return self.convolve(x, None if step is None else step.lengths)
        return super().forward(x, step=step)

    def advance(self, x, state, end, lengths):
        """(B, C, 1, T) and what is left of the samples before -> (B, C', 1, T') and what is left now."""
        buffer = self.extend(x, state, end, lengths)
        used = buffer if state is None else buffer[..., self.spare :]
        y = self.convolve(used.squeeze(2), lengths).unsqueeze(2)
        return y, None if end else self.rest(buffer, y, state is None)

    def extend(self, x, state=None, end=True, lengths=None):
        """Put the samples kept before `x`, or the padding that begins and ends a signal."""
        if state is not None:
            x = join(state, x)
        left = self.left if state is None else 0
        # Frames start every `stride` samples; the last one is made full (`left` of the buffer is no signal).
        waiting = x.shape[3] - (0 if state is None else self.spare + self.left)
        right = self.right + -waiting % self.stride if end else 0
        if lengths is None:
            return _pad(x, left, right, self.pad_mode)
        return _pad_rows(x, lengths, self.left, self.right, self.stride, self.pad_mode)

    def convolve(self, buffer, lengths=None):
        """Convolution and norm of an extended signal (B, C, T)."""
        return self.normalise(self.conv(buffer), None if lengths is None else self.output_lengths(lengths))

    def rest(self, buffer, y, first: bool):
        """The end of `buffer` that the next frame, or the end's reflection, still needs."""
        used = y.shape[3] * self.stride - (self.spare if first else 0)  # a first buffer has no spare samples before it
        return buffer[..., used:].clone(memory_format=torch.channels_last)

    def output_lengths(self, lengths):
        """Frames of rows with `lengths` samples (tensor or int)."""
        return (lengths + self.stride - 1) // self.stride

    def outputs(self, count: int) -> int:
        """Frames that the first `count` samples of a longer signal give."""
        return (count + self.left - self.window) // self.stride + 1

    def inputs(self, count: int, first: bool) -> int:
        """Samples that give `count` frames; at a signal's beginning (`first`) they must be enough to be reflected."""
        enough = (count - 1) * self.stride + self.window - self.left
        return max(enough, self.left + 1) if first and self.pad_mode == "reflect" else enough

    def state_shape(self, count: int) -> tuple[int, ...]:
        """Of one row's state after `count` samples."""
        return self.in_channels, 1, self.spare + self.left + count - self.outputs(count) * self.stride


class EncodecConvTranspose1d(NormedConvolution):
    """Upsampling by `stride` with a kernel of two strides, cut to T * stride samples."""

    def __init__(self, config, in_channels: int, out_channels: int, kernel_size: int, stride: int):
        super().__init__(config, ConvTranspose1d(in_channels, out_channels, kernel_size, stride))
        self.stride = stride
        excess = kernel_size - stride
        if config.use_causal_conv:
            self.right = -int(-excess * config.trim_right_ratio // 1)  # rounded up
        else:
            self.right = excess // 2
        self.left = excess - self.right

    def advance(self, x, state, end, lengths):
        """(B, C, 1, T) and the frame before -> (B, C', 1, T * stride) and the last frame."""
        # Block T, made of x[T-1] alone, is needed when something of it is kept, or to be in GroupNorm's statistics.
        tail = end and (self.left > 0 or hasattr(self, "norm"))
        before = x.new_zeros(*x.shape[:3], 1) if state is None else state
        buffer = join(before, x, *([x.new_zeros(*x.shape[:3], 1)] if tail else []))
        if tail and lengths is not None:  # that row's own last block is made of nothing else
            nothing = x.new_zeros(*x.shape[:3], 1)
            buffer.scatter_(3, (1 + lengths).view(-1, 1, 1, 1).expand_as(nothing), nothing)
        y = self._middle(buffer.squeeze(2))
        if y.shape[2] == 0:
            return y.unsqueeze(2), before
        y = self.normalise(y, None if lengths is None else (lengths + 1) * self.stride)
        if state is None:
            y = y[..., self.left :]
        if tail:
            y = y[..., : y.shape[2] - self.right]
        return y.unsqueeze(2), x[..., -1:].clone()

    def _middle(self, x):
        """The blocks of the convolution that two frames of `x` go into."""
        if isinstance(self.conv, ConvTranspose1d):
            return self.conv(x, inner=True)
        return self.conv(x)[..., self.stride : -self.stride]  # what somebody put in its place computes all

    def output_lengths(self, lengths):
        """Samples of rows with `lengths` frames (tensor or int)."""
        return lengths * self.stride

    def outputs(self, count: int) -> int:
        """Samples that the first `count` frames of a longer signal give."""
        return count * self.stride - self.left

    def inputs(self, count: int, first: bool) -> int:
        """Frames that give `count` samples."""
        return -(-(count + self.left) // self.stride)

    def state_shape(self, count: int) -> tuple[int, ...]:
        """Of one row's state after `count` frames."""
        return self.in_channels, 1, 1


class EncodecLSTM(Layer):
    """LSTM along time with a skip connection. It only looks back, in the non-causal models too."""

    def __init__(self, config: EncodecConfig, dim: int):
        super().__init__()
        self.dim, self.num_layers = dim, config.num_lstm_layers
        self.lstm = nn.LSTM(dim, dim, config.num_lstm_layers)
        self._speed_up()
        self._note_parameters()

    def _speed_up(self) -> None:
        # It stays an `nn.LSTM`, which `quantize_dynamic` and others look for, with a faster `forward` of its own.
        self.lstm.forward = functools.partial(_lstm_forward, self.lstm, WeightCache())

    def _note_parameters(self) -> None:
        # `torch.compile` refuses to look into an `nn.LSTM`; it finds the parameters here.
        self._parameters_noted = tuple(self.lstm.parameters())

    def train(self, mode: bool = True):
        self._note_parameters()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._note_parameters()
        return self

    def advance(self, x, state, end, lengths):
        """(B, C, 1, T) and hidden and cell, (B, 2, layers, C) -> the same."""
        if x.shape[3] == 0:
            return x, state
        sequence = x.squeeze(2).permute(2, 0, 1)  # (T, B, C)
        if state is None:
            state = x.new_zeros(x.shape[0], 2, self.num_layers, self.dim)
        y, *state = self._recur(sequence, *(part.contiguous() for part in state.permute(1, 2, 0, 3)))
        y = (y + sequence).permute(1, 2, 0).unsqueeze(2)
        state = None if end else torch.stack(state).permute(2, 0, 1, 3).contiguous()
        return y.contiguous(memory_format=torch.channels_last), state

    def _recur(self, sequence, hidden, cell):
        """What `lstm` makes of a (T, B, C) sequence, and hidden and cell after it, (layers, B, C)."""
        if sequence.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
            # cuDNN's LSTM would compute in float16 whatever autocast was asked for: gradients vanish there.
            dtype = next((parameter.dtype for parameter in self.lstm.parameters()), sequence.dtype)
            with torch.autocast("cuda", enabled=False):
                parts = self._recur(*(part.to(dtype) for part in (sequence, hidden, cell)))
            return tuple(part.to(sequence.dtype) for part in parts)
        if torch.compiler.is_dynamo_compiling():
            return operator("lstm")(sequence, hidden, cell, list(self._parameters_noted))
        if torch.compiler.is_compiling():
            return operator("lstm")(sequence, hidden, cell, list(self.lstm.parameters()))
        faster = self.lstm.__dict__.get("forward")
        if getattr(faster, "func", None) is _lstm_forward and faster.args[0] is not self.lstm:
            self._speed_up()  # a replica of `nn.DataParallel` comes with the original's
        dtype = self._own_dtype()
        if dtype is None:
            y, state = self.lstm(sequence, (hidden, cell))
            return y, *state
        y, state = self.lstm(sequence.to(dtype), (hidden.to(dtype), cell.to(dtype)))
        return tuple(part.to(sequence.dtype) for part in (y, *state))

    def _own_dtype(self) -> torch.dtype | None:
        """What a layer that somebody has put in the place of `lstm` computes in."""
        if isinstance(self.lstm, nn.LSTM):
            return None
        return next((parameter.dtype for parameter in self.lstm.parameters()), torch.float32)

    def state_shape(self, count: int) -> tuple[int, ...]:
        """Of one row's state."""
        return 2, self.num_layers, self.dim


class EncodecResnetBlock(Layer):
    """Residual unit: ELU, convolution that narrows, ELU, 1x1 convolution back, round a 1x1 or identity skip."""

    def __init__(self, config: EncodecConfig, dim: int, dilation: int):
        super().__init__()
        hidden = dim // config.compress
        narrow = EncodecConv1d(config, dim, hidden, config.residual_kernel_size, dilation=dilation)
        widen = EncodecConv1d(config, hidden, dim, 1)
        self.block = nn.ModuleList([ELU(), narrow, ELU(), widen])
        self.shortcut = EncodecConv1d(config, dim, dim, 1) if config.use_conv_shortcut else nn.Identity()

    def foreign(self):
        wanted = [("block.0", nn.ELU), ("block.1", EncodecConv1d), ("block.2", nn.ELU), ("block.3", EncodecConv1d)]
        parts = [*zip(wanted, self.block), (("shortcut", (EncodecConv1d, nn.Identity)), self.shortcut)]
        for (name, kind), part in parts:
            if not isinstance(part, kind):
                return name
            if isinstance(part, Layer) and (inner := part.foreign()):
                return f"{name}.{inner}"
        return None

    def forward(self, x, *, step=None):
        """(B, C, T), a whole signal or as `step` says -> the same."""
        if step is not None or self.foreign() is None:
            return super().forward(x, step=step)
        y = x
        for part in self.block:
            y = part(y)
        return self.shortcut(x) + y

    def advance(self, x, state, end, lengths):
        """(B, C, 1, T) -> the same; the skip waits in the buffer of the first convolution for its frames."""
        if state is None and end and lengths is None and self._trains_alone(x):
            return self._as_one(x), None
        (before, narrow, between, widen), step = self.block, Step(lengths=lengths)
        buffer = narrow.extend(x, state, end, lengths)
        # One with hardly any channels comes in float32 (`kernels_encodec`).
        hidden = narrow(before(buffer.squeeze(2)), step=step, extended=True).to(buffer.dtype)
        rest = None if end else narrow.rest(buffer, hidden.unsqueeze(2), state is None)
        skip = buffer[..., narrow.left : narrow.left + hidden.shape[2]].squeeze(2)
        own = isinstance(self.shortcut, EncodecConv1d)
        skip = self.shortcut(skip, step=step, extended=True) if own else self.shortcut(skip)
        del buffer  # the largest there is, while the sum is made
        y = widen(between(hidden), step=step, extended=True)
        if is_watched(widen) or is_watched(widen.conv):  # who looks at the convolution's output must not see the sum
            return (y + skip).unsqueeze(2), rest
        y += skip
        return y.unsqueeze(2), rest

    def _trains_alone(self, x) -> bool:
        """Whether whole signals are trained on a CPU, with nobody in between who looks or changes."""
        if not (self.training and torch.is_grad_enabled() and x.device.type == "cpu"):
            return False
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return False
        narrow, layers = self.block[1], [part for part in (*self.block, self.shortcut) if isinstance(part, Layer)]
        return (
            narrow.pad_mode == "reflect"
            and x.shape[3] > max(narrow.left, narrow.right)
            and not any(hasattr(layer, "norm") or not layer.conv.is_plain() for layer in layers)
            and not any(is_watched(part) for part in (*self.block, self.shortcut, *(layer.conv for layer in layers)))
        )

    def _as_one(self, x):
        """The same as one node of the graph."""
        _, narrow, _, widen = self.block
        own = isinstance(self.shortcut, EncodecConv1d)
        parts = [layer.conv.arrange() for layer in (narrow, widen, *([self.shortcut] if own else []))]
        parts += [] if own else [None]
        return residual_unit(x, *parts, narrow.left, narrow.conv.dilation[0])

    def outputs(self, count: int) -> int:
        """As the first convolution's, the only one that looks at more than one sample."""
        return self.block[1].outputs(count)

    def inputs(self, count: int, first: bool) -> int:
        """As the first convolution's."""
        return self.block[1].inputs(count, first)

    def state_shape(self, count: int) -> tuple[int, ...]:
        """Of one row's state after `count` samples."""
        return self.block[1].state_shape(count)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody looks at, or changes, what calling `module` takes and gives."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks or "forward" in module.__dict__ or nn_module._has_any_global_hook())


def _lstm_forward(module: nn.LSTM, cache: WeightCache, x: Tensor, hx: tuple[Tensor, Tensor] | None = None):
    """`nn.LSTM.forward` of `module`, faster for few frames, and for sequences in another dtype than the weights'."""
    if hx is None:
        return nn.LSTM.forward(module, x, hx)
    if x.device.type == "cuda":
        return _lstm_on_cuda(module, cache, x, hx)
    few = x.dim() == 3 and len(x) <= FEW_FRAMES and x.device.type == "cpu"
    if torch.is_grad_enabled() or not (few or x.dtype != module.weight_ih_l0.dtype):
        return nn.LSTM.forward(module, x, hx)
    parameters = list(module._parameters.values())
    if few:
        weights = cache.get((x.dtype, "few"), parameters, lambda: _side_by_side(parameters, x.dtype))
        y, *state = lstm_steps(x, *hx, weights)
    else:
        weights = cache.get(x.dtype, parameters, lambda: [part.detach().to(x.dtype) for part in parameters])
        y, *state = lstm(x, *hx, weights)
    return y, tuple(state)


def _lstm_on_cuda(module: nn.LSTM, cache: WeightCache, x: Tensor, hx: tuple[Tensor, Tensor]):
    """The same by cuDNN, in float32 where bfloat16 is asked for: older versions would go step by step, and a sequence
    is bound by its length, not by its arithmetic."""
    dtype, parameters = x.dtype, [getattr(module, name) for name in module._flat_weights_names]
    inner = torch.float32 if dtype == torch.bfloat16 else dtype
    x, hx = x.to(inner), tuple(part.to(inner) for part in hx)
    if parameters[0].dtype == inner:
        weights = parameters
        _flatten(module, parameters)
    elif torch.is_grad_enabled():
        weights = [part.to(inner) for part in parameters]
    else:
        weights = cache.get(inner, parameters, lambda: _in_one_piece(module, parameters, inner))
    y, *state = lstm(x, *hx, weights)
    return y.to(dtype), tuple(part.to(dtype) for part in state)


def _flatten(module: nn.LSTM, parameters: list[Tensor]) -> None:
    """Loading puts each weight where it likes, and cuDNN would copy them into one piece at each call. Those that are
    parts of something larger are that piece already, or somebody else's (FSDP's)."""
    places = [part.data_ptr() for part in parameters]
    if module.__dict__.get("flat_at") != places and all(part.storage_offset() == 0 for part in parameters):
        module.flatten_parameters()
        module.flat_at = [part.data_ptr() for part in parameters]


def _in_one_piece(module: nn.LSTM, parameters: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights in `dtype`, where cuDNN wants them."""
    weights = [part.detach().to(dtype) for part in parameters]
    if torch.backends.cudnn.is_available():
        sizes = module.input_size, torch.backends.cudnn.rnn.get_cudnn_mode("LSTM"), module.hidden_size
        torch._cudnn_rnn_flatten_weight(weights, 4, *sizes, 0, module.num_layers, False, False)
    return weights


def _side_by_side(parameters: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """For `lstm_steps`: one row times a matrix is read twice as fast with the outputs side by side."""
    weights = [parameter.detach().to(dtype) for parameter in parameters]
    layers = [weights[at : at + 4] for at in range(0, len(weights), 4)]
    return [part for a, b, c, d in layers for part in (a.t().contiguous(), b.t().contiguous(), c + d)]


def _pad(x: torch.Tensor, left: int, right: int, mode: str) -> torch.Tensor:
    """Pad time as the original does: a signal too short to be reflected first gets zeros at its end, cut off again."""
    if left == 0 and right == 0:
        return x
    length = x.shape[3]
    if mode == "constant":
        return F.pad(x, (left, right))
    if mode == "replicate":
        head, tail = x[..., :1].expand(-1, -1, -1, left), x[..., -1:].expand(-1, -1, -1, right)
        return torch.cat([head, x, tail], dim=3)
    short = max(left, right) - length + 1
    if short > 0:
        return _pad(F.pad(x, (0, short)), left, right, mode)[..., :-short]
    return join(x[..., 1 : left + 1].flip(3), x, x[..., length - 1 - right : length - 1].flip(3))


def _pad_rows(x: Tensor, lengths: Tensor, left: int, right: int, stride: int, mode: str) -> Tensor:
    """`_pad` for rows of different `lengths`: each as if alone, with the extra samples that fill its last window. Only
    what that window takes after a row's end is written there; whatever comes later is cut off in the end."""
    length, ends = x.shape[3], lengths[:, None]
    spare = right + stride - 1
    if left == spare == 0:
        return x
    if spare == 0:
        return join(_before_rows(x, ends, left, mode), x)
    buffer = join(_before_rows(x, ends, left, mode), x, x.new_zeros(*x.shape[:3], spare))
    places = ends + torch.arange(spare, device=x.device)
    source = places
    if mode == "reflect":
        # The mirror of a row too short for that stands where appended zeros would end.
        mirror = torch.maximum(ends - 1, (right + -ends % stride).clamp(min=left))
        source = mirror - (mirror - places).abs()
    elif mode == "replicate":
        source = (ends - 1).expand_as(places)
    inside = ((source >= 0) & (source < ends))[:, None, None]
    index = source.clamp(0, length - 1)[:, None, None].expand(-1, x.shape[1], -1, -1)
    values = torch.where(inside, x.gather(3, index), 0)
    buffer.scatter_(3, (left + places)[:, None, None].expand_as(values), values)
    return buffer[..., : left + length + right + -length % stride]


def _before_rows(x: Tensor, ends: Tensor, left: int, mode: str) -> Tensor:
    """The `left` samples (B, C, 1, left) of padding before rows that end at `ends` (B, 1), zeros from there on."""
    if mode == "replicate":
        return x[..., :1].expand(-1, -1, -1, left)
    if mode == "constant":
        return x.new_zeros(*x.shape[:3], left)
    places = torch.arange(left, 0, -1, device=x.device)
    near = x.index_select(3, places.clamp(max=x.shape[3] - 1))
    return torch.where((places < ends)[:, None, None], near, 0)
