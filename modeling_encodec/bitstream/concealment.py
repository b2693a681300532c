"""Putting a file's segments together again, with something in the place of those that are damaged."""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from modeling_encodec.bitstream.codes_file import DecodedSegment, segment_frames, segment_problem
from modeling_encodec.bitstream.container import Damage, End, Header
from modeling_encodec.bitstream.errors import EcdcError
from modeling_encodec.models.configuration_encodec import EncodecConfig


# Concealed audio that a file or a stream may have in all: so much however little could be read, and so many times what
# was read. Without a bound, a few bytes with right checksums could claim days.
FREE_CONCEALED_SECONDS = 60.0
MAX_CONCEALED_RATIO = 100
WAYS = ("silence", "repeat")
# Frames that stand in for short missing segments at a time.
BLOCK_FRAMES = 1 << 12
# Seconds over which audio fades out before silence and in after it.
FADE_SECONDS = 0.005


@dataclass(frozen=True)
class JoinedCodes:
    """A whole signal's codes, where it is concealed (spans in samples, in order), and its length in samples.

    `parts()` begins a new pass over the signal, piece by piece (of a model with chunks, chunk by chunk): codes (K, F),
    their scale, and whether they only stand in for missing ones. Those are made one by one and never held.
    """

    parts: Callable[[], Iterable[tuple[np.ndarray, float | None, bool]]]
    concealed: list[tuple[int, int]]
    audio_length: int

    @property
    def pieces(self) -> Iterator[tuple[np.ndarray, float | None]]:
        """Codes and scale of each piece."""
        return ((codes, scale) for codes, scale, _ in self.parts())

    def codes(self) -> np.ndarray:
        """All of them, int32 (K, F); -1 where they are not the signal's own."""
        frames = sum(codes.shape[1] for codes, _ in self.pieces)
        whole, start = None, 0
        for codes, _, missing in self.parts():
            if whole is None:
                whole = np.empty((codes.shape[0], frames), dtype=np.int32)
            whole[:, start : start + codes.shape[1]] = -1 if missing else codes
            start += codes.shape[1]
        return whole


def join_segments(
    items: Iterable[DecodedSegment | Damage | End],
    header: Header,
    config: EncodecConfig,
    *,
    strict: bool,
    on_damage: Callable[[Damage], None],
) -> JoinedCodes:
    """All codes of a file; where a segment is missing, those of the one before it again (or after, at the start).

    Raises:
        EcdcError: if there is damage and `strict` is set, nothing but damage, or too little left for what is missing.
    """

    first_reason = None

    def report(damage: Damage) -> None:
        nonlocal first_reason
        first_reason = first_reason or damage.describe(header.sampling_rate)
        if strict:
            raise EcdcError(first_reason)
        on_damage(damage)

    found, length = _Found(header), header.audio_length
    for item in items:
        if isinstance(item, Damage):
            report(item)
        elif isinstance(item, End):
            length = item.audio_length
        else:
            found.add(item)
    if length == 0:
        raise EcdcError("the file holds no audio")
    if guessed := length is None and len(found.places) > 0:  # the end is missing: what there is is all there is
        length = _length_to_here(found[-1], header, config)
    if length is not None:
        for damage in found.drop_unfit(config, length, guessed):
            report(damage)
    if not found.places:
        raise EcdcError(f"no segment of the file could be read: {first_reason}")
    read = sum(stop - start for start, stop in found.spans(length))
    check_concealed(length - read, read, header)
    return JoinedCodes(lambda: _parts(found, header, config, length), _gaps(found.spans(length), length), length)


def check_concealed(missing: int, read: int, header: Header) -> None:
    """Refuse to stand in for so many `missing` samples where so many were `read`.

    Raises:
        EcdcError: if that is out of proportion.
    """
    rate = header.sampling_rate
    if missing > FREE_CONCEALED_SECONDS * rate + MAX_CONCEALED_RATIO * read:
        raise EcdcError(
            f"{missing / rate:.2f} s of audio are missing and only {read / rate:.2f} s could be read, allowed to be "
            f"concealed: {FREE_CONCEALED_SECONDS:g} s and {MAX_CONCEALED_RATIO} times what was read"
        )


def check_way(conceal: str) -> None:
    """Refuse what is no way to conceal, with a ValueError."""
    if conceal not in WAYS:
        raise ValueError(f"conceal is {conceal!r}, allowed: {', '.join(WAYS)}")


