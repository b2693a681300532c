"""`.ecdc` version 0: byte for byte the original's but for the fingerprint, and only clean errors for anything else."""

import copy
import dataclasses
import functools
import importlib
import io
import json
import re
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import make_model, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import import_encodec, original_model

from modeling_encodec.bitstream import compression
from modeling_encodec.bitstream.bit_packing import pack, packed_size, unpack
from modeling_encodec.bitstream.compression import decompress, decompress_from_file
from modeling_encodec.bitstream.errors import EcdcError
from modeling_encodec.bitstream.inspection import describe
from modeling_encodec.bitstream.v0.container import EcdcHeader, read_header, write_header
from modeling_encodec.bitstream.v0.file import read_original


compress = functools.partial(compression.compress, version=0)


# ---- packing


@given(st.integers(1, 16).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=200))))
def test_unpack_of_pack(case):
    bits, values = case
    data = pack(np.array(values, dtype=np.int64), bits)
    assert len(data) == packed_size(len(values), bits)
    assert unpack(data, len(values), bits).tolist() == values


def test_packing_by_hand():
    assert pack(np.array([1, 1023, 512]), 10).hex(" ") == "01 fc 0f 20"


# ---- the original


@pytest.fixture(scope="module")
def encodec_compress(released_models):
    """The original's `compress` module, its model names standing for our random weights."""
    if import_encodec() is None:
        pytest.skip("the encodec package is not installed")
    module = importlib.import_module("encodec.compress")  # `encodec` itself has a function of that name
    originals = {f"encodec_{name}": original_model(released_models[name]) for name in ("24khz", "48khz")}
    saved = dict(module.MODELS)
    module.MODELS.update({name: lambda model=model: model for name, model in originals.items()})
    yield module, originals
    module.MODELS.update(saved)


CASES = [("24khz", b) for b in (1.5, 3.0, 6.0, 12.0, 24.0)] + [("48khz", b) for b in (3.0, 6.0, 12.0, 24.0)]


def without_fingerprint(data: bytes) -> bytes:
    """A file as the original writes it."""
    file, without = io.BytesIO(data), io.BytesIO()
    header = read_header(file)
    assert re.fullmatch("[0-9a-f]{16}", header.fingerprint)
    write_header(without, dataclasses.replace(header, fingerprint=None))
    return without.getvalue() + file.read()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("name", "bandwidth"), CASES)
@torch.no_grad()
def test_bytes_are_those_of_the_original_both_ways(name, bandwidth, released_models, encodec_compress, monkeypatch):
    """Of the same codes, that is: the original is made to write ours, so that a tie between codes cannot matter."""
    module, originals = encodec_compress
    model, full = released_models[name], f"encodec_{name}"

    def our_frames(audio):
        coded = model.encode(audio, bandwidth=bandwidth)
        spans = model.config.chunk_spans(audio.shape[2])
        return [
            (codes[..., : model.config.num_frames(stop - start)], scale)
            for codes, scale, (start, stop) in zip(coded.audio_codes, coded.audio_scales, spans, strict=True)
        ]

    monkeypatch.setattr(originals[full], "encode", our_frames)
    for samples in (1, 321, int(1.2 * model.config.sampling_rate)):
        audio = noise(1, model.config.audio_channels, samples, seed=samples)[0]
        theirs = module.compress(originals[full], audio, use_lm=False)
        ours = compress(model, audio, bandwidth, model_name=full)
        assert without_fingerprint(ours) == theirs
        decoded, rate = decompress(theirs, model)
        expected, expected_rate = module.decompress(ours)
        assert rate == expected_rate and decoded.shape == expected.shape == audio.shape
        torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_lengths_the_original_cannot_read_back(released_models, encodec_compress):
    """Counting frames in floating point it finds one too many for these; whole numbers do not."""
    module, originals = encodec_compress
    model, samples = released_models["24khz"], 6720
    data = compress(model, noise(1, 1, samples)[0], 1.5, model_name="encodec_24khz")
    with pytest.raises(EOFError):
        module.decompress(data)
    assert decompress(data, model)[0].shape == (1, samples)


def test_header_by_hand():
    buffer = io.BytesIO()
    write_header(buffer, EcdcHeader("encodec_24khz", 240000, 8))
    text = b'{"m": "encodec_24khz", "al": 240000, "nc": 8, "lm": false}'
    assert buffer.getvalue() == b"ECDC\x00" + struct.pack("!I", len(text)) + text and len(buffer.getvalue()) == 67
    buffer.seek(0)
    assert read_header(buffer) == EcdcHeader("encodec_24khz", 240000, 8)


# ---- our own models


@torch.no_grad()
def test_round_trip_of_every_model(small_models):
    for name, model in small_models.items():
        for samples in (1, 5000, 47521, 70001):
            audio = noise(1, model.config.audio_channels, samples, seed=samples)[0]
            data = compress(model, audio, num_quantizers=3, model_name=name)
            decoded, rate = decompress(data, model)
            expected = model.decode(**model.encode(audio[None], num_quantizers=3)).audio_values[0]
            assert torch.equal(decoded, expected) and rate == model.config.sampling_rate


