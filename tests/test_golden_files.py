"""`.ecdc` version 1: files written once are read and written as ever.

`PYTHONPATH=tests python tests/test_golden_files.py` wrote tests/golden/*.ecdc, from models whose weights are filled in
whole numbers by a rule. Not to be written anew once version 1 is released: its files must stay readable. (Written anew
before that, when settings entered the fingerprint: theirs are not the default ones.)
"""

import functools
import hashlib
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from ecdc_files import codes_of, container_items, same
from pipe_ends import Sink

from modeling_encodec.bitstream.codes_file import EcdcWriter
from modeling_encodec.bitstream.compression import decompress
from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.models.fingerprints import model_fingerprint
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM


GOLDEN = Path(__file__).parent / "golden"


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
        elif kind == "form":
            values = np.array([1])
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
        ("lm", 366, "c2a94508d44f8a0f", "llrl"),
        ("stereo", 344, "0b77f069e19ae80f", "lr"),
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


if __name__ == "__main__":
    write_golden()
