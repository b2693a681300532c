"""What conversion refuses: with one line that says what is wrong, before anything is written, executing nothing."""

import collections
import json
import pickle
import sys
import types

import pytest
import torch
from checkpoint_files_made import (
    OWN,
    assert_refused,
    audiocraft_settings,
    behaviour,
    listing,
    own_config,
    released_codec,
    save_audiocraft,
    save_original,
    weightless_state,
)
from conftest import make_model
from safetensors.torch import load_file, save_file

from modeling_encodec.conversion import checkpoint_writing, verification
from modeling_encodec.conversion.convert import convert_checkpoint
from modeling_encodec.conversion.key_mapping import lm_to_original, to_original
from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.models.modeling_lm_encodec import EncodecLM


@pytest.fixture(scope="module")
def model():
    return make_model(own_config())


@pytest.fixture
def state(model):
    return to_original(model.state_dict(), model.config)


def saved(path, state):
    torch.save(state, path)
    return path


# ---- wrong tensors

MIDDLE, FIRST = "decoder.model.3.convtr.convtr.weight_v", "encoder.model.0.conv.conv.weight_v"


@pytest.mark.parametrize(
    "name", [MIDDLE, FIRST, "quantizer.vq.layers.1._codebook.embed_avg", "decoder.model.1.lstm.bias_hh_l0"]
)
def test_a_missing_tensor_is_named(name, state, model, tmp_path):
    del state[name]
    source = saved(tmp_path / "a.th", state)
    assert_refused(source, tmp_path / "out", f"weights are missing: {name}$", settings=behaviour(model.config))


@pytest.mark.parametrize(
    "name", ["discriminators.0.convs.0.conv.bias", "optimizer.step", "encoder.model.0.conv.conv.mask"]
)
def test_a_tensor_too_many_is_named(name, state, model, tmp_path):
    source = saved(tmp_path / "a.th", state | {name: torch.zeros(3)})
    assert_refused(source, tmp_path / "out", f"weights are unexpected: {name}$", settings=behaviour(model.config))


@pytest.mark.parametrize("name", [MIDDLE, "encoder.model.0.conv.conv.bias", "quantizer.vq.layers.2._codebook.embed"])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(name, state, model, tmp_path):
    shape = tuple(state[name].shape)
    state[name] = torch.zeros(*shape[:-1], shape[-1] + 1)
    wanted = rf"of another shape: {name} \({', '.join(map(str, state[name].shape))},?\), allowed: \({shape[0]}.*\)$"
    source = saved(tmp_path / "a.th", state)
    assert_refused(source, tmp_path / "out", wanted, settings=behaviour(model.config))


@pytest.mark.parametrize("name", ["24khz", "48khz", "32khz"])
def test_faults_of_released_structures_need_no_settings(name, tmp_path):
    """Any fault is told against the released architecture that is nearest."""
    state = weightless_state(getattr(EncodecConfig, f"preset_{name}")())
    weight = {"48khz": "conv.conv.weight"}.get(name, "conv.conv.weight_v")
    first = f"encoder.model.0.{weight}"
    lost = {other: tensor for other, tensor in state.items() if other != first}
    assert_refused(saved(tmp_path / "a.th", lost), tmp_path / "out", f"weights are missing: {first}$")
    source = saved(tmp_path / "b.th", state | {"encoder.model.99.conv.conv.bias": torch.zeros(1)})
    assert_refused(source, tmp_path / "out", "weights are unexpected: encoder.model.99.conv.conv.bias$")
    source = saved(tmp_path / "c.th", state | {first: torch.zeros(8, 1, 7)})
    assert_refused(source, tmp_path / "out", rf"weights are of another shape: {first} \(8, 1, 7\), allowed: ")
    biases = {other: tensor for other, tensor in state.items() if not other.endswith("conv.bias")}
    message = (
        rf"missing: (decoder\S+; ){{9}}decoder\S+ and {len(state) - len(biases) - 10} more$"  # ten names, not all
    )
    assert_refused(saved(tmp_path / "d.th", biases), tmp_path / "out", message)
    headless = {other: tensor for other, tensor in state.items() if "_codebook" not in other}
    message = "the codec's weights do not show the codebook size: those that do are missing"
    assert_refused(saved(tmp_path / "e.th", headless), tmp_path / "out", message)


