"""Checksums of tokenized corpora: every flipped bit is seen, and the same command mends what was damaged."""

import contextlib
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from corpus_files import sound

from modeling_encodec.processors.audio_tokens import PortableCodec
from modeling_encodec.processors.corpus import checksums, shards
from modeling_encodec.processors.corpus.checksums import find_faults, find_summary_faults, read_manifest, read_notes
from modeling_encodec.processors.corpus.sources import open_source
from modeling_encodec.processors.corpus.tokenization import Tokenization, tokenize_corpus
from modeling_encodec.processors.dataset_tokenization import load_tokens
from modeling_encodec.training.code_sequences import open_codes


CLIPS = {f"{number:02d}.wav": 2000 + 320 * number for number in range(12)}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "clips"
    folder.mkdir()
    for seed, (name, samples) in enumerate(CLIPS.items()):
        soundfile.write(folder / name, sound(24000, 1, samples, seed), 24000)
    (folder / "no.wav").write_bytes(b"no audio")
    return folder


@pytest.fixture(scope="module")
def codec(small_models):
    return PortableCodec(small_models["24khz"])


@pytest.fixture(scope="module")
def whole(corpus, codec, tmp_path_factory):
    """A finished output of four shards of two row groups each, and one without rows."""
    out = tmp_path_factory.mktemp("whole") / "tokens"
    make(corpus, codec, out)
    assert [len(read_notes(path)["row_groups"]) for path in shards_of(out)] == [2, 2, 2, 2, 0]
    return out


@pytest.fixture
def out(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "tokens")


@pytest.fixture(scope="module", autouse=True)
def small_row_groups():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "ROW_GROUP_FRAMES", 10)
        patch.setattr("modeling_encodec.processors.corpus.loading.WINDOW_ROWS", 2)
        yield


def make(corpus, codec, out, **options):
    run = Tokenization(open_source(corpus, shard_rows=3, **options), out, codec, 8)
    return tokenize_corpus(run, workers=0, progress=False)


def shards_of(out) -> list[Path]:
    return sorted(out.glob("data/*.parquet"))


def files_of(out) -> dict[str, bytes]:
    paths = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def faults_of(out) -> dict[str, str]:
    return dict(find_faults(out, read_manifest(out)))


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def codes_of(rows) -> dict[str, list]:
    return {row["name"]: np.asarray(row["codes"]).tolist() for row in rows}


# ---- what is written -----------------------------------------------------------------------------------------------


def test_an_undamaged_output_has_no_faults(whole, tmp_path):
    assert faults_of(whole) == {} and not list(find_summary_faults(whole, read_manifest(whole)))
    stored = codes_of(load_tokens(whole, cache_dir=tmp_path / "cache"))
    assert len(stored) == len(CLIPS)
    for verify in (True, "all", False):
        stream = load_tokens(whole, streaming=True, verify=verify)
        assert codes_of(stream) == stored and stream.num_shards == 5
        assert stream.features == load_tokens(whole, cache_dir=tmp_path / "cache").features


def test_a_checked_stream_is_a_stream_as_any_other(whole):
    stream = load_tokens(whole, streaming=True, columns=["name", "frames"])
    assert list(stream)[0].keys() == {"name", "frames"}
    want = [row["name"] for row in stream]
    assert [row["name"] for row in pickle.loads(pickle.dumps(stream))] == want
    assert [row["name"] for row in stream.skip(4)] == want[4:]
    assert sorted(row["name"] for row in stream.shuffle(seed=1, buffer_size=5)) == want
    halves = [[row["name"] for row in stream.shard(2, half)] for half in range(2)]
    assert sorted(halves[0] + halves[1]) == want and all(halves)
    state = iter(stream)
    next(state)
    with pytest.raises(ValueError, match="columns has 'words', allowed: name, codes"):
        load_tokens(whole, streaming=True, columns=["words"])
    with pytest.raises(ValueError, match="filters is given for a stream that is checked, allowed: columns, cache_dir"):
        load_tokens(whole, streaming=True, filters=[])
    with pytest.raises(ValueError, match="verify is 'some', allowed: True, False, 'all'"):
        load_tokens(whole, verify="some")


