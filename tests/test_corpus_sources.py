"""Corpora to be tokenised: what is listed of every kind, in which shards, and what of damaged ones."""

import json
import os
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora_made import (
    CLIPS,
    NAMES,
    TEXTS,
    bytes_of,
    encoded,
    reason,
    rows_of,
    table,
    write_folder,
    write_manifest,
    write_parquet,
    write_saved,
    write_tar,
)

from modeling_encodec.processors.corpus import tables
from modeling_encodec.processors.corpus.sources import open_source


NUMBERED = [f"row {row:06d}" for row in range(5)]
KINDS = {
    "folder": (lambda at: write_folder(at / "clips"), {}, None),
    "manifest": (lambda at: write_manifest(at), {}, NAMES),
    "parquet": (lambda at: write_parquet(at / "x.parquet"), {}, [f"x.parquet {name}" for name in NUMBERED]),
    "saved": (lambda at: write_saved(at / "saved"), {}, NUMBERED),
    "saved stream": (lambda at: write_saved(at / "s"), {"streaming": True}, [f"shard 00000 {n}" for n in NUMBERED]),
    "dataset": (lambda at: table(), {}, NUMBERED),
    "stream": (
        lambda at: table().to_iterable_dataset(num_shards=3),
        {},
        [f"shard {shard:05d} row {row:06d}" for shard, row in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))],
    ),
    "tar": (lambda at: write_tar(at / "x.tar"), {}, [os.path.splitext(name)[0] for name in NAMES]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_clips_through_every_kind(kind, tmp_path):
    make, options, names = KINDS[kind]
    made = make(tmp_path)
    clips = {"a-two.flac": CLIPS["a-two.flac"], **CLIPS} if kind == "folder" else CLIPS  # a folder is sorted
    for shard_rows in (1, 2, 100):
        source = open_source(made, shard_rows=shard_rows, **options)
        rows = rows_of(source)
        assert [bytes_of(row) for row in rows] == list(clips.values())
        assert [row.name for row in rows] == (names or list(clips))
        assert [shard.number for shard in source.shards] == list(range(len(source.shards)))
        assert source.kept == {} and all(row.kept == {} for row in rows)
        json.dumps(source.describe())
        assert str(tmp_path) not in json.dumps(source.describe())
        again = open_source(made, shard_rows=shard_rows, **options)
        assert again.describe() == source.describe() and rows_of(again)[-1].name == rows[-1].name


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_goes_to_another_process(kind, tmp_path):
    make, options, _ = KINDS[kind]
    source = open_source(
        make(tmp_path), shard_rows=2, keep=["text"] if kind in ("manifest", "parquet") else [], **options
    )
    copy = pickle.loads(pickle.dumps(source))
    assert copy.describe() == source.describe() and len(copy.shards) == len(source.shards)
    for before, after in zip(source.shards, pickle.loads(pickle.dumps(copy)).shards):
        assert (after.number, after.size) == (before.number, before.size)
        left, right = list(before.rows()), list(after.rows())
        assert [(row.name, row.kept, bytes_of(row)) for row in left] == [
            (row.name, row.kept, bytes_of(row)) for row in right
        ]
        pickle.dumps(right)


def test_sizes_and_cuts(tmp_path):
    folder = write_folder(tmp_path / "clips")
    order = ["a-two.flac", "a/one.wav", "b.wav", "c.flac", "d.wav"]
    sizes = [len(CLIPS[name]) for name in order]
    source = open_source(folder, shard_bytes=sizes[0] + sizes[1])
    assert source.unit == "B" and source.shards[0].size == sizes[0] + sizes[1]
    assert [row.name for row in source.shards[0].rows()] == order[:2]
    assert [shard.size for shard in open_source(folder, shard_bytes=1).shards] == sizes
    assert [shard.size for shard in open_source(folder, shard_rows=2).shards] == [
        sum(sizes[:2]), sum(sizes[2:4]), sizes[4],
    ]  # fmt: skip
    rows = open_source(table(), shard_rows=2)
    assert rows.unit == "rows" and [shard.size for shard in rows.shards] == [2, 2, 1]
    stream = open_source(table().to_iterable_dataset(num_shards=3))
    assert stream.unit == "shards" and [shard.size for shard in stream.shards] == [1, 1, 1]


def test_a_pickled_shard_is_small(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(400):
        (folder / f"{number:06d}.wav").touch()
    source = open_source(folder, shard_rows=10)
    assert len(pickle.dumps(source.shards[3])) < 600
    clips = dict.fromkeys(range(5), bytes(100_000))
    for dataset in (table(clips), table(clips).select([3, 1, 2, 0, 4])):
        shard = open_source(dataset, shard_rows=1).shards[0]
        assert 100_000 < len(pickle.dumps(shard)) < 110_000
        assert next(pickle.loads(pickle.dumps(shard)).rows()).location == bytes(100_000)


def test_what_a_folder_holds(tmp_path):
    folder = write_folder(tmp_path / "clips")
    (folder / "notes.txt").write_text("x")
    (folder / "UPPER.WAV").write_bytes(CLIPS["b.wav"])
    (folder / "link.wav").symlink_to(folder / "b.wav")
    (folder / "dead.wav").symlink_to(folder / "nowhere.wav")
    (folder / "linked").symlink_to(folder / "a")
    (folder / "folder.wav").mkdir()
    expected = sorted([*NAMES, "UPPER.WAV", "link.wav", "dead.wav"])  # whose row says that it leads nowhere
    assert [row.name for row in rows_of(open_source(folder, shard_rows=3))] == expected


def test_odd_names_stay_apart_and_are_read(tmp_path):
    raw = [b"caf\xe9.wav", b"caf\\xe9.wav", b"caf\\udce9.wav", b"new\nline.wav", "café.wav".encode()]
    try:
        for number, name in enumerate(raw):
            with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
                file.write(encoded(number, ".wav"))
    except OSError:
        pytest.skip("the file system takes no such names")
    rows = rows_of(pickle.loads(pickle.dumps(open_source(tmp_path))))
    assert len({row.name for row in rows}) == len(raw)
    assert {bytes_of(row) for row in rows} == {encoded(number, ".wav") for number in range(len(raw))}
    assert {"caf\\udce9.wav", "caf\\\\udce9.wav", "new\\nline.wav", "café.wav"} < {row.name for row in rows}
    pa.array([row.name for row in rows], pa.string())


def test_a_folder_is_known_by_its_files(tmp_path):
    folder = write_folder(tmp_path / "clips")
    first = open_source(folder).describe()

    def changed(act) -> bool:
        nonlocal first
        act()
        before, first = first, open_source(folder).describe()
        return first != before

    state = (folder / "b.wav").stat()
    assert not changed(lambda: (folder / "notes.txt").write_text("x"))
    assert not changed(lambda: os.utime(folder / "notes.txt", (1, 1)))
    assert changed(lambda: os.utime(folder / "b.wav", ns=(state.st_atime_ns, state.st_mtime_ns + 1)))
    assert changed(lambda: (folder / "e.wav").write_bytes(CLIPS["b.wav"]))
    assert changed(lambda: (folder / "e.wav").rename(folder / "f.wav"))
    assert changed(lambda: (folder / "f.wav").unlink())
    assert open_source(folder, shard_rows=2).describe() != first
    assert open_source(folder, shard_bytes=2).describe() != first
    moved = folder.rename(tmp_path / "elsewhere.x").rename(tmp_path / "clips")
    assert open_source(moved).describe() == first


# Manifests


def test_types_of_a_manifests_fields(tmp_path):
    rows = [
        {"path": "x.wav", "i": 1, "f": 1, "b": True, "s": "a", "m": 7, "l": [1], "big": 1 << 70, "h": "\ud800"},
        {"path": "y.wav", "i": None, "f": 0.5, "b": False, "s": None, "m": True, "l": {"k": "é"}, "big": 2, "n": None},
        {"path": "z.wav"},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(tmp_path / "m.jsonl", keep=["i", "f", "b", "s", "m", "l", "big", "n", "h"], shard_rows=1)
    text = pa.string()
    assert list(source.kept.items()) == [
        ("i", pa.int64()), ("f", pa.float64()), ("b", pa.bool_()), ("s", text), ("m", text), ("l", text),
        ("big", text), ("n", text), ("h", text),
    ]  # fmt: skip
    kept = [row.kept for row in rows_of(source)]
    assert kept[0] == dict(zip(source.kept, (1, 1.0, True, "a", "7", "[1]", str(1 << 70), None, "\\ud800")))
    assert kept[1] == dict(zip(source.kept, (None, 0.5, False, None, "true", '{"k": "é"}', "2", None, None)))
    assert kept[2] == dict.fromkeys(source.kept)
    for name, kind in source.kept.items():
        pa.array([row[name] for row in kept], kind)


def test_types_of_csv(tmp_path):
    (tmp_path / "m.csv").write_text(
        "path,i,f,b,z,m\nx.wav,1,1.50,true,007,1\ny.wav,,2,False,8,one\nz.wav,-3,1e3,,9,\n"
    )
    source = open_source(tmp_path / "m.csv", keep=["i", "f", "b", "z", "m"])
    assert list(source.kept.values()) == [pa.int64(), pa.float64(), pa.bool_(), pa.string(), pa.string()]
    assert [list(row.kept.values()) for row in rows_of(source)] == [
        [1, 1.5, True, "007", "1"], [None, 2.0, False, "8", "one"], [-3, 1000.0, None, "9", None],
    ]  # fmt: skip


def test_a_manifests_names_are_unique_and_of_no_machine(tmp_path):
    folder = write_folder(tmp_path / "clips")
    other = tmp_path / "other.wav"
    other.write_bytes(CLIPS["d.wav"])
    lines = ["b.wav", str(folder / "b.wav"), "./b.wav", "b.wav (2)", str(other), "gone.wav", "nul\0.wav"]
    rows = [{"path": line, "text": "same"} for line in lines] + [{"path": "b.wav", "text": "other"}]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(folder / "m.jsonl", keep=["text"])
    found = {row.name: row for row in rows_of(source)}
    assert list(found) == [
        "b.wav", "b.wav (2)", "b.wav (3)", "b.wav (2) (2)", "../other.wav", "gone.wav", "nul\\x00.wav", "b.wav (4)"
    ]  # fmt: skip
    assert bytes_of(found["b.wav"]) == bytes_of(found["b.wav (4)"]) == CLIPS["b.wav"]
    assert bytes_of(found["../other.wav"]) == CLIPS["d.wav"] and found["b.wav (4)"].kept == {"text": "other"}
    assert source.shards[0].size == 4 * len(CLIPS["b.wav"]) + len(CLIPS["d.wav"])
    before = source.describe()
    assert open_source(folder / "m.jsonl").describe() != before
    (folder / "gone.wav").write_bytes(b"there")
    assert open_source(folder / "m.jsonl", keep=["text"]).describe() != before


# Tables


@pytest.mark.parametrize("make", ["parquet", "saved", "saved stream", "stream"])
def test_kept_columns_of_tables(make, tmp_path):
    made, options, _ = KINDS[make]
    source = open_source(made(tmp_path), keep=("words", "label", "text"), shard_rows=2, **options)
    words = pa.list_(pa.struct([("word", pa.string()), ("end", pa.float32())]))
    assert list(source.kept) == ["words", "label", "text"]
    assert source.kept == {"words": words, "label": pa.string(), "text": pa.string()}
    rows = rows_of(source)
    assert [row.kept["label"] for row in rows] == ["x", "y", "x", "y", "x"]
    assert [row.kept["text"] for row in rows] == TEXTS
    assert rows[2].kept["words"] == [{"word": "w", "end": 0.5}] * 2
    for name, kind in source.kept.items():
        assert pa.array([row.kept[name] for row in rows], kind).type == kind


def test_a_folder_of_parquet(tmp_path):
    (tmp_path / "deep").mkdir()
    write_parquet(tmp_path / "b.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 damaged")
    pq.write_table(pa.table({"audio": list(CLIPS.values()), "text": [1, 2, 3, 4, None]}), tmp_path / "deep/b.parquet")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "deep/c.parquet")
    source = open_source(tmp_path, keep=["text"])
    damaged, whole, other, lacking = source.shards
    assert [row.name for row in whole.rows()] == [f"b.parquet row {row:06d}" for row in range(5)]
    assert [row.kept["text"] for row in other.rows()] == ["1", "2", "3", "4", None]
    assert [bytes_of(row) for row in other.rows()] == list(CLIPS.values())
    for shard, said in ((damaged, r"^a\.parquet: "), (lacking, "^deep/c.parquet: has no column 'audio'")):
        with pytest.raises(ValueError, match=said) as error:
            list(shard.rows())
        assert str(tmp_path) not in str(error.value) and "\n" not in str(error.value)
    assert [shard.size for shard in source.shards][1] == (tmp_path / "b.parquet").stat().st_size


def test_rows_that_are_no_audio_and_decoded_ones(tmp_path):
    decoded = pa.struct([("array", pa.list_(pa.float64())), ("sampling_rate", pa.int64())])
    rows = [{"array": [0.5, -0.25], "sampling_rate": 8000}, {"array": None, "sampling_rate": 8000}, None]
    pq.write_table(pa.table({"audio": pa.array(rows, decoded)}), tmp_path / "d.parquet")
    first, second, third = rows_of(open_source(tmp_path / "d.parquet"))
    assert first.location["sampling_rate"] == 8000 and first.location["array"].dtype == np.float32
    assert first.location["array"].tolist() == [0.5, -0.25]
    assert "array is none of numbers" in reason(second) and "audio is a NoneType" in reason(third)
    stereo = [{"array": [[0.5, 0.25], [1.0, 0.0]], "sampling_rate": 8000}, {"array": [[0.5], []], "sampling_rate": 1}]
    pq.write_table(pa.table({"audio": stereo}), tmp_path / "s.parquet")
    two, ragged = rows_of(open_source(tmp_path / "s.parquet"))
    assert two.location["array"].tolist() == [[0.5, 0.25], [1.0, 0.0]] and "array is none" in reason(ragged)
    (tmp_path / "far.wav").write_bytes(CLIPS["b.wav"])
    urls = [f"file://{tmp_path}/far.wav", "no/such.wav"]
    pq.write_table(pa.table({"audio": urls}), tmp_path / "u.parquet")
    assert "audio is at the URL file://" in reason(rows_of(open_source(tmp_path / "u.parquet"))[0])
    far, gone = rows_of(open_source(tmp_path / "u.parquet", allow_urls=True))
    assert pickle.loads(pickle.dumps(far)).location() == CLIPS["b.wav"] and gone.location == "no/such.wav"


def generated(numbers):
    """Rows of a stream that does not know its columns."""
    for number in numbers:
        yield {"audio": {"bytes": CLIPS[NAMES[number]], "path": None}, "number": number}


def test_a_generated_stream():
    stream = datasets.IterableDataset.from_generator(generated, gen_kwargs={"numbers": [0, 1, 2]})
    source = open_source(stream, keep=["number"])
    assert source.kept == {"number": pa.int64()} and len(source.shards) == 3
    assert [(bytes_of(row), row.kept["number"]) for row in rows_of(source)] == [
        (CLIPS[name], number) for number, name in enumerate(NAMES[:3])
    ]
    shorter = datasets.IterableDataset.from_generator(generated, gen_kwargs={"numbers": [0, 1]})
    assert open_source(shorter, keep=["number"]).describe() != source.describe()
    same = datasets.IterableDataset.from_generator(generated, gen_kwargs={"numbers": [0, 1, 2]})
    assert open_source(same, keep=["number"]).describe() == source.describe()


def test_a_dataset_is_known_by_its_rows(tmp_path):
    before = open_source(table()).describe()
    assert open_source(table().select(range(4))).describe() != before
    assert open_source(table(), keep=["text"]).describe() != before
    assert open_source(write_saved(tmp_path / "a")).describe() == open_source(tmp_path / "a").describe()


def test_a_dataset_of_the_hub(monkeypatch):
    asked = []

    class Api:
        def dataset_info(self, name, *, revision=None):
            return type("Info", (), {"sha": f"commit of {revision}"})

    def load(name, subset, *, split, streaming, revision):
        asked.append((name, subset, split, streaming, revision))
        return table().to_iterable_dataset(num_shards=2) if streaming else table()

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("some/speech", subset="de", split="test", revision="v1")
    assert [bytes_of(row) for row in rows_of(source)] == list(CLIPS.values()) and source.unit == "shards"
    about = source.describe()
    assert (about["name"], about["subset"], about["split"]) == ("some/speech", "de", "test")
    assert about["fingerprint"] == "commit of v1"
    assert open_source("some/speech", subset="de", split="test", revision="v2").describe() != about
    assert open_source("some/speech", streaming=False).unit == "rows"
    assert asked[0] == ("some/speech", "de", "test", True, "commit of v1")
    assert asked[2] == ("some/speech", None, "train", False, "commit of None")


# Errors


def test_what_cannot_be_opened(tmp_path):
    clips, manifest = write_folder(tmp_path / "clips"), write_manifest(tmp_path / "m")
    parquet, tar = write_parquet(tmp_path / "x.parquet"), write_tar(tmp_path / "x.tar")
    saved = write_saved(tmp_path / "saved")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare.jsonl").touch()
    (tmp_path / "x.doc").touch()
    write_tar(tmp_path / "text.tar", {"a.txt": b"x", "b.txt": b"y"}, lambda name: {})
    write_tar(clips.parent / "m" / "x.tar")
    pq.write_table(pa.table({"left": [b""], "right": [b""]}), tmp_path / "lr.parquet")
    for source, options, said in (
        (tmp_path / "gone", {}, "no such folder, file or dataset"),
        ("gone/list.jsonl", {}, "no such folder, file or dataset"),
        (tmp_path / "empty", {}, "holds no corpus"),
        (tmp_path / "m", {}, "holds .tar and audio files"),
        (tmp_path / "bare.jsonl", {}, "holds no rows"),
        (tmp_path / "x.doc", {}, "no corpus, allowed: a folder"),
        (tmp_path / "text.tar", {}, "none of its columns is the audio .* txt"),
        (tmp_path / "lr.parquet", {}, "none of its columns is the audio .* left, right"),
        (clips, {"keep": ["text"]}, "keep is 'text', allowed: none"),
        (clips, {"column": "audio"}, "column is 'audio', allowed: none"),
        (clips, {"streaming": True}, "streaming is True, allowed: none"),
        (clips, {"shard_rows": 0}, "shard_rows is 0, allowed: at least 1"),
        (manifest, {"keep": ["path"]}, "keep is 'path', allowed: text"),
        (parquet, {"keep": ["audio"]}, "keep is 'audio', allowed: label, text, words"),
        (parquet, {"column": "wav"}, "column is 'wav', allowed: audio, text, label, words"),
        (tar, {"keep": ["json"]}, "keep is 'json', allowed: txt"),
        (tar, {"keep": ["wav"]}, "keep is 'wav', allowed: txt"),
        (tar, {"column": "mp3"}, "column is 'mp3', allowed: flac, txt, wav"),
        (saved, {"revision": "v1"}, "revision is 'v1', allowed: none"),
        (table(), {"subset": "x"}, "subset is 'x', allowed: none"),
        (datasets.DatasetDict(train=table()), {}, "source is a DatasetDict"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
            open_source(source, **options)
        assert "\n" not in str(error.value)


def test_the_column_of_audio(tmp_path):
    made = table()
    assert bytes_of(rows_of(open_source(made.rename_column("audio", "sound")))[1]) == CLIPS[NAMES[1]]
    clips = pa.table({"flac": list(CLIPS.values()), "text": TEXTS})
    pq.write_table(clips, tmp_path / "x.parquet")
    assert open_source(tmp_path / "x.parquet").describe()["column"] == "flac"
    assert bytes_of(rows_of(open_source(tmp_path / "x.parquet"))[1]) == CLIPS[NAMES[1]]


def test_a_table_is_read_in_small_parts(tmp_path, monkeypatch):
    pq.write_table(pa.table({"audio": [bytes([row]) for row in range(50)]}), tmp_path / "x.parquet")
    most = 0
    rows = tables._Columns.rows

    def count(self, part, *more):
        nonlocal most
        most = max(most, part.num_rows)
        return rows(self, part, *more)

    monkeypatch.setattr(tables._Columns, "rows", count)
    assert [row.location[0] for row in rows_of(open_source(tmp_path / "x.parquet"))] == list(range(50))
    assert most == 16
