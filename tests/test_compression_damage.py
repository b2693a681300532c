"""`.ecdc` version 1: what is damaged is found and concealed, and the rest is as it was."""

import io
import logging
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import clip, make_model
from ecdc_files import codes_of, container_items, places, refused, same, spoil, streamed
from lm_models import Table, spread
from pipe_ends import Sink

from modeling_encodec.bitstream import codes_file
from modeling_encodec.bitstream.codes_file import DecodedSegment, EcdcReader, EcdcWriter
from modeling_encodec.bitstream.compression import decompress, read_codes
from modeling_encodec.bitstream.concealment import FADE_SECONDS, join_segments
from modeling_encodec.bitstream.container import (
    Damage,
    End,
    Header,
    SegmentWriter,
    read_header,
    write_header,
)
from modeling_encodec.bitstream.errors import EcdcError
from modeling_encodec.bitstream.segment_coders import LMCoder, RawCoder
from modeling_encodec.models.configuration_encodec import EncodecConfig


# ---- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["24khz", "48khz"])
@torch.no_grad()
def test_each_segment_damaged_in_turn(name, small_models, lms, file_24khz, file_48khz, caplog):
    model, lm, data = small_models[name], lms[name], {"24khz": file_24khz, "48khz": file_48khz}[name]
    sound, _, end = codes_of(data, model, lm)
    rate, size, total = model.config.sampling_rate, read_header(io.BytesIO(data)).samples_per_segment, end.audio_length
    for index in sound:
        bad = spoil(data, index)
        for together in (1, 16):
            found, (damage,), found_end = codes_of(bad, model, lm, together=together)
            assert same(found, {n: codes for n, codes in sound.items() if n != index}) and found_end == end
            span = (index * size, min((index + 1) * size, total))
            assert (damage.first, damage.last, damage.start, damage.end) == (index, index, *span)
        line = f"segment {index} ({span[0] / rate:.2f} s to {span[1] / rate:.2f} s): checksum does not fit"
        assert damage.describe(rate) == line
        with refused(match="checksum does not fit"):
            decompress(bad, model, lm, strict=True)
        heard, silent = [], []
        caplog.clear()
        repeated, _ = decompress(bad, model, lm, conceal="repeat", on_damage=heard.append)
        assert heard == [damage] and not caplog.records
        silent, _ = decompress(bad, model, lm)
        assert [record.getMessage() for record in caplog.records] == [f"concealed: {line}"]
        assert caplog.records[0].levelno == logging.WARNING
        assert silent.shape == repeated.shape == (model.config.audio_channels, total)
        assert (silent[:, slice(*span)] == 0).all()
        # Elsewhere as with repeated codes, but for fades of FADE_SECONDS.
        fade = int(FADE_SECONDS * rate)
        at = torch.arange(total)
        distance = torch.maximum(span[0] - at, at - span[1] + 1)
        gain = (distance.clamp(0, fade + 1) / (fade + 1)).float()
        torch.testing.assert_close(silent, repeated * gain, rtol=0, atol=1e-6)
        assert (gain[distance > fade] == 1).all() and 0 < gain.diff().abs().max() < 1.01 / fade
        numbers = {n: np.full(codes.shape, -1) if n == index else codes for n, codes in sound.items()}
        codes = read_codes(io.BytesIO(bad), model, lm, on_damage=heard.append)
        assert codes.dtype == np.int32 and np.array_equal(codes, np.concatenate([*numbers.values()], 1))
        assert heard == [damage, damage]
        expected = dict(sound)
        near = sound[index - 1 if index else 1]
        expected[index] = near[:, np.arange(sound[index].shape[1]) % near.shape[1]]
        items = EcdcReader(io.BytesIO(bad)).read(model, lm)
        joined = join_segments(items, read_header(io.BytesIO(data)), model.config, strict=False, on_damage=id)
        assert np.array_equal(
            np.concatenate([codes for codes, _ in joined.pieces], 1),
            np.concatenate([expected[n] for n in sorted(sound)], 1),
        )
        assert joined.concealed == [span] and joined.audio_length == total
        if name == "48khz":
            scales = [item.scales for item in container_items(data)[1][:-1]]
            scales[index] = scales[index - 1 if index else 1]
            assert [scale for _, scale in joined.pieces] == [scale for some in scales for scale in some]


