"""Version 0 with the language model: the arithmetic coder and whole segments, byte for byte the original's."""

import importlib
import io
import itertools
import random
import struct
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_models import make_codes
from peers import RELEASED_LM, SMALL_LM, import_encodec, lm_pair

from modeling_encodec.bitstream.errors import EcdcError
from modeling_encodec.bitstream.v0 import language_model as original_lm
from modeling_encodec.bitstream.v0.arithmetic_coder import (
    TOTAL,
    ArithmeticDecoder,
    ArithmeticEncoder,
    cumulative_shares,
)
from modeling_encodec.bitstream.v0.container import read_header
from modeling_encodec.bitstream.v0.language_model import OriginalSteps, decode_segment, encode_segment


@pytest.fixture(scope="module")
def coder():
    """The original's module of the arithmetic coder."""
    if import_encodec() is None:
        pytest.skip("the encodec package is not installed")
    return import_encodec("encodec.quantization.ac")


# ---- shares


def distributions(size: int, seed: int) -> torch.Tensor:
    """Distributions (11, size), from certain to even, with next to impossible symbols."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(size, generator=generator) * sharpness for sharpness in (0.01, 1, 3, 10, 30, 100)]
    rows = [logits.softmax(0) for logits in drawn]
    rows.append(torch.full((size,), 1 / size))
    certain = torch.randint(size, (3,), generator=generator)
    rows += list(torch.nn.functional.one_hot(certain, size).float())
    rows.append((torch.arange(size) < 2) * 0.5)
    return torch.stack(rows)


@pytest.mark.parametrize("size", [2, 3, 1024, 2048])
def test_shares_are_the_original_ones(coder, size):
    rows = distributions(size, size)
    lying_otherwise = rows.T.contiguous().T  # as they come out of the model
    for ours in (cumulative_shares(rows), cumulative_shares(lying_otherwise)):
        for row, cumulative in zip(rows, ours, strict=True):
            assert cumulative.tolist() == coder.build_stable_quantized_cdf(row, 24, check=False).tolist()


def test_shares_by_hand():
    shares = np.diff(cumulative_shares(torch.tensor([0.5, 0.25, 0.25, 0.0])), prepend=0)
    assert shares.tolist() == [2**23 - 2, 2**22, 2**22, 2]  # (1 - 8 / 2**24) * 2**24 * p + 2
    with pytest.raises(ValueError, match="not finite"):
        cumulative_shares(torch.tensor([0.5, float("nan")]))


# ---- the coder


def original_bytes(coder, symbols, rows) -> bytes:
    file = io.BytesIO()
    encoder = coder.ArithmeticCoder(file)
    for symbol, row in zip(symbols, rows, strict=True):
        encoder.push(symbol, torch.from_numpy(row))
    encoder.flush()
    return file.getvalue()


def our_bytes(symbols, rows) -> bytes:
    encoder = ArithmeticEncoder()
    for symbol, row in zip(symbols, rows, strict=True):
        encoder.encode(symbol, row)
    return encoder.finish()


def draw(rows: np.ndarray, numbers: random.Random) -> list[int]:
    """Symbols of these running sums: by their shares, or any, or the first, or the last."""
    kinds = [
        lambda row: int(np.searchsorted(row, numbers.randrange(row[-1]), side="right")),
        lambda row: numbers.randrange(len(row)),
        lambda row: 0,
        lambda row: len(row) - 1,
    ]
    return [numbers.choices(kinds, (6, 2, 1, 1))[0](row) for row in rows]


@pytest.mark.parametrize("count", [0, 1, 2, 17, 300])
@pytest.mark.parametrize("size", [2, 3, 64, 1024])
def test_bytes_are_the_original_ones_both_ways(coder, size, count):
    numbers = random.Random(1000 * size + count)
    table = cumulative_shares(distributions(size, count))
    rows = table[[numbers.randrange(len(table)) for _ in range(count)]]
    rows = rows[rows[:, -1] <= TOTAL]  # floats may sum to more; see below
    symbols = draw(rows, numbers)
    data = our_bytes(symbols, rows)
    assert data == original_bytes(coder, symbols, rows)
    file = io.BytesIO(data + b"next")
    decoder = ArithmeticDecoder(file)
    assert [decoder.decode(row) for row in rows] == symbols
    decoder.finish()
    assert file.read() == b"next"
    theirs = coder.ArithmeticDecoder(io.BytesIO(data))
    assert [theirs.pull(torch.from_numpy(row)) for row in rows] == symbols


def test_a_symbol_that_is_certain_costs_next_to_nothing():
    row = cumulative_shares(torch.nn.functional.one_hot(torch.tensor(5), 1024).float())
    assert 10 <= len(our_bytes([5] * 500_000, [row] * 500_000)) <= 15  # 1.76e-4 bits each


# The symbol in the middle leaves an interval that straddles a power of two, and then once more, and so on.
STRADDLING = np.array([TOTAL // 2 - 5, TOTAL // 2 + 5, TOTAL])


def test_more_pending_bits_than_the_format_has_room_for(coder):
    most = next(n for n in range(100) if not fits(lambda n=n: original_bytes(coder, [1] * n, [STRADDLING] * n))) - 1
    assert most >= 2
    assert our_bytes([1] * most, [STRADDLING] * most) == original_bytes(coder, [1] * most, [STRADDLING] * most)
    with pytest.raises(ValueError, match="bits are pending, allowed: up to 62 in version 0"):
        our_bytes([1] * (most + 1), [STRADDLING] * (most + 1))
    decoder = ArithmeticDecoder(io.BytesIO(b"\xfe" + b"\xff" * 500))
    assert [decoder.decode(STRADDLING) for _ in range(most)] == [1] * most
    with pytest.raises(EcdcError, match="cannot be told"):
        decoder.decode(STRADDLING)


def fits(write) -> bool:
    try:
        write()
    except AssertionError:
        return False
    return True


def test_shares_a_little_beyond_the_total_are_taken_where_the_original_takes_them(coder):
    """Rounded probabilities may sum to more than 1. That is no harm but where the interval ends at a power of two."""
    row, refused = np.array([TOTAL // 3, TOTAL + 3]), 0
    for symbols in itertools.product((0, 1), repeat=6):
        rows = [row] * len(symbols)
        if not fits(lambda symbols=symbols, rows=rows: original_bytes(coder, symbols, rows)):
            with pytest.raises(ValueError, match="shares 5592405 to 16777219, allowed: 0 to 16777216"):
                our_bytes(symbols, rows)
            refused += 1
            continue
        data = our_bytes(symbols, rows)
        assert data == original_bytes(coder, symbols, rows)
        decoder = ArithmeticDecoder(io.BytesIO(data))
        assert tuple(decoder.decode(row) for row in rows) == symbols
    assert 0 < refused < 64


@given(data=st.binary(max_size=60), seed=st.integers(0, 10**6), size=st.sampled_from([2, 3, 64]))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_read_as_the_original_reads_them(coder, data, seed, size):
    """The same symbols, and where the original gives up or its search finds none, our error."""
    numbers = random.Random(seed)
    table = cumulative_shares(distributions(size, seed % 5))[numbers.sample(range(11), 4)]
    theirs, ours = coder.ArithmeticDecoder(io.BytesIO(data)), ArithmeticDecoder(io.BytesIO(data))
    for _ in range(150):
        row = table[numbers.randrange(len(table))]
        try:
            expected = theirs.pull(torch.from_numpy(row))
        except RuntimeError:
            expected = None
        if expected is None:
            with pytest.raises(EcdcError):
                ours.decode(row)
            return
        assert ours.decode(row) == expected


@pytest.mark.parametrize(
    ("rows", "data"),
    [
        # An interval of 3/4 becomes one of 3/2 * 2**24 numbers; shares of 2 are 3 numbers there and 2 of them used.
        ([[3 * TOTAL // 4, TOTAL], list(range(2, 2002, 2))], bytes([0, 0, 0x80, 0])),
        ([[5, 10]], b"\xff\xff\xff"),  # after the last symbol
    ],
)
def test_bits_that_name_no_symbol(coder, rows, data):
    theirs, ours = coder.ArithmeticDecoder(io.BytesIO(data)), ArithmeticDecoder(io.BytesIO(data))
    *before, row = [np.array(row) for row in rows]
    assert [ours.decode(row) for row in before] == [theirs.pull(torch.from_numpy(row)) for row in before]
    with pytest.raises(RuntimeError, match="search failed"):
        theirs.pull(torch.from_numpy(row))
    with pytest.raises(EcdcError, match="cannot be told"):
        ours.decode(row)


# ---- probabilities


@pytest.mark.parametrize(
    ("sizes", "codebooks", "frames"), [(SMALL_LM, 3, 300), ((3, 57, 40, 2, 20), 2, 100), (RELEASED_LM, 4, 280)]
)
@torch.no_grad()
def test_probabilities_are_the_original_ones_to_the_last_bit(sizes, codebooks, frames):
    """Past the context, and past the positions that the model was trained on."""
    original, lm = lm_pair(*sizes)
    lm.config.max_positions = 64
    steps, states, offset = OriginalSteps(lm, codebooks), None, 0
    frame = torch.full((1, codebooks, 1), -1)
    for following in make_codes(lm, 1, frames, codebooks).split(1, dim=2):
        theirs, states, offset = original(1 + frame, states, offset)
        assert torch.equal(steps(frame.flatten().tolist()), theirs[0, :, :, 0].T)
        frame = following


# ---- segments

SEGMENTS = (40, 40, 7)  # frames; past the context of 20


@pytest.fixture(scope="module")
def lms():
    return lm_pair(*SMALL_LM)


@pytest.fixture(scope="module")
def codes(lms):
    """Codes (3, F) of each segment, most of them such as the model expects."""
    _, lm = lms
    numbers, segments = np.random.default_rng(0), []
    with torch.no_grad():
        for frames in SEGMENTS:
            steps, frame, columns = OriginalSteps(lm, 3), [-1] * 3, []
            for _ in range(frames):
                odds = steps(frame).double().numpy()
                frame = [int(numbers.choice(len(row), p=row / row.sum())) for row in odds]
                columns.append(frame)
            segments.append(torch.tensor(columns).T)
    return segments


@pytest.fixture(scope="module")
def segments(lms, codes):
    return [encode_segment(lms[1], chunk) for chunk in codes]


@pytest.fixture
def files(lms, codes, coder, monkeypatch):
    """The original's `compress` module, whose only codec is a stand-in that tells our codes and keeps what it is
    given to decode: `files.codec`. Frames are as many as samples, to have no rounding in them."""
    module = importlib.import_module("encodec.compress")
    frames = [(chunk[None], torch.tensor([0.5 + number])) for number, chunk in enumerate(codes)]
    codec = types.SimpleNamespace(
        name="encodec_48khz", sample_rate=64, frame_rate=64, segment_length=40, segment_stride=40, normalize=True
    )
    codec.get_lm_model = lambda: lms[0]
    codec.encode = lambda audio: frames
    codec.to = lambda device: codec
    codec.decode = lambda frames: setattr(codec, "decoded", frames) or torch.zeros(1, 1, sum(SEGMENTS))
    monkeypatch.setitem(module.MODELS, codec.name, lambda: codec)
    return types.SimpleNamespace(module=module, codec=codec)


def test_files_of_the_original_are_read_and_written(files, lms, codes, segments):
    data = files.module.compress(files.codec, torch.zeros(1, sum(SEGMENTS)), use_lm=True)
    file = io.BytesIO(data)
    header = read_header(file)
    assert header.uses_lm and header.num_codebooks == 3
    start = file.tell()
    for number, chunk in enumerate(codes):
        assert struct.unpack("!f", file.read(4)) == (0.5 + number,)
        decoded = decode_segment(lms[1], file, 3, chunk.shape[1])
        assert decoded.dtype == np.int32 and np.array_equal(decoded, chunk)
    assert file.read() == b""
    ours = b"".join(struct.pack("!f", 0.5 + number) + segment for number, segment in enumerate(segments))
    assert data[start:] == ours
    files.module.decompress(data[:start] + ours)
    assert all(torch.equal(frame[0], chunk) for (frame, _), chunk in zip(files.codec.decoded, codes, strict=True))


def test_segments_follow_each_other_without_lengths(lms, codes, segments):
    file = io.BytesIO(b"".join(segments) + b"rest")
    for chunk in codes:
        assert np.array_equal(decode_segment(lms[1], file, 3, chunk.shape[1]), chunk)
    assert file.read() == b"rest"


def test_codes_of_every_kind(lms):
    _, lm = lms
    top = lm.config.codebook_size - 1
    for chunk in (torch.zeros(4, 30), torch.full((1, 30), top), torch.tensor([[0, top] * 5, [top, 0] * 5])):
        chunk = chunk.to(torch.int16)
        data = encode_segment(lm, chunk.numpy())
        assert data == encode_segment(lm, chunk)
        assert np.array_equal(decode_segment(lm, io.BytesIO(data), *chunk.shape), chunk)


def test_nothing_that_the_caller_has_set_changes_a_bit(lms, codes, segments):
    _, lm = lms
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.set_float32_matmul_precision("medium")
        torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert encode_segment(lm, codes[2]) == segments[2]
            assert np.array_equal(decode_segment(lm, io.BytesIO(segments[2]), 3, SEGMENTS[2]), codes[2])
            with pytest.raises(EcdcError):
                decode_segment(lm, io.BytesIO(), 3, SEGMENTS[2])
        assert torch.get_num_threads() == 2 and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)


def test_as_many_threads_as_asked_for(lms, codes, segments, monkeypatch):
    seen = []
    step = OriginalSteps.__call__
    monkeypatch.setattr(OriginalSteps, "__call__", lambda *args: seen.append(torch.get_num_threads()) or step(*args))
    encode_segment(lms[1], codes[2])
    decode_segment(lms[1], io.BytesIO(encode_segment(lms[1], codes[2], threads=2)), 3, SEGMENTS[2], threads=2)
    assert seen == [1] * SEGMENTS[2] + [2] * 2 * SEGMENTS[2]


# ---- what cannot be


def test_models_that_version_0_has_no_place_for():
    _, lm = lm_pair(2, 16, 8, 1, 5)
    for changed, message in [({"zero_past_key": False}, "zero_past_key"), ({"has_float_form": False}, "float form")]:
        before = {name: getattr(lm.config, name) for name in changed}
        lm.config.update(changed)
        with pytest.raises(ValueError, match=message):
            encode_segment(lm, torch.zeros(1, 1, dtype=torch.long))
        lm.config.update(before)
    with pytest.raises(ValueError, match="is torch.bfloat16, allowed: torch.float32"):
        encode_segment(lm.bfloat16(), torch.zeros(1, 1, dtype=torch.long))
    lm.float().head.weight.data[3] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        encode_segment(lm, torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (torch.zeros(3, 2), "codes are torch.float32"),
        (torch.zeros(3, 0, dtype=torch.long), "shape"),
        (torch.zeros(1, 3, 2, dtype=torch.long), "shape"),
        (torch.full((3, 2), 61), "range from 61 to 61, allowed: 0 to 60"),
        (torch.full((3, 2), -1), "range from -1"),
        (torch.zeros(5, 2, dtype=torch.long), "5 codebooks, allowed: up to 4"),
    ],
)
def test_codes_that_are_none(lms, chunk, message):
    with pytest.raises(ValueError, match=message):
        encode_segment(lms[1], chunk)


@pytest.mark.parametrize("codebooks", [0, -1, 5, 10**12])
def test_codebooks_that_the_model_has_not(lms, codebooks):
    with pytest.raises(EcdcError, match="codebooks, allowed: 1 to 4"):
        decode_segment(lms[1], io.BytesIO(), codebooks, 3)


def test_a_segment_cut_short_anywhere(lms, segments):
    for size in range(len(segments[2])):
        with pytest.raises(EcdcError):
            decode_segment(lms[1], io.BytesIO(segments[2][:size]), 3, SEGMENTS[2])
    with pytest.raises(EcdcError, match="ends inside the codes"):
        decode_segment(lms[1], io.BytesIO(segments[0]), 3, 10**18)


def test_flipped_bits_are_found_out(lms, codes, segments):
    """Wrong codes would be allowed, but the end of the segment tells."""
    data, found = segments[2], 0
    for place in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        try:
            decoded = decode_segment(lms[1], io.BytesIO(damaged), 3, SEGMENTS[2])
        except EcdcError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
            found += 1
        else:
            assert decoded.min() >= 0 and decoded.max() < lms[1].config.codebook_size
            assert not np.array_equal(decoded, codes[2])
    assert found >= 0.99 * 8 * len(data)


@given(data=st.binary(max_size=40), codebooks=st.integers(1, 4), frames=st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_any_bytes_give_codes_or_a_clean_error(lms, data, codebooks, frames):
    try:
        decoded = decode_segment(lms[1], io.BytesIO(data), codebooks, frames)
    except EcdcError:
        return
    assert decoded.shape == (codebooks, frames) and 0 <= decoded.min() <= decoded.max() < 61


def test_other_weights_are_found_out(segments):
    _, other = lm_pair(*SMALL_LM, seed=1)
    with pytest.raises(EcdcError):
        decode_segment(other, io.BytesIO(segments[0] + bytes(500)), 3, SEGMENTS[0])


def test_few_bits_are_not_many_frames(lms, monkeypatch):
    """A sure model takes nearly no bits: a file's length alone must not keep a reader busy for days."""
    codes = torch.zeros(3, 40, dtype=torch.int64)
    data = encode_segment(lms[1], codes)
    assert np.array_equal(decode_segment(lms[1], io.BytesIO(data), 3, 40), codes)
    monkeypatch.setattr(original_lm, "FREE_FRAMES", 20)
    monkeypatch.setattr(original_lm, "MAX_FRAMES_PER_BIT", 0)
    with pytest.raises(EcdcError, match="21 of 40 frames take [0-9]+ bits, allowed: 20 frames and 0 a bit"):
        decode_segment(lms[1], io.BytesIO(data), 3, 40)
