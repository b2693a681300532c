"""Small files of the container, and their parts."""

import io
import itertools
import random
import struct
import zlib
from dataclasses import replace
from functools import cache

from pipe_ends import Sink

from modeling_encodec.bitstream.container import (
    Header,
    Segment,
    SegmentWriter,
    read_header,
    read_segments,
    seek_segment,
    write_header,
)


# 4 frames of 2 codebooks of 3 bits: 3 bytes raw.
SMALL = Header("m", "0123456789abcdef", 8, 1, 2, 8, 2, 4, 8, 0xCAFE)
WITH_LM = replace(SMALL, lm_name="l", lm_fingerprint="fedcba9876543210", has_scales=True)
# The largest payloads that fit, 16 MB.
LARGE = replace(WITH_LM, codebooks=255, codebook_size=2**16, frames_per_segment=32896, has_scales=False)


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
        raw, least = header.raw_size(frames), -(-frames // 8)
        with_lm = header.lm_name is not None and raw > least and rng.random() < 0.5
        size = rng.randrange(least, raw) if with_lm else raw
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


def items_of(*parts: bytes) -> list:
    return read_file(b"".join(parts))[1]
