"""What `rehearse.sh` needs: an environment as poor as a machine that has PyTorch, and wheels of what it lacks.

python bare_machine.py environment FOLDER     # a virtual environment with some of the packages installed here
python bare_machine.py wheels FOLDER          # those that it lacks, packed again as wheels
"""

import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


# What such a machine has, with what these packages need.
THERE = (
    "torch",
    "transformers",
    "accelerate",
    "typer",
    "tqdm",
    "psutil",
    "tensorboard",
    "pyyaml",
    "jinja2",
    "filelock",
)
LACKING = ("soundfile", "soxr", "constriction", "cffi", "pycparser")


def needed(names: tuple[str, ...]) -> list:
    """The distributions of these names and of all that they need, as far as they are installed."""
    found, waiting = {}, list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found or name in LACKING:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # for other systems
            continue
        requirements = [line for line in found[name].requires or () if "extra ==" not in line]
        waiting += [re.match(r"[\w.-]+", line).group() for line in requirements]
    return list(found.values())


def make_environment(folder: Path) -> None:
    """A virtual environment that sees the distributions of THERE, through links, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for found in needed(THERE):
        for name in {file.parts[0] for file in found.files if file.parts[0] not in ("..", "__pycache__")}:
            target = Path(found.locate_file(name))
            if target.exists() and not (site / name).exists():
                (site / name).symlink_to(target)
    hidden = [name for name in LACKING if not _fails(folder, f"import {name}")]
    if hidden or _fails(folder, "import torch, transformers, accelerate"):
        raise SystemExit(f"the environment is not as wanted: {', '.join(hidden) or 'torch'} is (not) there")


def _fails(folder: Path, code: str) -> bool:
    return subprocess.run([folder / "bin" / "python3", "-I", "-c", code], capture_output=True).returncode != 0


def make_wheels(folder: Path) -> None:
    """Wheels of LACKING from what is installed here; real ones come from `pip download`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in LACKING:
        found = distribution(name)
        (about,) = {file.parent for file in found.files if file.name == "WHEEL"}
        tags = [line[5:].split("-") for line in found.read_text("WHEEL").splitlines() if line.startswith("Tag: ")]
        tag = "-".join(".".join(dict.fromkeys(part)) for part in zip(*tags))
        stem = about.name.removesuffix(".dist-info")
        with zipfile.ZipFile(folder / f"{stem}-{tag}.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
            for file in found.files:
                if file.parts[0] != ".." and "__pycache__" not in file.parts:
                    wheel.write(found.locate_file(file), str(file))


if __name__ == "__main__":
    what, place = sys.argv[1:]
    {"environment": make_environment, "wheels": make_wheels}[what](Path(place))
