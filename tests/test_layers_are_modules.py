"""Layers are modules as any: hooks on them fire, what is put in their place is called, offloaded weights come back."""

import copy
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from client_models import generate, make_musicgen
from conftest import make_model, noise
from torch import nn
from transformers import EncodecModel as StockModel

from modeling_encodec.bitstream.compression import compress
from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.models.layers_encodec import EncodecConvTranspose1d
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder


TINY = {"num_filters": 2, "hidden_size": 16, "codebook_size": 64}
CONFIGS = {
    "24khz": EncodecConfig.preset_24khz(**TINY, target_bandwidths=[1.8]),
    "48khz": EncodecConfig.preset_48khz(**TINY, target_bandwidths=[1.8]),
    "32khz": EncodecConfig.preset_32khz(**TINY, target_bandwidths=[1.2]),
}
CLOSE = {"rtol": 0, "atol": 1e-5}
needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not at hand")


@pytest.fixture(params=CONFIGS)
def model(request):
    return make_model(CONFIGS[request.param])


@pytest.fixture
def audio(model):
    return noise(1, model.config.audio_channels, 9000)


@pytest.fixture
def stock(model, tmp_path):
    model.save_pretrained(tmp_path)
    return StockModel.from_pretrained(tmp_path).eval()


def there_and_back(model, audio):
    with torch.no_grad():
        coded = model.encode(audio)
        return coded.audio_codes, model.decode(**coded).audio_values


def fired_in(model, audio) -> set[str]:
    """Names of the modules whose hooks see a tensor go in and a tensor come out."""
    seen = set()

    def watch(name):
        def look(module, given, result):
            if given and isinstance(given[0], torch.Tensor):
                seen.add(name)

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    there_and_back(model, audio)
    for handle in handles:
        handle.remove()
    return seen


def test_hooks_fire_wherever_stocks_do_and_change_no_code(model, stock, audio):
    before = there_and_back(model, audio)
    ours, theirs = fired_in(model, audio), fired_in(stock, audio)
    # Of a weight norm stock computes the weight at each call, where ours keeps it.
    assert {name for name in theirs if "parametrizations" not in name} <= ours
    handles = [module.register_forward_hook(lambda *_: None) for module in model.modules()]
    for old, new in zip(before, there_and_back(model, audio)):
        assert torch.equal(old, new)
    assert handles


def test_networks_are_called_once_a_row_with_all_of_it():
    model, given = make_model(CONFIGS["24khz"]), []
    model.encoder.register_forward_hook(lambda module, x, y: given.append((tuple(x[0].shape), tuple(y.shape))))
    long = noise(2, 1, 320 * 1300)
    model.encode(long)
    assert given == [((1, 1, 320 * 1300), (1, 16, 1300))] * 2


def test_hooks_change_what_is_computed(model, audio):
    codes, heard = there_and_back(model, audio)
    for place in ("encoder", "encoder.layers.0", "encoder.layers.0.conv", "encoder.layers.1.block.1.conv"):
        handle = model.get_submodule(place).register_forward_pre_hook(lambda module, given: (given[0] * 0,))
        assert not torch.equal(model.encode(audio).audio_codes, codes), place
        handle.remove()
    lstm = next(name for name, part in model.named_modules() if isinstance(part, nn.LSTM))
    for place in (lstm, "decoder.layers.0.conv", "decoder"):
        zero = (lambda module, x, y: (0 * y[0], y[1])) if place == lstm else (lambda module, x, y: 0 * y)
        handle = model.get_submodule(place).register_forward_hook(zero)
        assert not all(map(torch.equal, there_and_back(model, audio), (codes, heard))), place
        handle.remove()
    assert all(map(torch.equal, there_and_back(model, audio), (codes, heard)))


def test_an_activation_that_a_hook_kept_stays_what_it_was(model, audio):
    kept = []
    for name, part in model.named_modules():
        if name.startswith(("encoder.layers", "decoder.layers")) and not isinstance(part, nn.LSTM):
            part.register_forward_hook(lambda module, x, y: kept.append((y, y.clone())))
    there_and_back(model, audio)
    assert len(kept) > 50 and all(torch.equal(now, then) for now, then in kept)


class Wrapper(nn.Module):
    """What people put round a layer; it passes on one argument."""

    def __init__(self, inner, factor=1.0):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x):
        return self.factor * self.inner(x)


@pytest.mark.parametrize("net", ["encoder", "decoder"])
def test_layers_in_wrappers_compute_as_before(model, audio, net):
    codes, heard = there_and_back(model, audio)
    size = len(getattr(model, net).layers)
    for place in range(size):
        other = copy.deepcopy(model)
        layers = getattr(other, net).layers
        layers[place] = Wrapper(layers[place])
        again, heard_again = there_and_back(other, audio)
        assert (again == codes).float().mean() > 0.99
        if net == "decoder":
            torch.testing.assert_close(heard_again, heard, **CLOSE)
        layers[place].factor = 0.0 if place else 5.0
        assert not all(map(torch.equal, there_and_back(other, audio), (codes, heard)))