def test_other_readers_may_check_pages(out):
    path = shards_of(out)[0]
    start = next(iter(pq.read_metadata(path).row_group(0).to_dict()["columns"][1:2]))["data_page_offset"]
    flip(path, 8 * (start + 60))
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(path, page_checksum_verification=True).read()


def test_readers_that_check_nothing_notice_most_flipped_bits(out):
    """Those of the codes, by gzip's own checksum."""
    path = shards_of(out)[1]
    good, want = path.read_bytes(), pq.read_table(path)
    end = read_notes(path)["row_groups"][-1]["end"]
    rng, silent = random.Random(0), 0
    for _ in range(300):
        flip(path, rng.randrange(32, 8 * end))
        with contextlib.suppress(OSError, ValueError):
            silent += not pq.read_table(path).equals(want)
        path.write_bytes(good)
    assert silent < 15  # in the headers of pages


# ---- every bit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [3, 4])
def test_every_flipped_bit_of_a_shard_is_seen(out, number):
    path = shards_of(out)[number]
    good = path.read_bytes()
    expected = {"shard": number}
    assert checksums.shard_fault(path, expected) is None
    bits = range(8 * len(good))
    with open(path, "r+b", buffering=0) as file:
        for bit in random.Random(0).sample(bits, min(len(bits), 8000)):
            byte = good[bit // 8]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), bit // 8)
            assert checksums.shard_fault(path, expected), bit
            os.pwrite(file.fileno(), bytes([byte]), bit // 8)
    assert checksums.shard_fault(path, expected) is None


def test_every_flipped_bit_of_the_manifest_and_the_list_of_skipped_clips_is_seen(out):
    path = out / "manifest.json"
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        with pytest.raises(ValueError, match="checksum"):
            checksums.unseal(bytes(good[: bit // 8]) + bytes([good[bit // 8] ^ 1 << bit % 8]) + good[bit // 8 + 1 :])
    for name in ("run.json", "skipped.jsonl"):
        flip(out / name, 100)
    assert [name for name, _ in find_summary_faults(out, read_manifest(out))] == ["run.json", "skipped.jsonl"]


def test_readers_refuse_flipped_bits(out, tmp_path):
    path = shards_of(out)[2]
    good = path.read_bytes()
    rng = random.Random(1)
    for _ in range(40):
        flip(path, rng.randrange(8 * len(good)))
        for options in ({}, {"streaming": True, "verify": "all"}):
            with pytest.raises(ValueError, match=f"{path.name}: (damaged|cut off)"):
                load_tokens(out, cache_dir=tmp_path / "cache", **options)
        with pytest.raises(ValueError, match=f"{path.name}: (damaged|cut off)"):
            list(load_tokens(out, streaming=True))
        path.write_bytes(good)


def test_a_stream_gives_what_comes_before_a_damaged_row_group(out, whole):
    path = shards_of(out)[1]
    notes = read_notes(path)
    flip(path, 8 * (notes["row_groups"][0]["end"] + 50))
    rows, want = [], list(load_tokens(whole, streaming=True))
    with pytest.raises(ValueError, match=f"{path.name}: damaged: row group 1 of 2"):
        for row in load_tokens(out, streaming=True):
            rows.append(row)
    assert rows == want[:5] and len(want) == 12


def test_training_on_tokens_checks_them(out):
    assert len(open_codes(out, "codes")) == len(CLIPS)
    flip(shards_of(out)[1], 3000)
    with pytest.raises(ValueError, match="train-00001-of-00005.parquet: damaged: row group 0"):
        open_codes(out, "codes")


# ---- other damage, and the same command ----------------------------------------------------------------------------


def swap(out):
    one, two = shards_of(out)[:2]
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)


def of_another_run(out):
    corpus = out.parent / "others"
    corpus.mkdir()
    for number, name in enumerate(CLIPS):
        soundfile.write(corpus / name, sound(24000, 1, 4000, 90 + number), 24000)
    soundfile.write(corpus / "no.wav", sound(24000, 1, 4000, 99), 24000)
    codec = PortableCodec(of_another_run.model)
    make(corpus, codec, out.parent / "other")
    shutil.copy(shards_of(out.parent / "other")[1], shards_of(out)[1])


DAMAGE = {
    "a flipped bit": (lambda out: flip(shards_of(out)[1], 2000), {1}),
    "a flipped bit of the footer": (
        lambda out: flip(shards_of(out)[2], 8 * shards_of(out)[2].stat().st_size - 3000),
        {2},
    ),
    "two shards exchanged": (swap, {0, 1}),
    "one copied over another": (lambda out: shutil.copy(shards_of(out)[0], shards_of(out)[3]), {3}),
    "one of another run": (of_another_run, {1}),
    "cut off": (lambda out: shards_of(out)[0].write_bytes(shards_of(out)[0].read_bytes()[:-300]), {0}),
    "empty": (lambda out: shards_of(out)[0].write_bytes(b""), {0}),
    "longer": (lambda out: shards_of(out)[0].write_bytes(shards_of(out)[0].read_bytes() + b"PAR1"), {0}),
    "missing": (lambda out: shards_of(out)[2].unlink(), {2}),
    "all at once": (lambda out: [flip(path, 999) for path in shards_of(out)], {0, 1, 2, 3, 4}),
    "a stale manifest": (lambda out: flip(out / "manifest.json", 4000), set()),
    "a list of skipped clips of another run": (lambda out: (out / "skipped.jsonl").write_text(""), set()),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "killed"])
def test_the_same_command_makes_what_is_damaged_and_nothing_else(
    corpus, codec, small_models, whole, out, kind, finished, caplog
):
    act, damaged = DAMAGE[kind]
    of_another_run.model = small_models["24khz"]
    names = [path.name for path in shards_of(out)]
    act(out)
    if (out / "manifest.json").exists() and damaged:
        assert {names.index(Path(name).name) for name in faults_of(out)} == damaged
        with pytest.raises((ValueError, FileNotFoundError), match=r"train-0000\d"):
            load_tokens(out)
    if not finished:
        (out / "manifest.json").unlink()
    then = {path.name: path.stat().st_mtime_ns for path in shards_of(out)}
    made = []
    caplog.clear()
    make(corpus, codec, out)
    made = {names.index(path.name) for path in shards_of(out) if path.stat().st_mtime_ns != then.get(path.name)}
    assert made == damaged and files_of(out) == files_of(whole)
    told = {
        names.index(record.getMessage().split(":")[0]) for record in caplog.records if "made anew" in record.message
    }
    assert told == (damaged if kind != "missing" else set())


def test_files_that_are_none_of_the_run_are_named(out):
    shutil.copy(shards_of(out)[0], out / "data" / "train-00000-of-00009.parquet")
    with pytest.raises(ValueError, match="train-00000-of-00009.parquet: is not in the manifest"):
        load_tokens(out)


def test_a_manifest_of_another_time_is_refused(out, corpus, codec, tmp_path):
    """Of the same corpus with a clip changed: its shards are others."""
    clips = shutil.copytree(corpus, tmp_path / "clips")
    soundfile.write(clips / "00.wav", sound(24000, 1, 1000, 77), 24000)
    make(clips, codec, tmp_path / "new")
    shutil.copy(tmp_path / "new" / "manifest.json", out / "manifest.json")
    assert len(faults_of(out)) == 5
    assert json.loads((out / "manifest.json").read_text())["run"] != read_notes(shards_of(out)[0])["run"]
