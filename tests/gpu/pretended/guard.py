"""The small C++ part, which answers what PyTorch's own C++ asks of a CUDA device; built once, and then found again."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch


SOURCE = Path(__file__).with_name("guard.cpp")


class NoCompiler(RuntimeError):
    """The guard cannot be built here."""


@functools.cache
def load_guard() -> ctypes.CDLL:
    """The guard, off; a NoCompiler with the reason where it cannot be built."""
    base = Path(torch.__file__).parent
    key = hashlib.sha256(SOURCE.read_bytes() + f"{torch.__version__} {base}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"pretended-device-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise NoCompiler(f"{folder} belongs to somebody else")
    built = folder / f"guard-{key}.so"
    if not built.exists():
        _build(base, built)
    return ctypes.CDLL(str(built))


def _build(base: Path, built: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise NoCompiler("no g++ to build the pretended device with")
    libraries = ["torch_python", "torch_cpu", "c10"]
    temporary = built.with_suffix(f".{os.getpid()}")
    command = [compiler, "-std=c++20", "-O0", "-w", "-fPIC", "-shared", str(SOURCE), "-o", str(temporary)]
    command += [f"-I{base}/include", f"-L{base}/lib", f"-Wl,-rpath,{base}/lib", *(f"-l{name}" for name in libraries)]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoCompiler(f"{compiler} cannot build {SOURCE.name}: {done.stderr.strip()[:500]}")
    temporary.replace(built)
