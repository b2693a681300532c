"""The codec on a GPU gives the codes and the audio of the CPU, of what is there and of what comes from the CPU."""

import copy

import pytest
import torch
from devices import assert_near, assert_on, assert_same_codes, moved, ragged


NAMES = ("24khz", "48khz", "32khz")
pytestmark = pytest.mark.parametrize("name", NAMES)


def batches(model) -> dict:
    """Audio and mask by what is particular to them."""
    rate, channels = model.config.sampling_rate, model.config.audio_channels
    lengths = [rate // 4 + 11, rate // 6, rate // 4 + 11, 901]
    if model.config.chunk_length is not None:
        lengths[1] = int(1.1 * rate)
    audio, mask = ragged(lengths, channels)
    return {
        "one row": (audio[:1], None),
        "equal rows": (audio[:3, :, :5000], None),
        "ragged rows": (audio, mask),
        "padded on the left": (audio.flip(2), mask.flip(1)),
    }


@pytest.fixture
def model(small_models, name):
    return small_models[name]


@pytest.fixture
def there(device, model):
    return copy.deepcopy(model).to("cuda")


QUICK, SLOW = ["ragged rows", "padded on the left"], ["one row", "equal rows"]


@pytest.fixture(params=[*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def batch(request, model):
    return batches(model)[request.param]


@torch.no_grad()
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_encode_and_decode(model, there, batch, where):
    audio, mask = batch
    quantizers = model.config.num_quantizers
    expected = model.encode(audio, mask, num_quantizers=quantizers)
    coded = there.encode(*moved((audio, mask), where), num_quantizers=quantizers)
    assert_same_codes(coded.audio_codes, expected.audio_codes)
    assert_on("cuda:0", coded.audio_codes, coded.codes_lengths, coded.audio_lengths)
    given = {key: moved(value, where) for key, value in expected.items()}
    decoded, sound = there.decode(**given), model.decode(**expected)
    assert_near(decoded.audio_values, sound.audio_values)
    assert decoded.audio_lengths.tolist() == sound.audio_lengths.tolist()
    by_mask = there.decode(given["audio_codes"], given["audio_scales"], moved(mask, where))
    assert_near(by_mask.audio_values, model.decode(expected.audio_codes, expected.audio_scales, mask).audio_values)
    for row, other in zip(decoded.rows(), sound.rows()):
        assert_near(row, other)


@torch.no_grad()
def test_forward_and_embed(model, there, batch):
    audio, mask = batch
    ours, theirs = there(*moved(batch, "cuda")), model(audio, mask)
    assert_same_codes(ours.audio_codes, theirs.audio_codes)
    if torch.equal(ours.audio_codes.cpu(), theirs.audio_codes):
        assert_near(ours.audio_values, theirs.audio_values)
    assert_near(there.embed(theirs.audio_codes), model.embed(theirs.audio_codes))


def test_inference_mode(model, there):
    audio, mask = batches(model)["ragged rows"]
    with torch.inference_mode():
        coded = there.encode(audio.to("cuda"), mask.to("cuda"))
        assert_same_codes(coded.audio_codes, model.encode(audio, mask).audio_codes)
        there.decode(**coded)


@torch.no_grad()
def test_on_the_second_device(model, second_device):
    audio, mask = batches(model)["ragged rows"]
    there = copy.deepcopy(model).to("cuda:1")
    coded, expected = there.encode(audio, mask), model.encode(audio, mask)
    assert_on("cuda:1", coded.audio_codes, coded.codes_lengths)
    assert_same_codes(coded.audio_codes, expected.audio_codes)
    decoded = there.decode(**expected)
    assert_on("cuda:1", decoded.audio_values)
    assert_near(decoded.audio_values, model.decode(**expected).audio_values)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision_is_that_of_the_cpu(model, there, dtype):
    audio, mask = batches(model)["ragged rows"]
    here = copy.deepcopy(model).to(dtype)
    there = there.to(dtype)
    coded, expected = there.encode(audio.to("cuda"), mask), here.encode(audio, mask)
    agreed = (coded.audio_codes.cpu() == expected.audio_codes).float().mean()
    assert agreed > 0.8, agreed  # rounding depends on how sums are split
    decoded = there.decode(**moved(dict(expected), "cuda")).audio_values
    assert decoded.dtype == dtype
    assert_near(decoded, here.decode(**expected).audio_values, 0.1)


@torch.no_grad()
def test_fast_and_exact_again(model, there):
    audio, mask = batches(model)["ragged rows"]
    exact = model.encode(audio, mask)
    there.precision = "fast"
    assert there.compute_dtype == torch.bfloat16
    coded = there.encode(audio.to("cuda"), mask)
    assert (coded.audio_codes.cpu() == exact.audio_codes).float().mean() > 0.5
    assert there.decode(**coded).audio_values.dtype == torch.float32
    there.decode(**there.encode(audio[:1]))
    there.precision = "exact"
    assert_same_codes(there.encode(audio, mask).audio_codes, exact.audio_codes)


@pytest.mark.parametrize("mode", ["eval", pytest.param("train", marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_cpu(model, there, mode):
    audio, mask = batches(model)["ragged rows"]
    found = []
    for one, where in ((copy.deepcopy(model), "cpu"), (there, "cuda")):
        one.train(mode == "train")
        given = audio.clone().to(where).requires_grad_()
        latents = one.encode(given, moved(mask, where), return_latents=True).latents
        steady = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        (latents * steady.to(where)).sum().backward()
        weight = one.encoder.layers[0].conv.bias.grad
        found.append([part / part.abs().max() for part in (given.grad.cpu(), weight.cpu())])
    for ours, theirs in zip(*found):
        assert_near(ours, theirs, 1e-2)  # of the one behind normalised groups float32 leaves no more


def test_decoder_learns(model, there):
    audio, mask = batches(model)["ragged rows"]
    there.train()
    there(audio.to("cuda"), mask.to("cuda")).audio_values.square().sum().backward()
    assert_on("cuda:0", there.decoder.layers[0].conv.bias.grad)


@torch.no_grad()
def test_moved_back_and_forth(model, there):
    audio, mask = batches(model)["ragged rows"]
    expected = model.encode(audio, mask).audio_codes
    there.encode(audio, mask)
    back = there.to("cpu")
    assert torch.equal(back.encode(audio, mask).audio_codes, expected)
    assert_same_codes(back.to("cuda").encode(audio, mask).audio_codes, expected)


@torch.no_grad()
def test_wrong_input_is_told_as_on_the_cpu(model, there):
    channels = model.config.audio_channels
    for audio in (torch.full((1, channels, 500), torch.nan), torch.zeros(1, channels + 1, 500), torch.zeros(0)):
        with pytest.raises(ValueError) as here:
            model.encode(audio)
        with pytest.raises(ValueError) as error:
            there.encode(audio.to("cuda"))
        assert str(error.value) == str(here.value)
    coded = model.encode(torch.zeros(1, channels, 500))
    with pytest.raises(ValueError, match="allowed: 0 to 63"):
        there.decode(**(dict(moved(dict(coded), "cuda")) | {"audio_codes": coded.audio_codes.to("cuda") + 64}))


@torch.no_grad()
def test_lstm_weights_lie_in_one_piece(device, model, there):
    """Otherwise cuDNN copies them at every call, and PyTorch warns."""
    if device.real:
        pytest.skip("noted by the pretended device")
    audio = batches(model)["one row"][0].to("cuda")
    there.encode(audio)
    assert not device.counts.notes
