"""Corpora to folders of tokens: the same bytes by any number of processes and workers, after any stop."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from corpus_files import BAD, GOOD, sound, write_corpus
from datasets import Dataset, Features, Value, load_dataset
from filelock import FileLock

from modeling_encodec.processors.audio import read_audio
from modeling_encodec.processors.corpus import tokenization
from modeling_encodec.processors.corpus.loading import Block, Clips, LoadingOptions, ShardEnd, Unusable, load_shards
from modeling_encodec.processors.corpus.sources import open_source
from modeling_encodec.processors.dataset_tokenization import CodecTokenizer, load_tokens, provenance_of
from modeling_encodec.system import worker_processes


# Small shards and batches, so that there are several of both; the long clip comes in blocks.
CUT = ("--shard-rows", 4, "--batch-seconds", 2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "clips", long_seconds=25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_models):
    place = tmp_path_factory.mktemp("models")
    for name, model in small_models.items():
        model.save_pretrained(place / name)
    return place


@pytest.fixture
def tokenize(run, folder):
    """`tokenize(source, out, ...)`: stdout of the command, which must end well."""

    def call(source, out, *options, model="24khz", bandwidth=3.6, workers=0):
        command = ("tokenize", source, out, "-m", folder / model, "-b", bandwidth, "--workers", workers)
        code, told, lines = run(*command, *options)
        assert code == 0, lines
        return told

    return call


def files_of(out: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in paths}


def rows_of(out) -> dict[str, dict]:
    return {row["name"]: row for row in load_tokens(out).with_format("numpy")}


@pytest.mark.parametrize("name, bandwidth", [("24khz", 3.6), ("48khz", 3.6), ("32khz", 1.2)])
def test_tokens_are_those_of_encode(tokenize, corpus, folder, small_models, tmp_path, name, bandwidth):
    model = small_models[name]
    tokenize(corpus, tmp_path / "out", *CUT, model=name, bandwidth=bandwidth)
    rows = rows_of(tmp_path / "out")
    assert list(rows) == sorted([*GOOD, "long.flac"])
    for clip, row in rows.items():
        audio, _ = read_audio(corpus / clip, model.config.sampling_rate, model.config.audio_channels)
        coded = model.encode(torch.from_numpy(audio)[None], bandwidth=bandwidth)
        spans = list(model.config.chunk_spans(audio.shape[1]))
        frames = [model.config.num_frames(stop - start) for start, stop in spans]
        want = torch.cat([chunk[0, :, :count] for chunk, count in zip(coded.audio_codes, frames)], dim=1)
        assert np.array_equal(row["codes"], want) and row["frames"] == want.shape[1]
        assert row["audio_length"] == audio.shape[1]
        if model.config.normalize:
            assert np.array_equal(row["scales"], torch.cat(coded.audio_scales)[:, 0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus, folder):
    """The files of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    subprocess.run(command_of(corpus, folder, out), check=True, capture_output=True)
    return files_of(out)


def command_of(corpus, folder, out, *launcher) -> list[str]:
    options = ("-m", folder / "24khz", "-b", 3.6, "--workers", 0, *CUT)
    return [
        str(word) for word in (sys.executable, *launcher, "-m", "modeling_encodec", "tokenize", corpus, out, *options)
    ]


def test_workers_do_not_matter(tokenize, corpus, whole, tmp_path):
    tokenize(corpus, tmp_path / "out", *CUT, workers=2)
    assert files_of(tmp_path / "out") == whole
    assert sum(name.startswith("data/") for name in whole) == 4


@pytest.mark.parametrize("kind", [Clips, Block, Unusable, ShardEnd])
def test_what_does_not_arrive_is_missed(run, corpus, folder, tmp_path, monkeypatch, kind):
    """Of whatever kind: neither the shard nor the manifest is written, and the same command mends it."""
    command = ("tokenize", corpus, tmp_path / "out", "-m", folder / "24khz", "-b", 3.6, *CUT)
    whole = tokenization.load_shards

    def with_one_lost(*arguments):
        items = whole(*arguments)
        for item in items:
            if type(item) is kind:
                yield from items
                return
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "load_shards", with_one_lost)
        code, _, lines = run(*command)
    assert code == 2 and " arrived" in lines[-1], lines
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not (tmp_path / "out" / "data" / "train-00000-of-00004.parquet").exists() or kind is Block
    assert run(*command)[0] == 0


def test_a_worker_that_is_killed_is_named(run, corpus, folder, tmp_path, monkeypatch):
    command = ("tokenize", corpus, tmp_path / "out", "-m", folder / "24khz", "-b", 3.6, *CUT, "--workers", 2)

    start = worker_processes._Workers._start

    def start_and_kill(workers, *given):
        start(workers, *given)
        workers.processes[-1].kill()

    monkeypatch.setattr(worker_processes._Workers, "_start", start_and_kill)
    code, _, lines = run(*command)
    assert code == 2 and "a worker process ended before its work did (killed by SIGKILL" in lines[-1], lines
    assert not (tmp_path / "out" / "manifest.json").exists() and not multiprocessing.active_children()


