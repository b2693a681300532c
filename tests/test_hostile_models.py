"""Model folders that are damaged, incomplete or hostile are refused in one line, and never run, written to or taken
for what they are not; by classes, processors and commands alike."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import hypothesis.strategies as st
import pytest
import torch
import transformers
from conftest import make_model, noise
from hostile_folders import ALL, NOT_WHOLE, PICKLES, TEXTS, WEIGHTS, in_shards, with_bin, with_config, with_tensors
from hypothesis import given, settings
from lm_models import make_codes, make_integer_lm
from safetensors.torch import load_file, save_file
from without_package import WITHOUT_THE_PACKAGE

from modeling_encodec import (
    CodecTokenizer,
    EncodecConfig,
    EncodecFeatureExtractor,
    EncodecLM,
    EncodecLMConfig,
    EncodecModel,
    EncodecProcessor,
    write_audio,
)
from modeling_encodec.commands.shared import load
from modeling_encodec.conversion.checkpoint_files import read_checkpoint
from modeling_encodec.models.parameter_counts_encodec import codec_parameters, lm_parameters


SMALL = {
    "num_filters": 4,
    "hidden_size": 16,
    "num_lstm_layers": 1,
    "codebook_size": 64,
    "target_bandwidths": [0.9, 1.8],
}
SECONDS = 20  # that nothing here may take; each takes a hundredth


@contextmanager
def refused(match: str):
    """Within it a ValueError or OSError of one line that is not long is raised, soon."""

    def too_long(*_):
        raise AssertionError(f"no answer in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with pytest.raises((ValueError, OSError), match=match) as caught:
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and len(text) < 900, text


@pytest.fixture(scope="module")
def model() -> EncodecModel:
    return make_model(EncodecConfig(**SMALL))


@pytest.fixture(scope="module")
def good(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "good"
    model.save_pretrained(folder)
    EncodecProcessor.for_model(model, bandwidth=1.8).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


@pytest.fixture(autouse=True)
def no_progress_bars():
    bars = transformers.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    yield
    if shown:
        bars.enable_progress_bar()


def content_of(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def codes_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.encode(noise(1, 1, 6000), num_quantizers=2).audio_codes


@pytest.mark.parametrize("name", ALL)
def test_a_folder_that_is_no_model_is_refused_in_one_line(name, folder, monkeypatch):
    change, said = ALL[name]
    change(folder)
    before = content_of(folder)
    monkeypatch.chdir(folder.parent)
    with refused(said):
        EncodecModel.from_pretrained(folder)
    assert content_of(folder) == before and [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["no encoder", "another shape", "a pickle with code inside", "an index to elsewhere"])
def test_nobody_else_takes_it_either(name, folder, run, monkeypatch):
    """Processors, tokenizers, conversion and commands."""
    ALL[name][0](folder)
    monkeypatch.chdir(folder.parent)
    audio = folder.parent / "a.wav"
    for call in (
        lambda: EncodecProcessor.from_pretrained(folder),
        lambda: CodecTokenizer(str(folder), 1.8),
        lambda: load(str(folder), "cpu"),
    ):
        with refused("weights|pickle|names"):
            call()
    if name != "another shape" and name != "no encoder":  # which are known after reading
        with refused("pickle|code|names"):
            read_checkpoint(folder)
    audio.write_bytes(b"RIFF")
    for line in (
        ["encode", audio, folder.parent / "a.ecdc", "-m", folder],
        ["convert", folder, folder.parent / "new"],
    ):
        code, out, err = run(*line)
        assert code == 2 and not out and len(err) == 1, (err, out)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["a.wav", "model"]


AUTO = """
import sys, transformers
{}
try:
    transformers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code={})
except ValueError as error:
    print(error)
