# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""What decides how products are computed: a device's abilities, and settings of the process and of its threads.

Such settings change codes, so computations hold them for as long as they last. What belongs to the whole process is
counted: several threads may compute at once, and none may put back what another still needs.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch


# Where autocast may be on.
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


@functools.cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones there."""
    if device.type == "cpu":
        found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _lock() -> threading.Lock:
    """A lock that a forked child never finds taken by a thread that it has not."""
    lock = threading.Lock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


class SharedSetting:
    """A setting of the whole process that computations need for a while: the first of those that need it at once sets
    it, the last puts it back.

    Args:
        change: sets it, and returns what puts it back.
    """

    def __init__(self, change: Callable[[], Callable[[], None]]):
        self._change, self._put_back = change, None
        self._holders, self._lock = 0, _lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """The setting holds meanwhile, in every thread."""
        with self._lock:
            if not self._holders:
                self._put_back = self._change()
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._put_back()


def _require_float32() -> Callable[[], None]:
    """Set full float32 products. The general setting first, then what still has another one of its own: so what
    inherits its precision goes on inheriting it."""
    generic, cuda, cudnn, mkldnn = torch.backends, torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn

    def write(place, precision: str) -> None:
        if place is mkldnn:  # whose own property writes to the general setting (PyTorch 2.13)
            mkldnn.set_flags(_fp32_precision=precision)
        else:
            place.fp32_precision = precision

    before = []
    for place in (generic, cudnn, mkldnn, cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn):
        if (precision := place.fp32_precision) != "ieee":
            before.append((place, precision))
            write(place, "ieee")

    def put_back() -> None:
        for place, precision in reversed(before):
            write(place, precision)

    return put_back


# One for the process, where this file may be imported twice: with the package, and as a checkpoint's remote code.
_float32: SharedSetting = vars(torch).setdefault("_modeling_encodec_float32", SharedSetting(_require_float32))
_count_lock: threading.Lock = vars(torch).setdefault("_modeling_encodec_count_lock", _lock())


@contextmanager
def exact_float32() -> Iterator[None]:
    """Full float32 products, whatever the process and its autocast allow: TF32 and bfloat16 passes change codes."""
    with ExitStack() as stack:
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_float32.held())
        yield


def exact_unless_training(module: torch.nn.Module):
    """`exact_float32`, but not where `module` trains: mixed precision is then its trainer's choice. Compilers see
    neither."""
    trains = module.training and torch.is_grad_enabled()
    return nullcontext() if trains or torch.compiler.is_compiling() else exact_float32()


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """This thread computes with so many CPU threads meanwhile, and no other thread is changed."""
    before = torch.get_num_threads()
    _set_thread_count(count)
    try:
        yield
    finally:
        _set_thread_count(before)


def _set_thread_count(count: int) -> None:
    """`torch.set_num_threads` for this thread alone. PyTorch's count is each thread's own, but a new thread begins
    with the last one that any thread set: therefore a new thread sets it to what it was."""
    if torch.get_num_threads() == count:
        return
    with _count_lock:
        for_new_threads = _in_new_thread(torch.get_num_threads)
        torch.set_num_threads(count)
        _in_new_thread(torch.set_num_threads, for_new_threads)


def _in_new_thread(function: Callable, *args):
    """What `function` returns in a thread of its own."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args)))
    thread.start()
    thread.join()
    return results[0]
