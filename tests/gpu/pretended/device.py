"""The pretended device: every operation on its tensors, or that makes one, goes through `PretendedDevice.run`."""

import os
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import operations as ops
from .counting import Counts, asking_line
from .guard import load_guard
from .shapes import Shapes


# Operations that only ask of, or make, memory on the CPU that a GPU can read by itself.
PINNING = ("is_pinned", "_pin_memory", "pin_memory")


class DeviceError(RuntimeError):
    """What a GPU would refuse."""


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on a CUDA device; its `values` are a CPU tensor, or a shape alone."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor, index: int, device: "PretendedDevice"):
        place = {"dtype": values.dtype, "device": torch.device("cuda", index), "layout": values.layout}
        self = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), **place
        )
        self.values, self.owner = values, device
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        owner = next(t.owner for t in ops.tensors_in(args, kwargs or {}) if isinstance(t, DeviceTensor))
        return owner.run(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents=None):
        return f"DeviceTensor({self.values!r}, device={self.device})"

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        if not isinstance(other, DeviceTensor):
            raise DeviceError("a CPU tensor as the data of a device tensor: on the pretended device, not modelled")
        self.values = other.values

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force=False):
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy first.")

    def __array__(self, dtype=None, copy=None):
        return self.numpy()

    def data_ptr(self):
        shape_alone = self.values.device.type == "meta"
        return id(self.values.untyped_storage()) if shape_alone else self.values.data_ptr()

    def untyped_storage(self):
        return self.values.untyped_storage()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            new = DeviceTensor(self.values.detach().clone(), self.device.index, self.owner)
            self.owner.counts.hold(new.values)
            if isinstance(self, torch.nn.Parameter):
                new = torch.nn.Parameter(new, self.requires_grad)
            elif self.requires_grad:
                new.requires_grad_()
            memo[id(self)] = new
        return memo[id(self)]

    def __reduce_ex__(self, protocol):  # files are read back to the CPU, as everywhere in the project
        return self.detach().cpu().__reduce_ex__(protocol)


