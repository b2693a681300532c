"""The container: what was written comes back, and whatever was done to a file is noticed."""

import io
import itertools
import random
import struct
import time
import tracemalloc
import zlib
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_encodec.bitstream.container import (
    Damage,
    End,
    Header,
    Segment,
    SegmentWriter,
    read_header,
    read_segments,
    seek_segment,
    write_header,
)
from modeling_encodec.bitstream.ecdc import EcdcError


# 4 frames of 2 codebooks of 3 bits: 3 bytes raw.
SMALL = Header("m", "0123456789abcdef", 8, 1, 2, 8, 2, 4, 8, 0xCAFE)
WITH_LM = replace(SMALL, lm_name="l", lm_fingerprint="fedcba9876543210", has_scales=True)
# The largest payloads that fit, 16 MB.
LARGE = replace(WITH_LM, codebooks=255, codebook_size=2**16, frames_per_segment=32896, has_scales=False)
GOLDEN = bytes.fromhex(
    "45434443 01 03 0123456789abcdef fedcba9876543210 00000008 01 02 0007 0002 0004 00000008"  # the header's fields
    "0000000000000000 0000cafe 01 6d 01 6c 073b490c"
    "ec5e 00 01 000000 0004 000003 3f000000 aabbcc b987881e"  # raw
    "ec5e 01 02 000001 0003 000001 3f800000 40000000 dd 10199d70"  # with the LM
    "ec5e 02 00 000002 0000 00000c 000000000000000e 1b1d33c4 faa14a10"
)


class Trickle(io.RawIOBase):
    """A pipe: never seeks, gives one byte at a time, counts what it gave."""

    def __init__(self, data: bytes):
        self.data, self.given = data, 0

    def read(self, size: int = -1) -> bytes:
        piece = self.data[self.given : self.given + min(size, 1)]
        self.given += len(piece)
        return piece


class Sink:
    """The writing end of a pipe: has nothing but `write`."""

    def __init__(self):
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data


def write_file(header: Header, segments: list[tuple], audio_length: int) -> bytes:
    sink = Sink()
    write_header(sink, header)
    writer = SegmentWriter(sink, header)
    for segment in segments:
        writer.write(*segment)
    writer.close(audio_length)
    return sink.data


def small_file(seed: int, header: Header = WITH_LM, count: int = 6) -> bytes:
    """`count` segments of random content; without scales or an LM if `header` has none."""
    rng = random.Random(seed)
    segments = []
    for _ in range(count):
        frames = rng.randint(1, header.frames_per_segment)
        with_lm = header.lm_name is not None and rng.random() < 0.5
        size = rng.randrange(header.raw_size(frames)) if with_lm else header.raw_size(frames)
        scales = [rng.randint(1, 9) / 4 for _ in range(rng.randint(1, 2))] if header.has_scales else []
        segments.append((frames, scales, rng.randbytes(size), with_lm))
    return write_file(header, segments, count * header.samples_per_segment - 3)


def read_file(data: bytes) -> tuple[Header, list]:
    file = io.BytesIO(data)
    header = read_header(file)
    return header, list(read_segments(file, header))


@cache
def segments_of(data: bytes) -> list[Segment]:
    return [item for item in read_file(data)[1] if isinstance(item, Segment)]


def parts_of(data: bytes) -> list[bytes]:
    """The header, each segment and the end of a whole file, as bytes."""
    file = io.BytesIO(data)
    header = read_header(file)
    count = len(segments_of(data))
    edges = [0, *(seek_segment(io.BytesIO(data), header, index) for index in range(count)), len(data) - 28, len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(edges)]


def forged(file_id: int, kind: int, index: int, frames: int, payload: bytes, scales: tuple = ()) -> bytes:
    """A segment whose checksum fits, whatever it says."""
    data = struct.pack("!2sBB", b"\xec\x5e", kind, len(scales)) + index.to_bytes(3) + struct.pack("!H", frames)
    data += len(payload).to_bytes(3) + struct.pack(f"!{len(scales)}f", *scales) + payload
    return data + struct.pack("!I", zlib.crc32(data, file_id))


