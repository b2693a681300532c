"""Hostile corpora: every good clip gets tokens, every bad one a line in skipped.jsonl; nothing else is opened."""

import json
import os
import re
import socket
import subprocess
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_corpora import CASES, FILES, NO_FILES, NO_ROWS, PLAYLIST, ROWS, URLS, clip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_encodec.evaluation.clips import list_clips
from modeling_encodec.processors.audio import read_audio
from modeling_encodec.processors.audio_ffmpeg import ffmpeg_path
from modeling_encodec.processors.audio_tokens import PortableCodec
from modeling_encodec.processors.corpus.clips import UnusableClip
from modeling_encodec.processors.corpus.loading import Clips, LoadingOptions, Unusable, load_shards
from modeling_encodec.processors.corpus.reading import CorpusConfig
from modeling_encodec.processors.corpus.rows import Reach
from modeling_encodec.processors.corpus.sources import open_source
from modeling_encodec.processors.corpus.tables import _hub_urls
from modeling_encodec.processors.corpus.tokenization import Tokenization, tokenize_corpus
from modeling_encodec.processors.dataset_tokenization import load_tokens
from modeling_encodec.training.corpora import open_corpus


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


# ---- mixtures ------------------------------------------------------------------------------------------------------


def mixed_manifest(folder, kinds) -> tuple:
    lines = {**{kind: line for kind, (line, _) in NO_ROWS.items()}}
    lines |= {kind: json.dumps({"path": path}).encode() for kind, (path, _) in NO_FILES.items()}
    with open(folder / "m.jsonl", "wb") as file:
        for number, kind in enumerate(kinds):
            (folder / f"{number}.wav").write_bytes(clip(number % 5))
            file.write(lines.get(kind, json.dumps({"path": f"{number}.wav"}).encode()) + b"\n")
    return folder / "m.jsonl", [f"{number}.wav" for number, kind in enumerate(kinds) if kind == "good"]


def mixed_folder(folder, kinds) -> tuple:
    (folder / "clips").mkdir()
    for number, kind in enumerate(kinds):
        below = folder / "clips" / str(number)
        below.mkdir()
        if kind == "good":
            (below / "good.wav").write_bytes(clip(number % 5))
        else:
            name, _, make = FILES[kind]
            make(below / name)
    return folder / "clips", [f"{number}/good.wav" for number, kind in enumerate(kinds) if kind == "good"]


def mixed_table(folder, kinds) -> tuple:
    bad = {kind: audio for kind, (audio, _) in ROWS.items()} | {url: {"bytes": None, "path": url} for url in URLS}
    rows = [bad[kind] if kind in bad else {"bytes": clip(n % 5), "path": "x"} for n, kind in enumerate(kinds)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"audio": pa.array(rows, kind)}), folder / "t.parquet")
    return folder / "t.parquet", [f"t.parquet row {n:06d}" for n, kind in enumerate(kinds) if kind == "good"]


MIXTURES = {
    "manifest": (mixed_manifest, [*NO_ROWS, *NO_FILES]),
    "folder": (mixed_folder, list(FILES)),
    "table": (mixed_table, [*ROWS, *URLS]),
}


@pytest.mark.parametrize("form", MIXTURES)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_mixtures(small_models, tmp_path_factory, form, data):
    """Whatever is mixed: each row is in the tokens or in skipped.jsonl, once."""
    build, bad = MIXTURES[form]
    kinds = ["good", *data.draw(st.lists(st.one_of(st.just("good"), st.sampled_from(bad)), max_size=12))]
    kinds = data.draw(st.permutations(kinds))
    place = tmp_path_factory.mktemp("mixture")
    source, good = build(place, kinds)
    opened = open_source(source, shard_rows=data.draw(st.integers(1, 5)))
    run = Tokenization(opened, place / "out", PortableCodec(small_models["24khz"]), 2)
    totals = tokenize_corpus(run, workers=0, progress=False).manifest["totals"]
    names = load_tokens(place / "out", streaming=True, columns=["name"])
    assert sorted(row["name"] for row in names) == sorted(good)
    skipped = [json.loads(line) for line in (place / "out" / "skipped.jsonl").read_text().splitlines()]
    assert totals["skipped"] == len(skipped) == len({entry["name"] for entry in skipped})
    assert len(skipped) == len(kinds) - len(good)


# ---- other readers -------------------------------------------------------------------------------------------------


def test_a_row_whose_reader_fails_in_any_way_is_skipped_alone(small_models, tmp_path, monkeypatch):
    from modeling_encodec.processors.corpus import loading

    for name in "abc":
        (tmp_path / f"{name}.wav").write_bytes(clip())
    open_clip = loading.open_clip

    def fail(location, config):
        if location.endswith("b.wav"):
            raise RuntimeError("two\nlines")
        return open_clip(location, config)

    monkeypatch.setattr(loading, "open_clip", fail)
    options = LoadingOptions(small_models["24khz"].config, 10, 240000)
    items = list(load_shards(open_source(tmp_path).shards, options, 0))
    assert [item.reason for item in items if isinstance(item, Unusable)] == ["RuntimeError: two lines"]
    assert [len(item.places) for item in items if isinstance(item, Clips)] == [2]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("folder: ", "jsonl: "))])
