"""The web page without a browser: what it does with files, what it refuses, what the command says."""

import asyncio
import io
import json
import socket
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import clip, noise
from ecdc_files import make_lm, spoil

from modeling_encodec.bitstream.codes_file import EcdcWriter
from modeling_encodec.bitstream.compression import compress, decompress, read_codes
from modeling_encodec.demo.web.clips import Limits, code_clip, decode_file
from modeling_encodec.evaluation.loudness import equalise
from modeling_encodec.evaluation.metrics import si_snr
from modeling_encodec.processors.audio import read_audio


SMALL = Limits(seconds=3, megabytes=1)


@pytest.fixture
def model(small_models):
    return small_models["24khz"]


@pytest.fixture
def lm(lms):
    return lms["24khz"]


@pytest.fixture
def wav(tmp_path):
    path = tmp_path / "a clip.wav"
    soundfile.write(path, noise(1, 2, 44100)[0].T.numpy(), 44100)
    return path


def rms(audio) -> float:
    return float(np.sqrt(np.square(audio, dtype=np.float64).mean()))


# ---- clips ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["24khz", "48khz"])
def test_a_coded_clip_is_what_the_library_makes(name, wav, small_models, lms):
    model, lm = small_models[name], lms[name]
    coded = code_clip(model, wav, 3.6, lm=lm)
    audio, rate = read_audio(wav, model.config.sampling_rate, model.config.audio_channels)
    packed, with_lm = compress(model, audio, 3.6), compress(model, audio, 3.6, lm)
    assert coded.data == with_lm and coded.lm_bytes == len(with_lm) and coded.packed_bytes == len(packed)
    assert np.array_equal(coded.audio, audio) and coded.sampling_rate == rate
    assert np.array_equal(coded.codes, read_codes(io.BytesIO(with_lm), model, lm))
    decoded = decompress(with_lm, model, lm)[0]
    assert np.array_equal(coded.decoded, decoded.numpy())
    assert coded.si_snr == pytest.approx(si_snr(torch.from_numpy(audio), decoded).mean().item())
    assert coded.seconds == 1.0 and coded.pcm_bytes == 2 * rate * model.config.audio_channels
    assert coded.kbps(len(packed)) == pytest.approx(8 * len(packed) / 1000)
    assert coded.file_name == "a clip_3.6kbps_lm.ecdc"
    without = code_clip(model, wav, 3.6)
    assert without.data == packed and without.lm_bytes is None and without.file_name == "a clip_3.6kbps.ecdc"


