"""Version 1 files taken apart into their fields, changed, and put together again with right checksums."""

import copy
import io
import json
import random
import struct
import zlib
from dataclasses import dataclass

from modeling_encodec.bitstream.container import (
    END,
    FIELDS,
    LM,
    RANGES,
    RAW,
    Header,
    Segment,
    read_header,
    read_segments,
)


EXTREMES = (0, 1, 2, 3, 7, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**24 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
SCALES = (0.0, -1.0, 1e-45, 1e-6, 1.0, 3.4e38, float("inf"), float("nan"))
# Bits of the numbers in a header, in the order of RANGES.
WIDTHS = dict(zip(RANGES, (32, 8, 8, 16, 16, 16, 32, 64, 32)))


@dataclass
class Forged:
    """The fields of a file; `segments` are lists [kind, index, frames, scales, payload, file id]."""

    numbers: dict[str, int]
    flags: int
    fingerprints: list[bytes]
    names: list[bytes]
    segments: list[list]
    end: list[int] | None  # segments, samples, and what the checksum of checksums is changed by
    tail: bytes = b""
    cut: int | None = None

    def build(self) -> bytes:
        """The bytes, with the checksums that they need."""
        numbers = [value % (1 << WIDTHS[name]) for name, value in self.numbers.items()]
        data = FIELDS.pack(b"ECDC", 1, self.flags % 256, *self.fingerprints, *numbers)
        for name in self.names:
            data += bytes([len(name)]) + name
        data += struct.pack("!I", zlib.crc32(data))
        digest = 0
        for segment in self.segments:
            written, checksum = _segment(*segment)
            data, digest = data + written, zlib.crc32(struct.pack("!I", checksum), digest)
        if self.end is not None:
            count, samples, change = self.end
            payload = struct.pack("!QI", samples % 2**64, digest ^ change % 2**32)
            data += _segment(END, count, 0, [], payload, self.numbers["file_id"])[0]
        data += self.tail
        return data if self.cut is None else data[: self.cut % len(data)]


def _segment(kind, index, frames, scales, payload, file_id) -> tuple[bytes, int]:
    data = struct.pack("!2sBB", b"\xec\x5e", kind % 256, len(scales)) + (index % 2**24).to_bytes(3)
    data += struct.pack("!H", frames % 2**16) + len(payload).to_bytes(3)
    data += struct.pack(f"!{len(scales)}f", *scales) + payload
    checksum = zlib.crc32(data, file_id % 2**32)
    return data + struct.pack("!I", checksum), checksum


def taken_apart(data: bytes) -> Forged:
    """A whole file's fields."""
    file = io.BytesIO(data)
    header: Header = read_header(file)
    *segments, end = read_segments(file, header)
    assert all(isinstance(segment, Segment) for segment in segments)
    numbers = {name: getattr(header, name) or 0 for name in RANGES}
    numbers["codebook_size"] -= 1
    fingerprints = [bytes.fromhex(header.model_fingerprint), bytes.fromhex(header.lm_fingerprint or "0" * 16)]
    forged = Forged(
        numbers=numbers,
        flags=(header.lm_name is not None) | 2 * header.has_scales,
        fingerprints=fingerprints,
        names=[header.model_name.encode(), (header.lm_name or "").encode()],
        segments=[
            [LM if one.coded_with_lm else RAW, one.index, one.frames, list(one.scales), one.payload, header.file_id]
            for one in segments
        ],
        end=[end.segments, end.audio_length, 0],
    )
    assert forged.build() == data
    return forged


def forge(source: Forged, others: list[Forged], rng: random.Random) -> bytes:
    """`source` with one to three changes of any kind, and right checksums."""
    forged = copy.deepcopy(source)
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(CHANGES)(forged, others, rng)
    return forged.build()


def number(rng: random.Random, now: int) -> int:
    near = (now - 1, now + 1, now * 2, now // 2, now + rng.randrange(-100, 100))
    return max(0, rng.choice((*EXTREMES, *near, *near, rng.randrange(2**16))))


def change_header(forged: Forged, others, rng) -> None:
    kind = rng.randrange(10)
    if kind == 0:
        forged.flags = rng.choice((*range(8), 255))
    elif kind == 1:
        forged.fingerprints[rng.randrange(2)] = rng.choice((bytes(8), rng.randbytes(8)))
    elif kind == 2:
        forged.names[rng.randrange(2)] = rng.choice((b"", b"x", b"\xff\xfe", b"n" * 255, b"\0\n"))
    else:
        name = rng.choice([*RANGES, "audio_length", "audio_length", "frames_per_segment", "samples_per_segment"])
        forged.numbers[name] = number(rng, forged.numbers[name])


def change_segment(forged: Forged, others, rng) -> None:
    if not forged.segments:
        return
    segment = rng.choice(forged.segments)
    kind, index, frames, scales, payload, _ = segment
    place = rng.randrange(6)
    if place == 0:
        segment[0] = rng.choice((RAW, LM, END, 3, 255))
    elif place in (1, 2):
        segment[place] = number(rng, segment[place])
    elif place == 3:
        segment[3] = rng.choice(
            ([], scales * 2, scales[1:], [*scales, 1.0], [rng.choice(SCALES)] * max(1, len(scales)))
        )
    elif place == 4:
        size = rng.choice((0, len(payload) // 2, len(payload) + 1, len(payload), 1))
        segment[4] = rng.choice((payload[:size], rng.randbytes(size), b"\xff" * size, bytes(size)))
    else:
        segment[5] = rng.choice((0, segment[5] ^ 1))


def change_order(forged: Forged, others, rng) -> None:
    """Drop, repeat, exchange or renumber whole segments, of this file or another, which are made this file's."""
    segments = forged.segments
    if not segments:
        return
    at, kind = rng.randrange(len(segments)), rng.randrange(7)
    if kind == 0:
        del segments[at]
    elif kind == 1:
        segments.insert(rng.randrange(len(segments) + 1), list(segments[at]))
    elif kind == 2:
        rng.shuffle(segments)
    elif kind == 3:
        segments.reverse()
    elif kind == 4:
        for segment in segments[at:]:
            segment[1] += rng.choice((1, 5, 100, 2**20))
    elif kind == 5:
        del segments[: at + 1]
    else:
        other = list(rng.choice(rng.choice(others).segments))
        segments[at] = [*other[:5], forged.numbers["file_id"]] if rng.random() < 0.8 else other


def change_end(forged: Forged, others, rng) -> None:
    if forged.end is None:
        return
    place = rng.randrange(4)
    if place == 3:
        forged.end = None
    else:
        forged.end[place] = number(rng, forged.end[place])
    if place == 1 and rng.random() < 0.7 and forged.numbers["samples_per_segment"]:  # a length that fits its segments
        forged.end[0] = -(-forged.end[1] // forged.numbers["samples_per_segment"])


def change_bytes(forged: Forged, others, rng) -> None:
    if rng.random() < 0.5:
        forged.cut = rng.randrange(2**20)
    else:
        forged.tail = rng.choice((b"\0", b"\xec\x5e" * 50, rng.randbytes(40)))


CHANGES = (change_header, change_header, change_segment, change_segment, change_order, change_order, change_end)
CHANGES += (change_bytes,)


def forge_original(data: bytes, rng: random.Random) -> bytes:
    """A version 0 file with a field of its header changed, or its bytes."""
    (size,) = struct.unpack("!I", data[5:9])
    fields, codes = json.loads(data[9 : 9 + size]), data[9 + size :]
    kind = rng.randrange(6)
    if kind == 0:
        fields["al"] = rng.choice((0, -1, 10**30, 10**3000, True, 1.5, "9", number(rng, fields["al"])))
    elif kind == 1:
        fields["nc"] = rng.choice((0, -1, 10**30, None, number(rng, fields["nc"])))
    elif kind == 2:
        name = rng.choice(("m", "lm", "fp", "x"))
        fields[name] = rng.choice((None, True, 3, "y", [], {}, "0" * 16))
    elif kind == 3:
        codes = codes[: rng.randrange(len(codes))]
    elif kind == 4:
        at = rng.randrange(len(codes))
        codes = codes[:at] + rng.randbytes(4) + codes[at + 4 :]
    else:
        codes += rng.randbytes(rng.randrange(1, 9))
    text = json.dumps(fields).encode()
    return data[:5] + struct.pack("!I", len(text)) + text + codes
