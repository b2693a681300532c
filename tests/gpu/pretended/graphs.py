"""CUDA graphs: recorded once, replayed on whatever then lies where their inputs lay.

As on a GPU nothing is computed while a graph is captured: what was written meanwhile is undone, and what was made is
garbage until the first replay. Memory that was there before is known by its place alone, and must still be there.
"""

import weakref

import torch

from . import operations as ops
from .device import DeviceError, PretendedDevice


class _Outside:
    """Memory that a graph reads or writes and does not own."""

    def __init__(self, tensor: torch.Tensor):
        self.storage = weakref.ref(tensor.untyped_storage())
        self.dtype, self.size, self.stride, self.offset = (
            tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()
        )  # fmt: skip

    def there(self) -> torch.Tensor:
        """The memory as it is now."""
        if (storage := self.storage()) is None:
            raise DeviceError(f"a graph is replayed on memory that was freed: {self.dtype} {tuple(self.size)}")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


class Capture:
    """What is recorded meanwhile."""

    def __init__(self, device: PretendedDevice, index: int):
        self.device, self.index, self.steps = device, index, []
        self._own = weakref.WeakSet()  # memory made meanwhile
        self._kept, self._before = [], {}

    def check(self, ours: list, index: int) -> None:
        """Work on another device would not be part of the graph."""
        if any(t.device.index != self.index for t in ours) or index != self.index:
            other = next((t.device for t in ours if t.device.index != self.index), f"cuda:{index}")
            self.device.refuse(
                f"a graph is captured on cuda:{self.index}, and work is on {other}: it would stay empty"
            )

    def before(self, func, args: tuple, kwargs: dict) -> None:
        """Keep what an operation is about to overwrite."""
        for tensor in ops.tensors_in(ops.written_arguments(func, args, kwargs)):
            storage = tensor.untyped_storage()
            if storage not in self._own and storage._cdata not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self._before[storage._cdata] = whole, whole.clone()

    def record(self, func, args: tuple, kwargs: dict, out) -> None:
        """One operation, done."""
        args, kwargs = ops.changed(self._as_recorded, (args, kwargs))
        schema = getattr(func, "_schema", None)
        makes = schema is None or not (schema.is_mutable or ops.is_view(func))
        if makes:
            for tensor in ops.tensors_in(out):
                self._own.add(tensor.untyped_storage())
                self._kept.append(tensor)
        self.steps.append((func, args, kwargs, out if makes else None))

    def _as_recorded(self, tensor: torch.Tensor):
        return tensor if tensor.untyped_storage() in self._own else _Outside(tensor)

    def undo(self) -> None:
        """Nothing was computed yet."""
        for whole, before in self._before.values():
            whole.copy_(before)
        for tensor in self._kept:
            garbage = float("nan") if tensor.is_floating_point() else 1 if tensor.dtype == torch.bool else -77
            tensor.fill_(garbage)


class Graphs:
    """What `torch.cuda` has for graphs."""

    def __init__(self, device: PretendedDevice):
        owner = device

        class CUDAGraph:
            """A recorded graph."""

            def __init__(self, *args, **kwargs):
                self.steps, self.index = None, None

            def replay(self):
                """Do again what was recorded."""
                if self.steps is None or (not self.steps and owner.shapes is None):
                    raise DeviceError("a graph is replayed that recorded nothing")
                owner.counts.add(1, 0)
                for step in self.steps:
                    _do_again(*step)

            def reset(self):
                """Forget what was recorded."""
                self.steps = None

            def pool(self):
                """The place of its memory."""
                return (0, id(self))

        class capturing:
            """What is done in the block becomes the graph."""

            def __init__(self, graph, pool=None, stream=None, capture_error_mode="global"):
                self.graph, self.index = graph, owner.current if stream is None else stream.device.index

            def __enter__(self):
                owner.capture = Capture(owner, self.index)

            def __exit__(self, kind, *rest):
                capture, owner.capture = owner.capture, None
                capture.undo()
                if kind is None:
                    self.graph.steps = capture.steps

        self.CUDAGraph, self.capturing = CUDAGraph, capturing


def _do_again(func, args: tuple, kwargs: dict, out) -> None:
    new = func(*_there(args), **_there(kwargs))
    if out is None:  # written in place, or a view of what is there
        return
    for place, value in zip(ops.tensors_in(out), ops.tensors_in(new)):
        place.copy_(value)


def _there(value):
    if isinstance(value, _Outside):
        return value.there()
    if isinstance(value, (list, tuple)):
        return type(value)([_there(item) for item in value])
    if isinstance(value, dict):
        return {key: _there(item) for key, item in value.items()}
    return value