@pytest.mark.parametrize(
    ("name", "rate", "channels", "samples", "options"),
    [
        ("telephone.wav", 8000, 1, 8000, {}),
        ("studio.flac", 96000, 2, 96000, {"subtype": "PCM_24"}),
        ("short.wav", 24000, 1, 240, {}),
        ("one sample.wav", 48000, 1, 1, {}),
        ("float.wav", 24000, 1, 24000, {"subtype": "FLOAT"}),
        ("vorbis.ogg", 44100, 2, 44100, {}),
        ("layer3.mp3", 44100, 2, 44100, {}),
        ("really flac.wav", 24000, 1, 24000, {"format": "FLAC"}),
        ("größe 音.wav", 24000, 1, 24000, {}),
        ("many.wav", 24000, 6, 24000, {}),
    ],
)
def test_audio_of_any_kind_is_coded(name, rate, channels, samples, options, model, tmp_path):
    soundfile.write(tmp_path / name, noise(1, channels, samples)[0].T.numpy(), rate, **options)
    coded = code_clip(model, tmp_path / name, 1.8)
    assert coded.name == name and coded.data.startswith(b"ECDC")
    assert coded.decoded.shape == coded.audio.shape and np.isfinite(coded.decoded).all()
    if not name.endswith(".mp3"):  # which is padded
        assert coded.audio.shape == (1, max(1, samples * 24000 // rate))


def match_loudness(original: np.ndarray, decoded: np.ndarray) -> tuple:
    """Both as the page plays them, and their gains."""
    heard, gains = equalise({"original": original, "decoded": decoded}, "original")
    return *heard.values(), *gains.values()


def test_silence_has_no_quality_and_stays_silent(model, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(4800), 24000)
    coded = code_clip(model, tmp_path / "silence.wav", 1.8)
    assert coded.si_snr is None
    original, decoded, *gains = match_loudness(coded.audio, coded.decoded)
    assert not original.any() and gains[0] == gains[1] <= 1 and np.abs(decoded).max() <= 0.991


def test_both_versions_are_equally_loud_and_none_clips():
    time = np.arange(24000) / 24000
    tone, other = (np.sin(2 * np.pi * f * time, dtype=np.float32)[None] for f in (300, 500))
    original, decoded, gain, change = match_loudness(0.5 * tone, 0.1 * other)
    assert np.array_equal(original, 0.5 * tone) and gain == 1 and change == pytest.approx(5, rel=1e-4)
    assert rms(decoded) == pytest.approx(rms(original), rel=1e-5)
    spiky = 0.01 * other
    spiky[0, 100] = 0.9
    original, decoded, gain, change = match_loudness(1.5 * tone, spiky)  # would clip by either
    assert rms(decoded) == pytest.approx(rms(original), rel=1e-5) and gain < 0.66
    assert max(np.abs(original).max(), np.abs(decoded).max()) == pytest.approx(0.99, rel=1e-5)
    assert match_loudness(0.5 * tone, 0 * tone)[2:] == (1, 1)
    stereo = np.concatenate([tone, 0 * tone])  # the power of all channels counts
    assert match_loudness(0.5 * stereo, 0.25 * stereo)[3] == pytest.approx(2)


# ---- what is refused ------------------------------------------------------------------------------------------------


def write_lying(path, rate):
    """A few samples that claim to be at another rate."""
    soundfile.write(path, np.zeros(8000), rate)


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("text.wav", lambda p: p.write_text("no audio"), "text.wav: not readable as audio"),
        ("empty.wav", lambda p: p.write_bytes(b""), "empty.wav is empty"),
        ("nothing.wav", lambda p: soundfile.write(p, np.zeros(0), 24000), "nothing.wav: holds no audio"),
        ("nan.wav", lambda p: soundfile.write(p, np.full(9, np.nan), 24000, subtype="FLOAT"), "NaN"),
        ("long.wav", lambda p: soundfile.write(p, np.zeros(3 * 8000 + 1), 8000), "allowed: up to 3 s"),
        ("slow.wav", lambda p: write_lying(p, 1), "slow.wav is 8000.0 s long, allowed: up to 3 s"),
        ("big.wav", lambda p: p.write_bytes(bytes(2**20 + 1)), "big.wav has 1.0 MB, allowed: up to 1 MB"),
        ("gone.wav", lambda p: None, "gone.wav: no such file"),
    ],
)
def test_a_bad_clip_is_refused_by_its_name(name, write, words, model, tmp_path):
    write(tmp_path / name)
    with pytest.raises((ValueError, OSError)) as caught:
        code_clip(model, tmp_path / name, 1.8, limits=SMALL)
    assert words in str(caught.value) and str(tmp_path) not in str(caught.value)


def test_a_length_that_the_file_does_not_tell_is_counted(model, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "piped.flac", np.zeros(24000 * 5), 24000)
    monkeypatch.setattr(soundfile.SoundFile, "frames", property(lambda self: 1 << 62))
    with pytest.raises(ValueError, match="piped.flac is .* long, allowed: up to 3 s"):
        code_clip(model, tmp_path / "piped.flac", 1.8, limits=SMALL)


@pytest.mark.parametrize(("seconds", "megabytes"), [(0, 1), (-1, 1), (float("nan"), 1), (1, 0), (1, float("inf"))])
def test_limits_are_above_zero(seconds, megabytes):
    with pytest.raises(ValueError, match="allowed: a finite number above 0"):
        Limits(seconds, megabytes)


# ---- .ecdc files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("name", ["24khz", "48khz"])
def test_a_decoded_file_is_what_the_library_decodes(name, version, small_models, tmp_path):
    model = small_models[name]
    data = compress(model, clip(model, 1.3), 3.6, version=version)
    (tmp_path / "a.ecdc").write_bytes(data)
    read = decode_file(model, tmp_path / "a.ecdc")
    assert np.array_equal(read.audio, decompress(data, model)[0].numpy())
    assert np.array_equal(read.codes, read_codes(io.BytesIO(data), model))
    assert read.description["format"] == f"ecdc, version {version}" and not read.damages
    assert int(read.description["samples"]) == read.audio.shape[1]


