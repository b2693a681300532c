"""from_pretrained and save_pretrained: stock and back, old keys, missing keys, remote code, dtypes."""

import json
import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from conftest import noise
from peers import stock_model
from safetensors.torch import load_file, save_file
from without_package import WITHOUT_THE_PACKAGE

from modeling_encodec.checkpoints import bundled_checkpoint
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.processors.feature_extraction_encodec import EncodecFeatureExtractor


NAMES = ["24khz", "48khz", "32khz"]


@torch.no_grad()
def codes_of(model, audio=None, seed=0):
    if audio is None:
        audio = noise(1, model.config.audio_channels, model.config.sampling_rate, seed)
    return model.encode(audio, bandwidth=model.config.target_bandwidths[-1]).audio_codes


@pytest.fixture
def silence(caplog):
    """Fails the test on any warning, of Python's or of Transformers' logger."""
    transformers.logging.enable_propagation()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        yield
    transformers.logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("name", NAMES)
def test_saved_by_ours_loaded_by_stock_and_back(name, small_models, tmp_path, silence):
    model = small_models[name]
    model.save_pretrained(tmp_path / "ours")
    stock = transformers.EncodecModel.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(codes_of(stock), codes_of(model))
    stock.save_pretrained(tmp_path / "stock")
    again = EncodecModel.from_pretrained(tmp_path / "stock").eval()
    assert torch.equal(codes_of(again), codes_of(model))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


def test_auto_model_keeps_returning_stock_for_a_saved_folder(small_models, tmp_path):
    small_models["24khz"].save_pretrained(tmp_path)
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is transformers.EncodecModel


