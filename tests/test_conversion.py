"""Checkpoints of encodec, audiocraft and Transformers into one another: the same tensors, settings and outputs."""

import json
import os

import numpy as np
import pytest
import soundfile
import torch
import transformers
from checkpoint_files_made import (
    audiocraft_settings,
    behaviour,
    listing,
    named_by_checksum,
    original_lm,
    own_config,
    released_codec,
    save_audiocraft,
    save_original,
)
from conftest import make_model, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import import_encodec
from safetensors.torch import load_file, save_file
from ties import count_ties

from modeling_encodec.conversion import verification
from modeling_encodec.conversion.architecture import SIZES, codec_sizes
from modeling_encodec.conversion.convert import convert_checkpoint
from modeling_encodec.conversion.key_mapping import to_original
from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.processors.feature_extraction_encodec import EncodecFeatureExtractor


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # the original's weight norm


def lines(report, name: str) -> list[str]:
    return [text for line, text in report.lines if line == name]


def assert_same_tensors(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


def assert_same_settings(config, expected):
    for name in EncodecConfig.__annotations__:
        assert _plain(getattr(config, name)) == _plain(getattr(expected, name)), name


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


# ---- the original's files


@pytest.mark.parametrize("name", ["24khz", "48khz"])
@torch.no_grad()
def test_a_released_codec_there_and_back(name, tmp_path):
    """The original's file to our folder to Transformers' to the original's file, and one clip through all three."""
    original = released_codec(name)
    torch.save(original.state_dict(), tmp_path / f"encodec_{name}.th")
    source = named_by_checksum(tmp_path / f"encodec_{name}.th")
    report = convert_checkpoint(source, tmp_path / "ours")
    assert lines(report, "architecture") == [f"that of encodec_{name}"]
    assert [text.split(":")[0].split()[0] for text in lines(report, "checked")] == ["names", "transformers", "encodec"]
    assert lines(report, "parameters") == [{"24khz": "14,851,810", "48khz": "14,856,294"}[name]]

    ours = EncodecModel.from_pretrained(tmp_path / "ours").eval()
    stock = transformers.EncodecModel.from_pretrained(tmp_path / "ours").eval()
    preset = {"24khz": EncodecConfig.preset_24khz, "48khz": EncodecConfig.preset_48khz}[name]
    assert_same_settings(ours.config, preset())
    assert_same_tensors(stock.state_dict(), ours.state_dict())
    audio = noise(1, ours.config.audio_channels, int(1.3 * ours.config.sampling_rate))
    bandwidth = ours.config.target_bandwidths[-1]
    original.set_target_bandwidth(bandwidth)
    coded = ours.encode(audio, bandwidth=bandwidth, return_latents=True)
    stock_codes = stock.encode(audio, bandwidth=bandwidth).audio_codes
    frames = original.encode(audio)
    assert len(frames) == len(coded.audio_codes)
    assert count_ties(ours, coded.latents, coded.audio_codes, stock_codes) <= 1
    for (codes, _), chunk, latents in zip(frames, coded.audio_codes, coded.latents):
        width = codes.shape[-1]
        assert count_ties(ours, latents[..., :width], chunk[..., :width], codes) <= 1
    decoded = ours.decode(coded.audio_codes, coded.audio_scales, audio_lengths=coded.audio_lengths).audio_values
    same = [(chunk[..., : c.shape[-1]], scale) for (c, scale), chunk in zip(frames, coded.audio_codes)]
    torch.testing.assert_close(decoded, original.decode(same)[..., : audio.shape[2]], rtol=0, atol=1e-5)

    stock.save_pretrained(tmp_path / "stock")
    report = convert_checkpoint(tmp_path / "stock", tmp_path / f"encodec_{name}.th")
    assert not lines(report, "note")
    back = torch.load(tmp_path / f"encodec_{name}.th", weights_only=True)
    assert_same_tensors(back, original.state_dict())
    original.load_state_dict(back)


@pytest.mark.parametrize(("name", "codebooks", "rate", "context"), [("24khz", 32, 75, 262), ("48khz", 16, 150, 525)])
@torch.no_grad()
def test_a_released_language_model_there_and_back(name, codebooks, rate, context, tmp_path):
    original = original_lm(codebooks, 1024, 200, 5, context)
    torch.save(original.state_dict(), tmp_path / f"encodec_lm_{name}.th")
    source = named_by_checksum(tmp_path / f"encodec_lm_{name}.th")
    report = convert_checkpoint(source, tmp_path / "lm")
    assert lines(report, "architecture") == [f"that of encodec_lm_{name}"]
    assert len(lines(report, "checked")) == 3 and "within" in lines(report, "checked")[2]
    lm = EncodecLM.from_pretrained(tmp_path / "lm").eval()
    config = lm.config
    assert (config.frame_rate, config.context_frames, config.num_attention_heads) == (rate, context, 8)
    assert config.has_float_form and not config.has_integer_form and config.zero_past_key
    codes = torch.randint(1024, (1, codebooks, 30))
    previous = torch.cat([torch.full_like(codes[:, :, :1], -1), codes[:, :, :-1]], dim=2)
    theirs = original(1 + previous)[0].permute(0, 2, 3, 1)
    assert theirs.max() > 20 / 1024
    torch.testing.assert_close(lm(codes).logits.softmax(-1), theirs, rtol=0, atol=1e-6)
    convert_checkpoint(tmp_path / "lm", tmp_path / "back.th")
    assert_same_tensors(torch.load(tmp_path / "back.th", weights_only=True), original.state_dict())


def test_a_language_model_of_its_own_says_what_is_set(tmp_path):
    original = original_lm(3, 40, 24, 2, 17, heads=4)
    torch.save(original.state_dict(), tmp_path / "own.th")
    wanted = {"num_attention_heads": 4, "frame_rate": 10, "context_seconds": 1.7}
    report = convert_checkpoint(tmp_path / "own.th", tmp_path / "lm", settings=wanted)
    config = EncodecLM.from_pretrained(tmp_path / "lm").config
    assert {name: getattr(config, name) for name in wanted} == wanted and config.context_frames == 17
    assert (config.num_codebooks, config.codebook_size, config.hidden_size) == (3, 40, 24)
    assert len(lines(report, "checked")) == 3
    report = convert_checkpoint(tmp_path / "lm", tmp_path / "back.th")
    assert "no such model" in lines(report, "note")[0]


def test_a_language_model_gets_its_integer_form(small_models, tmp_path):
    """By audio, for one codec; then it is what `quantize` makes."""
    codec = small_models["48khz"]
    config = codec.config
    original = original_lm(config.num_quantizers, config.codebook_size, 32, 1, 30, heads=4)
    torch.save(original.state_dict(), tmp_path / "own.th")
    audio = noise(1, 2, 70000)[0].numpy()
    soundfile.write(tmp_path / "a.wav", audio.T, 48000, subtype="FLOAT")
    codec.save_pretrained(tmp_path / "codec")
    wanted = {"num_attention_heads": 4, "frame_rate": 150, "context_seconds": 0.2}
    arguments = {"settings": wanted, "calibrate": [tmp_path / "a.wav"], "codec": codec}
    report = convert_checkpoint(tmp_path / "own.th", tmp_path / "lm", **arguments)
    assert lines(report, "integer form")[0].startswith("made by 1.5 s of audio")
    lm = EncodecLM.from_pretrained(tmp_path / "lm").eval()
    assert lm.config.has_integer_form and lm.config.codec_fingerprint
    coded = codec.encode(torch.from_numpy(audio)[None], num_quantizers=config.num_quantizers).audio_codes
    frames, _ = lm.frequencies(torch.full((1, config.num_quantizers, 1), -1))
    assert (frames.sum(-1) == 1 << 24).all()
    by_hand = EncodecLM.from_pretrained(tmp_path / "lm").eval()
    by_hand.quantize([coded[0], coded[1][..., : config.num_frames(70000 - 47520)]])
    assert_same_tensors(lm.integer.state_dict(), by_hand.integer.state_dict())
    convert_checkpoint(tmp_path / "lm", tmp_path / "back.th")
    assert_same_tensors(torch.load(tmp_path / "back.th", weights_only=True), original.state_dict())


# ---- what weights tell

OTHERS = {
    "ratios 3, 5, 7": {"upsampling_ratios": [3, 5, 7], "sampling_rate": 10500},
    "two residual units": {"num_residual_layers": 2, "dilation_growth_rate": 3},
    "no residual units": {"num_residual_layers": 0},
    "identity": {"use_conv_shortcut": False},
    "three LSTM layers": {"num_lstm_layers": 3},
    "codebooks of 100": {"codebook_size": 100, "target_bandwidths": [2.1]},
    "stereo, group norm, chunks": {
        **{"audio_channels": 2, "norm_type": "time_group_norm", "use_causal_conv": False, "normalize": True},
        **{"chunk_length_s": 0.5, "overlap": 0.1, "pad_mode": "reflect"},
    },
    "kernels": {"kernel_size": 5, "last_kernel_size": 9, "residual_kernel_size": 5, "compress": 4},
    "trim": {"trim_right_ratio": 0.5, "pad_mode": "replicate"},
    "one stride": {"upsampling_ratios": [10], "sampling_rate": 1000, "num_filters": 6, "compress": 3},
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_an_architecture_of_its_own_there_and_back(name, tmp_path):
    """Its sizes come from the weights, the rest from what is set; the original's modules of it compute the same."""
    has_original = import_encodec() is not None
    model = make_model(own_config(**OTHERS[name]))
    save_original(tmp_path / "own.th", model)
    report = convert_checkpoint(tmp_path / "own.th", tmp_path / "ours", settings=behaviour(model.config))
    assert lines(report, "architecture")[0].startswith("its own")
    assert ("codes equal" in lines(report, "checked")[2]) == has_original
    assert len(lines(report, "checked")) == 3 and len(lines(report, "note")) == (name == "codebooks of 100")
    loaded = EncodecModel.from_pretrained(tmp_path / "ours")
    assert_same_settings(loaded.config, model.config)
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    report = convert_checkpoint(tmp_path / "ours", tmp_path / "back.th")
    assert "no such model" in lines(report, "note")[0]
    back = torch.load(tmp_path / "back.th", weights_only=True)
    assert_same_tensors(back, torch.load(tmp_path / "own.th", weights_only=True))


@st.composite
def architectures(draw) -> dict:
    whole = st.integers
    sizes = {
        "audio_channels": draw(whole(1, 2)),
        "hidden_size": draw(whole(1, 40)),
        "num_filters": draw(whole(2, 9)),
        "num_residual_layers": draw(whole(0, 3)),
        "upsampling_ratios": draw(st.lists(whole(1, 9), min_size=1, max_size=5)),
        "norm_type": draw(st.sampled_from(["weight_norm", "time_group_norm"])),
        "kernel_size": draw(whole(1, 9)),
        "last_kernel_size": draw(whole(1, 9)),
        "num_lstm_layers": draw(whole(1, 3)),
        "codebook_size": draw(whole(2, 70)),
    }
    if sizes["num_residual_layers"]:
        sizes["residual_kernel_size"] = draw(whole(1, 7))
        sizes["compress"] = draw(whole(1, sizes["num_filters"]))
        sizes["use_conv_shortcut"] = draw(st.booleans())
    return sizes


@settings(max_examples=40, deadline=None)
@given(architectures(), st.integers(1, 6))
def test_sizes_are_read_from_any_weights(sizes, codebooks):
    bits = (sizes["codebook_size"] - 1).bit_length()
    rate = int(np.prod(sizes["upsampling_ratios"]))
    fields = {"sampling_rate": rate, "use_causal_conv": False, "target_bandwidths": [codebooks * bits / 1000 + 1e-9]}
    config = EncodecConfig(**(fields | sizes))
    with torch.device("meta"):
        state = EncodecModel(config).state_dict()
    found = codec_sizes(state)
    assert found.keys() == set(SIZES)
    compress = found.pop("compress")  # several may make the same layers
    widths = [config.num_filters << level for level in range(len(config.upsampling_ratios))]
    if config.num_residual_layers:
        assert [width // compress for width in widths] == [width // config.compress for width in widths]
    assert found == {name: _plain(getattr(config, name)) for name in found}


def test_one_wrong_tensor_does_not_change_the_sizes(small_models):
    """Whichever it is, but for those that alone show a size, of which either may be wrong."""
    model = small_models["24khz"]
    state, expected = model.state_dict(), codec_sizes(model.state_dict())
    ambiguous = 0
    for name in state:
        wrong = state | {name: torch.zeros(*(size + 2 for size in state[name].shape))}
        ambiguous += codec_sizes(wrong) != expected
        missing = {other: tensor for other, tensor in state.items() if other != name}
        assert codec_sizes(missing) == expected, name
    assert ambiguous <= 6  # the tensors that are read first of two


# ---- audiocraft


@pytest.mark.parametrize("kind", ["32khz", "16khz", "causal stereo"])
def test_an_audiocraft_export(kind, tmp_path):
    config = {
        "32khz": own_config(**{"sampling_rate": 32000, "target_bandwidths": [32.1], "use_causal_conv": False}),
        "16khz": own_config(**{"sampling_rate": 16000, "target_bandwidths": [16.1], "use_causal_conv": False}),
        "causal stereo": own_config(audio_channels=2, num_residual_layers=2, trim_right_ratio=0.5, normalize=True),
    }[kind]
    config.use_conv_shortcut = False
    model = make_model(config)
    state = to_original(model.state_dict(), config)
    source = save_audiocraft(tmp_path / "state_dict.bin", state, audiocraft_settings(config))
    report = convert_checkpoint(source, tmp_path / "ours")
    assert lines(report, "source")[0].endswith("…") and "audiocraft export, codec" in lines(report, "source")[0]
    loaded = EncodecModel.from_pretrained(tmp_path / "ours").eval()
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert loaded.config.num_quantizers == config.num_quantizers and len(loaded.config.target_bandwidths) == 1
    loaded.config.target_bandwidths = config.target_bandwidths  # audiocraft counts codebooks instead
    assert_same_settings(loaded.config, config)
    convert_checkpoint(tmp_path / "ours", tmp_path / "back.th")
    assert_same_tensors(torch.load(tmp_path / "back.th", weights_only=True), state)


def test_audiocraft_models_trained_for_fewer_codebooks_say_so(tmp_path):
    config = own_config(target_bandwidths=[3.5])  # 7 codebooks of 5 bits, 100 frames a second
    state = to_original(make_model(config).state_dict(), config)
    source = save_audiocraft(tmp_path / "a.bin", {"model": state}, audiocraft_settings(config, q_dropout=True))
    convert_checkpoint(source, tmp_path / "ours")
    bandwidths = EncodecModel.from_pretrained(tmp_path / "ours").config.target_bandwidths
    assert list(bandwidths) == [0.5, 1.5, 3.5]  # 1, 3 and 7 codebooks


def test_musicgens_codec_is_known_and_its_licence_told(tmp_path):
    model = EncodecModel(EncodecConfig.preset_32khz())
    settings = audiocraft_settings(model.config)
    settings["seanet"]["pad_mode"] = "constant"
    state = to_original(model.state_dict(), model.config)
    source = save_audiocraft(tmp_path / "compression_state_dict.bin", state, settings)
    report = convert_checkpoint(source, tmp_path / "ours")
    assert lines(report, "architecture") == ["that of encodec_32khz, but pad_mode constant (there reflect)"]
    assert "encodec_32khz, CC-BY-NC-4.0" in lines(report, "licence")[0]
    config = EncodecModel.from_pretrained(tmp_path / "ours").config
    assert config.pad_mode == "constant" and list(config.target_bandwidths) == [2.2]


# ---- folders


@pytest.mark.parametrize("form", ["old names", "bin", "shards", "shards of bin"])
def test_folders_of_transformers(form, small_models, tmp_path):
    model = small_models["24khz"]
    model.save_pretrained(tmp_path / "old", max_shard_size="100KB" if form == "shards" else "5GB")
    files = tmp_path / "old"
    if form != "shards":
        state = load_file(files / "model.safetensors")
        renames = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        for new, old in renames.items():
            state = {name.replace(new, old): tensor for name, tensor in state.items()}
        assert any(name.endswith("weight_g") for name in state)
        (files / "model.safetensors").unlink()
    if form == "old names":
        save_file(state, files / "model.safetensors", metadata={"format": "pt"})
    elif form == "bin":
        torch.save(state, files / "pytorch_model.bin")
    elif form == "shards of bin":
        parts = {f"pytorch_model-0000{n + 1}-of-00002.bin": list(state)[n::2] for n in range(2)}
        for name, part in parts.items():
            torch.save({key: state[key] for key in part}, files / name)
        index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
        (files / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        assert len(list(files.glob("*.safetensors"))) > 2
    report = convert_checkpoint(files, tmp_path / "new")
    assert lines(report, "source")[0].endswith("folder, codec")
    assert "  (config.json)" in lines(report, "settings")[0]
    assert (tmp_path / "new" / "model.safetensors").is_file()
    assert_same_tensors(load_file(tmp_path / "new" / "model.safetensors"), model.state_dict())


def test_a_written_folder_is_whole(small_models, tmp_path):
    """Both classes, and both feature extractors, load it; it has the permissions of any folder."""
    model = small_models["48khz"]
    source = save_original(tmp_path / "own.th", model)
    convert_checkpoint(source, tmp_path / "a" / "ours", settings=behaviour(model.config))
    folder = tmp_path / "a" / "ours"
    assert os.listdir(tmp_path / "a") == ["ours"]
    (tmp_path / "b").mkdir()
    assert folder.stat().st_mode == (tmp_path / "b").stat().st_mode
    for kind in (EncodecFeatureExtractor, transformers.EncodecFeatureExtractor):
        extractor = kind.from_pretrained(folder)
        assert (extractor.feature_size, extractor.sampling_rate, extractor.chunk_length) == (2, 48000, 48000)
    assert_same_tensors(transformers.EncodecModel.from_pretrained(folder).state_dict(), model.state_dict())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


def test_half_precision_is_widened(small_models, tmp_path):
    model = small_models["24khz"]
    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "halves")
    save_file(halves, tmp_path / "halves" / "model.safetensors", metadata={"format": "pt"})
    report = convert_checkpoint(tmp_path / "halves", tmp_path / "whole")
    assert f"{len(halves)} tensors are float16; they are written as float32, which is exact" in lines(report, "note")
    wide = {name: tensor.float() for name, tensor in halves.items()}
    assert_same_tensors(load_file(tmp_path / "whole" / "model.safetensors"), wide)


# ---- targets


def test_the_names_of_original_files(small_models, tmp_path):
    model = small_models["32khz"]
    model.save_pretrained(tmp_path / "mine")
    (tmp_path / "files").mkdir()
    convert_checkpoint(tmp_path / "mine", tmp_path / "files", to="original")
    (made,) = (tmp_path / "files").iterdir()
    assert made.name.startswith("mine-") and made == named_by_checksum(made.rename(made.with_name("mine.th")))
    convert_checkpoint(made, tmp_path / "files" / "exactly", to="original", settings=behaviour(model.config))
    assert (tmp_path / "files" / "exactly").read_bytes() == made.read_bytes()  # the same tensors, the same bytes
    convert_checkpoint(tmp_path / "mine", made, force=True)  # its name is true
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["exactly", made.name]


def test_safetensors_of_the_original(small_models, tmp_path):
    model = small_models["24khz"]
    save_file(to_original(model.state_dict(), model.config), tmp_path / "own.safetensors")
    convert_checkpoint(tmp_path / "own.safetensors", tmp_path / "ours", settings=behaviour(model.config))
    assert_same_tensors(EncodecModel.from_pretrained(tmp_path / "ours").state_dict(), model.state_dict())


def test_force_replaces_a_model_and_nothing_else_of_it_stays(small_models, tmp_path):
    for name in ("24khz", "32khz"):
        small_models[name].save_pretrained(tmp_path / name)
    (tmp_path / "24khz" / "notes.txt").write_text("old")
    before = listing(tmp_path / "32khz")
    convert_checkpoint(tmp_path / "32khz", tmp_path / "24khz", force=True)
    assert not (tmp_path / "24khz" / "notes.txt").exists() and listing(tmp_path / "32khz") == before
    assert_same_tensors(
        EncodecModel.from_pretrained(tmp_path / "24khz").state_dict(), small_models["32khz"].state_dict()
    )
    assert sorted(os.listdir(tmp_path)) == ["24khz", "32khz"]


def test_without_the_encodec_package_it_is_said(small_models, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "_import", lambda name: None)
    small_models["24khz"].save_pretrained(tmp_path / "mine")
    report = convert_checkpoint(tmp_path / "mine", tmp_path / "back.th")
    assert (
        lines(report, "checked")[-1] == "encodec package: not compared, it or the torchaudio it needs is not installed"
    )


# ---- the command


def test_the_command(run, tmp_path):
    model = make_model(own_config())
    source = save_original(tmp_path / "own.th", model)
    sets = [("sampling_rate", "3000"), ("use_causal_conv", "true"), ("pad_mode", "constant"), ("normalize", "False")]
    sets += [("chunk_length_s", "none"), ("target_bandwidths", "[0.5, 1.5]"), ("trim_right_ratio", "1.0")]
    options = [part for name, value in sets for part in ("--set", f"{name}={value}")]
    code, out, err = run("convert", source, tmp_path / "ours", *options)
    assert (code, err) == (0, [])
    told = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert told["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    assert told["codebooks"] == "3 of 32 entries" and "written" in told and "licence" in told
    config = EncodecModel.from_pretrained(tmp_path / "ours").config
    assert list(config.target_bandwidths) == [0.5, 1.5] and config.chunk_length_s is None
    code, out, err = run("convert", source, tmp_path / "ours", *options)
    assert code == 2 and err == [f"modeling-encodec: {tmp_path / 'ours'} exists; --force overwrites it"]
    assert run("convert", source, tmp_path / "ours", *options, "--force")[0] == 0
    code, out, err = run(
        "convert", source, tmp_path / "like", "--like", "encodec_24khz", "--set", "sampling_rate=3000"
    )
    assert code == 0
    config = EncodecModel.from_pretrained(tmp_path / "like").config
    assert (config.pad_mode, config.sampling_rate) == ("reflect", 3000)


def test_the_command_for_language_models(run, small_models, tmp_path):
    codec = small_models["24khz"]
    config = codec.config
    original = original_lm(config.num_quantizers, config.codebook_size, 16, 1, 15, heads=2)
    torch.save(original.state_dict(), tmp_path / "own.th")
    codec.save_pretrained(tmp_path / "codec")
    soundfile.write(tmp_path / "a.wav", noise(1, 1, 24000)[0, 0].numpy(), 24000)
    options = ["--set", "num_attention_heads=2", "--set", "frame_rate=75", "--set", "context_seconds=0.2"]
    calibration = ["--calibrate", tmp_path / "a.wav", "--codec", tmp_path / "codec"]
    code, out, err = run("convert", tmp_path / "own.th", tmp_path / "lm", *options, *calibration)
    assert (code, err) == (0, []) and "integer form  made by 1.0 s of audio" in out
    assert EncodecLM.from_pretrained(tmp_path / "lm").config.has_integer_form
    code, _, err = run("convert", tmp_path / "own.th", tmp_path / "lm2", *options, *calibration[:2])
    assert code == 2 and err == ["modeling-encodec: --calibrate and --codec go together"]
    assert EncodecLMConfig.from_pretrained(tmp_path / "lm").codec_fingerprint