@torch.no_grad()
def test_damaged_neighbours_and_ends(small_models, lms, file_24khz):
    model, lm, size = small_models["24khz"], lms["24khz"], 6080
    for lost in ([0, 1], [3, 4, 5], [6, 7], [0, 2, 7], [1, 3]):
        heard = []
        audio, _ = decompress(spoil(file_24khz, *lost), model, lm, on_damage=heard.append)
        covered = [n for damage in heard for n in range(damage.first, damage.last + 1)]
        assert covered == lost
        for index in range(8):
            assert (audio[:, index * size : (index + 1) * size] == 0).all() == (index in lost)


@pytest.mark.parametrize("name", ["24khz", "48khz"])
def test_nothing_left(name, small_models, lms, file_24khz, file_48khz):
    data = {"24khz": file_24khz, "48khz": file_48khz}[name]
    bad, heard = spoil(data, *range(len(places(data)) - 1)), []
    with refused(match="no segment of the file could be read"):
        decompress(bad, small_models[name], lms[name], on_damage=heard.append)
    assert heard
    header = places(data)[0]
    for cut in (data[:header], data[: header + 5], data[:header] + data[-28:]):
        with refused(match="no segment of the file could be read"):
            decompress(cut, small_models[name], lms[name])


def test_a_damaged_header_is_an_error(small_models, lms, file_24khz):
    for at in range(places(file_24khz)[0]):
        with refused(ValueError, match="."):
            decompress(file_24khz[:at] + bytes([file_24khz[at] ^ 4]) + file_24khz[at + 1 :], small_models["24khz"])
        with refused(match="ends inside the header"):
            decompress(file_24khz[:at], small_models["24khz"], lms["24khz"])


@torch.no_grad()
def test_truncated_files(small_models, lms, file_24khz):
    model, lm, starts = small_models["24khz"], lms["24khz"], places(file_24khz)
    whole, sound = decompress(file_24khz, model, lm)[0], codes_of(file_24khz, model, lm)[0]
    for size in range(starts[0], len(file_24khz)):
        found, damages, end = codes_of(file_24khz[:size], model, lm) if size % 97 == 0 or size in starts else (0, 0, 0)
        if found == 0:
            continue
        count = sum(start <= size for start in starts[1:])
        assert same(found, {n: sound[n] for n in range(count)})
        assert len(damages) == 1 and end is None and (damages[0].first, damages[0].last) == (count, 7)
    for size in (starts[3], starts[3] + 30, starts[7], starts[8], len(file_24khz) - 1):
        with refused(match="the file has no end"):
            decompress(file_24khz[:size], model, lm, strict=True)
        audio = decompress(file_24khz[:size], model, lm)[0]
        kept = 6080 * sum(start <= size for start in starts[1:])
        assert audio.shape == whole.shape and (audio[:, kept:] == 0).all()
        assert torch.equal(audio[:, : kept - 400], whole[:, : min(kept, 45600) - 400]) or kept >= 45600
        if size >= starts[8]:  # only the end is missing: the header has the length
            assert torch.equal(audio, whole)
    with refused(match="bytes follow the end"):
        decompress(file_24khz + b"\0", model, lm, strict=True)
    heard = []
    assert torch.equal(decompress(file_24khz + b"\0", model, lm, on_damage=heard.append)[0], whole) and len(heard) == 1


