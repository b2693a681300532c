"""`.ecdc` files that say anything at all, under right checksums: audio of the right length or one clear error, in time
and memory that fit the file; and every way to read a file finds the same."""

import io
import random
import time
import tracemalloc

import pytest
import torch
from conftest import clip
from forged_files import forge, forge_original, taken_apart
from test_linear_work import assert_linear
from test_live import received

from modeling_encodec.bitstream.compression import compress, decompress, decompress_blocks, read_codes
from modeling_encodec.bitstream.concealment import silence
from modeling_encodec.bitstream.container import Damage, End, read_header, read_segments
from modeling_encodec.bitstream.errors import EcdcError
from modeling_encodec.bitstream.inspection import describe
from modeling_encodec.bitstream.live import decode_live


# What a file may hold here: decoding is then bounded, whatever one claims.
SECONDS = 6.0


@pytest.fixture(scope="module")
def sources(small_models, lms) -> dict:
    """By architecture: model, language model, and files of short segments taken apart, of known length and not."""
    made = {}
    for name, seconds, segment in (("24khz", 0.4, 0.1), ("48khz", 2.3, 0.5)):
        model, lm = small_models[name], lms[name]
        files = [compress(model, clip(model, seconds, seed), 3.6, lm, segment_seconds=segment) for seed in (1, 2)]
        files.append(compress(model, clip(model, seconds), 1.8, segment_seconds=segment))
        known = [taken_apart(data) for data in files]
        unknown = [taken_apart(data) for data in files]
        for forged in unknown:
            forged.numbers["audio_length"] = 0
        made[name] = model, lm, known + unknown
    return made


def outcome(function, *arguments, **options):
    """What a way to read gives, or its error in words, and the damage it tells of."""
    damages = []
    try:
        found = function(*arguments, on_damage=damages.append, **options)
    except EcdcError as error:
        assert "\n" not in str(error) and len(str(error)) < 500, error
        return str(error), damages
    return found, damages


@torch.no_grad()
def check(data: bytes, model, lm) -> str:
    """All ways to read these bytes agree. Returns how it went."""
    options = {"max_seconds": SECONDS}
    whole, damages = outcome(decompress, data, model, lm, **options)
    blocks, in_blocks = outcome(lambda **o: _joined(decompress_blocks(io.BytesIO(data), model, lm, **o)), **options)
    codes, in_codes = outcome(read_codes, io.BytesIO(data), model, lm, **options)
    assert damages == in_blocks == in_codes
    if isinstance(whole, str):
        assert blocks == whole
        assert codes == whole or "not finite" in whole
    else:
        assert torch.equal(blocks, whole[0]) and whole[0].shape[1] <= SECONDS * model.config.sampling_rate
        assert codes.shape[1] == sum(
            model.config.num_frames(stop - start) for start, stop in model.config.chunk_spans(whole[0].shape[1])
        )
        _check_length(data, whole[0])
        strict = outcome(decompress, data, model, lm, strict=True, **options)[0]
        assert isinstance(strict, str) == bool(damages)
        spans = [span for span in damages if span.last is None or span.last >= span.first]
        assert (codes == -1).any() <= bool(spans)
    heard = _live(data, model, lm)
    if not isinstance(whole, str):
        _check_agreement(data, damages, heard)
    return "refused" if isinstance(whole, str) else "damaged" if damages else "sound"


def _joined(opened) -> torch.Tensor:
    return torch.cat(list(opened[0]), dim=1)


def _check_length(data: bytes, audio: torch.Tensor) -> None:
    file = io.BytesIO(data)
    header = read_header(file)
    ends = [item.audio_length for item in read_segments(file, header) if isinstance(item, End)]
    for length in (*ends, *filter(None, [header.audio_length])):
        assert audio.shape == (header.channels, length)


def _live(data: bytes, model, lm) -> list[Damage] | None:
    try:
        return received(model, data, lm=lm, max_seconds=SECONDS)[1]
    except EcdcError as error:
        assert "\n" not in str(error)
        return None