def test_audio_needs_no_shared_memory(corpus, small_models):
    """What workers send holds the samples themselves, as arrays."""
    options = LoadingOptions(small_models["24khz"].config, 2, 240000)
    shards = open_source(corpus, shard_rows=4).shards
    for item in load_shards(shards, options, 0):
        if isinstance(item, (Clips, Block)):
            assert type(item.audio) is np.ndarray and len(pickle.dumps(item)) > item.audio.nbytes


def test_two_processes_write_what_one_does(corpus, folder, whole, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = command_of(corpus, folder, tmp_path / "out", *launcher)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("clips, ") == 1  # one of them reports
    assert files_of(tmp_path / "out") == whole


def test_killed_and_gone_on_with_it_is_the_same(corpus, folder, whole, tmp_path):
    out = tmp_path / "out"
    running = subprocess.Popen(command_of(corpus, folder, out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while not list(out.glob("data/train-*.parquet")) and running.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    made = {path: path.stat().st_mtime_ns for path in out.glob("data/train-*.parquet")}
    assert made and not (out / "manifest.json").exists()
    (out / "data" / ".train-00009-of-00004-abc.parquet").write_bytes(b"what a killed process leaves")
    done = subprocess.run(command_of(corpus, folder, out), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(out) == whole
    assert all(path.stat().st_mtime_ns == then for path, then in made.items())


def test_force_that_is_interrupted_leaves_nothing_that_looks_complete(tokenize, corpus, whole, tmp_path, monkeypatch):
    out, unlink = tmp_path / "out", Path.unlink
    tokenize(corpus, out, *CUT)

    def stop(path, **options):
        if path.name.startswith("train-00002"):
            raise OSError("killed here")
        unlink(path, **options)

    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="killed here"):
        patch.setattr(Path, "unlink", stop)
        tokenize(corpus, out, *CUT, "--force")
    with pytest.raises(FileNotFoundError, match="holds no manifest.json"):
        load_tokens(out)
    tokenize(corpus, out, *CUT)
    assert files_of(out) == whole
    next(out.glob("data/*")).unlink()
    with pytest.raises(FileNotFoundError, match="missing, or not of"):
        load_tokens(out)


def test_what_killed_processes_leave_is_removed(tokenize, corpus, whole, tmp_path):
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    (out / "data").rmdir()
    (out / ".run.partial-0123abcd.json").write_text("{")  # of one that was killed when it began
    tokenize(corpus, out, *CUT)
    for name in (".run.partial.json", ".manifest.partial.json", ".skipped.partial.jsonl", ".README.partial.md"):
        (out / name).write_text("{")
    tokenize(corpus, out, *CUT)
    assert files_of(out) == whole


def test_damaged_and_missing_files_are_made_anew_and_no_others(tokenize, corpus, whole, tmp_path):
    out = tmp_path / "out"
    tokenize(corpus, out, *CUT)
    paths = sorted(out.glob("data/*"))
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    then = paths[2].stat().st_mtime_ns
    told = tokenize(corpus, out, *CUT)
    assert files_of(out) == whole and paths[2].stat().st_mtime_ns == then
    assert "made now: 0.0" in told
    assert "made now" not in tokenize(corpus, out, *CUT)


def test_what_is_skipped_is_listed(tokenize, corpus, tmp_path):
    told = tokenize(corpus, tmp_path / "out", *CUT)
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == sorted(BAD)
    assert all(BAD[line["name"]] in line["reason"] for line in lines)
    assert f"{len(GOOD) + 1} clips, 0.008 hours, 4 files" in told
    assert "skipped 1: holds samples that are NaN or infinite" in told
    assert str(corpus.parent) not in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_manifest_card_and_provenance(tokenize, corpus, folder, tmp_path):
    out = tmp_path / "out"
    tokenize(corpus, out, *CUT, "--split", "validation")
    manifest = json.loads((out / "manifest.json").read_text())
    totals = manifest["totals"]
    rows = load_dataset(str(out), split="validation")
    assert totals["rows"] == len(rows) == len(GOOD) + 1 and totals["skipped"] == len(BAD)
    assert totals["frames"] == sum(rows["frames"]) and totals["samples"] == sum(rows["audio_length"])
    assert totals["bytes"] == sum(path.stat().st_size for path in out.glob("data/*"))
    assert manifest["provenance"] == CodecTokenizer(folder / "24khz", 3.6).provenance
    tokens = load_tokens(out)
    assert provenance_of(tokens) == manifest["provenance"] | {"skipped": []}
    assert tokens.features["codes"].feature.feature.dtype == "uint16"
    card = (out / "README.md").read_text()
    assert "8 clips" in card and "8 codebooks of 64 codes" in card and str(tmp_path) not in card
    for path in (out / "manifest.json", out / "run.json"):
        assert str(corpus.parent) not in path.read_text() and str(folder) not in path.read_text()
    with pytest.raises(FileNotFoundError, match="holds no manifest.json"):
        load_tokens(tmp_path)


def test_other_runs_are_not_mixed_in(tokenize, run, corpus, folder, tmp_path):
    clips, out = shutil.copytree(corpus, tmp_path / "clips"), tmp_path / "out"
    tokenize(clips, out, *CUT)
    before = files_of(out)
    command = ("tokenize", clips, out, "-m", folder / "24khz", "--workers", 0, *CUT)
    for options, differ in (
        (("-b", 1.8), "provenance differ"),
        (("-b", 3.6, "--precision", "fast"), "provenance differ"),
        (("-b", 3.6, "--shard-rows", 5), "source, shards differ"),
    ):
        code, _, lines = run(*command, *options)
        assert code == 2 and f"{out} holds another run ({differ}" in lines[-1] and "--force begins anew" in lines[-1]
    soundfile.write(clips / "new.wav", sound(24000, 1, 500), 24000)
    code, _, lines = run(*command, "-b", 3.6)
    assert code == 2 and "holds another run (source" in lines[-1] and files_of(out) == before
    tokenize(clips, out, *CUT, "--force")
    assert "new.wav" in rows_of(out) and len(list(out.glob("data/*"))) == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    code, _, lines = run("tokenize", clips, tmp_path / "mine", "-m", folder / "24khz", "-b", 3.6)
    assert code == 2 and "holds other things" in lines[-1]


def test_two_runs_do_not_work_in_one_folder(tokenize, run, corpus, folder, tmp_path):
    out = tmp_path / "out"
    tokenize(corpus, out, *CUT)
    before = files_of(out)
    with FileLock(out / ".lock"):
        code, _, lines = run("tokenize", corpus, out, "-m", folder / "24khz", "-b", 3.6, *CUT, "--force")
    assert code == 2 and f"{out}: another process is at work there, allowed: one run at a time" in lines[-1]
    assert files_of(out) == before
    tokenize(corpus, out, *CUT, "--force")


@pytest.fixture(scope="module")
def forms(tmp_path_factory, corpus):
    """The good clips in other forms: form -> source, with a text beside each."""
    place = tmp_path_factory.mktemp("forms")
    names = sorted(GOOD)
    rows = [{"audio": {"bytes": (corpus / n).read_bytes(), "path": n}, "text": f"says {n}"} for n in names]
    audio = {"bytes": Value("binary"), "path": Value("string")}
    dataset = Dataset.from_list(rows, Features({"audio": audio, "text": Value("string")}))
    dataset.save_to_disk(place / "saved")
    for half in range(2):
        (place / "parquet").mkdir(exist_ok=True)
        dataset.shard(2, half).to_parquet(place / "parquet" / f"{half}.parquet")
    with (place / "list.jsonl").open("w") as lines:
        for name in names:
            lines.write(json.dumps({"path": str(corpus / name), "text": f"says {name}"}) + "\n")
    (place / "tars").mkdir()
    for half in range(2):
        with tarfile.open(place / "tars" / f"{half}.tar", "w") as tar:
            for number, name in list(enumerate(names))[half * 4 : half * 4 + 4]:
                tar.add(corpus / name, f"{number:03d}{Path(name).suffix}")
                (place / "text").write_text(f"says {name}")
                tar.add(place / "text", f"{number:03d}.txt")
    return {form: place / form for form in ("saved", "parquet", "list.jsonl", "tars")}


@pytest.mark.parametrize("form", ["saved", "parquet", "list.jsonl", "tars"])
def test_the_form_of_a_corpus_does_not_matter(tokenize, corpus, forms, tmp_path, form):
    tokenize(corpus, tmp_path / "files")
    want = {f"says {name}": row["codes"].tolist() for name, row in rows_of(tmp_path / "files").items()}
    del want["says long.flac"]
    text = "txt" if form == "tars" else "text"
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        tokenize(forms[form], out, "--keep", text, "--shard-rows", 3, workers=workers)
        made = load_tokens(out).with_format("numpy")
        assert {row[text]: row["codes"].tolist() for row in made} == want
        assert len(set(made["name"])) == len(made) == len(want)
    assert files_of(tmp_path / "out0") == files_of(tmp_path / "out2")


def test_a_source_that_breaks_off(run, tokenize, forms, folder, tmp_path):
    tars = shutil.copytree(forms["tars"], tmp_path / "tars")
    whole = (tars / "0.tar").read_bytes()
    (tars / "0.tar").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    code, _, lines = run("tokenize", tars, out, "-m", folder / "24khz", "-b", 3.6, "--workers", 0)
    assert code == 2 and "shard 0 breaks off (ValueError: 0.tar: unexpected end of data)" in lines[-1]
    assert "keep_broken" in lines[-1]
    assert [path.name for path in out.glob("data/*")] == ["train-00001-of-00002.parquet"]  # the other is there
    assert not (out / "manifest.json").exists()
    told = tokenize(tars, out, "--keep-broken")  # goes on
    (line,) = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert line["shard"] == 0 and line["row"] is None and line["reason"] in told
    assert 3 < len(load_tokens(out)) < len(GOOD)


def test_files_made_in_pipes_and_under_odd_names(tokenize, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    soundfile.write(clips / "whole.flac", sound(24000, 1, 60000), 24000)
    whole = bytearray((clips / "whole.flac").read_bytes())
    whole[21] &= 0xF0  # the count of samples, which a pipe leaves unknown
    whole[22:26] = bytes(4)
    (clips / "piped.flac").write_bytes(whole)
    soundfile.write(clips / "whole.wav", sound(24000, 1, 60000), 24000)
    waves = bytearray((clips / "whole.wav").read_bytes())
    waves[4:8] = waves[40:44] = b"\xff" * 4
    (clips / "piped.wav").write_bytes(waves)
    os.rename(clips / "whole.wav", os.fsencode(clips) + b"/\xff.wav")
    tokenize(clips, tmp_path / "out", "--batch-seconds", 1)
    rows = rows_of(tmp_path / "out")
    assert set(rows) == {"whole.flac", "piped.flac", "piped.wav", "\\udcff.wav"}
    assert all(np.array_equal(row["codes"], rows["whole.flac"]["codes"]) for row in rows.values())


def test_nothing_but_bad_files(run, folder, tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.wav").write_bytes(b"no wave")
    code, _, lines = run("tokenize", tmp_path / "clips", tmp_path / "out", "-m", folder / "24khz", "-b", 3.6)
    assert code == 2 and "none of 1 clips gives audio, the first: not readable as audio" in lines[-1]
    assert (tmp_path / "out" / "skipped.jsonl").exists() and not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (("-b", 3.6, "--batch-seconds", "inf"), "batch_seconds is inf, allowed: at least 1, and finite"),
        (("-b", 3.6, "--shard-megabytes", "inf"), "shard_megabytes is inf, allowed: at least 1, and finite"),
        ((), "bandwidth is not given, allowed: one of [0.9, 1.8, 3.6] kbps, or num_quantizers"),
        (("-b", 5), "doesn't support the bandwidth 5.0"),
        (("-b", 3.6, "--workers", -1), "workers is -1, allowed: 0 or more"),
        (("-b", 3.6, "--batch-seconds", 0), "batch_seconds is 0.0, allowed: at least 1"),
        (("-b", 3.6, "--split", "a/b"), "split is 'a/b', allowed: letters, digits and _"),
        (("-b", 3.6, "--engine", "spark"), "engine is 'spark', allowed: local, ray"),
        (("-b", 3.6, "--device", "nowhere"), "device is 'nowhere'"),
        (("-b", 3.6, "--keep", "text"), "text"),
        (("-b", 3.6, "--shard-rows", 0), "shard_rows is 0, allowed: at least 1"),
    ],
)
def test_settings_that_cannot_work(run, corpus, folder, tmp_path, options, message):
    code, _, lines = run("tokenize", corpus, tmp_path / "out", "-m", folder / "24khz", *options)
    assert code == 2 and message in lines[-1] and not (tmp_path / "out").exists()


def test_output_inside_the_source_is_refused(run, corpus, folder):
    for out in (corpus, corpus / "a" / "tokens"):
        code, _, lines = run("tokenize", corpus, out, "-m", folder / "24khz", "-b", 3.6)
        assert code == 2 and f"OUT is {out}, allowed: a folder outside of {corpus}" in lines[-1]


def test_kept_columns_may_not_hide_tokens(run, folder, tmp_path):
    soundfile.write(tmp_path / "a.wav", sound(24000, 1, 500), 24000)
    (tmp_path / "list.csv").write_text("path,codes\na.wav,3\n")
    command = (
        "tokenize",
        tmp_path / "list.csv",
        tmp_path / "out",
        "-m",
        folder / "24khz",
        "-b",
        3.6,
        "--keep",
        "codes",
    )
    code, _, lines = run(*command)
    assert code == 2 and "kept column is 'codes', allowed: other names than name, codes" in lines[-1]
