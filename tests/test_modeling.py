"""EncodecModel's own interface: what it returns beyond stock, what it refuses, folded weights, gradients."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, noise

from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.layers_encodec import NormedConvolution
from modeling_encodec.models.modeling_encodec import EncodecModel


@pytest.fixture
def fresh():
    """A small 24 kHz model of its own, to be changed."""
    return make_model(EncodecConfig.preset_24khz(num_filters=4, hidden_size=16, target_bandwidths=[1.5, 3.0]))


# ---- what it takes and returns


@torch.no_grad()
def test_short_form_of_the_model_card(small_models):
    model, audio = small_models["24khz"], noise(1, 1, 5000)
    codes = model.encode(audio)[0]
    decoded = model.decode(codes)
    assert decoded[0].shape == (1, 1, 5120)  # whole frames: codes alone do not tell the length
    assert torch.equal(model.decode(codes[0])[0], decoded[0])
    assert torch.equal(model.decode(**model.encode(audio))[0], decoded[0][..., :5000])


@torch.no_grad()
def test_decode_of_encode_for_every_model(small_models):
    for model in small_models.values():
        audio = noise(2, model.config.audio_channels, 60000)
        for return_latents in (False, True):
            output = model.decode(**model.encode(audio, return_latents=return_latents))
            assert output.audio_values.shape == audio.shape and output.audio_lengths.tolist() == [60000, 60000]


@torch.no_grad()
def test_num_quantizers_beside_bandwidth(small_models):
    model, audio = small_models["24khz"], noise(1, 1, 3200)
    whole = model.encode(audio, num_quantizers=model.config.num_quantizers).audio_codes
    for count in range(1, model.config.num_quantizers + 1):
        codes = model.encode(audio, num_quantizers=count).audio_codes
        assert torch.equal(codes, whole[:, :, :count])
    low, high = (model.encode(audio, bandwidth=b).audio_codes.shape[2] for b in (0.9, 3.6))
    assert (low, high) == (2, 8)
    assert torch.equal(model.encode(audio).audio_codes, whole[:, :, :2])  # the smallest, as in stock


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bandwidth": 5.0}, r"5\.0.*0\.9"),
        ({"num_quantizers": 0}, "num_quantizers is 0, allowed: 1 to 8"),
        ({"num_quantizers": 9}, "num_quantizers is 9, allowed: 1 to 8"),
        ({"num_quantizers": -1}, "num_quantizers is -1"),
        ({"num_quantizers": 2.0}, "num_quantizers is 2.0"),
        ({"num_quantizers": True}, "num_quantizers is True"),
        ({"num_quantizers": 1, "bandwidth": 0.9}, "allowed: one"),
    ],
)
def test_encode_refuses_counts_it_does_not_have(small_models, arguments, message):
    with pytest.raises(ValueError, match=message):
        small_models["24khz"].encode(noise(1, 1, 3200), **arguments)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (torch.zeros(1, 2, 100), r"\(1, 2, 100\), allowed: \(batch, 1, samples\)"),
        (torch.zeros(1, 1, 0), r"\(1, 1, 0\)"),
        (torch.zeros(0, 1, 100), r"\(0, 1, 100\)"),
        (torch.zeros(1, 1, 1, 100), r"\(1, 1, 1, 100\)"),
        (torch.zeros(1, 1, 100, dtype=torch.bool), "bool"),
        (torch.full((1, 1, 100), 5), "int64"),
        (torch.full((1, 1, 100), torch.nan), "NaN"),
        (torch.full((1, 1, 100), torch.inf), "infinity"),
        (None, "NoneType, allowed: a tensor"),
        ("audio", "str, allowed"),
    ],
)
def test_encode_refuses_audio_it_cannot_take(small_models, audio, message):
    with pytest.raises(ValueError, match=message) as caught:
        small_models["24khz"].encode(audio)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 99), "padding_mask has shape"),
        (torch.ones(2, 100), "padding_mask has shape"),
        (torch.zeros(1, 100), "row 0"),
        (torch.cat([torch.zeros(1, 50), torch.ones(1, 40), torch.zeros(1, 10)], 1), "on the right or on the left"),
        (torch.cat([torch.ones(1, 50), torch.zeros(1, 40), torch.ones(1, 10)], 1), "on the right or on the left"),
    ],
)
def test_encode_refuses_masks_that_are_no_padding(small_models, mask, message):
    with pytest.raises(ValueError, match=message):
        small_models["24khz"].encode(torch.zeros(1, 1, 100), mask)


@torch.no_grad()
def test_masks_of_any_dtype_and_with_channels(small_models):
    model, audio = small_models["48khz"], noise(1, 2, 9000)
    expected = model.encode(audio[..., :8000]).audio_codes
    for dtype in (torch.bool, torch.int32, torch.float32):
        mask = (torch.arange(9000) < 8000).to(dtype)[None]
        assert torch.equal(model.encode(audio, mask).audio_codes, expected)
        assert torch.equal(model.encode(audio, mask.expand(2, 9000)[None]).audio_codes, expected)


@torch.no_grad()
def test_audio_of_fewer_dimensions(small_models):
    mono, stereo = small_models["24khz"], small_models["48khz"]
    audio = noise(3, 1, 3000)
    assert torch.equal(mono.encode(audio[0, 0]).audio_codes, mono.encode(audio[:1]).audio_codes)
    assert torch.equal(mono.encode(audio[:, 0]).audio_codes, mono.encode(audio).audio_codes)
    audio = noise(1, 2, 3000)
    assert torch.equal(stereo.encode(audio[0]).audio_codes, stereo.encode(audio).audio_codes)


@torch.no_grad()
def test_embed_is_what_the_decoder_decodes(small_models):
    for model in small_models.values():
        coded = model.encode(noise(2, model.config.audio_channels, 40000), num_quantizers=3)
        vectors = model.embed(coded.audio_codes)
        chunks, batch, _, frames = coded.audio_codes.shape
        assert vectors.shape == (chunks, batch, model.config.hidden_size, frames) and vectors.dtype == torch.float32
        one = sum(model.quantizer.layers[k].codebook.embed[coded.audio_codes[0, 1, k, 5]] for k in range(3))
        torch.testing.assert_close(vectors[0, 1, :, 5], one)
        assert torch.equal(model.embed(coded.audio_codes[0]), vectors[0])
        assert torch.equal(model.embed(coded.audio_codes[0, 0]), vectors[0, 0])


@torch.no_grad()
def test_forward_gives_the_scales_so_that_its_codes_decode_again(small_models):
    model, audio = small_models["48khz"], noise(1, 2, 60000)
    output = model(audio)
    again = model.decode(output.audio_codes, output.audio_scales, audio_lengths=output.audio_lengths)
    assert torch.equal(again.audio_values, output.audio_values)
    given = model(audio, audio_codes=output.audio_codes, audio_scales=output.audio_scales)
    assert given.audio_values.shape == audio.shape
    with pytest.raises(ValueError, match="audio_codes"):
        model(audio, audio_scales=output.audio_scales)
    with pytest.raises(ValueError, match="both None"):
        model()


@torch.no_grad()
def test_a_stereo_decode_without_its_scales_is_refused(small_models):
    model = small_models["48khz"]
    coded = model.encode(noise(1, 2, 60000))
    for scales in (None, [None, None], coded.audio_scales[:1], [None, coded.audio_scales[1]], [torch.ones(2, 1)] * 2):
        with pytest.raises(ValueError, match="audio_scales"):
            model.decode(coded.audio_codes, scales)


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        (torch.full((1, 1, 2, 5), 64), {}, "from 64 to 64, allowed: 0 to 63"),
        (torch.full((1, 1, 2, 5), -1), {}, "from -1 to -1"),
        (torch.zeros(1, 1, 2, 5), {}, "float32, allowed: whole numbers"),
        (torch.zeros(1, 1, 9, 5, dtype=torch.long), {}, "at most 8 codebooks"),
        (torch.zeros(1, 1, 2, 0, dtype=torch.long), {}, r"\(1, 1, 2, 0\)"),
        (torch.zeros(2, 1, 2, 5, dtype=torch.long), {}, "2 chunks, allowed: 1"),
        (torch.zeros(2, 5, dtype=torch.long), {}, r"\(2, 5\)"),
        (torch.zeros(1, 1, 2, 5, dtype=torch.long), {"audio_lengths": [9999]}, "do not hold"),
        (torch.zeros(1, 1, 2, 5, dtype=torch.long), {"audio_lengths": [0]}, "at least 1 sample"),
        (torch.zeros(1, 1, 2, 5, dtype=torch.long), {"audio_lengths": [5, 5]}, "1 of at least"),
        (torch.zeros(1, 1, 2, 5, dtype=torch.long), {"codes_lengths": [6]}, "1 of 1 to 5 frames"),
        (torch.zeros(1, 1, 2, 5, dtype=torch.long), {"last_frame_pad_length": 5}, "allowed: 0 to 4"),
        (torch.zeros(1, 1, 2, 5, dtype=torch.long), {"last_frame_pad_length": 1.5}, "allowed: 0 to 4"),
        (torch.zeros(1, 1, 2, 5, dtype=torch.long), {"audio_lengths": 5}, "one whole number a row"),
        (torch.zeros(1, 1, 2, 5, dtype=torch.long), {"codes_lengths": [2.5]}, "one whole number a row"),
        (torch.zeros(1, 1, 2, 5, dtype=torch.bool), {}, "bool, allowed: whole numbers"),
        ("codes", {}, "str, allowed"),
    ],
)
def test_decode_refuses_codes_that_are_none(small_models, codes, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        small_models["24khz"].decode(codes, **options)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_stock_layout_of_stereo_codes_decodes(small_models):
    """Codes made from audio padded to full chunks, phantom included, decode as stock decodes them, cut by the mask."""
    model, samples = small_models["48khz"], 113760
    padded = torch.nn.functional.pad(noise(1, 2, samples), (0, 2 * 47520 + 48000 - samples))
    mask = torch.arange(padded.shape[-1]) < samples
    coded = model.encode(padded)
    assert len(coded.audio_codes) == 4
    decoded = model.decode(coded.audio_codes, coded.audio_scales, mask[None], None, coded.last_frame_pad_length)
    assert decoded.audio_lengths.tolist() == [samples]
    expected = model.decode(**coded).audio_values[..., :samples]
    torch.testing.assert_close(decoded.audio_values[..., :samples], expected)


@torch.no_grad()
def test_arrays_and_lists_do_as_tensors(small_models):
    model, audio = small_models["48khz"], noise(1, 2, 60000)
    coded = model.encode(audio)
    again = model.encode(audio.numpy(), [[1] * 60000])
    assert torch.equal(again.audio_codes, coded.audio_codes)
    scales = [scale.item() for scale in coded.audio_scales]
    decoded = model.decode(coded.audio_codes.numpy(), scales, audio_lengths=[60000])
    assert torch.equal(decoded.audio_values, model.decode(**coded).audio_values)


def test_embed_and_scales_refuse_what_they_cannot_take(small_models):
    model = small_models["48khz"]
    for codes, message in (
        (torch.full((1, 1, 2, 5), 64), "allowed: 0 to 63"),
        (torch.zeros(1, 99, 5, dtype=torch.long), "codebooks"),
        (torch.zeros(1, 2, 5), "whole numbers"),
        (torch.zeros(5, dtype=torch.long), r"\(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.embed(codes)
    with pytest.raises(ValueError, match="NaN"):
        model.decode(torch.zeros(1, 1, 2, 5, dtype=torch.long), [torch.tensor([[torch.nan]])])


# ---- folded weights


@torch.no_grad()
def test_folding_changes_nothing(fresh):
    audio = noise(1, 1, 4000)
    folded = fresh.encoder(audio)
    with torch.enable_grad():
        live = fresh.encoder(audio)
    torch.testing.assert_close(folded, live, rtol=1e-6, atol=1e-6 * live.abs().max().item())


@pytest.mark.parametrize("step", ["in place", "optimiser", "load", "data and train"])
def test_a_changed_parameter_is_noticed(fresh, step):
    audio = noise(1, 1, 4000)
    with torch.no_grad():
        before = fresh.encoder(audio)
    layers = [module for module in fresh.encoder.modules() if isinstance(module, NormedConvolution)]
    weights = [layer.conv.parametrizations.weight.original0 for layer in layers]
    if step == "in place":
        with torch.no_grad():
            weights[0].mul_(2)
    elif step == "optimiser":
        fresh.encoder(audio).sum().backward()
        torch.optim.SGD(weights, lr=0.1).step()
    elif step == "load":
        fresh.load_state_dict({key: 2 * t if "original0" in key else t for key, t in fresh.state_dict().items()})
    else:
        weights[0].data.mul_(2)  # unseen by version counters; switching modes folds anew
        fresh.train().eval()
    with torch.no_grad():
        after = fresh.encoder(audio)
    with torch.enable_grad():
        torch.testing.assert_close(after, fresh.encoder(audio), rtol=0, atol=1e-5 * after.abs().max().item())
    assert not torch.allclose(before, after)


@torch.no_grad()
def test_a_copy_codes_alike_and_for_itself(fresh):
    audio = noise(1, 1, 4000)
    codes = fresh.encode(audio).audio_codes
    twin = copy.deepcopy(fresh)
    assert torch.equal(twin.encode(audio).audio_codes, codes)
    twin.encoder.layers[0].conv.parametrizations.weight.original0.mul_(-1)
    assert not torch.equal(twin.encode(audio).audio_codes, codes)
    assert torch.equal(fresh.encode(audio).audio_codes, codes)
    assert not any("folded" in key for key in fresh.state_dict())


@torch.inference_mode()
def test_parameters_made_in_inference_mode_are_never_stale():
    model = make_model(EncodecConfig.preset_24khz(num_filters=2, hidden_size=16))
    audio = noise(1, 1, 4000)
    before = model.encoder(audio)
    for parameter in model.parameters():
        parameter.mul_(1.1)  # such tensors keep no version
    after = model.encoder(audio)
    assert not torch.allclose(before, after)
    assert torch.equal(after, model.eval().encoder(audio))


# ---- gradients


@pytest.mark.parametrize("name", ["24khz", "48khz"])
@pytest.mark.parametrize("training", [True, False])
def test_every_parameter_can_learn(name, training):
    size = {"num_filters": 4, "hidden_size": 16}
    config = EncodecConfig.preset_24khz(**size) if name == "24khz" else EncodecConfig.preset_48khz(**size)
    model = make_model(config).train(training)
    coded = model.encode(noise(2, config.audio_channels, 9000), return_latents=True)
    assert not coded.audio_codes.requires_grad and coded.latents.requires_grad
    model.decoder(coded.latents[0]).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.any(), key


@pytest.mark.parametrize("config", [EncodecConfig.preset_24khz, EncodecConfig.preset_48khz])
def test_decode_has_gradients_where_the_model_trains(config):
    model = make_model(config(num_filters=4, hidden_size=16)).train()
    coded = model.encode(noise(1, model.config.audio_channels, 3200))
    for audio in (model.decode(**coded), model(noise(1, model.config.audio_channels, 3200))):
        model.zero_grad()
        audio.audio_values.square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.decoder.parameters())
        assert all(parameter.grad is None for parameter in model.encoder.parameters())
    model.eval()
    model.decoder(model.embed(coded.audio_codes[0])).sum().backward()  # asked for there, in any mode


@pytest.mark.parametrize("config", [EncodecConfig.preset_24khz, EncodecConfig.preset_48khz])
def test_decode_keeps_no_graph_elsewhere(config):
    """Nothing is kept for a way back, and audio comes in the blocks, so the bits, that it has without gradients."""
    model = make_model(config(num_filters=4, hidden_size=16))
    audio = noise(1, model.config.audio_channels, 330000)  # more than a block
    with torch.no_grad():
        coded = model.encode(audio)
        wanted = model.decode(**coded).audio_values
    frozen = make_model(config(num_filters=4, hidden_size=16)).requires_grad_(False).train()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda packed: packed):
        for one in (model, frozen):
            for decoded in (one.decode(**coded).audio_values, one(audio).audio_values):
                assert not decoded.requires_grad and torch.equal(decoded, wanted)
                decoded.numpy()
    assert not kept


def test_encode_keeps_no_graph(fresh):
    output = fresh.encode(noise(1, 1, 3200))
    assert not any(isinstance(value, torch.Tensor) and value.requires_grad for value in output.values())


PRECISION = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from conftest import make_model, noise
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.precision_encodec import exact_float32

model, audio = make_model(EncodecConfig.preset_24khz(num_filters=16, hidden_size=64)), noise(1, 1, 24000)
expected = model.encode(audio, bandwidth=24.0).audio_codes
exec(sys.argv[2])
assert torch.equal(model.encode(audio, bandwidth=24.0).audio_codes, expected)
with exact_float32():
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
print(eval(sys.argv[3]))
"""


