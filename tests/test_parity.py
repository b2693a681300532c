"""Ours = the `encodec` package = Transformers, with the same weights: codes, scales, audio."""

import pytest
import torch
import transformers
from conftest import noise
from peers import import_encodec, original_model, stock_model
from ties import count_ties


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # the original's weight norm

SECONDS = [0.5, 2.37, 10]
SAMPLES = [1, 319, 320, 321]


def lengths(rate: int) -> list[int]:
    return [*SAMPLES, rate - 1, rate, rate + 1, *(int(seconds * rate) for seconds in SECONDS)]


@pytest.fixture(scope="module")
def originals(released_models):
    if import_encodec() is None:
        pytest.skip("the encodec package is not installed")
    return {name: original_model(released_models[name]) for name in ("24khz", "48khz")}


@pytest.fixture(scope="module")
def stocks(released_models):
    return {name: stock_model(model) for name, model in released_models.items()}


@torch.inference_mode()
def code(model, audio):
    return model.encode(audio, bandwidth=model.config.target_bandwidths[-1], return_latents=True)


@pytest.mark.parametrize("index", range(10))
@pytest.mark.parametrize("name", ["24khz", "48khz"])
@torch.inference_mode()
def test_equal_to_the_original(name, index, released_models, originals):
    model, original = released_models[name], originals[name]
    samples = lengths(model.config.sampling_rate)[index]
    audio = noise(1, model.config.audio_channels, samples, seed=index)
    ours = code(model, audio)
    original.set_target_bandwidth(model.config.target_bandwidths[-1])
    theirs = original.encode(audio)
    assert len(theirs) == len(ours.audio_codes)
    ties = 0
    for (codes, scale), chunk, our_scale, latents in zip(theirs, ours.audio_codes, ours.audio_scales, ours.latents):
        frames = codes.shape[-1]
        ties += count_ties(model, latents[..., :frames], chunk[..., :frames], codes)
        assert (chunk[..., frames:] == 0).all()
        assert (scale is None and our_scale is None) or torch.equal(scale, our_scale)
    assert ties <= 1e-3 * ours.codes_lengths.item()
    decoded = model.decode(*ours.to_tuple()[:2], audio_lengths=ours.audio_lengths)[0]
    expected = original.decode(theirs)[..., :samples]
    if ties == 0:
        torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)
    assert decoded.shape == audio.shape