def test_training_and_evaluation_read_what_is_good(tmp_path, name):
    """Bad files are skipped, and a manifest with a row that is none is refused by its name."""
    hostile = CASES[name](tmp_path)
    of_folder = name.startswith("folder: ")
    config = CorpusConfig("c", str(hostile.source), "folder" if of_folder else "manifest")
    if name.removeprefix("jsonl: ") in NO_ROWS:
        for read in (lambda: open_corpus(config, 1), lambda: list_clips(hostile.source)):
            with pytest.raises(ValueError, match="row 2: ") as error:
                read()
            assert "\n" not in str(error.value)
        return
    corpus = open_corpus(config, 1)
    root = hostile.source if of_folder else hostile.source.parent
    assert [os.path.relpath(found.name, root) for found in corpus.clips] == hostile.good
    if of_folder and name not in ("folder: a name that is no UTF-8", "folder: a name with a newline"):
        clips = {found.name: found for found in list_clips(hostile.source)}
        for good in hostile.good:
            assert clips[good].read(24000, 1).shape[1] > 0
        for bad in set(clips) - set(hostile.good):
            with pytest.raises(ValueError, match=re.escape(bad)):
                clips[bad].read(24000, 1)


# ---- addresses -----------------------------------------------------------------------------------------------------


def rows_with_paths(folder, *paths):
    pq.write_table(pa.table({"audio": [{"bytes": None, "path": str(path)} for path in paths]}), folder / "t.parquet")
    return folder / "t.parquet"


def test_urls_that_are_allowed_and_bad_cost_their_row_alone(run, model, tmp_path):
    (tmp_path / "a.wav").write_bytes(clip())
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("in.wav", clip(1))
    paths = (
        f"file://{tmp_path}/a.wav", f"zip://in.wav::file://{tmp_path}/x.zip", f"zip://none.wav::file://{tmp_path}/x.zip",
        "zip://x::file:///etc/passwd", "nonsense://x", "file:///none", f"file://{tmp_path}",
    )  # fmt: skip
    source = rows_with_paths(tmp_path, *paths)
    command = ("tokenize", source, tmp_path / "out", "-m", model, "-b", 3.6, "--workers", 0)
    assert run(*command)[0] == 2  # none of them
    code, _, lines = run(*command, "--allow-urls")
    assert code == 2 and "holds another run (source" in lines[-1]
    code, _, lines = run(*command, "--allow-urls", "--force")
    assert code == 0, lines
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in skipped] == [2, 3, 4, 5, 6] and all(entry["reason"] for entry in skipped)


def test_what_rows_of_a_hub_dataset_may_name(tmp_path):
    reach = Reach(_hub_urls("some/speech"), (str(tmp_path / "cache"),))
    (tmp_path / "cache").mkdir()
    for address in (
        "hf://datasets/some/speech@0123/a.wav", "hf://datasets/some/speech/a.wav",
        "zip://a.wav::hf://datasets/some/speech@0123/a.zip", f"{tmp_path}/cache/a.wav",
        "https://huggingface.co/datasets/some/speech/resolve/0123/a.wav",
    ):  # fmt: skip
        assert reach.fault(address) is None, address
    for address in (
        "hf://datasets/some/speech2@0123/a.wav", "hf://datasets/some/speech@0123/../../other/x/a.wav", "hf://other/x",
        "zip://a.wav::http://127.0.0.1/a.zip", "simplecache::hf://datasets/some/speech@0123/a.wav",
        "zip://hf://datasets/some/speech@0123/a::file:///etc/passwd", "https://huggingface.co/datasets/o/x/resolve/a",
        "HF://datasets/some/speech@0123/a.wav", f"{tmp_path}/cache/../a.wav", f"{tmp_path}/a.wav", "a.wav", "/etc/x",
    ):  # fmt: skip
        assert reach.fault(address), address
    assert Reach().fault("/etc/a.wav") is None and Reach().fault("hf://datasets/some/speech@0123/a.wav")


def test_a_playlist_opens_no_other_file(tmp_path):
    if not ffmpeg_path():
        pytest.skip("ffmpeg is not installed")
    (tmp_path / "a.wav").write_bytes(clip())
    for number, text in enumerate(
        (PLAYLIST, "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.0,\na.wav\n#EXT-X-ENDLIST\n")
    ):
        (tmp_path / f"{number}.m4a").write_text(text)
        with pytest.raises(ValueError, match="not readable as audio"):
            read_audio(tmp_path / f"{number}.m4a")


def test_suffixes_of_any_bytes_can_be_told_of(run, model, tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.wav").write_bytes(clip())
    for name in (b"x.\xff\n", b"x.\x1b[31m"):
        with open(os.fsencode(tmp_path / "clips") + b"/" + name, "wb"):
            pass
    code, _, lines = run("tokenize", tmp_path / "clips", tmp_path / "out", "-m", model, "-b", 3.6)
    assert code == 0 and r"2 files of other kinds: .\udcff\n (1), .\x1b[31m (1), left out" in lines
