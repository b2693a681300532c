"""A segment's codes to bytes and back: packed (`RawCoder`) or by a language model and a range coder (`LMCoder`).

A language model's payload ends with a checksum of the codes themselves: whatever may go wrong between its two ends,
wrong codes are not given out for right ones. It has at least a bit a frame, so that few bytes never keep a reader busy
for long; words of zero, which a range coder finds behind its end anyway, fill up what has less.

The range coder is constriction's queue coder: 32-bit words, a 64-bit state, probabilities in 24 bits. It takes floats,
but gets whole numbers that sum to 2**24 - V for V entries, to each of which it adds 1: so its intervals are exactly
`EncodecLM.frequencies`, and no rounding is left to it (`tests/test_segment_coders.py` decodes by the formulas alone).
"""

import math
import struct
import zlib
from collections.abc import Sequence

import constriction
import numpy as np
import torch

from modeling_encodec.bitstream.bit_packing import pack, unpack
from modeling_encodec.models.integer_lm_encodec import BLOCK_FRAMES
from modeling_encodec.models.modeling_lm_encodec import NO_CODE, EncodecLM


# Segments that are decoded together, step by step.
MOST_ROWS = 16
FAMILY = constriction.stream.model.Categorical(perfect=False)


class RawCoder:
    """Codes of `bits` bits each, frame by frame and in each frame codebook by codebook."""

    def __init__(self, bits: int):
        self.bits = bits

    def encode(self, codes: np.ndarray) -> bytes:
        """Bytes of codes (K, F)."""
        return pack(codes.T.reshape(-1), self.bits)

    def decode(self, payload: bytes, codebooks: int, frames: int) -> np.ndarray:
        """Codes (K, F) int64."""
        return unpack(payload, codebooks * frames, self.bits).reshape(frames, codebooks).T


class LMCoder:
    """Codes by their probabilities given the frames before them in the segment.

    These are computed on the CPU, wherever the language model is: the range coder is there, and a frame of a few rows
    is too little work for a GPU.
    """

    # Bytes of the checksum at a payload's end.
    checksum = struct.Struct("!I")

    def __init__(self, lm: EncodecLM):
        self.integer = lm.integer

    def encode(self, codes: np.ndarray) -> bytes:
        """Bytes of codes (K, F). All frames are known: the language model sees many at a time."""
        codes = codes.astype(np.int64)
        previous = np.concatenate([np.full_like(codes[:, :1], NO_CODE), codes[:, :-1]], axis=1)
        previous = torch.from_numpy(np.ascontiguousarray(previous, dtype=np.int64))[None]
        coder, cache = constriction.stream.queue.RangeEncoder(), None
        for start in range(0, codes.shape[1], BLOCK_FRAMES):
            block = slice(start, start + BLOCK_FRAMES)
            shares, cache = self.integer.shares(previous[:, :, block], cache, device="cpu")
            symbols = np.ascontiguousarray(codes[:, block].T.reshape(-1), dtype=np.int32)
            coder.encode(symbols, FAMILY, shares[0].reshape(len(symbols), -1))
        words = coder.get_compressed().astype("<u4").tobytes()
        words = words.ljust(4 * math.ceil(codes.shape[1] / 32), b"\0")
        return words + self.checksum.pack(_digest(codes))

    def decode(self, payloads: Sequence[bytes], codebooks: int, frames: Sequence[int]) -> list[np.ndarray | None]:
        """Codes (K, F) int64 of several segments, of so many frames each; None where they are not those that were
        encoded. They take their steps together."""
        decoded = []
        for first in range(0, len(payloads), MOST_ROWS):
            rows = slice(first, first + MOST_ROWS)
            decoded += self._decode_rows(payloads[rows], codebooks, frames[rows])
        return decoded

    def _decode_rows(
        self, payloads: Sequence[bytes], codebooks: int, frames: Sequence[int]
    ) -> list[np.ndarray | None]:
        size = self.checksum.size
        words = [payload[:-size].ljust(-(-len(payload[:-size]) // 4) * 4, b"\0") for payload in payloads]
        coders = [constriction.stream.queue.RangeDecoder(np.frombuffer(w, "<u4").astype(np.uint32)) for w in words]
        codes = np.zeros((len(coders), codebooks, max(frames)), dtype=np.int64)
        shape, cache = (len(coders), codebooks, 1), None
        previous = torch.full(shape, NO_CODE, dtype=torch.int64, device="cpu")
        failed = set()
        for frame in range(max(frames)):
            if len(failed) == len(coders):
                break
            shares, cache = self.integer.shares(previous, cache, device="cpu")
            for row, coder in enumerate(coders):
                if frame < frames[row] and row not in failed:
                    try:
                        codes[row, :, frame] = coder.decode(FAMILY, shares[row, 0])
                    except (ValueError, AssertionError):  # bytes that no codes have
                        failed.add(row)
            previous = torch.from_numpy(codes[:, :, frame : frame + 1])
        found = [row[:, :count] for row, count in zip(codes, frames)]
        right = [payload[-size:] == self.checksum.pack(_digest(one)) for payload, one in zip(payloads, found)]
        return [one if good and row not in failed else None for row, (one, good) in enumerate(zip(found, right))]


def _digest(codes: np.ndarray) -> int:
    """CRC32 of codes (K, F): of 32 bits each, frame by frame."""
    return zlib.crc32(np.ascontiguousarray(codes.T).astype("<u4").tobytes())
