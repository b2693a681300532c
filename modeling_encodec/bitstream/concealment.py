"""Putting a file's segments together again, with something in the place of those that are damaged."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from modeling_encodec.bitstream.codes_file import DecodedSegment, segment_frames
from modeling_encodec.bitstream.container import Damage, End, Header
from modeling_encodec.bitstream.ecdc import EcdcError
from modeling_encodec.configuration_encodec import EncodecConfig


# Segments that may be concealed for each that could be read: a file may claim any length.
MOST_CONCEALED = 100
WAYS = ("silence", "repeat")
# Seconds over which audio fades out before silence and in after it.
FADE_SECONDS = 0.005


@dataclass(frozen=True)
class JoinedCodes:
    """A whole signal's codes (K, F) in pieces, each a chunk of a model with chunks, with their scales; which of them,
    and which spans in samples, are not its own."""

    pieces: list[tuple[np.ndarray, float | None]]
    missing: list[bool]
    concealed: list[tuple[int, int]]
    audio_length: int

    def codes(self) -> np.ndarray:
        """All of them, int32 (K, F); -1 where they are not the signal's own."""
        pieces = [np.full(codes.shape, -1) if gone else codes for gone, (codes, _) in zip(self.missing, self.pieces)]
        return np.concatenate(pieces, axis=1).astype(np.int32)


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
        EcdcError: if there is damage and `strict` is set, or nothing but damage.
    """

    reasons = []

    def report(damage: Damage) -> None:
        reasons.append(damage.describe(header.sampling_rate))
        if strict:
            raise EcdcError(reasons[-1])
        on_damage(damage)

    found: dict[int, DecodedSegment] = {}
    length = header.audio_length
    for item in items:
        if isinstance(item, Damage):
            report(item)
        elif isinstance(item, End):
            length = item.audio_length
        else:
            found[item.index] = replace(item, codes=item.codes.astype(np.uint16))  # a quarter: it may be hours
    if length == 0:
        raise EcdcError("the file holds no audio")
    if length is None and found:  # the end is missing: what there is is all there is
        length = _length_to_here(found[max(found)], header, config)
        for index, segment in found.items():  # full chunks reach a little further
            frames = segment_frames(config, header, index, length)
            found[index] = replace(
                segment, codes=segment.codes[:, : sum(frames)], scales=segment.scales[: len(frames)]
            )
    for index, segment in sorted(found.items()):
        if segment.codes.shape[1] != (frames := sum(segment_frames(config, header, index, length))):
            span = _span(header, index, length)
            report(Damage(index, index, *span, f"it has {segment.codes.shape[1]} frames, allowed: {frames}"))
            del found[index]
    if not found:
        raise EcdcError(f"no segment of the file could be read: {reasons[0]}")
    if (count := header.segments_in(length)) > MOST_CONCEALED * (len(found) + 1):
        raise EcdcError(f"only {len(found)} of {count} segments could be read, allowed: one in {MOST_CONCEALED}")
    return _join(found, header, config, length)


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
    """A block (channels, T) of a signal, from sample `start` on, with silence where it was concealed, and fades."""
    fade, stop = max(1, int(FADE_SECONDS * sampling_rate)), start + block.shape[1]
    time = torch.arange(start, stop, device=block.device)
    for first, end in concealed:
        if start - fade < end and first < stop + fade:
            distance = torch.maximum(first - time, time - end + 1)  # samples from the gap, 0 and less within
            block = block * (distance / (fade + 1)).clamp(0, 1)
    return block


def _join(found: dict[int, DecodedSegment], header: Header, config: EncodecConfig, length: int) -> JoinedCodes:
    pieces, missing, concealed = [], [], []
    for index in range(header.segments_in(length)):
        frames = segment_frames(config, header, index, length)
        segment = found.get(index)
        if segment is None:
            concealed.append(_span(header, index, length))
            near = found[max((n for n in found if n < index), default=min(found))]
            codes = np.take(near.codes, np.arange(sum(frames)) % near.codes.shape[1], axis=1)
            segment = DecodedSegment(index, codes, tuple(np.resize(near.scales, len(frames))) if near.scales else ())
        chunks = np.split(segment.codes, np.cumsum(frames)[:-1], axis=1)
        pieces += zip(chunks, segment.scales or [None] * len(chunks))
        missing += [index not in found] * len(chunks)
    return JoinedCodes(pieces, missing, concealed, length)


def _span(header: Header, index: int, length: int) -> tuple[int, int]:
    start = index * header.samples_per_segment
    return start, min(start + header.samples_per_segment, length)