class _Mode(TorchDispatchMode):
    """Sees what makes tensors on the device out of none, in one thread."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and being sure of it takes time at every operation

    def __init__(self, device: "PretendedDevice"):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.device.run(func, args, kwargs or {})


class PretendedDevice:
    """CUDA devices, "cuda:0" and so on, `count` of them (1 or 2) of `memory` bytes each; see this folder's README.

    `counts` says what was done. With `shapes`, large tensors of numbers are shapes alone: what full-size work costs.
    """

    real = False

    def __init__(self, *, shapes: bool = False, detail: bool = False, count: int = 2, memory: int = 80 * 10**9):
        self.counts, self.count, self.memory, self.process = Counts(detail), count, memory, os.getpid()
        self.shapes = Shapes() if shapes else None
        self.capture = None  # the graph that is being recorded
        self.refusals: list[str] = []
        self._pinned, self._late = weakref.WeakSet(), []
        self._guard = load_guard()

    def mode(self) -> TorchDispatchMode:
        """To be entered by each thread."""
        return _Mode(self)

    @property
    def current(self) -> int:
        """The number of the current device."""
        return self._guard.current_device()

    def tensor(self, values: torch.Tensor, index: int) -> DeviceTensor:
        """`values` on device `index`."""
        self.counts.hold(values)
        return DeviceTensor(values, index, self)

    def refuse(self, text: str) -> None:
        """Fail as a GPU would."""
        text = f"{asking_line()}: {text}"
        self.refusals.append(text)
        raise DeviceError(text)

    def wait(self, kind: str) -> None:
        """The host waits for all that it asked for: what was copied meanwhile is there now."""
        if self.capture is not None:
            self.refuse(f"{kind} while a graph is being captured: operation not permitted when stream is capturing")
        self.counts.wait(kind)
        for arrive in self._late:
            arrive()
        self._late.clear()

    # ---- one operation -------------------------------------------------------------------------------------------

    def run(self, func, args: tuple, kwargs: dict):
        """What PyTorch does instead of `func`."""
        name = ops.name_of(func)
        ours = [t for t in ops.tensors_in(args, kwargs) if isinstance(t, DeviceTensor)]
        wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        to_device = wanted is not None and wanted.type == "cuda" and name not in PINNING
        if not ours and not to_device:
            return self._on_cpu(func, name, args, kwargs)
        if os.getpid() != self.process:
            raise RuntimeError(FORKED)
        if torch.is_inference_mode_enabled():  # then operations come whole that otherwise come in parts
            with self.mode():
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if (reason := ops.refusal(func, args, kwargs, lambda t: isinstance(t, DeviceTensor))) is not None:
            self.refuse(reason)
        if name == "_fused_sdp_choice":
            return 0  # attention in plain operations
        index = self._place(ours, wanted)
        if self.capture is not None:
            self.capture.check(ours, index)
        self._wait_before(func, name, args, kwargs)
        inner = ops.changed(lambda t: t.values if isinstance(t, DeviceTensor) else t, (args, kwargs))
        out, inner = self._compute(func, name, *inner)
        if name == "_local_scalar_dense":
            return out
        self.counts.add(ops.launches_of(func, *inner), ops.bytes_moved(func, *inner, out))
        if wanted is not None and wanted.type == "cpu":
            return self._to_cpu(out, kwargs)
        if name == "copy_" and not isinstance(args[0], DeviceTensor):
            self._arrive_late(args[0], _is_non_blocking(args[2:], kwargs))
            return args[0]
        return self._wrapped(func, args, kwargs, out, index)

    def _on_cpu(self, func, name: str, args: tuple, kwargs: dict):
        """An operation of the CPU; memory that is pinned is the CPU's, and remembered."""
        if name == "is_pinned":
            return args[0].untyped_storage() in self._pinned
        if name in ("_pin_memory", "pin_memory"):  # in inference mode the second comes as it is
            return self._pin(args[0].clone())
        if kwargs.get("pin_memory"):
            return self._pin(func(*args, **(kwargs | {"pin_memory": False})))
        return func(*args, **kwargs)

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._pinned.add(tensor.untyped_storage())
        return tensor

    def _place(self, ours: list, wanted: torch.device | None) -> int:
        if wanted is not None and wanted.type == "cuda":
            index = self.current if wanted.index is None else wanted.index
            if not 0 <= index < self.count:
                raise RuntimeError("CUDA error: invalid device ordinal")
            return index
        return ours[0].device.index

    def _wait_before(self, func, name: str, args: tuple, kwargs: dict) -> None:
        """The host waits where an operation's result, or its size, is asked for, or memory comes from the CPU."""
        if name in ops.WAITS:
            self.wait("item" if name == "_local_scalar_dense" else name)
        for mask in ops.mask_indices(func, args):
            if isinstance(mask, DeviceTensor):
                self.wait("a mask as an index")
        if name in ops.INDEXED and any(t.dim() and not isinstance(t, DeviceTensor) for t in ops.tensors_in(args[1])):
            self.wait("an index from the CPU")
        source = args[1] if name == "copy_" else args[0] if name == "_to_copy" else None
        target = args[0] if name == "copy_" else None
        if source is None or isinstance(source, DeviceTensor) or (target is not None and source.dim() == 0):
            return
        if not _is_non_blocking(args[2:] if name == "copy_" else (), kwargs):
            self.wait("copy to the device")
        elif source.untyped_storage() not in self._pinned:
            self.counts.note("a copy to the device does not wait, but its memory is not pinned: it waits all the same")
            self.wait("copy to the device from memory not pinned")

    def _compute(self, func, name: str, args: tuple, kwargs: dict):
        """The result of values, and the arguments it was made of."""
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        if self.shapes is not None:
            return self.shapes.compute(func, name, args, kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        if name == "_thnn_fused_lstm_cell":
            self.refuse("torch.lstm was computed past the pretended cuDNN")
        if self.capture is not None:
            self.capture.before(func, args, kwargs)
        out = func(*ops.in_tf32(func, args), **kwargs)
        if self.capture is not None:
            self.capture.record(func, args, kwargs, out)
        return out, (args, kwargs)

    def _to_cpu(self, out: torch.Tensor, kwargs: dict) -> torch.Tensor:
        if out.device.type == "meta":
            out = torch.zeros(out.shape, dtype=out.dtype)
        if kwargs.get("non_blocking"):
            self._pin(out)
        self._arrive_late(out, kwargs.get("non_blocking", False))
        return out

    def _arrive_late(self, out: torch.Tensor, non_blocking) -> None:
        """What was copied to the CPU is there after the host has waited, and not before."""
        if not non_blocking or out.untyped_storage() not in self._pinned:
            self.wait("copy to the CPU")
            return
        if self.capture is not None:
            self.refuse("a copy to the CPU while a graph is being captured: not modelled")
        values = out.detach().clone()
        out.detach().fill_(1 if out.dtype == torch.bool else -77)
        self._late.append(lambda: out.detach().copy_(values))

    def _wrapped(self, func, args: tuple, kwargs: dict, out, index: int):
        """What was computed, on the device; an argument itself, where it was written to."""
        if func._schema.is_mutable:
            written = ops.written_arguments(func, args, kwargs)
            returned = len(func._schema.returns)
            return None if not returned else written[0] if returned == 1 else tuple(written)
        with torch.inference_mode(torch.is_inference_mode_enabled() and not self._shares_version(func, args)):
            return ops.changed(lambda t: self.tensor(t, index), out)

    @staticmethod
    def _shares_version(func, args: tuple) -> bool:
        """Views of tensors that autograd watches are watched, in inference mode too."""
        return ops.is_view(func) and not args[0].is_inference()


def _is_non_blocking(rest: tuple, kwargs: dict) -> bool:
    return bool(rest[0] if rest else kwargs.get("non_blocking"))


FORKED = (
    "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the 'spawn' start "
    "method"
)
