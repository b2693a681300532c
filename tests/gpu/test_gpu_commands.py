"""The commands with `--device`: what they write is what they write on the CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import soundfile
from conftest import clip
from corpus_files import write_corpus
from devices import REAL


CUDA = pytest.mark.parametrize("where", ["cuda", pytest.param("cuda:1", marks=pytest.mark.slow)])
NAMES = pytest.mark.parametrize("name", ["24khz", pytest.param("48khz", marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_models, lms) -> Path:
    """Models, and clips of two rates."""
    place = tmp_path_factory.mktemp("commands")
    for name in ("24khz", "48khz"):
        small_models[name].save_pretrained(place / name)
        lms[name].save_pretrained(place / f"lm_{name}")
        audio = clip(small_models[name], 1.3)
        soundfile.write(place / f"{name}.wav", audio.T.numpy(), small_models[name].config.sampling_rate)
    (place / "clips" / "speech").mkdir(parents=True)
    (place / "clips" / "music").mkdir()
    for number, kind in enumerate(("speech", "music", "music")):
        audio = clip(small_models["24khz"], 0.6, seed=number)[0].numpy()
        soundfile.write(place / "clips" / kind / f"{number}.wav", audio, 24000)
    return place


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), long_seconds=12)


@pytest.fixture(autouse=True)
def enough_devices(request, device):
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("where") == "cuda:1":
        request.getfixturevalue("second_device")


def succeed(result) -> str:
    code, out, err = result
    assert code == 0, err
    return out


@CUDA
@NAMES
def test_encode_and_decode(run, folder, tmp_path, name, where):
    audio, models = folder / f"{name}.wav", ("-m", folder / name, "--lm-model", folder / f"lm_{name}")
    for device in (where, "cpu"):
        coded = tmp_path / f"{device}.ecdc"
        succeed(run("encode", audio, coded, *models, "--device", device))
        assert run("decode", coded, tmp_path / f"{device}.wav", *models, "--device", device)[0] == 0
    if not REAL:
        assert (tmp_path / f"{where}.ecdc").read_bytes() == (tmp_path / "cpu.ecdc").read_bytes()
    succeed(run("decode", tmp_path / "cpu.ecdc", tmp_path / "there.wav", *models, "--device", where))
    succeed(run("decode", tmp_path / f"{where}.ecdc", tmp_path / "here.wav", *models))
    expected = soundfile.read(tmp_path / "cpu.wav")[0]
    for other in ("there.wav", f"{where}.wav", "here.wav"):
        found = soundfile.read(tmp_path / other)[0]
        assert found.shape == expected.shape
        if not (REAL and other != "there.wav"):
            assert np.abs(found - expected).max() < 1e-3


def tokens_of(folder: Path) -> dict:
    """Name to codes, scales and length."""
    files = sorted((folder / "data").glob("*.parquet"))
    rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
    return {row["name"]: (row["codes"], row.get("scales"), row["audio_length"]) for row in rows}


def assert_same_tokens(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, (codes, scales, length) in theirs.items():
        assert ours[name][2] == length
        if scales is not None:
            assert np.allclose(ours[name][1], scales, rtol=1e-5)
        other = np.asarray(codes) != np.asarray(ours[name][0])
        assert other.mean() <= (0.02 if REAL else 0), name


@CUDA
@NAMES
def test_tokenize(run, folder, corpus, tmp_path, name, where):
    bandwidth = 1.8
    for device in (where, "cpu"):
        command = ["tokenize", corpus, tmp_path / device, "-m", folder / name, "-b", bandwidth, "--workers", 0]
        succeed(run(*command, "--batch-seconds", 5, "--device", device))
    assert_same_tokens(tokens_of(tmp_path / where), tokens_of(tmp_path / "cpu"))
    skipped = [(tmp_path / device / "skipped.jsonl").read_text() for device in (where, "cpu")]
    assert skipped[0] == skipped[1] != ""
    told = succeed(run("tokenize", "verify", tmp_path / "cpu", "--audio", corpus, "-m", folder / name, "--share", 1,
                       "--device", where))  # fmt: skip
    assert "coded again" in told


def test_tokenize_takes_the_gpu_by_itself(run, folder, corpus, tmp_path, device):
    if not device.real:
        device.counts.reset()
    succeed(run("tokenize", corpus, tmp_path / "out", "-m", folder / "24khz", "-b", 1.8, "--workers", 0))
    assert device.real or device.counts.launches > 100


@CUDA
def test_evaluate(run, folder, tmp_path, where):
    results = {}
    for device in (where, "cpu"):
        out = tmp_path / device.replace(":", "_")
        quick = ("--metric", "si_snr", "--metric", "mel_distance", "--anchor", "none", "--lm", folder / "lm_24khz")
        succeed(run("evaluate", folder / "24khz", folder / "clips", *quick, "--out", out, "--device", device))
        results[device] = json.loads((out / "evaluation.json").read_text())
    ours, theirs = (numbers_in(results[device]) for device in (where, "cpu"))
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=0.05 if REAL else 1e-3, abs=1e-3), key


def numbers_in(value, place: str = "") -> dict[str, float]:
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in numbers_in(item, f"{place}/{key}").items()}
    return {place: value} if isinstance(value, (int, float)) and not isinstance(value, bool) else {}


def launch(count: int, *arguments) -> list[subprocess.CompletedProcess]:
    """So many processes of one run, as `torchrun` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("pretended_process.py")
    tests = os.pathsep.join([str(script.parent), os.environ.get("PYTHONPATH", "")])
    about = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": tests}
    started = []
    for rank in range(count):
        environment = os.environ | {key: str(value) for key, value in about.items()}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
    done = []
    for process in started:
        out, err = process.communicate(timeout=300)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


