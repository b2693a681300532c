"""The notebooks: each runs from top to bottom without a network, and what is kept of it is fit to be shown."""

import re
import subprocess
import sys
import time

import pytest


nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
import notebooks  # noqa: E402
from nbclient.exceptions import CellExecutionError  # noqa: E402


PATHS = notebooks.notebook_paths()
# In place of a notebook's own values: the same cells in a fraction of the time.
SMALL = {
    "1_codec": {"seconds": 2.0, "bandwidths": [1.5]},
    "2_corpus": {"piece_seconds": 0.75},
    "3_files_and_streams": {"seconds": 3.0},
    "4_fine_tune": {"updates": 2, "stop_after_minutes": 0.001},
    "5_audio_lm": {"steps": 10},
}
MOST_BYTES = 3_000_000  # of all of them
LINK = re.compile(r"\]\(([^)\s]+)\)")

each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def make_notebook(path, *sources: str) -> bytes:
    """Write a notebook of these code cells; its bytes."""
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{place}") for place, source in enumerate(sources)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path.read_bytes()


def media_of(notebook) -> list[dict[str, int]]:
    """What can be seen and heard in each cell."""
    return [notebooks.count_media(nbformat.from_dict({"cells": [cell]})) for cell in notebook.cells]


def test_all_five_are_there():
    assert [path.stem for path in PATHS] == list(SMALL)


@each
def test_runs_from_top_to_bottom(path):
    made = notebooks.execute(path, parameters=SMALL[path.stem], threads=1)
    kept = nbformat.read(path, as_version=4)
    assert notebooks.find_problems(made) == []
    assert media_of(made) == media_of(kept)
    assert [len(cell.get("outputs", [])) for cell in made.cells] == [len(c.get("outputs", [])) for c in kept.cells]


@pytest.mark.slow
@pytest.mark.timeout(900)
@each
def test_runs_with_its_own_parameters_in_time(path):
    start = time.monotonic()
    made = notebooks.execute(path)
    assert time.monotonic() - start < notebooks.LIMIT_SECONDS
    assert notebooks.find_problems(made) == []


@each
def test_what_is_kept_is_fit_to_be_shown(path):
    kept = nbformat.read(path, as_version=4)
    nbformat.validate(kept)
    assert notebooks.find_problems(kept) == []
    assert dict(kept.metadata) == notebooks.METADATA
    media = notebooks.count_media(kept)
    assert media["pictures"] >= 2 and media["players"] >= 2
    first = kept.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith(f"# {path.stem[0]}. ")
    assert len([cell for cell in kept.cells if notebooks.PARAMETERS in cell.metadata.get("tags", [])]) == 1
    for cell in kept.cells:
        assert set(cell.metadata) <= {"tags"} and all(not output.get("metadata") for output in cell.get("outputs", []))


def test_together_they_are_small():
    assert sum(path.stat().st_size for path in PATHS) < MOST_BYTES


@each
def test_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    links = [link for link in LINK.findall(text) if not link.startswith("https://")]
    assert len(links) >= 4  # the other pages
    for link in links:
        assert (path.parent / link).is_file(), link


def test_code_is_formatted_and_clean():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *PATHS], cwd=notebooks.FOLDER, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


# ---- what runs and checks them ------------------------------------------------------------------------------------


def test_what_is_written_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    make_notebook(tmp_path / "good.ipynb", "print('one')\nprint('two')", "import os\nos.listdir('.')")
    assert notebooks.main(["good"]) == 0
    kept = nbformat.read(tmp_path / "good.ipynb", as_version=4)
    assert [cell.execution_count for cell in kept.cells] == [1, 2]
    assert [list(notebooks.texts_of(nbformat.from_dict({"cells": [cell]}))) for cell in kept.cells] == [
        ["one\ntwo\n"],
        ["", "[]"],  # it runs in an empty folder
    ]
    assert all(not cell.metadata for cell in kept.cells)

    before = make_notebook(tmp_path / "loud.ipynb", "import sys\nprint('oh', file=sys.stderr)")
    assert notebooks.main(["loud"]) == 1
    assert (tmp_path / "loud.ipynb").read_bytes() == before
    assert capsys.readouterr().err == "loud.ipynb is not written: stderr: oh\n"


def test_failures_are_told(tmp_path):
    make_notebook(tmp_path / "a.ipynb", "1 / 0")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebooks.execute(tmp_path / "a.ipynb")
    make_notebook(
        tmp_path / "b.ipynb", "open('left.txt', 'w').close()", "import tempfile\ntempfile.mkstemp('.x')[0] > 0"
    )
    with pytest.raises(RuntimeError, match=r"b.ipynb leaves files behind: run/left.txt, tmp/\w+.x"):
        notebooks.execute(tmp_path / "b.ipynb")


def test_parameters_are_replaced():
    cell = nbformat.v4.new_code_cell("size = 3  # of it\nname = None\nsize_of = 4", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebooks._set_parameters(notebook, {"size": [1, 2]})
    values = {}
    exec(cell.source, values)
    assert (values["size"], values["name"], values["size_of"]) == ([1, 2], None, 4)
    with pytest.raises(ValueError, match="parameter 'width' is set 0 times"):
        notebooks._set_parameters(notebook, {"width": 1})


def test_problems_are_found():
    def problems(*outputs, count=1):
        cell = nbformat.v4.new_code_cell("x", execution_count=count, outputs=list(outputs))
        return notebooks.find_problems(nbformat.v4.new_notebook(cells=[cell]))

    def shown(text, kind="text/html"):
        return nbformat.v4.new_output("display_data", {kind: text})

    picture = '<source src="data:audio/ogg;base64,T2dn/home/me/x/y==" type="audio/ogg">'
    assert problems(shown(picture), shown("<b>a</b> 1/2/3 and/or https://a.b/c/d src='../x/y'")) == []
    assert problems(count=2) == problems(count=None) == ["cells were not run once each, from top to bottom"]
    assert problems(nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[])) == [
        "an error: ValueError"
    ]
    assert problems(nbformat.v4.new_output("stream", name="stderr", text="UserWarning: a\nb")) == [
        "stderr: UserWarning: a"
    ]
    for text in ("it is in /home/me/x", "PosixPath('/tmp/a')", "x=/srv/data/a.wav", r"'C:\Users'"):
        assert len(problems(nbformat.v4.new_output("stream", name="stdout", text=text))) == 1, text
        assert len(problems(shown(text, "text/plain"))) == 1, text
    assert problems(nbformat.v4.new_output("stream", name="stdout", text=" 40%|####")) == ["a progress bar"]
    assert notebooks.count_media(nbformat.v4.new_notebook(cells=[])) == {"pictures": 0, "players": 0}
    cell = nbformat.v4.new_code_cell("x", outputs=[shown(picture * 2), shown("iVBO", "image/png")])
    assert notebooks.count_media(nbformat.v4.new_notebook(cells=[cell])) == {"pictures": 1, "players": 2}
