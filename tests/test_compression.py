"""`.ecdc` version 1 as a whole: audio to bytes and back with a language model, however it is run."""

import hashlib
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import clip, noise
from ecdc_files import NAMES, codes_of, container_items, make_lm, places, refused, same, spoil
from pipe_ends import Sink, Trickle

from modeling_encodec.bitstream.codes_file import DecodedSegment, EcdcReader, EcdcWriter
from modeling_encodec.bitstream.compression import compress, decompress, decompress_from_file, read_codes
from modeling_encodec.bitstream.container import (
    Damage,
    End,
    read_header,
    seek_segment,
)
from modeling_encodec.bitstream.segment_coders import LMCoder, RawCoder


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
        whole = np.concatenate(
            [
                chunk[0][:, : model.config.num_frames(stop - start)]
                for chunk, (start, stop) in zip(codes.audio_codes.numpy(), model.config.chunk_spans(samples))
            ],
            axis=1,
        )
        for data, lm in ((raw, None), (coded, lms[name])):
            assert np.array_equal(read_codes(io.BytesIO(data), model, lm), whole)
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
model, lm = EncodecModel.from_pretrained(folder + "/codec").eval(), EncodecLM.from_pretrained(folder + "/lm").eval()
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
        file, model, num_codebooks=8, model_name="codec", lm=lm, lm_name="lm", segment_seconds=0.25,
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
    for kind, saved in (("codec", small_models["24khz"]), ("lm", lms["24khz"])):
        saved.save_pretrained(tmp_path / kind)
    audio = clip(small_models["24khz"], 1.9)
    np.save(tmp_path / "a.npy", audio.numpy())
    names = {"model_name": "codec", "lm_name": "lm"}
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
