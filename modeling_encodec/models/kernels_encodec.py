# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""The arithmetic of the layers, chosen for speed: PyTorch's own layers computed faster, and what compilers see.

Time runs along the last axis of a (B, C, 1, T) tensor in channels-last memory, so each sample's channels lie together:
convolutions need no repacking, a strided kernel reads one contiguous piece, and upsampling is a reshape. On a CPU
that is faster than channels-first at these widths.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import _WeightNorm

from .onednn_encodec import limit_kernels
from .weight_cache_encodec import WeightCache


limit_kernels()  # here too, for this file travels without the package
# Weights of more numbers than this are multiplied as one matrix.
LARGE_WEIGHT = 1 << 20
# And those of inputs up to so many numbers: PyTorch would take its plain convolution, which copies them each time.
SMALL_INPUT = 20480
LOG2_E = math.log2(math.e)


def lstm(x: Tensor, hidden: Tensor, cell: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What `nn.LSTM` does with a (T, B, C) sequence."""
    return torch.lstm(x, (hidden, cell), weights, True, len(weights) // 4, 0.0, torch.is_grad_enabled(), False, False)


def lstm_steps(x: Tensor, hidden: Tensor, cell: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
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


def convolve(x: Tensor, weight: Tensor, bias: Tensor, stride: int, dilation: int) -> Tensor:
    """`F.conv2d` of (B, C, 1, T) along time."""
    if len(weight) <= 2 and not torch.is_grad_enabled():
        x, weight, bias = x.float(), weight.float(), bias.float()  # in half precision audio is heard to be rounded
        if stride == dilation == 1 and x.device.type == "cpu":
            return _sum_taps(x, weight, bias)
    small = x.numel() <= SMALL_INPUT and not torch.is_grad_enabled()
    if dilation == 1 and (x.shape[1] == 1 or weight.numel() > LARGE_WEIGHT or small):
        # One input channel leaves the layout ambiguous and `conv2d` slow, and so do weights that overflow a cache.
        windows = x.permute(0, 2, 3, 1).unfold(2, weight.shape[3], stride).transpose(3, 4)
        weight = weight.permute(0, 2, 3, 1).flatten(1)  # (C', window * C)
        return F.linear(windows.flatten(3), weight, bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, stride=(1, stride), dilation=(1, dilation))


def _sum_taps(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution with hardly any output channels: all taps' products at once, then each added in its place."""
    taps, frames = weight.shape[3], x.shape[3] - weight.shape[3] + 1
    products = torch.matmul(
        weight.permute(3, 0, 1, 2).flatten(2), x.permute(2, 0, 1, 3)[0, :, None]
    )  # (B, taps, C', T)
    y = products[:, 0, :, :frames] + bias[:, None]
    for tap in range(1, taps):
        y += products[:, tap, :, tap : tap + frames]
    return y.unsqueeze(2)


def elu(x: Tensor) -> Tensor:
    """ELU. On a CPU it is max(x, 2^min(x log2 e, 0) - 1), within 7e-8 of it: `exp2` takes a quarter of the time of
    `expm1`."""
    if x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        wide = x.float()
        low = (wide * LOG2_E).clamp_max_(0).exp2_().sub_(1)
        return torch.maximum(wide, low, out=low).to(x.dtype)
    return F.elu(x)


# Compilers are shown one operator each. They would unroll an LSTM over time, for one length alone, and compile anew
# whenever a convolution's input passes a size at which PyTorch changes kernels. This file may be imported twice in one
# process, as part of the package and as a checkpoint's remote code: the operators are the first's.
if not hasattr(torch.ops.modeling_encodec, "lstm"):

    @torch.library.custom_op("modeling_encodec::lstm", mutates_args=())
    def _lstm_operator(
        x: Tensor, hidden: Tensor, cell: Tensor, weights: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return lstm(x, hidden, cell, weights)

    @_lstm_operator.register_fake
    def _(x, hidden, cell, weights):
        return x.new_empty(x.shape), hidden.new_empty(hidden.shape), cell.new_empty(cell.shape)

    @torch.library.custom_op("modeling_encodec::convolve", mutates_args=())
    def _convolve_operator(x: Tensor, weight: Tensor, bias: Tensor, stride: int, dilation: int) -> Tensor:
        return convolve(x, weight, bias, stride, dilation).contiguous(memory_format=torch.channels_last)

    @_convolve_operator.register_fake
    def _(x, weight, bias, stride, dilation):
        frames = (x.shape[3] - (weight.shape[3] - 1) * dilation - 1) // stride + 1
        return x.new_empty(x.shape[0], len(weight), 1, frames).contiguous(memory_format=torch.channels_last)


# With gradients, which the operators have none of, a compiler leaves an LSTM alone.
_lstm_alone = torch.compiler.disable(lstm)


def operator(name: str):
    """`lstm` or `convolve`; one operator where a compiler looks on and no gradient is wanted."""
    if not torch.compiler.is_compiling():
        return lstm if name == "lstm" else convolve
    if torch.is_grad_enabled():
        return _lstm_alone if name == "lstm" else convolve
    return getattr(torch.ops.modeling_encodec, name)


def join(*pieces: Tensor) -> Tensor:
    """Pieces (B, C, 1, T) one after the other in time. Unless all that `cat` joins is channels-last, and nothing of it
    empty, it gives another layout, and the convolution takes another kernel."""
    there = [piece.contiguous(memory_format=torch.channels_last) for piece in pieces if piece.shape[3]]
    return torch.cat(there, dim=3) if len(there) > 1 else [*there, pieces[0]][0]


def valid(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(B, 1, 1, T) mask of the samples before each row's end."""
    return (torch.arange(x.shape[3], device=x.device) < lengths[:, None])[:, None, None]


class ELU(nn.ELU):
    """`nn.ELU` by a faster kernel."""

    def forward(self, x):
        """(B, C, T) -> the same."""
        return elu(x)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` with one group, over channels and the valid samples of each row."""

    def forward(self, x, lengths=None):
        """(B, C, T), rows of `lengths` (B,) samples or all T -> the same."""
        if lengths is None:
            if x.device.type != "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                return self._channels_last(x)
            weight, bias = self.weight, self.bias
            if not torch.is_grad_enabled():  # a half-precision signal meets float32 parameters
                weight, bias = weight.to(x.dtype), bias.to(x.dtype)
            return F.group_norm(x.unsqueeze(2), 1, weight, bias, self.eps).squeeze(2)
        x = x.unsqueeze(2)
        inside = valid(x, lengths)
        count = lengths.view(-1, 1, 1, 1) * x.shape[1]
        wide = x.float().masked_fill(~inside, 0)
        mean = wide.sum((1, 2, 3), keepdim=True) / count
        variance = ((wide - mean).square() * inside).sum((1, 2, 3), keepdim=True) / count
        scale = torch.rsqrt(variance + self.eps) * self.weight.view(1, -1, 1, 1)
        return ((wide - mean) * scale + self.bias.view(1, -1, 1, 1)).to(x.dtype).squeeze(2)

    def _channels_last(self, x):
        """On an accelerator PyTorch's own would bring the signal into channels-first memory and back."""
        variance, mean = torch.var_mean(x.float(), (1, 2), correction=0, keepdim=True)
        scale = torch.rsqrt(variance + self.eps) * self.weight.float().view(1, -1, 1)
        shift = self.bias.float().view(1, -1, 1) - mean * scale
        return torch.addcmul(shift, x, scale).to(x.dtype)


class _Convolution(nn.Module):
    """A convolution that keeps its weight as the kernels take it, where no gradient is wanted."""

    def arrange(self) -> tuple[Tensor, Tensor]:
        """Weight (C', C, 1, window) and bias (C',) of the parameters as they are, through which gradients go."""
        raise NotImplementedError  # each kind has its own

    def ready(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same to compute with, in `dtype` where no gradient is wanted; compilers see to that themselves."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.arrange()
        sources = self._sources()
        if sources is None:
            return self._fold(dtype)
        cache = self.__dict__.get("cache") or self.__dict__.setdefault("cache", WeightCache())
        return cache.get(dtype, sources, lambda: self._fold(dtype))

    def _sources(self) -> list[Tensor] | None:
        """The tensors that weight and bias are made of; `None` if somebody else has a hand in them."""
        parametrized = self._modules.get("parametrizations")
        if parametrized is None:
            return [self.weight, self.bias]
        weight = parametrized._modules.get("weight")
        if len(parametrized._modules) > 1 or [type(part) for part in weight._modules.values()] != [_WeightNorm]:
            return None
        return [*weight._parameters.values(), self._parameters["bias"]]

    def _fold(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weight, bias = (tensor.detach().to(dtype) for tensor in self.arrange())
        if bias.device.type != "cpu":  # kept for one call alone, or together with what they are made of
            return weight.contiguous(memory_format=torch.channels_last), bias
        # Copied, for with a single input channel `contiguous` would leave strides that read as channels-first.
        return torch.empty_like(weight, memory_format=torch.channels_last).copy_(weight), bias.clone()


class Conv1d(_Convolution, nn.Conv1d):
    """`nn.Conv1d` without padding of its own."""

    def arrange(self):
        return self.weight.unsqueeze(2), self.bias

    def is_plain(self) -> bool:
        """Whether it is one of ours, and not an adapter's."""
        return self._parameters["bias"] is not None and self.groups == 1 and self.padding == (0,)

    def forward(self, x):
        """(B, C, T) -> (B, C', T'); nothing of what is shorter than the kernel reaches."""
        if not self.is_plain():
            return super().forward(x)
        weight, bias = self.ready(x.dtype)
        (stride,), (dilation,) = self.stride, self.dilation
        if x.shape[2] < (weight.shape[3] - 1) * dilation + 1:
            return x.new_zeros(x.shape[0], len(bias), 0)
        return operator("convolve")(x.unsqueeze(2), weight, bias, stride, dilation).squeeze(2)


class ConvTranspose1d(_Convolution, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with a kernel of two strides.

    Output block t (`stride` samples) is W_new x[t] + W_old x[t-1]: an ordinary convolution of kernel 2 whose channels
    are (stride, C'), and in channels-last memory those channels already are the samples in order.
    """

    def arrange(self):
        (stride,) = self.stride
        new, old = self.weight.split(stride, dim=2)  # (C, C', stride) each
        kernel = torch.stack([old, new], dim=3).permute(2, 1, 0, 3)  # (stride, C', C, 2)
        return kernel.flatten(0, 1).unsqueeze(2), self.bias.repeat(stride)

    def forward(self, x, output_size=None, *, inner: bool = False):
        """(B, C, T) -> (B, C', (T + 1) * stride), or `inner`: the T - 1 blocks in the middle, made of two frames."""
        if output_size is not None:
            return super().forward(x, output_size)
        x = x.unsqueeze(2)
        if not inner:
            nothing = x.new_zeros(*x.shape[:3], 1)
            x = join(nothing, x, nothing)
        weight, bias = self.ready(x.dtype)
        if x.shape[3] < 2:
            return x.new_zeros(x.shape[0], self.out_channels, 0)
        y = operator("convolve")(x, weight, bias, 1, 1).permute(0, 2, 3, 1)  # (B, 1, T, stride * C')
        return y.reshape(y.shape[0], -1, self.out_channels).transpose(1, 2)