def test_the_language_models_file_too(file_24khz, model, lm, tmp_path):
    (tmp_path / "a.ecdc").write_bytes(file_24khz)
    read = decode_file(model, tmp_path / "a.ecdc", lm=lm)
    assert np.array_equal(read.audio, decompress(file_24khz, model, lm)[0].numpy())
    assert np.array_equal(read.codes, read_codes(io.BytesIO(file_24khz), model, lm))


def test_damage_is_silenced_and_told_with_its_time(file_24khz, model, lm, tmp_path):
    spoilt = spoil(file_24khz, 2, 3)
    (tmp_path / "spoilt.ecdc").write_bytes(spoilt)
    read = decode_file(model, tmp_path / "spoilt.ecdc", lm=lm)
    (line,) = read.damages
    assert "(0.51 s to 1.01 s)" in line and line in read.description["damage"]
    assert np.array_equal(read.audio, decompress(spoilt, model, lm, on_damage=lambda damage: None)[0].numpy())
    assert not read.audio[:, 12200:24200].any() and read.audio[:, :12000].any()
    assert (read.codes[:, 38:76] == -1).all() and (read.codes[:, :38] >= 0).all()
    (tmp_path / "cut.ecdc").write_bytes(file_24khz[:-100])
    assert any("has no end" in line for line in decode_file(model, tmp_path / "cut.ecdc", lm=lm).damages)


def hours(model, audio_length) -> bytes:
    """A short file of many hours, or of a length that only its segments tell."""
    file = io.BytesIO()
    writer = EcdcWriter(file, model, num_codebooks=1, model_name="small", audio_length=audio_length, file_id=1)
    writer.write(np.zeros((1, 2000), np.int64))
    return file.getvalue()