@pytest.mark.parametrize("name", ["24khz", "48khz"])
@pytest.mark.parametrize("samples", [150_000, 4 * 47520, 3 * 47520 + 100, 3 * 47520 + 470])
@torch.no_grad()
def test_without_end_and_known_length_all_segments_are_kept(name, samples, small_models, lms):
    """A stream that broke off: what is there is all there is, up to a hop, and no segment that passed is lost."""
    model, lm = small_models[name], lms[name]
    data = streamed(model, lm, clip(model, 8.5)[:, -samples:], 1.0)
    whole, starts = decompress(data, model, lm, strict=True)[0], places(data)
    for kept in range(1, len(starts)):
        heard = []
        audio = decompress(data[: starts[kept]], model, lm, on_damage=heard.append)[0]
        assert [damage.reason for damage in heard] == ["the file has no end"]
        size = read_header(io.BytesIO(data)).samples_per_segment
        assert abs(audio.shape[1] - min(kept * size, samples)) <= 320 + (480 if name == "48khz" else 0)
        # The last chunk may be cut by a frame, which its norms are over.
        equal = min(audio.shape[1], samples) - 2000 if name == "24khz" else (kept - 1) * size
        torch.testing.assert_close(audio[:, :equal], whole[:, :equal], rtol=0, atol=1e-6)
        with refused(match="the file has no end"):
            decompress(data[: starts[kept]], model, lm, strict=True)


def test_false_writers(small_models, lms):
    """Checksums that fit do not make codes fit."""
    model = make_model(EncodecConfig(num_filters=2, hidden_size=16, codebook_size=600), seed=1)
    sink = Sink()
    writer = EcdcWriter(sink, model, num_codebooks=2, model_name="m", segment_seconds=0.1, file_id=1)
    writer.write(np.zeros((2, 16), dtype=np.int64))
    writer.segments.write(8, (), b"\xff" * 20, False)
    writer.close(24 * 320)
    found, (damage,), _ = codes_of(sink.data, model)
    assert sorted(found) == [0, 1] and damage.first == 2 and "a code is 1023, allowed: up to 599" in damage.reason
    lm, sink = lms["24khz"], Sink()
    options = {"num_codebooks": 8, "model_name": "m", "lm": lm, "lm_name": "l", "segment_seconds": 0.1, "file_id": 1}
    writer = EcdcWriter(sink, small_models["24khz"], **options)
    writer.write(np.zeros((8, 8), dtype=np.int64))
    for payload in (b"\xff" * 8, b"123"):  # impossible bytes
        writer.segments.write(8, (), payload, True)
    writer.close(24 * 320)
    for together in (1, 16):
        found, damages, end = codes_of(sink.data, small_models["24khz"], lm, together=together)
        assert list(found) == [0] and [damage.first for damage in damages] == [1, 2] and end is not None


# ---- fifty thousand mutated files --------------------------------------------------------------------------------

TABLE = Table(
    [
        spread(row)
        for row in ([9, 3, 1, 1, 0, 0, 0, 1], [0, 1, 90, 0, 5, 1, 0, 0], [1] * 8, [200, 0, 1, 30, 0, 0, 9, 0])
    ]
)


