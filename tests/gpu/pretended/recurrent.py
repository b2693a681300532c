"""`torch.lstm` as cuDNN takes it: one call for all layers and steps, and what it refuses or would do slowly."""

import torch

from .device import DeviceTensor, PretendedDevice
from .shapes import as_shape


class CudnnLSTM:
    """Stands in for `torch.lstm`, and for what lays its weights out in one piece."""

    def __init__(self, device: PretendedDevice):
        self.device, self.plain = device, torch.lstm

    def lstm(self, x, hx, params, has_biases, layers, dropout, train, bidirectional, batch_first=False):
        """As `torch.lstm`; calls without tensors of the device are PyTorch's own."""
        tensors, device = [x, *hx, *params], self.device
        if not any(isinstance(t, DeviceTensor) for t in tensors):
            return self.plain(x, hx, params, has_biases, layers, dropout, train, bidirectional, batch_first)
        if not all(isinstance(t, DeviceTensor) for t in tensors) or len({t.device for t in tensors}) > 1:
            device.refuse("torch.lstm: Input and parameter tensors are not at the same device")
        if torch.is_autocast_enabled("cuda"):
            device.counts.note("an LSTM under autocast: cuDNN computes it in float16, whatever autocast says")
            with torch.autocast("cuda", enabled=False):
                x, *hx = (t.half() for t in (x, *hx))
                params = [t.half() for t in params]
        else:
            self._check(x, hx, params)
        for state in hx:
            if not state.is_contiguous():
                device.refuse("torch.lstm: rnn: hx is not contiguous")
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *hx, *params))
        x = (x.transpose(0, 1) if batch_first else x).contiguous()
        y, h, c = _Call.apply(self, layers, learns, train, x, *hx, *params)
        return (y.transpose(0, 1) if batch_first else y), h, c

    def _check(self, x, hx, params) -> None:
        counts = self.device.counts
        if len(dtypes := {t.dtype for t in (x, *hx, *params)}) > 1:
            self.device.refuse(
                f"torch.lstm: tensors are {', '.join(sorted(map(str, dtypes)))}: all must be of one type"
            )
        pieces = {p.values.untyped_storage() for p in params}
        if len(pieces) > 1:
            counts.note("RNN module weights are not part of single contiguous chunk of memory: copied at every call")
        if x.dtype == torch.bfloat16:
            counts.note("an LSTM in bfloat16: by cuDNN from 9.13 on, before that one step at a time")

    def compute(self, layers: int, train: bool, tensors: list) -> tuple:
        """Output, hidden and cell state of values alone."""
        x, hidden, cell, *weights = tensors
        if any(t.device.type == "meta" for t in tensors):
            shape = (*x.shape[:2], hidden.shape[2])
            return tuple(x.new_empty(size, device="meta") for size in (shape, hidden.shape, cell.shape))
        return self.plain(x, (hidden, cell), weights, True, layers, 0.0, train, False, False)

    def flatten(self, module: torch.nn.RNNBase) -> None:
        """As `flatten_parameters`: the weights in one piece of memory, except bfloat16, which PyTorch leaves."""
        weights = module._flat_weights
        if all(isinstance(w, DeviceTensor) and w.dtype != torch.bfloat16 for w in weights):
            self.flatten_weights(weights)

    def flatten_weights(self, weights, *_) -> torch.Tensor:
        """As `torch._cudnn_rnn_flatten_weight`: lays the weights out in one piece, which is returned."""
        if not all(isinstance(w, DeviceTensor) for w in weights):
            self.device.refuse("_cudnn_rnn_flatten_weight: weights are not on the device")
        first = weights[0]
        with torch.no_grad():
            parts = [w.values.detach() for w in weights]
            if any(part.device.type == "meta" for part in parts):
                parts = [as_shape(part) for part in parts]
            flat = torch.cat([part.flatten() for part in parts])
        at = 0
        for w in weights:
            w.values = flat[at : at + w.numel()].view(w.shape)
            at += w.numel()
        self.device.counts.add(len(weights), 2 * flat.numel() * flat.element_size())
        return self.device.tensor(flat, first.device.index)


class _Call(torch.autograd.Function):
    """One call of cuDNN."""

    @staticmethod
    def forward(ctx, cudnn, layers, learns, train, *tensors):
        ctx.cudnn, ctx.layers, ctx.train, ctx.index = cudnn, layers, train, tensors[0].device.index
        device, values = cudnn.device, [t.values for t in tensors]
        if device.capture is not None:
            device.capture.check(tensors, ctx.index)
        if learns and values[0].device.type != "meta":
            values = [t.detach().requires_grad_() for t in values]
        with torch.set_grad_enabled(learns):
            out = cudnn.compute(layers, learns, values)
        ctx.values, ctx.made = (values, out) if learns else (None, None)
        out = tuple(t.detach() for t in out)
        if device.capture is not None and device.shapes is None:
            device.capture.record(_again(cudnn, layers), tuple(values), {}, out)
        device.counts.lstm_steps += layers * tensors[0].shape[0]
        device.counts.add(1, 0)
        return tuple(device.tensor(t, ctx.index) for t in out)

    @staticmethod
    def backward(ctx, *gradients):
        device, values = ctx.cudnn.device, ctx.values
        if not ctx.train:
            device.refuse("torch.lstm: cudnn RNN backward can only be called in training mode")
        device.counts.lstm_steps += ctx.layers * values[0].shape[0]
        device.counts.add(1, 0)
        if values[0].device.type == "meta" or not values[0].requires_grad:
            found = [torch.empty_like(t) for t in values]
        else:
            given = [torch.zeros_like(made) if g is None else g.values for g, made in zip(gradients, ctx.made)]
            found = torch.autograd.grad(ctx.made, values, given, retain_graph=True, allow_unused=True)
        return (None, None, None, None, *(None if g is None else device.tensor(g, ctx.index) for g in found))


def _again(cudnn: CudnnLSTM, layers: int):
    def replay(*tensors):
        return cudnn.compute(layers, False, list(tensors))

    return replay
