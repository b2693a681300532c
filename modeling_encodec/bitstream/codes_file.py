"""Codes into an `.ecdc` file of version 1 and out of it, as they come: `EcdcWriter` and `EcdcReader`.

A segment is so many frames of a model that codes the whole signal, or so many chunks of one that does not. Each is
decodable alone: the language model begins anew, which costs it a little at every start. It is packed raw where the
language model would make it longer.
"""

import math
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np

from modeling_encodec.bitstream.container import (
    Damage,
    End,
    Header,
    Segment,
    SegmentWriter,
    read_header,
    read_segments,
    write_header,
)
from modeling_encodec.bitstream.errors import EcdcError, check_fingerprint
from modeling_encodec.bitstream.segment_coders import LMCoder, RawCoder
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.fingerprints import codebook_fingerprint, lm_fingerprint, model_fingerprint
from modeling_encodec.models.inputs_encodec import plain_array, real_number, shown, whole_number
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.streaming.steps import split_chunks


SEGMENT_SECONDS = 10.0
# Audio that one call takes from a file, unless it is told otherwise: a day.
MAX_SECONDS = 24 * 3600.0
# What the container's fields hold.
MOST_FRAMES, MOST_CHUNKS = (1 << 16) - 1, 255


@dataclass(frozen=True)
class DecodedSegment:
    """One segment's codes (K, F), int64, and its chunks' scales, none if the model does not normalise."""

    index: int
    codes: np.ndarray
    scales: tuple[float, ...]


class EcdcWriter:
    """Writes codes as they come; the file needs no seeking, and the signal's length need not be known before its end.
    Where the file can be sought in, the length is put into the header then.

    Examples:
        >>> import io, torch
        >>> from modeling_encodec import EcdcWriter, EncodecModel, bundled_checkpoint, read_codes
        >>> model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
        >>> file, codes = io.BytesIO(), torch.arange(80).view(2, 40).numpy()
        >>> writer = EcdcWriter(file, model, num_codebooks=2, model_name="encodec_24khz_c16")
        >>> writer.write(codes[:, :25])  # as often as there are any
        >>> writer.write(codes[:, 25:])
        >>> writer.close(audio_length=40 * 320)
        >>> _ = file.seek(0)
        >>> bool((read_codes(file, model) == codes).all())
        True
    """

    def __init__(
        self,
        file: BinaryIO,
        model: EncodecModel,
        *,
        num_codebooks: int,
        model_name: str,
        lm: EncodecLM | None = None,
        lm_name: str | None = None,
        segment_seconds: float = SEGMENT_SECONDS,
        audio_length: int | None = None,
        file_id: int | None = None,
    ):
        """Args:
            file: binary, open for writing.
            model: the codec that the codes are of.
            num_codebooks: of the codes that will come.
            model_name: what the file calls the model.
            lm: codes with it what gets shorter by it; it needs its integer form.
            lm_name: what the file calls the language model.
            segment_seconds: what is lost at most when a byte is; and the delay of a stream.
            audio_length: samples, if known.
            file_id: a number of 32 bits that tells this file's segments from others'; by default a hash of the first.

        Raises:
            ValueError: for a language model of another codec, or without integer form.
            EcdcError: for names or numbers that the header has no room for. It is a `ValueError`.
        """
        config, num_codebooks = model.config, whole_number("codebooks", num_codebooks, 1, 255, error=EcdcError)
        self.file, self.config, self.file_id, self.segments = file, config, file_id, None
        self.coders = (RawCoder(config.codebook_nbits), None if lm is None else LMCoder(lm))
        if lm is not None:
            check_lm(lm, model, num_codebooks)
        frames, samples = segment_size(config, segment_seconds)
        self.header = Header(
            model_name=model_name,
            model_fingerprint=model_fingerprint(model),
            lm_name=None if lm is None else lm_name,
            lm_fingerprint=None if lm is None else lm_fingerprint(lm),
            sampling_rate=config.sampling_rate,
            channels=config.audio_channels,
            codebooks=num_codebooks,
            codebook_size=config.codebook_size,
            hop_length=config.hop_length,
            frames_per_segment=frames,
            samples_per_segment=samples,
            has_scales=config.normalize,
            audio_length=audio_length,
            file_id=0,
        )
        self.pending: list[np.ndarray] = []
        self.pending_frames = 0
        self.scales: list[float] = []

    def write(self, codes: np.ndarray, scale: float | None = None) -> None:
        """Add `codes` (K, F); one whole chunk and its `scale` if the model has chunks. Full segments are written.

        Raises:
            ValueError: for codes of another number of codebooks, or outside them.
        """
        chunks = self.config.chunk_length is not None
        codes = plain_array("codes", codes)
        if codes.dtype.kind not in "iu" or codes.ndim != 2 or codes.shape[0] != self.header.codebooks:
            raise ValueError(
                f"codes have shape {codes.shape} of {codes.dtype}, allowed: ({self.header.codebooks}, frames), whole"
            )
        size = self.header.codebook_size
        if codes.size and not (codes.min() >= 0 and codes.max() < size):
            raise ValueError(f"codes range from {codes.min()} to {codes.max()}, allowed: 0 to {size - 1}")
        self.pending.append(codes.astype("<i8"))
        self.pending_frames += codes.shape[1]
        if scale is not None:
            self.scales = [*(self.scales if chunks else []), float(real_number("scale", scale))]
        while True:
            if chunks:
                full = len(self.pending) * self.config.chunk_stride >= self.header.samples_per_segment
                frames = self.pending_frames
            else:
                frames = self.header.frames_per_segment
                full = self.pending_frames >= frames
            if not full:
                return
            self._write_segment(frames)

    def close(self, audio_length: int) -> None:
        """Write what is left, and the end; the file stays open. `audio_length` is the whole signal's, in samples.

        Raises:
            EcdcError: for a length that the codes written do not have.
        """
        audio_length = whole_number("audio_length", audio_length, 0, error=EcdcError)
        if self.pending_frames:
            self._write_segment(self.pending_frames)
        self._open(np.empty(0))
        self.segments.close(audio_length)
        if self.header.audio_length is None and self.place is not None:
            end = self.file.tell()
            try:
                self.file.seek(self.place)
            except OSError:  # as of compressed files, which can only be sought in forwards
                return
            write_header(self.file, replace(self.header, audio_length=audio_length))
            self.file.seek(end)

    def _write_segment(self, frames: int) -> None:
        codes = self.pending[0] if len(self.pending) == 1 else np.concatenate(self.pending, axis=1)
        codes, rest = codes[:, :frames], codes[:, frames:]
        self.pending, self.pending_frames = [rest] if rest.shape[1] else [], rest.shape[1]
        scales = self.scales
        if self.config.chunk_length is not None:  # else the one scale is the whole signal's
            self.scales = []
        self._open(codes)
        raw, by_lm = self.coders
        payload, coded = raw.encode(codes), False
        if by_lm is not None and len(shorter := by_lm.encode(codes)) < len(payload):
            payload, coded = shorter, True
        self.segments.write(frames, scales, payload, coded)

    def _open(self, first: np.ndarray) -> None:
        """The header, when the first codes are there to give the file its number."""
        if self.segments is None:
            file_id = zlib.crc32(first.tobytes()) if self.file_id is None else self.file_id
            self.header = replace(self.header, file_id=file_id)
            self.place = self.file.tell() if _can_go_back(self.file) else None
            write_header(self.file, self.header)
            self.segments = SegmentWriter(self.file, self.header)


