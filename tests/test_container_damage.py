"""The container: whatever was done to a file is noticed."""

import io
import itertools
import random
import struct
import time
import tracemalloc
import zlib
from dataclasses import replace

import pytest
from container_files import (
    LARGE,
    SMALL,
    WITH_LM,
    forged,
    items_of,
    parts_of,
    read_file,
    segments_of,
    small_file,
    write_file,
)

from modeling_encodec.bitstream.container import (
    Damage,
    End,
    Header,
    Segment,
    read_segments,
    write_header,
)
from modeling_encodec.bitstream.errors import EcdcError


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
        (forged(0xCAFE, 1, 0, 4, bytes(3), (1.0,)), "payload_bytes is 3, allowed: 1 to 2"),
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
