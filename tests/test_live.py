"""A live link, PCM to `.ecdc` and back as it comes: in pipes, in any pieces, damaged, and what is refused."""

import io
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import clip
from ecdc_files import NAMES, codes_of, container_items, places, refused, spoil
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pipe_ends import Sink, Trickle

from modeling_encodec.bitstream.compression import compress, decompress
from modeling_encodec.bitstream.container import End
from modeling_encodec.bitstream.errors import EcdcError
from modeling_encodec.bitstream.live import decode_live, encode_live
from modeling_encodec.cli import main
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder, signal_pieces


QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
COMMAND = [sys.executable, "-m", "modeling_encodec"]
MODES = [("24khz", "exact"), ("24khz", "low_latency"), ("48khz", "exact"), ("32khz", "exact")]


class Flushed(Sink):
    """A pipe's writing end that tells how many bytes it had at each flush."""

    def __init__(self):
        super().__init__()
        self.flushes = []

    def flush(self) -> None:
        self.flushes.append(len(self.data))


def pcm_of(audio: torch.Tensor) -> bytes:
    """Audio (channels, T) as 16-bit PCM."""
    samples = (audio * (1 << 15)).round().clamp(-(1 << 15), (1 << 15) - 1)
    return samples.T.contiguous().numpy().astype("<i2").tobytes()


def audio_of(pcm: bytes, channels: int) -> torch.Tensor:
    """PCM as the whole numbers that it holds, (channels, T)."""
    return torch.from_numpy(np.frombuffer(pcm, "<i2").reshape(-1, channels).T.astype(np.int64))


def heard(model, pcm: bytes) -> torch.Tensor:
    """What a live encoder is given by this PCM, (channels, T)."""
    return audio_of(pcm, model.config.audio_channels).float() / (1 << 15)


def sent(model, source, mode="exact", lm=None, count=2, seconds=0.1) -> bytes:
    """A live stream of `count` codebooks from a source of PCM, or from its bytes."""
    target = Flushed()
    source = io.BytesIO(source) if isinstance(source, bytes) else source
    options = {"model_name": "m", "lm": lm, "lm_name": lm and "l", "segment_seconds": seconds}
    encode_live(model, source, target, num_quantizers=count, mode=mode, **options)
    return target.data


def received(model, data, mode="exact", lm=None, **options) -> tuple[torch.Tensor, list]:
    """The audio (channels, T), in whole numbers, and the damage that a live receiver tells."""
    target, damages = Flushed(), []
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    told = {"on_damage": lambda damage, rate: damages.append(damage)}
    decode_live(lambda header: (model, lm), source, target, mode=mode, **told, **options)
    return audio_of(target.data, model.config.audio_channels), damages


def streamed(model, audio: torch.Tensor, mode="exact", count=2) -> tuple[list, torch.Tensor]:
    """(codes, scale) of each piece of a stream that gets this audio (channels, T) at once, and the PCM it becomes."""
    encoder, decoder = StreamingEncoder(model, num_quantizers=count, mode=mode), StreamingDecoder(model, mode=mode)
    pieces = list(signal_pieces(encoder, encoder.finish(audio[None])))
    chunked, given = model.config.chunk_length is not None, []
    for codes, scale in pieces:
        given.append(decoder.push(codes[None], torch.tensor([[scale]]) if chunked else None)[0])
    whole = torch.cat([*given, decoder.flush()[0]], dim=1)
    return pieces, (whole * (1 << 15)).round().clamp(-(1 << 15), (1 << 15) - 1).long()


def in_odd_writes(data: bytes, sizes: list[int]):
    """The reading end of a real pipe into which `data` is written in pieces of these sizes, over and over."""
    out, into = os.pipe()

    def write():
        at, turn = 0, 0
        with open(into, "wb", buffering=0) as pipe:
            while at < len(data):
                at += pipe.write(data[at : at + sizes[turn % len(sizes)]])
                turn += 1

    threading.Thread(target=write, daemon=True).start()
    return open(out, "rb")


