"""How much work a call is, and how much of it a card can do: floating point operations, bytes moved, and the rates."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class _Counter(TorchDispatchMode):
    """Bytes that operations read and write, and their floating point operations. PyTorch's own counter knows no LSTM,
    and cannot look at `autograd.grad`."""

    def __init__(self):
        super().__init__()
        self.bytes = self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        name = str(function)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        places = {tensor.untyped_storage().data_ptr() for tensor in given}
        looks = not function._schema.is_mutable and all(one.untyped_storage().data_ptr() in places for one in made)
        if not looks:  # a view moves nothing
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in given + made)
        if "_cudnn_rnn.default" in name or "mkldnn_rnn_layer.default" in name:
            weights = args[1] if isinstance(args[1], (list, tuple)) else args[1:3]
            frames = args[0].shape[0] * args[0].shape[1]
            self.flops += 2 * frames * sum(weight.numel() for weight in weights if weight.dim() == 2)
        elif (count := flop_registry.get(function.overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=output)
        return output


def work_of(call: Callable) -> dict[str, float]:
    """GFLOP and GB of one call."""
    with _Counter() as counter:
        call()
    return {"GFLOP": counter.flops / 1e9, "GB": counter.bytes / 1e9}


def allow(precision: str) -> None:
    """Let float32 products be computed in `ieee` or `tf32` from now on."""
    for place in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        place.fp32_precision = precision


def limits(bench) -> dict[str, float]:
    """GB/s of a copy (read and written), TFLOP/s of matrix products by how they are computed."""
    size, numbers = (256, 1 << 16) if bench.rehearse else (8192, 1 << 28)
    source = torch.zeros(numbers, device=bench.device)
    target = torch.empty_like(source)
    found = {"GB/s": 8e-9 * numbers / _least(bench, lambda: target.copy_(source))}
    source = target = None
    before = torch.backends.cuda.matmul.fp32_precision
    for kind in ("ieee", "tf32", "bf16"):
        if kind != "bf16":
            torch.backends.cuda.matmul.fp32_precision = kind
        matrix = torch.randn(size, size, device=bench.device).to(torch.bfloat16 if kind == "bf16" else torch.float32)
        found[f"TFLOP/s {kind}"] = 2e-12 * size**3 / _least(bench, lambda matrix=matrix: torch.mm(matrix, matrix))
    torch.backends.cuda.matmul.fp32_precision = before
    bench.free()
    return {name: round(rate, 3) for name, rate in found.items()}


def _least(bench, call: Callable) -> float:
    """Seconds of the fastest of several calls."""
    return min(bench._milliseconds(call) for _ in range(2 if bench.rehearse else 8)) / 1000