@pytest.mark.parametrize(
    ("setting", "reading", "value"),
    [
        ("torch.set_float32_matmul_precision('medium')", "torch.get_float32_matmul_precision()", "medium"),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "torch.backends.cuda.matmul.allow_tf32", "True"),
        ("torch.backends.fp32_precision = 'tf32'", "torch.backends.fp32_precision", "tf32"),
        ("torch.backends.mkldnn.conv.fp32_precision = 'bf16'", "torch.backends.mkldnn.conv.fp32_precision", "bf16"),
    ],
)
def test_what_the_process_allows_itself_changes_no_code_and_stays(setting, reading, value):
    """Low-precision products allowed elsewhere, by the old or the new interface of PyTorch."""
    command = [sys.executable, "-c", PRECISION, str(Path(__file__).parent), setting, reading]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == value


@torch.no_grad()
def test_autocast_does_not_reach_the_code_search(fresh):
    latents = fresh.encoder(noise(1, 1, 24000))
    expected = fresh.quantizer.encode(latents, num_quantizers=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fresh.quantizer.encode(latents, num_quantizers=4), expected)
        assert fresh.decode(**fresh.encode(noise(1, 1, 3000))).audio_values.shape == (1, 1, 3000)


def test_model_is_listed_as_an_audio_tokenizer(fresh):
    from transformers.modeling_utils import PreTrainedAudioTokenizerBase

    assert isinstance(fresh, PreTrainedAudioTokenizerBase) and isinstance(fresh, EncodecModel)
