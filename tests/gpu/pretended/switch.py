"""The pretended device put on for a block of code, and all of it taken off again."""

import contextlib
import threading
import warnings
from types import SimpleNamespace

import torch
from torch.optim import optimizer as optimizers
from torch.utils import _foreach_utils

from .device import FORKED, DeviceTensor, PretendedDevice
from .graphs import Graphs
from .guard import load_guard
from .recurrent import CudnnLSTM


@contextlib.contextmanager
def pretended_device(**options):
    """A `PretendedDevice(**options)`, there for this block and the threads that begin in it."""
    device = PretendedDevice(**options)
    guard = load_guard()
    with contextlib.ExitStack() as stack:
        guard.put_on()
        stack.callback(guard.take_off)
        for place, name, value in _replaced(device):
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        for known in _foreach_types():
            known.append(DeviceTensor)
            stack.callback(known.remove, DeviceTensor)
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        future = torch.__future__
        stack.callback(
            future.set_overwrite_module_params_on_conversion, future.get_overwrite_module_params_on_conversion()
        )
        future.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # backward in the thread that asks
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*CUDA is not available.*")
        stack.enter_context(device.mode())
        yield device


def _foreach_types() -> list[list]:
    """The kinds of tensors that optimisers take many of at once."""
    lists = [getattr(place, "_foreach_supported_types", None) for place in (_foreach_utils, optimizers)]
    return list({id(kinds): kinds for kinds in lists if kinds is not None}.values())


def _replaced(device: PretendedDevice) -> list[tuple]:
    """What is other in PyTorch meanwhile: place, name, value."""
    cuda, cudnn, graphs, facade = torch.cuda, CudnnLSTM(device), Graphs(device), _Cuda(device)
    same_name = [
        "is_available", "device_count", "current_device", "set_device", "is_initialized", "_lazy_init", "init",
        "_is_in_bad_fork", "is_bf16_supported", "mem_get_info", "memory_allocated", "max_memory_allocated",
        "memory_reserved", "max_memory_reserved", "reset_peak_memory_stats", "empty_cache", "get_device_properties",
        "get_device_name", "get_device_capability", "synchronize", "current_stream", "default_stream", "stream",
        "device", "get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all", "graph_pool_handle",
        "is_current_stream_capturing",
    ]  # fmt: skip
    replaced = [(cuda, name, getattr(facade, name)) for name in same_name]
    return replaced + [
        (cuda, "Stream", facade.Stream),
        (cuda, "Event", facade.Event),
        (cuda, "CUDAGraph", graphs.CUDAGraph),
        (cuda, "graph", graphs.capturing),
        (cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch, "lstm", cudnn.lstm),
        (torch._VF, "lstm", cudnn.lstm),
        (torch, "_cudnn_rnn_flatten_weight", cudnn.flatten_weights),
        (torch.nn.RNNBase, "flatten_parameters", lambda module: cudnn.flatten(module)),
        (threading.Thread, "_bootstrap_inner", facade.thread_start),
    ]


class _Cuda:
    """`torch.cuda` of the pretended device."""

    def __init__(self, device: PretendedDevice):
        owner = self.owner = device
        self.guard, start = load_guard(), threading.Thread._bootstrap_inner

        def thread_start(thread):
            with owner.mode():
                start(thread)

        self.thread_start = thread_start

        class Stream:
            """All work is done at once, so streams are names alone."""

            def __init__(self, device=None, priority=0, **kwargs):
                self.device = torch.device("cuda", _index(device, owner))

            def wait_stream(self, other):
                """Nothing to wait for."""

            def wait_event(self, event):
                """Nothing to wait for."""

            def record_event(self, event=None):
                """An event of now."""
                return event or Event()

            def synchronize(self):
                """The host waits."""
                owner.wait("stream.synchronize")

            def query(self):
                """Whether all is done: what was copied meanwhile is not, before somebody waits."""
                return not owner._late

        class Event:
            """A moment in a stream."""

            def __init__(self, enable_timing=False, blocking=False, interprocess=False):
                pass

            def record(self, stream=None):
                """Now."""

            def wait(self, stream=None):
                """Nothing to wait for."""

            def query(self):
                """As of a stream."""
                return not owner._late

            def synchronize(self):
                """The host waits."""
                owner.wait("event.synchronize")

            def elapsed_time(self, other):
                """No time is measured here (ms)."""
                return 1.0

        class device_block:
            """A device is the current one in the block."""

            def __init__(self, device):
                self.index = _index(device, owner)

            def __enter__(self):
                self.before = load_guard().set_device(self.index)

            def __exit__(self, *_):
                load_guard().set_device(self.before)

        self.Stream, self.Event, self.device = Stream, Event, device_block

    def is_available(self):
        return True

    def device_count(self):
        return self.owner.count

    def current_device(self):
        return self.owner.current

    def set_device(self, device):
        self.guard.set_device(_index(device, self.owner))

    def is_initialized(self):
        return True

    def _lazy_init(self):
        if self._is_in_bad_fork():
            raise RuntimeError(FORKED)

    init = _lazy_init

    def _is_in_bad_fork(self):
        import os

        return os.getpid() != self.owner.process

    def is_bf16_supported(self, including_emulation=True):
        return True

    def mem_get_info(self, device=None):
        return self.owner.memory - self.owner.counts.live, self.owner.memory

    def memory_allocated(self, device=None):
        return self.owner.counts.live

    def max_memory_allocated(self, device=None):
        return self.owner.counts.peak

    memory_reserved, max_memory_reserved = memory_allocated, max_memory_allocated

    def reset_peak_memory_stats(self, device=None):
        self.owner.counts.peak = self.owner.counts.live

    def empty_cache(self):
        pass

    def get_device_properties(self, device=None):
        about = {"name": "pretended", "major": 9, "minor": 0, "multi_processor_count": 132}
        return SimpleNamespace(total_memory=self.owner.memory, **about)

    def get_device_name(self, device=None):
        return "pretended"

    def get_device_capability(self, device=None):
        return 9, 0

    def synchronize(self, device=None):
        self.owner.wait("torch.cuda.synchronize")

    def current_stream(self, device=None):
        return self.Stream(device)

    default_stream = current_stream

    def stream(self, stream):
        return contextlib.nullcontext() if stream is None else self.device(stream.device)

    def get_rng_state(self, device="cuda"):
        return torch.get_rng_state()

    def set_rng_state(self, state, device="cuda"):
        torch.set_rng_state(state)

    def manual_seed(self, seed):
        pass

    manual_seed_all = manual_seed

    def graph_pool_handle(self):
        return (0, 0)

    def is_current_stream_capturing(self):
        return self.owner.capture is not None


def _index(device, owner: PretendedDevice) -> int:
    """The number of a device given in any way; the current one's for none."""
    if device is None:
        return owner.current
    index = device if isinstance(device, int) else torch.device(device).index
    return owner.current if index is None else index
