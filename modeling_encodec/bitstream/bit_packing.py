"""Whole numbers of any width, packed least significant bit first, as arrays."""

import numpy as np


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` numbers of `bits` bits take."""
    return -(-count * bits // 8)


def pack(values: np.ndarray, bits: int) -> bytes:
    """`values` (N,), each below 2**bits, as bytes; the last byte is filled up with zero bits."""
    digits = (np.asarray(values, dtype=np.int64)[:, None] >> np.arange(bits)) & 1
    return np.packbits(digits.astype(np.uint8), bitorder="little").tobytes()


def unpack(data: bytes, count: int, bits: int) -> np.ndarray:
    """The first `count` numbers of `bits` bits in `data`, as (count,) int64."""
    digits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count * bits, bitorder="little")
    return digits.reshape(count, bits) @ (1 << np.arange(bits, dtype=np.int64))
