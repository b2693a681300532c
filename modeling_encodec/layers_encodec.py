# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""Layers of the SEANet encoder and decoder (paper section 3.1), whole signals or piece by piece.

Every layer has `step(x, state, end)`: `state` is `None` at a signal's beginning and then what the last step returned,
one tensor, rows first; `end` says that `x` completes the signal. A whole signal is one step with `end=True`.

Time runs along the last axis of a (B, C, 1, T) tensor in channels-last memory, so each sample's channels lie together:
convolutions need no repacking, a strided kernel reads one contiguous piece, and upsampling is a reshape. On a CPU
that is faster than channels-first at these widths.

Rows of a batch that end at different places travel with `lengths` (B,): each row is padded at its own end and
GroupNorm looks at its own samples, so that a row gives what it gives alone. Past its end a row holds anything.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from .configuration_encodec import EncodecConfig
from .kernels_encodec import limit_kernels


limit_kernels()  # here too, for this file travels without the package
# Weights of more numbers than this are multiplied as one matrix.
LARGE_WEIGHT = 1 << 20
# And those of inputs up to so many numbers: PyTorch would take its plain convolution, which copies them each time.
SMALL_INPUT = 20480
# Frames that an LSTM's steps are written out for: PyTorch's own arranges the weights anew at each call, 4 ms long.
FEW_FRAMES = 16
LOG2_E = math.log2(math.e)


def _lstm(x: Tensor, hidden: Tensor, cell: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What `nn.LSTM` does with a (T, B, C) sequence."""
    return torch.lstm(x, (hidden, cell), weights, True, len(weights) // 4, 0.0, torch.is_grad_enabled(), False, False)


def _lstm_steps(x: Tensor, hidden: Tensor, cell: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a few frames, with transposed weights and one bias a layer."""
    hidden, cell = list(hidden), list(cell)
    for layer in range(len(hidden)):
        inner, outer, bias = weights[3 * layer : 3 * layer + 3]
        outputs = []
        for frame in x:
            gates = torch.addmm(bias, frame, inner).addmm_(hidden[layer], outer)
            gate_in, gate_forget, new, gate_out = gates.chunk(4, dim=1)
            cell[layer] = gate_forget.sigmoid() * cell[layer] + gate_in.sigmoid() * new.tanh()
            hidden[layer] = gate_out.sigmoid() * cell[layer].tanh()
            outputs.append(hidden[layer])
        x = torch.stack(outputs)
    return x, torch.stack(hidden), torch.stack(cell)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: int, dilation: int) -> Tensor:
    """`F.conv2d` of (B, C, 1, T) along time."""
    if len(weight) <= 2 and stride == dilation == 1 and x.device.type == "cpu" and not torch.is_grad_enabled():
        return _sum_taps(x, weight, bias)
    small = x.numel() <= SMALL_INPUT and not torch.is_grad_enabled()
    if dilation == 1 and (x.shape[1] == 1 or weight.numel() > LARGE_WEIGHT or small):
        # One input channel leaves the layout ambiguous and `conv2d` slow, and so do weights that overflow a cache.
        windows = x.permute(0, 2, 3, 1).unfold(2, weight.shape[3], stride).transpose(3, 4)
        weight = weight.permute(0, 2, 3, 1).flatten(1)  # (C', window * C)
        return F.linear(windows.flatten(3), weight, bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, stride=(1, stride), dilation=(1, dilation))


