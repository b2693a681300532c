"""Files of any length: audio is read, coded, decoded and written in blocks, and the result is that of the whole."""

import io
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import soundfile
import torch
from conftest import make_model, noise
from ecdc_files import NAMES, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipe_ends import Sink, Trickle

from modeling_encodec.bitstream.compression import compress, compress_blocks, decompress, decompress_blocks
from modeling_encodec.bitstream.container import read_header
from modeling_encodec.checkpoints import bundled_checkpoint
from modeling_encodec.models import seanet_encodec
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.processors.audio import AudioReader, read_audio, resample, write_audio, write_audio_blocks
from modeling_encodec.streaming.streams import decode_blocks, encode_blocks


QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
SMALL = {"num_filters": 4, "hidden_size": 8, "codebook_size": 16, "num_lstm_layers": 1, "sampling_rate": 2000}
SMALL |= {"upsampling_ratios": [4, 5], "target_bandwidths": [2.4]}


def cut(whole, sizes: list[int]) -> list:
    """`whole` (..., T) in blocks of these sizes, over and over."""
    blocks, at, turn = [], 0, 0
    while at < whole.shape[-1]:
        blocks.append(whole[..., at : at + sizes[turn % len(sizes)]])
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    return blocks


def sound(channels: int, samples: int, seed: int = 0) -> np.ndarray:
    return noise(1, channels, samples, seed)[0].numpy()


def wav(audio: np.ndarray, rate: int, subtype: str = "FLOAT") -> io.BytesIO:
    file = io.BytesIO()
    soundfile.write(file, audio.T, rate, format="WAV", subtype=subtype)
    file.seek(0)
    return file


