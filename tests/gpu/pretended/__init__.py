"""A CUDA device that is not there; see README.md."""

from .device import DeviceError, DeviceTensor, PretendedDevice
from .guard import NoCompiler, load_guard
from .switch import pretended_device


__all__ = ["DeviceError", "DeviceTensor", "NoCompiler", "PretendedDevice", "load_guard", "pretended_device"]
