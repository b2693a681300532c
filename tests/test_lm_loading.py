"""EncodecLM in floats: saved and loaded, in part and in other types, copied, and by the Hub's code."""

import copy
import json
import math
import os
import pickle
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
import transformers
from lm_models import SMALL, make_codes, make_lm, shifted
from safetensors.torch import load_file, save_file
from torch import nn
from without_package import WITHOUT_THE_PACKAGE

from modeling_encodec.models.modeling_lm_encodec import EncodecLM


@contextmanager
def poisoned_memory():
    """Memory that nobody initialises holds NaN, or the greatest whole number."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def states_equal(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@torch.no_grad()
def test_saved_and_loaded_is_the_same(tmp_path):
    lm = make_lm(zero_past_key=False)
    lm.save_pretrained(tmp_path)
    again, info = EncodecLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not again.training
    assert states_equal(again, lm)
    assert all(getattr(again.config, field) == getattr(lm.config, field) for field in (*SMALL, "zero_past_key"))
    codes = make_codes(lm)
    assert torch.equal(again(codes).logits, lm(codes).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "encodec_lm" and config["architectures"] == ["EncodecLM"]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_encodec.EncodecLMConfig",
        "AutoModel": "modeling_lm_encodec.EncodecLM",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_loads_and_runs(dtype, tmp_path):
    lm = make_lm()
    lm.save_pretrained(tmp_path)
    codes = make_codes(lm)
    half = EncodecLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    output, expected = half(codes, codes), lm(codes, codes)
    assert output.logits.dtype == dtype and output.loss.dtype == torch.float32
    assert abs(output.loss - expected.loss) < 0.1 and (output.logits.float() - expected.logits).abs().max() < 0.5
    logits, cache = half.predict(shifted(codes)[:, :, :1])
    assert logits.dtype == dtype and half.predict(codes[:, :, :1], cache)[0].dtype == dtype
    # Positions are computed in float32: bfloat16 would not tell 256 from 257.
    assert half.position_table().dtype == torch.float32
    assert torch.equal(half.position_table(), lm.position_table())
    half.save_pretrained(tmp_path / "half")
    assert EncodecLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == dtype


@pytest.mark.parametrize("forms", ["float", "both"])
def test_missing_parameters_are_initialised(forms, tmp_path):
    """Never uninitialised memory, whether all are missing or some."""
    lm = make_lm()
    if forms == "both":
        lm.quantize(make_codes(lm))
    lm.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for kept in ([], [name for name in state if "layers.1" not in name and "head" not in name]):
        save_file({name: state[name] for name in kept}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with poisoned_memory():
            loaded, info = EncodecLM.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["missing_keys"]) == set(state) - set(kept)
        for name, tensor in loaded.state_dict().items():
            if name in kept:
                assert torch.equal(tensor, state[name]), name
            elif name.startswith("integer.") or name.endswith("bias"):
                assert (tensor == 0).all(), name
            elif "norm" in name:
                assert (tensor == 1).all(), name
            elif name == "embeddings.weight":
                assert 0.015 < tensor.std() < 0.025, name
            else:
                bound = math.sqrt(6 / sum(tensor.shape))
                assert 0.8 * bound < tensor.abs().max() <= bound and abs(tensor.mean()) < 0.2 * bound, name


@pytest.mark.parametrize("placement", ["cpu", "auto"])
@torch.no_grad()
def test_device_map(placement, tmp_path):
    lm = make_lm()
    lm.save_pretrained(tmp_path)
    placed = EncodecLM.from_pretrained(tmp_path, device_map=placement)
    codes = make_codes(lm)
    assert torch.equal(placed(codes).logits, lm(codes).logits)


@torch.no_grad()
def test_copies_and_pickles(tmp_path):
    lm = make_lm()
    codes = make_codes(lm)
    output = lm(codes)
    for copied in (copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):
        assert states_equal(copied, lm) and torch.equal(copied(codes).logits, output.logits)
        nn.init.zeros_(copied.head.weight)
        assert torch.equal(lm(codes).logits, output.logits)
    again = pickle.loads(pickle.dumps(output.cache))
    assert torch.equal(lm(codes, cache=again).logits, lm(codes, cache=output.cache).logits)


REMOTE = (
    WITHOUT_THE_PACKAGE
    + """
import torch, transformers
folder, codes, out = sys.argv[1:]
lm = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(lm).__module__.startswith("transformers_modules"), type(lm).__module__
assert type(lm).__name__ == "EncodecLM" and type(lm.config).__name__ == "EncodecLMConfig"
codes = torch.load(codes)
torch.save([lm(codes, codes).loss.detach(), lm.frequencies(codes)[0], lm.quantize(codes).frequencies(codes)[0]], out)
lm.save_pretrained(folder + "_again")
"""
)


def test_remote_code_on_a_machine_without_this_package(tmp_path):
    lm = make_lm()
    codes = make_codes(lm)
    lm.quantize(codes).save_pretrained(tmp_path / "repo")
    torch.save(codes, tmp_path / "codes.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMOTE, tmp_path / "repo", tmp_path / "codes.pt", tmp_path / "out.pt"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    loss, frequencies, again = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(loss, lm(codes, codes).loss.detach(), rtol=0, atol=1e-6)
    assert torch.equal(frequencies, lm.frequencies(codes)[0]) and torch.equal(again, frequencies)
    assert (tmp_path / "repo_again" / "integer_lm_encodec.py").is_file()
    assert (tmp_path / "repo_again" / "calibration_lm_encodec.py").is_file()


REGISTER = """
import sys, transformers
import modeling_encodec
from modeling_encodec.models.configuration_encodec import EncodecLMConfig
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
modeling_encodec.register_auto_classes()
modeling_encodec.register_auto_classes()  # twice is once
assert type(transformers.AutoConfig.from_pretrained(sys.argv[1])) is EncodecLMConfig
assert type(transformers.AutoModel.from_pretrained(sys.argv[1])) is EncodecLM
"""


def test_auto_classes(tmp_path):
    make_lm().save_pretrained(tmp_path)
    command = [sys.executable, "-c", REGISTER, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=False)
