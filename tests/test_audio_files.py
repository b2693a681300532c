"""Files are read to their true end, or refused: joined and chained ones, wrong sizes, estimated lengths."""

import io
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from modeling_encodec import AudioReader, EncodecConfig, read_audio
from modeling_encodec.evaluation.clips import list_clips
from modeling_encodec.processors.audio import join_blocks
from modeling_encodec.processors.audio_files import AudioFile
from modeling_encodec.processors.audio_streams import _mpeg_frame
from modeling_encodec.processors.audio_tokens import open_clip
from modeling_encodec.processors.corpus.clips import measure_clip, read_crop


RATE = 24000
PCM = ["WAV", "WAVEX", "RF64", "AIFF", "AU", "W64", "CAF", "SVX", "VOC", "NIST"]
KINDS = [*PCM, "FLAC", "MP3", "OGG", "OPUS"]
CONFIG = EncodecConfig(num_filters=2, hidden_size=16)


def encoded(kind: str, seed: int = 0, *, samples: int = 6007, rate: int = RATE, channels: int = 1, **options) -> bytes:
    """A file of noise; what a voc file rounds of its rate is the same in all."""
    noise = 0.1 * np.random.default_rng(seed).standard_normal((samples, channels))
    form = {"format": "OGG", "subtype": "OPUS"} if kind == "OPUS" else {"format": kind} | options
    file = io.BytesIO()
    soundfile.write(file, noise, rate, **form)
    return file.getvalue()


def of(data: bytes) -> np.ndarray:
    return read_audio(io.BytesIO(data))[0]


def patched(data: bytes, place: int, value: bytes) -> bytes:
    return data[:place] + value + data[place + len(value) :]


def reason(data: bytes) -> str:
    with pytest.raises(ValueError) as error:
        of(data)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_joined_files_are_read_whole_by_all(tmp_path, kind):
    parts = [encoded(kind, seed, samples=samples) for seed, samples in ((0, 6007), (1, 30011), (2, 501))]
    whole = np.concatenate([of(part) for part in parts], axis=1)
    data = b"".join(parts)
    path = tmp_path / f"both.{kind.lower()}"
    path.write_bytes(data)
    assert np.array_equal(of(data), whole) and np.array_equal(read_audio(path)[0], whole)
    with AudioReader(path, block_length=5000) as reader:
        assert reader.seconds == whole.shape[1] / reader.rate
        assert np.array_equal(join_blocks(reader), whole)
    with AudioFile(path) as file:
        assert file.known_frames == whole.shape[1] == file.count_frames()
        for start in (0, 1, 6006, 6007, 7000, 36018, whole.shape[1] - 1):
            file.seek(start)
            bits = 2e-7 if kind == "MP3" else 0  # by where the filter's memory begins
            np.testing.assert_allclose(file.read(3000).T, whole[:, start : start + 3000], rtol=0, atol=bits)
        file.seek(whole.shape[1] + 5)
        assert len(file.read(10)) == 0
    rate = reader.rate
    clip = measure_clip("clip", str(path))
    assert (clip.samples, clip.sampling_rate) == (whole.shape[1], rate)
    np.testing.assert_allclose(read_crop(clip, 5000, 3000, rate, 1), whole[:, 5000:8000], rtol=0, atol=2e-7)
    [listed] = list_clips(tmp_path)
    assert listed.seconds == whole.shape[1] / rate
    for location in (data, str(path)):
        seconds, blocks = open_clip(location, CONFIG)
        assert seconds == listed.seconds and np.array_equal(join_blocks(blocks), read_audio(path, RATE, 1)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_joined_files_of_other_rates_or_channels_are_refused(kind):
    other = 16000 if kind in ("MP3", "OPUS") else 22050
    said = reason(encoded(kind) + encoded(kind, rate=other)) if kind != "OPUS" else "joins 24000 Hz"
    assert "joins" in said and "24000 Hz" in said
    if kind != "SVX":  # it holds one channel
        assert "with 1 channels" in reason(encoded(kind) + encoded(kind, channels=2))


def test_files_of_several_kinds_may_be_joined_and_all_else_is_refused():
    parts = [encoded(kind, seed) for seed, kind in enumerate(("MP3", "FLAC", "WAV", "OGG", "AU"))]
    assert np.array_equal(of(b"".join(parts)), np.concatenate([of(part) for part in parts], axis=1))
    for kind in [*PCM, "OGG"]:
        said = reason(encoded(kind) + bytes(range(1, 251)) * 40)
        assert "header says" in said and "file holds" in said, kind


@pytest.mark.parametrize("kind", PCM)
def test_tags_and_padding_after_samples_are_no_audio(kind):
    data = encoded(kind, samples=6008)
    whole = of(data)
    id3 = b"ID3\4\0\0\0\0\1\0" + bytes(range(128))
    for tail in (
        b"TAG" + b"x" * 125,
        id3,
        bytes(512),
        b"\r\n",
        b"APETAGEX" + struct.pack("<IIII", 2000, 32, 0, 0) + bytes(8),
    ):
        assert np.array_equal(of(data + tail), whole), tail[:8]
    assert np.array_equal(of(data + id3 + data), np.concatenate([whole, whole], axis=1))


# ---- sizes in headers -----------------------------------------------------------------------------------------------


SIZES = {  # where a container writes the samples' size, in how many bytes of which order, and what that counts beside
    "WAV": (b"data", 4, 4, "little", 0),
    "AIFF": (b"SSND", 4, 4, "big", 8),
    "AU": (b".snd", 8, 4, "big", 0),
    "CAF": (b"data", 4, 8, "big", 4),
    "W64": (b"data\xf3\xac", 16, 8, "little", 24),
    "SVX": (b"BODY", 4, 4, "big", 0),
}


def with_size(kind: str, data: bytes, size: int) -> bytes:
    mark, after, count, order, more = SIZES[kind]
    size = size if size < 0 or size >= 1 << 31 else size + more
    return patched(data, data.index(mark) + after, size.to_bytes(count, order, signed=size < 0))


@pytest.mark.parametrize("kind", SIZES)
def test_a_size_of_samples_is_right_or_says_nothing_or_is_refused(kind):
    data = encoded(kind, samples=6008)
    bytes_ = 6008 * (1 if kind == "SVX" and soundfile.SoundFile(io.BytesIO(data)).subtype == "PCM_S8" else 2)
    whole = of(data)
    assert np.array_equal(of(with_size(kind, data, bytes_)), whole)
    unset = [-1] if kind in ("CAF", "W64") else [0xFFFFFFFF]
    for size in [*unset, 0]:
        if (kind, size) not in (("CAF", 0), ("W64", 0), ("AIFF", 0)):
            assert np.array_equal(of(with_size(kind, data, size)), whole), size
    for size in (2, 1000, bytes_ - 8, bytes_ + 8, 2 * bytes_):
        said = reason(with_size(kind, data, size))
        assert "header says" in said and "file holds" in said, size
        assert ("cut off" in said) == (size > bytes_)


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "SVX", "RF64"])
def test_the_size_of_the_whole_file_is_not_believed(tmp_path, kind):
    data = encoded(kind, samples=6008)
    whole = of(data)
    for size in (0, 36, 1000, len(data) * 2, 0x5FFFFFFF, 0xFFFFFFFF):
        path = tmp_path / "x.wav"
        path.write_bytes(patched(data, 4, size.to_bytes(4, "big" if kind in ("AIFF", "SVX") else "little")))
        assert np.array_equal(read_audio(path)[0], whole)
        assert measure_clip("x", str(path)).samples == 6008
        assert open_clip(str(path), CONFIG)[0] == 6008 / RATE


