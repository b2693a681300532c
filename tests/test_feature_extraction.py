"""EncodecFeatureExtractor: every kind of input, equal tensors to stock, and clear refusals."""

import json

import numpy as np
import pytest
import torch
import transformers
from conftest import noise

from modeling_encodec.processors.feature_extraction_encodec import EncodecFeatureExtractor


MONO = EncodecFeatureExtractor()
STEREO = EncodecFeatureExtractor(2, 48000, chunk_length_s=1.0, overlap=0.01)
CLIP = noise(1, 1, 1000)[0, 0].numpy()
PAIR = noise(1, 2, 1000)[0].numpy()


def run(extractor, audio, **options):
    options = {"sampling_rate": extractor.sampling_rate, "return_tensors": "pt"} | options
    return extractor(audio, **options)


@pytest.mark.parametrize(
    "audio",
    [
        CLIP,
        CLIP[None],
        CLIP.tolist(),
        CLIP.astype(np.float64),
        torch.from_numpy(CLIP),
        [CLIP],
        [CLIP.tolist()],
        (torch.from_numpy(CLIP),),
        CLIP[None, None],
        torch.from_numpy(CLIP)[None, None],
    ],
    ids=lambda audio: type(audio).__name__,
)
def test_every_kind_of_mono_input(audio):
    inputs = run(MONO, audio)
    assert inputs["input_values"].dtype == torch.float32
    assert torch.equal(inputs["input_values"], torch.from_numpy(CLIP)[None, None])
    assert inputs["padding_mask"].tolist() == [[1] * 1000]


@pytest.mark.parametrize("audio", [PAIR, PAIR.tolist(), [PAIR], PAIR[None], torch.from_numpy(PAIR)])
def test_every_kind_of_stereo_input(audio):
    if isinstance(audio, list) and isinstance(audio[0], list):
        audio = [audio]  # a bare list of lists is a batch of clips, as in stock
    assert torch.equal(run(STEREO, audio)["input_values"], torch.from_numpy(PAIR)[None])


@pytest.mark.parametrize(
    ("dtype", "full_scale"), [(np.int16, 32768), (np.int32, 2**31), (np.float64, 1), (np.float16, 1)]
)
def test_samples_are_scaled_to_one(dtype, full_scale):
    expected = np.array([0.0, 0.5, -1.0, 0.25], dtype=np.float32)
    samples = (expected.astype(np.float64) * full_scale).astype(dtype)
    assert run(MONO, samples, return_tensors="np")["input_values"][0, 0].tolist() == expected.tolist()


def test_unsigned_bytes_are_centred():
    values = run(MONO, np.array([128, 0, 192], dtype=np.uint8))["input_values"]
    assert values[0, 0].tolist() == [0.0, -1.0, 0.5]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("options", [{}, {"padding": True}, {"padding": "max_length", "max_length": 1500}])
def test_mono_tensors_are_those_of_stock(options, side):
    rows = [CLIP, CLIP[:300], CLIP[:1]]
    stock = transformers.EncodecFeatureExtractor(padding_side=side)
    ours, theirs = run(EncodecFeatureExtractor(padding_side=side), rows, **options), run(stock, rows, **options)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype, key


def test_stereo_tensors_are_those_of_stock_without_its_extra_padding():
    rows = [noise(1, 2, n)[0].numpy() for n in (60000, 20000)]
    stock = transformers.EncodecFeatureExtractor(2, 48000, chunk_length_s=1.0, overlap=0.01)
    ours, theirs = run(STEREO, rows), run(stock, rows)
    assert ours["input_values"].shape == (2, 2, 60000)
    for key in ours:
        assert torch.equal(ours[key], theirs[key][..., :60000]) and not theirs[key][..., 60000:].any()


@torch.no_grad()
def test_stock_tensors_code_alike(small_models):
    """What the stock extractor adds to 48 kHz audio is masked, so the codes are those of the audio."""
    model = small_models["48khz"]
    rows = [noise(1, 2, n)[0].numpy() for n in (60000, 20000, 47521)]
    stock = transformers.EncodecFeatureExtractor(2, 48000, chunk_length_s=1.0, overlap=0.01)
    ours, theirs = (model.encode(**run(extractor, rows)) for extractor in (STEREO, stock))
    assert torch.equal(ours.audio_codes, theirs.audio_codes)
    assert ours.audio_lengths.tolist() == theirs.audio_lengths.tolist() == [60000, 20000, 47521]