def test_a_bad_file_is_refused_by_its_reason(file_24khz, small_models, lms, tmp_path):
    model, lm = small_models["24khz"], lms["24khz"]
    other_lm = make_lm(model, loud=3.0)
    data = compress(model, clip(model, 1.0), 3.6)
    original = compress(model, clip(model, 1.0), 3.6, version=0)
    header = {"m": "encodec_24khz", "al": 24000, "nc": 6, "lm": False}
    foreign = original[:5] + len(text := json.dumps(header).encode()).to_bytes(4, "big") + text
    for name, content, its_lm, words in (
        ("text.ecdc", b"no codes at all", lm, "text.ecdc: not an .ecdc file: it starts with b'no c'"),
        ("empty.ecdc", b"", lm, "empty.ecdc is empty"),
        ("short.ecdc", data[:40], lm, "file ends inside the header"),
        ("first.ecdc", data[:120], lm, "no segment of the file could be read"),
        ("other.ecdc", compress(small_models["48khz"], clip(small_models["48khz"], 1.0)), lm, "fingerprint"),
        ("without.ecdc", file_24khz, None, "and none is given"),
        ("lm.ecdc", file_24khz, other_lm, "the one given has"),
        ("foreign.ecdc", foreign, lm, "foreign.ecdc was made with 'encodec_24khz', allowed: 'unnamed'"),
        ("cut.ecdc", original[:150], lm, "file ends inside the codes"),
        ("hours.ecdc", hours(model, 24000 * 36000), lm, "hours.ecdc is 36000.0 s long, allowed: up to 3 s"),
        ("piped.ecdc", hours(model, None), lm, "s long, allowed: up to 3 s"),
        ("big.ecdc", data + bytes(2**20), lm, "allowed: up to 1 MB"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as caught:
            decode_file(model, tmp_path / name, lm=its_lm, limits=SMALL)
        assert words in str(caught.value) and name in str(caught.value) and str(tmp_path) not in str(caught.value), (
            name,
            caught.value,
        )


# ---- page and command -----------------------------------------------------------------------------------------------


def parts(page) -> dict:
    return {block.elem_id: block for block in page.blocks.values() if getattr(block, "elem_id", None)}


def handler(page, button: str):
    """What a click on a button calls."""
    number = parts(page)[button]._id
    function = next(fn.fn for fn in page.fns.values() if (number, "click") in fn.targets)
    return lambda *inputs: asyncio.run(function(*inputs))


@pytest.fixture
def page(model, lm, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    from modeling_encodec.demo.web.page import build_page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")  # whatever the machine says
    return build_page(model, lm, SMALL)


def test_the_page_offers_what_the_model_has(page, model, small_models, wav):
    from modeling_encodec.demo.web.page import build_page

    found = parts(page)
    assert [value for _, value in found["bandwidth"].choices] == model.config.target_bandwidths
    assert found["lm"].visible and found["lm"].value is True
    assert not page.analytics_enabled and page.delete_cache
    stereo = build_page(small_models["48khz"])
    alone = parts(stereo)
    assert not alone["lm"].visible and alone["lm"].value is False
    assert [value for _, value in alone["bandwidth"].choices] == [1.8, 3.6] and alone["bandwidth"].value == 3.6
    _, _, original, decoded, *_ = handler(stereo, "encode")(str(wav), 3.6, False)
    assert soundfile.info(original).channels == soundfile.info(decoded).channels == 2


def test_the_page_shows_what_the_library_makes(page, model, lm, wav, tmp_path):
    _, facts, original, decoded, download, loudness, *pictures = handler(page, "encode")(str(wav), 3.6, True)
    coded = code_clip(model, wav, 3.6, lm=lm)
    assert download["value"].name == coded.file_name and download["value"].read_bytes() == coded.data
    for figure in (coded.packed_bytes, coded.lm_bytes, coded.pcm_bytes):
        assert f"{figure:,}" in facts
    assert f"{coded.si_snr:.1f} dB" in facts and f"{coded.pcm_bytes / coded.lm_bytes:.1f}" in facts
    levels = [rms(soundfile.read(path)[0]) for path in (original, decoded)]
    assert levels[0] == pytest.approx(levels[1], rel=1e-2) and "same RMS" in loudness
    assert all(path.read_bytes().startswith(b"\x89PNG") and tmp_path / "cache" in path.parents for path in pictures)
    _, facts, audio, *_ = handler(page, "decode")(str(download["value"]))
    assert "1.00 s" in facts and soundfile.info(audio).frames == 24000
    without = handler(page, "encode")(str(wav), 3.6, False)
    assert without[4]["value"].read_bytes() == compress(model, coded.audio, 3.6) and "language" not in without[1]


def test_errors_are_messages_and_no_markup(page, model, tmp_path):
    import gradio as gr

    for button, inputs, words in (
        ("encode", (None, 3.6, True), "there is no clip yet"),
        ("decode", (None,), "there is no file yet"),
    ):
        with pytest.raises(gr.Error) as caught:
            handler(page, button)(*inputs)
        assert words in caught.value.message
    path = tmp_path / "<img src=x onerror=alert(1)>.ecdc"
    path.write_bytes(b"")
    with pytest.raises(gr.Error) as caught:
        handler(page, "decode")(str(path))
    assert "&lt;img" in caught.value.message and "<" not in caught.value.message
    named = compress(model, torch.zeros(1, 4800), 1.8, model_name="<script>alert(1)</script>")
    path.write_bytes(named)
    assert "<script>" not in handler(page, "decode")(str(path))[1]
    assert "&lt;script&gt;" in handler(page, "decode")(str(path))[1]


def one_line(result, *words) -> None:
    code, _, lines = result
    assert code == 2 and len(lines) == 1 and all(word in lines[0] for word in words), result


def test_the_command_says_what_cannot_work(run, wav):
    pytest.importorskip("gradio")
    one_line(run("demo", wav, "--serve"), "--serve takes no clips")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        one_line(run("demo", "--serve", "--port", port), str(port), "127.0.0.1", "in use")
    one_line(run("demo", "--serve", "--port", 70000), "70000", "0-65535")
    one_line(run("demo", "--serve", "--host", "no.such.host.invalid"), "no.such.host.invalid")
    one_line(run("demo", "--serve", "--most-seconds", 0), "most seconds is 0")


def test_without_gradio_the_command_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in [name for name in sys.modules if name.startswith("modeling_encodec.demo.web.")]:
        monkeypatch.delitem(sys.modules, name)
    one_line(run("demo", "--serve"), "gradio", 'pip install "modeling-encodec[demo]"')
