"""The container: what was written comes back, in order, from a pipe or from a segment on."""

import io
import itertools
import random
import struct
import zlib
from dataclasses import replace

import pytest
from container_files import LARGE, SMALL, WITH_LM, parts_of, read_file, segments_of, small_file, write_file
from hypothesis import given, settings
from hypothesis import strategies as st
from pipe_ends import Sink, Trickle

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
from modeling_encodec.bitstream.errors import EcdcError


GOLDEN = bytes.fromhex(
    "45434443 01 03 0123456789abcdef fedcba9876543210 00000008 01 02 0007 0002 0004 00000008"  # the header's fields
    "0000000000000000 0000cafe 01 6d 01 6c 073b490c"
    "ec5e 00 01 000000 0004 000003 3f000000 aabbcc b987881e"  # raw
    "ec5e 01 02 000001 0003 000001 3f800000 40000000 dd 10199d70"  # with the LM
    "ec5e 02 00 000002 0000 00000c 000000000000000e 1b1d33c4 faa14a10"
)


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
        raw, least = header.raw_size(frames), -(-frames // 8)
        coded = coded and raw > least
        size = data.draw(st.integers(least, raw - 1)) if coded else raw
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
        (5, b"\x02", "header's flags are 2, .*, allowed: "),  # an LM without its flag
        (5, b"\x07", "header's flags are 7, .*, allowed: "),
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
        ((4, [1], bytes(3), True), "payload_bytes is 3, allowed: 1 to 2"),
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
    pipe = Trickle(data, step=1)
    header = read_header(pipe)
    assert pipe.given == edges[0]
    given = [(pipe.given, type(item)) for item in read_segments(pipe, header)]
    assert given == [*((edge, Segment) for edge in edges[1:-1]), (edges[-1], End)]


def test_a_pipe_gives_the_next_segment_with_its_last_byte_after_damage():
    header, *parts = parts_of(small_file(0))
    parts[1] = parts[1][:-1] + bytes([parts[1][-1] ^ 1])
    parts[3] = b"\xec" * 5 + b"\xec\x5e\xec" + parts[3]
    edges = list(itertools.accumulate(map(len, [header, *parts])))
    pipe = Trickle(b"".join([header, *parts]), step=1)
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
    rows = [(4000, [1.0], bytes([index]) * 500, True) for index in range(40)]
    data = bytearray(write_file(header, rows, 320))
    position = seek_segment(io.BytesIO(data), header, 2)
    data[position + 9 : position + 12] = (2999).to_bytes(3)
    pipe = Trickle(bytes(data), step=1)
    items = []
    for item in read_segments(pipe, read_header(pipe)):
        items.append(item)
        if isinstance(item, Damage):
            assert item == Damage(2, 2, 16, 24, "checksum does not fit")
            assert pipe.given == position + 12 + 4 + 2999 + 4
    assert len(items) == 41 and sum(isinstance(item, Segment) for item in items) == 39


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