def test_a_size_that_went_round_4_gigabytes_is_refused(tmp_path):
    path = tmp_path / "x.wav"
    with path.open("wb") as file:
        file.write(encoded("WAV", samples=24000))
        file.truncate(44 + (1 << 32) + 48000)
    with pytest.raises(ValueError, match="header says 48000 bytes of samples, file holds 4295015296"):
        read_audio(path)
    with path.open("r+b") as file:  # but unset, it is read on with sizes of 64 bits
        file.seek(40)
        file.write(b"\xff" * 4)
    with AudioFile(path) as file:
        assert file.known_frames == (1 << 31) + 24000
        file.seek(1 << 31)
        assert len(file.read(30000)) == 24000


def test_a_second_chunk_of_samples_is_refused():
    data = encoded("WAV", samples=100)
    assert "several chunks" in reason(data + b"LIST" + struct.pack("<I", 4) + b"INFO" + data[36:])


@pytest.mark.parametrize("kind", [*PCM, "FLAC"])
def test_a_file_cut_off_anywhere_is_refused(kind):
    data = encoded(kind, samples=6008)
    for cut in (len(data) // 2, len(data) - 9):
        assert reason(data[:cut]), cut


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KINDS), st.integers(0, 119), st.integers(0, 255))
@example("WAV", 22, 0)
def test_any_damaged_header_is_read_or_refused_in_one_line(kind, place, value):
    try:
        of(patched(encoded(kind, samples=1000), place, bytes([value])))
    except ValueError as error:
        assert "\n" not in str(error)


# ---- streams --------------------------------------------------------------------------------------------------------


def frames_of(data: bytes) -> list[bytes]:
    """The frames of an MP3 file as soundfile writes it: the first is the encoder's tag."""
    frames, place = [], 0
    while (frame := _mpeg_frame(data[place : place + 4])) is not None:
        frames.append(data[place : place + frame.size])
        place += frame.size
    assert place == len(data) and b"Xing" in frames[0] or b"Info" in frames[0]
    return frames


def varied() -> bytes:
    """MP3 of which the frames become larger: a quiet second, then noise."""
    noise = np.random.default_rng(0).standard_normal(96000) * np.repeat([1e-3, 0.3, 0.5, 0.7], 24000)
    file = io.BytesIO()
    soundfile.write(file, noise, RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.1)
    return file.getvalue()