"""
REGISTERED = AUTO.format("import modeling_encodec; modeling_encodec.register_auto_classes()", "False")
REMOTE = WITHOUT_THE_PACKAGE + AUTO.format("", "True")


@pytest.mark.parametrize("script", [REGISTERED, REMOTE], ids=["registered", "remote code"])
def test_auto_model_refuses_it_too(script, folder, tmp_path):
    NOT_WHOLE["one tensor missing"][0](folder)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, folder]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{folder}: the weights lack encoder.layers.0.conv.bias; allowed"), done.stdout
    assert "LOAD REPORT" not in done.stderr


def test_what_is_whole_in_another_form_is_taken(folder, model, good, tmp_path):
    """Shards, a pickle of tensors alone, half precision and old names: the codes of the good one, or its weights."""
    in_shards(folder)
    assert torch.equal(codes_of(EncodecModel.from_pretrained(folder)), codes_of(model))
    for change in (
        with_bin(dict),
        with_tensors(lambda s: {k.replace("parametrizations.weight.original0", "weight_g"): v for k, v in s.items()}),
    ):
        other = shutil.copytree(good, tmp_path / f"other{id(change)}")
        change(other)
        assert torch.equal(codes_of(EncodecModel.from_pretrained(other)), codes_of(model))
    for options in ({"dtype": torch.bfloat16}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}):
        EncodecModel.from_pretrained(good, **options)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = EncodecModel.from_pretrained(None, config=model.config, state_dict=state)
    assert torch.equal(codes_of(made), codes_of(model))


# ---- what a caller may say otherwise -------------------------------------------------------------------------------


class WithHead(EncodecModel):
    """Somebody's model upon the codec."""

    def __init__(self, config):
        super().__init__(config)
        self.head = torch.nn.Linear(4, 2)
        self.post_init()


class WithNewHead(WithHead):
    """The same, whose head comes later."""

    _keys_to_ignore_on_load_missing = {r"^head\."}


class WithoutHead(EncodecModel):
    """The codec out of it."""

    _keys_to_ignore_on_load_unexpected = {r"^head\."}


def test_a_caller_says_otherwise_as_transformers_has_it(folder, tmp_path):
    with refused(r"lack head.bias, head.weight; allowed: all tensors of WithHead"):
        WithHead.from_pretrained(folder)
    grown = WithNewHead.from_pretrained(folder)
    assert grown.head.weight.isfinite().all() and torch.equal(
        codes_of(grown), codes_of(EncodecModel.from_pretrained(folder))
    )
    loaded, info = WithHead.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {"head.weight", "head.bias"} and loaded.head.weight.isfinite().all()
    grown.save_pretrained(tmp_path / "grown")
    with refused("have head.bias, head.weight; allowed"):
        EncodecModel.from_pretrained(tmp_path / "grown")
    assert torch.equal(codes_of(WithoutHead.from_pretrained(tmp_path / "grown")), codes_of(grown))
    with_tensors(lambda s: s | {"decoder.layers.0.conv.bias": torch.zeros(3)})(folder)
    for options in ({}, {"output_loading_info": True}):
        with refused(r"\(3,\) instead of \(64,\).*ignore_mismatched_sizes"):
            EncodecModel.from_pretrained(folder, **options)
    anew = EncodecModel.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert anew.decoder.layers[0].conv.bias.isfinite().all()


def test_a_state_dict_is_whole_too(model):
    state = {name: tensor for name, tensor in model.state_dict().items() if "lstm" not in name}
    with refused("the state dict: the weights lack decoder.layers.1.lstm"):
        EncodecModel.from_pretrained(None, config=model.config, state_dict=state)


def test_refusals_hold_without_the_early_look(folder, monkeypatch):
    """Should Transformers rename what `_finalize_model_loading` overrides: then later, by what it reports."""
    monkeypatch.delattr("modeling_encodec.models.loading_encodec.WholeCheckpoints._finalize_model_loading")
    NOT_WHOLE["no encoder"][0](folder)
    with refused(r"lack encoder\."):
        EncodecModel.from_pretrained(folder)


