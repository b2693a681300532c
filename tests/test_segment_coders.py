"""A segment's codes to bytes: packed, or by a range coder whose intervals are the language model's frequencies.

`by_the_formulas` decodes without constriction: files hang on these few lines alone.
"""

import copy
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_models import TOTAL, Table, make_codes, make_integer_lm, spread

from modeling_encodec.bitstream import segment_coders
from modeling_encodec.bitstream.segment_coders import MOST_ROWS, LMCoder, RawCoder
from modeling_encodec.models.integer_lm_encodec import BLOCK_FRAMES
from modeling_encodec.models.modeling_lm_encodec import EncodecLM


def by_the_formulas(payload: bytes, lm, books: int, frames: int) -> np.ndarray:
    """Codes (K, F) in Python's whole numbers: 64 bits of state, 32-bit words, probabilities in 24 bits."""
    payload = payload[:-4]  # without the checksum of the codes
    words = iter([int.from_bytes(payload[at : at + 4], "little") for at in range(0, len(payload), 4)])
    lower, size, point = 0, 2**64 - 1, (next(words, 0) << 32) | next(words, 0)
    codes, previous, cache = np.zeros((books, frames), dtype=np.int64), torch.full((1, books, 1), -1), None
    for frame in range(frames):
        frequencies, cache = lm.frequencies(previous, cache)
        for book, row in enumerate(frequencies[0, :, 0].tolist()):
            scale = size >> 24
            quantile, left, code = (point - lower) % 2**64 // scale, 0, 0
            while quantile >= left + row[code]:
                left, code = left + row[code], code + 1
            codes[book, frame] = code
            lower, size = (lower + scale * left) % 2**64, scale * row[code]
            if size < 2**32:
                lower, size = (lower << 32) % 2**64, size << 32
                point = (point << 32) % 2**64 | next(words, 0)
        previous = torch.from_numpy(codes[None, :, frame : frame + 1])
    return codes


def bits_of(codes: np.ndarray, lm) -> float:
    """What the codes cost by the frequencies alone."""
    given = torch.from_numpy(codes)[None]
    previous = torch.cat([torch.full_like(given[:, :, :1], -1), given[:, :, :-1]], 2)
    share = lm.frequencies(previous)[0].gather(3, given[..., None]).double() / TOTAL
    return -share.log2().sum().item()


@pytest.fixture(scope="module")
def lm() -> EncodecLM:
    return make_integer_lm()


@st.composite
def tables(draw) -> Table:
    size = draw(st.integers(2, 20))
    weights = st.lists(
        st.sampled_from([0, 0, 1, 5, 1000, 10**6]) | st.integers(0, 10**9), min_size=size, max_size=size
    )
    return Table([spread(row) for row in draw(st.lists(weights, min_size=1, max_size=5))])


def random_codes(seed: int, size: int, books: int, frames: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, size, (books, frames))


# ---- there and back ----------------------------------------------------------------------------------------------


