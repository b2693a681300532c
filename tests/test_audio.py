"""Audio files, rates, channels and clipping."""

import io

import numpy as np
import pytest
import soundfile
import soxr
from conftest import noise

from modeling_encodec.processors.audio import match_channels, read_audio, resample, write_audio


def tone(rate: int, seconds: float = 1.0, channels: int = 1) -> np.ndarray:
    time = np.arange(int(rate * seconds)) / rate
    return np.stack([0.5 * np.sin(2 * np.pi * (440 + 220 * c) * time) for c in range(channels)]).astype(np.float32)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".opus", ".mp3"])
def test_written_is_read(suffix, tmp_path):
    audio = tone(48000, channels=2)
    assert not write_audio(tmp_path / f"a{suffix}", audio, 48000)
    read, rate = read_audio(tmp_path / f"a{suffix}")
    assert rate == 48000 and read.dtype == np.float32 and read.shape[0] == 2
    if suffix in (".wav", ".flac"):
        np.testing.assert_allclose(read, audio, atol=1 / 32768)


def test_file_objects(tmp_path):
    buffer = io.BytesIO()
    write_audio(buffer, tone(24000), 24000)
    buffer.seek(0)
    read, rate = read_audio(buffer)
    assert read.shape == (1, 24000) and rate == 24000


def test_rate_and_channels_are_brought_to_what_is_asked(tmp_path):
    stereo = tone(44100, channels=2)
    write_audio(tmp_path / "a.wav", stereo, 44100)
    read, rate = read_audio(tmp_path / "a.wav", 24000, 1)
    assert rate == 24000 and read.shape == (1, 24000)
    expected = soxr.resample(stereo.mean(0), 44100, 24000, quality="HQ")
    np.testing.assert_allclose(read[0], expected, atol=1e-3)


def test_resampling_does_not_alias():
    time = np.arange(44100) / 44100
    high = np.sin(2 * np.pi * 12500 * time).astype(np.float32)[None]  # above 24 kHz's 12 kHz
    assert np.abs(resample(high, 44100, 24000)[0, 500:-500]).max() < 1e-4


def test_resampling_keeps_a_sample_and_refuses_no_rate():
    assert resample(np.ones((1, 1), np.float32), 48000, 8000).shape == (1, 1)
    for rates in ((0, 24000), (24000, -1)):
        with pytest.raises(ValueError, match="allowed: at least 1"):
            resample(np.ones((1, 10), np.float32), *rates)


def test_channel_policy():
    stereo = tone(8000, 0.1, 2)
    np.testing.assert_allclose(match_channels(stereo, 1)[0], stereo.mean(0))
    np.testing.assert_array_equal(match_channels(stereo[:1], 2), np.stack([stereo[0], stereo[0]]))
    assert match_channels(stereo, 2) is stereo
    assert match_channels(tone(8000, 0.1, 6), 1).shape == (1, 800)
    with pytest.raises(ValueError, match="6 channels"):
        match_channels(tone(8000, 0.1, 6), 2)


def test_clipping_is_cut_and_told_never_wrapped(tmp_path):
    audio = np.array([[0.0, 1.5, -2.0, 0.5]], np.float32)
    clipping = write_audio(tmp_path / "a.wav", audio, 24000)
    assert clipping and clipping.samples == 2 and clipping.peak == 2.0 and not clipping.rescaled
    read, _ = soundfile.read(tmp_path / "a.wav")
    np.testing.assert_allclose(read, [0, 1, -1, 0.5], atol=1e-4)


def test_rescaling_keeps_the_shape(tmp_path):
    audio = np.array([[0.0, 1.5, -2.0, 0.5]], np.float32)
    assert write_audio(tmp_path / "a.wav", audio, 24000, rescale=True).rescaled
    read, _ = soundfile.read(tmp_path / "a.wav")
    np.testing.assert_allclose(read, audio[0] * 0.99 / 2, atol=1e-4)
    quiet = write_audio(tmp_path / "b.wav", 0.1 * audio, 24000, rescale=True)
    assert not quiet and not quiet.rescaled
    np.testing.assert_allclose(soundfile.read(tmp_path / "b.wav")[0], 0.1 * audio[0], atol=1e-4)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "not readable"), (b"RIFF....", "not readable"), (b"ECDC" * 100, "not readable")]
)
def test_what_is_no_audio_is_refused_by_name(content, message, tmp_path):
    path = tmp_path / "broken.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_audio(path)
    assert "broken.wav" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_empty_and_infinite_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_audio(tmp_path / "none.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 1)), 24000)
    with pytest.raises(ValueError, match="no audio"):
        read_audio(tmp_path / "empty.wav")
    with pytest.raises(ValueError, match="sampling_rate is 0 Hz, allowed: at least 1"):
        read_audio(tmp_path / "empty.wav", 0)
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan]), 24000, subtype="FLOAT")
    with pytest.raises(ValueError, match="NaN"):
        read_audio(tmp_path / "nan.wav")


@pytest.mark.parametrize("audio", [np.zeros(5), np.zeros((1, 0)), np.zeros((0, 5)), np.full((1, 5), np.nan)])
def test_nothing_is_left_of_what_cannot_be_written(audio, tmp_path):
    with pytest.raises(ValueError, match="allowed"):
        write_audio(tmp_path / "a.wav", audio, 24000)
    with pytest.raises(ValueError, match="cannot write audio as '.xyz'"):
        write_audio(tmp_path / "a.xyz", noise(1, 1, 10)[0].numpy(), 24000)
    assert list(tmp_path.iterdir()) == []
