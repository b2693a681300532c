"""`evaluate MODEL DATA`: systems, runs that go on and are shared, what results say."""

import csv
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import clip as synthetic
from peers import import_encodec, original_model

from modeling_encodec.bitstream.compression import compress, decompress
from modeling_encodec.evaluation import evaluation, report, systems
from modeling_encodec.evaluation.clips import Clip, list_clips
from modeling_encodec.evaluation.metrics import si_snr
from modeling_encodec.evaluation.plots import plot_rate_distortion, save_figure
from modeling_encodec.evaluation.scoring import count_codes
from modeling_encodec.processors.audio import read_audio


QUICK = ("--metric", "si_snr", "--metric", "mel_distance", "--anchor", "none")
with_opus = pytest.mark.skipif(
    systems._missing_program("opus") is not None, reason="neither ffmpeg with libopus nor opus-tools are installed"
)


@pytest.fixture(scope="module")
def model_folder(small_models, lms, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    small_models["24khz"].save_pretrained(folder / "codec")
    lms["24khz"].save_pretrained(folder / "lm")
    return folder


@pytest.fixture(scope="module")
def data(small_models, tmp_path_factory) -> Path:
    """Two categories, three clips; at another rate, mono and stereo."""
    folder = tmp_path_factory.mktemp("data")
    for seed, (name, seconds) in enumerate((("speech/a", 1.2), ("speech/b", 0.7), ("music/deep/c", 1.0))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        audio = synthetic(small_models["24khz"], seconds, seed)[0].numpy()
        samples = np.stack([audio, audio / 2], 1) if name == "speech/b" else audio
        soundfile.write(folder / f"{name}.wav", samples, 24000 if name != "speech/a" else 16000, subtype="FLOAT")
    return folder


def results_of(folder: Path) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((folder / "evaluation.json").read_text(), parse_constant=refuse)


def row_of(results: dict, system: str, kbps: float | None = None, category: str = "all") -> dict:
    key = (system, kbps, category)
    return next(row for row in results["results"] if (row["system"], row["kbps"], row["category"]) == key)


# ---- the whole ------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_codec_and_the_metrics(run, small_models, lms, model_folder, data, tmp_path):
    model, lm, out = small_models["24khz"], lms["24khz"], tmp_path / "out"
    code, text, _ = run("evaluate", model_folder / "codec", data, "-o", out, "--lm", model_folder / "lm", *QUICK)
    assert code == 0 and "| encodec | speech | 3.6 |" in text and "not measured: opus" not in text
    results = results_of(out)
    assert results["data"]["clips"] == 3 and results["data"]["categories"] == {"music": 1, "speech": 2}
    ratios, sizes, coded, seconds = [], 0, 0, 0.0
    for path in sorted(data.rglob("*.wav")):
        audio = torch.from_numpy(read_audio(path, 24000, 1)[0])
        packed = compress(model, audio, 1.8, model_name="codec")
        ratios.append(si_snr(audio, decompress(packed, model)[0]).item())
        sizes, seconds = sizes + len(packed), seconds + audio.shape[1] / 24000
        coded += len(compress(model, audio, 1.8, lm, model_name="codec", lm_name="lm"))
    row = row_of(results, "encodec", 1.8)
    assert row["metrics"]["si_snr"]["mean"] == pytest.approx(np.mean(ratios), abs=1e-5)
    assert row["metrics"]["si_snr"]["clips"] == 3 == row["clips"]
    half = 4.302653 * np.std(ratios, ddof=1) / math.sqrt(3)  # t(0.975; 2)
    assert row["metrics"]["si_snr"]["high"] == pytest.approx(np.mean(ratios) + half, abs=1e-4)
    assert row["measured_kbps"] == pytest.approx(8 * sizes / seconds / 1000, abs=1e-6)
    assert row["lm_kbps"] == pytest.approx(8 * coded / seconds / 1000, abs=1e-6)
    assert row["seconds"] == pytest.approx(seconds, abs=1e-3)
    alone = row_of(results, "encodec", 1.8, "music")["metrics"]["si_snr"]
    assert alone["low"] is None and alone["mean"] == pytest.approx(ratios[0], abs=1e-5)
    assert results["model"]["language_model"]["name"] == "lm" and len(results["codebooks"]) == 8


def test_what_is_written(run, model_folder, data, tmp_path):
    assert run("evaluate", model_folder / "codec", data, "-o", tmp_path / "out", *QUICK)[0] == 0
    made = {path.name for path in (tmp_path / "out").iterdir()}
    files = {"run.json", "clips", "clips.csv", "clips.parquet", "timings.json", "results.md", "evaluation.png"}
    assert made - {".lock"} == files | {"evaluation.json"}
    with (tmp_path / "out" / "clips.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert Counter(row["system"] for row in rows) == {"encodec": 9, "identity": 3}
    parquet = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "out" / "clips.parquet").to_pylist()
    assert [str(row["si_snr"]) for row in parquet] == [row["si_snr"] for row in rows]
    text = (tmp_path / "out" / "evaluation.json").read_text()
    assert str(tmp_path) not in text and str(data.parent) not in text
    timings = json.loads((tmp_path / "out" / "timings.json").read_text())
    assert timings[0]["encode_rtf"] > 0 and timings[-1] == {
        "system": "identity", "kbps": None, "encode_rtf": None, "decode_rtf": None,
    }  # fmt: skip


def test_results_go_into_the_card_that_is_pushed(run, model_folder, data, tmp_path):
    assert run("evaluate", model_folder / "codec", data, "-o", tmp_path / "out", *QUICK)[0] == 0
    results = tmp_path / "out" / "evaluation.json"
    code, text, _ = run("push", model_folder / "codec", "me/codec", "--dry-run", "--evaluation", results)
    assert code == 0 and "evaluation.png" in text  # which the card shows
    strangers = tmp_path / "other"
    shutil.copytree(model_folder / "codec", strangers)
    weights = bytearray((strangers / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (strangers / "model.safetensors").write_bytes(weights)
    code, _, lines = run("push", strangers, "me/codec", "--dry-run", "--evaluation", results)
    assert code == 2 and "evaluation.json: is of the weights" in lines[-1]


def test_identity_is_perfect_by_every_metric(run, model_folder, data, tmp_path):
    assert run("evaluate", model_folder / "codec", data, "-o", tmp_path, "--anchor", "none", "-b", "0.9")[0] == 0
    scores = row_of(results_of(tmp_path), "identity")["metrics"]
    assert scores["si_snr"]["low"] == 100 and scores["mel_distance"]["high"] == 0
    assert scores["si_snr_windowed"]["mean"] > 50
    # ViSQOL's model for speech gives a copy of what is no speech less than its best.
    for name, best in (("visqol_audio", 4.7), ("visqol_speech", 4.2), ("pesq", 4.6), ("stoi", 1 - 1e-6)):
        assert name not in scores or scores[name]["mean"] >= best
    assert row_of(results_of(tmp_path), "identity")["measured_kbps"] is None


def test_the_same_command_gives_the_same_json(run, model_folder, data, tmp_path):
    for name in ("one", "two"):
        assert run("evaluate", model_folder / "codec", data, "-o", tmp_path / name, *QUICK)[0] == 0
    for name in ("evaluation.json", "results.md", "clips.csv", "evaluation.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


# ---- runs that stop, go on, and are shared --------------------------------------------------------------------------


def test_a_stopped_run_goes_on_where_it_was(run, model_folder, data, tmp_path, monkeypatch):
    command = ("evaluate", model_folder / "codec", data, "-o")
    assert run(*command, tmp_path / "whole", *QUICK)[0] == 0
    read, seen = Clip.read, []

    def interrupted(clip, *arguments):
        seen.append(clip.name)
        if clip.name == "speech/b.wav":
            raise KeyboardInterrupt
        return read(clip, *arguments)

    monkeypatch.setattr(Clip, "read", interrupted)
    assert run(*command, tmp_path / "stopped", *QUICK)[0] == 130
    monkeypatch.setattr(Clip, "read", lambda clip, *arguments: seen.append(clip.name) or read(clip, *arguments))
    before = len(seen)
    assert run(*command, tmp_path / "stopped", *QUICK)[0] == 0
    assert set(seen[before:]) == {"speech/b.wav"}
    for name in ("evaluation.json", "clips.csv"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_two_processes_give_what_one_does(run, model_folder, data, tmp_path):
    arguments = ["evaluate", str(model_folder / "codec"), str(data), *QUICK, "-o"]
    assert run(*arguments, tmp_path / "one")[0] == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "modeling_encodec", *arguments, str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results are in") == 1
    assert (tmp_path / "two" / "evaluation.json").read_bytes() == (tmp_path / "one" / "evaluation.json").read_bytes()


def test_what_changed_or_failed_is_scored_again_and_nothing_else(run, model_folder, data, tmp_path, monkeypatch):
    clips = shutil.copytree(data, tmp_path / "clips")
    command = ("evaluate", model_folder / "codec", clips, "-o", tmp_path / "out", *QUICK)
    louder, rate = soundfile.read(clips / "speech" / "b.wav")
    (clips / "speech" / "a.wav").write_bytes(b"RIFF")
    assert run(*command)[0] == 0 and "speech/a.wav" in results_of(tmp_path / "out")["data"]["failed"]
    before = results_of(tmp_path / "out")
    scored, keep = [], evaluation._keep
    monkeypatch.setattr(evaluation, "_keep", lambda *given: scored.append(given[1].name) or keep(*given))
    assert run(*command)[0] == 0 and scored == ["speech/a.wav"]  # which has failed
    soundfile.write(clips / "speech" / "b.wav", louder[::-1], rate, subtype="FLOAT")
    assert run(*command)[0] == 0 and scored == ["speech/a.wav"] * 2 + ["speech/b.wav"]
    assert results_of(tmp_path / "out")["data"]["sha256"] != before["data"]["sha256"]
    scored.clear()
    assert run(*command, "--force")[0] == 0 and len(scored) == 3


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"clip": "speech/a.wav"', b"\x00\xff"])
def test_damaged_records_are_made_anew(run, model_folder, data, tmp_path, content):
    command = ("evaluate", model_folder / "codec", data, "-o", tmp_path / "out", *QUICK)
    assert run(*command)[0] == 0
    whole = (tmp_path / "out" / "evaluation.json").read_bytes()
    for name in ("clips/000001.json", "clips/000001.npz"):
        (tmp_path / "out" / name).write_bytes(content)
        assert run(*command)[0] == 0
        assert (tmp_path / "out" / "evaluation.json").read_bytes() == whole
    (tmp_path / "out" / "clips" / "000000.npz").unlink()
    (tmp_path / "out" / "run.json").write_bytes(content if content != b"{}" else b"null")
    code, _, lines = run(*command)
    assert code == 2 and ("run.json: damaged" in lines[-1] or "another run" in lines[-1])
    assert run(*command, "--force")[0] == 0
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == whole


def test_odd_names_spoil_no_table_and_no_picture(run, model_folder, data, tmp_path):
    (tmp_path / "odd").mkdir()
    shutil.copytree(data / "speech", tmp_path / "odd" / "a|b $x_{$ ü")
    shutil.copytree(data / "music", tmp_path / "odd" / "_hidden")
    codec = shutil.copytree(model_folder / "codec", tmp_path / "_q$x_{$")
    assert run("evaluate", codec, tmp_path / "odd", "-o", tmp_path / "out", *QUICK)[0] == 0
    lines = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert {line.replace("\\|", "").count("|") for line in lines} == {8}
    assert set(results_of(tmp_path / "out")["data"]["categories"]) == {"_hidden", "a|b $x_{$ ü"}


def test_what_is_asked_twice_is_done_once(run, model_folder, data, tmp_path):
    assert run("evaluate", model_folder / "codec", data, "-o", tmp_path, *QUICK, "-b", "0.9", "-b", "0.9")[0] == 0
    assert sum(row["category"] == "all" for row in results_of(tmp_path)["results"]) == 2  # and the identity


def test_another_evaluation_is_not_mixed_in(run, model_folder, data, tmp_path):
    command = ("evaluate", model_folder / "codec", data, "-o", tmp_path / "out", *QUICK)
    assert run(*command, "-b", "0.9")[0] == 0
    code, _, lines = run(*command, "-b", "1.8")
    assert code == 2 and lines[-1].endswith("holds another run (systems differ); --force begins anew")
    assert row_of(results_of(tmp_path / "out"), "encodec", 0.9)
    assert run(*command, "-b", "1.8", "--force")[0] == 0
    assert {row["kbps"] for row in results_of(tmp_path / "out")["results"]} == {1.8, None}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    code, _, lines = run("evaluate", model_folder / "codec", data, "-o", tmp_path / "mine", *QUICK)
    assert code == 2 and "holds other things" in lines[-1]


def test_a_bad_clip_is_named_and_the_others_are_measured(run, model_folder, data, tmp_path):
    bad = shutil.copytree(data, tmp_path / "bad")
    (bad / "speech" / "broken.wav").write_bytes(b"RIFF")
    assert run("evaluate", model_folder / "codec", bad, "-o", tmp_path / "out", *QUICK)[0] == 0
    results = results_of(tmp_path / "out")
    assert results["data"]["clips"] == 3 and list(results["data"]["failed"]) == ["speech/broken.wav"]
    assert results["data"]["failed"]["speech/broken.wav"].startswith("speech/broken.wav: not readable as audio")
    (tmp_path / "worse").mkdir()
    shutil.copy(bad / "speech" / "broken.wav", tmp_path / "worse")
    code, _, lines = run("evaluate", model_folder / "codec", tmp_path / "worse", "-o", tmp_path / "none", *QUICK)
    assert code == 2 and "none of 1 clips could be read, the first: broken.wav" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-b", "7"), "bandwidth is 7 kbps, allowed: 0.9, 1.8, 3.6"),
        (("--metric", "snr"), "metric is 'snr', allowed: si_snr"),
        (("--anchor", "flac@6"), "anchor is 'flac@6', allowed: opus@KBPS, mp3@KBPS"),
        (("--anchor", "opus@6."), "anchor is 'opus@6.', allowed: opus@KBPS, mp3@KBPS"),
        (("--anchor", "opus@257"), "opus at 257 kbps, allowed: 1 to 256 for this model's audio"),
        (("--anchor", "mp3@320"), "mp3 at 320 kbps, allowed: 8 to 160 for this model's audio"),
        (("--lm", "bundled"), "the language model"),
        (("--most-seconds", "0"), "most_seconds is 0, allowed: above 0"),
        (("--most-seconds", "nan"), "most_seconds is nan, allowed: above 0"),
        (("--least-seconds", "-1"), "least_seconds is -1, allowed: 0 or more"),
        (("--least-seconds", "99"), "none of 3 clips is left, allowed: some of at least 99 s"),
        (("--device", "abacus"), "device is 'abacus'"),
    ],
)
def test_refusals(run, model_folder, data, tmp_path, arguments, message):
    code, _, lines = run("evaluate", model_folder / "codec", data, "-o", tmp_path / "out", *arguments)
    assert code == 2 and message in lines[-1] and not (tmp_path / "out").exists()


def test_without_scipy_nothing_is_begun(run, model_folder, data, tmp_path, monkeypatch):
    version = importlib.metadata.version

    def absent(name):
        if name == "scipy":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    code, _, lines = run("evaluate", model_folder / "codec", data, "-o", tmp_path / "out", *QUICK)
    assert code == 2 and lines[-1].endswith('evaluation needs scipy: pip install "modeling-encodec[eval]"')
    assert not (tmp_path / "out").exists()


# ---- systems --------------------------------------------------------------------------------------------------------


@with_opus
@pytest.mark.parametrize("rate", [24000, 32000])
def test_opus_is_counted_by_its_file_and_comes_back_in_place(rate):
    audio, _ = read_audio(next(iter(systems_clips())), rate, 1)
    low, high = (systems.Program("opus", kbps, rate, 1).code(audio) for kbps in (12, 48))
    for coded, kbps in ((low, 12), (high, 48)):
        assert coded.audio.shape == audio.shape
        assert 0.7 * kbps < 8 * coded.bytes / (audio.shape[1] / rate) / 1000 < 1.6 * kbps
    ratios = [si_snr(torch.from_numpy(audio), torch.from_numpy(coded.audio)).item() for coded in (low, high)]
    assert 5 < ratios[0] < ratios[1]  # a delay of some samples would leave nothing of it


def systems_clips():
    from modeling_encodec.demo.table import demo_clips

    return demo_clips()


def test_missing_programs_are_named(small_models, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    systems._ffmpeg_has.cache_clear()
    found, missing = systems.make_systems(small_models["24khz"], original=tmp_path)
    systems._ffmpeg_has.cache_clear()
    assert {system.name for system in found} == {"encodec", "identity"}
    assert missing["opus@6"] == "neither ffmpeg with libopus nor opusenc and opusdec are installed"
    assert missing["mp3@64"] == "ffmpeg with libmp3lame is not installed"
    assert missing["original"] == "encodec_24khz-d7cc33bc.th is not at hand"
    assert systems.make_systems(small_models["32khz"])[1]["original"] == "has no model of 32000 Hz and 1 channels"


def test_a_program_that_fails_says_so(tmp_path):
    with pytest.raises(RuntimeError, match="false failed"):
        systems._run(["false"])


@pytest.mark.parametrize("name", ["24khz", "48khz"])
def test_the_original_package_beside_ours(name, released_models):
    if import_encodec() is None:
        pytest.skip("the encodec package is not installed")
    model = released_models[name]
    audio = synthetic(model, 1.3).numpy()
    ours = systems.Codec(model, 6.0).code(audio)
    theirs = systems.Original(original_model(model), 6.0).code(audio)
    np.testing.assert_allclose(theirs.audio, ours.audio, atol=1e-4)
    ours = len(compress(model, audio, 6.0, version=0, model_name=f"encodec_{name}"))
    assert theirs.bytes == ours - len(', "fp": "0123456789abcdef"')


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["24khz", "48khz"])
def test_codebook_use_counts_codes_and_no_padding(name, small_models, tmp_path):
    model = small_models[name]
    audio = synthetic(model, 2.3)
    soundfile.write(tmp_path / "a.wav", audio.numpy().T, model.config.sampling_rate, subtype="FLOAT")
    coded = model.encode(audio[None], num_quantizers=model.config.num_quantizers)
    counts = count_codes(list_clips(tmp_path)[0].read(model.config.sampling_rate, len(audio)), model)
    frames = sum(model.config.num_frames(stop - start) for start, stop in model.config.chunk_spans(audio.shape[1]))
    assert (counts.sum(1) == frames).all()
    for codebook, row in enumerate(counts):
        seen = Counter()
        for chunk, (start, stop) in zip(coded.audio_codes, model.config.chunk_spans(audio.shape[1])):
            seen.update(chunk[0, codebook, : model.config.num_frames(stop - start)].tolist())
        assert {entry: count for entry, count in enumerate(row.tolist()) if count} == seen


def test_perplexity_of_known_codes():
    use = report._codebook_use(np.array([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]]))
    assert [book["used"] for book in use] == [1, 0.25, 0.5]
    assert [book["perplexity"] for book in use] == pytest.approx([4, 1, 2], abs=1e-3)


def test_the_picture_needs_no_anchors_and_no_metrics(tmp_path):
    rows = [{"system": "encodec", "kbps": 6, "category": "all", "measured_kbps": 6.1, "lm_kbps": None, "metrics": {}}]
    results = {"model": {"name": "m"}, "method": {"metrics": {"si_snr": ""}}, "results": rows}
    for names in ({}, {"si_snr": "", "visqol_audio": ""}):
        results["method"]["metrics"] = names
        save_figure(plot_rate_distortion(results), tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