def _sum_taps(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution with hardly any output channels, in float32: all taps' products at once, then each added in its
    place."""
    x, weight, bias = x.float(), weight.float(), bias.float()
    taps, frames = weight.shape[3], x.shape[3] - weight.shape[3] + 1
    products = torch.matmul(
        weight.permute(3, 0, 1, 2).flatten(2), x.permute(2, 0, 1, 3)[0, :, None]
    )  # (B, taps, C', T)
    y = products[:, 0, :, :frames] + bias[:, None]
    for tap in range(1, taps):
        y += products[:, tap, :, tap : tap + frames]
    return y.unsqueeze(2)


# Compilers are shown one operator each. They would unroll an LSTM over time, for one length alone, and compile anew
# whenever a convolution's input passes a size at which PyTorch changes kernels. This file may be imported twice in one
# process, as part of the package and as a checkpoint's remote code: the operators are the first's.
if not hasattr(torch.ops.modeling_encodec, "lstm"):

    @torch.library.custom_op("modeling_encodec::lstm", mutates_args=())
    def _lstm_operator(
        x: Tensor, hidden: Tensor, cell: Tensor, weights: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _lstm(x, hidden, cell, weights)

    @_lstm_operator.register_fake
    def _(x, hidden, cell, weights):
        return x.new_empty(x.shape), hidden.new_empty(hidden.shape), cell.new_empty(cell.shape)

    @torch.library.custom_op("modeling_encodec::convolve", mutates_args=())
    def _convolve_operator(x: Tensor, weight: Tensor, bias: Tensor, stride: int, dilation: int) -> Tensor:
        return _convolve(x, weight, bias, stride, dilation).contiguous(memory_format=torch.channels_last)

    @_convolve_operator.register_fake
    def _(x, weight, bias, stride, dilation):
        frames = (x.shape[3] - (weight.shape[3] - 1) * dilation - 1) // stride + 1
        return x.new_empty(x.shape[0], len(weight), 1, frames).contiguous(memory_format=torch.channels_last)


# With gradients, which the operators have none of, a compiler leaves an LSTM alone.
_lstm_alone = torch.compiler.disable(_lstm)


def _operator(name: str):
    """`lstm` or `convolve`; one operator where a compiler looks on and no gradient is wanted."""
    if not torch.compiler.is_compiling():
        return _lstm if name == "lstm" else _convolve
    if torch.is_grad_enabled():
        return _lstm_alone if name == "lstm" else _convolve
    return getattr(torch.ops.modeling_encodec, name)


class Folding(nn.Module):
    """Holds parameters and gives out what is computed of them, ready for use.

    With gradients on, it is computed anew each time. Without, it is folded once for a use and kept until a parameter
    changes (seen by address and version) or the mode is set by `train()` or `eval()`; what is kept is not in the state
    dict. So nothing has to be folded before or unfolded after. A write through `parameter.data` is the one change that
    PyTorch counts no version for: call `eval()` after it.
    """

    def __init__(self):
        super().__init__()
        self._folded, self._holders = {}, None

    def fold(self, dtype: torch.dtype, few: bool) -> list[Tensor]:
        """What the parameters are used as, in `dtype`; for a `few` frames alone it may be something else."""
        raise NotImplementedError  # each layer has its own

    def arrange(self) -> list[Tensor]:
        """The same of parameters as they are, through which gradients go."""
        raise NotImplementedError

    def weights(self, dtype: torch.dtype, few: bool = False) -> list[Tensor]:
        """What to compute with, folded if no gradient is wanted; compilers do that themselves."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.arrange()
        if self._holders is None:  # looking for them takes longer than a live frame's convolution
            self._holders = [module for module in self.modules() if module._parameters]
        parameters = [parameter for module in self._holders for parameter in module._parameters.values()]
        if any(parameter.is_inference() for parameter in parameters):  # they keep no version
            return self.fold(dtype, few)
        version = [(parameter.data_ptr(), parameter._version, parameter.dtype) for parameter in parameters]
        if (dtype, few) not in self._folded or self._folded[dtype, few][0] != version:
            self._folded[dtype, few] = version, self.fold(dtype, few)
        return self._folded[dtype, few][1]

    def train(self, mode: bool = True):
        self._folded, self._holders = {}, None
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._folded, self._holders = {}, None
        return super()._apply(fn, recurse)


class FoldedConv(Folding):
    """A (weight-normed) convolution `conv`, and its GroupNorm if it has one."""

    def __init__(self, config: EncodecConfig, conv: nn.Module):
        super().__init__()
        self.conv = weight_norm(conv) if config.norm_type == "weight_norm" else conv
        if config.norm_type == "time_group_norm":
            self.norm = nn.GroupNorm(1, conv.out_channels)

    def fold(self, dtype, few):
        weight, bias = (tensor.to(dtype) for tensor in self.arrange())
        # Copied, for with a single input channel `contiguous` would leave strides that read as channels-first.
        return [torch.empty_like(weight, memory_format=torch.channels_last).copy_(weight), bias]

    def normalise(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """GroupNorm with one group, over channels and the valid samples of each row (identity with weight norm)."""
        if not hasattr(self, "norm"):
            return x
        if lengths is None:
            weight, bias = self.norm.weight, self.norm.bias
            if not torch.is_grad_enabled():  # a half-precision signal meets float32 parameters
                weight, bias = weight.to(x.dtype), bias.to(x.dtype)
            return F.group_norm(x, 1, weight, bias, self.norm.eps)
        valid = _valid(x, lengths)
        count = lengths.view(-1, 1, 1, 1) * x.shape[1]
        wide = x.float().masked_fill(~valid, 0)
        mean = wide.sum((1, 2, 3), keepdim=True) / count
        variance = ((wide - mean).square() * valid).sum((1, 2, 3), keepdim=True) / count
        scale = torch.rsqrt(variance + self.norm.eps) * self.norm.weight.view(1, -1, 1, 1)
        return ((wide - mean) * scale + self.norm.bias.view(1, -1, 1, 1)).to(x.dtype)


class EncodecConv1d(FoldedConv):
    """Convolution whose output has ceil(T / stride) samples: padded on the left (causal) or on both sides."""

    def __init__(self, config, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dilation=1):
        super().__init__(config, nn.Conv1d(in_channels, out_channels, kernel_size, stride, dilation=dilation))
        self.stride, self.dilation, self.pad_mode = stride, dilation, config.pad_mode
        self.window = (kernel_size - 1) * dilation + 1
        padding = self.window - stride
        self.right = 0 if config.use_causal_conv else padding // 2
        self.left = padding - self.right
        # Samples kept beyond what the next frame needs: the reflection of a signal's end reaches back as far.
        self.spare = max(0, stride - self.left) if self.right + stride > 1 else 0

    def arrange(self):
        return [self.conv.weight.unsqueeze(2), self.conv.bias]

    def step(self, x, state=None, end=True, lengths=None):
        """(B, C, 1, T) and what is left of the samples before -> (B, C', 1, T') and what is left now."""
        buffer = self.extend(x, state, end, lengths)
        y = self.convolve(buffer if state is None else buffer[..., self.spare :], lengths)
        return y, None if end else self.rest(buffer, y, state is None)

    def extend(self, x, state=None, end=True, lengths=None):
        """Put the samples kept before `x`, or the padding that begins and ends a signal."""
        if state is not None:
            x = _join(state, x)
        left = self.left if state is None else 0
        # Frames start every `stride` samples; the last one is made full (`left` of the buffer is no signal).
        waiting = x.shape[3] - (0 if state is None else self.spare + self.left)
        right = self.right + -waiting % self.stride if end else 0
        if lengths is None:
            return _pad(x, left, right, self.pad_mode)
        return _pad_rows(x, lengths, self.left, self.right, self.stride, self.pad_mode)

    def convolve(self, buffer, lengths=None):
        """Convolution and norm of an extended signal."""
        weight, bias = self.weights(buffer.dtype)
        if buffer.shape[3] < self.window:  # at a signal's end there may be nothing left to do
            return buffer.new_zeros(buffer.shape[0], len(bias), 1, 0)
        y = _operator("convolve")(buffer, weight, bias, self.stride, self.dilation)
        return self.normalise(y, None if lengths is None else self.output_lengths(lengths))

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
        return self.conv.in_channels, 1, self.spare + self.left + count - self.outputs(count) * self.stride


class EncodecConvTranspose1d(FoldedConv):
    """Upsampling by `stride` with a kernel of two strides, cut to T * stride samples.

    Output block t (`stride` samples) is W_new x[t] + W_old x[t-1]: an ordinary convolution of kernel 2 whose channels
    are (stride, C'), and in channels-last memory those channels already are the samples in order.
    """

    def __init__(self, config, in_channels: int, out_channels: int, kernel_size: int, stride: int):
        super().__init__(config, nn.ConvTranspose1d(in_channels, out_channels, kernel_size, stride))
        self.stride, self.out_channels, self.window = stride, out_channels, 2  # frames x[t-1] and x[t]
        excess = kernel_size - stride
        if config.use_causal_conv:
            self.right = -int(-excess * config.trim_right_ratio // 1)  # rounded up
        else:
            self.right = excess // 2
        self.left = excess - self.right

    def arrange(self):
        new, old = self.conv.weight.split(self.stride, dim=2)  # (C, C', stride) each
        kernel = torch.stack([old, new], dim=3).permute(2, 1, 0, 3)  # (stride, C', C, 2)
        return [kernel.flatten(0, 1).unsqueeze(2), self.conv.bias.repeat(self.stride)]

    def step(self, x, state=None, end=True, lengths=None):
        """(B, C, 1, T) and the frame before -> (B, C', 1, T * stride) and the last frame."""
        if lengths is not None:
            x = x * _valid(x, lengths)
        # Block T, made of x[T-1] alone, is needed when something of it is kept, or to be in GroupNorm's statistics.
        tail = end and (self.left > 0 or hasattr(self, "norm"))
        before = x.new_zeros(*x.shape[:3], 1) if state is None else state
        buffer = _join(before, x, *([x.new_zeros(*x.shape[:3], 1)] if tail else []))
        weight, bias = self.weights(x.dtype)
        if buffer.shape[3] < self.window:
            return x.new_zeros(x.shape[0], self.out_channels, 1, 0), before
        y = _operator("convolve")(buffer, weight, bias, 1, 1).permute(0, 2, 3, 1)  # (B, 1, T, stride * C')
        y = y.reshape(y.shape[0], 1, -1, self.out_channels).permute(0, 3, 1, 2)
        y = self.normalise(y, None if lengths is None else (lengths + 1) * self.stride)
        if state is None:
            y = y[..., self.left :]
        if tail:
            y = y[..., : y.shape[3] - self.right]
        return y, x[..., -1:].clone()

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
        return self.conv.in_channels, 1, 1


class EncodecLSTM(Folding):
    """LSTM along time with a skip connection. It only looks back, in the non-causal models too."""

    def __init__(self, config: EncodecConfig, dim: int):
        super().__init__()
        # `nn.LSTM` without its `forward`: compilers refuse even to look at an `nn.LSTM`.
        self.lstm = nn.RNNBase("LSTM", dim, dim, config.num_lstm_layers)

    def arrange(self):
        return list(self.lstm.parameters())

    def fold(self, dtype, few):
        weights = [parameter.to(dtype) for parameter in self.lstm.parameters()]
        if not few:
            return weights
        layers = [weights[at : at + 4] for at in range(0, len(weights), 4)]
        # One row times a matrix is read from memory twice as fast with the outputs side by side.
        return [part for a, b, c, d in layers for part in (a.t().contiguous(), b.t().contiguous(), c + d)]

    def step(self, x, state=None, end=True, lengths=None):
        """(B, C, 1, T) and hidden and cell, (B, 2, layers, C) -> the same."""
        if x.shape[3] == 0:
            return x, state
        sequence = x.squeeze(2).permute(2, 0, 1)  # (T, B, C)
        if state is None:
            state = x.new_zeros(x.shape[0], 2, self.lstm.num_layers, self.lstm.hidden_size)
        state = [part.contiguous() for part in state.permute(1, 2, 0, 3)]
        alone = x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if alone and x.shape[3] <= FEW_FRAMES:  # asked last, since a compiler would make the length a constant
            y, *state = _lstm_steps(sequence, *state, self.weights(x.dtype, few=True))
        else:
            y, *state = _operator("lstm")(sequence, *state, self.weights(x.dtype))
        y = (y + sequence).permute(1, 2, 0).unsqueeze(2)
        state = None if end else torch.stack(state).permute(2, 0, 1, 3).contiguous()
        return y.contiguous(memory_format=torch.channels_last), state

    def output_lengths(self, lengths):
        """As the inputs' `lengths`."""
        return lengths

    def outputs(self, count: int) -> int:
        """As many as inputs."""
        return count

    def inputs(self, count: int, first: bool) -> int:
        """As many as outputs."""
        return count

    def state_shape(self, count: int) -> tuple[int, ...]:
        """Of one row's state."""
        return 2, self.lstm.num_layers, self.lstm.hidden_size


class EncodecResnetBlock(nn.Module):
    """Residual unit: ELU, convolution that narrows, ELU, 1x1 convolution back, round a 1x1 or identity skip."""

    def __init__(self, config: EncodecConfig, dim: int, dilation: int):
        super().__init__()
        hidden = dim // config.compress
        narrow = EncodecConv1d(config, dim, hidden, config.residual_kernel_size, dilation=dilation)
        widen = EncodecConv1d(config, hidden, dim, 1)
        self.block = nn.ModuleList([nn.ELU(), narrow, nn.ELU(), widen])
        self.shortcut = EncodecConv1d(config, dim, dim, 1) if config.use_conv_shortcut else nn.Identity()

    def step(self, x, state=None, end=True, lengths=None):
        """(B, C, 1, T) -> the same; the skip waits in the buffer of the first convolution for its frames."""
        narrow, widen = self.block[1], self.block[3]
        buffer = narrow.extend(x, state, end, lengths)
        hidden = narrow.convolve(elu(buffer, keep=True), lengths)
        rest = None if end else narrow.rest(buffer, hidden, state is None)
        skip = buffer[..., narrow.left : narrow.left + hidden.shape[3]]
        hidden = widen.convolve(elu(hidden), lengths)
        hidden += skip if isinstance(self.shortcut, nn.Identity) else self.shortcut.convolve(skip, lengths)
        return hidden, rest

    def output_lengths(self, lengths):
        """As the inputs' `lengths`."""
        return lengths

    def outputs(self, count: int) -> int:
        """As the first convolution's, the only one that looks at more than one sample."""
        return self.block[1].outputs(count)

    def inputs(self, count: int, first: bool) -> int:
        """As the first convolution's."""
        return self.block[1].inputs(count, first)

    def state_shape(self, count: int) -> tuple[int, ...]:
        """Of one row's state after `count` samples."""
        return self.block[1].state_shape(count)


def elu(x: Tensor, keep: bool = False) -> Tensor:
    """ELU, in place where nobody needs the input: `keep` says that the caller does.

    On a CPU it is max(x, 2^min(x log2 e, 0) - 1), within 7e-8 of it: `exp2` takes a quarter of the time of `expm1`.
    """
    if x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        wide = x.float()
        low = (wide * LOG2_E).clamp_max_(0).exp2_().sub_(1)
        return torch.maximum(wide, low, out=low).to(x.dtype)
    return F.elu(x, inplace=not keep and not torch.is_grad_enabled())


def _join(*pieces: Tensor) -> Tensor:
    """Pieces (B, C, 1, T) one after the other in time. Unless all that `cat` joins is channels-last, and nothing of it
    empty, it gives another layout, and the convolution takes another kernel."""
    there = [piece.contiguous(memory_format=torch.channels_last) for piece in pieces if piece.shape[3]]
    return torch.cat(there, dim=3) if len(there) > 1 else [*there, pieces[0]][0]


def _valid(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(B, 1, 1, T) mask of the samples before each row's end."""
    return (torch.arange(x.shape[3], device=x.device) < lengths[:, None])[:, None, None]


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
    return _join(x[..., 1 : left + 1].flip(3), x, x[..., length - 1 - right : length - 1].flip(3))


def _pad_rows(x: torch.Tensor, lengths: torch.Tensor, left: int, right: int, stride: int, mode: str) -> torch.Tensor:
    """`_pad` for rows of different `lengths`: each as if alone, with the extra samples that fill its last window."""
    length = x.shape[3]
    ends = lengths[:, None]
    source = torch.arange(-left, length + right + -length % stride, device=x.device).expand(lengths.shape[0], -1)
    if mode == "reflect":
        # Mirrored at both ends; the right mirror of a row too short for that stands where appended zeros would end.
        mirror = torch.maximum(ends - 1, (right + -ends % stride).clamp(min=left))
        source = mirror - (mirror - source.abs()).abs()
    elif mode == "replicate":
        source = torch.minimum(source.clamp(min=0), ends - 1)
    outside = (source < 0) | (source >= ends)
    index = source.clamp(0, length - 1)[:, None, None].expand(-1, x.shape[1], -1, -1)
    return x.gather(3, index).masked_fill(outside[:, None, None], 0).contiguous(memory_format=torch.channels_last)
