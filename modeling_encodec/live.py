"""A live link: raw PCM to `.ecdc` version 1 as it comes, and back; what `encode --stream` and `decode --stream` do.

PCM is 16 bits, little-endian, channels interleaved, at the model's rate. What is written is an ordinary file of short
segments: it can be kept and decoded later, where it also gets back its exact length (live it is whole frames long).
"""

from collections.abc import Callable, Iterator
from typing import BinaryIO, Literal

import numpy as np
import torch

from modeling_encodec.bitstream.codes_file import DecodedSegment, EcdcReader, EcdcWriter
from modeling_encodec.bitstream.container import Damage, End, Header
from modeling_encodec.bitstream.ecdc import EcdcError
from modeling_encodec.modeling_encodec import EncodecModel
from modeling_encodec.modeling_lm_encodec import EncodecLM
from modeling_encodec.streaming import StreamingDecoder, StreamingEncoder, signal_pieces


# Seconds of a segment: what a receiver waits for, at the price of 16 bytes each.
SEGMENT_SECONDS = 0.1
# Segments lost in a row that are concealed; a longer gap ends the stream.
MOST_LOST = 1000
PCM = np.dtype("<i2")


def encode_live(
    model: EncodecModel,
    source: BinaryIO,
    target: BinaryIO,
    *,
    num_quantizers: int,
    model_name: str,
    mode: Literal["exact", "low_latency"] = "exact",
    lm: EncodecLM | None = None,
    lm_name: str | None = None,
    segment_seconds: float = SEGMENT_SECONDS,
) -> None:
    """Code the PCM that arrives at `source` until it ends; every full segment is written at once."""
    encoder = StreamingEncoder(model, num_quantizers=num_quantizers, mode=mode)
    writer = EcdcWriter(
        target,
        model,
        num_codebooks=num_quantizers,
        model_name=model_name,
        lm=lm,
        lm_name=lm_name,
        segment_seconds=segment_seconds,
    )
    samples = 0
    for block in _read_pcm(source, model.config.audio_channels):
        samples += block.shape[1]
        _write(writer, encoder, encoder.push(block[None]))
    if samples == 0:
        raise ValueError("the stream holds no audio")
    _write(writer, encoder, encoder.flush())
    writer.close(samples)
    target.flush()


def decode_live(
    open_model: Callable[[Header], tuple[EncodecModel, EncodecLM | None]],
    source: BinaryIO,
    target: BinaryIO,
    *,
    mode: Literal["exact", "low_latency"] = "exact",
    conceal: Literal["silence", "repeat"] = "silence",
    other_decoder: bool = False,
    on_damage: Callable[[Damage, int], None],
) -> None:
    """Decode the `.ecdc` that arrives at `source` until its end; every segment's PCM is written at once.

    Args:
        open_model: gets the header and returns the models to decode with.
        on_damage: gets each damaged range, and the sampling rate.
    """
    reader = EcdcReader(source)
    model, lm = open_model(reader.header)
    decoder = StreamingDecoder(model, mode=mode)
    expected, last = 0, None
    for item in reader.read(model, lm, other_decoder=other_decoder):
        if isinstance(item, Damage):
            on_damage(item, model.config.sampling_rate)
        elif isinstance(item, DecodedSegment):
            last = last or item
            if (lost := item.index - expected) > MOST_LOST:
                raise EcdcError(f"{lost} segments are missing in a row, allowed: {MOST_LOST}")
            for _ in range(lost):  # what is decoded in their place keeps the decoder's memory alive
                _write_pcm(target, _decoded(decoder, last), silent=conceal == "silence")
            _write_pcm(target, _decoded(decoder, item))
            expected, last = item.index + 1, item
        elif isinstance(item, End):
            _write_pcm(target, decoder.flush()[0])


def _read_pcm(source: BinaryIO, channels: int) -> Iterator[torch.Tensor]:
    """(channels, T) of what is there, as soon as it is."""
    rest, read = b"", getattr(source, "read1", source.read)
    frame = channels * PCM.itemsize
    while data := read(1 << 16):
        data = rest + data
        data, rest = data[: len(data) // frame * frame], data[len(data) // frame * frame :]
        if data:
            samples = np.frombuffer(data, PCM).reshape(-1, channels).T.astype(np.float32) / (1 << 15)
            yield torch.from_numpy(np.ascontiguousarray(samples))
    if rest:
        raise ValueError(f"the PCM ends within a sample: {len(rest)} of its {frame} bytes")


def _write(writer: EcdcWriter, encoder: StreamingEncoder, codes: torch.Tensor) -> None:
    for piece, scale in signal_pieces(encoder, codes):
        writer.write(piece.cpu().numpy(), scale)
    writer.file.flush()


def _decoded(decoder: StreamingDecoder, segment: DecodedSegment) -> torch.Tensor:
    chunked = decoder.model.config.chunk_length is not None
    scales = torch.tensor([segment.scales or (1.0,)]) if chunked else None
    return decoder.push(torch.from_numpy(segment.codes)[None], scales)[0]


def _write_pcm(target: BinaryIO, audio: torch.Tensor, silent: bool = False) -> None:
    samples = (audio.float().cpu() * (0 if silent else 1 << 15)).round().clamp(-(1 << 15), (1 << 15) - 1)
    target.write(samples.T.contiguous().numpy().astype(PCM).tobytes())
    target.flush()
