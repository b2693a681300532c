"""`.ecdc` version 1 as a whole: audio to bytes and back with a language model, however it is run; damage; changes.

Golden files: `PYTHONPATH=tests python tests/test_compression.py` wrote tests/golden/*.ecdc, from models whose weights
are filled in whole numbers by a rule. Never to be written anew: files of version 1 must stay readable.
"""

import contextlib
import copy
import functools
import hashlib
import io
import json
import logging
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, noise
from test_segment_coders import Table, spread

from modeling_encodec.bitstream import codes_file, compression
from modeling_encodec.bitstream.codes_file import DecodedSegment, EcdcReader, EcdcWriter
from modeling_encodec.bitstream.compression import compress, decompress, decompress_from_file
from modeling_encodec.bitstream.concealment import FADE_SECONDS, join_segments
from modeling_encodec.bitstream.container import (
    Damage,
    End,
    Header,
    Segment,
    SegmentWriter,
    read_header,
    read_segments,
    seek_segment,
    write_header,
)
from modeling_encodec.bitstream.ecdc import EcdcError
from modeling_encodec.bitstream.fingerprints import codebook_fingerprint, lm_fingerprint, model_fingerprint
from modeling_encodec.bitstream.inspection import describe
from modeling_encodec.bitstream.segment_coders import LMCoder, RawCoder
from modeling_encodec.checkpoints import BUNDLED_LM
from modeling_encodec.cli import main
from modeling_encodec.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.modeling_encodec import EncodecModel
from modeling_encodec.modeling_lm_encodec import EncodecLM


GOLDEN = Path(__file__).parent / "golden"
NAMES = ("24khz", "48khz", "32khz")
LM_SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@torch.no_grad()
def make_lm(model: EncodecModel, fit: torch.Tensor | None = None, loud: float = 1.0, **options) -> EncodecLM:
    """A small integer language model: its head's biases are how often codes are in the audio `fit`, if any is given;
    the rest is random, and `loud`."""
    torch.manual_seed(0)
    options |= LM_SIZE | {"codec_fingerprint": codebook_fingerprint(model)}
    config = EncodecLMConfig.for_codec(model.config, **options)
    lm = EncodecLM(config).eval()
    lm.head.weight.mul_(0.05 * loud)
    size, books = config.codebook_size, config.num_codebooks
    if fit is not None:
        codes = model.encode(fit[None], num_quantizers=books).audio_codes[:, 0].transpose(0, 1).flatten(1)
        counts = torch.stack([torch.bincount(row, minlength=size) for row in codes]).float()
        lm.head.bias.copy_((counts + 0.05).log().flatten())
    return lm.quantize(torch.randint(size, (2, books, 30)))