def _can_go_back(file: BinaryIO) -> bool:
    """Whether what was written can be written over; not in a file opened for appending."""
    if not getattr(file, "seekable", lambda: False)():
        return False
    try:
        import fcntl

        return not fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & os.O_APPEND
    except (ImportError, AttributeError, OSError):  # no file of the system's, or not a system that tells
        return "a" not in str(getattr(file, "mode", ""))


class EcdcReader:
    """Reads codes as they come: `DecodedSegment`s, a `Damage` where there are none, the `End`.

    Examples:
        >>> import io, torch
        >>> from modeling_encodec import EcdcReader, EncodecModel, bundled_checkpoint, compress
        >>> model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
        >>> file = io.BytesIO(compress(model, torch.zeros(1, 30000), 6.0, segment_seconds=1.0))
        >>> reader = EcdcReader(file)
        >>> reader.header.codebooks, reader.header.audio_length
        (8, 30000)
        >>> first, second, end = reader.read(model)
        >>> first.codes.shape, second.codes.shape, end.audio_length
        ((8, 75), (8, 19), 30000)
    """

    def __init__(self, file: BinaryIO, header: Header | None = None):
        """`file` stands at its beginning, or after the `header` that was read from it.

        Raises:
            EcdcError: if the header is damaged, or not of version 1.
        """
        self.file, self.header = file, header or read_header(file)

    def read(
        self,
        model: EncodecModel,
        lm: EncodecLM | None = None,
        *,
        together: int = 1,
        first: int = 0,
        other_decoder: bool = False,
        max_seconds: float | None = None,
    ) -> Iterator[DecodedSegment | Damage | End]:
        """What the file holds, in order, decoded as it arrives.

        Args:
            model: the codec that the file was made with.
            lm: the language model, needed if the file names one.
            together: segments that are waited for, to be decoded at once, which is faster.
            first: the segment at which the file stands, after `container.seek_segment`.
            other_decoder: take a model whose codebooks are the file's, whatever its decoder.
            max_seconds: audio that the file may hold; None is any.

        Raises:
            EcdcError: at once if model or language model are not the file's, or its header says that it is longer than
                `max_seconds`; later, if it is longer without saying so.
        """
        together, first = whole_number("together", together, 1), whole_number("first", first, 0)
        check_models(self.header, model, lm, other_decoder=other_decoder)
        check_seconds(self.header.audio_length or 0, self.header.sampling_rate, max_seconds)
        coders = (RawCoder(self.header.bits_per_code), None if lm is None else LMCoder(lm))
        items = self._limited(read_segments(self.file, self.header, first=first), max_seconds)
        return self._decoded(items, model.config, coders, together)

    def _limited(self, items: Iterable, max_seconds: float | None) -> Iterator[Segment | Damage | End]:
        """The items, unless they are of a longer signal: before the work of decoding them."""
        for item in items:
            if isinstance(item, Segment):
                check_seconds(item.index * self.header.samples_per_segment, self.header.sampling_rate, max_seconds)
            elif isinstance(item, End):
                check_seconds(item.audio_length, self.header.sampling_rate, max_seconds)
            yield item

    def _decoded(
        self, items: Iterable, config: EncodecConfig, coders, together: int
    ) -> Iterator[DecodedSegment | Damage | End]:
        waiting: list[Segment] = []
        for item in items:
            if isinstance(item, Segment):
                waiting.append(item)
                if len(waiting) < together:
                    continue
            yield from self._decode(waiting, config, coders)
            waiting = []
            if not isinstance(item, Segment):
                yield item
        yield from self._decode(waiting, config, coders)

    def _decode(self, segments: list[Segment], config: EncodecConfig, coders) -> Iterator[DecodedSegment | Damage]:
        books, (raw, by_lm) = self.header.codebooks, coders
        coded = [segment for segment in segments if segment.coded_with_lm]
        payloads, frames = [segment.payload for segment in coded], [segment.frames for segment in coded]
        found = dict(zip((segment.index for segment in coded), by_lm.decode(payloads, books, frames) if coded else []))
        for segment in segments:
            codes = found.get(segment.index)
            if not segment.coded_with_lm:
                codes = raw.decode(segment.payload, books, segment.frames)
            problem = self._problem(segment, codes, config)
            if problem is None:
                yield DecodedSegment(segment.index, codes, segment.scales)
            else:
                start = segment.index * self.header.samples_per_segment
                end = start + self.header.samples_per_segment
                end = min(end, self.header.audio_length or end)
                yield Damage(segment.index, segment.index, start, end, problem)

    def _problem(self, segment: Segment, codes: np.ndarray | None, config: EncodecConfig) -> str | None:
        """Why a segment that passed cannot be used: a false writer, or a machine that computes wrongly."""
        if codes is None:
            return "the language model finds other codes in it than were encoded"
        if codes.max() >= self.header.codebook_size:
            return f"a code is {codes.max()}, allowed: up to {self.header.codebook_size - 1}"
        if self.header.audio_length is None:  # the last segment is shorter, and this may be it
            return _unchunked(config, segment.frames, len(segment.scales))
        allowed = segment_frames(config, self.header, segment.index, self.header.audio_length)
        return segment_problem(segment.frames, len(segment.scales), allowed, self.header)