def covers(damage: Damage, index: int) -> bool:
    return damage.first <= index and (damage.last is None or index <= damage.last)


def check_order(items: list, header: Header) -> None:
    """Segment numbers from 0 come once each, as a segment or in a Damage, and then the end, if it was found."""
    expected = 0
    for place, item in enumerate(items):
        if isinstance(item, Segment):
            assert item.index == expected
            expected += 1
        elif isinstance(item, End):
            assert item.segments == expected
        elif item.last is None:
            assert place == len(items) - 1 and item.end is None and item.first in (0, expected)
        else:
            assert item.first == expected <= item.last + 1 and item.start <= item.end
            assert (item.start == item.end) == (item.first > item.last)
            expected = item.last + 1
        if isinstance(item, Damage):
            text = item.describe(header.sampling_rate)
            assert item.reason in text and "\n" not in text and " s" in text


def check_read(data: bytes, originals: dict[int, list[bytes]], trusted: bool = True) -> str:
    """Read damaged `data`: silence only for an original file, and every segment given is an original or covered."""
    try:
        header, items = read_file(data)
    except EcdcError as error:
        assert "\n" not in str(error)
        return "refused"
    check_order(items, header)
    files = originals[header.file_id]
    damages = [item for item in items if isinstance(item, Damage)]
    assert bool(damages) == (data not in files)
    known = {segment for file in files for segment in segments_of(file)}
    for item in items:
        if isinstance(item, Segment) and trusted and item not in known:
            assert any(covers(damage, item.index) for damage in damages)
    return "damaged" if damages else "whole"


def slow_crc32(data: bytes, start: int = 0) -> int:
    """CRC32 by its definition, a bit at a time."""
    rest = start ^ 0xFFFFFFFF
    for byte in data:
        rest ^= byte
        for _ in range(8):
            rest = rest >> 1 ^ (0xEDB88320 if rest & 1 else 0)
    return rest ^ 0xFFFFFFFF


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
fingerprints = st.binary(min_size=8, max_size=8).map(bytes.hex)