def clip(model: EncodecModel, seconds: float, seed: int = 1) -> torch.Tensor:
    """Noise, then a buzz of a few sines: what fits one does not fit the other."""
    config = model.config
    samples = max(2, int(seconds * config.sampling_rate))
    audio = noise(1, config.audio_channels, samples, seed=seed)[0]
    time = torch.arange(samples) / config.sampling_rate
    audio[:, samples // 2 :] = 0.5 * torch.sin(2 * torch.pi * 300 * time[samples // 2 :])
    return audio


@pytest.fixture(scope="module")
def lms(small_models) -> dict[str, EncodecLM]:
    """Language models that make the second half of `clip` shorter and its first half longer."""
    made = {}
    for name, model in small_models.items():
        audio = clip(model, 6.0)
        made[name] = make_lm(model, audio[:, audio.shape[1] // 2 :])
    return made


@pytest.fixture(scope="module")
def file_24khz(small_models, lms) -> bytes:
    """8 segments of 0.25 s at 24 kHz, some raw and some not, the last one shorter."""
    return compress(small_models["24khz"], clip(small_models["24khz"], 1.9), 3.6, lms["24khz"], segment_seconds=0.25)


@pytest.fixture(scope="module")
def file_48khz(small_models, lms) -> bytes:
    """3 segments of one chunk."""
    return compress(small_models["48khz"], clip(small_models["48khz"], 2.5), 3.6, lms["48khz"], segment_seconds=0.1)


def container_items(data: bytes) -> tuple[Header, list]:
    file = io.BytesIO(data)
    header = read_header(file)
    return header, list(read_segments(file, header))


def codes_of(data: bytes, model, lm=None, **options) -> tuple[dict[int, np.ndarray], list[Damage], End | None]:
    items = list(EcdcReader(io.BytesIO(data)).read(model, lm, **options))
    found = {item.index: item.codes for item in items if isinstance(item, DecodedSegment)}
    end = next((item for item in items if isinstance(item, End)), None)
    return found, [item for item in items if isinstance(item, Damage)], end


def same(left: dict[int, np.ndarray], right: dict[int, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[index], right[index]) for index in left)


def places(data: bytes) -> list[int]:
    """Where each segment begins, and where the end does."""
    header, items = container_items(data)
    count = sum(isinstance(item, Segment) for item in items)
    return [*(seek_segment(io.BytesIO(data), header, index) for index in range(count)), len(data) - 28]


def spoil(data: bytes, *indices: int, at: int = 13) -> bytes:
    """`data` with one byte changed in each of these segments."""
    starts, changed = places(data), bytearray(data)
    for index in indices:
        changed[starts[index] + at] ^= 0x10
    return bytes(changed)


class Sink:
    """The writing end of a pipe: has nothing but `write`."""

    def __init__(self):
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data


class Trickle(io.RawIOBase):
    """A pipe: never seeks, gives few bytes at a time, counts what it gave."""

    def __init__(self, data: bytes, step: int = 3):
        self.data, self.step, self.given = data, step, 0

    def read(self, size: int = -1) -> bytes:
        piece = self.data[self.given : self.given + min(size, self.step)]
        self.given += len(piece)
        return piece

    def seekable(self) -> bool:
        return False

    def seek(self, *_):
        raise io.UnsupportedOperation("seek")


def refused(kind=EcdcError, *, match: str):
    """An error of one line, with these words."""

    @contextlib.contextmanager
    def context():
        with pytest.raises(kind, match=match) as caught:
            yield
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300

    return context()


# ---- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_coded_with_the_language_model_or_raw_the_audio_is_the_same(name, small_models, lms):
    model, kinds = small_models[name], set()
    for samples, seconds in (
        (1, 10.0),
        (319, 10.0),
        (321, 0.01),
        (5000, 0.1),
        (47520, 1.0),
        (47521, 9.0),
        (70001, 0.3),
        (70002, 2.0),
    ):
        audio = clip(model, 3.0)[:, -samples - 30000 :][:, :samples]
        codes = model.encode(audio[None], num_quantizers=3)
        expected = model.decode(**codes).audio_values[0]
        raw = compress(model, audio, num_quantizers=3, segment_seconds=seconds)
        coded = compress(model, audio, num_quantizers=3, lm=lms[name], segment_seconds=seconds)
        for data, lm in ((raw, None), (coded, lms[name])):
            decoded, rate = decompress(data, model, lm, strict=True)
            assert rate == model.config.sampling_rate and torch.equal(decoded, expected)
        assert same(codes_of(raw, model)[0], codes_of(coded, model, lms[name])[0])
        header, items = container_items(coded)
        assert header.audio_length == samples and items[-1] == End(len(items) - 1, samples, items[-1].digest)
        assert len(items) - 1 == -(-samples // header.samples_per_segment)
        kinds |= {item.coded_with_lm for item in items[:-1]}
    assert kinds == {True, False}


def test_a_fitting_language_model_makes_files_smaller(small_models):
    for model in small_models.values():
        audio = noise(1, model.config.audio_channels, 2 * model.config.sampling_rate, seed=3)[0] * 0.01
        audio[:, 10000:] = 0  # silence, all of whose codes are the same
        raw, coded = (compress(model, audio, num_quantizers=2, lm=lm) for lm in (None, make_lm(model, audio)))
        assert len(coded) < 0.7 * len(raw)


def test_never_longer_than_raw(small_models):
    """Codes that nothing predicts, and a language model that is sure of others."""
    model, seconds = small_models["24khz"], 0.2
    for lm in (make_lm(model, loud=1.0), make_lm(model, loud=400.0)):
        files = [Sink(), Sink()]
        for file, given in zip(files, (None, lm)):
            writer = EcdcWriter(
                file, model, num_codebooks=8, model_name="m", lm=given, lm_name="l", segment_seconds=seconds
            )
            writer.write(np.random.default_rng(0).integers(0, 64, (8, 150)))
            writer.close(150 * 320)
        raw, coded = (file.data for file in files)
        assert len(coded) <= len(raw) + 1  # the LM's name
    header, items = container_items(coded)
    assert not any(item.coded_with_lm for item in items[:-1]) and header.lm_name == "l"
    assert all(len(item.payload) == header.raw_size(item.frames) for item in items[:-1])


def test_the_choice_is_made_for_each_segment(small_models, lms, file_24khz):
    header, items = container_items(file_24khz)
    coder = LMCoder(lms["24khz"])
    for index, codes in codes_of(file_24khz, small_models["24khz"], lms["24khz"])[0].items():
        raw, by_lm = RawCoder(6).encode(codes), coder.encode(codes)
        assert items[index].coded_with_lm == (len(by_lm) < len(raw))
        assert items[index].payload == (by_lm if len(by_lm) < len(raw) else raw)
    assert {item.coded_with_lm for item in items[:-1]} == {True, False} and len(items) == 9


def test_the_same_audio_gives_the_same_bytes(small_models, lms, file_24khz, file_48khz):
    again = compress(small_models["48khz"], clip(small_models["48khz"], 2.5), 3.6, lms["48khz"], segment_seconds=0.1)
    assert again == file_48khz
    audio = clip(small_models["24khz"], 1.9).numpy()
    assert compress(small_models["24khz"], audio, 3.6, lms["24khz"], segment_seconds=0.25) == file_24khz
    other = compress(small_models["24khz"], audio[:, ::-1].copy(), 3.6, lms["24khz"], segment_seconds=0.25)
    assert read_header(io.BytesIO(other)).file_id != read_header(io.BytesIO(file_24khz)).file_id


PROGRAM = """
import hashlib, io, json, sys
import numpy as np, torch
from modeling_encodec import EncodecLM, EncodecModel
from modeling_encodec.bitstream import segment_coders
from modeling_encodec.bitstream.codes_file import DecodedSegment, EcdcReader, EcdcWriter
from modeling_encodec.bitstream.compression import compress
from modeling_encodec.bitstream.container import read_header, read_segments

folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
model, lm = EncodecModel.from_pretrained(folder + "/model").eval(), EncodecLM.from_pretrained(folder + "/lm").eval()
data = open(folder + "/a.ecdc", "rb").read()
digest = lambda data: hashlib.sha256(data).hexdigest()
codes, again = set(), set()
for together in (1, 3, 8):
    items = list(EcdcReader(io.BytesIO(data)).read(model, lm, together=together))[:-1]
    assert all(isinstance(item, DecodedSegment) for item in items)
    whole = np.concatenate([item.codes for item in items], axis=1)
    codes.add(digest(np.ascontiguousarray(whole, "<i8").tobytes()))
for block in (1, 5, 128):
    segment_coders.BLOCK_FRAMES = block
    file = io.BytesIO()
    header = read_header(io.BytesIO(data))
    writer = EcdcWriter(
        file, model, num_codebooks=8, model_name="model", lm=lm, lm_name="lm", segment_seconds=0.25,
        audio_length=header.audio_length, file_id=header.file_id,
    )
    writer.write(whole)
    writer.close(header.audio_length)
    again.add(digest(file.getvalue()))
coded = compress(model, np.load(folder + "/a.npy"), 3.6, lm, segment_seconds=0.25)
print(json.dumps({"threads": torch.get_num_threads(), "codes": list(codes), "again": list(again),
                  "coded": digest(coded)}))
"""


def test_processes_threads_batches_and_blocks_agree(small_models, lms, tmp_path):
    """Codes and bytes do not hang on who decodes or encodes them."""
    for kind, saved in (("model", small_models["24khz"]), ("lm", lms["24khz"])):
        saved.save_pretrained(tmp_path / kind)
    audio = clip(small_models["24khz"], 1.9)
    np.save(tmp_path / "a.npy", audio.numpy())
    names = {"model_name": "model", "lm_name": "lm"}
    data = compress(small_models["24khz"], audio, 3.6, lms["24khz"], segment_seconds=0.25, **names)
    (tmp_path / "a.ecdc").write_bytes(data)
    found = codes_of(data, small_models["24khz"], lms["24khz"])[0]
    codes = hashlib.sha256(np.ascontiguousarray(np.concatenate(list(found.values()), axis=1), "<i8").tobytes())
    for threads in (1, 2):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["threads"] == threads
        assert result["codes"] == [codes.hexdigest()]
        assert result["again"] == [hashlib.sha256(data).hexdigest()]
        if threads == 1:  # the encoder is in floats
            assert result["coded"] == hashlib.sha256(data).hexdigest()


# ---- as it comes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["24khz", "48khz"])
@torch.no_grad()
def test_writing_of_unknown_length_and_reading_as_it_arrives(name, small_models, lms):
    model, lm, sink = small_models[name], lms[name], Sink()
    samples = 100_000
    coded = model.encode(clip(model, 5.0)[None, :, -samples:], num_quantizers=3)
    options = {"num_codebooks": 3, "model_name": "m", "lm": lm, "lm_name": "l", "segment_seconds": 0.4}
    writer = EcdcWriter(sink, model, **options)
    spans = model.config.chunk_spans(samples)
    for codes, scale, (start, stop) in zip(coded.audio_codes[:, 0].numpy(), coded.audio_scales, spans):
        if scale is not None:
            writer.write(codes[:, : model.config.num_frames(stop - start)], scale.item())
        else:
            for at in range(0, codes.shape[1], 7):
                writer.write(codes[:, at : at + 7])
    written = len(sink.data)
    writer.close(samples)
    assert read_header(io.BytesIO(sink.data)).audio_length is None and written > 0.8 * len(sink.data)
    assert torch.equal(decompress(sink.data, model, lm, strict=True)[0], model.decode(**coded).audio_values[0])

    pipe, starts = Trickle(sink.data), places(sink.data)
    for item in EcdcReader(pipe).read(model, lm):
        # Once its last byte is there, and no byte later.
        following = starts[item.index + 1] if isinstance(item, DecodedSegment) else len(sink.data)
        assert not isinstance(item, Damage) and pipe.given == following
    assert isinstance(item, End) and item.audio_length == samples and item.segments == len(starts) - 1
    assert torch.equal(decompress_from_file(Trickle(sink.data), model, lm)[0], decompress(sink.data, model, lm)[0])


def test_pieces_of_any_size_give_the_same_file(small_models, lms):
    model, files = small_models["24khz"], []
    codes = np.random.default_rng(0).integers(0, 8, (4, 100))
    for step in (1, 7, 19, 100):
        sink = Sink()
        writer = EcdcWriter(
            sink, model, num_codebooks=4, model_name="m", lm=lms["24khz"], lm_name="l", segment_seconds=0.2, file_id=7
        )
        for at in range(0, 100, step):
            writer.write(codes[:, at : at + step])
        writer.close(32000)
        files.append(sink.data)
    assert len(set(files)) == 1


def test_segments_are_written_once_they_are_full(small_models):
    sink = Sink()
    writer = EcdcWriter(sink, small_models["24khz"], num_codebooks=2, model_name="m", segment_seconds=0.1)
    frames, sizes = writer.header.frames_per_segment, []
    for _ in range(2 * frames + 1):
        writer.write(np.zeros((2, 1), dtype=np.int64))
        sizes.append(len(sink.data))
    assert frames == 8 and sizes[frames - 2] == 0 < sizes[frames - 1] == sizes[2 * frames - 2] < sizes[-1]


@pytest.mark.parametrize("codes", [np.full((2, 9), 64), np.full((2, 9), -1), np.zeros((3, 9), int), np.zeros(9, int)])
@pytest.mark.parametrize("with_lm", [False, True])
def test_codes_that_the_file_cannot_hold_are_refused(codes, with_lm, small_models, lms):
    """They would come back as others, without a word."""
    lm = lms["24khz"] if with_lm else None
    writer = EcdcWriter(
        Sink(), small_models["24khz"], num_codebooks=2, model_name="m", lm=lm, lm_name="l", segment_seconds=0.1
    )
    with refused(ValueError, match="allowed"):
        writer.write(codes)


def test_codes_of_any_whole_number_type(small_models, lms):
    for lm in (None, lms["24khz"]):
        files = set()
        for kind in (np.int64, np.int32, np.uint16, np.uint8):
            sink = Sink()
            options = {"num_codebooks": 2, "model_name": "m", "lm": lm, "lm_name": "l"}
            writer = EcdcWriter(sink, small_models["24khz"], **options)
            writer.write(np.arange(40).reshape(2, 20).astype(kind))
            writer.close(6400)
            files.add(sink.data)
        assert len(files) == 1
        writer = EcdcWriter(sink, small_models["24khz"], **options)
        writer.write(np.ones((2, 20), dtype=np.int64))
        writer.close(6400)
        assert writer.header.file_id != read_header(io.BytesIO(sink.data)).file_id


@pytest.mark.parametrize("together", [1, 8])
def test_seeking(together, small_models, lms, file_24khz):
    model, lm = small_models["24khz"], lms["24khz"]
    expected = codes_of(file_24khz, model, lm)[0]
    for data in (file_24khz, spoil(file_24khz, 1)):
        for index in (0, 2, 7):
            file = io.BytesIO(data)
            header = read_header(file)
            seek_segment(file, header, index)
            items = list(EcdcReader(file, header).read(model, lm, together=together, first=index))
            found = [item for item in items if isinstance(item, DecodedSegment)]
            wanted = [n for n in range(index, 8) if data is file_24khz or n != 1]
            assert [item.index for item in found] == wanted
            assert all(np.array_equal(item.codes, expected[item.index]) for item in found)
            assert any(isinstance(item, Damage) for item in items) == (data is not file_24khz and index == 0)


# ---- models that do not fit --------------------------------------------------------------------------------------


def test_wrong_models_are_named_and_refused(small_models, lms, file_24khz):
    model, lm = small_models["24khz"], lms["24khz"]
    other = make_model(model.config, seed=9)
    with refused(match=f"'unnamed' .fingerprint {model_fingerprint(model)}.*{model_fingerprint(other)}"):
        decompress(file_24khz, other, lm)
    with refused(match=f"{model_fingerprint(small_models['32khz'])}"):
        decompress(file_24khz, small_models["32khz"], lm)
    with refused(match="language model 'unnamed', and none is given"):
        list(EcdcReader(io.BytesIO(file_24khz)).read(model))
    sure = make_lm(model, loud=3.0)
    with refused(match=f"language model 'unnamed' .fingerprint {lm_fingerprint(lm)}.*{lm_fingerprint(sure)}"):
        decompress(file_24khz, model, sure)
    with refused(ValueError, match="float alone.*quantize"):
        decompress(file_24khz, model, EncodecLM(EncodecLMConfig.for_codec(model.config, **LM_SIZE)))


def test_a_change_of_the_decoder_alone_is_seen(small_models, lms, file_24khz):
    changed = copy.deepcopy(small_models["24khz"])
    decompress(file_24khz, changed, lms["24khz"], strict=True)
    with torch.no_grad():
        next(changed.decoder.parameters()).view(-1)[0] += 1e-3
    assert codebook_fingerprint(changed) == codebook_fingerprint(small_models["24khz"])
    with refused(match="fingerprint"):
        decompress(file_24khz, changed, lms["24khz"])
    encoder = copy.deepcopy(small_models["24khz"])
    with torch.no_grad():
        next(encoder.encoder.parameters()).view(-1)[0] += 1e-3
    decompress(file_24khz, encoder, lms["24khz"], strict=True)  # decoding needs no encoder


def test_language_models_that_cannot_code_are_refused_before_the_work(small_models, lms, monkeypatch):
    model, audio = small_models["24khz"], noise(1, 1, 5000)[0]
    size = LM_SIZE | {"codec_fingerprint": codebook_fingerprint(model)}

    def quantized(config):
        return EncodecLM(config).quantize(torch.randint(config.codebook_size, (1, config.num_codebooks, 9)))

    few = quantized(EncodecLMConfig.for_codec(model.config, **size, num_codebooks=4))
    with refused(ValueError, match="has 4 codebooks of 64, allowed: at least 8 of 64"):
        compress(model, audio, 3.6, few)
    assert decompress(compress(model, audio, 1.8, few), model, few, strict=True)[0].shape == (1, 5000)
    monkeypatch.setattr(EncodecModel, "encode", lambda *_, **__: pytest.fail("encoded"))
    with refused(ValueError, match="float alone.*quantize"):
        compress(model, audio, 0.9, EncodecLM(EncodecLMConfig.for_codec(model.config, **size)))
    with refused(ValueError, match="codebooks of 32, allowed.*of 64"):
        compress(model, audio, 0.9, quantized(EncodecLMConfig.for_codec(model.config, **size | {"codebook_size": 32})))
    with refused(ValueError, match=f"trained on the codec {codebook_fingerprint(small_models['32khz'])}"):
        compress(model, audio, 0.9, lms["32khz"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"version": 2}, "version is 2, allowed: 0 or 1"), ({"segment_seconds": 0}, "segment_seconds is 0")]
    + [({"segment_seconds": float("nan")}, "segment_seconds is nan"), ({"model_name": "\ud800"}, "model_name")],
)
def test_bad_options(options, message, small_models):
    with refused(ValueError, match=message):
        compress(small_models["24khz"], noise(1, 1, 900)[0], **options)


def test_bad_choice_of_concealment(small_models, file_24khz):
    with refused(ValueError, match="conceal is 'noise', allowed: silence, repeat"):
        decompress(file_24khz, small_models["24khz"], conceal="noise")


def test_weights_replaced_where_others_lay_change_the_fingerprint(small_models):
    """Memory that is given back is given out again, at the same address."""
    model = copy.deepcopy(small_models["24khz"])
    codebook = model.quantizer.layers[0].codebook
    for turn in range(40):
        codebook.embed = torch.full((64, 16), float(turn))
        before = codebook_fingerprint(model)
        address, codebook.embed, others = codebook.embed.data_ptr(), None, []
        while (new := torch.full((64, 16), turn + 0.5)).data_ptr() != address and len(others) < 50:
            others.append(new)
        codebook.embed = new
        assert codebook_fingerprint(model) != before, turn


def test_models_made_in_inference_mode(small_models, lms):
    audio = noise(1, 1, 3000)[0]
    with torch.inference_mode():
        model, lm = copy.deepcopy(small_models["24khz"]), copy.deepcopy(lms["24khz"])
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        data = compress(model, audio, 0.9, lm)
    assert data == compress(small_models["24khz"], audio, 0.9, lms["24khz"])


@torch.no_grad()
def test_half_precision(small_models, lms, file_24khz, tmp_path):
    """Its codes come back to it. Rounding makes another decoder, which is seen; codebooks stay as they are."""
    audio = clip(small_models["24khz"], 1.0)
    small_models["24khz"].save_pretrained(tmp_path)
    loaded = EncodecModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    moved = copy.deepcopy(small_models["24khz"]).to(torch.bfloat16)
    lm = copy.deepcopy(lms["24khz"]).to(torch.bfloat16)
    assert lm_fingerprint(lm) == lm_fingerprint(lms["24khz"]) and model_fingerprint(loaded) == model_fingerprint(moved)
    assert codebook_fingerprint(moved) == codebook_fingerprint(small_models["24khz"])
    data = compress(moved, audio, 3.6, lm, segment_seconds=0.3)
    decoded, _ = decompress(data, loaded, lms["24khz"], strict=True)
    assert torch.equal(decoded, moved.decode(**moved.encode(audio[None], bandwidth=3.6)).audio_values[0].to(decoded))
    for conceal in ("silence", "repeat"):
        assert decompress(spoil(data, 1), moved, lm, conceal=conceal)[0].isfinite().all()
    for file, model in ((file_24khz, moved), (data, small_models["24khz"])):
        with refused(match="fingerprint"):
            decompress(file, model, lm)


def test_models_by_their_names(bundled_model, monkeypatch, tmp_path):
    audio = noise(1, 1, 12000)[0]
    lm = make_lm(bundled_model, audio)
    data = compress(bundled_model, audio, 6.0, lm, lm_name=BUNDLED_LM)
    header, items = container_items(data)
    assert (header.model_name, header.lm_name) == ("encodec_24khz_c16", BUNDLED_LM) and items[0].coded_with_lm
    lm.save_pretrained(tmp_path / BUNDLED_LM)
    monkeypatch.setattr(compression, "lm_checkpoint_for", lambda name: str(tmp_path / name))
    assert torch.equal(decompress(data)[0], decompress(data, bundled_model, lm)[0])
    assert compress(bundled_model, audio, 6.0, EncodecLM.from_pretrained(tmp_path / BUNDLED_LM)) == data
    monkeypatch.undo()
    other = compress(bundled_model, audio, 6.0, lm, lm_name="somebody's")
    with refused(ValueError, match=f"somebody's.*known: {BUNDLED_LM}"):
        decompress(other)
    with refused(ValueError, match="'somebody's', known: encodec_24khz_c16|known: encodec_24khz_c16"):
        decompress(compress(bundled_model, audio, 6.0, model_name="somebody's"))
    assert torch.equal(decompress(other, lm=lm)[0], decompress(data, bundled_model, lm)[0])


def test_version_0_with_a_language_model(small_models, caplog):
    model, audio = small_models["24khz"], clip(small_models["24khz"], 0.5)
    lm = make_lm(model, audio, zero_past_key=True)
    data = compress(model, audio, 0.9, lm, version=0)
    assert data[4] == 0 and "version 1 files do not" in caplog.records[-1].getMessage()
    caplog.clear()
    assert torch.equal(decompress(data, model, lm)[0], decompress(compress(model, audio, 0.9), model)[0])
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    with refused(match="none is given"):
        decompress(data, model)


# ---- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["24khz", "48khz"])
@torch.no_grad()
def test_each_segment_damaged_in_turn(name, small_models, lms, file_24khz, file_48khz, caplog):
    model, lm, data = small_models[name], lms[name], {"24khz": file_24khz, "48khz": file_48khz}[name]
    sound, _, end = codes_of(data, model, lm)
    rate, size, total = model.config.sampling_rate, read_header(io.BytesIO(data)).samples_per_segment, end.audio_length
    for index in sound:
        bad = spoil(data, index)
        for together in (1, 16):
            found, (damage,), found_end = codes_of(bad, model, lm, together=together)
            assert same(found, {n: codes for n, codes in sound.items() if n != index}) and found_end == end
            span = (index * size, min((index + 1) * size, total))
            assert (damage.first, damage.last, damage.start, damage.end) == (index, index, *span)
        line = f"segment {index} ({span[0] / rate:.2f} s to {span[1] / rate:.2f} s): checksum does not fit"
        assert damage.describe(rate) == line
        with refused(match="checksum does not fit"):
            decompress(bad, model, lm, strict=True)
        heard, silent = [], []
        caplog.clear()
        repeated, _ = decompress(bad, model, lm, conceal="repeat", on_damage=heard.append)
        assert heard == [damage] and not caplog.records
        silent, _ = decompress(bad, model, lm)
        assert [record.getMessage() for record in caplog.records] == [f"concealed: {line}"]
        assert caplog.records[0].levelno == logging.WARNING
        assert silent.shape == repeated.shape == (model.config.audio_channels, total)
        assert (silent[:, slice(*span)] == 0).all()
        # Elsewhere as with repeated codes, but for fades of FADE_SECONDS.
        fade = int(FADE_SECONDS * rate)
        at = torch.arange(total)
        distance = torch.maximum(span[0] - at, at - span[1] + 1)
        gain = (distance.clamp(0, fade + 1) / (fade + 1)).float()
        torch.testing.assert_close(silent, repeated * gain, rtol=0, atol=1e-6)
        assert (gain[distance > fade] == 1).all() and 0 < gain.diff().abs().max() < 1.01 / fade
        expected = dict(sound)
        near = sound[index - 1 if index else 1]
        expected[index] = near[:, np.arange(sound[index].shape[1]) % near.shape[1]]
        items = EcdcReader(io.BytesIO(bad)).read(model, lm)
        joined = join_segments(items, read_header(io.BytesIO(data)), model.config, strict=False, on_damage=id)
        assert np.array_equal(
            np.concatenate(joined.chunks, 1), np.concatenate([expected[n] for n in sorted(sound)], 1)
        )
        assert joined.concealed == [span] and joined.audio_length == total
        if name == "48khz":
            scales = [item.scales for item in container_items(data)[1][:-1]]
            scales[index] = scales[index - 1 if index else 1]
            assert joined.scales == [scale for some in scales for scale in some]


@torch.no_grad()
def test_damaged_neighbours_and_ends(small_models, lms, file_24khz):
    model, lm, size = small_models["24khz"], lms["24khz"], 6080
    for lost in ([0, 1], [3, 4, 5], [6, 7], [0, 2, 7], [1, 3]):
        heard = []
        audio, _ = decompress(spoil(file_24khz, *lost), model, lm, on_damage=heard.append)
        covered = [n for damage in heard for n in range(damage.first, damage.last + 1)]
        assert covered == lost
        for index in range(8):
            assert (audio[:, index * size : (index + 1) * size] == 0).all() == (index in lost)


@pytest.mark.parametrize("name", ["24khz", "48khz"])
def test_nothing_left(name, small_models, lms, file_24khz, file_48khz):
    data = {"24khz": file_24khz, "48khz": file_48khz}[name]
    bad, heard = spoil(data, *range(len(places(data)) - 1)), []
    with refused(match="no segment of the file could be read"):
        decompress(bad, small_models[name], lms[name], on_damage=heard.append)
    assert heard
    header = places(data)[0]
    for cut in (data[:header], data[: header + 5], data[:header] + data[-28:]):
        with refused(match="no segment of the file could be read"):
            decompress(cut, small_models[name], lms[name])


def test_a_damaged_header_is_an_error(small_models, lms, file_24khz):
    for at in range(places(file_24khz)[0]):
        with refused(ValueError, match="."):
            decompress(file_24khz[:at] + bytes([file_24khz[at] ^ 4]) + file_24khz[at + 1 :], small_models["24khz"])
        with refused(match="ends inside the header"):
            decompress(file_24khz[:at], small_models["24khz"], lms["24khz"])


@torch.no_grad()
def test_truncated_files(small_models, lms, file_24khz):
    model, lm, starts = small_models["24khz"], lms["24khz"], places(file_24khz)
    whole, sound = decompress(file_24khz, model, lm)[0], codes_of(file_24khz, model, lm)[0]
    for size in range(starts[0], len(file_24khz)):
        found, damages, end = codes_of(file_24khz[:size], model, lm) if size % 97 == 0 or size in starts else (0, 0, 0)
        if found == 0:
            continue
        count = sum(start <= size for start in starts[1:])
        assert same(found, {n: sound[n] for n in range(count)})
        assert len(damages) == 1 and end is None and (damages[0].first, damages[0].last) == (count, 7)
    for size in (starts[3], starts[3] + 30, starts[7], starts[8], len(file_24khz) - 1):
        with refused(match="the file has no end"):
            decompress(file_24khz[:size], model, lm, strict=True)
        audio = decompress(file_24khz[:size], model, lm)[0]
        kept = 6080 * sum(start <= size for start in starts[1:])
        assert audio.shape == whole.shape and (audio[:, kept:] == 0).all()
        assert torch.equal(audio[:, : kept - 400], whole[:, : min(kept, 45600) - 400]) or kept >= 45600
        if size >= starts[8]:  # only the end is missing: the header has the length
            assert torch.equal(audio, whole)
    with refused(match="bytes follow the end"):
        decompress(file_24khz + b"\0", model, lm, strict=True)
    heard = []
    assert torch.equal(decompress(file_24khz + b"\0", model, lm, on_damage=heard.append)[0], whole) and len(heard) == 1


def streamed(model: EncodecModel, lm: EncodecLM | None, audio: torch.Tensor, seconds: float) -> bytes:
    """`compress` as if the length were not known before the end."""
    sink, samples = Sink(), audio.shape[1]
    coded = model.encode(audio[None], num_quantizers=2)
    options = {"num_codebooks": 2, "model_name": "m", "lm": lm, "lm_name": "l", "segment_seconds": seconds}
    writer = EcdcWriter(sink, model, **options)
    spans = model.config.chunk_spans(samples)
    for codes, scale, (start, stop) in zip(coded.audio_codes[:, 0].numpy(), coded.audio_scales, spans):
        writer.write(codes[:, : model.config.num_frames(stop - start)], None if scale is None else scale.item())
    writer.close(samples)
    return sink.data


@pytest.mark.parametrize("name", ["24khz", "48khz"])
@pytest.mark.parametrize("samples", [150_000, 4 * 47520, 3 * 47520 + 100, 3 * 47520 + 470])
@torch.no_grad()
def test_without_end_and_known_length_all_segments_are_kept(name, samples, small_models, lms):
    """A stream that broke off: what is there is all there is, up to a hop, and no segment that passed is lost."""
    model, lm = small_models[name], lms[name]
    data = streamed(model, lm, clip(model, 8.5)[:, -samples:], 1.0)
    whole, starts = decompress(data, model, lm, strict=True)[0], places(data)
    for kept in range(1, len(starts)):
        heard = []
        audio = decompress(data[: starts[kept]], model, lm, on_damage=heard.append)[0]
        assert [damage.reason for damage in heard] == ["the file has no end"]
        size = read_header(io.BytesIO(data)).samples_per_segment
        assert abs(audio.shape[1] - min(kept * size, samples)) <= 320 + (480 if name == "48khz" else 0)
        # The last chunk may be cut by a frame, which its norms are over.
        equal = min(audio.shape[1], samples) - 2000 if name == "24khz" else (kept - 1) * size
        assert torch.equal(audio[:, :equal], whole[:, :equal])
        with refused(match="the file has no end"):
            decompress(data[: starts[kept]], model, lm, strict=True)


def test_false_writers(small_models, lms):
    """Checksums that fit do not make codes fit."""
    model = make_model(EncodecConfig(num_filters=2, hidden_size=16, codebook_size=600), seed=1)
    sink = Sink()
    writer = EcdcWriter(sink, model, num_codebooks=2, model_name="m", segment_seconds=0.1, file_id=1)
    writer.write(np.zeros((2, 16), dtype=np.int64))
    writer.segments.write(8, (), b"\xff" * 20, False)
    writer.close(24 * 320)
    found, (damage,), _ = codes_of(sink.data, model)
    assert sorted(found) == [0, 1] and damage.first == 2 and "a code is 1023, allowed: up to 599" in damage.reason
    lm, sink = lms["24khz"], Sink()
    options = {"num_codebooks": 8, "model_name": "m", "lm": lm, "lm_name": "l", "segment_seconds": 0.1, "file_id": 1}
    writer = EcdcWriter(sink, small_models["24khz"], **options)
    writer.write(np.zeros((8, 8), dtype=np.int64))
    for payload in (b"\xff" * 8, b"123"):  # impossible bytes
        writer.segments.write(8, (), payload, True)
    writer.close(24 * 320)
    for together in (1, 16):
        found, damages, end = codes_of(sink.data, small_models["24khz"], lm, together=together)
        assert list(found) == [0] and [damage.first for damage in damages] == [1, 2] and end is not None


# ---- fifty thousand mutated files --------------------------------------------------------------------------------

TABLE = Table(
    [
        spread(row)
        for row in ([9, 3, 1, 1, 0, 0, 0, 1], [0, 1, 90, 0, 5, 1, 0, 0], [1] * 8, [200, 0, 1, 30, 0, 0, 9, 0])
    ]
)
SHAPE = {"sampling_rate": 8, "channels": 1, "codebooks": 2, "codebook_size": 8, "hop_length": 2}
SHAPE |= {"frames_per_segment": 8, "samples_per_segment": 16, "lm_name": "l", "lm_fingerprint": "fedcba9876543210"}


def mutation_sources() -> list[tuple[Header, bytes, dict[int, np.ndarray]]]:
    """Header, bytes and codes. The second has the first one's number and header but other codes; the third neither."""
    sources, coder, raw = [], LMCoder(TABLE), RawCoder(3)
    for seed, file_id, length in ((1, 77, 78), (2, 77, 78), (3, 78, None)):
        rng, file, codes = np.random.default_rng(seed), io.BytesIO(), {}
        header = Header("m", "0123456789abcdef", file_id=file_id, audio_length=length, **SHAPE)
        write_header(file, header)
        writer = SegmentWriter(file, header)
        for index in range(5):
            frames, coded, payload = 8 - (index == 4), index % 2 == 0, b""
            if coded:
                while len(payload) != 4:  # codes that a word suffices for
                    (codes[index],) = coder.decode([rng.bytes(4)], 2, [frames])
                    payload = coder.encode(codes[index])
            else:
                codes[index] = rng.integers(0, 8, (2, frames))
                payload = raw.encode(codes[index])
            writer.write(frames, (), payload, coded)
        writer.close(78)
        sources.append((header, file.getvalue(), codes))
    return sources


def mutated(data: bytes, rng: random.Random, others: list[bytes], parts: list[int]) -> bytes:
    kind, size = rng.randrange(7), len(data)
    start, stop = sorted((rng.randrange(size + 1), rng.randrange(size + 1)))
    if kind == 0:  # flips
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 1:  # truncated
        return data[:start]
    if kind == 2:  # spliced with another file, at the same place or not
        other = rng.choice(others)
        return data[:start] + other[start if rng.random() < 0.5 else rng.randrange(len(other)) :]
    if kind == 3:  # bytes between
        return data[:start] + rng.randbytes(rng.randint(1, 30)) + data[start:]
    if kind == 4:  # bytes gone or repeated
        return data[:start] + data[stop:] if rng.random() < 0.5 else data[:stop] + data[start:]
    pieces = [data[at:end] for at, end in zip(parts, [*parts[1:], size])]
    other = rng.choice(others)
    if kind == 5:  # segments in another order
        rng.shuffle(pieces)
    else:  # segments of another file, which has them at the same places, or the same one twice
        at = rng.randrange(len(pieces))
        end = [*parts[1:], size][at]
        pieces[rng.randrange(len(pieces)) if rng.random() < 0.5 else at] = other[parts[at] : end]
    return data[: parts[0]] + b"".join(pieces)


def test_fifty_thousand_mutated_files(monkeypatch):
    """Each is an error, or damage is reported and the rest is as it was, or nothing has changed."""

    def check_models(header, model, lm):
        if header.model_fingerprint != "0123456789abcdef":
            raise EcdcError("another model")

    monkeypatch.setattr(codes_file, "check_models", check_models)
    sources, rng, seen = mutation_sources(), random.Random(2024), {}
    parts = [places(data) for _, data, _ in sources]
    assert parts[0] == parts[1] == parts[2]
    for number in range(50_000):
        _, data, _ = sources[number % 3]
        others = [other for _, other, _ in sources if other is not data]
        data = mutated(data, rng, others, parts[0])
        if rng.random() < 0.3:
            data = mutated(data, rng, others, parts[0]) if data else b""
        result = outcome(data, sources)
        seen[result] = seen.get(result, 0) + 1
    assert all(seen[result] > 300 for result in ("refused", "reported", "distrusted", "unchanged")), seen


def outcome(data: bytes, sources) -> str:
    try:
        reader = EcdcReader(io.BytesIO(data))
    except EcdcError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
        return "refused"
    items = list(reader.read(None, TABLE, together=8))
    found = {item.index: item.codes for item in items if isinstance(item, DecodedSegment)}
    damages = [item for item in items if isinstance(item, Damage)]
    known = [(whole, codes) for header, whole, codes in sources if header == reader.header]
    assert known, "a header of no file"
    if not damages:
        assert any(same(found, codes) for _, codes in known) and isinstance(items[-1], End)
        assert any(data == whole for whole, _ in known), "changes that are not reported"
        return "unchanged"
    if any(damage.first == 0 and damage.last is None for damage in damages):
        return "distrusted"
    for index, codes in found.items():
        assert any(np.array_equal(codes, original[index]) for _, original in known)
    covered = {n for damage in damages for n in range(damage.first, (4 if damage.last is None else damage.last) + 1)}
    assert covered.isdisjoint(found) and covered | set(found) == set(range(5))
    if any(isinstance(item, End) for item in items):
        # Segments of two files are told apart if all are there.
        assert covered or any(same(found, codes) for _, codes in known)
    return "reported"


# ---- golden files ------------------------------------------------------------------------------------------------


def integers(name: str, count: int, limit: int) -> np.ndarray:
    """`count` whole numbers within `limit` either way, the same for ever: a hash of the name and the place."""
    words = (np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()))) * np.uint64(0x9E3779B97F4A7C15)
    words ^= words >> np.uint64(29)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    return (words >> np.uint64(40)).astype(np.int64) % (2 * limit + 1) - limit


