"""Layouts of codes: each with its inverse, against loops and against MusicGen; vocabularies; refusals."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from client_models import make_musicgen
from conftest import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MusicgenDecoderConfig, MusicgenForCausalLM

from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.processors import code_layouts as layouts
from modeling_encodec.processors.code_vocabulary import CodeVocabulary


SIZE = 50  # of a codebook
DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "int32": torch.int32, "int64": torch.int64}
PAD = 99_999
often = settings(max_examples=60, deadline=None)


def arrays(codes: np.ndarray, dtype: str):
    """The codes as an array and as a tensor of this dtype."""
    return codes.astype(dtype), torch.from_numpy(codes).to(DTYPES[dtype])


def same(a, b) -> bool:
    """Equal values, shapes and kinds, in int64."""
    if not isinstance(a, type(b)) or tuple(a.shape) != tuple(b.shape):
        return False
    dtype = np.int64 if isinstance(a, np.ndarray) else torch.int64
    return a.dtype == dtype and bool((a == b).all())


@st.composite
def batches(draw):
    """Codes (B, K, F) as int64, lengths, and a dtype."""
    batch, codebooks, frames = draw(st.integers(1, 3)), draw(st.integers(1, 32)), draw(st.integers(0, 6))
    codes = np.random.default_rng(draw(st.integers(0, 99))).integers(0, SIZE, (batch, codebooks, frames))
    lengths = draw(st.lists(st.integers(0, frames), min_size=batch, max_size=batch))
    return codes, lengths, draw(st.sampled_from(sorted(DTYPES)))


def kinds():
    """(there, back) of each layout of (..., K, F), by name."""
    return {
        "offsets": (
            lambda c, **k: layouts.add_offsets(c, SIZE, **k),
            lambda i, K, **k: layouts.remove_offsets(i, SIZE, **k),
        ),
        "frame": (layouts.flatten, layouts.unflatten),
        "codebook": (
            lambda c, **k: layouts.flatten(c, "codebook", **k),
            lambda i, K, **k: layouts.unflatten(i, K, order="codebook", **k),
        ),
        "delay": (
            lambda c, fill=PAD, **k: layouts.delay(c, fill=fill, **k),
            lambda i, K, **k: layouts.undelay(i, **k),
        ),
        "pattern": (
            lambda c, fill=PAD, **k: layouts.delay(c, [3 * k % 7 for k in range(c.shape[-2])], fill=fill, **k),
            lambda i, K, **k: layouts.undelay(i, [3 * k % 7 for k in range(K)], **k),
        ),
    }


@often
@given(batches(), st.sampled_from(sorted(kinds())))
def test_there_and_back(batch, kind):
    (numbers, lengths, dtype), (there, back) = batch, kinds()[kind]
    for codes in arrays(numbers, dtype):
        whole = codes.astype(np.int64) if isinstance(codes, np.ndarray) else codes.long()
        assert same(back(there(codes), codes.shape[1]), whole)
        assert same(back(there(codes[0]), codes.shape[1]), whole[0])
        assert same(back(there(codes[None]), codes.shape[1])[0], whole)
        ids = there(codes, lengths=lengths, fill=PAD)
        again = back(ids, codes.shape[1], lengths=np.array(lengths))
        for row, length in enumerate(lengths):
            alone = there(codes[row, :, :length])
            assert same(ids[row, ..., : alone.shape[-1]], alone)  # a row is what it is alone
            assert (ids[row, ..., alone.shape[-1] :] == PAD).all()
            assert same(again[row, :, :length], whole[row, :, :length]) and (again[row, :, length:] == 0).all()


@often
@given(batches(), st.sampled_from(layouts.LAYOUTS), st.integers(-7, 7), st.integers(-7, 7))
def test_ids_of_a_slice_are_the_slice_of_the_ids(batch, layout, start, stop):
    numbers, lengths, dtype = batch
    options = {"layout": layout, "num_quantizers": numbers.shape[1], "fill": PAD}
    for codes in arrays(numbers, dtype):
        codes = layouts.add_offsets(codes, SIZE)
        ids = layouts.lay_out(codes, layout, fill=PAD)
        sliced = layouts.slice_frames(ids, slice(start, stop), **options)
        assert same(sliced, layouts.lay_out(codes[..., start:stop], layout, fill=PAD))
        ids = layouts.lay_out(codes, layout, fill=PAD, lengths=lengths)
        start, stop = abs(start), abs(stop)
        sliced = layouts.slice_frames(ids, slice(start, stop), lengths=lengths, **options)
        for row, length in enumerate(lengths):
            alone = layouts.lay_out(codes[row, :, :length][:, start:stop], layout, fill=PAD)
            assert same(sliced[row, ..., : alone.shape[-1]], alone)


def test_layouts_by_hand():
    codes = np.array([[1, 2, 3], [4, 5, 6]], np.uint16)
    assert layouts.add_offsets(codes, 40_000)[1].tolist() == [40_004, 40_005, 40_006]
    assert layouts.add_offsets(codes[[0, 1, 1]], 40_000)[2, 0] == 80_004  # more than 16 bits
    assert layouts.flatten(codes).tolist() == [1, 4, 2, 5, 3, 6]
    assert layouts.flatten(codes, "codebook").tolist() == [1, 2, 3, 4, 5, 6]
    assert layouts.flatten(np.stack([codes] * 2), "codebook", lengths=[2, 3], fill=9).tolist() == [
        [1, 2, 4, 5, 9, 9],
        [1, 2, 3, 4, 5, 6],
    ]
    assert layouts.delay(codes, fill=9).tolist() == [[1, 2, 3, 9], [9, 4, 5, 6]]
    assert layouts.delay(codes, [2, 0], fill=9).tolist() == [[9, 9, 1, 2, 3], [4, 5, 6, 9, 9]]
    assert layouts.undelay(np.array([[1, 2, 3], [9, 4, 5]])).tolist() == [[1, 2], [4, 5]]  # cut off


@often
@given(batches())
def test_codebooks_apart_and_together(batch):
    numbers, _, dtype = batch
    for codes in arrays(numbers, dtype):
        whole = codes.astype(np.int64) if isinstance(codes, np.ndarray) else codes.long()
        first, rest = layouts.split_first(codes)
        assert same(first, whole[:, 0]) and same(rest, whole[:, 1:])
        assert same(layouts.join_first(first, rest), whole)
        left, right = whole, (whole + 7) % SIZE
        stereo = layouts.interleave_stereo(left, right)
        for codebook in range(codes.shape[1]):
            assert same(stereo[:, 2 * codebook], left[:, codebook])
            assert same(stereo[:, 2 * codebook + 1], right[:, codebook])
        again = layouts.deinterleave_stereo(stereo)
        assert same(again[0], left) and same(again[1], right)


@often
@given(batches(), st.sampled_from(["right", "left"]), st.booleans())
def test_padded_rows(batch, side, in_rows):
    numbers, lengths, dtype = batch
    for codes in arrays(numbers, dtype):
        rows = [row[:, :n] if in_rows else row[0, :n] for row, n in zip(codes, lengths)]
        ids, mask = layouts.pad_ids(rows, PAD, side=side)
        assert ids.shape[-1] == max(lengths) and mask.sum(1).tolist() == lengths
        assert ((ids[:, 0] if in_rows else ids)[mask == 0] == PAD).all()
        for row, got, kept in zip(rows, layouts.unpad_ids(ids, mask), mask):
            assert same(got, row.astype(np.int64) if isinstance(row, np.ndarray) else row.long())
            assert kept.tolist() == sorted(kept.tolist(), reverse=side == "right")


@often
@given(batches(), st.integers(0, 3), st.integers(0, 3), st.booleans(), st.booleans())
def test_bos_and_eos_are_stripped_at_the_ends_alone(batch, before, after, bos, eos):
    numbers, _, dtype = batch
    bos, eos = (70 if bos else None), (71 if eos else None)
    for codes in arrays(numbers, dtype):
        for row in (codes[0], codes[0, 0]):
            whole = row.astype(np.int64) if isinstance(row, np.ndarray) else row.long()
            ids = layouts.add_bos_eos(whole, bos, eos_id=eos)
            assert ids.shape[-1] == row.shape[-1] + (bos is not None) + (eos is not None)
            assert same(layouts.strip_bos_eos(ids, bos, eos_id=eos), whole)
            for fill in (PAD, eos) if eos is not None else (PAD,):  # models without a padding id pad with EOS
                padded = layouts.full_of(ids, (*ids.shape[:-1], ids.shape[-1] + after), fill)
                padded[..., : ids.shape[-1]] = ids
                left = layouts.full_of(ids, (*ids.shape[:-1], before), PAD)
                join = np.concatenate if isinstance(ids, np.ndarray) else torch.cat
                padded = join([left, padded], -1)
                assert same(layouts.strip_bos_eos(padded, bos, eos_id=eos, pad_id=PAD), whole)


def test_eos_among_the_codes_is_left_for_decoding_to_refuse():
    ids = np.array([70, 1, 71, 2, 71, 71])
    assert layouts.strip_bos_eos(ids, 70, eos_id=71).tolist() == [1, 71, 2]


# ---- MusicGen ----------------------------------------------------------------------------------------------------


def decoder(channels: int, codebooks: int = 4) -> MusicgenForCausalLM:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16}
    config = MusicgenDecoderConfig(
        vocab_size=SIZE, audio_channels=channels, num_codebooks=codebooks, pad_token_id=SIZE, bos_token_id=SIZE, **size
    )
    return MusicgenForCausalLM(config).eval()


@pytest.mark.parametrize(("channels", "pattern"), [(1, None), (2, [0, 0, 1, 1])])
def test_the_delay_is_musicgens(channels, pattern):
    """With a column of BOS before it, for a prompt of codes and for codes yet to be generated (-1)."""
    model, codes = decoder(channels), torch.randint(0, SIZE, (2, 4, 6))
    ours = layouts.add_bos_eos(layouts.delay(codes, pattern, fill=SIZE), SIZE)
    prompt = layouts.add_bos_eos(codes, SIZE).reshape(8, -1)
    ids, mask = model.build_delay_pattern_mask(prompt, pad_token_id=SIZE, max_length=ours.shape[2])
    assert torch.equal(mask.view(2, 4, -1), ours) and torch.equal(ids.view(2, 4, -1), ours[..., : ids.shape[1]])
    empty = torch.full((8, 1), SIZE)
    _, mask = model.build_delay_pattern_mask(empty, pad_token_id=SIZE, max_length=ours.shape[2])
    yet = layouts.add_bos_eos(layouts.delay(torch.full((2, 4, 6), -1), pattern, fill=SIZE), SIZE)
    assert torch.equal(mask.view(2, 4, -1), yet)
    # What its generate makes of a full mask: codes where the pad id is not.
    generated = model.apply_delay_pattern_mask(torch.zeros_like(mask), ours.reshape(8, -1))
    assert torch.equal(generated[generated != SIZE].view(2, 4, -1), layouts.undelay(ours[..., 1:], pattern))


def test_the_stereo_interleaving_is_musicgens(small_models):
    codec = small_models["32khz"]
    model, audio = make_musicgen("musicgen", codec, channels=2), noise(2, 2, 3000)
    with torch.no_grad():
        prompt = model._prepare_audio_encoder_kwargs_for_generation(audio, {})["decoder_input_ids"]
        left, right = (codec.encode(audio[:, side : side + 1]).audio_codes[0] for side in (0, 1))
    assert not torch.equal(left, right)
    assert torch.equal(prompt.view(2, 8, -1), layouts.interleave_stereo(left, right))


def test_delayed_ids_of_a_vocabulary_are_what_musicgen_trains_on():
    model, vocabulary = decoder(1), CodeVocabulary(SIZE, 4, 50, layout="delay")
    ids = vocabulary.encode(torch.randint(0, SIZE, (4, 6)))
    labels = ids[:, 1:].T[None]
    labels = labels.masked_fill(labels == SIZE, -100)
    with torch.no_grad():
        shifted_inside = model(labels=labels)
        given = model(input_ids=ids[None, :, :-1], labels=labels)
    assert torch.equal(shifted_inside.logits, given.logits) and torch.equal(shifted_inside.loss, given.loss)
    assert vocabulary.vocab_size == SIZE + 1 == model.get_input_embeddings()[0].num_embeddings


# ---- the vocabulary ----------------------------------------------------------------------------------------------


@st.composite
def vocabularies(draw):
    layout, count = draw(st.sampled_from(layouts.LAYOUTS)), draw(st.integers(1, 32))
    pattern = (
        [draw(st.integers(0, 5)) for _ in range(count - 1)] if layout == "delay" and draw(st.booleans()) else None
    )
    pattern = None if pattern is None else (*pattern, 0)
    return CodeVocabulary(SIZE, count, 75, layout, pattern, draw(st.sampled_from([True, False, None])))


@often
@given(vocabularies(), st.integers(0, 6), st.sampled_from(sorted(DTYPES)), st.booleans(), st.booleans())
def test_a_vocabulary_there_and_back(vocabulary, frames, dtype, bos, eos):
    count = vocabulary.num_quantizers
    codes = np.random.default_rng(frames).integers(0, SIZE, (count, frames))
    for given_codes in arrays(codes, dtype):
        ids = vocabulary.encode(given_codes, bos=bos, eos=eos)
        assert ids.shape[-1] == 0 or (ids.min() >= 0 and ids.max() < vocabulary.vocab_size)
        padded, mask = layouts.pad_ids([ids, ids[..., :0]], vocabulary.pad_token_id)
        left, _ = layouts.pad_ids([ids, layouts.add_bos_eos(ids, 0, eos_id=0)], vocabulary.pad_token_id, side="left")
        for row in (ids, padded[0], left[0]):
            for incomplete in ("error", "drop"):
                got = vocabulary.decode(row, incomplete=incomplete)
                assert np.array_equal(np.asarray(got), codes) and type(got) is type(given_codes)
        bare = vocabulary.encode(given_codes, bos=False, eos=False)
        part = vocabulary.slice_frames(bare, slice(1, 4))
        assert same(part, vocabulary.encode(given_codes[:, 1:4], bos=False, eos=False))


@often
@given(vocabularies(), st.integers(0, 5), st.integers(0, 200))
def test_ids_cut_off_give_the_frames_that_are_whole(vocabulary, frames, cut):
    if vocabulary.layout == "codebook" and not vocabulary.own_ids:
        return  # nothing in them tells how many frames there were to be
    count = vocabulary.num_quantizers
    codes = np.random.default_rng(cut).integers(0, SIZE, (count, frames))
    ids = vocabulary.encode(codes, eos=False)
    ids = ids[..., : max(1, ids.shape[-1] - cut)]
    tokens = ids.shape[-1] - 1
    if vocabulary.layout == "frame":
        whole = tokens // count
    elif vocabulary.layout == "codebook":
        whole = max(0, tokens - frames * (count - 1)) if tokens >= frames else (tokens if count == 1 else 0)
    else:
        whole = max(0, tokens - max(vocabulary.pattern))
    assert np.array_equal(vocabulary.decode(ids, incomplete="drop"), codes[:, :whole])
    if whole < frames and tokens and count > 1 and vocabulary.layout != "delay" and tokens != whole * count:
        with pytest.raises(ValueError, match="allowed"):
            vocabulary.decode(ids)


def test_numbers_of_a_vocabulary():
    config = EncodecConfig.preset_24khz()
    flat = CodeVocabulary.for_model(config, bandwidth=6.0)
    assert (flat.num_quantizers, flat.frame_rate, flat.tokens_per_second, flat.num_code_ids) == (8, 75, 600, 8192)
    assert (flat.pad_token_id, flat.bos_token_id, flat.eos_token_id, flat.vocab_size) == (8192, 8193, 8194, 8195)
    shared = CodeVocabulary.for_model(config, 8, own_ids=False, eos_token_id=2000)
    assert (shared.num_code_ids, shared.eos_token_id, shared.vocab_size) == (1024, 2000, 2001)
    delayed = CodeVocabulary.for_model(EncodecConfig.preset_32khz(), layout="delay")
    assert (delayed.num_quantizers, delayed.tokens_per_second, delayed.pattern) == (4, 50, (0, 1, 2, 3))
    assert (delayed.pad_token_id, delayed.bos_token_id, delayed.eos_token_id) == (2048, 2048, None)
    assert CodeVocabulary.for_model(EncodecConfig.preset_48khz(), 2).frame_rate == pytest.approx(150 / 0.99)


CONFIG = EncodecConfig.preset_24khz()
FLAT, BY_CODEBOOK = CodeVocabulary(10, 2, 75), CodeVocabulary(10, 2, 75, "codebook")
SHARED, DELAYED = CodeVocabulary(10, 2, 75, own_ids=False), CodeVocabulary(10, 2, 75, "delay")
REFUSED = {
    r"id 20 \(padding\) at place 3, allowed there: 0 to 19": lambda: FLAT.decode(np.array([21, 1, 12, 20, 2, 13])),
    r"id 22 \(EOS\) at place 2, allowed there: 0 to 19": lambda: FLAT.decode(torch.tensor([1, 12, 22, 2, 22, 20])),
    r"id 21 \(BOS\) at place 1, allowed there: 0 to 19": lambda: FLAT.decode(np.array([21, 21, 1, 12])),
    r"id 77 at place 1, allowed there: 0 to 19": lambda: FLAT.decode(np.array([1, 77])),
    r"id -1 at place 0, allowed there: 0 to 19": lambda: FLAT.decode(np.array([-1, 11])),
    r"id 3 in frame 1, codebook 1, allowed there: 10 to 19": lambda: FLAT.decode(np.array([1, 12, 2, 3])),
    r"id 2 in frame 0, codebook 1, allowed there: 10 to 19": lambda: BY_CODEBOOK.decode(torch.tensor([1, 12, 2, 13])),
    r"id 25 in frame 0, codebook 1, allowed there: 10 to 19": lambda: CodeVocabulary(10, 3, 75, "codebook").decode(
        np.array([1, 2, 25]), incomplete="drop"
    ),
    r"there are 1 ids of codes, allowed: a multiple of 2$": lambda: BY_CODEBOOK.decode(
        np.array([11]), incomplete="drop"
    ),
    r"id 10 \(padding\) at place 1, allowed there: 0 to 9": lambda: SHARED.decode(np.array([1, 10, 2])),
    r"there are 3 ids of codes, allowed: a multiple of 2, or inc": lambda: FLAT.decode(np.array([1, 12, 2])),
    r"id 5 of codebook 1 at step 0, allowed before its delay of 1: 10": lambda: DELAYED.decode(
        np.array([[1, 2, 10], [5, 3, 4]])
    ),
    r"codebook 0 has codes after 1 whole frames": lambda: DELAYED.decode(np.array([[1, 2], [10, 3]])),
    r"id 10 \(padding\) in frame 1, codebook 0, allowed there: 0 to 9": lambda: DELAYED.decode(
        np.array([[1, 10, 3, 10], [10, 4, 5, 6]])
    ),
    r"ids have shape \(3, 1\), allowed: \(2, steps\)": lambda: DELAYED.decode(np.zeros((3, 1), np.int64)),
    r"incomplete is 'maybe', allowed: error, drop": lambda: FLAT.decode(np.array([1]), incomplete="maybe"),
    r"code 10 in frame 0, codebook 0, allowed there: 0 to 9": lambda: FLAT.encode(np.array([[10], [0]])),
    r"codes have shape \(3, 1\), allowed: \(2, frames\)": lambda: FLAT.encode(np.zeros((3, 1), int)),
    r"code 10 in row 1, frame 0, codebook 2, allowed": lambda: layouts.add_offsets(
        np.full((2, 3, 1), [[[0], [0], [0]], [[0], [0], [10]]]), 10
    ),
    r"id 10 in frame 0, codebook 0, allowed there: 0 to 9": lambda: layouts.remove_offsets(np.array([[10], [10]]), 10),
    r"codes are float64 of shape": lambda: layouts.flatten(np.zeros((2, 3))),
    r"codes are torch.bool of shape": lambda: layouts.flatten(torch.zeros(2, 3, dtype=torch.bool)),
    r"codes are a list, allowed": lambda: layouts.flatten([[1, 2]]),
    r"fill is None, allowed with lengths": lambda: layouts.flatten(np.zeros((1, 2, 3), int), lengths=[1]),
    r"lengths are \[4\], allowed: 1 of 0 to": lambda: layouts.flatten(np.zeros((1, 2, 3), int), lengths=[4], fill=9),
    r"order is 'time', allowed: frame, codebook": lambda: layouts.flatten(np.zeros((2, 3), int), "time"),
    r"there are 3 ids, allowed: a multiple of 2": lambda: layouts.unflatten(np.zeros(3, int), 2),
    r"pattern is \[1, 2\], allowed: 2 whole": lambda: layouts.delay(np.zeros((2, 3), int), [1, 2], fill=9),
    r"pattern is \[0\], allowed: 2 whole": lambda: layouts.delay(np.zeros((2, 3), int), [0], fill=9),
    r"delayed ids have 1 steps, allowed: at least 2": lambda: layouts.undelay(np.zeros((3, 1), int)),
    r"stereo codes have 3 codebooks, allowed: an even": lambda: layouts.deinterleave_stereo(np.zeros((3, 1), int)),
    r"right has shape \(1, 2\)": lambda: layouts.interleave_stereo(np.zeros((2, 2), int), np.zeros((1, 2), int)),
    r"first has shape \(3,\), allowed: \(2,\)": lambda: layouts.join_first(np.zeros(3, int), np.zeros((1, 2), int)),
    r"there are no rows of ids": lambda: layouts.pad_ids([], 0),
    r"rows of ids have shapes \[\(\), \(2,\)\]": lambda: layouts.pad_ids([np.zeros(1, int), np.zeros((2, 1), int)], 0),
    r"attention_mask has shape \(1, 2\)": lambda: layouts.unpad_ids(np.zeros((1, 3), int), np.zeros((1, 2), int)),
    r"codebook_size is 10.5": lambda: layouts.add_offsets(np.zeros((2, 3), int), 10.5),
    r"frames start at -2, allowed with lengths: 0 or more": lambda: layouts.slice_frames(
        np.zeros((2, 6), int), slice(-2, None), num_quantizers=2, lengths=[2, 3], fill=9
    ),
    r"frames have a step of 2, allowed: 1": lambda: FLAT.slice_frames(np.zeros(4, int), slice(0, 2, 2)),
    r"bandwidth is None, allowed: one of \[1.5, 3.0": lambda: CodeVocabulary.for_model(CONFIG),
    r"bandwidth is 4.0, allowed: one of": lambda: CodeVocabulary.for_model(CONFIG, bandwidth=4.0),
    r"bandwidth 6.0 and num_quantizers 4 given": lambda: CodeVocabulary.for_model(CONFIG, 4, bandwidth=6.0),
    r"num_quantizers is 33, allowed: 1 to 32": lambda: CodeVocabulary.for_model(CONFIG, 33),
    r"bos_token_id is 19, allowed: 20 or more": lambda: CodeVocabulary(10, 2, 75, bos_token_id=19),
    r"layout is 'flat', allowed: frame, codebook, delay": lambda: CodeVocabulary(10, 2, 75, "flat"),
    r"pattern is \(0, 1\), allowed with layout 'frame': none": lambda: CodeVocabulary(10, 2, 75, "frame", (0, 1)),
    r"codebook_size is 0, allowed": lambda: CodeVocabulary(0, 2, 75),
    r"frame_rate is 0, allowed: above 0": lambda: CodeVocabulary(10, 2, 0),
}


@pytest.mark.parametrize("line", REFUSED)
def test_refusals(line):
    with pytest.raises(ValueError, match=line) as error:
        REFUSED[line]()
    assert "\n" not in str(error.value)


def test_no_torch_is_imported():
    modules = "modeling_encodec.processors.code_layouts, modeling_encodec.processors.code_vocabulary"
    code = f"import sys, {modules}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