def _check_agreement(data: bytes, damages: list[Damage], heard: list[Damage] | None) -> None:
    """A look at the container finds nothing that decoding does not, and a live stream tells of the same."""
    lines = [damage.describe(read_header(io.BytesIO(data)).sampling_rate) for damage in damages]
    said = describe(io.BytesIO(data), len(data)).get("damage", "")
    for line in said.split("; ") if said else []:
        assert any(line in one or one in said for one in lines), (line, lines)
    assert heard is None or all(damage in damages for damage in heard)
    late = ("frames, allowed", "scales, allowed")  # known when the end is
    missed = [one for one in damages if heard is not None and one not in heard]
    assert all(any(reason in one.reason for reason in late) for one in missed)


@pytest.mark.parametrize("name", ["24khz", "48khz"])
def test_forged_files_are_read_alike_or_refused(name, sources):
    _forged(name, sources, count=100, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["24khz", "48khz"])
def test_many_forged_files_are_read_alike_or_refused(name, sources):
    _forged(name, sources, count=10_000, seed=2)


def _forged(name: str, sources: dict, count: int, seed: int) -> None:
    model, lm, files = sources[name]
    rng, seen = random.Random(seed), {}
    for number in range(count):
        data, start = forge(rng.choice(files), files, rng), time.process_time()
        try:
            result = check(data, model, lm)
        except BaseException:
            print(number, data.hex())
            raise
        assert time.process_time() - start < 20, data.hex()
        seen[result] = seen.get(result, 0) + 1
    assert min(seen[result] for result in ("refused", "damaged")) > count / 10, seen


def test_files_cut_at_any_byte_are_read_alike_or_refused(sources):
    model, lm, files = sources["24khz"]
    for forged in (files[0], files[3]):
        data = forged.build()
        for size in (*range(0, 140, 7), *range(140, len(data), 41)):
            assert check(data[:size], model, lm) != "sound", size


@torch.no_grad()
def test_forged_files_of_version_0_are_read_or_refused(small_models):
    _forged_originals(small_models, count=100, seed=3)


@pytest.mark.slow
@torch.no_grad()
def test_many_forged_files_of_version_0_are_read_or_refused(small_models):
    _forged_originals(small_models, count=20_000, seed=4)


def _forged_originals(small_models: dict, count: int, seed: int) -> None:
    rng, seen, sources = random.Random(seed), {}, []
    for model in (small_models["24khz"], small_models["48khz"]):
        for seconds in (0.1, 1.1):
            sources.append((model, compress(model, clip(model, seconds), 3.6, version=0, model_name="m")))
    for number in range(count):
        model, data = rng.choice(sources)
        data = forge_original(data, rng)
        found, _ = outcome(decompress, data, model, max_seconds=SECONDS)
        codes, _ = outcome(read_codes, io.BytesIO(data), model, max_seconds=SECONDS)
        assert isinstance(found, str) == isinstance(codes, str), (number, data.hex())
        if not isinstance(found, str):
            samples = int(describe(io.BytesIO(data), len(data))["samples"])
            assert found[0].shape == (model.config.audio_channels, samples) and found[0].isfinite().all()
        seen[isinstance(found, str)] = seen.get(isinstance(found, str), 0) + 1
    assert min(seen.values()) > count / 10, seen


# ---- out of proportion -------------------------------------------------------------------------------------------


def one_frame_each(model, indices, count: int, *, known: bool = True, frames: int = 1) -> bytes:
    """A file of one codebook, with a segment of one frame at these of `count` places, each of so many frames."""
    hop = model.config.hop_length
    forged = taken_apart(compress(model, clip(model, 0.1), num_quantizers=1, segment_seconds=0.01))
    kind, _, _, scales, _, file_id = forged.segments[0]
    forged.segments = [[kind, index, 1, scales, b"\0", file_id] for index in indices]
    length = count * frames * hop
    forged.numbers |= {"frames_per_segment": frames, "samples_per_segment": frames * hop}
    forged.numbers["audio_length"] = length if known else 0
    forged.end = [count, length, 0]
    return forged.build()