def test_parts_of_layers_in_wrappers_compute_as_before(model, audio):
    codes, heard = there_and_back(model, audio)
    unit = next(layer for layer in model.decoder.layers if hasattr(layer, "block"))
    upsampling = next(layer for layer in model.decoder.layers if isinstance(layer, EncodecConvTranspose1d))
    for holder, name in ((unit.block, "1"), (unit, "shortcut"), (upsampling, "conv"), (unit.block[3], "conv")):
        inner = getattr(holder, name)
        setattr(holder, name, Wrapper(inner))
        torch.testing.assert_close(there_and_back(model, audio)[1], heard, **CLOSE)
        setattr(holder, name, inner)
    assert all(map(torch.equal, there_and_back(model, audio), (codes, heard)))


def test_a_stream_through_a_foreign_layer_is_refused_by_name():
    model = make_model(CONFIGS["24khz"])
    model.decoder.layers[0] = Wrapper(model.decoder.layers[0])
    StreamingEncoder(model)
    with pytest.raises(ValueError, match=r"layers\.0 is a Wrapper, .* allowed"):
        StreamingDecoder(model)
    with pytest.raises(ValueError, match=r"layers\.0 is a Wrapper, .* allowed"):
        model.decoder.step(torch.zeros(1, 16, 20), end=False)


@torch.no_grad()
def test_layers_one_by_one_are_the_network(model, stock, audio):
    latents = stock.encoder(audio)
    for ours, theirs, x in ((model.encoder, stock.encoder, audio), (model.decoder, stock.decoder, latents)):
        one, other = x, x
        for layer, their_layer in zip(ours.layers, theirs.layers):
            one, other = layer(one), their_layer(other)
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1, other.abs().max().item()))
    x = noise(1, 2, 50)
    transposed = next(module for module in model.modules() if isinstance(module, nn.ConvTranspose1d))
    x = torch.randn(1, transposed.in_channels, 7)
    torch.testing.assert_close(transposed(x), nn.ConvTranspose1d.forward(transposed, x), **CLOSE)


@torch.no_grad()
def test_the_quantizers_parts_have_stocks_interface(model, stock):
    vectors = torch.randn(2, model.config.hidden_size, 9)
    for name in ("num_quantizers", "codebook_size", "frame_rate"):
        assert getattr(model.quantizer, name) == getattr(stock.quantizer, name)
    ours, theirs = model.quantizer.layers[0], stock.quantizer.layers[0]
    codes = theirs.encode(vectors)
    assert torch.equal(ours.encode(vectors), codes) and torch.equal(ours.decode(codes), theirs.decode(codes))
    rows = vectors.transpose(1, 2)
    assert torch.equal(ours.codebook.encode(rows), theirs.codebook.encode(rows))
    assert torch.equal(ours.codebook.quantize(rows[0]), theirs.codebook.quantize(rows[0]))


@pytest.mark.parametrize("way", ["cpu", "cpu with buffers", "disk"])
def test_offloaded_weights_come_back(model, audio, way, tmp_path):
    from accelerate import cpu_offload, disk_offload

    expected = there_and_back(model, audio)
    device = torch.device("cpu")
    if way == "disk":
        disk_offload(model, tmp_path / "weights", execution_device=device)
    else:
        cpu_offload(model, execution_device=device, offload_buffers=way != "cpu")
    assert next(model.parameters()).is_meta and model.device == device
    assert all(map(torch.equal, there_and_back(model, audio), expected))
    if model.config.chunk_length is None:
        encoder = StreamingEncoder(model)
        assert torch.equal(torch.cat([encoder.push(audio), encoder.flush()], dim=2), expected[0][0])


def test_an_offloaded_codec_and_language_model_make_the_same_file(small_models, lms):
    from accelerate import cpu_offload

    audio = noise(1, 1, 9000)[0]
    expected = compress(small_models["24khz"], audio, 3.6, lms["24khz"])
    parts = [copy.deepcopy(part) for part in (small_models["24khz"], lms["24khz"])]
    for part in parts:
        cpu_offload(part, execution_device=torch.device("cpu"), offload_buffers=True)
    assert compress(parts[0], audio, 3.6, parts[1]) == expected


def test_a_folder_with_the_encoder_on_disk(model, audio, tmp_path):
    expected = there_and_back(model, audio)
    model.save_pretrained(tmp_path / "model")
    places = {"encoder": "disk", "decoder": "cpu", "quantizer": "cpu"}
    again = EncodecModel.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off").eval()
    assert all(map(torch.equal, there_and_back(again, audio), expected))