@st.composite
def headers(draw) -> Header:
    with_lm = draw(st.booleans())
    codebooks, size = draw(st.integers(1, 255)), draw(st.integers(2, 2**16))
    hop_length = draw(st.integers(1, 2**16 - 1))
    frames = draw(st.integers(1, min(2**16 - 1, (2**24 - 1) * 8 // codebooks // (size - 1).bit_length())))
    samples = draw(st.integers(1, min(2**32 - 1, frames * hop_length)))
    return Header(
        model_name=draw(names),
        model_fingerprint=draw(fingerprints),
        sampling_rate=draw(st.integers(1, 2**32 - 1)),
        channels=draw(st.integers(1, 255)),
        codebooks=codebooks,
        codebook_size=size,
        hop_length=hop_length,
        frames_per_segment=frames,
        samples_per_segment=samples,
        file_id=draw(st.integers(0, 2**32 - 1)),
        has_scales=draw(st.booleans()),
        lm_name=draw(names) if with_lm else None,
        lm_fingerprint=draw(fingerprints) if with_lm else None,
        audio_length=draw(st.none() | st.integers(1, min(2**64 - 1, samples * (2**24 - 1)))),
    )


@given(headers())
def test_any_header_comes_back(header):
    file = io.BytesIO()
    write_header(file, header)
    file.write(b"rest")
    file.seek(0)
    assert read_header(file) == header
    assert file.read() == b"rest"


@settings(max_examples=60)
@given(st.data())
def test_any_segments_come_back(data):
    with_lm, has_scales = data.draw(st.booleans()), data.draw(st.booleans())
    header = replace(
        WITH_LM if with_lm else SMALL, has_scales=has_scales, file_id=data.draw(st.integers(0, 2**32 - 1))
    )
    scale = st.floats(2.0**-149, (2 - 2.0**-23) * 2.0**127, width=32)
    segments = []
    for index in range(data.draw(st.integers(0, 5))):
        frames, coded = data.draw(st.integers(1, 4)), with_lm and data.draw(st.booleans())
        size = data.draw(st.integers(0, header.raw_size(frames) - 1)) if coded else header.raw_size(frames)
        scales = tuple(data.draw(st.lists(scale, min_size=1, max_size=255 if index == 0 else 3))) if has_scales else ()
        segments.append(Segment(index, frames, coded, scales, data.draw(st.binary(min_size=size, max_size=size))))
    length = data.draw(st.integers(8 * len(segments) - 7, 8 * len(segments))) if segments else 0
    if length and data.draw(st.booleans()):
        header = replace(header, audio_length=length)
    rows = [(item.frames, item.scales, item.payload, item.coded_with_lm) for item in segments]
    found, items = read_file(write_file(header, rows, length))
    assert found == header
    assert items[:-1] == segments
    assert (items[-1].segments, items[-1].audio_length) == (len(segments), length)


def test_largest_segment_comes_back():
    payload = random.Random(0).randbytes(LARGE.raw_size(32896))
    assert len(payload) == 2**24 - 256
    header, items = read_file(write_file(LARGE, [(32896, (), payload, False)], 8))
    assert items[0].payload == payload and isinstance(items[1], End) and len(items) == 2


def test_golden_bytes():
    assert write_file(WITH_LM, [(4, [0.5], b"\xaa\xbb\xcc", False), (3, [1, 2], b"\xdd", True)], 14) == GOLDEN
    header, first, second, end = parts_of(GOLDEN)
    assert slow_crc32(header[:-4]) == int.from_bytes(header[-4:])
    for part in (first, second, end):
        assert slow_crc32(part[:-4], 0xCAFE) == int.from_bytes(part[-4:])
    assert slow_crc32(first[-4:] + second[-4:]) == int.from_bytes(end[-8:-4])
    assert read_file(GOLDEN) == (
        WITH_LM,
        [
            Segment(0, 4, False, (0.5,), b"\xaa\xbb\xcc"),
            Segment(1, 3, True, (1.0, 2.0), b"\xdd"),
            End(2, 14, 0x1B1D33C4),
        ],
    )


def test_codes_per_payload():
    assert [replace(SMALL, codebook_size=size).bits_per_code for size in (2, 3, 4, 5, 1024, 1025)] == [
        1,
        2,
        2,
        3,
        10,
        11,
    ]
    assert [SMALL.raw_size(frames) for frames in (1, 2, 3, 4)] == [1, 2, 3, 3]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_name", ""),
        ("model_name", "é" * 128),
        ("model_name", "\udc80"),
        ("model_name", None),
        ("lm_name", "x"),  # without its fingerprint
        ("lm_fingerprint", "0" * 16),
        ("model_fingerprint", "0" * 15),
        ("model_fingerprint", "0123456789ABCDEF"),
        ("model_fingerprint", "0" * 16 + "\n"),
        ("sampling_rate", 0),
        ("sampling_rate", 2**32),
        ("sampling_rate", 24000.0),
        ("channels", 256),
        ("codebooks", 0),
        ("codebooks", 256),
        ("codebook_size", 1),
        ("codebook_size", 2**16 + 1),
        ("hop_length", 2**16),
        ("frames_per_segment", 2**16),
        ("samples_per_segment", 9),  # more than 4 frames of 2 samples
        ("audio_length", 0),
        ("audio_length", 8 * 2**24),
        ("file_id", -1),
        ("file_id", None),
    ],
)
def test_header_refuses(field, value):
    with pytest.raises(EcdcError, match="allowed: ") as caught:
        replace(SMALL, **{field: value})
    assert field.split("_")[0] in str(caught.value) and "\n" not in str(caught.value)


def test_header_refuses_segments_beyond_the_format():
    with pytest.raises(EcdcError, match="16777470 bytes, allowed: up to 16777215"):
        replace(LARGE, frames_per_segment=32897)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, b"RIFF", "not an .ecdc file: it starts with b'RIFF', allowed: b'ECDC'"),
        (4, b"\x00", "version is 0, allowed: 1"),
        (4, b"\x02", "version is 2, allowed: 1"),
        (5, b"\x02", "header is .*, allowed: "),  # an LM without its flag
        (5, b"\x07", "header is .*, allowed: "),
        (22, bytes(4), "sampling_rate is 0, allowed: "),
        (26, b"\x00", "channels is 0, allowed: "),
        (27, b"\x00", "codebooks is 0, allowed: "),
        (28, b"\x00\x00", "codebook_size is 1, allowed: "),
        (34, b"\x00\x00\x01\x00", "samples_per_segment is 256, allowed: "),
        (51, b"\xff", "model_name is .*, allowed: text"),
        (53, b"\xff", "lm_name is .*, allowed: text"),
    ],
)
def test_header_with_impossible_values(place, value, message):
    data = bytearray(parts_of(GOLDEN)[0][:-4])
    data[place : place + len(value)] = value
    with pytest.raises(EcdcError, match=message):
        read_header(io.BytesIO(data + struct.pack("!I", zlib.crc32(data))))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((0, [1], b"", False), "frames is 0, allowed: 1 to 4"),
        ((5, [1], bytes(4), False), "frames is 5, allowed: 1 to 4"),
        ((4, [1], bytes(2), False), "payload_bytes is 2, allowed: 3 to 3"),
        ((4, [1], bytes(4), False), "payload_bytes is 4, allowed: 3 to 3"),
        ((4, [1], bytes(3), True), "payload_bytes is 3, allowed: 0 to 2"),
        ((4, [], bytes(3), False), "scales is 0, allowed: 1 to 255"),
        ((4, [1] * 256, bytes(3), False), "scales is 256, allowed: 1 to 255"),
        ((4, [1, 0], bytes(3), False), "scale is 0, allowed: "),
        ((4, [-1], bytes(3), False), "scale is -1, allowed: "),
        ((4, [float("nan")], bytes(3), False), "scale is nan, allowed: "),
        ((4, [float("inf")], bytes(3), False), "scale is inf, allowed: "),
        ((4, [1e-46], bytes(3), False), "scale is 1e-46, allowed: "),
        ((4, [1e39], bytes(3), False), "scale is 1e\\+39, allowed: "),
    ],
)
def test_writer_refuses_and_goes_on(row, message):
    sink = Sink()
    write_header(sink, WITH_LM)
    writer = SegmentWriter(sink, WITH_LM)
    writer.write(4, [0.5], b"\xaa\xbb\xcc", False)
    with pytest.raises(EcdcError, match=message):
        writer.write(*row)
    writer.write(3, [1, 2], b"\xdd", True)
    writer.close(14)
    assert sink.data == GOLDEN


