# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""What is passed back through by hand, because autograd's own way costs more than the arithmetic: a residual unit."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def residual_unit(x: Tensor, narrow: tuple, widen: tuple, skip: tuple | None, left: int, dilation: int) -> Tensor:
    """ELU, a convolution, ELU, a convolution of kernel 1, and the skip, of a whole signal.

    One node of the graph, which keeps the padded ELU of `x`, the narrow ELU and `x` itself: autograd would keep six
    signals, and fill, copy and add the wide ones' gradients four times more.

    Args:
        x: (B, C, 1, T) in channels-last memory.
        narrow: weight (H, C, 1, K) and bias of the first convolution.
        widen: of the second, (C, H, 1, 1).
        skip: of the convolution on the skip, (C, C, 1, 1); `None` where it is the identity.
        left: samples of padding before the signal, mirrored; what else the window needs comes after it.
        dilation: of the first convolution.

    Returns:
        (B, C, 1, T) in channels-last memory, of the type that autocast asks for, else of `x`'s.
    """
    return _ResidualUnit.apply(x, *narrow, *widen, *(skip or (None, None)), left, dilation)


class _ResidualUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, widen, widen_bias, skip, skip_bias, left, dilation):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            x, weight, widen = (tensor.to(dtype) for tensor in (x, weight, widen))
            (batch, channels, _, length), right = x.shape, (weight.shape[3] - 1) * dilation - left
            padded = x.new_empty(batch, 1, left + length + right, channels).permute(0, 3, 1, 2)
            padded[..., left : left + length] = F.elu(x)
            if left:
                padded[..., :left] = padded[..., left + 1 : 2 * left + 1].flip(3)
            if right:
                padded[..., left + length :] = padded[..., left + length - 1 - right : left + length - 1].flip(3)
            weight = weight.contiguous(memory_format=torch.channels_last)
            hidden = F.elu_(F.conv2d(padded, weight, bias.to(dtype), dilation=(1, dilation)))
            hidden = hidden.contiguous(memory_format=torch.channels_last)
            widen = widen.flatten(1)  # (C, H)
            if skip is None:
                y = torch.addmm(widen_bias.to(dtype), _rows(hidden), widen.t()).add_(_rows(x))
            else:
                skip = skip.flatten(1).to(dtype)
                y = torch.addmm((widen_bias + skip_bias).to(dtype), _rows(hidden), widen.t())
                y.addmm_(_rows(x), skip.t())
        ctx.save_for_backward(padded, hidden, weight, widen, *(() if skip is None else (x, skip)))
        ctx.left, ctx.dilation = left, dilation
        return y.view(batch, 1, length, channels).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        padded, hidden, weight, widen, *skip = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        batch, length, left = len(grad), grad.shape[3], ctx.left
        rows = _rows(grad)
        grad_bias = rows.sum(0)
        grad_widen = (rows.t() @ _rows(hidden)).view(*widen.shape, 1, 1)
        inner = (rows @ widen).view(batch, 1, length, -1).permute(0, 3, 1, 2)
        inner = torch.ops.aten.elu_backward(inner, 1, 1, 1, True, hidden)
        outer, grad_weight, narrow_bias = torch.ops.aten.convolution_backward(
            inner, padded, weight, [len(weight)], [1, 1], [0, 0], [1, ctx.dilation], False, [0, 0], 1, [True] * 3
        )
        right = outer.shape[3] - left - length
        if left:
            outer[..., left + 1 : 2 * left + 1] += outer[..., :left].flip(3)
        if right:
            end = left + length - 1
            outer[..., end - right : end] += outer[..., end + 1 :].flip(3)
        signal = slice(left, left + length)
        grad_x = torch.ops.aten.elu_backward(outer[..., signal], 1, 1, 1, True, padded[..., signal])
        grad_x = grad_x.contiguous(memory_format=torch.channels_last)
        grads = grad_weight, narrow_bias, grad_widen, grad_bias
        if not skip:
            return grad_x.add_(grad), *grads, None, None, None, None
        x, matrix = skip
        _rows(grad_x).addmm_(rows, matrix)
        return grad_x, *grads, (rows.t() @ _rows(x)).view(*matrix.shape, 1, 1), grad_bias, None, None


def _rows(x: Tensor) -> Tensor:
    """(B, C, 1, T) in channels-last memory as (B * T, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