@pytest.mark.slow
@pytest.mark.skipif(REAL, reason="processes with pretended GPUs")
@pytest.mark.parametrize("options", [(), ("--device", "cuda")])
def test_three_processes_on_two_gpus_tokenize(run, folder, corpus, tmp_path, options):
    command = ["tokenize", corpus, tmp_path / "out", "-m", folder / "24khz", "-b", 1.8, "--shard-rows", 2]
    for done in launch(3, *command, *options, "--workers", 0):
        assert done.returncode == 0, done.stderr
    succeed(run("tokenize", corpus, tmp_path / "cpu", "-m", folder / "24khz", "-b", 1.8, "--device", "cpu"))
    assert_same_tokens(tokens_of(tmp_path / "out"), tokens_of(tmp_path / "cpu"))


@pytest.mark.slow
@pytest.mark.skipif(REAL, reason="processes with pretended GPUs")
def test_three_processes_on_two_gpus_evaluate(folder, tmp_path):
    quick = ("--metric", "si_snr", "--anchor", "none", "--out", tmp_path / "out", "--device", "cuda")
    done = launch(3, "evaluate", folder / "24khz", folder / "clips", *quick)
    assert [process.returncode for process in done] == [0, 0, 0], [process.stderr for process in done]
    assert (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("encode", "cuda:7"),
        ("encode", "quantum"),
        ("decode", "meta"),
        ("evaluate", "quantum"),
        ("tokenize", "cuda:7"),
        ("verify", "quantum"),
    ],
)
def test_absent_devices_in_one_line(run, folder, corpus, tmp_path, command, name):
    coded = tmp_path / "a.ecdc"
    coded.write_bytes(b"none")
    arguments = {
        "encode": ["encode", folder / "24khz.wav", tmp_path / "b.ecdc", "-m", folder / "24khz"],
        "decode": ["decode", coded, tmp_path / "b.wav", "-m", folder / "24khz"],
        "evaluate": ["evaluate", folder / "24khz", folder / "clips", "--out", tmp_path / "e"],
        "tokenize": ["tokenize", corpus, tmp_path / "t", "-m", folder / "24khz", "-b", 1.8],
    }
    if command == "verify":
        succeed(run(*arguments["tokenize"], "--workers", 0, "--device", "cpu"))
        arguments["verify"] = ["tokenize", "verify", tmp_path / "t", "--audio", corpus, "-m", folder / "24khz"]
    if command == "decode":
        succeed(run(*arguments["encode"][:3], "-m", folder / "24khz"))
        arguments["decode"][1] = tmp_path / "b.ecdc"
    code, _, err = run(*arguments[command], "--device", name)
    assert code == 2 and len(err) == 1, err
    assert f"device is '{name}', allowed here: cpu, cuda:0" in err[0]
