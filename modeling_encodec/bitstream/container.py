"""The `.ecdc` file, version 1: segments that can be checked, skipped and found again, each with its own checksum.

    bytes   content (numbers are big-endian)
    header
    4, 1, 1 "ECDC"; version, 1; flags (bit 0: has a language model (LM), bit 1: segments carry scales, all others 0)
    8, 8    fingerprints of the model (4 of codebooks, 4 of decoder) and of the LM; zeros without an LM
    4, 1    sampling rate; channels
    1, 2    codebooks K, at least 1; codebook size - 1. A code has ceil(log2(codebook size)) bits
    2, 2    hop length (samples per frame); most frames per segment
    4       samples per segment S; segment i covers samples [i * S, (i + 1) * S), the last one less
    8, 4    audio length in samples, 0 if it was not known when the header was written; file id
    1, n    n and the model's name, UTF-8; then the LM's in the same way, n = 0 without an LM
    4       CRC32 of the header up to here
    segment, any number of times
    2       sync, EC 5E
    1, 1    kind (0: raw codes, 1: coded with the LM, 2: end); number of scales
    3, 2, 3 index of the segment, from 0; frames; payload bytes n
    4 each  scales, float32
    n       payload; raw: exactly ceil(frames * K * bits / 8) bytes, LM: fewer than that, but at least frames / 8
    4       CRC32 of the segment up to here, started from the file id
    end: a segment of kind 2; its index is the number of segments, frames and scales are 0, and the payload is
    8, 4    audio length in samples; CRC32 of the CRC32s of all segments

The file id keeps segments of another file out; the end's CRC32 shows ones that pass alone but do not belong together.
The limit on payloads bounds what a damaged size makes a reader wait for or hold. Price: 16 bytes a segment, 28 an end.
"""

import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO, NamedTuple

from modeling_encodec.bitstream.bit_packing import packed_size
from modeling_encodec.bitstream.errors import READ_BYTES, EcdcError, read_exactly
from modeling_encodec.bitstream.v0.container import MAGIC, SCALE
from modeling_encodec.models.inputs_encodec import shown, whole_number


VERSION = 1
HAS_LM, HAS_SCALES = 1, 2
FIELDS = struct.Struct("!4sBB8s8sIBBHHHIQI")
CHECKSUM = struct.Struct("!I")
SYNC = b"\xec\x5e"
RAW, LM, END = 0, 1, 2
# A sync and a kind, as far as bytes are there.
MAYBE_SEGMENT = re.compile(rb"\xec(?:\x5e(?:[\0-\2]|\Z)|\Z)")
SEGMENT_HEAD = struct.Struct("!2sBB3sH3s")
END_PAYLOAD = struct.Struct("!QI")
MOST_SEGMENTS = MOST_PAYLOAD_BYTES = 2**24 - 1
LEAST_SCALE, MOST_SCALE = 2.0**-149, (2 - 2.0**-23) * 2.0**127  # float32, above 0
# What false segments may cost a reader in checksums: so many bytes at once, and so many for each byte of the file.
CREDIT, CREDIT_PER_BYTE = 2**26, 2**8

# In the order of FIELDS.
RANGES = {
    "sampling_rate": (1, 2**32 - 1),
    "channels": (1, 255),
    "codebooks": (1, 255),
    "codebook_size": (2, 2**16),
    "hop_length": (1, 2**16 - 1),
    "frames_per_segment": (1, 2**16 - 1),
    "samples_per_segment": (1, 2**32 - 1),
    "audio_length": (1, 2**64 - 1),
    "file_id": (0, 2**32 - 1),
}


