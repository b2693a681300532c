"""What is installed here, in which versions, and what is missing. Imports neither torch nor the package's models, so
that it can be told why those do not import."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess


# Distribution -> module, and what is not there without it.
REQUIRED = {
    "torch": ("torch", "everything"),
    "transformers": ("transformers", "models"),
    "huggingface-hub": ("huggingface_hub", "models"),
    "safetensors": ("safetensors", "models"),
    "numpy": ("numpy", "everything"),
    "soundfile": ("soundfile", "reading and writing audio files"),
    "soxr": ("soxr", "resampling"),
    "typer": ("typer", "the command line"),
    "tqdm": ("tqdm", "progress bars"),
    "constriction": ("constriction", "files coded with a language model"),
    "pyyaml": ("yaml", "model cards, conversion of audiocraft's checkpoints"),
    "jinja2": ("jinja2", "model cards"),
    "filelock": ("filelock", "runs that processes share"),
}
# The same, with the extra that brings it.
OPTIONAL = {
    "matplotlib": ("matplotlib", "plots", "plots, `demo`"),
    "gradio": ("gradio", "demo", "the web page"),
    "accelerate": ("accelerate", "datasets", "training, `tokenize` and `evaluate` in several processes"),
    "datasets": ("datasets", "datasets", "tokenizing of data sets"),
    "ray": ("ray", "ray", "tokenizing on Ray"),
    "scipy": ("scipy", "eval", "perceptual metrics"),
    "visqol-python": ("visqol", "eval", "the metric visqol"),
    "pystoi": ("pystoi", "eval", "the metric stoi"),
    "tensorboard": ("tensorboard", "train", "training logs for TensorBoard"),
    "onnx": ("onnx", "export", "`export onnx`"),
    "onnxscript": ("onnxscript", "export", "`export onnx`"),
}


def versions() -> dict[str, str]:
    """Versions of Python, the system, ffmpeg and of all packages above that are installed, by name."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    found["modeling-encodec"] = _version("modeling-encodec") or "not installed, run from its sources"
    for name, (module, *_) in (REQUIRED | OPTIONAL).items():
        if importlib.util.find_spec(module) is not None:
            found[name] = _version(name) or "of unknown version"
    if (ffmpeg := shutil.which("ffmpeg")) is not None:
        found["ffmpeg"] = _ffmpeg_version(ffmpeg)
    return found


def missing() -> tuple[dict[str, str], dict[str, str]]:
    """What is not installed, required packages and optional ones, with what does not work for it."""
    required = {
        name: without for name, (module, without) in REQUIRED.items() if importlib.util.find_spec(module) is None
    }
    optional = {
        name: f'{without} (pip install "modeling-encodec[{extra}]")'
        for name, (module, extra, without) in OPTIONAL.items()
        if importlib.util.find_spec(module) is None
    }
    if shutil.which("ffmpeg") is None:
        optional["ffmpeg"] = "audio that libsndfile does not read, such as m4a and webm (a program)"
    return required, optional


def unfit_versions() -> dict[str, str]:
    """Installed packages of other versions than modeling-encodec asks for, and what it asks for."""
    try:
        from packaging.requirements import Requirement

        asked = [Requirement(line) for line in importlib.metadata.requires("modeling-encodec") or []]
    except (ImportError, importlib.metadata.PackageNotFoundError):  # run from its sources
        return {}
    unfit = {}
    for requirement in asked:
        version = _version(requirement.name)
        if version is not None and not requirement.specifier.contains(version, prereleases=True):
            unfit[requirement.name] = f"{version}, asked for is {requirement.specifier}"
    return unfit


def devices() -> dict[str, str]:
    """Every device that PyTorch can compute on here, with its name and memory."""
    from modeling_encodec.system.devices import devices_here

    return {name: _about(name) for name in devices_here()}


def _about(device: str) -> str:
    import torch

    kind, _, index = device.partition(":")
    if kind == "cpu":
        threads, cores = torch.get_num_threads(), os.cpu_count()
        return f"{cpu_name()}, {cores} cores, {threads} thread{'s' if threads > 1 else ''}"
    if kind == "mps":
        return f"Apple GPU, {torch.mps.recommended_max_memory() / 1e9:.1f} GB"
    card = getattr(torch, kind).get_device_properties(int(index))
    return f"{card.name}, {card.total_memory / 1e9:.1f} GB"


def drivers() -> dict[str, str]:
    """Versions of CUDA (or ROCm) and cuDNN that this PyTorch computes with."""
    import torch

    found = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    if torch.cuda.is_available() and torch.backends.cudnn.is_available():
        found["cuDNN"] = str(torch.backends.cudnn.version())
    return {name: version for name, version in found.items() if version}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ffmpeg_version(program: str) -> str:
    try:
        run = subprocess.run([program, "-version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "does not run"
    return re.sub(r"^ffmpeg version (\S+).*", r"\1", run.stdout.partition("\n")[0])


def cpu_name() -> str:
    """Of this machine."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