def test_musicgen_with_an_offloaded_codec():
    from accelerate import cpu_offload

    config = EncodecConfig.preset_32khz(**TINY, num_lstm_layers=1, target_bandwidths=[1.2])
    whole = make_musicgen("musicgen", make_model(config))
    prompt = {"input_values": noise(2, 1, 6400), "padding_mask": torch.ones(2, 6400)}
    expected = generate(whole, **prompt)
    cpu_offload(whole.audio_encoder, execution_device=torch.device("cpu"))
    assert torch.equal(generate(whole, **prompt), expected)


FULLY_SHARDED = """
import sys, torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, sys.argv[1])
from conftest import make_model, noise
from test_layers_are_modules import CONFIGS, there_and_back

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
for whole in (True, False):
    model, audio = make_model(CONFIGS["24khz"]), noise(1, 1, 9000)
    expected = there_and_back(model, audio)
    for net in (model.encoder, model.decoder):
        for part in [net] if whole else [layer for layer in net.layers if list(layer.parameters())]:
            fully_shard(part, mesh=mesh)
    assert all(map(torch.equal, there_and_back(model, audio), expected))
    model.decoder(model.encoder(audio)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
"""


def test_fully_sharded_parts_compute_and_learn(tmp_path):
    command = [sys.executable, "-c", FULLY_SHARDED, str(Path(__file__).parent), str(tmp_path / "meeting")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_dynamic_quantization_takes_the_lstm(model, audio):
    heard = there_and_back(model, audio)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch announces another home for it
        small = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, dtype=torch.qint8)
    kinds = [type(module) for module in small.modules()]
    assert kinds.count(torch.ao.nn.quantized.dynamic.LSTM) == 2 and nn.LSTM not in kinds
    with torch.no_grad():
        coarse = small.decode(**model.encode(audio)).audio_values
    assert not torch.equal(coarse, heard) and (coarse - heard).square().mean() < 0.1 * heard.square().mean()


@needs_peft
def test_an_adapter_learns_and_is_heard(model, audio):
    from peft import LoraConfig, get_peft_model

    codes = model.encode(audio).audio_codes
    targets = [name for name, part in model.named_modules() if isinstance(part, nn.Conv1d)]
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, r=2))
    own = adapted.base_model.model
    own.decoder(own.encoder(audio)).square().mean().backward()
    learning = [part for name, part in adapted.named_parameters() if "lora_B" in name]
    assert learning and all(part.grad is not None and part.grad.any() for part in learning)
    assert torch.equal(own.eval().encode(audio).audio_codes, codes)  # as yet the adapter adds zero
    for part in learning:
        part.data.normal_()
    changed = own.encode(audio).audio_codes
    assert not torch.equal(changed, codes)
    if model.config.chunk_length is None:
        encoder = StreamingEncoder(own)
        assert torch.equal(torch.cat([encoder.push(audio), encoder.flush()], dim=2), changed[0])


@pytest.fixture
def lm():
    torch.manual_seed(0)
    config = EncodecLMConfig(codebook_size=64, num_codebooks=4, hidden_size=16, num_hidden_layers=1)
    return EncodecLM(config).eval()


def test_hooks_of_a_language_model_fire(lm):
    seen, codes = set(), torch.randint(64, (1, 4, 20))
    for name, part in lm.named_modules():
        part.register_forward_hook(lambda *_, name=name: seen.add(name))
    lm(codes)
    assert {name for name, part in lm.named_modules() if list(part.parameters(recurse=False))} <= seen


@pytest.mark.parametrize("zero_past_key", [True, False])
def test_parts_of_a_language_model_in_wrappers(lm, zero_past_key):
    lm.config.zero_past_key = zero_past_key
    codes = torch.randint(64, (2, 3, 20))
    expected = lm(codes, labels=codes)
    lm.embeddings, lm.head = Wrapper(lm.embeddings), Wrapper(lm.head)
    wrapped = lm(codes, labels=codes)
    torch.testing.assert_close(wrapped.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(lm(codes, labels=codes, return_logits=False).loss, expected.loss, **CLOSE)
    lm.head.factor = 0.0
    assert lm(codes, labels=codes).loss.item() == pytest.approx(6)


@needs_peft
def test_an_adapter_of_a_language_model_learns_and_is_used(lm):
    from peft import LoraConfig, get_peft_model

    codes = torch.randint(64, (2, 4, 20))
    before = lm(codes).logits
    adapted = get_peft_model(lm, LoraConfig(target_modules=["embeddings", "head", "qkv_proj"], r=2))
    own = adapted.base_model.model
    for name, part in adapted.named_parameters():
        if "lora" in name:
            part.data.normal_()
    own(codes, labels=codes).loss.backward()
    assert all(part.grad is not None for name, part in adapted.named_parameters() if "lora" in name)
    assert not torch.allclose(own.eval()(codes).logits, before)