def test_adapters_of_peft_are_taken_and_incomplete_ones_are_not(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lm = make_integer_lm()
    lm.drop_integer_form().save_pretrained(tmp_path / "base")
    base = EncodecLM.from_pretrained(tmp_path / "base").eval()
    tuned = peft.get_peft_model(base, peft.LoraConfig(target_modules=["qkv_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    codes = make_codes(base)
    with torch.no_grad():
        loaded = EncodecLM.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(codes).logits, tuned(codes).logits)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    save_file({name: state[name] for name in sorted(state)[1:]}, path, metadata={"format": "pt"})
    with refused("lack .*lora_A"):
        EncodecLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(("form", "name"), [("integer", "integer.head.bias"), ("float", "head.bias")])
def test_language_models_of_either_form_are_whole(form, name, tmp_path):
    lm = make_integer_lm()
    lm = lm.drop_float_form() if form == "integer" else lm.drop_integer_form()
    lm.save_pretrained(tmp_path)
    assert EncodecLM.from_pretrained(tmp_path).state_dict().keys() == lm.state_dict().keys()
    with_tensors(lambda s: {k: s[k] for k in s if k != name})(tmp_path)
    with refused(f"lack {name}; allowed: all tensors of EncodecLM"):
        EncodecLM.from_pretrained(tmp_path)
    with_config(has_integer_form=form != "integer", has_float_form=form == "integer")(tmp_path)
    with refused("lack .*; they have "):  # the other form
        EncodecLM.from_pretrained(tmp_path)


# ---- numbers in config.json ----------------------------------------------------------------------------------------

WRONG = [True, None, "x", [], {}, [[1]], -1, 0, 1e300, float("nan"), float("inf"), 2**31, 2**63, 10**400, -(10**400)]
# A value that each field takes though it is among the wrong ones of others, or that is a default.
FINE = {
    "num_residual_layers": [0],
    "trim_right_ratio": [0],
    "use_causal_conv": [True],
    "use_conv_shortcut": [True],
    "chunk_length_s": [None],
    "overlap": [None, 0],
    "codebook_dim": [None],
}
LM_FINE = {
    "zero_past_key": [True],
    "has_float_form": [True],
    "has_integer_form": [True],
    "codec_fingerprint": [None, "x"],
}


def is_fine(value, fine: list) -> bool:
    return any(type(value) is type(one) and value == one for one in fine)


@pytest.mark.parametrize("name", [*EncodecConfig.__annotations__])
def test_numbers_of_a_codec_that_cannot_be(name):
    for value in [*WRONG, [1e6], [2] * 10**6, [2**31] * 4, [float("nan")], 1e-9]:
        extra = {"overlap": 0.1} if name == "chunk_length_s" else {}
        if name == "normalize" and value is True or is_fine(value, FINE.get(name, [])):
            EncodecConfig(**{name: value} | extra)
        elif name == "overlap" and value == 1e-9 or name == "trim_right_ratio" and value == 1e-9:
            EncodecConfig(**{name: value})
        else:
            with refused(name):
                EncodecConfig(**{name: value} | extra)


@pytest.mark.parametrize("name", [*EncodecLMConfig.__annotations__])
def test_numbers_of_a_language_model_that_cannot_be(name):
    for value in [*WRONG, [1], 1e-9]:
        if is_fine(value, LM_FINE.get(name, [])):
            EncodecLMConfig(**{name: value})
        else:
            with refused(name):
                EncodecLMConfig(**{name: value})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_residual_layers": 2**31}, "num_residual_layers is 2147483648, allowed: at most 32"),
        ({"num_lstm_layers": 2**31}, "num_lstm_layers is 2147483648, allowed: at most 32"),
        ({"target_bandwidths": [1e6]}, "target_bandwidths is .1000000.0., allowed: as the last less than 461.25 kbps"),
        ({"upsampling_ratios": [2**15, 2**15]}, "upsampling_ratios is .*, allowed: a product of at most 65536"),
        ({"upsampling_ratios": [1] * 1000}, "upsampling_ratios is .*, allowed: at most 10 of them"),
        ({"num_filters": 8192}, "hidden_size 16, num_filters 8192.* together make 6.* weights, allowed"),
        ({"hidden_size": 65536, "codebook_dim": 65536, "codebook_size": 65536}, "hidden_size 65536.* together make"),
        ({"dilation_growth_rate": 4096, "num_residual_layers": 32}, "dilation_growth_rate is 4096, allowed: less"),
        ({"chunk_length_s": 1e12, "overlap": 0.1}, "chunk_length_s is 1000000000000.0, allowed: at most 3600 s"),
        ({"chunk_length_s": 1e-9, "overlap": 0.1}, "chunk_length_s is 1e-09, allowed: at least one hop"),
        ({"chunk_length_s": 1.0, "overlap": 0.9999}, "overlap is 0.9999, allowed: less"),
        ({"sampling_rate": 2**63}, "sampling_rate is 9223372036854775808, allowed: at most 10000000"),
    ],
)
def test_giant_numbers_are_refused_by_name_before_memory_is_taken(fields, said, folder):
    with_config(**fields)(folder)
    started = time.process_time()
    with refused(f"{folder}: {said}"):
        EncodecModel.from_pretrained(folder)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_hidden_layers": 2**31}, "num_hidden_layers is 2147483648, allowed: at most 512"),
        ({"hidden_size": 2**20}, "hidden_size is 1048576, allowed: at most 65536"),
        ({"context_seconds": 1e12}, "context_seconds is 1000000000000.0, allowed: at most"),
        ({"hidden_size": 65536, "num_hidden_layers": 512}, "hidden_size 65536.*num_hidden_layers 512 together make"),
        ({"max_positions": 2**24, "hidden_size": 65536, "has_integer_form": True}, "max_positions 16777216 together"),
    ],
)
def test_giant_numbers_of_a_language_model(fields, said):
    with refused(said):
        EncodecLMConfig(**fields)