def test_tensors_that_are_not_finite_or_not_float32(state, model, tmp_path):
    for value, message in [
        (torch.full_like(state[FIRST], torch.nan), f"{FIRST} holds NaN"),
        (torch.full_like(state[FIRST], -torch.inf), f"{FIRST} holds NaN"),
        (state[FIRST].double(), f"{FIRST} is torch.float64, allowed: float32, float16 or bfloat16"),
    ]:
        source = saved(tmp_path / "a.th", state | {FIRST: value})
        assert_refused(source, tmp_path / "out", message, settings=behaviour(model.config))


def test_wrong_tensors_of_a_language_model(tmp_path):
    lm = EncodecLM(EncodecLMConfig(codebook_size=16, num_codebooks=2, hidden_size=16, num_hidden_layers=1))
    state = lm_to_original(lm.state_dict(), lm.config)
    lost = {name: tensor for name, tensor in state.items() if name != "linears.1.bias"}
    source = saved(tmp_path / "a.th", lost)
    assert_refused(source, tmp_path / "out", "language model weights are missing: linears.1.bias$")
    source = saved(tmp_path / "b.th", state)
    assert_refused(
        source, tmp_path / "out", "do not tell num_attention_heads, frame_rate, context_seconds: give --set"
    )
    said = {"num_attention_heads": 4, "frame_rate": 5, "context_seconds": 1}
    wrong = said | {"hidden_size": 32}
    assert_refused(source, tmp_path / "out", r"hidden_size is 32 \(--set\), allowed: 16", settings=wrong)
    assert_refused(source, tmp_path / "out", "allowed: .*encodec_lm_24khz", like="encodec_24khz")
    assert_refused(source, tmp_path / "out", "no field is called 'pad_mode'", settings={"pad_mode": "reflect"})
    assert_refused(source, tmp_path / "out", "needs the codec", settings=said, calibrate=["a.wav"])
    lm = EncodecLM(EncodecLMConfig(hidden_size=16, num_hidden_layers=1, num_codebooks=1, zero_past_key=False))
    lm.save_pretrained(tmp_path / "new")
    assert_refused(tmp_path / "new", tmp_path / "out.th", "zero_past_key is False")


# ---- files


def test_the_checksum_in_a_name(tmp_path):
    source = saved(tmp_path / "encodec_24khz-d7cc33bc.th", weightless_state(EncodecConfig()))
    assert_refused(
        source, tmp_path / "out", r"the checksum in the name is d7cc33bc, that of the file [0-9a-f]{8}: damaged"
    )


