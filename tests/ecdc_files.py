"""`.ecdc` files of version 1: language models for small codecs, what a file holds, and how to spoil it."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pipe_ends import Sink

from modeling_encodec.bitstream.codes_file import DecodedSegment, EcdcReader, EcdcWriter
from modeling_encodec.bitstream.container import (
    Damage,
    End,
    Header,
    Segment,
    read_header,
    read_segments,
    seek_segment,
)
from modeling_encodec.bitstream.errors import EcdcError
from modeling_encodec.models.configuration_encodec import EncodecLMConfig
from modeling_encodec.models.fingerprints import codebook_fingerprint
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM


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


def refused(kind=EcdcError, *, match: str):
    """An error of one line, with these words."""

    @contextlib.contextmanager
    def context():
        with pytest.raises(kind, match=match) as caught:
            yield
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300

    return context()


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
