"""Hostile corpora: every good clip gets tokens, every bad one a line in skipped.jsonl; nothing else is opened."""

import json
import os
import re
import socket
import subprocess

import pytest
from hostile_corpora import CASES, clip

from modeling_encodec.processors.corpus.sources import open_source
from modeling_encodec.processors.dataset_tokenization import load_tokens
from modeling_encodec.training.clips import UnusableClip


pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def model(tmp_path_factory, small_models):
    folder = tmp_path_factory.mktemp("model") / "small"
    small_models["24khz"].save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_connections(monkeypatch):
    """Whoever connects to anything fails the test, however the failure is handled."""
    tried = []

    def connect(self, address):
        tried.append(address)
        raise OSError("connected")

    monkeypatch.setattr(socket.socket, "connect", connect)
    yield
    assert not tried


def tokens_and_skips(run, hostile, model, out, *options):
    code, _, lines = run(
        "tokenize", hostile.source, out, "-m", model, "-b", 3.6, "--workers", 0, *hostile.options, *options
    )
    assert code == 0, lines
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert len({entry["name"] for entry in skipped}) == len(skipped)
    return list(load_tokens(out, cache_dir=out.parent / "cache")["name"]), {e["name"]: e["reason"] for e in skipped}


@pytest.mark.parametrize("name", CASES)
def test_good_clips_get_tokens_and_bad_ones_a_line(run, model, tmp_path, name):
    (tmp_path / "corpus").mkdir()
    hostile = CASES[name](tmp_path / "corpus")
    names, skipped = tokens_and_skips(run, hostile, model, tmp_path / "out")
    assert sorted(names) == sorted(hostile.good)
    assert len(skipped) == len(hostile.bad)
    for bad, reason in hostile.bad.items():
        if bad:  # else its name is of this machine
            assert re.search(reason, skipped[bad]), (bad, skipped[bad])
        else:
            assert any(re.search(reason, told) for told in skipped.values()), skipped
    assert all("\n" not in told and str(tmp_path) not in told for told in skipped.values())


def test_a_folder_deeper_than_the_stack(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    place = str(folder)
    for _ in range(1100):
        place += "/d"
        os.mkdir(place)
    try:
        (folder / "a.wav").write_bytes(clip())
        with open(f"{place}/z.wav", "wb") as file:
            file.write(clip(1))
        rows = [row for shard in open_source(folder).shards for row in shard.rows()]
        assert [row.name for row in rows] == ["a.wav", "d/" * 1100 + "z.wav"]
    finally:
        subprocess.run(["rm", "-rf", folder], check=True)  # Python's own way needs the stack


def test_folders_that_cannot_be_listed(tmp_path, monkeypatch):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.wav").write_bytes(clip())
    scandir = os.scandir

    def refuse_some(path):
        if os.path.basename(os.fspath(path).rstrip("/")) == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_some)
    rows = [row for shard in open_source(tmp_path).shards for row in shard.rows()]
    assert [row.name for row in rows] == ["a/x.wav", "b/", "c/x.wav"]
    with pytest.raises(UnusableClip, match="folder could not be listed: Permission denied"):
        rows[1].location()