def test_mpeg_audio_without_a_count_is_read_to_its_end(tmp_path):
    frames = frames_of(varied())
    bare = b"".join(frames[1:])
    audio = of(bare)
    assert audio.shape[1] == 576 * (len(frames) - 1)
    assert AudioFile(bare).known_frames == audio.shape[1]
    path = tmp_path / "bare.mp3"
    path.write_bytes(bare)
    assert np.array_equal(read_audio(path)[0], audio)
    with soundfile.SoundFile(path) as estimated:
        assert estimated.frames != audio.shape[1]  # else this tests nothing
    # Joined after a file with a count, and cut in its last frame.
    with_count = b"".join(frames)
    assert of(with_count + bare).shape[1] == of(with_count).shape[1] + audio.shape[1]
    assert np.array_equal(of(bare[:-10]), audio[:, :-576])


def test_mpeg_audio_is_joined_with_tags_and_damage_between():
    data, other = varied(), encoded("MP3", 5)
    id3, old = b"ID3\4\0\0\0\0\1\0" + b"\xff\xfb\x90\x64" * 32, b"TAG" + b"x" * 125
    whole = np.concatenate([of(data), of(other)], axis=1)
    for between in (id3, old, old + id3, b"LYRICSBEGIN" + b"y" * 50 + b"LYRICS200", b"\0" * 300, b"?" * 100):
        assert np.array_equal(of(data + between + other), whole), between[:8]
        assert np.array_equal(of(id3 + data + between + other + between), whole), between[:8]
    assert "no audio" in reason(data + b"?" * 9000 + other)
    assert "no audio" in reason(data + b"?" * 100_000)


def test_mpeg_audio_of_fewer_frames_than_it_counts_is_cut_off():
    data = varied()
    said = reason(data[: len(data) // 2])
    assert "cut off: header says" in said and "file holds" in said


@pytest.mark.parametrize("channels", [1, 2])
def test_mpeg_audio_is_sought_to_the_sample(channels):
    counted = encoded("MP3", samples=150_000, channels=channels)
    for data in (counted, b"".join(frames_of(counted)[1:])):
        whole = of(data)
        for start in (1, 577, 40_000, 99_999, 149_000):
            with AudioFile(data) as file:
                file.seek(start)
                np.testing.assert_allclose(file.read(9000).T, whole[:, start : start + 9000], atol=2e-7)


@pytest.mark.parametrize("kind", ["OGG", "OPUS", "FLAC"])
def test_other_streams_are_sought_to_the_bit(kind):
    data = encoded(kind, samples=150_000, channels=2)
    whole = of(data)
    for start in (1, 577, 40_000, 99_999, 149_000):
        with AudioFile(data) as file:
            file.seek(start)
            assert np.array_equal(file.read(9000).T, whole[:, start : start + 9000]), start


def pages(data: bytes) -> list[bytes]:
    return [b"OggS" + page for page in data.split(b"OggS")[1:]]


def test_streams_at_once_and_cut_pages_of_ogg_are_refused():
    one, two = pages(encoded("OGG", 0)), pages(encoded("OGG", 1))
    assert "2 streams" in reason(b"".join([one[0], two[0], *one[1:], *two[1:]])).replace("several", "2")
    said = reason(b"".join(one)[:-10])
    assert "cut off" in said and "file holds" in said


def flac_total(data: bytes, total: int) -> bytes:
    packed = int.from_bytes(data[18:26], "big") >> 36 << 36 | total
    return patched(data, 18, packed.to_bytes(8, "big"))


@pytest.mark.parametrize("samples", [1, 17, 4096, 6007, 30_000])
def test_flac_is_read_to_its_end_whatever_it_counts(samples):
    data = encoded("FLAC", samples=samples)
    whole = of(data)
    assert whole.shape == (1, samples) and AudioFile(data).known_frames == samples
    tag = b"TAG" + b"x" * 125
    for total in (0, max(1, samples // 2)):
        if total != samples:
            wrong = flac_total(data, total)
            assert AudioFile(wrong).known_frames is None and AudioFile(wrong).count_frames() == samples
            assert np.array_equal(of(wrong), whole) and np.array_equal(of(wrong + tag), whole)
            assert np.array_equal(of(wrong + data), np.concatenate([whole, whole], axis=1))
            with AudioFile(wrong) as file:
                file.seek(samples - 1)
                assert len(file.read(10)) == 1
    assert np.array_equal(of(data + tag), whole)
    assert reason(flac_total(data, samples + 5000)).endswith(
        f"header says {samples + 5000} samples, file holds {samples}"
    )


def test_flac_of_silence_has_a_short_last_frame():
    file = io.BytesIO()
    soundfile.write(file, np.zeros(9000), RATE, format="FLAC")
    assert AudioFile(file.getvalue()).known_frames == 9000