@dataclass(frozen=True)
class Header:
    """What holds for the whole file, checked. Fingerprints have 16 hex digits; lengths are in samples.

    Raises:
        EcdcError: for a value that the format has no room for. It is a `ValueError`.
    """

    model_name: str
    model_fingerprint: str
    sampling_rate: int
    channels: int
    codebooks: int
    codebook_size: int
    hop_length: int
    frames_per_segment: int
    samples_per_segment: int
    file_id: int
    has_scales: bool = False
    lm_name: str | None = None
    lm_fingerprint: str | None = None
    audio_length: int | None = None

    def __post_init__(self):
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if name != "audio_length" or value is not None:
                object.__setattr__(self, name, whole_number(name, value, least, most, error=EcdcError))
        _check_name("model", self.model_name, self.model_fingerprint)
        if self.lm_name is not None or self.lm_fingerprint is not None:
            _check_name("lm", self.lm_name, self.lm_fingerprint)
        if (size := self.raw_size(self.frames_per_segment)) > MOST_PAYLOAD_BYTES:
            raise EcdcError(f"a segment's codes take {size} bytes, allowed: up to {MOST_PAYLOAD_BYTES}")
        if self.samples_per_segment > (most := self.frames_per_segment * self.hop_length):
            raise EcdcError(f"samples_per_segment is {self.samples_per_segment}, allowed: up to {most} for its frames")
        if self.segments is not None and self.segments > MOST_SEGMENTS:
            raise EcdcError(f"audio_length takes {self.segments} segments, allowed: up to {MOST_SEGMENTS}")

    @property
    def bits_per_code(self) -> int:
        """Bits that one code takes when packed."""
        return (self.codebook_size - 1).bit_length()

    @property
    def segments(self) -> int | None:
        """Segments of the whole file, `None` where its length is not known."""
        return None if self.audio_length is None else self.segments_in(self.audio_length)

    def raw_size(self, frames: int) -> int:
        """Payload bytes of `frames` frames without an LM."""
        return packed_size(frames * self.codebooks, self.bits_per_code)

    def segments_in(self, audio_length: int) -> int:
        """Segments that `audio_length` samples take."""
        return -(-audio_length // self.samples_per_segment)


@dataclass(frozen=True)
class Segment:
    """One segment's codes, still packed or coded, and its scales."""

    index: int
    frames: int
    coded_with_lm: bool
    scales: tuple[float, ...]
    payload: bytes


@dataclass(frozen=True)
class End:
    """The end of a file: how much was written, whether or not all of it could be read."""

    segments: int
    audio_length: int
    digest: int


@dataclass(frozen=True)
class Damage:
    """Segments `first` to `last`, samples [start, end), are lost or not to be trusted.

    `last` and `end` are None if nobody knows them; `last` is `first - 1` if only bytes between segments are wrong.
    """

    first: int
    last: int | None
    start: int
    end: int | None
    reason: str

    def describe(self, sampling_rate: int) -> str:
        """One line: which segments, when, and why."""
        start = f"{self.start / sampling_rate:.2f} s"
        if self.last is None:
            return f"segments from {self.first} on ({start} to the end): {self.reason}"
        if self.last < self.first:
            return f"after {self.first} segments (at {start}): {self.reason}"
        numbers = f"segment {self.first}" if self.first == self.last else f"segments {self.first} to {self.last}"
        return f"{numbers} ({start} to {self.end / sampling_rate:.2f} s): {self.reason}"


def write_header(file: BinaryIO, header: Header) -> None:
    """Write `header` and its checksum to a binary `file`."""
    file.write(_header_bytes(header))


def read_header(file: BinaryIO) -> Header:
    """The header, checked. The file stands at the first segment after it.

    Raises:
        EcdcError: if it is no `.ecdc` file of version 1, or its header is cut off or damaged.

    Examples:
        >>> import io
        >>> from modeling_encodec.bitstream.container import Header, read_header, write_header
        >>> header = Header(
        ...     model_name="codec", model_fingerprint="0123456789abcdef", sampling_rate=24000, channels=1, codebooks=8,
        ...     codebook_size=1024, hop_length=320, frames_per_segment=750, samples_per_segment=240000, file_id=7,
        ... )
        >>> file = io.BytesIO()
        >>> write_header(file, header)
        >>> _ = file.seek(0)
        >>> read_header(file) == header, header.raw_size(75)  # bytes of a second at 6 kbps
        (True, 750)
    """
    data = read_exactly(file, len(MAGIC) + 1, "header")
    if data[:-1] != MAGIC:
        raise EcdcError(f"not an .ecdc file: it starts with {data[:-1]!r}, allowed: {MAGIC!r}")
    if data[-1] != VERSION:
        raise EcdcError(f".ecdc version is {data[-1]}, allowed: {VERSION}")
    data += read_exactly(file, FIELDS.size - len(data), "header")
    _, _, flags, fingerprint, lm_fingerprint, *numbers = FIELDS.unpack(data)
    names = []
    for _ in range(2):
        size = read_exactly(file, 1, "header")
        names.append(read_exactly(file, size[0], "header"))
        data += size + names[-1]
    checksum = CHECKSUM.pack(zlib.crc32(data))
    if (found := read_exactly(file, CHECKSUM.size, "header")) != checksum:
        raise EcdcError(f"header's checksum is {found.hex()}, allowed: {checksum.hex()}")
    numbers = dict(zip(RANGES, numbers))
    numbers["codebook_size"] += 1
    numbers["audio_length"] = numbers["audio_length"] or None
    # Bytes that are no UTF-8 become what the header refuses.
    model_name, lm_name = (name.decode(errors="surrogateescape") for name in names)
    header = Header(
        model_name=model_name,
        model_fingerprint=fingerprint.hex(),
        lm_name=lm_name if flags & HAS_LM else None,
        lm_fingerprint=lm_fingerprint.hex() if flags & HAS_LM else None,
        has_scales=bool(flags & HAS_SCALES),
        **numbers,
    )
    # Flags without a meaning, or an LM without its flag.
    if _header_bytes(header) != data + checksum:
        raise EcdcError(
            f"header's flags are {flags}, its language model is {shown(lm_name)} ({lm_fingerprint.hex()}), allowed: "
            "flags 0 to 3, and a language model with flag 1 alone"
        )
    return header


class SegmentWriter:
    """Writes the segments that follow a header, numbered from 0, and the end. Never seeks."""

    def __init__(self, file: BinaryIO, header: Header):
        self.file, self.header = file, header
        self.segments, self.digest, self.closed = 0, 0, False

    def write(self, frames: int, scales: Sequence[float], payload: bytes, coded_with_lm: bool) -> None:
        """Write the next segment: how many `frames`, the `scales` of its chunks, its `payload`, and whether that is
        `coded_with_lm`.

        Raises:
            EcdcError: for what a reader would take for damage; nothing is then written.
        """
        checksum = self._write(LM if coded_with_lm else RAW, frames, scales, payload)
        self.digest = zlib.crc32(CHECKSUM.pack(checksum), self.digest)
        self.segments += 1

    def close(self, audio_length: int) -> None:
        """Write the end; `file` stays open. `audio_length` is what all segments together cover, in samples.

        Raises:
            EcdcError: for a length that they do not have.
        """
        audio_length = whole_number("audio_length", audio_length, 0, error=EcdcError)
        end = End(self.segments, audio_length, self.digest)
        if problem := _end_problem(self.header, end, self.segments, self.digest):
            raise EcdcError(problem)
        self._write(END, 0, (), END_PAYLOAD.pack(audio_length, self.digest))
        self.closed = True

    def _write(self, kind: int, frames: int, scales: Sequence[float], payload: bytes) -> int:
        if self.closed:
            raise EcdcError("more is written after close, allowed: nothing")
        _Head(kind, len(scales), self.segments, frames, len(payload)).check(self.header)
        _check_scales(scales)
        index, size = self.segments.to_bytes(3), len(payload).to_bytes(3)
        data = SEGMENT_HEAD.pack(SYNC, kind, len(scales), index, frames, size)
        data += struct.pack(f"!{len(scales)}f", *scales) + payload
        checksum = zlib.crc32(data, self.header.file_id)
        self.file.write(data + CHECKSUM.pack(checksum))
        return checksum


def read_segments(file: BinaryIO, header: Header, *, first: int = 0) -> Iterator[Segment | Damage | End]:
    """What `file` holds from where it stands, as its bytes arrive, in bounded memory.

    Segments come in order. Numbers that do not come are in a Damage in their place, and what lies between segments is
    in a Damage of no segments; one over everything comes if the end does not fit what was read. Without a Damage,
    every byte is as written. `file` stands at segment `first`; only from 0 on can the end's last checksum be compared.
    Nothing that a file holds is an error here.
    """
    window = _Window(file)
    expected, digest, reason = first, None if first else 0, None
    for _, item, checksum in _scan(window, header):
        if isinstance(item, End):
            break
        if isinstance(item, str):
            reason = reason or item
        elif item.index < expected:
            reason = reason or f"segment {item.index} comes again or too late"
        else:
            if item.index > expected:
                digest, reason = None, reason or f"segment {item.index} comes too early"
            if reason:
                yield _damage(header, expected, item.index, reason)
            if digest is not None:
                digest = zlib.crc32(CHECKSUM.pack(checksum), digest)
            yield item
            expected, reason = item.index + 1, None
    else:
        reason = f"{reason}, and the file has no end" if reason else "the file has no end"
        yield _damage(header, expected, header.segments, reason)
        return
    if problem := _end_problem(header, item, expected, digest):
        yield Damage(0, None, 0, None, problem)
        return
    header = replace(header, audio_length=item.audio_length or None)
    if reason or expected < item.segments:
        yield _damage(header, expected, item.segments, reason or "the end comes too early")
    yield item
    if window.has(1):
        yield _damage(header, item.segments, item.segments, "bytes follow the end")


def seek_segment(file: BinaryIO, header: Header, index: int) -> int:
    """Put `file`, with its header at byte 0, at segment `index`, over the heads or by a search; returns the place.

    Raises:
        EcdcError: for a segment that is not in the file.
    """
    most = header.segments or MOST_SEGMENTS
    if not 0 <= index < most:
        raise EcdcError(f"segment is {index}, allowed: 0 to {most - 1}")
    start = following = len(_header_bytes(header))
    try:
        for number in range(index + 1):
            position = following
            file.seek(position)
            head = _Head.unpack(read_exactly(file, SEGMENT_HEAD.size, "segment"), header)
            if head.kind == END or head.index != number:
                raise EcdcError(f"segment is {head.index}, allowed: {number}")
            following += head.segment_size
    except EcdcError:
        file.seek(start)
        found = (start + at for at, item, _ in _scan(_Window(file), header) if getattr(item, "index", None) == index)
        if (position := next(found, None)) is None:
            raise EcdcError(f"segment {index} is not in the file, allowed: undamaged ones") from None
    file.seek(position)
    return position


def _check_name(kind: str, name: str, fingerprint: str) -> None:
    try:
        size = len(name.encode())
    except (AttributeError, UnicodeEncodeError):
        size = 0
    if not 1 <= size <= 255:
        raise EcdcError(f"{kind}_name is {shown(name)}, allowed: text of 1 to 255 bytes as UTF-8")
    if not isinstance(fingerprint, str) or not re.fullmatch("[0-9a-f]{16}", fingerprint):
        raise EcdcError(f"{kind}_fingerprint is {shown(fingerprint)}, allowed: 16 hex digits in lower case")


def _header_bytes(header: Header) -> bytes:
    numbers = {name: getattr(header, name) for name in RANGES}
    numbers["codebook_size"] -= 1
    numbers["audio_length"] = header.audio_length or 0
    flags = HAS_LM * (header.lm_name is not None) | HAS_SCALES * bool(header.has_scales)
    fingerprints = bytes.fromhex(header.model_fingerprint), bytes.fromhex(header.lm_fingerprint or "0" * 16)
    data = FIELDS.pack(MAGIC, VERSION, flags, *fingerprints, *numbers.values())
    for name in (header.model_name.encode(), (header.lm_name or "").encode()):
        data += bytes([len(name)]) + name
    return data + CHECKSUM.pack(zlib.crc32(data))


class _Head(NamedTuple):
    """The numbers between a segment's sync and its scales."""

    kind: int
    scales: int
    index: int
    frames: int
    payload_bytes: int

    @classmethod
    def unpack(cls, data: bytes, header: Header) -> "_Head":
        sync, kind, scales, index, frames, size = SEGMENT_HEAD.unpack(data)
        if sync != SYNC:
            raise EcdcError("bytes that are no segment")
        head = cls(kind, scales, int.from_bytes(index), frames, int.from_bytes(size))
        head.check(header)
        return head

    @property
    def segment_size(self) -> int:
        return SEGMENT_HEAD.size + self.scales * SCALE.size + self.payload_bytes + CHECKSUM.size

    def check(self, header: Header) -> None:
        """Refuse what no segment of this file can have, before anything is done with its size."""
        if self.kind == END:
            size = END_PAYLOAD.size
            allowed = {"scales": (0, 0), "index": (0, MOST_SEGMENTS), "frames": (0, 0), "payload_bytes": (size, size)}
        else:
            raw = header.raw_size(self.frames)
            allowed = {
                "kind": (RAW, RAW if header.lm_name is None else LM),
                "scales": (1, 255) if header.has_scales else (0, 0),
                "index": (0, (header.segments or MOST_SEGMENTS) - 1),
                "frames": (1, header.frames_per_segment),
                "payload_bytes": (raw, raw) if self.kind == RAW else (-(-self.frames // 8), raw - 1),
            }
        for name, (least, most) in allowed.items():
            if not least <= getattr(self, name) <= most:
                raise EcdcError(f"segment's {name} is {getattr(self, name)}, allowed: {least} to {most}")


def _check_scales(scales: Sequence[float]) -> None:
    for scale in scales:
        if not LEAST_SCALE <= scale <= MOST_SCALE:
            raise EcdcError(f"scale is {scale}, allowed: {LEAST_SCALE} to {MOST_SCALE}")


def _damage(header: Header, first: int, stop: int | None, reason: str) -> Damage:
    """Segments `first` up to but without `stop`."""
    most = header.audio_length or 2**64
    start = min(first * header.samples_per_segment, most)
    if stop is None:
        return Damage(first, None, start, None, reason)
    return Damage(first, stop - 1, start, min(stop * header.samples_per_segment, most), reason)


def _end_problem(header: Header, end: End, segments: int, digest: int | None) -> str | None:
    """Why `end` cannot close this file, of which `segments` were seen, all of them if there is a `digest`."""
    if header.audio_length not in (None, end.audio_length):
        return f"the end says {end.audio_length} samples, allowed: {header.audio_length} as in the header"
    if end.segments != (segments_in := header.segments_in(end.audio_length)):
        return f"{end.audio_length} samples in {end.segments} segments, allowed: {segments_in}"
    if end.segments < segments:
        return f"{segments} segments, allowed: {end.segments} as the end says"
    if end.segments == segments and digest not in (None, end.digest):
        return "the segments pass alone, but are not those that the end was written for; nothing can be trusted"


def _scan(window: "_Window", header: Header) -> Iterator[tuple[int, Segment | End | str, int]]:
    """Position, content and checksum of each segment that passes; between them, texts why there is none."""
    position, credit = 0, CREDIT
    while window.has(1):
        try:
            head = _Head.unpack(window.peek(SEGMENT_HEAD.size), header)
            # False segments may overlap. Where every few bytes begin one, to check them all would take hours.
            if head.segment_size > credit:
                raise EcdcError("too many false segments")
            credit -= head.segment_size
            item, checksum = _content(window.peek(head.segment_size), head, header)
            size = head.segment_size
        except EcdcError as error:
            item, checksum, size = str(error), 0, window.next_sync()
        del window.data[:size]
        yield position, item, checksum
        position, credit = position + size, credit + CREDIT_PER_BYTE * size


def _content(data: bytes, head: _Head, header: Header) -> tuple[Segment | End, int]:
    """The segment that is `data`, and its checksum."""
    payload, stop = len(data) - CHECKSUM.size - head.payload_bytes, len(data) - CHECKSUM.size
    checksum = zlib.crc32(memoryview(data)[:stop], header.file_id)
    if CHECKSUM.unpack_from(data, stop) != (checksum,):
        raise EcdcError("checksum does not fit")
    if head.kind == END:
        return End(head.index, *END_PAYLOAD.unpack_from(data, payload)), checksum
    scales = struct.unpack_from(f"!{head.scales}f", data, SEGMENT_HEAD.size)
    _check_scales(scales)
    return Segment(head.index, head.frames, head.kind == LM, scales, data[payload:stop]), checksum


class _Window:
    """The bytes of `file` that may still begin a segment. Reads no further than asked, so a pipe never waits."""

    def __init__(self, file: BinaryIO):
        self.file, self.data = file, bytearray()

    def has(self, size: int) -> bool:
        """Whether the file goes on for `size` bytes; reads those of them that are missing."""
        while len(self.data) < size:
            piece = self.file.read(min(size - len(self.data), READ_BYTES))
            if not piece:
                return False
            self.data += piece
        return True

    def peek(self, size: int) -> bytes:
        if not self.has(size):
            raise EcdcError("the file ends inside a segment")
        return bytes(memoryview(self.data)[:size])

    def next_sync(self) -> int:
        """Bytes at the front that cannot begin a segment, given that the first does not."""
        found = MAYBE_SEGMENT.search(self.data, 1)
        return len(self.data) if found is None else found.start()
