"""The command line: round trips, pipes, folders, and one line with exit code 2 for everything that goes wrong."""

import io
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import noise

from modeling_encodec.checkpoints import bundled_checkpoint
from modeling_encodec.cli import main
from modeling_encodec.evaluation.metrics import si_snr
from modeling_encodec.processors.audio import read_audio


@pytest.fixture
def clip(tmp_path):
    """One second of stereo at 44.1 kHz, as a user has it."""
    path = tmp_path / "a clip.wav"
    soundfile.write(path, noise(1, 2, 44100)[0].T.numpy(), 44100)
    return path


def fails(result, *words):
    code, _, lines = result
    assert code == 2 and len(lines) == 1, result
    assert all(word in lines[0] for word in words), lines
    return True


def test_there_and_back(run, clip, tmp_path):
    assert run("encode", clip, tmp_path / "a.ecdc", "-b", "12")[0] == 0
    assert run("decode", tmp_path / "a.ecdc", tmp_path / "b.wav")[0] == 0
    original, _ = read_audio(clip, 24000, 1)
    decoded, rate = read_audio(tmp_path / "b.wav")
    assert rate == 24000 and decoded.shape == original.shape == (1, 24000)
    code, out, _ = run("info", tmp_path / "a.ecdc")
    assert code == 0 and "encodec_24khz_c16" in out and "1.00 s" in out and "16" in out


def test_default_bandwidth_is_six(run, clip, tmp_path):
    assert run("encode", clip, tmp_path / "a.ecdc")[0] == 0
    assert "codebooks      8" in run("info", tmp_path / "a.ecdc")[1]


def test_a_model_of_ones_own(run, clip, tmp_path, small_models):
    small_models["48khz"].save_pretrained(tmp_path / "stereo")
    assert run("encode", clip, tmp_path / "a.ecdc", "--model", tmp_path / "stereo", "-b", "1.8")[0] == 0
    assert fails(run("decode", tmp_path / "a.ecdc", tmp_path / "b.flac"), "'stereo'", "known")
    assert fails(
        run("decode", tmp_path / "a.ecdc", tmp_path / "b.flac", "-m", bundled_checkpoint()), "'stereo'", "fingerprint"
    )
    assert not (tmp_path / "b.flac").exists()
    assert run("decode", tmp_path / "a.ecdc", tmp_path / "b.flac", "--model", tmp_path / "stereo")[0] == 0
    assert read_audio(tmp_path / "b.flac")[0].shape == (2, 48000)
    assert "stereo" in run("info", tmp_path / "a.ecdc", "--model", tmp_path / "stereo")[1]


def test_pipes(clip, tmp_path):
    command = [sys.executable, "-m", "modeling_encodec"]
    coded = subprocess.run([*command, "encode", "-", "-"], input=clip.read_bytes(), capture_output=True, timeout=120)
    assert coded.returncode == 0 and coded.stdout.startswith(b"ECDC"), coded.stderr
    decoded = subprocess.run([*command, "decode", "-", "-"], input=coded.stdout, capture_output=True, timeout=120)
    assert decoded.returncode == 0, decoded.stderr
    assert read_audio(io.BytesIO(decoded.stdout))[0].shape == (1, 24000)
    broken = subprocess.run([*command, "decode", "-", "-"], input=coded.stdout[:50], capture_output=True, timeout=120)
    assert broken.returncode == 2 and broken.stdout == b"" and broken.stderr.count(b"\n") == 1