SHAPE = {"sampling_rate": 8, "channels": 1, "codebooks": 2, "codebook_size": 8, "hop_length": 2}
SHAPE |= {"frames_per_segment": 16, "samples_per_segment": 32, "lm_name": "l", "lm_fingerprint": "fedcba9876543210"}
CODEC = SimpleNamespace(config=SimpleNamespace(chunk_length=None, num_frames=lambda samples: -(-samples // 2)))


def draw_codes(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Codes (2, F) as likely as the table says."""
    codes, previous, cache = np.zeros((2, frames), dtype=np.int64), torch.full((1, 2, 1), -1), None
    for frame in range(frames):
        shares, cache = TABLE.shares(previous, cache)
        codes[:, frame] = [rng.choice(8, p=row / row.sum()) for row in shares[0, 0]]
        previous = torch.from_numpy(codes[None, :, frame : frame + 1])
    return codes


def mutation_sources() -> list[tuple[Header, bytes, dict[int, np.ndarray]]]:
    """Header, bytes and codes. The second has the first one's number and header but other codes; the third neither."""
    sources, coder, raw = [], LMCoder(TABLE), RawCoder(3)
    for seed, file_id, length in ((1, 77, 158), (2, 77, 158), (3, 78, None)):
        rng, file, codes = np.random.default_rng(seed), io.BytesIO(), {}
        header = Header("m", "0123456789abcdef", file_id=file_id, audio_length=length, **SHAPE)
        write_header(file, header)
        writer = SegmentWriter(file, header)
        for index in range(5):
            frames, coded, payload = 16 - (index == 4), index % 2 == 0, b""
            if coded:
                while not payload or len(payload) >= header.raw_size(frames):  # codes that get shorter
                    codes[index] = draw_codes(rng, frames)
                    payload = coder.encode(codes[index])
            else:
                codes[index] = rng.integers(0, 8, (2, frames))
                payload = raw.encode(codes[index])
            writer.write(frames, (), payload, coded)
        writer.close(158)
        sources.append((header, file.getvalue(), codes))
    return sources


def mutated(data: bytes, rng: random.Random, others: list[bytes], parts: list[int]) -> bytes:
    kind, size = rng.randrange(7), len(data)
    start, stop = sorted((rng.randrange(size + 1), rng.randrange(size + 1)))
    if kind == 0:  # flips
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 1:  # truncated
        return data[:start]
    if kind == 2:  # spliced with another file, at the same place or not
        other = rng.choice(others)
        return data[:start] + other[start if rng.random() < 0.5 else rng.randrange(len(other)) :]
    if kind == 3:  # bytes between
        return data[:start] + rng.randbytes(rng.randint(1, 30)) + data[start:]
    if kind == 4:  # bytes gone or repeated
        return data[:start] + data[stop:] if rng.random() < 0.5 else data[:stop] + data[start:]
    pieces = [data[at:end] for at, end in zip(parts, [*parts[1:], size])]
    other = rng.choice(others)
    if kind == 5:  # segments in another order
        rng.shuffle(pieces)
    else:  # segments of another file, which has them at the same places, or the same one twice
        at = rng.randrange(len(pieces))
        end = [*parts[1:], size][at]
        pieces[rng.randrange(len(pieces)) if rng.random() < 0.5 else at] = other[parts[at] : end]
    return data[: parts[0]] + b"".join(pieces)


def test_fifty_thousand_mutated_files(monkeypatch):
    """Each is an error, or damage is reported and the rest is as it was, or nothing has changed."""

    def check_models(header, model, lm, **options):
        if header.model_fingerprint != "0123456789abcdef":
            raise EcdcError("another model")

    monkeypatch.setattr(codes_file, "check_models", check_models)
    sources, rng, seen = mutation_sources(), random.Random(2024), {}
    parts = [places(data) for _, data, _ in sources]
    assert parts[0] == parts[1] == parts[2]
    for number in range(50_000):
        _, data, _ = sources[number % 3]
        others = [other for _, other, _ in sources if other is not data]
        data = mutated(data, rng, others, parts[0])
        if rng.random() < 0.3:
            data = mutated(data, rng, others, parts[0]) if data else b""
        result = outcome(data, sources)
        seen[result] = seen.get(result, 0) + 1
    assert all(seen[result] > 300 for result in ("refused", "reported", "distrusted", "unchanged")), seen


def outcome(data: bytes, sources) -> str:
    try:
        reader = EcdcReader(io.BytesIO(data))
    except EcdcError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
        return "refused"
    items = list(reader.read(CODEC, TABLE, together=8))
    found = {item.index: item.codes for item in items if isinstance(item, DecodedSegment)}
    damages = [item for item in items if isinstance(item, Damage)]
    known = [(whole, codes) for header, whole, codes in sources if header == reader.header]
    assert known, "a header of no file"
    if not damages:
        assert any(same(found, codes) for _, codes in known) and isinstance(items[-1], End)
        assert any(data == whole for whole, _ in known), "changes that are not reported"
        return "unchanged"
    if any(damage.first == 0 and damage.last is None for damage in damages):
        return "distrusted"
    for index, codes in found.items():
        assert any(np.array_equal(codes, original[index]) for _, original in known)
    covered = {n for damage in damages for n in range(damage.first, (4 if damage.last is None else damage.last) + 1)}
    assert covered.isdisjoint(found) and covered | set(found) == set(range(5))
    if any(isinstance(item, End) for item in items):
        # Segments of two files are told apart if all are there.
        assert covered or any(same(found, codes) for _, codes in known)
    return "reported"
