"""`parts`: a folder in parts of bounded size is put together again to the bit, or it is said what is wrong."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_encodec.cli import main
from modeling_encodec.system.parts import join_parts, split_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make(folder: Path, sizes: list[int]) -> Path:
    rng = np.random.default_rng(0)
    for number, size in enumerate(sizes):
        path = folder / ("model" if number % 2 else ".") / f"{number} ü.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.bytes(size))
    return folder


@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6), part=st.integers(1, 700))
@settings(max_examples=40, deadline=None)
def test_joined_is_what_was_split(sizes, part, tmp_path_factory):
    place = tmp_path_factory.mktemp("parts")
    folder = make(place / "run", sizes)
    written = split_folder(folder, place / "parts", part_bytes=part)
    assert all(path.stat().st_size <= part for path in written[:-1]) and len(written) == 1 + -(-sum(sizes) // part)
    join_parts(place / "parts", place / "back")
    assert contents(place / "back") == contents(folder)


def test_by_the_command_line(tmp_path, capsys):
    folder = make(tmp_path / "run", [400_000, 700_000, 5])
    (folder / ".lock").touch()
    (folder / "checkpoint.pt").write_bytes(b"large")
    options = ["--size", "0.25", "--leave-out", "checkpoint.pt"]
    assert main(["parts", "split", str(folder), str(tmp_path / "parts"), *options]) == 0
    assert "5 parts, 1.1 MB, and parts.json" in capsys.readouterr().err
    assert main(["parts", "join", str(tmp_path / "parts"), str(tmp_path / "back")]) == 0
    there = contents(folder)
    assert contents(tmp_path / "back") == {name: there[name] for name in there if name[0] not in ".c"}
    for command in (["split", folder, tmp_path / "parts"], ["join", tmp_path / "parts", tmp_path / "back"]):
        assert main(["parts", *map(str, command)]) == 2
        assert "exists, allowed: a new folder" in capsys.readouterr().err


def damage_a_part(parts: Path) -> None:
    data = bytearray((parts / "part_0001").read_bytes())
    data[7] ^= 1
    (parts / "part_0001").write_bytes(data)


def lead_out(parts: Path) -> None:
    edit(parts, lambda about: about["files"][0].update(name="../outside"))


def edit(parts: Path, change) -> None:
    about = json.loads((parts / "parts.json").read_text())
    change(about)
    (parts / "parts.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda parts: (parts / "part_0002").unlink(), "part_0002: missing, one of 4 parts"),
        (damage_a_part, "part_0001: damaged, for it is not what parts.json says of it"),
        (lambda parts: (parts / "part_0000").write_bytes(b""), "part_0000: damaged"),
        (lambda parts: (parts / "parts.json").unlink(), "parts.json: missing, the list of the parts"),
        (lambda parts: (parts / "parts.json").write_text("{"), "parts.json: damaged, or no list of parts"),
        (lambda parts: (parts / "parts.json").write_text("[]"), "parts.json: damaged, or no list of parts"),
        (lead_out, "parts.json: damaged, or no list of parts"),
        (lambda parts: edit(parts, lambda about: about["parts"].pop()), "parts.json: damaged, for 0 ü.bin"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(tmp_path, capsys, spoil, message):
    split_folder(make(tmp_path / "run", [3500]), tmp_path / "parts", part_bytes=1000)
    spoil(tmp_path / "parts")
    assert main(["parts", "join", str(tmp_path / "parts"), str(tmp_path / "back")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run", "parts"}


def test_sums_are_those_of_other_programs(tmp_path):
    split_folder(make(tmp_path / "run", [1500]), tmp_path / "parts", part_bytes=1000)
    for item in json.loads((tmp_path / "parts" / "parts.json").read_text())["parts"]:
        assert hashlib.sha256((tmp_path / "parts" / item["name"]).read_bytes()).hexdigest() == item["sha256"]


def test_no_folder_and_an_empty_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="run: no such folder"):
        split_folder(tmp_path / "run", tmp_path / "parts")
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="run: no files to split"):
        split_folder(tmp_path / "run", tmp_path / "parts")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ValueError, match="part_bytes is 0, allowed: at least 1"):
        split_folder(make(tmp_path / "run", [3]), tmp_path / "parts", part_bytes=0)
    assert not (tmp_path / "parts").exists()