def test_folders_keep_their_tree(run, clip, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("one.wav", "deep/two.FLAC"):
        soundfile.write(tmp_path / "in" / name, np.zeros(3000), 24000, format=name.split(".")[1].upper())
    (tmp_path / "in" / "notes.txt").write_text("not audio")
    assert run("encode", tmp_path / "in", clip, tmp_path / "out")[0] == 0
    made = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert made == ["a clip.ecdc", "deep/two.ecdc", "one.ecdc"]
    assert run("decode", tmp_path / "out", tmp_path / "back")[0] == 0
    assert (tmp_path / "back" / "deep" / "two.wav").is_file()


def test_one_bad_file_among_many_is_named_and_the_others_are_made(run, clip, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    code, _, lines = run("encode", tmp_path / "bad.wav", clip, tmp_path / "out")
    assert code == 2 and "bad.wav" in lines[0] and "1 of 2 files failed" in lines[-1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a clip.ecdc"]


def test_overwriting_only_with_force(run, clip, tmp_path):
    target = tmp_path / "a.ecdc"
    target.write_text("precious")
    assert fails(run("encode", clip, target), "exists", "--force") and target.read_text() == "precious"
    assert run("encode", clip, target, "--force")[0] == 0 and target.read_bytes().startswith(b"ECDC")
    output = tmp_path / "b.wav"
    output.write_text("precious")
    assert fails(run("decode", target, output), "exists") and output.read_text() == "precious"
    broken = tmp_path / "broken.ecdc"
    broken.write_bytes(target.read_bytes()[:100])
    assert fails(run("decode", broken, output, "--force"), "broken.ecdc", "ends inside a segment")
    assert output.read_text() == "precious"  # nothing half-written, not even with --force


def test_force_is_no_licence_to_destroy(run, clip, tmp_path):
    sound = clip.read_bytes()
    assert fails(run("encode", clip, clip, "--force"), "both input and output") and clip.read_bytes() == sound
    (tmp_path / "real.ecdc").write_text("old")
    (tmp_path / "link.ecdc").symlink_to(tmp_path / "real.ecdc")
    assert run("encode", clip, tmp_path / "link.ecdc", "--force")[0] == 0
    assert (tmp_path / "link.ecdc").is_symlink() and (tmp_path / "real.ecdc").read_bytes().startswith(b"ECDC")
    os.mkfifo(tmp_path / "pipe.ecdc")
    with open(os.open(tmp_path / "pipe.ecdc", os.O_RDWR), "rb") as pipe:
        assert run("encode", clip, tmp_path / "pipe.ecdc", "--force")[0] == 0
        assert pipe.read(4) == b"ECDC" and stat.S_ISFIFO((tmp_path / "pipe.ecdc").stat().st_mode)


def test_a_failure_leaves_no_folder(run, tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    assert fails(run("encode", tmp_path / "bad.wav", tmp_path / "new" / "x.ecdc"), "bad.wav")
    assert fails(run("demo", tmp_path / "bad.wav", "--out", tmp_path / "new"), "bad.wav")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.wav"]


def test_demo_refuses_what_would_overwrite(run, clip, tmp_path):
    assert fails(run("demo", clip, "--out", tmp_path), "exists", "--force")
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / clip.name
    twin.write_bytes(clip.read_bytes())
    assert fails(run("demo", clip, twin, "--out", tmp_path / "new"), "different names")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["encode", "CLIP", "x.ecdc", "-b", "5"], ["bandwidth is 5 kbps", "1.5, 3, 6, 12"]),
        (["encode", "CLIP", "x.ecdc", "-b", "many"], ["--bandwidth"]),
        (["encode", "none.wav", "x.ecdc"], ["none.wav", "no such file"]),
        (["encode", "CLIP"], ["IN... OUT"]),
        (["encode", "CLIP", "x.ecdc", "--model", "no/such/place/there"], ["no/such/place/there"]),
        (["encode", "CLIP", "x.ecdc", "--device", "abacus"], ["abacus"]),
        (["encode", "CLIP", "x.ecdc", "--device", "meta"], ["device is 'meta', allowed here: cpu"]),
        (["encode", "CLIP", "x.ecdc", "--device", "cuda:99"], ["device is 'cuda:99', allowed here: cpu"]),
        (["encode", "", "x.ecdc"], ["empty"]),
        (["encode", "CLIP", ""], ["empty"]),
        (["encode", "-", "CLIP", "out"], ["'-'"]),
        (["encode", "CLIP", "CLIP", "out"], ["two inputs"]),
        (["decode", "CLIP", "x.wav"], ["starts with b'RIFF'"]),
        (["info", "CLIP"], ["starts with b'RIFF'"]),
        (["info", "none.ecdc"], ["no such file"]),
        (["demo", "none.wav"], ["none.wav"]),
        (["frobnicate"], ["frobnicate"]),
        ([], ["command"]),
    ],
)
def test_a_users_error_is_one_line(arguments, words, run, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert fails(run(*[clip if argument == "CLIP" else argument for argument in arguments]), *words)
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.is_file()] == []


def test_unwritable_and_unknown_targets(run, clip, tmp_path):
    assert run("encode", clip, tmp_path / "a.ecdc")[0] == 0
    assert fails(run("decode", tmp_path / "a.ecdc", tmp_path / "b.xyz"), ".xyz")
    (tmp_path / "file").write_text("")
    assert fails(run("encode", clip, tmp_path / "file" / "a.ecdc"), "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a clip.wav", "a.ecdc", "file"]


def test_clipping_is_reported(run, tmp_path, bundled_model, monkeypatch):
    import torch

    from modeling_encodec.models.seanet_encodec import EncodecDecoder

    quiet = EncodecDecoder.forward
    monkeypatch.setattr(EncodecDecoder, "forward", lambda *a, **k: 100 * quiet(*a, **k), raising=False)
    soundfile.write(tmp_path / "a.wav", 0.5 * torch.sin(torch.arange(24000) / 20).numpy(), 24000)
    assert run("encode", tmp_path / "a.wav", tmp_path / "a.ecdc")[0] == 0
    code, _, lines = run("decode", tmp_path / "a.ecdc", tmp_path / "b.wav")
    assert code == 0 and "samples clipped" in lines[0] and "--rescale" in lines[0]
    assert run("decode", tmp_path / "a.ecdc", tmp_path / "c.wav", "--rescale")[2] == []


def test_help_of_every_command(capsys):
    for command in ("encode", "decode", "info", "demo"):
        assert main([command, "--help"]) == 0
        assert "Usage" in capsys.readouterr().out


def test_demo_writes_what_it_says(run, tmp_path):
    import torch

    pytest.importorskip("matplotlib")
    code, out, _ = run("demo", "--out", tmp_path / "demo")
    assert code == 0
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    kbps = ["1.5", "3", "6", "12"]
    made = {f"{clip}_{b}kbps{suffix}" for clip in ("speech", "music") for b in kbps for suffix in (".wav", ".ecdc")}
    assert names == made | {"speech_original.wav", "music_original.wav", "spectrograms.png"}
    assert (tmp_path / "demo" / "spectrograms.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in out.splitlines() if line.startswith(("speech", "music"))]
    assert len(rows) == 8
    for clip, bandwidth, size, with_lm, measured, *rest in rows:
        path = tmp_path / "demo" / f"{clip}_{bandwidth}kbps.ecdc"
        assert path.stat().st_size == int(size) > int(with_lm)
        assert float(measured) == pytest.approx(8 * int(size) / 5 / 1000, abs=1e-3)
        original, decoded = (
            torch.from_numpy(read_audio(tmp_path / "demo" / name)[0])
            for name in (f"{clip}_original.wav", f"{clip}_{bandwidth}kbps.wav")
        )
        assert float(rest[1]) == pytest.approx(si_snr(original, decoded).item(), abs=0.1) and float(rest[1]) > 3