def test_no_padding_and_no_tensors():
    inputs = MONO([CLIP, CLIP[:10]], sampling_rate=24000, padding=False)
    assert [row.shape for row in inputs["input_values"]] == [(1, 1000), (1, 10)] and "padding_mask" not in inputs
    inputs = MONO([CLIP, CLIP[:10]], sampling_rate=24000)
    assert isinstance(inputs["input_values"], list) and inputs["input_values"][1].shape == (1, 1000)


def test_truncation():
    inputs = run(MONO, [CLIP, CLIP[:500]], padding=False, truncation=True, max_length=200)
    assert inputs["input_values"].shape == (2, 1, 200)
    assert run(MONO, [CLIP, CLIP[:500]], padding=False, truncation=True)["input_values"].shape == (2, 1, 500)


@pytest.mark.parametrize(
    ("extractor", "audio", "message"),
    [
        (MONO, PAIR, r"Clip 0 has shape \(2, 1000\), allowed: \(1, samples\) or \(samples,\)"),
        (MONO, CLIP[:, None], "transposed"),
        (STEREO, PAIR.T, r"\(1000, 2\), allowed: \(2, samples\); it looks transposed"),
        (STEREO, CLIP, r"\(1000,\)"),
        (MONO, [], "no audio"),
        (MONO, np.zeros(0), "Clip 0 is empty"),
        (MONO, [CLIP, CLIP[:0]], "Clip 1 is empty"),
        (MONO, [CLIP, np.array([0.0, np.nan])], "Clip 1 holds NaN"),
        (MONO, np.array([0.0, -np.inf]), "infinity"),
        (MONO, np.zeros((1, 1, 1, 5)), r"\(1, 1, 1, 5\)"),
        (MONO, np.zeros(5, dtype=np.int64) + 9, "int64"),
        (MONO, np.zeros(5, dtype=np.complex64), "complex64"),
        (MONO, np.array(["a", "b"]), "allowed: floating point"),
        (MONO, [[0.1, 0.2], [0.3]], None),
    ],
)
def test_refuses_what_is_no_clip(extractor, audio, message):
    if message is None:  # ragged lists are fine: they are two clips
        assert run(extractor, audio)["padding_mask"].tolist() == [[1, 1], [1, 0]]
        return
    with pytest.raises(ValueError, match=message) as caught:
        run(extractor, audio)
    assert "\n" not in str(caught.value)


def test_refuses_another_rate_naming_both():
    with pytest.raises(ValueError, match="44100 Hz.*24000 Hz"):
        MONO(CLIP, sampling_rate=44100)


def test_tensors_of_any_kind():
    clip = torch.from_numpy(CLIP)
    for tensor in (clip.requires_grad_(), clip.detach().to(torch.bfloat16), (clip.detach() * 32768).to(torch.int16)):
        values = run(MONO, tensor)["input_values"]
        torch.testing.assert_close(values[0, 0], clip.detach(), rtol=1e-2, atol=1e-3)


def test_refuses_numbers_that_make_no_sense():
    for length in (0, -5):
        with pytest.raises(ValueError, match=f"max_length is {length}"):
            run(MONO, CLIP, padding=False, truncation=True, max_length=length)
    with pytest.raises(ValueError, match="sampling_rate is 0"):
        EncodecFeatureExtractor(sampling_rate=0)


def test_refuses_padding_with_truncation_and_unknown_padding():
    with pytest.raises(ValueError, match="Both padding and truncation"):
        run(MONO, CLIP, padding=True, truncation=True)
    with pytest.raises(ValueError, match="'left'"):
        run(MONO, CLIP, padding="left")
    with pytest.raises(ValueError, match="feature_size is 0"):
        EncodecFeatureExtractor(0)
    with pytest.raises(ValueError, match="padding_side is 'both', allowed: right, left"):
        EncodecFeatureExtractor(padding_side="both")


def test_saved_json_serves_both_classes(tmp_path):
    STEREO.save_pretrained(tmp_path)
    stock = transformers.EncodecFeatureExtractor.from_pretrained(tmp_path)
    again = EncodecFeatureExtractor.from_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    reference = transformers.EncodecFeatureExtractor(2, 48000, chunk_length_s=1.0, overlap=0.01).to_dict()
    assert saved.keys() >= reference.keys()
    for key, value in reference.items():
        assert getattr(again, key, value) == getattr(stock, key, value) == value
    assert (again.chunk_length, again.chunk_stride) == (stock.chunk_length, stock.chunk_stride) == (48000, 47520)
