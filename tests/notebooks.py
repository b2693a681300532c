"""The notebooks of model_cards/notebooks: run from top to bottom, written back without what tells when and where.

    python tests/notebooks.py                # all of them, with their own parameters
    python tests/notebooks.py 1_codec        # one

A notebook runs in an empty temporary folder, without a network. It is written back only if it ran without an error,
wrote nothing to stderr and names no place of this machine.
"""

import base64
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

from modeling_encodec.system.atomic import atomic_path


FOLDER = Path(__file__).parents[1] / "model_cards" / "notebooks"
LIMIT_SECONDS = 300  # a notebook's, on two cores that have nothing else to do
PARAMETERS = "parameters"  # tag of the cell whose values tests replace
# Two parts or more, where a path can begin; what follows `<` is a tag, what follows a letter a ratio or an address.
ABSOLUTE_PATH = re.compile(r"""(?:^|[\s"'(=:,])((?:/[\w.+-]+){2,}|[A-Z]:\\\w+)""", re.MULTILINE)
DATA = re.compile(r"data:[\w/]+;base64,[\w+/=]+|https?://\S+")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebook_paths() -> list[Path]:
    """The notebooks, in their order."""
    return sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path, *, parameters: dict | None = None, threads: int | None = None) -> NotebookNode:
    """A notebook with the outputs that it has now.

    Args:
        parameters: values in place of those of the cell that is tagged as parameters.
        threads: of the kernel; by default as many as it finds cores.

    Raises:
        CellExecutionError: if a cell fails.
        CellTimeoutError: if one hangs.
        RuntimeError: if it leaves files behind in the folder it runs in, or in the system's temporary folder.
    """
    notebook = nbformat.read(path, as_version=4)
    if parameters:
        _set_parameters(notebook, parameters)
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / name for name in ("run", "tmp", "ipython", "hub")}
        for folder in folders.values():
            folder.mkdir()
        client = NotebookClient(
            notebook,
            timeout=3 * LIMIT_SECONDS,  # a cell's: cores may be busy
            kernel_name="python3",
            resources={"metadata": {"path": str(folders["run"])}},
            record_timing=False,
            coalesce_streams=True,
        )
        # The kernel's own stderr, which is not the notebook's, warns of its local port.
        client.execute(env=_environment(folders, threads), stderr=subprocess.DEVNULL)
        files = [file for name in ("run", "tmp") for file in folders[name].rglob("*") if file.is_file()]
        left = sorted(str(file.relative_to(place)) for file in files)
    if left:
        raise RuntimeError(f"{path.name} leaves files behind: {', '.join(left[:5])}")
    return _cleaned(notebook)


def _environment(folders: dict[str, Path], threads: int | None) -> dict[str, str]:
    nowhere = "http://127.0.0.1:9"  # what would ask a server fails
    offline = {"HF_HUB_OFFLINE": "1", "HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere, "CUDA_VISIBLE_DEVICES": ""}
    places = {"TMPDIR": folders["tmp"], "IPYTHONDIR": folders["ipython"], "HF_HOME": folders["hub"]}
    # Progress bars would be widgets where ipywidgets is installed, which no page shows; else tqdm asks for it.
    libraries = ("HF_HUB", "HF_DATASETS")
    quiet = {f"{name}_DISABLE_PROGRESS_BARS": "1" for name in libraries}
    quiet |= {"PYTHONWARNINGS": "ignore:IProgress not found", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    cores = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return os.environ | offline | {name: str(path) for name, path in places.items()} | quiet | cores


def _set_parameters(notebook: NotebookNode, parameters: dict) -> None:
    """Replace values, `name = value  # what it is`, each of which has to be there."""
    (cell,) = [cell for cell in notebook.cells if PARAMETERS in cell.metadata.get("tags", [])]
    for name, value in parameters.items():
        cell.source, count = re.subn(rf"^{name} = [^#\n]*", f"{name} = {value!r}  ", cell.source, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"parameter {name!r} is set {count} times, allowed: once")


def _cleaned(notebook: NotebookNode) -> NotebookNode:
    """Without what tells only where and when it ran, and with smaller pictures."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": cell.metadata.tags} if "tags" in cell.metadata else {})
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _in_256_colours(output.data["image/png"])
    return notebook


def _in_256_colours(picture: str) -> str:
    """A PNG in base64 with a palette: a spectrogram is half as large, and nobody sees it."""
    file = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def outputs_of(notebook: NotebookNode) -> Iterator[NotebookNode]:
    """Every output of every code cell."""
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def texts_of(notebook: NotebookNode) -> Iterator[str]:
    """What outputs say, pictures and sound left out."""
    for output in outputs_of(notebook):
        yield DATA.sub("", "".join(output.get("text", "")))
        for kind, value in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield DATA.sub("", "".join(value))


def count_media(notebook: NotebookNode) -> dict[str, int]:
    """How many pictures and audio players there are."""
    data = [output.get("data", {}) for output in outputs_of(notebook)]
    players = sum("".join(kinds.get("text/html", "")).count('src="data:audio/') for kinds in data)
    return {"pictures": sum("image/png" in kinds for kinds in data), "players": players}


def find_problems(notebook: NotebookNode) -> list[str]:
    """What keeps an executed notebook from being shown to people."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    problems = []
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        problems.append("cells were not run once each, from top to bottom")
    for output in outputs_of(notebook):
        if output.output_type == "error":
            problems.append(f"an error: {output.ename}")
        elif output.get("name") == "stderr":
            problems.append(f"stderr: {output.text.splitlines()[0]}")
    for text in texts_of(notebook):
        problems += [f"a path of a machine: {found}" for found in ABSOLUTE_PATH.findall(text)]
        problems += ["a progress bar"] * bool(re.search(r"\d+%\|", text))
    return problems


def main(names: list[str]) -> int:
    """Run these notebooks, or all, and write them back; 1 if one of them cannot be."""
    paths = [FOLDER / f"{name}.ipynb" for name in names] or notebook_paths()
    failed = 0
    for path in paths:
        notebook = execute(path)
        problems = find_problems(notebook)
        if problems:
            failed = 1
            print(f"{path.name} is not written: {'; '.join(problems)}", file=sys.stderr)
            continue
        with atomic_path(path) as temporary:
            nbformat.write(notebook, temporary)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    return failed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