def test_writer_refuses_what_the_header_rules_out():
    writer = SegmentWriter(Sink(), replace(SMALL, audio_length=9))
    with pytest.raises(EcdcError, match="kind is 1, allowed: 0 to 0"):
        writer.write(4, [], b"", True)
    with pytest.raises(EcdcError, match="scales is 1, allowed: 0 to 0"):
        writer.write(4, [1], bytes(3), False)
    writer.write(4, [], bytes(3), False)
    with pytest.raises(EcdcError, match="9 samples in 1 segments, allowed: 2"):
        writer.close(9)
    writer.write(1, [], bytes(1), False)
    with pytest.raises(EcdcError, match="index is 2, allowed: 0 to 1"):
        writer.write(4, [], bytes(3), False)
    for length in (-1, 9.0, 10):
        with pytest.raises(EcdcError, match=f"{length}.*allowed: "):
            writer.close(length)
    writer.close(9)
    for more in (lambda: writer.close(9), lambda: writer.write(1, [], bytes(1), False)):
        with pytest.raises(EcdcError, match="after close"):
            more()


def test_a_pipe_gives_each_segment_with_its_last_byte():
    data = small_file(0)
    edges = list(itertools.accumulate(map(len, parts_of(data))))
    pipe = Trickle(data)
    header = read_header(pipe)
    assert pipe.given == edges[0]
    given = [(pipe.given, type(item)) for item in read_segments(pipe, header)]
    assert given == [*((edge, Segment) for edge in edges[1:-1]), (edges[-1], End)]