@pytest.fixture
def live(monkeypatch, capsys):
    """Run the command line in a pipe: exit code, bytes of stdout, lines of stderr."""

    def call(data: bytes, *arguments):
        target = Flushed()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
            patch.setattr(sys, "stdout", SimpleNamespace(buffer=target, flush=target.flush))
            code = main([str(argument) for argument in arguments])
        return code, target.data, capsys.readouterr().err.splitlines()

    return call


def fails(result, *words):
    code, data, lines = result
    assert code == 2 and len(lines) == 1 and not data, result
    assert all(word in lines[0] for word in words), lines
    return True


# ---- two processes -----------------------------------------------------------------------------------------------


def test_a_receiver_hears_before_the_sender_is_done_and_what_files_give(run, tmp_path, real_clip):
    audio = real_clip(24000)[0, :, : 24000 * 3 + 77]
    pcm = pcm_of(audio)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    encoding = subprocess.Popen([*COMMAND, "encode", "-", "-", "--stream"], stdin=subprocess.PIPE, **pipes)
    decoding = subprocess.Popen([*COMMAND, "decode", "-", "-", "--stream"], stdin=encoding.stdout, **pipes)
    encoding.stdout.close()
    for at in range(0, 96001, 9601):  # 2 s
        encoding.stdin.write(pcm[at : min(at + 9601, 96001)])
        encoding.stdin.flush()
        time.sleep(0.02)
    first = decoding.stdout.read(2 * 24000)  # waits for a second of audio; the sender still waits for more
    assert len(first) == 48000 and encoding.poll() is None
    encoding.stdin.write(pcm[96001:])
    encoding.stdin.close()
    rest = decoding.stdout.read()
    told = encoding.stderr.read(), decoding.stderr.read()
    assert (encoding.wait(60), decoding.wait(60)) == (0, 0), told
    assert told == (b"", b"")

    soundfile.write(tmp_path / "a.wav", np.frombuffer(pcm, "<i2"), 24000)
    assert run("encode", tmp_path / "a.wav", tmp_path / "a.ecdc")[0] == 0
    assert run("decode", tmp_path / "a.ecdc", tmp_path / "b.wav")[0] == 0
    expected = soundfile.read(tmp_path / "b.wav", dtype="int16")[0].astype(int)
    found = np.frombuffer(first + rest, "<i2").astype(int)
    assert len(expected) == audio.shape[1] and len(found) == -(-len(expected) // 320) * 320
    assert np.abs(found[: len(expected)] - expected).max() <= 1


# ---- any pieces --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_lm", [False, True])
@pytest.mark.parametrize(("name", "mode"), MODES)
@given(data=st.data())
@settings(QUICK, max_examples=6)
def test_odd_writes_in_a_pipe_are_one_stream(name, mode, with_lm, data, small_models, lms):
    model, lm = small_models[name], lms[name] if with_lm else None
    channels, edge = model.config.audio_channels, model.config.chunk_stride or model.encoder.start
    samples = data.draw(st.sampled_from([1, edge - 1, edge, edge + 1, edge + 481]) | st.integers(1, 3 * edge))
    sizes = data.draw(st.lists(st.sampled_from([1, 3, 639, 4095, 65537]), min_size=1, max_size=4).filter(sum))
    sizes = sizes if max(sizes) > 3 else [*sizes, 9999]
    pcm = pcm_of(clip(model, 5.0)[:, -samples:])
    with in_odd_writes(pcm, sizes) as pipe:
        found = sent(model, pipe, mode, lm)
    pieces, expected = streamed(model, heard(model, pcm), mode)
    codes, damages, end = codes_of(found, model, lm)
    whole = np.concatenate([codes[index] for index in sorted(codes)], axis=1)
    wanted = torch.cat([piece for piece, _ in pieces], dim=1).numpy()
    assert not damages and end.audio_length == samples and whole.shape == wanted.shape
    assert (whole != wanted).any(0).sum() <= 1  # a tie may fall otherwise
    with in_odd_writes(found, sizes) as pipe:
        audio, damages = received(model, pipe, mode, lm)
    assert damages == [] and torch.equal(audio, received(model, Trickle(found, 1 << 16), mode, lm)[0])
    assert audio.shape == expected.shape == (channels, expected.shape[1]) and samples <= audio.shape[1]
    if np.array_equal(whole, wanted):
        assert (audio - expected).abs().max() <= 1


@pytest.mark.parametrize("with_lm", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_stored_stream_is_an_ordinary_file(name, with_lm, small_models, lms, tmp_path, run):
    model, lm = small_models[name], lms[name] if with_lm else None
    pcm = pcm_of(clip(model, 2.3)[:, 5:])
    audio = heard(model, pcm)
    with open(tmp_path / "a.ecdc", "wb") as file:
        options = {"num_quantizers": 2, "model_name": "m", "lm": lm, "lm_name": lm and "l"}
        encode_live(model, io.BytesIO(pcm), file, **options)
        assert not file.closed
    data, piped = (tmp_path / "a.ecdc").read_bytes(), sent(model, pcm, lm=lm)
    (header, items), (unknown, others) = container_items(data), container_items(piped)
    assert header.audio_length == audio.shape[1] and unknown.audio_length is None and items == others
    assert isinstance(items[-1], End)
    expected = decompress(compress(model, audio, num_quantizers=2), model, strict=True)[0]
    assert torch.equal(decompress(data, model, lm, strict=True)[0], decompress(piped, model, lm, strict=True)[0])
    torch.testing.assert_close(decompress(data, model, lm, strict=True)[0], expected, rtol=0, atol=1e-4)
    assert torch.equal(received(model, data, lm=lm)[0], received(model, piped, lm=lm)[0])
    code, out, _ = run("info", tmp_path / "a.ecdc")
    assert code == 0 and f"samples        {audio.shape[1]}" in out and "damage" not in out


def test_an_ordinary_file_is_received_live(small_models, lms, file_24khz, file_48khz):
    for name, data in (("24khz", file_24khz), ("48khz", file_48khz)):
        model = small_models[name]
        audio, damages = received(model, Trickle(data, 1000), lm=lms[name])
        limit = (decompress(data, model, lms[name])[0] * (1 << 15)).clamp(-(1 << 15), (1 << 15) - 1)
        assert not damages and (audio[:, : limit.shape[1]] - limit).abs().max() <= 1.5


@pytest.mark.parametrize("seconds", [0.01, 0.1, 2.5])
@pytest.mark.parametrize(("name", "mode"), MODES)
def test_every_full_segment_is_there_at_once(name, mode, seconds, small_models):
    """Not in a buffer until more comes: each is flushed before the next piece is asked for."""
    model, target = small_models[name], Flushed()
    pcm = pcm_of(clip(model, 3.2))
    source, size = io.BytesIO(pcm), 4096 * model.config.audio_channels
    flushed = []

    class Paced:
        def read(self, _: int) -> bytes:
            assert not target.data or target.flushes[-1] == len(target.data)
            flushed.append(len(target.data))
            return source.read(size)

    encode_live(model, Paced(), target, num_quantizers=2, model_name="m", mode=mode, lm=None, segment_seconds=seconds)
    assert target.flushes[-1] == len(target.data) and len(set(flushed)) >= 2
    header, items = container_items(target.data)
    config, start = model.config, StreamingEncoder(model, num_quantizers=2, mode=mode).start_latency
    beyond = config.chunk_length - config.chunk_stride if config.chunk_length else start + config.hop_length
    wait = header.samples_per_segment + beyond
    read = [index * size // (2 * model.config.audio_channels) for index in range(len(flushed))]
    assert flushed[next(index for index, samples in enumerate(read) if samples >= wait)] > 0
    heard_at = Flushed()
    decode_live(lambda header: (model, None), io.BytesIO(target.data), heard_at, mode=mode, on_damage=None)
    assert len(heard_at.flushes) >= len(items) and heard_at.flushes == sorted(heard_at.flushes)


def test_loud_audio_is_cut_never_wrapped(small_models):
    model, data = small_models["24khz"], sent(small_models["24khz"], b"\xff\x7f" * 3000 + b"\x00\x80" * 3000)
    loud = decompress(data, model)[0] * (1 << 15)
    assert (received(model, data)[0][:, :6000] - loud.clamp(-(1 << 15), (1 << 15) - 1)).abs().max() <= 1.5


# ---- damage ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def links(small_models, lms) -> dict:
    """(model, language model, stream, its audio) by name, at least 4 segments each."""
    made = {}
    for name, seconds in (("24khz", 1.03), ("48khz", 4.2), ("32khz", 1.03)):
        model, lm = small_models[name], lms[name] if name != "32khz" else None
        data = sent(model, pcm_of(clip(model, seconds)), lm=lm)
        made[name] = model, lm, data, received(model, data, lm=lm)[0]
    return made


@pytest.mark.parametrize("conceal", ["silence", "repeat"])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_lost_segment_is_told_and_the_length_kept(name, dropped, conceal, links):
    model, lm, data, sound = links[name]
    starts = places(data)
    size = container_items(data)[0].samples_per_segment
    lag = 0 if model.config.chunk_length else StreamingDecoder(model).latency
    for lost in range(len(starts) - 2):  # a later segment arrives
        bad = data[: starts[lost]] + data[starts[lost + 1] :] if dropped else spoil(data, lost)
        audio, (damage,) = received(model, bad, lm=lm, conceal=conceal)
        assert (damage.first, damage.last) == (lost, lost) and audio.shape == sound.shape
        before = max(0, lost * size - lag)
        assert torch.equal(audio[:, :before], sound[:, :before])
        assert audio[:, (lost + 2) * size :].any() or lost > len(starts) - 4
    final = len(starts) - 2
    audio, (damage,) = received(model, spoil(data, final), lm=lm, conceal=conceal)
    assert damage.first == final and audio.shape[1] >= final * size
    sure = final * size - StreamingDecoder(model).latency
    assert torch.equal(audio[:, :sure], sound[:, :sure])


@pytest.mark.parametrize("name", NAMES)
def test_silence_stands_where_the_segment_was(name, links):
    """Neither the audio before it is taken away nor that in its place heard."""
    model, lm, data, _ = links[name]
    size = container_items(data)[0].samples_per_segment
    for lost in range(1, len(places(data)) - 2):
        audio = received(model, spoil(data, lost), lm=lm)[0]
        assert not audio[:, lost * size : (lost + 1) * size].any()
        assert audio[:, lost * size - 100 : lost * size].any()


@pytest.mark.parametrize("name", NAMES)
def test_several_lost_at_the_beginning(name, links):
    """Until one arrives nobody knows what to put there; then all of the signal's length is."""
    model, lm, data, sound = links[name]
    count = len(places(data)) - 1
    for lost in range(1, count):
        audio, (damage,) = received(model, spoil(data, *range(lost)), lm=lm)
        assert (damage.first, damage.last) == (0, lost - 1)
        assert audio.shape == sound.shape, f"{lost} of {count}"


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_stream_gives_all_that_came(name, links):
    model, lm, data, sound = links[name]
    starts = places(data)
    size = container_items(data)[0].samples_per_segment
    for cut in (starts[2], starts[2] + 5, starts[-1], len(data) - 1):
        audio, (damage,) = received(model, data[:cut], lm=lm)
        whole = sum(start <= cut for start in starts) - 1
        assert damage.last is None and damage.first == whole
        assert audio.shape[1] >= min(whole * size, sound.shape[1]), "what was decoded is written, to its end"
        assert (audio[:, : (whole - 1) * size] - sound[:, : (whole - 1) * size]).abs().max() <= 1
    with refused(EcdcError, match="ends inside the header"):
        received(model, data[:20], lm=lm)


def test_the_command_tells_of_damage_on_one_line(live, tmp_path, small_models, lms, links):
    model, lm, data, sound = links["24khz"]
    model.save_pretrained(tmp_path / "codec")
    lm.save_pretrained(tmp_path / "lm")
    models = ["-", "-", "--stream", "-m", tmp_path / "codec", "--lm-model", tmp_path / "lm"]
    assert live(data, "decode", *models)[0] == 0
    code, found, (line,) = live(spoil(data, 3), "decode", *models)
    assert code == 0 and line.startswith("concealed: segment 3 (0.3") and len(found) == 2 * sound.shape[1]
    code, found, (line,) = live(data[: places(data)[4]], "decode", *models)
    assert code == 0 and line.startswith("concealed: segments from 4 on") and found
    code, found, (line,) = live(data[: places(data)[2]] + b"noise" * 50, "decode", *models)
    assert code == 0 and "concealed" in line and "no end" in line


def test_a_streams_hours_are_limited_only_if_asked(live):
    data = live(bytes(2 * 24000), "encode", "-", "-", "--stream")[1]
    code, found, _ = live(data, "decode", "-", "-", "--stream")
    assert code == 0 and len(found) == 2 * 24000
    code, found, (line,) = live(data, "decode", "-", "-", "--stream", "--max-hours", "0.0001")
    assert code == 2 and "--max-hours" in line and 2 * 6000 < len(found) < 2 * 24000


def test_too_long_a_gap_ends_the_stream(small_models, monkeypatch):
    monkeypatch.setattr("modeling_encodec.bitstream.live.MAX_GAP_SECONDS", 20 * 320 / 24000)
    model = small_models["24khz"]
    data = sent(model, bytes(2 * 320 * 23), seconds=0.01)
    starts = places(data)
    assert received(model, data[: starts[1]] + data[starts[21] :])[0].shape == (1, 320 * 23)
    with refused(EcdcError, match="missing in a row, allowed: 0.26"):
        received(model, data[: starts[1]] + data[starts[22] :])


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_no_audio_and_half_samples(name, small_models):
    model, frame = small_models[name], 2 * small_models[name].config.audio_channels
    with refused(ValueError, match="holds no audio"):
        sent(model, b"")
    for size in (1, frame - 1, 5 * frame + 1, 3 * 65536 * frame + frame - 1):
        with refused(ValueError, match=f"ends within a sample: {size % frame} of its {frame} bytes"):
            sent(model, bytes(size))


def test_what_is_refused_is_refused_on_one_line(live, small_models, tmp_path):
    encode, decode = ("encode", "-", "-", "--stream"), ("decode", "-", "-", "--stream")
    assert fails(live(b"", *encode), "holds no audio")
    assert fails(live(b"\0", *encode), "1 of its 2 bytes")
    assert fails(live(bytes(640), *encode, "--original"), "--original", "--stream")
    assert fails(live(bytes(640), *encode, "--mode", "fast"), "'fast'", "exact, low_latency")
    assert fails(live(bytes(640), *encode, "-b", "5"), "1.5, 3, 6, 12")
    assert fails(live(bytes(640), *encode, "--segment", "-1"), "segment_seconds is -1")
    for option in ("--strict", "--rescale"):
        assert fails(live(b"", *decode, option), option, "--stream")
    assert fails(live(b"", *decode), "ends inside the header")
    assert fails(live(b"RIFF" * 9, *decode), "not an .ecdc file")
    assert fails(live(b"", "encode", "a.wav", "b.ecdc", "--stream"), "'- -'", "a.wav b.ecdc")
    assert fails(live(b"", "decode", "-", "b.wav", "--stream"), "'- -'")
    for command in ("encode", "decode"):
        assert fails(live(b"", command, "-", "-", "--mode", "low_latency"), "--stream")
    small_models["32khz"].save_pretrained(tmp_path / "other")
    assert fails(live(bytes(640), *encode, "-m", tmp_path / "other", "--mode", "low_latency"), "not causal")
    data = live(bytes(64000), *encode)[1]
    assert fails(live(data, *decode, "-m", tmp_path / "other"), "fingerprint")
    assert fails(live(data, *decode, "--mode", "fast"), "'fast'", "exact, low_latency")


def test_an_unknown_way_to_conceal_is_refused(live):
    data = live(bytes(64000), "encode", "-", "-", "--stream")[1]
    assert fails(live(data, "decode", "-", "-", "--stream", "--conceal", "magic"), "'magic'", "silence, repeat")


def test_no_segment_has_no_seconds(live):
    assert fails(live(bytes(640), "encode", "-", "-", "--stream", "--segment", "0"), "segment_seconds is 0")


def test_a_stream_appended_to_a_file_is_whole(small_models, tmp_path):
    """As the shell's `>>` opens it: what is written goes to the end, wherever one seeks."""
    with open(tmp_path / "a.ecdc", "ab") as file:
        encode_live(small_models["24khz"], io.BytesIO(bytes(9600)), file, num_quantizers=2, model_name="m")
    assert decompress((tmp_path / "a.ecdc").read_bytes(), small_models["24khz"], strict=True)[0].shape == (1, 4800)