@pytest.mark.parametrize("known", [True, False])
def test_a_few_bytes_are_not_days(small_models, known):
    """119 bytes that say 48 hours, 24 of them, or one: refused in every way to read them, in no time."""
    model = small_models["24khz"]
    for count, frames in ((200, 65535), (98, 65535), (5, 65535), (24000, 1)):
        data, start = one_frame_each(model, [0], count, known=known, frames=frames), time.process_time()
        assert len(data) < 150
        for function in (decompress, lambda data, model, **o: read_codes(io.BytesIO(data), model, **o)):
            assert isinstance(outcome(function, data, model)[0], str)
            assert isinstance(outcome(function, data, model, max_seconds=None)[0], str)
        with pytest.raises(EcdcError):
            decompress_blocks(io.BytesIO(data), model, on_damage=id)
        assert time.process_time() - start < 5


def test_the_limit_can_be_raised_and_says_so(small_models):
    model = small_models["24khz"]
    data = compress(model, clip(model, 0.5))
    for known in (True, False):
        forged = taken_apart(data)
        if not known:
            forged.numbers["audio_length"] = 0
        with pytest.raises(EcdcError, match="holds 0.00 h .*max_seconds raises it .--max-hours"):
            decompress(forged.build(), model, max_seconds=0.49)
        for limit in (0.5, 1, None):
            assert decompress(forged.build(), model, max_seconds=limit)[0].shape[1] == 12000
        for limit in (0, -1, float("nan"), "x"):
            with pytest.raises(ValueError, match="max_seconds is"):
                decompress(forged.build(), model, max_seconds=limit)


def test_a_live_stream_conceals_in_proportion(small_models):
    """137 bytes with two segments, a thousand of 15 minutes apart; and what was heard before is there."""
    model = small_models["24khz"]
    for indices, frames in (([0, 1000], 65535), ([1000], 65535), ([0, 44000], 1), ([5000], 1)):
        data = one_frame_each(model, indices, indices[-1] + 1, known=False, frames=frames)
        start = time.process_time()
        with pytest.raises(EcdcError, match="allowed"):
            received(model, data)
        assert time.process_time() - start < 5
    heard = io.BytesIO()
    data = one_frame_each(model, [0, 1, 2, 50000], 50001, known=False)
    with pytest.raises(EcdcError, match="missing"):
        decode_live(lambda header: (model, None), io.BytesIO(data), heard, on_damage=lambda *_: None)
    assert len(heard.getvalue()) == 2 * 3 * 320


def test_segments_that_no_writer_makes_are_refused(small_models):
    """Of less than a frame, of other samples than frames, of parts of chunks."""
    for name, sizes in (("24khz", ((1, 1), (1, 319), (4, 320), (2, 639))), ("48khz", ((1, 1), (150, 48000), (75, 1)))):
        model = small_models[name]
        forged = taken_apart(compress(model, clip(model, 1.0)))
        for frames, samples in sizes:
            forged.numbers |= {"frames_per_segment": frames, "samples_per_segment": samples}
            forged.end[0] = -(-forged.end[1] // samples)
            with pytest.raises(EcdcError, match=f"segments have {frames} frames in {samples} samples, allowed"):
                decompress(forged.build(), model)


@torch.no_grad()
def test_concealment_takes_linear_work(small_models):
    """Of many segments found and many missing, with their codes and their silence."""
    model = small_models["24khz"]

    def make(n):
        data = one_frame_each(model, range(9, 20 * n, 20), 20 * n)
        gaps = [(start, start + 10) for start in range(0, 20 * n, 20)]

        def read():
            assert (read_codes(io.BytesIO(data), model, on_damage=id) == 0).sum() == n
            for start in range(0, 20 * n, 100):
                silence(torch.ones(1, 100), start, gaps, 400)

        return read

    assert_linear(make)


def test_memory_is_a_small_multiple_of_the_file(small_models):
    """Many segments of a frame each, one in fifty of them there, and their blocks decoded one by one."""
    model = small_models["24khz"]
    for indices, count in ((range(5_000), 5_000), (range(0, 50_000, 50), 50_000)):
        data = one_frame_each(model, indices, count)
        tracemalloc.start()
        blocks, _ = decompress_blocks(io.BytesIO(data), model, on_damage=lambda damage: None)
        next(blocks)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * len(data) + 500_000, (peak, len(data))