@pytest.mark.parametrize("index", range(10))
@pytest.mark.parametrize("name", ["24khz", "48khz", "32khz"])
@torch.inference_mode()
def test_equal_to_stock_transformers(name, index, released_models, stocks):
    model, stock = released_models[name], stocks[name]
    samples = lengths(model.config.sampling_rate)[index]
    audio = noise(1, model.config.audio_channels, samples, seed=index)
    ours = code(model, audio)
    bandwidth = model.config.target_bandwidths[-1]
    theirs = stock.encode(audio, bandwidth=bandwidth)
    ties = count_ties(model, ours.latents, ours.audio_codes, theirs.audio_codes)
    assert ties <= 1e-3 * ours.codes_lengths.item()
    assert ours.last_frame_pad_length == theirs.last_frame_pad_length
    assert len(ours.audio_scales) == len(theirs.audio_scales)
    for our_scale, scale in zip(ours.audio_scales, theirs.audio_scales):
        assert (scale is None and our_scale is None) or torch.equal(scale, our_scale)
    arguments = (theirs.audio_codes, theirs.audio_scales, torch.ones(1, samples), False, theirs.last_frame_pad_length)
    torch.testing.assert_close(model.decode(*arguments)[0], stock.decode(*arguments)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rate", [24000, 48000])
@torch.inference_mode()
def test_equal_on_real_audio(rate, released_models, originals, real_clip):
    name = f"{rate // 1000}khz"
    model, original = released_models[name], originals[name]
    audio = real_clip(rate)[..., : 5 * rate]
    ours = code(model, audio)
    original.set_target_bandwidth(model.config.target_bandwidths[-1])
    for (codes, _), chunk, latents in zip(original.encode(audio), ours.audio_codes, ours.latents):
        frames = codes.shape[-1]
        assert count_ties(model, latents[..., :frames], chunk[..., :frames], codes) <= 1


@torch.inference_mode()
def test_the_bundled_checkpoint_gives_stock_codes_on_real_audio(bundled_model, real_clip):
    stock, audio = stock_model(bundled_model), real_clip(24000)[..., :240000]
    ours = code(bundled_model, audio)
    theirs = stock.encode(audio, bandwidth=12.0)
    assert count_ties(bundled_model, ours.latents, ours.audio_codes, theirs.audio_codes) <= 1
    torch.testing.assert_close(
        bundled_model.decode(theirs.audio_codes)[0], stock.decode(theirs.audio_codes, [None])[0], rtol=0, atol=1e-5
    )


@torch.inference_mode()
def test_stock_calls_run_unchanged(small_models):
    """The same lines on both classes: tuple and dict outputs, defaults, keywords, forward with codes."""
    for name in ("24khz", "32khz"):
        model = small_models[name]
        stock, audio = stock_model(model), noise(2, 1, 7000)
        mask = torch.ones(2, 7000, dtype=torch.bool)
        for codec in (model, stock):
            codes, scales, pad = codec.encode(audio, mask, return_dict=False)
            assert codes.shape[:2] == (1, 2) and scales == [None] and pad == 0
            (values,) = codec.decode(codes, scales, mask, return_dict=False)
            assert values.shape == audio.shape
            output = codec(audio, mask, codec.config.target_bandwidths[-1])
            assert output[0] is output.audio_codes and output[1] is output.audio_values
            assert codec(audio, mask, return_dict=False)[1].shape == audio.shape
        torch.testing.assert_close(model(audio).audio_values, stock(audio).audio_values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["24khz", "48khz", "32khz"])
@torch.no_grad()
def test_the_parts_are_called_as_in_stock(name, small_models):
    """Bark decodes through `quantizer` and `decoder`, others take latents from `encoder`."""
    model = small_models[name]
    stock, audio = stock_model(model), noise(3, model.config.audio_channels, 9000)
    bandwidth = model.config.target_bandwidths[-1]
    latents = stock.encoder(audio)
    torch.testing.assert_close(model.encoder(audio), latents, rtol=0, atol=1e-5 * latents.abs().max().item())
    codes = stock.quantizer.encode(latents, bandwidth)
    assert codes.shape == model.quantizer.encode(latents, bandwidth).shape
    count_ties(model, latents, model.quantizer.encode(latents, bandwidth).transpose(0, 1), codes.transpose(0, 1))
    for quantizer in (model.quantizer, stock.quantizer):
        assert quantizer.get_num_quantizers_for_bandwidth(bandwidth) == len(codes)
    embedded = stock.quantizer.decode(codes)
    assert torch.equal(model.quantizer.decode(codes), embedded)
    torch.testing.assert_close(model.decoder(embedded), stock.decoder(embedded), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_original_fails_where_the_readme_says_so(released_models, originals):
    """Chunks of 150, 150 and 1 frames: the second ends after the third, for which the original has no room."""
    audio = noise(1, 2, 95201)
    with pytest.raises(RuntimeError):
        originals["48khz"](audio)
    model = released_models["48khz"]
    assert model.decode(**model.encode(audio)).audio_values.shape == audio.shape


@torch.no_grad()
def test_where_stock_differs_at_48_khz_is_as_the_readme_says(small_models):
    """Each row of the README's table; when stock mends one, this fails and the row goes."""
    model = small_models["48khz"]
    stock = stock_model(model)
    bandwidth = model.config.target_bandwidths[-1]
    extract = transformers.EncodecFeatureExtractor(2, 48000, chunk_length_s=1.0, overlap=0.01)
    audio = noise(1, 2, int(2.37 * 48000))
    inputs = extract(audio[0].numpy(), sampling_rate=48000, return_tensors="pt")
    theirs = stock.encode(**inputs, bandwidth=bandwidth)
    ours = model.encode(**inputs, bandwidth=bandwidth)
    assert (len(theirs.audio_codes), len(ours.audio_codes)) == (4, 3)  # a phantom chunk
    last = model.config.num_frames(audio.shape[2] - 2 * 47520)
    assert not torch.allclose(theirs.audio_scales[2], ours.audio_scales[2])  # the last chunk padded
    assert (theirs.audio_codes[2, ..., :last] != ours.audio_codes[2, ..., :last]).float().mean() > 0.1
    for samples in (95041, 95200):
        assert model.encode(noise(1, 2, samples)).audio_codes.shape[0] == 3
        with pytest.raises(RuntimeError):
            stock.encode(noise(1, 2, samples))
    for samples in (95201, 95360):
        coded = model.encode(noise(1, 2, samples))
        assert model.decode(**coded).audio_values.shape[2] == samples
        with pytest.raises(RuntimeError):
            stock.decode(coded.audio_codes, coded.audio_scales, last_frame_pad_length=coded.last_frame_pad_length)
    assert not hasattr(stock(audio), "audio_scales")
    with pytest.raises(ValueError, match="bigger than zero"):
        stock.bfloat16().decode(ours.audio_codes, [scale.bfloat16() for scale in ours.audio_scales])