def _length_to_here(last: DecodedSegment, header: Header, config: EncodecConfig) -> int:
    """Samples to the end of a segment: as many as its frames are good for; with chunks as few, which fit them all."""
    start, frames = last.index * header.samples_per_segment, last.codes.shape[1]
    if config.chunk_length is None:
        return start + frames * header.hop_length
    full = config.num_frames(config.chunk_length)
    chunks = len(last.scales) or -(-frames // full)
    rest = max(1, frames - (chunks - 1) * full)
    length = start + (chunks - 1) * config.chunk_stride + (rest - 1) * header.hop_length + 1
    return min(length, start + header.samples_per_segment)


def silence(block: torch.Tensor, start: int, concealed: list[tuple[int, int]], sampling_rate: int) -> torch.Tensor:
    """A block (channels, T) of a signal, from sample `start` on, with silence where it was concealed, and fades.

    `concealed` are spans in order that do not touch. Each costs as much as it and its fades are long.
    """
    fade, stop = max(1, int(FADE_SECONDS * sampling_rate)), start + block.shape[1]
    first = bisect_right(concealed, start - fade, key=lambda span: span[1])
    last = bisect_left(concealed, stop + fade, key=lambda span: span[0])
    if first >= last:
        return block
    block = block.clone()
    for begin, end in concealed[first:last]:
        low, high = max(begin - fade, start), min(end + fade, stop)
        if low < high:
            time = torch.arange(low, high, device=block.device)
            distance = torch.maximum(begin - time, time - end + 1)  # samples from the gap, 0 and less within
            block[:, low - start : high - start] *= (distance / (fade + 1)).clamp(0, 1).to(block.dtype)
    return block


class _Found:
    """The segments that could be read, in order: 2 bytes a code and a few a segment, for there may be millions.

    Attributes:
        places (array of int): of those that fit into the signal, among all.
    """

    def __init__(self, header: Header):
        self.header, self.places = header, array("q")
        self.indices, self.starts, self.scale_starts = array("q"), array("q", [0]), array("q", [0])
        self.codes, self.scales = bytearray(), array("f")

    def __getitem__(self, number: int) -> DecodedSegment:
        """The `number`th of those that fit."""
        place, books = self.places[number], self.header.codebooks
        start, stop = self.starts[place : place + 2]
        codes = np.frombuffer(self.codes, np.uint16, (stop - start) * books, 2 * start * books).reshape(-1, books).T
        first, last = self.scale_starts[place : place + 2]
        return DecodedSegment(self.indices[place], codes, tuple(self.scales[first:last]))

    def add(self, segment: DecodedSegment) -> None:
        """Take one more, which comes after all others."""
        self.places.append(len(self.indices))
        self.indices.append(segment.index)
        self.codes += segment.codes.T.astype(np.uint16).tobytes()
        self.scales.extend(segment.scales)
        self.starts.append(self.starts[-1] + segment.codes.shape[1])
        self.scale_starts.append(len(self.scales))

    def spans(self, length: int) -> Iterator[tuple[int, int]]:
        """Where those that fit begin and end in a signal of so many samples."""
        return (_span(self.header, self.indices[place], length) for place in self.places)

    def drop_unfit(self, config: EncodecConfig, length: int, guessed: bool) -> Iterator[Damage]:
        """Drop segments of other frames or scales than a signal of this length has there: for each a Damage. Where the
        length is `guessed` they may reach further."""
        fit = array("q")
        for place in self.places:
            index, frames = self.indices[place], self.starts[place + 1] - self.starts[place]
            scales = self.scale_starts[place + 1] - self.scale_starts[place]
            allowed = segment_frames(config, self.header, index, length)
            if guessed:
                frames, scales = min(frames, sum(allowed)), min(scales, len(allowed))
            if problem := segment_problem(frames, scales, allowed, self.header):
                yield Damage(index, index, *_span(self.header, index, length), problem)
            else:
                fit.append(place)
        self.places = fit


def _parts(
    found: _Found, header: Header, config: EncodecConfig, length: int
) -> Iterator[tuple[np.ndarray, float | None, bool]]:
    number, index, near, segments = 0, 0, found[0], header.segments_in(length)
    while index < segments:
        following = found.indices[found.places[number]] if number < len(found.places) else segments
        frames, together = segment_frames(config, header, index, length), 1
        if missing := index < following:
            codes = np.take(near.codes, np.arange(sum(frames)) % near.codes.shape[1], axis=1)
            scales = tuple(np.resize(near.scales, len(frames))) if near.scales else ()
            if config.chunk_length is None:  # short segments in one piece; the last may be shorter
                together = max(1, min(min(following, segments - 1) - index, BLOCK_FRAMES // sum(frames)))
                codes = np.tile(codes, together)
        else:
            near, number = found[number], number + 1
            codes, scales = near.codes[:, : sum(frames)], near.scales  # they reach further where the end is missing
        chunks = np.split(codes, np.cumsum(frames)[:-1], axis=1) if len(frames) > 1 else [codes]
        for chunk, scale in zip(chunks, scales or [None] * len(chunks)):
            yield chunk, scale, missing
        index += together


def _gaps(spans: Iterable[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """What lies between these spans, up to `length`."""
    gaps, at = [], 0
    for start, stop in spans:
        if at < start:
            gaps.append((at, start))
        at = stop
    return gaps + [(at, length)] * (at < length)


def _span(header: Header, index: int, length: int) -> tuple[int, int]:
    start = index * header.samples_per_segment
    return start, min(start + header.samples_per_segment, length)
