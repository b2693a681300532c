"""Where the recordings of a compressed stream begin and end, and how long they are: MPEG audio, Ogg, FLAC.

Joined files of these kinds are one file to most players, and libsndfile stops at the end of the first. So the stream
is walked by its frames' and pages' heads, without decoding.
"""

import re
from typing import BinaryIO

import numpy as np

from modeling_encodec.processors.audio_parts import Part, find_bytes, read_at, skip_tags


# kbps by MPEG version (1, or 2 and 2.5) and layer.
BITRATES = {
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
# Bytes that are no frames: within a stream (a damaged place), and after its last frame (a tag of unknown kind).
MOST_DAMAGED_BYTES, MOST_FOREIGN_BYTES = 4096, 1 << 16
OTHER_MAGIC = (b"OggS", b"fLaC", b"RIFF", b"RIFX", b"RF64", b"FORM", b"riff", b"caff", b".snd", b"\x1aE\xdf\xa3")
RATES = (44100, 48000, 32000)
OGG_AUDIO = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex   ")
# Frames of 1152 samples after which the synthesis filter of mpg123 is at the same place in its memory. A frame may
# need the 511 bytes before it, which at the lowest rate are 22 frames.
MPEG_STRIDE = 8 * 1152
# libsndfile opens MPEG audio that is no file on disk only after a tag: here one of nothing.
EMPTY_ID3 = b"ID3\4\0\0\0\0\0\x40" + bytes(64)
FLAC_HEADS = (b"\0\0\0\x22", b"\x80\0\0\x22")  # of the block that comes first
# What may begin after a stream of FLAC.
AFTER_FLAC = re.compile(rb"ID3[\2-\4]\0|TAG|APETAGEX|RIFF|RIFX|RF64|FORM|OggS|\.snd|caff|riff|\xff[\xe2-\xff]|\0{8}")
FLAC_TAIL = 1 << 17  # bytes in which a stream's last frame begins
FLAC_BLOCKS = {1: 192, **{n: 576 << n - 2 for n in range(2, 6)}, **{n: 256 << n - 8 for n in range(8, 16)}}


def stream_parts(file: BinaryIO, start: int, stop: int) -> tuple[list[Part], int] | None:
    """The recordings from `start` on that are of the kind of the first, and where they end; None for other kinds.

    Raises:
        ValueError: if the stream is cut off, or something in it would be lost.
    """
    place = skip_tags(file, start, stop)
    magic = read_at(file, place, 4)
    if magic == b"OggS":
        return _ogg(file, start, stop)
    if magic == b"fLaC":
        return _flac(file, start, place, stop)
    if _mpeg_frame(magic) and (found := _mpeg(file, start, stop)):
        return found
    return None


# ---- MPEG audio ---------------------------------------------------------------------------------------------------


class _Frame:
    """The head of a frame of MPEG audio: its bytes, samples, kind (rate, channels, version, layer), where its
    encoder's own tag would be."""

    __slots__ = ("kind", "samples", "size", "tag")

    def __init__(self, version: int, layer: int, bitrate: int, rate: int, padding: int, mono: bool):
        low = version != 1
        self.kind = (rate, 1 if mono else 2, version, layer)
        self.samples = 384 if layer == 1 else 576 if layer == 3 and low else 1152
        unit = 4 if layer == 1 else 1
        self.size = (self.samples // 8 * bitrate * 1000 // rate // unit + padding) * unit
        self.tag = 4 + ((9 if mono else 17) if low else (17 if mono else 32))


_FRAMES: dict[int, _Frame | None] = {}


def _mpeg_frame(head: bytes) -> _Frame | None:
    """What a frame's first four bytes say; None if they begin no frame."""
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return None
    # What decides, without protection, private bits and the kind of stereo.
    key = head[1] & 0x1E | (head[2] & 0xFE) << 8 | (head[3] >= 0xC0) << 16
    if key not in _FRAMES:
        _FRAMES[key] = _parsed_frame(head)
    return _FRAMES[key]


def _parsed_frame(head: bytes) -> _Frame | None:
    version, layer = {0: 4, 2: 2, 3: 1}.get(head[1] >> 3 & 3), 4 - (head[1] >> 1 & 3)
    bitrate, rate = head[2] >> 4, head[2] >> 2 & 3
    if version is None or layer == 4 or bitrate in (0, 15) or rate == 3:
        return None
    kbps = BITRATES[min(version, 2), layer][bitrate - 1]
    return _Frame(version, layer, kbps, RATES[rate] // version, head[2] >> 1 & 1, head[3] >= 0xC0)


class _Run:
    """Frames of one recording: where they begin, how many they are and should be, and their kind."""

    def __init__(self, begin: int, tagged: bool = False):
        self.tagged = tagged  # an ID3 tag begins it
        self.begin, self.count, self.promised, self.frame = begin, 0, None, None

    def goes_on(self, frame: _Frame, promised: int | None) -> bool:
        """Whether a frame, with what it promises if it is an encoder's tag, still belongs to it."""
        if self.frame is None:
            return True
        return promised is None and frame.kind == self.frame.kind and self.count != self.promised

    def take(self, frame: _Frame, promised: int | None) -> None:
        """The next frame."""
        self.frame = frame
        if promised is None:
            self.count += 1
        else:
            self.promised = promised

    def part(self, end: int) -> Part:
        """All of them; a ValueError if that are fewer than promised."""
        samples, head = self.frame.samples, b"" if self.tagged else EMPTY_ID3
        if self.promised is None or self.promised < 0:
            return Part(self.begin, end, head, frames=self.count * samples, endless=True, stride=MPEG_STRIDE)
        if self.count < self.promised - 1:  # some count the frame of the tag
            raise ValueError(
                f"cut off: header says {self.promised * samples} samples, file holds {self.count * samples}"
            )
        return Part(self.begin, end, head, stride=MPEG_STRIDE)


def _mpeg(file: BinaryIO, start: int, stop: int) -> tuple[list[Part], int] | None:
    """Runs of frames, apart where the kind, a tag or an encoder's own tag of a frame says that another file begins."""
    parts, place, tagged = [], start, read_at(file, start, 3) == b"ID3"
    run = _Run(start, tagged)
    base, data, lost = start, b"", True
    while place < stop:
        if not base <= place <= base + len(data) - 64:
            base, data = place, read_at(file, place, 1 << 20)
        head = data[place - base : place - base + 64]
        frame = _mpeg_frame(head)
        if frame is None or (lost and not _is_run(file, place, frame, stop)):
            parts += [run.part(place)] if run.frame else []
            after = skip_tags(file, place, stop)
            if after == place:
                after = _resync(file, place + 1, stop)
                if parts and not _may_be_skipped(file, place, after, stop):
                    return parts, place
            if not parts and after == stop:
                return None
            run, place, lost = _Run(after) if parts else _Run(start, tagged), after, True
            continue
        if place + frame.size > stop:
            break  # the last one is not whole and gives no sound
        promised = _promise(head, frame)
        if not run.goes_on(frame, promised):
            parts.append(run.part(place))
            run = _Run(place)
        run.take(frame, promised)
        place, lost = place + frame.size, False
    parts += [run.part(place)] if run.frame else []
    return (parts, stop) if parts else None


def _may_be_skipped(file: BinaryIO, place: int, after: int, stop: int) -> bool:
    """Whether bytes between frames, or after the last, are too few for audio to be lost."""
    return after - place <= (MOST_FOREIGN_BYTES if after == stop else MOST_DAMAGED_BYTES) and not read_at(
        file, place, 12
    ).startswith(OTHER_MAGIC)


def _is_run(file: BinaryIO, place: int, frame: _Frame, stop: int) -> bool:
    """Whether another frame of the kind, a tag or the end follows a frame."""
    after = place + frame.size
    following = _mpeg_frame(read_at(file, after, 4)) if after < stop else None
    return after >= stop or skip_tags(file, after, stop) > after or bool(following and following.kind == frame.kind)


def _resync(file: BinaryIO, place: int, stop: int) -> int:
    """Where the next run of frames begins; `stop` if none does."""
    while (place := find_bytes(file, b"\xff", place, stop)) >= 0:
        frame = _mpeg_frame(read_at(file, place, 4))
        if frame and _is_run(file, place, frame, stop):
            return place
        place += 1
    return stop


def _promise(data: bytes, frame: _Frame) -> int | None:
    """The frames that an encoder's own tag says follow, -1 if it does not say; None if the frame is none."""
    start = frame.tag + (0 if data[1] & 1 else 2)  # a check of two bytes may come before
    tag = data[start : start + 12]
    if frame.kind[3] != 3 or tag[:4] not in (b"Xing", b"Info"):
        return None
    return int.from_bytes(tag[8:12], "big") if tag[7] & 1 else -1


# ---- Ogg ----------------------------------------------------------------------------------------------------------


def _ogg(file: BinaryIO, start: int, stop: int) -> tuple[list[Part], int]:
    """The links of a chain: each begins with the first pages of its streams, one or several."""
    parts, begin, heads, place = [], start, 0, skip_tags(file, start, stop)
    audio = in_heads = 0
    granules = [0, 0, 0]  # of the last pages
    while place < stop:
        head = read_at(file, place, 27 + 255 + 8)
        if head[:4] != b"OggS":
            after = skip_tags(file, place, stop)
            if after == place:
                break
            place = after
            continue
        segments = head[26] if len(head) > 26 else 0
        size = 27 + segments + sum(head[27 : 27 + segments])
        if place + size > stop or len(head) < 27 + segments:
            raise ValueError(f"cut off: its last page says {size} bytes, file holds {stop - place}")
        if head[5] & 2:  # the first page of a stream
            if not in_heads and heads:
                parts.append(Part(begin, place, seek_last=granules[-3]))
                begin, audio, granules = place, 0, [0, 0, 0]
            heads, in_heads = heads + 1, 1
            audio += head[27 + segments :].startswith(OGG_AUDIO)
            if audio > 1:
                raise ValueError("holds several streams of audio at once, allowed: one, or one after the other")
        else:
            in_heads = 0
            granules = [*granules[-2:], max(0, int.from_bytes(head[6:14], "little", signed=True))]
        place += size
    return [*parts, Part(begin, place, seek_last=granules[-3])], place


# ---- FLAC ---------------------------------------------------------------------------------------------------------


def _flac(file: BinaryIO, start: int, mark: int, stop: int) -> tuple[list[Part], int]:
    """Streams one after the other, each with its own head; tags may lie between."""
    parts, end = [], start
    while mark < stop and read_at(file, mark, 4) == b"fLaC":
        following = mark
        while (following := find_bytes(file, b"fLaC", following + 1, stop)) >= 0:
            if read_at(file, following + 4, 4) in FLAC_HEADS:
                break
        part, end = _flac_part(file, start, mark, stop if following < 0 else following)
        parts.append(part)
        start, mark = end, skip_tags(file, end, stop)
    return parts, end


def _flac_part(file: BinaryIO, start: int, mark: int, stop: int) -> tuple[Part, int]:
    head = read_at(file, start, mark - start + 42)
    info = head[-34:]
    packed = int.from_bytes(info[10:18], "big")
    total, unset = packed & ((1 << 36) - 1), packed >> 36 << 36
    tail = max(mark + 42, stop - FLAC_TAIL)
    if total and (end := _flac_end(read_at(file, tail, stop - tail), total, int.from_bytes(info[:2], "big"))):
        return Part(start, tail + end, exact=True), tail + end
    # Without a count libsndfile reads on; what no decoder takes for a frame must not follow then.
    head = head[:-34] + info[:10] + unset.to_bytes(8, "big") + info[18:]
    end = stop - 128 if stop - mark > 200 and read_at(file, stop - 128, 3) == b"TAG" else stop
    return Part(start + len(head), end, head, frames=total or None, known=False, exact=True), stop


def _flac_end(data: bytes, total: int, block: int) -> int | None:
    """Where in the last bytes of a stream the frame ends that ends with sample `total`: by its checksum, before
    nothing, a tag or another recording; None if there is none."""
    octets = np.frombuffer(data, np.uint8)
    begins = np.flatnonzero((octets[:-1] == 0xFF) & (octets[1:] & 0xFE == 0xF8))
    for begin in begins:
        if _flac_frame_end(data[begin : begin + 16].ljust(16, b"\0"), block) == total:
            place, crc = begin, 0
            for end in (*(match.start() for match in AFTER_FLAC.finditer(data, begin + 1)), len(data)):
                crc = _crc(data[place:end], crc, CRC16)
                place = end
                if crc == 0:
                    return end
    return None


def _flac_frame_end(head: bytes, block: int) -> int | None:
    """The samples until the end of a frame, by its first bytes; None if they begin none."""
    code, lead = head[2] >> 4, head[4]
    more = 0 if lead < 0x80 else 7 - (lead ^ 0xFF).bit_length()
    if not code or head[3] & 1 or more > 6 or 0x80 <= lead < 0xC0:
        return None
    number = lead if lead < 0x80 else lead & (0x3F >> more)
    for byte in head[5 : 5 + more]:
        number = number << 6 | byte & 0x3F
    place = 5 + more
    size = FLAC_BLOCKS.get(code)
    if size is None:
        size = int.from_bytes(head[place : place + code - 5], "big") + 1
        place += code - 5
    place += {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
    if place >= 16 or _crc(head[: place + 1], 0, CRC8):
        return None
    return (number if head[1] & 1 else number * block) + size


def _table(polynomial: int, bits: int) -> list[int]:
    """A checksum's steps for each byte."""
    steps, top = [], 1 << bits - 1
    for value in range(256):
        value <<= bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value & top else 0)
            value &= (1 << bits) - 1
        steps.append(value)
    return steps


def _crc(data: bytes, crc: int, table: list[int]) -> int:
    """A checksum gone on with; 0 after the bytes of the checksum itself."""
    if table is CRC8:
        for byte in data:
            crc = table[crc ^ byte]
        return crc
    for byte in data:
        crc = crc << 8 & 0xFF00 ^ table[crc >> 8 ^ byte]
    return crc


CRC8, CRC16 = _table(0x07, 8), _table(0x8005, 16)
