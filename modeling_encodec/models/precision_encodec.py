# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""What decides how products are computed: a device's abilities, and settings of the process and of its threads.

Such settings change codes, so computations hold them for as long as they last. What belongs to the whole process is
counted: several threads may compute at once, and none may put back what another still needs.
"""

import functools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext

import torch


# Where autocast may be on.
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")
# Threads that compute with a count of their own at once; more wait for them.
MAX_WORKERS = 8


@functools.cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones there."""
    if device.type == "cpu":
        found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class SharedSetting:
    """A setting of the whole process that computations need for a while: the first of those that need it at once sets
    it, the last puts it back.

    A fork waits for the computations of other threads. In the child those threads are gone, and what they had locked
    would never come free: a kernel that oneDNN was compiling, for one.

    Args:
        change: sets it, and returns what puts it back.
    """

    # Seconds that a fork waits at most.
    MAX_WAIT = 30.0

    def __init__(self, change: Callable[[], Callable[[], None]]):
        self._change, self._put_back = change, None
        self._holders: Counter[int] = Counter()  # how often by each thread
        self._condition, self._forking = threading.Condition(), None
        if hasattr(os, "register_at_fork"):
            hooks = {"after_in_parent": self._after_fork, "after_in_child": self._in_child}
            os.register_at_fork(before=self._before_fork, **hooks)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The setting holds meanwhile, in every thread."""
        thread = threading.get_ident()
        with self._condition:
            while self._forking is not None and not self._holders[thread]:
                self._condition.wait()
            if not self._holders.total():
                self._put_back = self._change()
            self._holders[thread] += 1
        try:
            yield
        finally:
            with self._condition:
                self._holders[thread] -= 1
                if not self._holders.total():
                    self._holders.clear()
                    self._put_back()
                self._condition.notify_all()

    def _before_fork(self) -> None:
        """Let no thread begin, wait for those that compute, and keep the lock over the fork."""
        thread, end = threading.get_ident(), time.monotonic() + self.MAX_WAIT
        self._condition.acquire()
        while self._forking is not None:  # in another thread
            self._condition.wait()
        self._forking = thread
        while self._holders.total() > self._holders[thread] and (left := end - time.monotonic()) > 0:
            self._condition.wait(left)

    def _after_fork(self) -> None:
        self._forking = None
        self._condition.notify_all()
        self._condition.release()

    def _in_child(self) -> None:
        """Only what this thread holds is still held."""
        own, others = self._holders[threading.get_ident()], self._holders.total()
        self._condition, self._forking = threading.Condition(), None
        self._holders = Counter({threading.get_ident(): own})
        if others and not own:
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


def _compute_with_one_thread() -> None:
    """In a forked child: the threads that computed for its parent are gone, and OpenMP would wait for them forever."""
    global _count_lock
    _count_lock = threading.Lock()
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


# One for the process, where this file may be imported twice: with the package, and as a checkpoint's remote code.
if "_modeling_encodec_float32" not in vars(torch):
    torch._modeling_encodec_float32 = SharedSetting(_require_float32)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_compute_with_one_thread)
_float32: SharedSetting = torch._modeling_encodec_float32
_count_lock = threading.Lock()


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


def call_with_threads(count: int, function: Callable, *args):
    """What `function(*args)` returns where it computes with so many CPU threads. PyTorch's count of this thread stays
    as it is, and so does that of all others."""
    if torch.get_num_threads() == count:
        return function(*args)
    return _threads_that_compute_with(count, os.getpid()).submit(function, *args).result()


@functools.lru_cache(maxsize=8)
def _threads_that_compute_with(count: int, process: int) -> ThreadPoolExecutor:
    """Threads of this process with that count; in a forked child those of its parent are gone."""
    return ThreadPoolExecutor(MAX_WORKERS, "encodec", _set_thread_count, (count,))


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """This thread computes with so many CPU threads meanwhile, and no other that has computed before is changed."""
    before = torch.get_num_threads()
    _set_thread_count(count)
    try:
        yield
    finally:
        _set_thread_count(before)


def _set_thread_count(count: int) -> None:
    """`torch.set_num_threads` for this thread alone. PyTorch's count is each thread's own, but a thread begins with
    the last one that any thread set: therefore a new thread sets it to what it was. Others that begin just meanwhile
    get a wrong count, so this is done once for each worker or run, and not for each computation."""
    before = torch.get_num_threads()
    if before == count:
        return
    with _count_lock:
        torch.set_num_threads(count)
        restore = threading.Thread(target=torch.set_num_threads, args=(before,))
        restore.start()
        restore.join()