@pytest.mark.parametrize(
    "config", [EncodecConfig(), EncodecConfig.preset_48khz(), EncodecConfig(**SMALL, audio_channels=3)]
)
def test_weights_counted_by_arithmetic_are_those_of_the_model(config):
    with torch.device("meta"):
        exact = sum(tensor.numel() for tensor in EncodecModel(config).state_dict().values())
    assert 0.9 * exact < codec_parameters(config) <= exact


def test_weights_of_language_models_counted_by_arithmetic():
    for forms in ({}, {"has_integer_form": True}, {"has_integer_form": True, "has_float_form": False}):
        config = EncodecLMConfig(**forms)
        with torch.device("meta"):
            exact = sum(tensor.numel() for tensor in EncodecLM(config).state_dict().values())
        assert 0.95 * exact < lm_parameters(config) <= exact


def test_a_configuration_far_above_its_weights_takes_no_memory(folder):
    """A gigabyte of weights is promised where there are kilobytes."""
    with_config(num_filters=256, hidden_size=512, codebook_dim=512)(folder)
    with refused(r"instead of \(\d+"):
        EncodecModel.from_pretrained(folder)


# ---- the other files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_settings_of_processors_that_are_no_json(name, folder):
    text, said = TEXTS[name]
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "preprocessor_config.json").write_bytes(data)
    with refused(f"preprocessor_config.json: {said}"):
        EncodecFeatureExtractor.from_pretrained(folder)
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_bytes(data)
    with refused(f"processor_config.json: {said}"):
        EncodecProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("part", "fields", "said"),
    [
        ("feature_extractor", {"sampling_rate": 2**63}, "sampling_rate is 9223372036854775808 Hz, allowed: 1 to"),
        ("feature_extractor", {"feature_size": 10**9}, "feature_size is 1000000000, allowed: 1 to 256"),
        ("feature_extractor", {"feature_size": True}, "feature_size is True"),
        ("feature_extractor", {"padding_value": float("nan")}, "padding_value is nan"),
        ("feature_extractor", {"chunk_length_s": 1e12}, "chunk_length_s is 1000000000000.0, allowed: above 0"),
        ("feature_extractor", {"chunk_length_s": "x"}, "chunk_length_s is 'x', allowed: a number"),
        ("feature_extractor", {"overlap": [1]}, "overlap is .1., allowed: a number"),
        ("feature_extractor", {"padding_side": 3}, "padding_side is 3, allowed: right, left"),
        ("feature_extractor", {"for_model": 3}, "for_model is no setting of a EncodecFeatureExtractor"),
        ("vocabulary", {"codebook_size": 10**12}, "allowed"),
        ("vocabulary", {"pad_token_id": 10**30}, "pad_token_id is 1000000000000000000000000000000, allowed: 256 to"),
        ("vocabulary", {"frame_rate": "x"}, "frame_rate is 'x', allowed"),
        ("vocabulary", {"layout": []}, "layout is"),
        ("vocabulary", {"extra": 1}, "unexpected keyword argument 'extra'"),
        ("vocabulary", None, "vocabulary or feature_extractor is no JSON object"),
        ("feature_extractor", None, "vocabulary or feature_extractor is no JSON object"),
        ("codec", ["x"], "codec is .'x'., allowed: a repository's id"),
        ("codec", "/etc", "codec is '/etc', allowed: a repository's id"),
    ],
)
def test_settings_of_processors_that_cannot_be(part, fields, said, folder):
    path = folder / "processor_config.json"
    content = json.loads(path.read_text())
    content[part] = content[part] | fields if isinstance(fields, dict) else fields
    path.write_text(json.dumps(content))
    with refused(said):
        EncodecProcessor.from_pretrained(folder)


