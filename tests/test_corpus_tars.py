"""Tars of samples to be tokenised: WebDataset's convention, and damaged ones."""

import json
import tarfile

import pyarrow as pa
import pytest
from corpora_made import CLIPS, NAMES, bytes_of, reason, rows_of, write_tar

from modeling_encodec.processors.corpus.sources import open_source


def test_tars_of_samples(tmp_path):
    def more(name):
        return {"json": json.dumps({"name": name}).encode()} | ({"txt": "grün".encode()} if name == "b.wav" else {})

    write_tar(tmp_path / "one.tar", more=more)
    (tmp_path / "deep").mkdir()
    write_tar(tmp_path / "deep/two.tar", {"b.wav": CLIPS["d.wav"]}, more)
    source = open_source(tmp_path, keep=["txt", "json"])
    assert source.kept == {"txt": pa.string(), "json": pa.string()}
    rows = rows_of(source)
    assert [row.name for row in rows] == ["deep/two.tar/b"] + [f"one.tar/{name.split('.')[0]}" for name in NAMES]
    assert [bytes_of(row) for row in rows] == [CLIPS["d.wav"], *CLIPS.values()]
    assert [row.kept["txt"] for row in rows] == ["grün", None, None, "grün", None, None]
    assert json.loads(rows[3].kept["json"]) == {"name": "b.wav"}


def test_odd_samples_of_a_tar(tmp_path):
    clips = dict.fromkeys(("a.wav", "b.wav", "./c/d.wav", "a.mix.wav", ".hidden.wav", "only.json"), CLIPS["b.wav"])
    more = {"b.wav": {"flac": b"x"}, "./c/d.wav": {"txt": b"\xff"}}
    write_tar(tmp_path / "x.tar", clips, lambda name: more.get(name, {}))
    rows = {row.name: row for row in rows_of(open_source(tmp_path / "x.tar", column="wav", keep=["txt"]))}
    assert list(rows) == ["a", "b", "c/d", "a (2)", "only"]
    assert bytes_of(rows["a"]) == bytes_of(rows["b"]) == CLIPS["b.wav"]
    assert reason(rows["c/d"]) == "txt is no text, allowed: UTF-8"
    assert "has 0 members of audio" in reason(rows["a (2)"]) and "has 0 members of audio" in reason(rows["only"])
    with pytest.raises(
        ValueError, match=r"x\.tar: none of its columns is the audio .* flac, json, mix\.wav, txt, wav"
    ):
        open_source(tmp_path / "x.tar")


def test_a_tar_that_is_cut_off(tmp_path):
    whole = write_tar(tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        third = tar.getmembers()[4]
    for length in (third.offset, third.offset + 100, third.offset_data, third.offset_data + 50):
        path = tmp_path / "cut" / "x.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(whole[:length])
        found = []
        with pytest.raises(ValueError, match=r"^x\.tar: "):
            for row in open_source(path, keep=["txt"]).shards[0].rows():
                found.append(bytes_of(row))
        assert found == [CLIPS[name] for name in NAMES[: len(found)]] and len(found) in (1, 2)
    damaged = bytearray(whole)
    damaged[third.offset : third.offset + 100] = b"?" * 100
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"cut off or damaged after {third.offset} bytes"):
        rows_of(open_source(path))
    path.write_bytes(b"no tar at all")
    write_tar(path.with_name("y.tar"))
    broken, good = open_source(path.parent).shards
    assert len(list(good.rows())) == 5
    with pytest.raises(ValueError, match=r"^x\.tar: "):
        list(broken.rows())


def test_a_member_of_a_size_below_zero_ends_the_tar(tmp_path):
    """Else the next member would be one of those before, without end."""
    data = bytearray(write_tar(tmp_path / "x.tar").read_bytes())
    place = data.index(b"c.flac")
    head = data[place : place + 512]
    head[124:136] = (-4096).to_bytes(12, "big", signed=True)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    data[place : place + 512] = head
    (tmp_path / "x.tar").write_bytes(data)
    rows = open_source(tmp_path / "x.tar", keep=["txt"]).shards[0].rows()
    assert [next(rows).name for _ in range(2)] == ["a/one", "a-two"]
    with pytest.raises(ValueError, match=r"^x\.tar: "):
        list(rows)