@pytest.mark.parametrize("name", ["24khz", "32khz"])
def test_old_weight_norm_keys_load_without_a_word(name, small_models, tmp_path, silence):
    model = small_models[name]
    model.save_pretrained(tmp_path)
    renames = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    state = load_file(tmp_path / "model.safetensors")
    for new, old in renames.items():
        state = {key.replace(new, old): tensor for key, tensor in state.items()}
    assert any(key.endswith("weight_g") for key in state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    old, info = EncodecModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(codes_of(old.eval()), codes_of(model))
    old.save_pretrained(tmp_path / "again")
    assert torch.equal(codes_of(transformers.EncodecModel.from_pretrained(tmp_path / "again")), codes_of(model))


@pytest.mark.parametrize("name", NAMES)
def test_missing_parameters_are_initialised(name, small_models, tmp_path):
    """Where the caller looks itself: never uninitialised memory, which a parametrised convolution is prone to."""
    small_models[name].save_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = EncodecModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == loaded.state_dict().keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.isfinite(tensor).all() and tensor.abs().max() < 100, key
        if "bias" not in key and "cluster_size" not in key:
            assert tensor.abs().max() > 1e-6, key
    for module in loaded.modules():
        if hasattr(module, "parametrizations"):
            magnitude, direction = module.parametrizations.weight.original0, module.parametrizations.weight.original1
            torch.testing.assert_close(magnitude, torch.norm_except_dim(direction, 2, 0))
    assert len(codes_of(loaded.eval()).unique()) > 1


REMOTE = (
    WITHOUT_THE_PACKAGE
    + """
import torch, transformers
folder, audio, out = sys.argv[1:]
model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
assert type(extractor).__module__.startswith("transformers_modules"), type(extractor).__module__
samples = torch.load(audio)
inputs = extractor(list(samples.squeeze(0).numpy()[None]) if samples.shape[1] == 2 else samples[0, 0].numpy(),
                   sampling_rate=model.config.sampling_rate, return_tensors="pt")
output = model.encode(**inputs, bandwidth=model.config.target_bandwidths[-1])
decoded = model.decode(**output)
torch.save([output.audio_codes, output.codes_lengths, decoded.audio_values.detach()], out)
model.save_pretrained(folder + "_again")
"""
)


@pytest.mark.parametrize("name", NAMES)
def test_remote_code_on_a_machine_without_this_package(name, small_models, tmp_path):
    model = small_models[name]
    config = model.config
    audio = noise(1, config.audio_channels, config.sampling_rate + 100)
    model.save_pretrained(tmp_path / "repo")
    EncodecFeatureExtractor(config.audio_channels, config.sampling_rate).save_pretrained(tmp_path / "repo")
    torch.save(audio, tmp_path / "audio.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMOTE, tmp_path / "repo", tmp_path / "audio.pt", tmp_path / "out.pt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    codes, lengths, decoded = torch.load(tmp_path / "out.pt")
    expected = model.encode(audio, bandwidth=config.target_bandwidths[-1])
    assert torch.equal(codes, expected.audio_codes) and torch.equal(lengths, expected.codes_lengths)
    torch.testing.assert_close(decoded, model.decode(**expected)[0].detach(), rtol=0, atol=1e-6)
    assert (tmp_path / "repo_again" / "seanet_encodec.py").is_file()


REGISTER = """
import sys, transformers
import modeling_encodec
folder = sys.argv[1]
assert type(transformers.AutoModel.from_pretrained(folder)) is transformers.EncodecModel
assert type(transformers.AutoFeatureExtractor.from_pretrained(folder)) is transformers.EncodecFeatureExtractor
modeling_encodec.register_auto_classes()
modeling_encodec.register_auto_classes()  # twice is once
assert type(transformers.AutoConfig.from_pretrained(folder)) is modeling_encodec.EncodecConfig
assert type(transformers.AutoModel.from_pretrained(folder)) is modeling_encodec.EncodecModel
assert type(transformers.AutoFeatureExtractor.from_pretrained(folder)) is modeling_encodec.EncodecFeatureExtractor
assert type(transformers.AutoModelForAudioTokenization.from_pretrained(folder)) is modeling_encodec.EncodecModel
"""


def test_auto_classes_only_on_request():
    command = [sys.executable, "-c", REGISTER, bundled_checkpoint()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_bundled_folder_loads_without_a_word(silence):
    model, info = EncodecModel.from_pretrained(bundled_checkpoint(), output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_half_precision_takes_float32_audio(name, dtype, small_models, tmp_path):
    model = small_models[name]
    model.save_pretrained(tmp_path)
    half = EncodecModel.from_pretrained(tmp_path, dtype=dtype).eval()
    cast = EncodecModel.from_pretrained(tmp_path).eval().to(dtype)
    audio = noise(2, model.config.audio_channels, model.config.sampling_rate + 700)
    exact = model.encode(audio, num_quantizers=2)
    for codec in (half, cast):
        assert codec.dtype == dtype
        for layer, original in zip(codec.quantizer.layers, model.quantizer.layers):
            assert torch.equal(layer.codebook.embed, original.codebook.embed)  # never rounded
        coded = codec.encode(audio, num_quantizers=2)
        decoded = codec.decode(**coded)
        assert decoded.audio_values.dtype == dtype and decoded.audio_values.shape == audio.shape
        expected = model.decode(**exact).audio_values
        got = codec.decode(**exact).audio_values.float()
        assert torch.isfinite(got).all()
        # As Bark decodes: float32 from the codebooks straight into the half-precision decoder.
        assert codec.decoder(codec.quantizer.decode(exact.audio_codes[0].transpose(0, 1))).dtype == dtype
        assert (got - expected).norm() < 0.05 * expected.norm()


def test_device_map_auto(small_models, tmp_path):
    model = small_models["48khz"]
    model.save_pretrained(tmp_path)
    placed = EncodecModel.from_pretrained(tmp_path, device_map="auto").eval()
    assert torch.equal(codes_of(placed), codes_of(model))


def test_saved_config_names_the_remote_code(small_models, tmp_path):
    small_models["24khz"].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModel"].endswith("EncodecModel") and config["model_type"] == "encodec"
    assert {f"{name}_encodec.py" for name in ("batching", "configuration", "modeling", "quantization", "seanet")} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_stock_and_ours_read_each_others_state(small_models):
    stock = stock_model(small_models["48khz"])
    assert stock.state_dict().keys() == small_models["48khz"].state_dict().keys()