# ---- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [None, 1, 2])
@pytest.mark.parametrize("rates", [(24000, None), (24000, 24000), (44100, 24000), (8000, 48000), (48000, 32000)])
def test_blocks_are_what_is_read_at_once(rates, channels):
    given, wanted = rates
    for there in (1, 2):
        for samples in (1, 2, 999, 1000, 1001, 3000):
            audio = sound(there, samples, seed=samples)
            whole, rate = read_audio(wav(audio, given), wanted, channels)
            assert rate == (wanted or given) and whole.dtype == np.float32 and whole.shape[1] >= 1
            if channels in (None, there) and rate != given:
                assert np.array_equal(whole, resample(audio, given, rate))
            for size in (1 if samples < 100 else 7, 500, 1000, 3000, 4000):
                with AudioReader(wav(audio, given), wanted, channels, block_length=size) as reader:
                    blocks = list(reader)
                assert reader.sampling_rate == rate and reader.seconds == samples / given
                assert all(block.shape[1] and block.dtype == np.float32 for block in blocks)
                assert np.array_equal(np.concatenate(blocks, axis=1), whole), (samples, size)
                if rate == given:
                    assert [block.shape[1] for block in blocks] == [block.shape[1] for block in cut(whole, [size])]


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_coded_files_are_read_in_blocks(suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    write_audio(path, sound(2, 40000), 44100)
    for rate in (None, 24000):
        whole, _ = read_audio(path, rate)
        for size in (1000, 1152, 40000):
            with AudioReader(path, rate, block_length=size) as reader:
                assert np.array_equal(np.concatenate(list(reader), axis=1), whole)


def test_what_cannot_be_read_is_told_where_it_is_met(tmp_path):
    with refused(FileNotFoundError, match="no such file"):
        AudioReader(tmp_path / "none.wav")
    (tmp_path / "text.wav").write_text("no audio, but long enough to be taken for some")
    with refused(ValueError, match="text.wav: not readable as audio"):
        AudioReader(tmp_path / "text.wav")
    for rate in (24000, 8000):
        with AudioReader(wav(np.zeros((1, 0)), 24000), rate) as reader, refused(ValueError, match="holds no audio"):
            list(reader)
        for bad in (np.nan, np.inf):
            audio = sound(1, 5000)
            audio[0, 3456] = bad
            with AudioReader(wav(audio, 24000), rate, block_length=1000) as reader:
                found = 0
                with refused(ValueError, match="NaN or infinite"):
                    for block in reader:
                        found += block.shape[1]
                assert 0 < found <= 3000
    with AudioReader(wav(sound(6, 10), 24000), None, 2) as reader, refused(ValueError, match="6 channels"):
        list(reader)


# ---- writing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".aiff"])
def test_blocks_are_written_as_the_whole(suffix, rescale, tmp_path):
    for channels, loud in ((1, 0.5), (2, 4.0)):
        audio = sound(channels, 9000, seed=3) * np.float32(loud)
        whole = write_audio(tmp_path / f"whole{suffix}", audio, 24000, rescale=rescale)
        expected = (tmp_path / f"whole{suffix}").read_bytes()
        outside = int((np.abs(audio) > 1).sum())
        assert (whole.samples, whole.rescaled) == (outside, rescale and outside > 0)
        assert bool(outside) == (loud > 1) and whole.peak == np.abs(audio).max()
        for sizes in ([1, 8999], [1000], [9000], [4096, 3]):
            blocks = (block for block in cut(audio, sizes))
            assert write_audio_blocks(tmp_path / f"a{suffix}", blocks, 24000, rescale=rescale) == whole
            assert (tmp_path / f"a{suffix}").read_bytes() == expected
            if suffix == ".wav":
                file = io.BytesIO()
                assert write_audio_blocks(file, cut(audio, sizes), 24000, rescale=rescale) == whole
                assert file.getvalue() == expected


@pytest.mark.parametrize("rescale", [False, True])
def test_nothing_is_left_of_a_signal_that_goes_bad(rescale, tmp_path):
    good = sound(2, 500)
    bad = [np.full((2, 5), np.nan), sound(1, 5), sound(2, 5)[:, :0], np.zeros(5), np.zeros((2, 0))]
    for blocks in ([], *([good, good, block] for block in bad), *([block] for block in bad if block.shape != (1, 5))):
        with refused(ValueError, match="allowed"):
            write_audio_blocks(tmp_path / "a.wav", iter(blocks), 24000, rescale=rescale)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.wav").write_text("precious")

    def broken():
        yield good
        raise OSError("the other side is gone")

    with pytest.raises(OSError, match="gone"):
        write_audio_blocks(tmp_path / "a.wav", broken(), 24000, rescale=rescale)
    assert (tmp_path / "a.wav").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("suffix", [".ogg", ".opus"])
def test_long_blocks_are_written_in_every_format(suffix, tmp_path):
    """In a process of its own: libsndfile may overflow its stack."""
    program = f"""if True:
        import numpy as np
        from modeling_encodec.processors.audio import write_audio
        write_audio({str(tmp_path / "a")!r} + {suffix!r}, np.full((1, 3_000_000), 0.01, np.float32), 24000)"""
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0
    assert soundfile.info(tmp_path / f"a{suffix}").frames == 3_000_000


# ---- codes -------------------------------------------------------------------------------------------------------


def sizes_of(data, edges: list[int], samples: int) -> list[int]:
    near = [edge + by for edge in edges for by in (-1, 0, 1)]
    size = st.sampled_from(near) | st.integers(samples // 40 + 1, 2 * max(edges))
    return data.draw(st.lists(size, min_size=1, max_size=5))


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(QUICK, max_examples=12)
def test_blocks_are_coded_and_decoded_as_the_whole(name, data, small_models):
    model = small_models[name]
    config, frames = model.config, data.draw(st.sampled_from([9, 20, 600]))
    edges = [config.chunk_stride, config.chunk_length] if config.chunk_length else [9 * config.hop_length]
    edges += [] if config.chunk_length else [frames * config.hop_length, model.encoder.start]
    samples = data.draw(st.sampled_from([1, 319, *(n * e + by for e in edges for n in (1, 2) for by in (-1, 0, 1))]))
    audio = noise(1, config.audio_channels, samples, seed=samples)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(seanet_encodec, "CPU_BLOCK_FRAMES", frames)
        coded = model.encode(audio, num_quantizers=2)
        blocks = cut(audio[0], sizes_of(data, edges, samples))
        pieces = list(encode_blocks(model, iter(blocks), 2))
        spans = list(config.chunk_spans(samples))
        counts = [config.num_frames(stop - start) for start, stop in spans]
        whole = torch.cat([codes[0, :, :count] for codes, count in zip(coded.audio_codes, counts)], dim=1)
        assert torch.equal(torch.cat([codes for codes, _ in pieces], dim=1), whole)
        if config.chunk_length:
            assert [codes.shape[1] for codes, _ in pieces] == counts
        if config.normalize:
            assert [scale for _, scale in pieces] == [scale.item() for scale in coded.audio_scales]
        else:
            pieces = [(codes, None) for codes in cut(whole, sizes_of(data, [frames, 9, 2], sum(counts)))]
        expected = model.decode(**coded).audio_values[0]
        decoded = torch.cat(list(decode_blocks(model, iter(pieces))), dim=1)
        assert torch.equal(decoded[:, :samples], expected) and decoded.shape[1] < samples + 2 * config.hop_length


@pytest.mark.parametrize("name", NAMES)
def test_no_blocks_or_bad_ones_are_no_signal(name, small_models):
    model = small_models[name]
    channels = model.config.audio_channels
    with refused(ValueError, match="holds nothing"):
        list(encode_blocks(model, [], 2))
    for bad in (torch.full((channels, 9), torch.nan), torch.zeros(channels, 9, dtype=torch.bool)):
        with refused(ValueError, match="allowed"):
            list(encode_blocks(model, [bad], 2))


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_lm", [False, True])
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(QUICK, max_examples=6)
def test_any_cut_gives_the_same_file(name, with_lm, data, small_models, lms):
    model, lm = small_models[name], lms[name] if with_lm else None
    config = model.config
    edges = [config.chunk_stride or 20 * config.hop_length, 30000]
    samples = data.draw(st.sampled_from([1, 320, edges[0], edges[0] + 1, 2 * edges[0] + 481, 100_000]))
    audio, seconds = sound(config.audio_channels, samples, seed=samples), data.draw(st.sampled_from([0.1, 1.5, 10.0]))
    options = {"num_quantizers": 2, "segment_seconds": seconds}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seanet_encodec, "CPU_BLOCK_FRAMES", data.draw(st.sampled_from([10, 600])))
        whole = compress(model, audio, lm=lm, **options)
        blocks, file, sink, known = cut(audio, sizes_of(data, edges, samples)), io.BytesIO(b"before"), Sink(), Sink()
        file.seek(6)
        compress_blocks(model, (block for block in blocks), file, lm=lm, **options)
        compress_blocks(model, map(torch.from_numpy, blocks), sink, lm=lm, **options)
        compress_blocks(model, blocks, known, lm=lm, audio_length=samples, **options)
        expected = decompress(whole, model, lm, strict=True)[0]
        assert file.getvalue() == b"before" + whole and file.tell() == 6 + len(whole) and known.data == whole
        lengths = [read_header(io.BytesIO(found)).audio_length for found in (whole, sink.data)]
        assert lengths == [samples, None] and len(sink.data) == len(whole) and sink.data[-28:] == whole[-28:]
        for found in (whole, sink.data):
            pieces, rate = decompress_blocks(Trickle(found, 5000), model, lm, strict=True)
            pieces = list(pieces)
            assert rate == config.sampling_rate and all(piece.shape[1] for piece in pieces)
            assert torch.equal(torch.cat(pieces, dim=1), expected) and expected.shape[1] == samples


def test_a_false_length_is_refused(small_models):
    with refused(ValueError, match="allowed: 641 as in the header"):
        compress_blocks(small_models["24khz"], [sound(1, 640)], Sink(), audio_length=641)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("norm_type", ["weight_norm", "time_group_norm"])
@torch.no_grad()
def test_models_of_every_kind(norm_type, normalize, chunked, channels):
    """With chunks or without, among them those that must see the whole signal."""
    fields = {"norm_type": norm_type, "normalize": normalize, "use_causal_conv": norm_type == "weight_norm"}
    fields |= {"chunk_length_s": 0.1, "overlap": 0.2} if chunked else {}
    model = make_model(EncodecConfig(**SMALL, **fields, audio_channels=channels))
    assert model.config.needs_whole_signal == (not chunked and (normalize or norm_type == "time_group_norm"))
    for samples in (1, 20, 399, 2001):
        audio = sound(channels, samples, seed=samples)
        whole = compress(model, audio, segment_seconds=0.3)
        coded = model.encode(torch.from_numpy(audio)[None])
        expected = model.decode(**coded).audio_values[0]
        for sizes in ([7], [400, 1], [3000]):
            sink, file = Sink(), io.BytesIO()
            for target in (sink, file):
                compress_blocks(model, cut(audio, sizes), target, segment_seconds=0.3)
            assert file.getvalue() == whole
            found = torch.cat(list(decompress_blocks(Trickle(sink.data), model, strict=True)[0]), dim=1)
            assert torch.equal(found, expected) and found.shape == audio.shape


@pytest.mark.parametrize("name", ["24khz", "48khz"])
@pytest.mark.parametrize(("rate", "there"), [(24000, 1), (44100, 2), (48000, 2), (8000, 1)])
def test_the_command_writes_what_compress_does(name, rate, there, small_models, run, tmp_path, monkeypatch):
    """Also where the file is resampled, and longer than a block."""
    model = small_models[name]
    model.save_pretrained(tmp_path / "codec")
    monkeypatch.setattr(AudioReader.__init__, "__defaults__", (None, None, 10_000))
    soundfile.write(tmp_path / "a.wav", sound(there, 3 * rate + 123).T, rate)
    for segment in ([], ["--segment", "0.5"]):
        assert run("encode", tmp_path / "a.wav", tmp_path / "a.ecdc", "-f", "-m", tmp_path / "codec", *segment)[0] == 0
        audio, _ = read_audio(tmp_path / "a.wav", model.config.sampling_rate, model.config.audio_channels)
        bandwidth = model.config.target_bandwidths[-1]
        seconds = {"segment_seconds": 0.5} if segment else {}
        expected = compress(model, audio, bandwidth, model_name="codec", **seconds)
        assert (tmp_path / "a.ecdc").read_bytes() == expected
    assert run("decode", tmp_path / "a.ecdc", tmp_path / "b.wav", "-m", tmp_path / "codec")[0] == 0
    write_audio(tmp_path / "c.wav", decompress(expected, model)[0].numpy(), model.config.sampling_rate)
    assert (tmp_path / "b.wav").read_bytes() == (tmp_path / "c.wav").read_bytes()


def test_a_file_that_goes_bad_late_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(AudioReader.__init__, "__defaults__", (None, None, 5_000))
    audio = sound(1, 400_000)
    audio[0, -5] = np.nan
    soundfile.write(tmp_path / "a.wav", audio.T, 24000, subtype="FLOAT")
    code, _, (line,) = run("encode", tmp_path / "a.wav", tmp_path / "new" / "a.ecdc")
    assert code == 2 and "a.wav" in line and "NaN" in line
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.wav"]


# ---- memory ------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys
from modeling_encodec.cli import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
sys.exit(code)
"""


def peak(*arguments) -> tuple[float, float]:
    """MB that a command takes at most, and its seconds."""
    start = time.time()
    # The shell between: a child's peak counts from its parent's, which forks it.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", PEAK, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1]), time.time() - start


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_an_hour_takes_no_more_memory_than_a_minute(tmp_path):
    found = {}
    for minutes in (1, 60):
        paths = [tmp_path / f"{minutes}{suffix}" for suffix in (".wav", ".ecdc", "-again.wav")]
        with soundfile.SoundFile(paths[0], "w", 24000, 1, subtype="PCM_16") as file:
            for minute in range(minutes):
                file.write(sound(1, 60 * 24000, seed=minute).T)
        for command, source, target in (("encode", *paths[:2]), ("decode", *paths[1:])):
            found[command, minutes] = peak(command, source, target, "--model", bundled_checkpoint())
        assert soundfile.info(paths[2]).frames == minutes * 60 * 24000
    text = "; ".join(f"{name} {n} min: {mb:.0f} MB in {s:.0f} s" for (name, n), (mb, s) in found.items())
    print(text)
    for command in ("encode", "decode"):
        assert found[command, 60][0] - found[command, 1][0] < 50, text


def test_waiting_blocks_go_where_temporary_files_go(tmp_path, monkeypatch):
    """Not beside the target, where the disk may be full; and none is left."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    write_audio_blocks(tmp_path / "a.wav", [4 * sound(1, 500)] * 3, 24000, rescale=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.wav", "elsewhere"]