def test_numpy_audio_and_the_bundled_model_by_name(bundled_model):
    audio = noise(1, 1, 12000)[0]
    data = compress(bundled_model, audio.numpy(), 6.0)
    assert read_header(io.BytesIO(data)).model_name == "encodec_24khz_c16"
    decoded, rate = decompress(data)  # the file names its model
    assert rate == 24000 and torch.equal(decoded, decompress(data, bundled_model)[0])


def test_a_pipe_is_enough_to_read_from(small_models):
    class Pipe(io.RawIOBase):
        def __init__(self, data):
            self.data = io.BytesIO(data)

        def read(self, size=-1):
            return self.data.read(min(size, 7) if size > 0 else size)

        def seekable(self):
            return False

    model = small_models["24khz"]
    data = compress(model, noise(1, 1, 9000)[0], 1.8)
    assert torch.equal(decompress_from_file(Pipe(data), model)[0], decompress(data, model)[0])


@pytest.mark.parametrize("name", ["mine", "encodec_24khz"])  # whatever the folder is called
def test_files_of_other_weights_are_refused(name, small_models, released_models):
    data = compress(small_models["24khz"], noise(1, 1, 9000)[0], 0.9, model_name=name)
    with pytest.raises(EcdcError, match=f"'{name}' .fingerprint"):
        decompress(data, released_models["24khz"])


def test_another_decoder_is_refused_unless_asked_for(small_models):
    model, audio = small_models["24khz"], noise(1, 1, 9000)[0]
    data = compress(model, audio, 0.9, model_name="encodec_24khz")
    other = make_model(model.config)
    other.load_state_dict(model.state_dict())
    other.decoder.layers[0].conv.bias.data.add_(1)
    with pytest.raises(EcdcError, match="the same codebooks, another decoder or settings .*; other_decoder"):
        decompress(data, other)
    assert decompress(data, other, other_decoder=True)[0].shape == audio.shape


def test_files_without_fingerprint_are_read_with_a_word(small_models, caplog):
    model, audio = small_models["24khz"], noise(1, 1, 9000)[0]
    data = compress(model, audio, 0.9)
    assert torch.equal(decompress(without_fingerprint(data), model)[0], decompress(data, model)[0])
    assert [record.getMessage() for record in caplog.records] == [
        "the file has no fingerprint, as the encodec package writes them: its model is not checked"
    ]


def test_files_of_unknown_models_are_refused(small_models):
    data = compress(small_models["24khz"], noise(1, 1, 9000)[0], 0.9, model_name="mine")
    with pytest.raises(ValueError, match="'mine', known: encodec_24khz_c16"):
        decompress(data)


@pytest.mark.parametrize(
    "audio", [torch.zeros(100), torch.zeros(1, 1, 100), torch.zeros(2, 100), torch.zeros(1, 0), None, "x", [[0.0]]]
)
def test_compress_takes_one_clip(small_models, audio):
    with pytest.raises(ValueError, match="allowed"):
        compress(small_models["24khz"], audio)


# ---- damage