# ---- at random -----------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from([*EncodecConfig.__annotations__, "model_type", "dtype", "num_labels"]), value=JSON)
def test_any_value_in_config_json_is_taken_as_the_good_one_or_refused(name, value, good, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any") / "model"
    folder.mkdir()
    (folder / WEIGHTS).symlink_to(good / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | {name: value}))
    started = time.process_time()
    try:
        loaded = EncodecModel.from_pretrained(folder)
    except (ValueError, OSError) as error:
        assert len(str(error).splitlines()) == 1
    else:
        same = copy.deepcopy(model)
        same.load_state_dict(loaded.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), model.state_dict().values()))
    assert time.process_time() - started < 5


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_bytes_in_the_weights_are_refused_or_of_their_tensors(data, good, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes") / "model"
    folder.mkdir()
    shutil.copy(good / "config.json", folder)
    content = bytearray((good / WEIGHTS).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, 12000) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    (folder / WEIGHTS).write_bytes(content[: data.draw(st.sampled_from([None, None, 9, 5000, len(content) - 1]))])
    try:
        loaded = EncodecModel.from_pretrained(folder)
    except (ValueError, OSError) as error:
        assert len(str(error).splitlines()) == 1
    else:  # the bytes of a number are changed, or nothing is
        assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["one tensor missing", "cut off", "null as config.json", *list(PICKLES)[:2]])
def test_commands_say_one_line(name, folder, run, tmp_path):
    change, said = ALL[name]
    change(folder)
    audio = tmp_path / "in.wav"
    write_audio(audio, noise(1, 1, 5000)[0].numpy(), 24000)
    for line in (
        ["encode", audio, tmp_path / "o.ecdc", "-m", folder],
        ["tokenize", audio, tmp_path / "t", "-m", folder],
    ):
        code, out, err = run(*line)
        assert code == 2 and len(err) == 1 and "device" not in err[0] and "Traceback" not in err[0], err
    assert not (tmp_path / "o.ecdc").exists() and not (tmp_path / "RAN").exists()


def test_an_absent_device_is_called_that(good, run, tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    for device in ("cuda:99", "quantum"):
        code, _, err = run("encode", tmp_path / "a.wav", tmp_path / "a.ecdc", "-m", good, "--device", device)
        assert code == 2 and len(err) == 1 and f"device is '{device}'" in err[0], err