def test_a_pipe_gives_the_next_segment_with_its_last_byte_after_damage():
    header, *parts = parts_of(small_file(0))
    parts[1] = parts[1][:-1] + bytes([parts[1][-1] ^ 1])
    parts[3] = b"\xec" * 5 + b"\xec\x5e\xec" + parts[3]
    edges = list(itertools.accumulate(map(len, [header, *parts])))
    pipe = Trickle(b"".join([header, *parts]))
    given = [(item.index, pipe.given) for item in read_segments(pipe, read_header(pipe)) if isinstance(item, Segment)]
    assert given == [(index, edges[index + 1]) for index in (0, 2, 3, 4, 5)]


@pytest.mark.parametrize("garbage", [b"\xec", b"\x5e", b"\xec\x5e", b"-"])
def test_nothing_is_lost_or_read_too_early_behind_garbage(garbage):
    """Garbage of any length: the sync behind it may be split between two reads."""
    parts = parts_of(small_file(0))
    for length in range(1, 30):
        parts[3] = garbage * length + parts_of(small_file(0))[3]
        edges = list(itertools.accumulate(map(len, parts)))
        file = io.BytesIO(b"".join(parts))
        given = [(item, file.tell()) for item in read_segments(file, read_header(file))]
        (damage, _) = given.pop(2)
        assert (damage.first, damage.last, damage.start) == (2, 1, 16)
        assert [item for item, _ in given[:-1]] == segments_of(small_file(0))
        assert [place for _, place in given] == edges[1:]


def test_damaged_size_costs_at_most_one_segment_of_waiting():
    """A size that grew, but is possible, is waited for; the segments inside it are found again, none is lost."""
    header = replace(WITH_LM, frames_per_segment=4000, samples_per_segment=8)
    rows = [(4000, [1.0], bytes([index]) * 100, True) for index in range(40)]
    data = bytearray(write_file(header, rows, 320))
    position = seek_segment(io.BytesIO(data), header, 2)
    data[position + 9 : position + 12] = (2999).to_bytes(3)
    pipe = Trickle(bytes(data))
    items = []
    for item in read_segments(pipe, read_header(pipe)):
        items.append(item)
        if isinstance(item, Damage):
            assert item == Damage(2, 2, 16, 24, "checksum does not fit")
            assert pipe.given == position + 12 + 4 + 2999 + 4
    assert len(items) == 41 and sum(isinstance(item, Segment) for item in items) == 39


@pytest.mark.parametrize("length", [None, 45])
def test_every_truncation_is_noticed(length):
    data = small_file(0, replace(WITH_LM, audio_length=length))
    edges = list(itertools.accumulate(map(len, parts_of(data))))
    originals = segments_of(data)
    for size in range(len(data)):
        if size < edges[0]:
            with pytest.raises(EcdcError, match="file ends inside the header"):
                read_file(data[:size])
            continue
        header, items = read_file(data[:size])
        whole = sum(size >= edge for edge in edges[1:-1])
        assert items[:-1] == originals[:whole]
        damage = items[-1]
        assert (damage.first, damage.start) == (whole, min(8 * whole, length or 48))
        assert (damage.last, damage.end) == ((None, None) if length is None else (5, 45))
        assert damage.reason.endswith("the file has no end")


@pytest.mark.parametrize("header", [SMALL, WITH_LM, replace(WITH_LM, audio_length=45)])
def test_every_flipped_bit_is_noticed(header):
    data = small_file(1, header)
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        assert check_read(bytes(damaged), {0xCAFE: [data]}) == (
            "refused" if bit // 8 < len(parts_of(data)[0]) else "damaged"
        )