class Harm:
    """What a pickle may hold."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["zip", "old", "folder", "inside"])
def test_code_in_a_pickle_is_refused_and_not_run(form, state, tmp_path):
    harm = Harm(tmp_path / "harmed")
    source = tmp_path / "a.th"
    if form == "zip":
        torch.save({**state, "x": harm}, source)
    elif form == "old":
        torch.save({**state, "x": harm}, source, _use_new_zipfile_serialization=False)
    elif form == "inside":
        torch.save({"best_state": state, "xp.cfg": harm, "version": "1"}, source)
    else:
        source = tmp_path / "folder"
        source.mkdir()
        (source / "config.json").write_text('{"model_type": "encodec"}')
        torch.save({"x": harm}, source / "pytorch_model.bin")
    assert_refused(source, tmp_path / "out", r"wants to run code or make objects \(_?io.open\)")
    assert_refused(source, tmp_path / "out", source.name)
    assert not (tmp_path / "harmed").exists()


def test_files_that_are_no_checkpoints(state, model, tmp_path):
    whole = saved(tmp_path / "whole.th", state).read_bytes()
    old = tmp_path / "old.th"
    torch.save(state, old, _use_new_zipfile_serialization=False)
    cases = {
        "empty.th": (b"", "empty"),
        "text.th": (b"this is no pickle", "no PyTorch file, or a damaged one"),
        "half.th": (whole[: len(whole) // 2], "no PyTorch file, or a damaged one"),
        "start.th": (whole[:100], "no PyTorch file, or a damaged one"),
        "half_old.th": (old.read_bytes()[:3000], "no PyTorch file, or a damaged one"),
        "plain.th": (pickle.dumps({"a": 1}), "no PyTorch file, or a damaged one"),
        "half.safetensors": (whole[:500], "no safetensors, or damaged"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        assert_refused(tmp_path / name, tmp_path / "out", f"{name}: {message}", settings=behaviour(model.config))
    for content, message in [
        ([torch.zeros(1)], "holds a list, allowed: a state dict"),
        (state | {"epoch": 3, "args": "x"}, r"unexpected: epoch \(int\), args \(str\); allowed: tensors alone"),
        ({"model": state, "optimizer": {}}, r"unexpected: model \(dict\), optimizer \(dict\)"),
        ({"layer.weight": torch.zeros(2)}, "no EnCodec model, but layer.weight"),
        ({}, "no EnCodec model, but nothing"),
        (
            state | {MIDDLE.replace("weight_v", "parametrizations.weight.original1"): torch.zeros(2)},
            f"{MIDDLE} is there twice",
        ),
    ]:
        assert_refused(saved(tmp_path / "a.th", content), tmp_path / "out", message)
    assert_refused(tmp_path / "absent.th", tmp_path / "out", "absent.th: no such file or folder", FileNotFoundError)


def test_folders_that_are_no_checkpoints(model, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    assert_refused(folder, tmp_path / "out", "folder: a folder without config.json$", FileNotFoundError)
    saved(folder / "compression_state_dict.bin", {})
    assert_refused(folder, tmp_path / "out", "convert .*compression_state_dict.bin", FileNotFoundError)
    for text, message in [
        ("{", "config.json: no JSON"),
        ("[]", "config.json: holds a list, allowed: a JSON object"),
        ('{"model_type": "musicgen"}', "model_type is 'musicgen', allowed: encodec or encodec_lm"),
    ]:
        (folder / "config.json").write_text(text)
        assert_refused(folder, tmp_path / "out", message)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert_refused(folder, tmp_path / "out", "a folder without model.safetensors or", FileNotFoundError)
    index = folder / "model.safetensors.index.json"
    for names, message, error in [
        ({"a": "../other.safetensors"}, "allowed: files of its own folder", ValueError),
        ({"a": "gone.safetensors"}, "gone.safetensors: no such file", FileNotFoundError),
        ([], "no weight_map", ValueError),
    ]:
        index.write_text(json.dumps({"weight_map": names}))
        assert_refused(folder, tmp_path / "out", message, error)
    index.unlink()
    lost = {name: tensor for name, tensor in weights.items() if name != "decoder.layers.0.conv.bias"}
    save_file(lost, folder / "model.safetensors")
    assert_refused(folder, tmp_path / "out", "weights are missing: decoder.layers.0.conv.bias$")
    save_file(weights, folder / "model.safetensors")
    assert_refused(folder, tmp_path / "out", "--like goes with files", like="encodec_24khz")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_filters": 8}))
    assert_refused(folder, tmp_path / "out", r"num_filters is 8 \(config.json\), allowed: 4, as in the weights")


# ---- audiocraft


def test_audiocraft_files_without_a_codec(state, model, tmp_path):
    settings = audiocraft_settings(model.config)
    source = saved(tmp_path / "compression_state_dict.bin", {"pretrained": "facebook/encodec_32khz", "exported": True})
    assert_refused(source, tmp_path / "out", "only names 'facebook/encodec_32khz'; convert that model's compression_")
    language_model = {
        "emb.0.weight": torch.zeros(3),
        "linears.0.weight": torch.zeros(3),
        "out_norm.bias": torch.zeros(3),
    }
    source = save_audiocraft(tmp_path / "a.bin", language_model, {"lm_model": "transformer_lm"})
    assert_refused(source, tmp_path / "out", "a language model of audiocraft, allowed: its codec, compression_state")
    source = save_audiocraft(tmp_path / "a.bin", state, settings | {"compression_model": "dac"})
    assert_refused(source, tmp_path / "out", "compression_model is 'dac', allowed: 'encodec'")
    for content, message in [
        ({"best_state": state}, "lacks xp.cfg; export it with audiocraft.utils.export.export_encodec"),
        ({"best_state": state, "xp.cfg": {}}, "of other types; export it"),
        ({"best_state": state, "xp.cfg": "a: [1"}, "xp.cfg is no YAML"),
        ({"best_state": state, "xp.cfg": "text"}, "xp.cfg is a str, allowed: keys and values"),
        ({"best_state": state, "xp.cfg": "!!python/object/apply:os.getcwd []"}, "xp.cfg is no YAML"),
    ]:
        assert_refused(saved(tmp_path / "a.bin", content), tmp_path / "out", message)


def test_a_training_checkpoint_of_audiocraft(state, tmp_path, monkeypatch):
    """Its configuration is an object of a package that need not be there."""
    module = types.ModuleType("omegaconf.dictconfig")
    module.DictConfig = type("DictConfig", (), {"__module__": "omegaconf.dictconfig", "__qualname__": "DictConfig"})
    for name in ("omegaconf", "omegaconf.dictconfig"):
        monkeypatch.setitem(sys.modules, name, module)
    source = saved(tmp_path / "checkpoint.th", {"best_state": {"model": state}, "xp.cfg": module.DictConfig()})
    assert_refused(source, tmp_path / "out", r"\(omegaconf.dictconfig.DictConfig\).*; export it with audiocraft")


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("seanet", "n_filters", 8, r"num_filters is 8 \(xp.cfg\), allowed: 4, as in the weights"),
        ("seanet", "ratios", [5, 2, 3], r"upsampling_ratios is \[5, 2, 3\] \(xp.cfg\), allowed: \[5, 3, 2\]"),
        ("seanet", "true_skip", True, r"use_conv_shortcut is False \(xp.cfg\), allowed: True"),
        ("seanet", "norm", "none", "norm_type is 'none', allowed"),
        ("seanet", "activation", "Snake", "seanet.activation is 'Snake', allowed: 'ELU'"),
        ("seanet", "activation_params", {"alpha": 0.5}, "seanet.activation_params is"),
        ("seanet", "disable_norm_outer_blocks", 1, "seanet.disable_norm_outer_blocks is 1, allowed: 0"),
        ("seanet", "decoder", {"final_activation": "Tanh"}, "seanet.final_activation is 'Tanh', allowed: None"),
        ("seanet", "encoder", {"n_filters": 16}, "seanet.n_filters is 16 in the encoder and 4 in the decoder"),
        ("seanet", "encoder", 3, "seanet.encoder is 3, allowed: keys and values"),
        ("seanet", "dimension", "twelve", "hidden_size is 'twelve'"),
        ("seanet", "channels", "${nowhere.at_all}", r"\$\{nowhere.at_all\} stands for nothing"),
        ("seanet", "causal", "${seanet.causal}", "stand for each other in a circle"),
        ("seanet", "causal", False, "encodec.causal is True, allowed: False, as in seanet"),
        ("seanet", "pad_mode", "circular", "pad_mode is 'circular', allowed"),
        ("encodec", "quantizer", "no_quant", "encodec.quantizer is 'no_quant', allowed: 'rvq'"),
        ("rvq", "n_q", 4, "rvq.n_q is 4, allowed: 3, as in the weights"),
        ("rvq", "bins", 64, r"codebook_size is 64 \(xp.cfg\), allowed: 32"),
    ],
)
def test_what_xp_cfg_says_must_fit(section, key, value, message, state, model, tmp_path):
    settings = audiocraft_settings(model.config)
    settings[section][key] = value
    source = save_audiocraft(tmp_path / "a.bin", state, settings)
    assert_refused(source, tmp_path / "out", message)


def test_what_xp_cfg_does_not_say_is_asked_for(state, model, tmp_path):
    settings = audiocraft_settings(model.config)
    del settings["seanet"]["pad_mode"]
    source = save_audiocraft(tmp_path / "a.bin", state, settings)
    assert_refused(source, tmp_path / "out", "the weights do not tell pad_mode: give --set FIELD=VALUE for each")
    convert_checkpoint(source, tmp_path / "out", settings={"pad_mode": "constant"})


# ---- settings


def test_settings_that_are_missing_or_wrong(state, model, tmp_path):
    source = saved(tmp_path / "a.th", state)
    assert_refused(
        source, tmp_path / "out", "tell sampling_rate, normalize, chunk_length_s, use_causal_conv, pad_mode, trim"
    )
    whole = behaviour(model.config)
    for changed, message in [
        ({"num_filters": 16}, r"num_filters is 16 \(--set\), allowed: 4, as in the weights"),
        ({"upsampling_ratios": [2, 3, 5]}, r"upsampling_ratios is \[2, 3, 5\] \(--set\), allowed: \[5, 3, 2\]"),
        ({"norm_type": "time_group_norm", "use_causal_conv": False}, "norm_type is 'time_group_norm'"),
        ({"target_bandwidths": [3.0]}, r"which takes 6 codebooks, allowed: up to 1.5 kbps, as the weights have 3"),
        ({"filters": 4}, "no field is called 'filters', allowed: target_bandwidths, sampling_rate"),
        ({"pad_mode": 3}, "pad_mode is 3, allowed: str"),
        ({"sampling_rate": "fast"}, "sampling_rate is 'fast', allowed: int"),
        ({"sampling_rate": 0}, "sampling_rate is 0, allowed"),
        ({"overlap": 2}, "overlap is 2, allowed"),
        ({"codebook_dim": 5}, "codebook_dim is 5, allowed"),
    ]:
        assert_refused(source, tmp_path / "out", message, settings=whole | changed)
    assert_refused(
        source, tmp_path / "out", "no released checkpoint is 'encodec', allowed: encodec_24khz", like="encodec"
    )
    assert_refused(source, tmp_path / "out", "--like is 'encodec_32khz', allowed: encodec_24khz", like="encodec_32khz")
    assert_refused(source, tmp_path / "out", "calibrate goes with language models", calibrate=["a.wav"])


# ---- what does not compute the same, and what is not written well


def test_a_model_that_computes_something_else(model, state):
    """The same weights with another padding or another tensor are another model."""
    assert "130 of 130 frames of 3 codes equal; " in str(verification.compare_with_transformers(model))
    other = make_model(own_config(), seed=1)
    if verification._import("encodec.modules") is None:
        released_codec("24khz")  # skips, or brings in what the package lacks
    with pytest.raises(ValueError, match="differ"):
        verification.compare_with_original(model, to_original(other.state_dict(), other.config))
    last = "decoder.model.12.conv.conv.bias"
    assert last in state
    with pytest.raises(ValueError, match="audio differs from that of encodec package by"):
        verification.compare_with_original(model, state | {last: state[last] + 0.001})
    codebook = "quantizer.vq.layers.2._codebook.embed"
    with pytest.raises(ValueError, match="codes of frame .* in codebook 3 are|audio differs"):
        verification.compare_with_original(model, state | {codebook: state[codebook].flip(0)})


def test_a_failed_comparison_writes_nothing(model, tmp_path, monkeypatch):
    source = save_original(tmp_path / "a.th", model)
    monkeypatch.setattr(verification, "MOST_LATENT_ERROR", -1.0)
    assert_refused(
        source, tmp_path / "out", "latents differ from those of transformers", settings=behaviour(model.config)
    )


@pytest.mark.parametrize("target", ["folder", "file.th"])
def test_a_failed_check_of_what_was_written_leaves_the_old(target, small_models, tmp_path, monkeypatch):
    source = tmp_path / "source"
    small_models["24khz"].save_pretrained(source)
    convert_checkpoint(source, tmp_path / target)

    def fail(written, meant, what):
        raise ValueError(f"{what} has another x than was written")

    monkeypatch.setattr(checkpoint_writing, "check_equal", fail)
    assert_refused(source, tmp_path / target, "has another x than was written", force=True)
    assert_refused(source, tmp_path / f"new_{target}", "has another x than was written")


def test_equal_is_equal_to_the_bit():
    state = {"a": torch.tensor([1.0, 2.0])}
    verification.check_equal(state, {"a": torch.tensor([1.0, 2.0])}, "it")
    for other in ({"a": torch.tensor([1.0, 2.0 + 2**-22])}, {"a": state["a"].double()}, {}, state | {"b": state["a"]}):
        with pytest.raises(ValueError, match="it has"):
            verification.check_equal(other, state, "it")


# ---- targets


def test_targets_that_exist(small_models, tmp_path):
    source = tmp_path / "source"
    small_models["24khz"].save_pretrained(source)
    (tmp_path / "empty").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.th").mkdir()
    for name, arguments, message, error in [
        ("empty", {}, "empty exists; --force overwrites it", FileExistsError),
        ("home", {"force": True}, "home exists and is no folder of a model", FileExistsError),
        ("file", {"force": True}, "file exists and is no folder of a model", FileExistsError),
        ("source", {"force": True}, "is the source or holds it", ValueError),
        (".", {"force": True}, "is the source or holds it", ValueError),
        ("a.th", {"to": "folder"}, "called as a file of the original", ValueError),
        ("a", {"to": "onnx"}, "--to is 'onnx', allowed: folder or original", ValueError),
        (
            "encodec_24khz-d7cc33bc.th",
            {},
            "promises the checksum d7cc33bc, the file's is [0-9a-f]{8}; give",
            ValueError,
        ),
    ]:
        before = listing(tmp_path)
        assert_refused(source, tmp_path / name, message, error, **arguments)
        assert listing(tmp_path) == before
    (tmp_path / "a.th").write_text("x")
    assert_refused(source, tmp_path / "a.th", "a.th exists; --force overwrites it", FileExistsError)
    convert_checkpoint(source, tmp_path / "empty", force=True)
    convert_checkpoint(source, tmp_path / "a.th", force=True)
    assert len(torch.load(tmp_path / "a.th", weights_only=True)) == len(small_models["24khz"].state_dict())


def test_the_fields_of_the_small_model_are_what_the_tests_take_them_for():
    assert collections.Counter(own_config().upsampling_ratios) == collections.Counter(OWN["upsampling_ratios"])
    assert own_config().num_quantizers == 3


def test_the_command_says_one_line(run, tmp_path):
    code, out, err = run("convert", tmp_path / "absent.th", tmp_path / "out")
    assert (code, out, err) == (2, "", [f"modeling-encodec: {tmp_path / 'absent.th'}: no such file or folder"])
    code, _, err = run("convert", tmp_path / "absent.th", tmp_path / "out", "--set", "pad_mode")
    assert code == 2 and err == ["modeling-encodec: --set is 'pad_mode', allowed: FIELD=VALUE"]
