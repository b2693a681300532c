# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""What is computed from weights (folded convolutions, search tables, hashes), kept while the weights stay the same.

PyTorch counts a version for most writes, and none for others: through `parameter.data`, through a NumPy view, by a
fused optimizer. So on a CPU the weights are compared with a copy of them, bit by bit, which is a tenth of the work of
folding them anew. `unchanged_weights` says for how long one comparison holds: one call of the codec, or one second of
a live stream. On an accelerator a comparison would wait for the device, so there everything is computed once a call;
what a recorded CUDA graph reads is written where it lay before.
"""

import itertools
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


PIECE = 1 << 15  # numbers that PyTorch copies or compares without threads
# One for the process, where this file may be imported twice: with the package, and as a checkpoint's remote code.
_clock = vars(torch).setdefault("_modeling_encodec_clock", itertools.count(1))
_thread = vars(torch).setdefault("_modeling_encodec_thread", threading.local())


def now() -> int:
    """A moment, for `unchanged_weights`; later ones are greater."""
    return next(_clock)


def last_compared() -> int | None:
    """Since when weights are taken to be unchanged, within `unchanged_weights`."""
    return getattr(_thread, "since", None)


@contextmanager
def values_read():
    """A list of all values that this thread gets from caches within it, for a graph that goes on reading them."""
    before, _thread.read = getattr(_thread, "read", None), []
    try:
        yield _thread.read
    finally:
        _thread.read = before


@contextmanager
def unchanged_weights(since: int | None = None):
    """Within it weights are taken to be unchanged since they were last compared, if that was not before `since`: by
    default the moment of entering. The outermost of nested ones counts."""
    outermost = last_compared() is None
    if outermost:
        _thread.since = now() if since is None else since
    try:
        yield
    finally:
        if outermost:
            _thread.since = None


@dataclass
class _Kept:
    value: Any
    marks: list
    copies: list[torch.Tensor] | None
    compared: int
    recorded: bool = False


class WeightCache:
    """Values by key, each of some tensors. A copy of a cache, pickled ones included, is empty."""

    def __init__(self):
        self._kept: dict[Hashable, _Kept] = {}

    def __reduce__(self):
        return WeightCache, ()

    def get(
        self, key: Hashable, tensors: Sequence[torch.Tensor], make: Callable[[], Any], *, trained: bool = True
    ) -> Any:
        """The value under `key`, made anew by `make()` if any of the `tensors` has changed since it was made. Of those
        that are not `trained` on an accelerator PyTorch's count is believed."""
        value = self._current(key, tensors, make, trained)
        if (read := getattr(_thread, "read", None)) is not None:
            read.append(value)
            if key in self._kept:
                self._kept[key].recorded = True
        return value

    def _current(self, key: Hashable, tensors: Sequence[torch.Tensor], make: Callable[[], Any], trained: bool) -> Any:
        marked, kept, since = marks(tensors), self._kept.get(key), last_compared()
        same = kept is not None and kept.marks == marked
        if same:
            if (since is not None and kept.compared >= since) or (kept.copies is None and not trained):
                return kept.value
            moment = now()
            if kept.copies is not None and all(map(_equal_bits, tensors, kept.copies)):
                kept.compared = moment
                return kept.value
        moment, devices = now(), {tensor.device.type for tensor in tensors}
        # Not in inference mode: of tensors made there none could be written to later.
        with torch.inference_mode(False), torch.no_grad():
            value = make()
            if same and kept.recorded:
                value = _written_over(kept.value, value)
        if "meta" not in devices:  # those are offloaded, and come when a module is called
            copies = [copy_in_pieces(tensor) for tensor in tensors] if devices == {"cpu"} else None
            self._kept[key] = _Kept(value, marked, copies, moment, same and kept.recorded)
        return value


def _written_over(old: Sequence[torch.Tensor], new: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """`old`, with what `new` holds; what of it is part of the weights themselves is not written to."""
    pairs = [(mine, other) for mine, other in zip(old, new) if mine.data_ptr() != other.data_ptr()]
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs)))
    return old


def marks(tensors: Sequence[torch.Tensor]) -> list:
    """What a change that PyTorch counts would change. Tensors made in inference mode keep no version."""
    try:
        return [(tensor.data_ptr(), tensor._version) for tensor in tensors]
    except RuntimeError:
        return [tensor.data_ptr() for tensor in tensors]


def copy_in_pieces(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor on the CPU, flat, made without threads: a process that was forked has none, and would wait
    for them for ever. Nor is it shown to NumPy, which would forbid its owner (FSDP) to free the memory."""
    flat = tensor.detach().reshape(-1)
    copied = torch.empty_like(flat)
    for part, given in zip(copied.split(PIECE), flat.split(PIECE)):
        part.copy_(given)
    return copied


def _equal_bits(tensor: torch.Tensor, kept: torch.Tensor) -> bool:
    """Whether it still holds what was kept; as wide integers where possible, which are compared twice as fast."""
    flat = tensor.detach().reshape(-1)
    if flat.numel() * flat.element_size() % 8 == 0 == flat.storage_offset() * flat.element_size() % 8:
        flat, kept = flat.view(torch.int64), kept.view(torch.int64)
    return all(map(torch.equal, flat.split(PIECE), kept.split(PIECE)))