def mutate(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One random damage; lengths and places keep near the edges of segments every other time."""

    def place(data: bytes) -> int:
        edges = [found for found in range(len(data)) if data.startswith(b"\xec\x5e", found)]
        return rng.choice(edges) if edges and rng.random() < 0.5 else rng.randint(0, len(data))

    start, stop = sorted((place(data), place(data)))
    kind = rng.randrange(8)
    if kind == 0 and data:
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 6)):
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(damaged)
    if kind == 1:
        return data[:start]
    if kind == 2:
        return data[:start] + data[stop:]
    if kind == 3:  # twice
        return data[:stop] + data[start:]
    if kind == 4:  # swapped
        middle = place(data[:stop]) if stop else 0
        start, middle = sorted((start, middle))
        return data[:start] + data[middle:stop] + data[start:middle] + data[stop:]
    if kind == 5:
        return data[:start] + other[place(other) :]
    if kind == 6:  # the same place of another file
        return data[:start] + other[start:stop] + data[stop:]
    garbage = rng.choice([rng.randbytes(rng.randint(1, 40)), bytes(20), b"\xec\x5e" * 9, data[:60]])
    return data[:start] + garbage + data[start:]


@pytest.mark.parametrize("same_id", [False, True])
def test_random_damage_is_noticed(same_id):
    """Where another file has the same id and something is lost too, foreign segments can pass, but never silently."""
    rng = random.Random(same_id)
    results = dict.fromkeys(("whole", "refused", "damaged"), 0)
    for round in range(25):
        header = rng.choice([SMALL, WITH_LM])
        header = replace(header, audio_length=rng.choice([None, 45]))
        data = small_file(2 * round, header)
        other = small_file(2 * round + 1, header if same_id else replace(header, file_id=0xBEEF))
        originals = {0xCAFE: [data, other] if same_id else [data], 0xBEEF: [other]}
        size = len(parts_of(data)[0])
        for _ in range(480):
            spared = rng.choice([0, *[size] * 4])  # most headers, or most files would be refused
            damaged = data[spared:]
            for _ in range(rng.randint(1, 3)):
                damaged = mutate(rng, damaged, other[spared:])
            results[check_read(data[:spared] + damaged, originals, trusted=not same_id)] += 1
    assert sum(results.values()) == 12000 and results["damaged"] > 8000 and min(results.values()) > 10


def items_of(*parts: bytes) -> list:
    return read_file(b"".join(parts))[1]


def test_segments_swapped_repeated_lost_and_surplus():
    header, *parts, end = parts_of(small_file(3))
    zero, one, two, three, four, five = segments_of(small_file(3))
    last = read_file(small_file(3))[1][-1]
    assert items_of(header, parts[0], parts[2], parts[1], *parts[3:], end) == [
        zero,
        Damage(1, 1, 8, 16, "segment 2 comes too early"),
        two,
        Damage(3, 2, 24, 24, "segment 1 comes again or too late"),
        *(three, four, five, last),
    ]
    assert items_of(header, *parts[:3], parts[2], *parts[3:], end) == [
        *(zero, one, two),
        Damage(3, 2, 24, 24, "segment 2 comes again or too late"),
        *(three, four, five, last),
    ]
    assert items_of(header, *parts[:2], *parts[5:], end) == [
        *(zero, one),
        Damage(2, 4, 16, 40, "segment 5 comes too early"),
        *(five, last),
    ]
    assert items_of(header, *parts[:4], end) == [
        *(zero, one, two, three),
        Damage(4, 5, 32, 45, "the end comes too early"),
        last,
    ]
    assert items_of(header, *parts[:2], b"garbage", *parts[2:], end, b"!") == [
        *(zero, one),
        Damage(2, 1, 16, 16, "bytes that are no segment"),
        *(two, three, four, five, last),
        Damage(6, 5, 45, 45, "bytes follow the end"),
    ]
    surplus = forged(0xCAFE, 0, 6, 4, bytes(3), (1.0,))
    assert items_of(header, *parts, surplus, end)[-1] == Damage(
        0, None, 0, None, "7 segments, allowed: 6 as the end says"
    )


def test_splice_of_files_that_agree_in_everything_but_content():
    first, second = small_file(4, SMALL), small_file(5, SMALL)
    assert parts_of(first)[0] == parts_of(second)[0]
    spliced = parts_of(first)[:3] + parts_of(second)[3:]
    items = items_of(*spliced)
    assert [item.index for item in items[:-1]] == [0, 1, 2, 3, 4, 5]
    assert (items[-1].first, items[-1].last, items[-1].start, items[-1].end) == (0, None, 0, None)
    assert "nothing can be trusted" in items[-1].describe(8)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (forged(0xCAFE, 2, 1, 0, struct.pack("!QI", 8, 1)), "not those that the end was written for"),
        (forged(0xCAFE, 2, 2, 0, struct.pack("!QI", 8, 1)), "8 samples in 2 segments, allowed: 1"),
        (forged(0xCAFE, 2, 1, 0, struct.pack("!QI", 7, 1)), "the end says 7 samples, allowed: 8"),
    ],
)
def test_end_that_does_not_fit(end, message):
    header, segment, _ = parts_of(write_file(replace(SMALL, audio_length=8), [(4, [], bytes(3), False)], 8))
    found, damage = items_of(header, segment, end)
    assert (damage.first, damage.last) == (0, None) and message in damage.reason


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (forged(0xBEEF, 0, 0, 4, bytes(3), (1.0,)), "checksum does not fit"),
        (forged(0xCAFE, 3, 0, 4, bytes(3), (1.0,)), "kind is 3, allowed: 0 to 1"),
        (forged(0xCAFE, 0, 1, 4, bytes(3), (1.0,)), "index is 1, allowed: 0 to 0"),
        (forged(0xCAFE, 0, 0, 5, bytes(4), (1.0,)), "frames is 5, allowed: 1 to 4"),
        (forged(0xCAFE, 0, 0, 4, bytes(4), (1.0,)), "payload_bytes is 4, allowed: 3 to 3"),
        (forged(0xCAFE, 1, 0, 4, bytes(3), (1.0,)), "payload_bytes is 3, allowed: 0 to 2"),
        (forged(0xCAFE, 0, 0, 4, bytes(3)), "scales is 0, allowed: 1 to 255"),
        (forged(0xCAFE, 0, 0, 4, bytes(3), (0.0,)), "scale is 0.0, allowed: "),
        (forged(0xCAFE, 0, 0, 4, bytes(3), (float("nan"),)), "scale is nan, allowed: "),
        (forged(0xCAFE, 2, 1, 0, bytes(11)), "payload_bytes is 11, allowed: 12 to 12"),
        (forged(0xCAFE, 2, 1, 1, bytes(12)), "frames is 1, allowed: 0 to 0"),
    ],
)
def test_segment_that_passes_but_is_impossible(segment, message):
    file = io.BytesIO()
    write_header(file, replace(WITH_LM, audio_length=8))
    (damage,) = items_of(file.getvalue(), segment)
    assert (damage.first, damage.last, damage.start, damage.end) == (0, 0, 0, 8)
    assert message in damage.reason


def test_damage_in_words():
    assert Damage(3, 4, 30, 50, "why").describe(1) == "segments 3 to 4 (30.00 s to 50.00 s): why"
    assert Damage(3, 3, 30, 40, "why").describe(10) == "segment 3 (3.00 s to 4.00 s): why"
    assert Damage(3, None, 30, None, "why").describe(1) == "segments from 3 on (30.00 s to the end): why"
    assert Damage(3, 2, 30, 30, "why").describe(1) == "after 3 segments (at 30.00 s): why"


@pytest.mark.parametrize("spacing", [12, 2])
def test_false_segments_everywhere_take_seconds(spacing, monkeypatch):
    """1 MB in which every 12 bytes begin a segment of up to 500 kB: 20 GB of checksums if each were looked at."""
    header, *parts = parts_of(write_file(LARGE, [(9, (), bytes(60), True)] * 8, 64))
    false = b"".join(
        struct.pack("!2sBB3sH3s", b"\xec\x5e", 1, 0, bytes(3), 32896, (500_000 - index).to_bytes(3))
        for index in range(90_000)
    )
    if spacing == 2:
        false = b"\xec\x5e" * 540_000
    checked = []
    crc32 = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data, start=0: checked.append(len(data)) or crc32(data, start))
    start = time.process_time()
    items = items_of(header, parts[0], false, *parts[1:])
    assert time.process_time() - start < 20
    assert sum(checked) < 400e6
    # The first segment after them may be taken for one more false one, its neighbours not.
    assert [item.index for item in items if isinstance(item, Segment)][-6:] == [2, 3, 4, 5, 6, 7]
    assert isinstance(items[-1], End)


def peak_memory(file, header: Header) -> tuple[list, int]:
    tracemalloc.start()
    try:
        return list(read_segments(file, header)), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_declared_size_costs_no_memory():
    head = struct.pack("!2sBB3sH3s", b"\xec\x5e", 1, 0, bytes(3), 32896, (2**24 - 300).to_bytes(3))
    (damage,), peak = peak_memory(io.BytesIO(head + bytes(1000)), LARGE)
    assert damage.reason == "the file ends inside a segment, and the file has no end"
    assert peak < 200_000


def test_long_damage_costs_no_memory():
    class Zeros(io.RawIOBase):
        left = 2**20

        def read(self, size: int = -1) -> bytes:
            size = min(size, self.left, 2**16)
            self.left -= size
            return bytes(size)

    (damage,), peak = peak_memory(Zeros(), WITH_LM)
    assert damage.reason == "bytes that are no segment, and the file has no end"
    assert peak < 200_000


class Counting(io.BytesIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


@pytest.mark.parametrize("length", [None, 45])
def test_seek_finds_every_segment(length):
    data = small_file(6, replace(WITH_LM, audio_length=length))
    header, items = read_file(data)
    positions = list(itertools.accumulate(map(len, parts_of(data)[:-2])))
    file = Counting(data)
    for index in (3, 0, 5, 1, 2, 4):
        file.count = 0
        assert seek_segment(file, header, index) == positions[index] == file.tell()
        assert file.count == 12 * (index + 1)
        assert list(read_segments(file, header, first=index)) == items[index:]
    for index in (-1, 6, 7, 2**24):
        with pytest.raises(EcdcError, match=f"segment (is )?{index}.*, allowed: "):
            seek_segment(file, header, index)


def test_seek_where_a_segment_is_lost():
    parts = parts_of(small_file(6))
    del parts[3]
    file = io.BytesIO(b"".join(parts))
    header = read_header(file)
    for index, part in ((0, 1), (1, 2), (3, 3), (5, 5)):
        assert seek_segment(file, header, index) == sum(map(len, parts[:part]))
    with pytest.raises(EcdcError, match="segment 2 is not in the file"):
        seek_segment(file, header, 2)


def test_seek_past_every_flipped_bit():
    data = small_file(7, count=4)
    header, items = read_file(data)
    edges = list(itertools.accumulate(map(len, parts_of(data))))
    for bit in range(8 * edges[0], 8 * edges[-2]):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        hit = sum(edge <= bit // 8 for edge in edges) - 1
        for index in range(4):
            try:
                position = seek_segment(io.BytesIO(damaged), header, index)
            except EcdcError:
                assert index == hit
                continue
            assert position == edges[index]
            file = io.BytesIO(damaged[position:])
            assert (next(read_segments(file, header, first=index)) == items[index]) == (index != hit)


def test_reading_from_a_segment_on_notices_damage():
    data = small_file(8)
    file = io.BytesIO(data[:-1])
    header = read_header(file)
    position = seek_segment(file, header, 4)
    *segments, damage = read_segments(file, header, first=4)
    assert [item.index for item in segments] == [4, 5] and damage.first == 6
    file.seek(position)
    assert next(read_segments(file, header, first=2)) == Damage(2, 3, 16, 32, "segment 4 comes too early")
