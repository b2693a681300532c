"""A segment's codes to bytes and back: packed (`RawCoder`) or by a language model and a range coder (`LMCoder`).

The range coder is constriction's queue coder: 32-bit words, a 64-bit state, probabilities in 24 bits. It takes floats,
but gets whole numbers that sum to 2**24 - V for V entries, to each of which it adds 1: so its intervals are exactly
`EncodecLM.frequencies`, and no rounding is left to it (`tests/test_segment_coders.py` decodes by the formulas alone).
"""

from collections.abc import Sequence

import constriction
import numpy as np
import torch

from modeling_encodec.bitstream.bit_packing import pack, unpack
from modeling_encodec.bitstream.ecdc import EcdcError
from modeling_encodec.integer_lm_encodec import BLOCK_FRAMES
from modeling_encodec.modeling_lm_encodec import NO_CODE, EncodecLM


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
    """Codes by their probabilities given the frames before them in the segment."""

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
            shares, cache = self.integer.shares(previous[:, :, block], cache)
            symbols = np.ascontiguousarray(codes[:, block].T.reshape(-1), dtype=np.int32)
            coder.encode(symbols, FAMILY, _array(shares[0]).reshape(len(symbols), -1))
        return coder.get_compressed().astype("<u4").tobytes()

    def decode(self, payloads: Sequence[bytes], codebooks: int, frames: Sequence[int]) -> list[np.ndarray]:
        """Codes (K, F) int64 of several segments, of so many frames each. They take their steps together.

        Raises:
            EcdcError: for a payload that no codes have.
        """
        decoded = []
        for first in range(0, len(payloads), MOST_ROWS):
            rows = slice(first, first + MOST_ROWS)
            decoded += self._decode_rows(payloads[rows], codebooks, frames[rows])
        return decoded

    def _decode_rows(self, payloads: Sequence[bytes], codebooks: int, frames: Sequence[int]) -> list[np.ndarray]:
        if any(len(payload) % 4 for payload in payloads):
            raise EcdcError(f"payloads have {[len(p) for p in payloads]} bytes, allowed: multiples of 4")
        coders = [constriction.stream.queue.RangeDecoder(np.frombuffer(p, "<u4").astype(np.uint32)) for p in payloads]
        codes = np.zeros((len(coders), codebooks, max(frames)), dtype=np.int64)
        previous, cache = torch.full((len(coders), codebooks, 1), NO_CODE), None
        for frame in range(max(frames)):
            shares, cache = self.integer.shares(previous, cache)
            shares = _array(shares[:, 0])
            for row, coder in enumerate(coders):
                if frame < frames[row]:
                    codes[row, :, frame] = _decode(coder, shares[row])
            previous = torch.from_numpy(codes[:, :, frame : frame + 1])
        return [row[:, :count] for row, count in zip(codes, frames)]


def _array(shares: np.ndarray | torch.Tensor) -> np.ndarray:
    return shares.cpu().numpy() if isinstance(shares, torch.Tensor) else shares


def _decode(coder, shares: np.ndarray) -> np.ndarray:
    try:
        return coder.decode(FAMILY, shares)
    except (ValueError, AssertionError) as error:
        raise EcdcError(f"a segment's bytes are none of the language model's: {error}") from None