def segment_size(config: EncodecConfig, seconds: float) -> tuple[int, int]:
    """Frames of a segment of about so many `seconds`, at most, and samples from its start to the next one's.

    Raises:
        ValueError: unless `seconds` is finite and above 0.
    """
    allowed = "a finite number above 0"
    seconds = real_number("segment_seconds", seconds, allowed)
    if not 0 < seconds < math.inf:
        raise ValueError(f"segment_seconds is {seconds}, allowed: {allowed}")
    samples = seconds * config.sampling_rate
    if config.chunk_length is None:
        frames = int(min(max(1, round(samples / config.hop_length)), MOST_FRAMES))
        return frames, frames * config.hop_length
    frames = config.num_frames(config.chunk_length)
    chunks = int(min(max(1, round(samples / config.chunk_stride)), MOST_CHUNKS, MOST_FRAMES // frames))
    return chunks * frames, chunks * config.chunk_stride


def segment_frames(config: EncodecConfig, header: Header, index: int, audio_length: int) -> list[int]:
    """Frames of each chunk in segment `index` of a signal of so many samples; of the segment, without chunks."""
    start = index * header.samples_per_segment
    stop = min(start + header.samples_per_segment, audio_length)
    if config.chunk_length is None:
        return [config.num_frames(stop - start)]
    starts = range(start, stop, config.chunk_stride)
    return [config.num_frames(min(config.chunk_length, audio_length - at)) for at in starts]


def _unchunked(config: EncodecConfig, frames: int, scales: int) -> str | None:
    """Why a segment of so many frames and scales is not made of chunks, if the model has them."""
    if config.chunk_length is None:
        return None
    try:
        split_chunks(config, scales or -(-frames // config.num_frames(config.chunk_length)), frames)
    except ValueError as error:
        return str(error)


def check_seconds(samples: int, sampling_rate: int, max_seconds: float | None) -> None:
    """Refuse a file of so many samples, or more, where no more than `max_seconds` may be in it. None is any.

    Raises:
        EcdcError: with both.
        ValueError: for what is no limit.
    """
    if max_seconds is None:
        return
    allowed = real_number("max_seconds", max_seconds, "a number of seconds above 0, or None")
    if allowed <= 0:
        raise ValueError(f"max_seconds is {max_seconds}, allowed: a number of seconds above 0, or None")
    if samples > allowed * sampling_rate:
        raise EcdcError(
            f"the file says that it holds {samples / sampling_rate / 3600:.2f} h of audio, allowed: up to "
            f"{allowed / 3600:g} h; max_seconds raises it (--max-hours of decode)"
        )


def segment_problem(frames: int, scales: int, allowed: list[int], header: Header) -> str | None:
    """Why a segment of so many frames and scales does not fit, where each chunk is `allowed` these frames."""
    if frames != sum(allowed):
        return f"it has {frames} frames, allowed: {sum(allowed)}"
    if header.has_scales and scales != len(allowed):
        return f"it has {scales} scales, allowed: {len(allowed)}"
    return None


def check_lm(lm: EncodecLM, model: EncodecModel, codebooks: int = 1) -> None:
    """Refuse a language model that cannot code so many codebooks of this codec.

    Raises:
        ValueError: with what does not fit; without the integer form, how it is made.
    """
    ours, theirs = lm.config, model.config
    if not ours.has_integer_form:
        raise ValueError("the language model is float alone, allowed: with its integer form, by lm.quantize(codes)")
    if ours.codebook_size != theirs.codebook_size or ours.num_codebooks < codebooks:
        raise ValueError(
            f"the language model has {ours.num_codebooks} codebooks of {ours.codebook_size}, allowed: at least "
            f"{codebooks} of {theirs.codebook_size}, as the codec"
        )
    if ours.codec_fingerprint not in (None, codebook_fingerprint(model)):
        raise ValueError(
            f"the language model was trained on the codec {ours.codec_fingerprint}, allowed: "
            f"{codebook_fingerprint(model)}, this codec's codebooks"
        )


def check_models(header: Header, model: EncodecModel, lm: EncodecLM | None, *, other_decoder: bool = False) -> None:
    """Refuse a model or language model that the file was not made with; with `other_decoder` but for the decoder.

    Raises:
        EcdcError: which names both.
    """
    check_fingerprint(header.model_name, header.model_fingerprint, model, other_decoder)
    config = model.config
    there = (header.sampling_rate, header.channels, header.codebook_size, header.hop_length, header.has_scales)
    here = (config.sampling_rate, config.audio_channels, config.codebook_size, config.hop_length, config.normalize)
    if there != here or header.codebooks > config.num_quantizers:
        raise EcdcError(f"the file's header says {there}, {header.codebooks} codebooks; this model has {here}")
    frames, samples = header.frames_per_segment, header.samples_per_segment
    full, stride = 1, config.hop_length
    if config.chunk_length is not None:
        full, stride = config.num_frames(config.chunk_length), config.chunk_stride
    if frames % full or frames // full * stride != samples:
        raise EcdcError(
            f"the file's segments have {frames} frames in {samples} samples, allowed: multiples of {full} in {stride}"
        )
    if header.lm_name is None:
        return
    if lm is None:
        raise EcdcError(f"the file is coded with the language model {shown(header.lm_name)}, and none is given")
    if (ours := lm_fingerprint(lm)) != header.lm_fingerprint:
        raise EcdcError(
            f"the file is coded with the language model {shown(header.lm_name)} (fingerprint "
            f"{header.lm_fingerprint}), the one given has {ours}"
        )