def golden_codec(stereo: bool) -> EncodecModel:
    """A codec of 4 filters or so, all of whose tensors are eighths."""
    size = {"num_filters": 2, "hidden_size": 4, "num_lstm_layers": 1, "codebook_size": 16}
    rates = {"sampling_rate": 1000, "upsampling_ratios": [2, 2], "target_bandwidths": [3.0]}
    if stereo:
        chunks = {"chunk_length_s": 0.2, "overlap": 0.1, "normalize": True, "audio_channels": 2}
        rates |= chunks | {"norm_type": "time_group_norm", "use_causal_conv": False}
    model = EncodecModel(EncodecConfig(**size, **rates)).eval()
    state = model.state_dict()
    for name, tensor in state.items():
        filled = torch.from_numpy(integers(name, tensor.numel(), 8)).reshape(tensor.shape)
        tensor.copy_(filled.to(tensor.dtype) / 8 if tensor.is_floating_point() else filled)
    model.load_state_dict(state)
    return model


def golden_lm(codec: EncodecModel) -> EncodecLM:
    """A language model whose tables are filled by a rule, within what sums and table lengths allow."""
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    forms = {"has_float_form": False, "has_integer_form": True}
    config = EncodecLMConfig.for_codec(codec.config, **size, **forms, context_seconds=0.05, max_positions=16)
    lm = EncodecLM(config).eval()
    exponents = {"embedding": 4, "input": -5, "score": -5, "attended": 0, "middle": -5, "head": -5}
    exponents |= {"qkv_proj": -6, "o_proj": -5, "up_proj": -7, "down_proj": -6, "head.": -3}
    tables = {
        "attention_exp": 65536 >> np.arange(1024) // 44,
        "output_exp": (1 << 20) >> np.arange(2048) // 89,
        "gelu": np.maximum((np.arange(1024) - 512) // 6, -10),
    }
    state = lm.integer.state_dict()
    for name, tensor in state.items():
        kind = name.split(".")[-1]
        if kind in tables:
            values = tables[kind]
        elif "exponent" in kind:
            values = np.full(tensor.numel(), next(exponents[key] for key in reversed(exponents) if key in name))
        elif kind == "gain":
            values = 256 + integers(name, tensor.numel(), 60)
        elif kind == "epsilon":
            values = np.array([1000])
        elif "up_proj.bias" in name:
            values = (512 << 7) + integers(name, tensor.numel(), 2000)
        else:
            limits = {"weight": 127, "embeddings": 127, "positions": 700, "bias": 2000, "offset": 1 << 36}
            values = integers(name, tensor.numel(), limits[kind])
        tensor.copy_(torch.from_numpy(np.asarray(values, dtype=np.int64)).reshape(tensor.shape))
        if kind == "weight":
            bias = state[name.replace("weight", "bias")].long().abs()
            assert (tensor.long().abs().sum(1) * 127 + bias < 1 << 24).all()
    lm.integer.load_state_dict(state)
    return lm


def golden_codes(frames: int, lm: EncodecLM | None, books: int = 3) -> np.ndarray:
    """Codes by a rule, or drawn by it from the language model's frequencies."""
    if lm is None:
        return (integers(f"codes {frames}", books * frames, 1 << 20) % 16).reshape(books, frames)
    draws = (integers(f"draws {frames}", books * frames, 1 << 22) % (1 << 24)).reshape(books, frames)
    codes, previous, cache = np.zeros((books, frames), np.int64), torch.full((1, books, 1), -1), None
    for frame in range(frames):
        frequencies, cache = lm.frequencies(previous, cache)
        ends = frequencies[0, :, 0].long().cumsum(1).numpy()
        codes[:, frame] = [np.searchsorted(ends[book], draws[book, frame], side="right") for book in range(books)]
        previous = torch.from_numpy(codes[None, :, frame : frame + 1])
    return codes


def golden_file(name: str, chunks: list[np.ndarray], scales: list[float | None], audio_length: int) -> bytes:
    """Bytes of the golden file `name`, of these codes."""
    model, lm = golden_models(name)
    sink = Sink()
    names = {"model_name": "golden", "lm": lm, "lm_name": None if lm is None else "golden lm"}
    given = None if name == "lm" else audio_length
    seconds = {"raw": 0.1, "lm": 0.2, "stereo": 0.36}[name]
    writer = EcdcWriter(sink, model, num_codebooks=3, **names, segment_seconds=seconds, audio_length=given, file_id=99)
    for codes, scale in zip(chunks, scales):
        writer.write(codes, scale)
    writer.close(audio_length)
    return sink.data


@functools.cache
def golden_models(name: str) -> tuple[EncodecModel, EncodecLM | None]:
    model = golden_codec(stereo=name == "stereo")
    return model, None if name == "raw" else golden_lm(model)


def write_golden() -> None:
    """Make the golden files and print what the test says of them."""
    drawn = [golden_codes(frames, golden_models("lm")[1])[:, :50] for frames in (50, 51, 25)]
    mixed = np.concatenate([*drawn[:2], golden_codes(50, None), drawn[2]], 1)  # segments of 50 frames
    fitting = golden_codes(100, golden_models("stereo")[1])
    stereo = [fitting[:, :50], fitting[:, 50:], golden_codes(50, None), golden_codes(17, None)]
    files = {
        "raw": ([golden_codes(85, None)], [None], 337),
        "lm": ([mixed], [None], 699),
        "stereo": (stereo, [0.25, 1.5, 0.75, 2.0], 3 * 180 + 66),
    }
    for name, parts in files.items():
        path = GOLDEN / f"{name}.ecdc"
        path.write_bytes(golden_file(name, *parts))
        digest = hashlib.sha256(np.ascontiguousarray(np.concatenate(parts[0], 1), "<i8").tobytes()).hexdigest()[:16]
        items = container_items(path.read_bytes())[1][:-1]
        print(
            name,
            path.stat().st_size,
            digest,
            [item.coded_with_lm for item in items],
            model_fingerprint(golden_models(name)[0]),
        )


@pytest.mark.parametrize(
    ("name", "size", "digest", "coded"),
    [
        ("raw", 283, "f0c38567bb4b60fb", "rrrr"),
        ("lm", 354, "c2a94508d44f8a0f", "llrl"),
        ("stereo", 340, "0b77f069e19ae80f", "lr"),
    ],
)
def test_golden_files_are_read_and_written_as_ever(name, size, digest, coded):
    data = (GOLDEN / f"{name}.ecdc").read_bytes()
    model, lm = golden_models(name)
    assert len(data) == size
    header, items = container_items(data)
    assert "".join("rl"[item.coded_with_lm] for item in items[:-1]) == coded
    found, damages, end = codes_of(data, model, lm)
    assert not damages and len(found) == len(coded)
    whole = np.concatenate(list(found.values()), axis=1)
    assert hashlib.sha256(np.ascontiguousarray(whole, "<i8").tobytes()).hexdigest()[:16] == digest
    assert same(codes_of(data, model, lm, together=4)[0], found)
    chunks, scales = [whole], [None]
    if name == "stereo":
        chunks, scales = np.split(whole, [50, 100, 150], axis=1), [0.25, 1.5, 0.75, 2.0]
        assert [scale for item in items[:-1] for scale in item.scales] == scales
    assert golden_file(name, chunks, scales, end.audio_length) == data
    audio, rate = decompress(data, model, lm, strict=True)
    assert rate == 1000 and audio.shape == (model.config.audio_channels, end.audio_length) and audio.isfinite().all()


def test_golden_codes_are_the_rules():
    assert np.array_equal(
        codes_of((GOLDEN / "raw.ecdc").read_bytes(), golden_models("raw")[0])[0][0], golden_codes(85, None)[:, :25]
    )
    model, lm = golden_models("lm")
    first = codes_of((GOLDEN / "lm.ecdc").read_bytes(), model, lm)[0][0]
    assert np.array_equal(first, golden_codes(50, lm))
    assert first[0, :12].tolist() == [14, 15, 14, 14, 9, 0, 14, 15, 15, 12, 14, 8]


# ---- the command line --------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    """Run the command line: exit code, stdout and the lines of stderr."""

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return call


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


if __name__ == "__main__":
    write_golden()