@given(st.integers(1, 16), st.integers(1, 32), st.integers(1, 60), st.integers(0, 10**6))
@settings(deadline=None)
def test_packed_codes_come_back(bits, books, frames, seed):
    codes = random_codes(seed, 2**bits, books, frames)
    payload = RawCoder(bits).encode(codes)
    assert len(payload) == -(-books * frames * bits // 8)
    assert np.array_equal(RawCoder(bits).decode(payload, books, frames), codes)


def test_codes_are_packed_frame_by_frame():
    # 1, 2 in the first frame, 3, 0 in the second: of 2 bits, the first lowest.
    assert RawCoder(2).encode(np.array([[1, 3], [2, 0]])) == bytes([0b00_11_10_01])


@given(tables(), st.integers(1, 32), st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_any_codes_come_back_by_any_frequencies(table, books, lengths, seed):
    segments = [random_codes(seed + n, table.distributions.shape[1], books, f) for n, f in enumerate(lengths)]
    coder = LMCoder(table)
    payloads = [coder.encode(codes) for codes in segments]
    for codes, payload in zip(segments, payloads):
        assert 8 * len(payload) <= max(bits_of(codes, table) + 64, codes.shape[1] + 31) + 32
        assert np.array_equal(by_the_formulas(payload, table, *codes.shape), codes)
    together = coder.decode(payloads, books, lengths)
    assert len(together) == len(segments)
    assert all(np.array_equal(found, codes) for found, codes in zip(together, segments))


@pytest.mark.parametrize("frames", [1, 2, BLOCK_FRAMES - 1, BLOCK_FRAMES, BLOCK_FRAMES + 1, 2 * BLOCK_FRAMES + 5])
@pytest.mark.parametrize("books", [1, 4])
def test_a_real_language_model(lm, books, frames):
    """Coded in blocks of frames, decoded a frame at a time."""
    codes = random_codes(frames, 16, books, frames)
    payload = LMCoder(lm).encode(codes)
    (found,) = LMCoder(lm).decode([payload], books, [frames])
    assert found.dtype == np.int64 and np.array_equal(found, codes)
    assert np.array_equal(by_the_formulas(payload, lm, books, frames), codes)
    assert bits_of(codes, lm) + 32 <= 8 * len(payload) <= bits_of(codes, lm) + 96


def test_thirty_two_codebooks_of_many_entries():
    wide = make_integer_lm(num_codebooks=32, codebook_size=1024)
    codes = random_codes(0, 1024, 32, 6)
    payload = LMCoder(wide).encode(codes)
    assert np.array_equal(LMCoder(wide).decode([payload], 32, [6])[0], codes)
    assert np.array_equal(by_the_formulas(payload, wide, 32, 6), codes)


def test_many_segments_together_are_as_each_alone(lm):
    lengths = [1 + (7 * n) % 30 for n in range(2 * MOST_ROWS + 3)]
    segments = [random_codes(n, 16, 3, frames) for n, frames in enumerate(lengths)]
    payloads = [LMCoder(lm).encode(codes) for codes in segments]
    together = LMCoder(lm).decode(payloads, 3, lengths)
    alone = [LMCoder(lm).decode([payload], 3, [frames])[0] for payload, frames in zip(payloads, lengths)]
    for codes, found, single in zip(segments, together, alone, strict=True):
        assert np.array_equal(found, codes) and np.array_equal(single, codes)


def test_the_block_size_is_not_in_the_bytes(lm, monkeypatch):
    codes = random_codes(5, 16, 4, 150)
    payload = LMCoder(lm).encode(codes)
    for size in (1, 7, 1000):
        monkeypatch.setattr(segment_coders, "BLOCK_FRAMES", size)
        assert LMCoder(lm).encode(codes) == payload


def test_codes_of_any_memory_layout(lm):
    codes = random_codes(6, 16, 4, 20)
    for same in (np.asfortranarray(codes), codes.astype(np.int32), codes.astype(np.uint8), codes[::-1][::-1]):
        assert LMCoder(lm).encode(same) == LMCoder(lm).encode(codes)
        assert RawCoder(4).encode(same) == RawCoder(4).encode(codes)


# ---- distributions that break careless coders --------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 1000, 1024, 65536])
def test_certain_codes_cost_nothing_and_unlikely_ones_24_bits(size):
    places, frames = (0, size // 2, size - 1), 40 if size <= 1024 else 6
    for likely in places:
        table = Table([[1 + (TOTAL - size) * (code == likely) for code in range(size)]])
        expected = np.full((2, frames), likely)
        payload = LMCoder(table).encode(expected)
        assert len(payload) <= 12  # at least a bit a frame
        assert np.array_equal(LMCoder(table).decode([payload], 2, [frames])[0], expected)
        for rare in {(likely + 1) % size, (likely - 1) % size, *places} - {likely}:  # all of frequency 1
            codes = np.full((2, frames), rare)
            payload = LMCoder(table).encode(codes)
            assert abs(len(payload) - 2 * frames * 3 - 4) <= 8
            assert np.array_equal(LMCoder(table).decode([payload], 2, [frames])[0], codes)
            if size <= 1024:
                assert np.array_equal(by_the_formulas(payload, table, 2, frames), codes)


@pytest.mark.parametrize("size", [2, 16, 1024])
def test_uniform_codes_cost_their_bits(size):
    table, codes = Table([[TOTAL // size] * size]), random_codes(0, size, 4, 64)
    payload = LMCoder(table).encode(codes)
    assert abs(len(payload) - 4 - len(RawCoder((size - 1).bit_length()).encode(codes))) <= 8
    assert np.array_equal(by_the_formulas(payload, table, 4, 64), codes)


def test_carries_travel_through_many_words():
    """Codes at the top of their intervals keep the coder from knowing its first word; then one decides."""
    table = Table([[1, TOTAL - 2, 1], [TOTAL // 2, TOTAL // 4, TOTAL // 4]])
    for last in (0, 1, 2):
        for seed in range(12):
            codes = random_codes(seed, 3, 1, 200)
            codes[:, : 2 + seed] = 2
            codes[:, -1] = last
            payload = LMCoder(table).encode(codes)
            assert np.array_equal(LMCoder(table).decode([payload], 1, [200])[0], codes)
            assert np.array_equal(by_the_formulas(payload, table, 1, 200), codes)


def test_the_coder_gets_whole_numbers(lm):
    codes = make_codes(lm, frames=20)
    shares = np.asarray(lm.integer.shares(codes)[0])
    assert shares.dtype == np.float64 and (shares == np.floor(shares)).all() and (shares >= 0).all()
    assert (shares.sum(-1) == TOTAL - 16).all()
    assert np.array_equal(shares.transpose(0, 2, 1, 3) + 1, lm.frequencies(codes)[0].numpy())


# ---- bytes -------------------------------------------------------------------------------------------------------


def test_bytes_by_hand():
    """Words are little-endian. Code 3 of 4 equally likely ones begins at three quarters of 2**64: 0xc0000000."""
    table = Table([[TOTAL // 4] * 4])
    golden = {
        (3,): "000000c0",
        (0, 0): "00000000",
        (3, 0, 2, 1) * 8: "c9c9c9c9 565797c3 0000c08d",
    }
    for codes, text in golden.items():
        array = np.array([codes])
        payload = bytes.fromhex(text) + zlib.crc32(array.astype("<u4").tobytes()).to_bytes(4)
        assert LMCoder(table).encode(array) == payload
        assert np.array_equal(by_the_formulas(payload, table, *array.shape), array)
        assert np.array_equal(LMCoder(table).decode([payload], *array.shape[:1], [len(codes)])[0], array)


def test_frames_have_a_bit_at_least():
    table = Table([[TOTAL - 1, 1]])
    assert LMCoder(table).encode(np.zeros((3, 1000), dtype=np.int64))[:-4] == bytes(4 * 32)


@pytest.mark.parametrize("payload", [b"", b"1", b"12345", b"\xff" * 8, b"\xff" * 12])
def test_bytes_that_no_codes_have(payload):
    table, codes = Table([[TOTAL // 4] * 4]), random_codes(0, 4, 2, 9)
    assert LMCoder(table).decode([payload], 2, [9]) == [None]
    good, bad = LMCoder(table).decode([LMCoder(table).encode(codes), payload], 2, [9, 9])
    assert np.array_equal(good, codes) and bad is None


def test_random_bytes_are_noticed(lm):
    rng = np.random.default_rng(0)
    for _ in range(100):
        assert LMCoder(lm).decode([rng.bytes(int(rng.integers(0, 48)))], 4, [10]) == [None]


def test_other_probabilities_are_noticed(lm):
    """Should a machine compute wrongly, its codes are not given out."""
    codes = random_codes(0, 16, 4, 40)
    payload, other = LMCoder(lm).encode(codes), copy.deepcopy(lm)
    other.integer.head.bias[5] += 1 << 12
    assert LMCoder(other).decode([payload], 4, [40]) == [None]