def header_bytes(size=None, version=0, magic=b"ECDC", **fields) -> bytes:
    text = json.dumps({"m": "x", "al": 1000, "nc": 2, "lm": False} | fields).encode()
    return magic + bytes([version]) + struct.pack("!I", len(text) if size is None else size) + text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends inside the header"),
        (b"ECDC", "ends inside the header"),
        (header_bytes(magic=b"RIFF"), "starts with b'RIFF'"),
        (header_bytes(version=9), "version is 9, allowed: 0 or 1"),
        (header_bytes(size=2**32 - 1), "header length is 4294967295"),
        (header_bytes(size=4000), "ends inside the header"),
        (header_bytes(size=5), "no JSON"),
        (b"ECDC\0" + struct.pack("!I", 4) + b"[[[[", "no JSON"),
        (b"ECDC\0" + struct.pack("!I", 3000) + b"[" * 3000, "no JSON"),
        (b"ECDC\0" + struct.pack("!I", 2) + b"\xff\xff", "no JSON"),
        (b"ECDC\0" + struct.pack("!I", 2) + b"{}", "header is {}"),
        (header_bytes(al="9"), "header is"),
        (header_bytes(al=1.5), "header is"),
        (header_bytes(nc=True), "header is"),
        (header_bytes(lm=0), "header is"),
        (header_bytes(m=None), "header is"),
        (header_bytes(fp=3), "fp 3"),
        (header_bytes(al=0), "al 0"),
        (header_bytes(nc=-1), "nc -1"),
        (header_bytes(nc=9), "9 codebooks, allowed: 1 to 8"),
        (header_bytes(nc=10**12), "codebooks, allowed"),
        (header_bytes(lm=True), "language model"),
        (header_bytes(al=10**18), "h of audio, allowed: up to 24 h"),
        (header_bytes(al=24000 * 86400), "ends inside the codes"),
        (header_bytes(al=10**3000), "al 10000.*allowed: 1 to"),
        (header_bytes(fp="0" * 16), "fingerprint 0000000000000000"),
    ],
)
def test_bad_files_say_what_is_wrong(small_models, data, message):
    tracemalloc.start()
    with pytest.raises(EcdcError, match=message) as caught:
        decompress(data, small_models["24khz"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert peak < 4 << 20


@torch.no_grad()
def test_truncated_and_longer_files(small_models):
    for model in small_models.values():
        data = compress(model, noise(1, model.config.audio_channels, 3000)[0])
        for size in range(len(data)):
            with pytest.raises(EcdcError, match="ends inside"):
                decompress(data[:size], model)
        with pytest.raises(EcdcError, match="bytes follow"):
            decompress(data + b"\0", model)


def test_scales_that_are_none(small_models):
    model = small_models["48khz"]
    data = compress(model, noise(1, 2, 3000)[0])
    start = 9 + struct.unpack("!I", data[5:9])[0]
    for scale in (float("nan"), float("inf"), -1.0, 0.0):
        with pytest.raises(EcdcError, match="scale is"):
            decompress(data[:start] + struct.pack("!f", scale) + data[start + 4 :], model)


@torch.no_grad()
def test_a_file_that_decodes_to_infinity_is_refused(small_models):
    model = copy.deepcopy(small_models["48khz"])
    model.decoder.layers[-1].norm.weight.mul_(1e3)
    data = compress(model, noise(1, 2, 3000)[0])
    start = 9 + struct.unpack("!I", data[5:9])[0]
    with pytest.raises(EcdcError, match="not finite"):
        decompress(data[:start] + struct.pack("!f", 3.4e38) + data[start + 4 :], model)


def test_codes_outside_an_odd_codebook():
    from conftest import make_model

    from modeling_encodec.models.configuration_encodec import EncodecConfig

    model = make_model(EncodecConfig(num_filters=2, hidden_size=16, codebook_size=600))
    data = compress(model, noise(1, 1, 3200)[0])
    with pytest.raises(EcdcError, match="a code is 1023, allowed: 0 to 599"):
        decompress(data[:-5] + b"\xff" * 5, model)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["flip", "set", "cut", "insert", "copy"]), st.integers(0), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


def mutate(data: bytes, operations) -> bytes:
    for kind, place, value in operations:
        place %= len(data) + 1
        if kind == "flip" and place < len(data):
            data = data[:place] + bytes([data[place] ^ (1 << value % 8)]) + data[place + 1 :]
        elif kind == "set":
            data = data[:place] + bytes([value]) + data[place + 1 :]
        elif kind == "cut":
            data = data[:place]
        elif kind == "insert":
            data = data[:place] + bytes([value]) * (1 + value % 5) + data[place:]
        else:
            data = data[:place] + data[value % (len(data) + 1) :]
    return data


@pytest.fixture(scope="module")
def sound_files(small_models):
    return [
        (model, compress(model, noise(1, model.config.audio_channels, samples)[0], model_name=name))
        for name, model in (("encodec_24khz", small_models["24khz"]), ("encodec_48khz", small_models["48khz"]))
        for samples in (1, 3000, 50000)
    ]


@given(index=st.integers(0, 5), operations=OPERATIONS)
@settings(max_examples=20_000, deadline=None)
def test_twenty_thousand_mutated_files_give_codes_or_a_clean_error(index, operations, sound_files):
    model, data = sound_files[index]
    file = io.BytesIO(mutate(data, operations))
    try:
        pieces = read_original(file, read_header(file), model)
    except EcdcError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
    else:
        assert all(codes.min() >= 0 and codes.max() < model.config.codebook_size for codes, _ in pieces)


@given(index=st.integers(0, 5), operations=OPERATIONS)
@settings(max_examples=200, deadline=None)
@torch.no_grad()
def test_mutated_files_decode_or_give_a_clean_error(index, operations, sound_files):
    model, data = sound_files[index]
    try:
        audio, _ = decompress(mutate(data, operations), model)
    except EcdcError:
        return
    assert audio.shape[0] == model.config.audio_channels and torch.isfinite(audio).all()


# ---- inspection


def test_describe_knows_released_models_without_their_weights(bundled_model):
    data = compress(bundled_model, noise(1, 1, 24000)[0], 6.0)
    lines = describe(io.BytesIO(data), len(data))
    assert lines["duration"] == "1.00 s" and lines["codebooks"] == "8" and "mono" in lines["sampling rate"]
    assert lines["bit rate"].startswith(f"{8 * len(data) / 1000:.3f} kbps")
    buffer = io.BytesIO()
    write_header(buffer, EcdcHeader("encodec_48khz", 96000, 4))
    buffer.seek(0)
    assert describe(buffer, 1500)["duration"] == "2.00 s"
    buffer = io.BytesIO()
    write_header(buffer, EcdcHeader("somebody's", 96000, 4))
    buffer.seek(0)
    assert "duration" not in describe(buffer, 1500)
