"""A live link: raw PCM to `.ecdc` version 1 as it comes, and back; what `encode --stream` and `decode --stream` do.

PCM is 16 bits, little-endian, channels interleaved, at the model's rate. What is written is an ordinary file of short
segments: it can be kept and decoded later, where it also gets back its exact length (live it is whole frames long).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import BinaryIO, Literal

import numpy as np
import torch

from modeling_encodec.bitstream.codes_file import DecodedSegment, EcdcReader, EcdcWriter
from modeling_encodec.bitstream.concealment import check_concealed, check_way, silence
from modeling_encodec.bitstream.container import Damage, Header
from modeling_encodec.bitstream.errors import EcdcError
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder, signal_pieces


# Seconds of a segment: what a receiver waits for, at the price of 16 bytes each.
LIVE_SEGMENT_SECONDS = 0.1
# Seconds lost in a row that are concealed; a longer gap ends the stream.
MAX_GAP_SECONDS = 600.0
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
    segment_seconds: float = LIVE_SEGMENT_SECONDS,
) -> None:
    """Code the PCM that arrives at `source` until it ends; every full segment is written at once.

    Args:
        model: the codec.
        source: binary, open for reading: 16-bit PCM at the model's rate.
        target: binary, open for writing.
        num_quantizers: codebooks.
        model_name: what the file calls the model.
        mode: of the stream, see `streaming`.
        lm: language model, with its integer form, that codes what gets shorter by it.
        lm_name: what the file calls the language model.
        segment_seconds: of a segment, which a receiver waits for.

    Raises:
        ValueError: if the stream holds no audio, or ends within a sample (what came before is then written); for a
            model or language model that cannot be used so.
    """
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
    samples, rest = 0, b""
    frame = model.config.audio_channels * PCM.itemsize
    for data in _read(source):
        data = rest + data
        data, rest = data[: len(data) // frame * frame], data[len(data) // frame * frame :]
        block = np.frombuffer(data, PCM).reshape(-1, model.config.audio_channels).T.astype(np.float32) / (1 << 15)
        samples += block.shape[1]
        _write(writer, encoder, encoder.push(torch.from_numpy(block)[None]))
    if samples:
        _write(writer, encoder, encoder.flush())
        writer.close(samples)
        target.flush()
    elif not rest:
        raise ValueError("the stream holds no audio")
    if rest:  # told when all before it is safe
        raise ValueError(f"the PCM ends within a sample: {len(rest)} of its {frame} bytes")


def decode_live(
    open_model: Callable[[Header], tuple[EncodecModel, EncodecLM | None]],
    source: BinaryIO,
    target: BinaryIO,
    *,
    mode: Literal["exact", "low_latency"] = "exact",
    conceal: Literal["silence", "repeat"] = "silence",
    other_decoder: bool = False,
    on_damage: Callable[[Damage, int], None],
    max_seconds: float | None = None,
) -> None:
    """Decode the `.ecdc` that arrives at `source` until its end; every segment's PCM is written at once.

    Args:
        open_model: gets the header and returns the models to decode with.
        source: binary, open for reading: the `.ecdc`.
        target: binary, open for writing: gets 16-bit PCM at the model's rate.
        mode: of the stream, that of the encoder.
        conceal: damaged segments become silence, or the segment before them again.
        other_decoder: take a model with the file's codebooks and another decoder.
        on_damage: gets each damaged range, and the sampling rate.
        max_seconds: audio that the stream may hold; by default any.

    Raises:
        EcdcError: if the header is damaged, the models are not the file's, the stream holds more than `max_seconds`, a
            gap is longer than 10 minutes, or gaps are longer together than a minute and 100 times what was heard. What
            came before is then written.
        ValueError: for another `conceal`, or a model that cannot be used so.
    """
    check_way(conceal)
    reader = EcdcReader(source)
    model, lm = open_model(reader.header)
    receiver = _Receiver(reader.header, StreamingDecoder(model, mode=mode), target, conceal == "silence")
    try:
        for item in reader.read(model, lm, other_decoder=other_decoder, max_seconds=max_seconds):
            if isinstance(item, Damage):
                on_damage(item, model.config.sampling_rate)
            elif isinstance(item, DecodedSegment):
                receiver.take(item)
    except EcdcError:  # what came before it counts
        receiver.end()
        raise
    receiver.end()


class _Receiver:
    """Turns segments into PCM; where some are missing it decodes the last one again, which keeps the decoder's memory
    alive, and writes silence in its place if told to."""

    def __init__(self, header: Header, decoder: StreamingDecoder, target: BinaryIO, silent: bool):
        self.header, self.decoder, self.target, self.silent = header, decoder, target, silent
        self.last, self.expected, self.written = None, 0, 0
        self.concealed: list[tuple[int, int]] = []
        self.heard = self.missing = 0  # samples

    def take(self, segment: DecodedSegment) -> None:
        """Decode a segment, and something for those missing before it."""
        size, rate = self.header.samples_per_segment, self.header.sampling_rate
        start, lost = self.expected * size, segment.index - self.expected
        if lost * size > MAX_GAP_SECONDS * rate:
            raise EcdcError(
                f"{lost} segments ({lost * size / rate:.2f} s) are missing in a row, allowed: {MAX_GAP_SECONDS:g} s"
            )
        self.missing += lost * size
        self.heard += segment.codes.shape[1] * self.header.hop_length
        check_concealed(self.missing, self.heard, self.header)
        if lost:
            self.concealed.append((start, start + lost * size))
        for _ in range(lost):
            self._decode(self._full(self.last or segment))
        self._decode(segment)
        self.last, self.expected = segment, segment.index + 1

    def end(self) -> None:
        """What is left; also where a stream was cut."""
        if self.last is not None:
            self._write(self.decoder.flush()[0])

    def _full(self, segment: DecodedSegment) -> DecodedSegment:
        """As long as all but the last are."""
        config, frames = self.decoder.model.config, self.header.frames_per_segment
        codes = np.take(segment.codes, np.arange(frames) % segment.codes.shape[1], axis=1)
        if not segment.scales:
            return replace(segment, codes=codes)
        return replace(segment, codes=codes, scales=tuple(np.resize(segment.scales, frames // _chunk_frames(config))))

    def _decode(self, segment: DecodedSegment) -> None:
        config, scales = self.decoder.model.config, None
        if config.chunk_length is not None:
            chunks = -(-segment.codes.shape[1] // _chunk_frames(config))
            scales = torch.tensor([segment.scales or (1.0,) * chunks], dtype=torch.float32, device="cpu")
        try:
            audio = self.decoder.push(torch.from_numpy(segment.codes)[None], scales)[0]
        except ValueError as error:  # a segment that ends a signal, and another after it
            raise EcdcError(f"segment {segment.index} cannot be decoded: {error}") from None
        self._write(audio)

    def _write(self, audio: torch.Tensor) -> None:
        if self.silent and self.concealed:
            audio = silence(audio, self.written, self.concealed, self.header.sampling_rate)
        self.written += audio.shape[1]
        self.concealed = [span for span in self.concealed if span[1] > self.written - self.header.sampling_rate]
        samples = (audio.float().cpu() * (1 << 15)).round().clamp(-(1 << 15), (1 << 15) - 1)
        self.target.write(samples.T.contiguous().numpy().astype(PCM).tobytes())
        self.target.flush()


def _chunk_frames(config: EncodecConfig) -> int:
    return config.num_frames(config.chunk_length)


def _read(source: BinaryIO) -> Iterator[bytes]:
    """What is there, as soon as it is."""
    read = getattr(source, "read1", source.read)
    while data := read(1 << 16):
        yield data


def _write(writer: EcdcWriter, encoder: StreamingEncoder, codes: torch.Tensor) -> None:
    for piece, scale in signal_pieces(encoder, codes):
        writer.write(piece.cpu().numpy(), scale)
    writer.file.flush()
