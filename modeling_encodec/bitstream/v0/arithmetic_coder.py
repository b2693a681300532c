"""The original's arithmetic coder, bit for bit: what version 0 files coded with the language model are made of.

A symbol narrows an interval [low, high] of whole numbers to the part that its share of 2**24 says. Before each symbol
both ends are doubled until the interval holds at least 2**24 numbers: that many bits more are needed to name one of
them. After each symbol the leading bits that both ends have in common are settled and written. There is no carry:
while the interval straddles a power of two bits stay pending, 62 at most. At the end all pending bits of `low` are
written, so that a decoder reads as many bits as were written, and no length need be stored.

The original multiplies shares in double precision. Intervals hold fewer than 2**25 numbers after doubling, so those
products have at most 49 bits and are exact; whole numbers give the same.
"""

from typing import BinaryIO

import numpy as np
import torch

from modeling_encodec.bitstream.bit_packing import pack
from modeling_encodec.bitstream.errors import EcdcError, read_exactly


TOTAL_BITS = 24
TOTAL = 1 << TOTAL_BITS
MOST_PENDING_BITS = 62
# Probabilities count in multiples of this, and no share is less than that.
ROUNDING = 1e-8
LEAST_SHARE = 2


def cumulative_shares(probabilities: torch.Tensor) -> np.ndarray:
    """Float32 probabilities (..., N) as running sums of whole shares of 2**24, (..., N) int64.

    Every rounding is the original's: the next float up or down may give other shares.

    Raises:
        ValueError: for probabilities that are not finite.
    """
    if not probabilities.sum().isfinite():
        raise ValueError("probabilities are not finite, allowed: numbers that sum to 1 (are the weights whole?)")
    kept = 1 - LEAST_SHARE * probabilities.shape[-1] / TOTAL
    rounded = (probabilities / ROUNDING).floor() * ROUNDING
    shares = (rounded * (kept * TOTAL)).floor().long() + LEAST_SHARE
    return shares.cumsum(-1).numpy()


class _Interval:
    """The numbers low to high, of `pending` bits each, that are still possible."""

    def __init__(self):
        self.low, self.high, self.pending = 0, 0, 0

    @property
    def missing_bits(self) -> int:
        """How often the interval must double to hold 2**24 numbers."""
        return max(0, TOTAL_BITS + 1 - (self.high - self.low + 1).bit_length())

    def double(self, times: int) -> None:
        self.low <<= times
        self.high = (self.high + 1 << times) - 1
        self.pending += times

    def part(self, start: int, stop: int) -> tuple[int, int]:
        """First and last number of the part between the running sums `start` and `stop`."""
        size = self.high - self.low + 1
        return self.low - (-start * size >> TOTAL_BITS), self.low + ((stop - 1) * size >> TOTAL_BITS)

    def settle(self) -> tuple[int, int]:
        """Drop the leading bits that both ends share; returns them as a number, and how many they are."""
        pending = (self.low ^ self.high).bit_length()
        count, settled = self.pending - pending, self.low >> pending
        self.low -= settled << pending
        self.high -= settled << pending
        self.pending = pending
        return settled, count


class ArithmeticEncoder:
    """Takes symbols with their distributions; `finish` gives the bytes."""

    def __init__(self):
        self._interval = _Interval()
        self._bits = []

    def encode(self, symbol: int, cumulative: np.ndarray) -> None:
        """Take one symbol of the distribution with these running sums (N,).

        Raises:
            ValueError: for the rare symbol that the original has no room for either: the last one of shares that are
                rounded to more than 2**24 together, or one that leaves more than 62 bits pending.
        """
        interval = self._interval
        interval.double(interval.missing_bits)
        start = int(cumulative[symbol - 1]) if symbol else 0
        interval.low, interval.high = interval.part(start, int(cumulative[symbol]))
        if not 0 <= interval.low <= interval.high < 1 << interval.pending:
            raise ValueError(f"symbol {symbol} has shares {start} to {cumulative[symbol]}, allowed: 0 to {TOTAL}")
        self._write(*interval.settle())
        if interval.pending > MOST_PENDING_BITS:
            raise ValueError(f"{interval.pending} bits are pending, allowed: up to {MOST_PENDING_BITS} in version 0")

    def finish(self) -> bytes:
        """Everything as bytes, the first bit lowest, filled up with zero bits."""
        self._write(self._interval.low, self._interval.pending)
        self._interval = _Interval()
        return pack(np.array(self._bits, dtype=np.int64), 1)

    def _write(self, number: int, count: int) -> None:
        self._bits += [number >> place & 1 for place in reversed(range(count))]


class ArithmeticDecoder:
    """Gives the symbols back, for the same distributions; reads no byte more from `file` than was written."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._interval = _Interval()
        self._number = 0  # of the interval, that the bits read so far name
        self.bits = 0  # read so far
        self._byte, self._unread = 0, 0  # bits of the last byte that were not used yet, and how many they are

    def decode(self, cumulative: np.ndarray) -> int:
        """The next symbol of the distribution with these running sums (N,).

        Raises:
            EcdcError: where the file ends, or the bits name no symbol.
        """
        interval = self._interval
        times = interval.missing_bits
        for _ in range(times):
            self._number = self._number << 1 | self._read_bit()
        interval.double(times)
        # The last symbol whose part starts at or before the number: ceil(start * size / 2**24) <= offset.
        size, offset = interval.high - interval.low + 1, self._number - interval.low
        symbol = int(np.searchsorted(cumulative, (offset << TOTAL_BITS) // size, side="right"))
        if symbol == len(cumulative):
            raise EcdcError(_OTHER_PROBABILITIES)
        start = int(cumulative[symbol - 1]) if symbol else 0
        interval.low, interval.high = interval.part(start, int(cumulative[symbol]))
        if not interval.low <= self._number <= interval.high:
            raise EcdcError(_OTHER_PROBABILITIES)
        settled, _ = interval.settle()
        self._number -= settled << interval.pending
        if interval.pending > MOST_PENDING_BITS:
            raise EcdcError(_OTHER_PROBABILITIES)
        return symbol

    def finish(self) -> None:
        """Make sure that the bits end as an encoder ends them: with the interval's first number, then zero bits.

        Raises:
            EcdcError: if not; wrong bits or other probabilities on the way are found out here, nearly always.
        """
        if self._number != self._interval.low or self._byte:
            raise EcdcError(_OTHER_PROBABILITIES)

    def _read_bit(self) -> int:
        if not self._unread:
            self._byte, self._unread = read_exactly(self._file, 1, "codes")[0], 8
        bit = self._byte & 1
        self._byte >>= 1
        self._unread -= 1
        self.bits += 1
        return bit


_OTHER_PROBABILITIES = (
    "the codes cannot be told: the file is damaged, or the language model gives other probabilities here than where "
    "it was written (other weights, or another machine)"
)
