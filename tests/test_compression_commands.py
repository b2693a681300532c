"""`.ecdc` version 1 on the command line: encode, decode, info, of sound files and damaged ones."""

import io

import pytest
import torch
from conftest import clip, noise
from ecdc_files import container_items, make_lm, places, spoil, streamed

from modeling_encodec.bitstream.inspection import describe
from modeling_encodec.models.fingerprints import lm_fingerprint, model_fingerprint
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM


@pytest.fixture
def folder(tmp_path, small_models, monkeypatch, capsys):
    """A clip of 25 s, of silence but for its start, and the models for it; the language model fits the silence."""
    import soundfile

    model = small_models["24khz"]
    audio = torch.zeros(1, 25 * 24000)
    audio[:, :3000] = noise(1, 1, 3000)[0]
    soundfile.write(tmp_path / "a.wav", audio[0].numpy(), 24000)
    model.save_pretrained(tmp_path / "codec")
    make_lm(model, audio[:, :100_000]).save_pretrained(tmp_path / "lm")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()  # progress bars
    return tmp_path


def test_command_line(run, folder):
    from modeling_encodec.processors.audio import read_audio

    models, coded = ("--model", "codec"), ("--model", "codec", "--lm-model", "lm")
    assert run("encode", "a.wav", "raw.ecdc", "-b", "3.6", *models) == (0, "", [])
    assert run("encode", "a.wav", "lm.ecdc", "-b", "3.6", *coded) == (0, "", [])
    raw, short = (folder / "raw.ecdc").read_bytes(), (folder / "lm.ecdc").read_bytes()
    assert len(short) < 0.8 * len(raw)

    lines = run("info", "lm.ecdc")[1].splitlines()
    fields = {line[2:16].strip(): line[17:] for line in lines[1:]}
    payload = sum(len(item.payload) for item in container_items(short)[1][:-1])
    model, lm = EncodecModel.from_pretrained("codec"), EncodecLM.from_pretrained("lm")
    assert lines[0] == "lm.ecdc" and fields["format"] == "ecdc, version 1" and fields["codebooks"] == "8"
    assert fields["model"] == f"codec ({model_fingerprint(model)})" and fields["samples"] == "600000"
    assert fields["language model"] == f"lm ({lm_fingerprint(lm)})"
    assert fields["segments"] == "3, 3 of them coded with the language model"
    assert (
        fields["bytes"] == f"{len(short)}: {payload} of codes, {len(short) - payload} of headers, checksums and scales"
    )
    assert fields["saving"] == f"{1 - payload / 11250:.1%} of 11250 bytes of packed codes" and "damage" not in fields
    assert fields["duration"] == "25.00 s" and fields["bit rate"].startswith(f"{8 * len(short) / 25000:.3f} kbps")
    assert "language model none" in run("info", "raw.ecdc")[1] and "saving" not in run("info", "raw.ecdc")[1]

    assert run("decode", "raw.ecdc", "raw.wav", *models) == (0, "", [])
    assert run("decode", "lm.ecdc", "lm.wav", "--strict", *coded) == (0, "", [])
    assert (folder / "raw.wav").read_bytes() == (folder / "lm.wav").read_bytes()
    for options, words in ((models, "'lm', known: "), (("--lm-model", "lm"), "'codec', known: ")):
        code, _, (line,) = run("decode", "lm.ecdc", "no.wav", *options)
        assert code == 2 and words in line and not (folder / "no.wav").exists()

    # Version 0 warns, and is read back.
    assert run("encode", "a.wav", "zero.ecdc", "--original", *models) == (0, "", [])
    assert (folder / "zero.ecdc").read_bytes()[4] == 0
    assert run("decode", "zero.ecdc", "zero.wav", *models)[0] == 0
    assert "version 0" in run("info", "zero.ecdc")[1]
    assert read_audio(folder / "zero.wav")[0].shape == (1, 600000)


def test_command_line_of_damaged_files(run, folder):
    from modeling_encodec.processors.audio import read_audio

    coded = ("--model", "codec", "--lm-model", "lm")
    assert run("encode", "a.wav", "a.ecdc", "-b", "3.6", *coded)[0] == 0
    data = (folder / "a.ecdc").read_bytes()
    (folder / "bad.ecdc").write_bytes(spoil(data, 1))
    report = "segment 1 (10.00 s to 20.00 s): checksum does not fit"
    code, _, (line,) = run("decode", "bad.ecdc", "strict.wav", "--strict", *coded)
    assert code == 2 and line == f"modeling-encodec: bad.ecdc: {report}" and not (folder / "strict.wav").exists()
    for conceal in ("silence", "repeat"):
        code, _, (line,) = run("decode", "bad.ecdc", f"{conceal}.wav", "--conceal", conceal, *coded)
        assert code == 0 and line == f"bad.ecdc: concealed: {report}"
        audio = read_audio(folder / f"{conceal}.wav")[0]
        assert audio.shape == (1, 600000) and (audio[:, 240000:480000] == 0).all() == (conceal == "silence")
    code, _, (line,) = run("decode", "bad.ecdc", "x.wav", "--conceal", "noise", *coded)
    assert code == 2 and "conceal is 'noise', allowed: silence, repeat" in line
    code, out, _ = run("info", "bad.ecdc")
    assert code == 0 and f"damage         {report}" in out and "segments       2, 2 of them" in out
    (folder / "gone.ecdc").write_bytes(spoil(data, 0, 1, 2))
    code, _, lines = run("decode", "gone.ecdc", "x.wav", *coded)
    assert code == 2 and "no segment of the file could be read" in lines[-1] and not (folder / "x.wav").exists()
    (folder / "head.ecdc").write_bytes(data[:10] + b"!" + data[11:])
    code, _, (line,) = run("decode", "head.ecdc", "x.wav", *coded)
    assert code == 2 and "header's checksum" in line
    assert run("info", "head.ecdc")[0] == 2


def test_hours_are_limited_and_the_limit_can_be_changed(run, folder):
    for version in ((), ("--original",)):
        assert run("encode", "a.wav", "a.ecdc", "-b", "0.9", "--model", "codec", "--force", *version)[0] == 0
        code, _, (line,) = run("decode", "a.ecdc", "no.wav", "--model", "codec", "--max-hours", "0.005")
        assert code == 2 and "0.01 h of audio, allowed: up to 0.005 h" in line and "--max-hours" in line
        assert not (folder / "no.wav").exists()
        assert run("decode", "a.ecdc", "b.wav", "--model", "codec", "--max-hours", "0.007", "--force")[0] == 0
    code, _, (line,) = run("decode", "a.ecdc", "no.wav", "--model", "codec", "--max-hours", "0")
    assert code == 2 and "max_seconds is 0" in line


def test_a_codec_is_no_language_model(run, folder):
    assert run("encode", "a.wav", "a.ecdc", "-b", "0.9", "--model", "codec", "--lm-model", "lm")[0] == 0
    code, _, lines = run("decode", "a.ecdc", "x.wav", "--model", "codec", "--lm-model", "codec")
    assert code == 2 and lines and not (folder / "x.wav").exists()


def test_describing_streams(small_models, lms):
    data = streamed(small_models["24khz"], lms["24khz"], clip(small_models["24khz"], 2.0), 0.4)
    assert describe(io.BytesIO(data), len(data))["samples"] == "48000"
    cut = data[: places(data)[2]]
    lines = describe(io.BytesIO(cut), len(cut))
    assert lines["samples"] == "not known, the end is missing" and lines["segments"].startswith("2, ")
    assert lines["damage"] == "segments from 2 on (0.80 s to the end): the file has no end"
