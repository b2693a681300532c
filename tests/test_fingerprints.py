"""Fingerprints: of weights as they are now, and of every setting that changes what they compute."""

import copy
import json
import shutil

import pytest
import torch
from conftest import make_model, noise
from lm_models import make_codes, make_integer_lm
from test_weight_cache import WAYS

from modeling_encodec.bitstream.compression import compress, decompress
from modeling_encodec.bitstream.errors import EcdcError
from modeling_encodec.checkpoints import bundled_checkpoint, bundled_lm_checkpoint
from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.models.fingerprints import (
    CHANGES_OUTPUT,
    IN_TENSORS,
    LM_CHANGES_OUTPUT,
    LM_IN_TENSORS,
    codebook_fingerprint,
    lm_fingerprint,
    model_fingerprint,
    stream_fingerprint,
)
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM


TINY = {"num_filters": 2, "hidden_size": 16, "num_lstm_layers": 1, "codebook_size": 64, "num_residual_layers": 2}
TINY |= {"target_bandwidths": [1.8]}
CHUNKS = {"chunk_length_s": 0.2, "overlap": 0.1}
# Another value of each field, and what else the two models have.
OTHER = {
    "chunk_length_s": (0.3, CHUNKS),
    "dilation_growth_rate": (3, {}),
    "normalize": (True, {}),
    "overlap": (0.3, CHUNKS),
    "pad_mode": ("constant", {}),
    "sampling_rate": (23999, CHUNKS | {"overlap": 0.0}),  # chunks of 4799.8 samples
    "trim_right_ratio": (0.5, {}),
    "use_causal_conv": (False, {}),
}
OTHER_SHAPES = {
    **{"audio_channels": 2, "codebook_size": 60, "compress": 1, "hidden_size": 12, "kernel_size": 5},
    **{"last_kernel_size": 5, "norm_type": "time_group_norm", "num_filters": 4, "num_lstm_layers": 2},
    **{"num_residual_layers": 1, "residual_kernel_size": 5, "upsampling_ratios": [4, 5, 8, 2]},
    **{"use_conv_shortcut": False, "target_bandwidths": [3.6]},
}


def twins(name: str, value, **fields) -> tuple[EncodecModel, EncodecModel]:
    """Two models of the same weights, one of which has another `value` of the setting `name`."""
    model = make_model(EncodecConfig(**TINY | fields))
    other = EncodecModel(EncodecConfig(**TINY | fields | {name: value})).eval()
    other.load_state_dict(model.state_dict())
    return model, other


def test_every_field_is_on_one_of_the_lists():
    for kind, lists in (
        (EncodecConfig, (CHANGES_OUTPUT, IN_TENSORS)),
        (EncodecLMConfig, (LM_CHANGES_OUTPUT, LM_IN_TENSORS)),
    ):
        assert sorted(lists[0] + lists[1]) == sorted(kind.__annotations__)
    assert OTHER.keys() == set(CHANGES_OUTPUT)


@pytest.mark.parametrize("name", OTHER)
@torch.no_grad()
def test_each_setting_that_changes_the_output_changes_the_fingerprint(name):
    value, fields = OTHER[name]
    model, other = twins(name, value, **fields)
    assert codebook_fingerprint(model) == codebook_fingerprint(other)
    assert model_fingerprint(model)[:8] == model_fingerprint(other)[:8]
    assert model_fingerprint(model) != model_fingerprint(other)
    assert stream_fingerprint(model) != stream_fingerprint(other)
    with pytest.raises(EcdcError, match="another decoder or settings"):
        decompress(compress(model, noise(1, 1, 9001)[0], 1.8), other)
    if name != "sampling_rate":  # which changes how fast the same samples are played, and chunks' length
        audio = noise(1, 1, 9001)
        ours, theirs = (one.encode(audio, return_latents=True) for one in (model, other))
        same = [torch.equal(ours.latents, theirs.latents)] if ours.latents.shape == theirs.latents.shape else []
        ours = model.decode(**ours).audio_values
        if name in ("trim_right_ratio", "overlap"):  # of the decoder alone; its chunks lie otherwise
            same = [torch.equal(ours, other.decode(**theirs).audio_values)]
        assert not any(same)


@pytest.mark.parametrize("name", OTHER_SHAPES)
def test_fields_that_do_not_enter_are_told_by_the_tensors(name):
    shapes = [
        {key: tensor.shape for key, tensor in EncodecModel(EncodecConfig(**fields)).state_dict().items()}
        for fields in (TINY, TINY | {name: OTHER_SHAPES[name]})
    ]
    assert shapes[0] != shapes[1]
    assert OTHER_SHAPES.keys() | {"codebook_dim"} == set(IN_TENSORS)


def test_models_of_default_settings_have_the_fingerprint_of_their_weights(bundled_model):
    """As written in every file so far, however the values are spelt; a setting that is not the default's is in it."""
    assert model_fingerprint(bundled_model) == "f64e6a8256c2ad28"
    spelt = EncodecModel(EncodecConfig(**bundled_model.config.to_dict() | {"trim_right_ratio": 1})).eval()
    spelt.load_state_dict(bundled_model.state_dict())
    assert model_fingerprint(spelt) == model_fingerprint(bundled_model)
    lm = EncodecLM.from_pretrained(bundled_lm_checkpoint())
    assert lm.config.codec_fingerprint == codebook_fingerprint(bundled_model)
    whole, spelt = (twins("overlap", value, **CHUNKS)[1] for value in (0, 0.0))
    assert model_fingerprint(whole) == model_fingerprint(spelt)


def test_a_changed_config_json_is_seen_by_decoding(bundled_model, tmp_path):
    data = compress(bundled_model, noise(1, 1, 9000)[0], 6.0)
    for name, value in (("use_causal_conv", False), ("trim_right_ratio", 0.5), ("pad_mode", "constant")):
        folder = shutil.copytree(bundled_checkpoint(), tmp_path / name)
        fields = json.loads((folder / "config.json").read_text()) | {name: value}
        (folder / "config.json").write_text(json.dumps(fields))
        other = EncodecModel.from_pretrained(folder).eval()
        with pytest.raises(EcdcError, match="the same codebooks, another decoder or settings"):
            decompress(data, other, strict=True)


@pytest.mark.parametrize(("name", "value"), [("context_seconds", 0.7), ("frame_rate", 20), ("zero_past_key", False)])
def test_settings_of_a_language_model_that_change_its_probabilities(name, value):
    lm = make_integer_lm()
    other = EncodecLM(EncodecLMConfig(**lm.config.to_dict() | {name: value})).eval()
    other.load_state_dict(lm.state_dict())
    codes = make_codes(lm, frames=30)
    assert lm_fingerprint(lm) != lm_fingerprint(other)
    assert not torch.equal(lm.frequencies(codes)[0], other.frequencies(codes)[0])


def test_heads_of_a_language_model_are_told_by_its_tables():
    assert lm_fingerprint(make_integer_lm()) != lm_fingerprint(make_integer_lm(num_attention_heads=4))
    heads = [make_integer_lm(num_attention_heads=n).integer.layers[0].score_exponent.shape for n in (2, 4)]
    assert heads[0] != heads[1]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_write_is_in_the_next_fingerprint(way, small_models):
    model, lm = copy.deepcopy(small_models["24khz"]), make_integer_lm()
    weights = model.decoder.layers[0].conv.parametrizations.weight
    for tensor, fingerprint in (
        (model.quantizer.layers[1].codebook.embed, codebook_fingerprint),
        (model.quantizer.layers[1].codebook.embed, model_fingerprint),
        (weights.original0, model_fingerprint),
        (weights.original1, model_fingerprint),
        (model.encoder.layers[0].conv.bias, stream_fingerprint),
    ):
        before = fingerprint(model)
        way(tensor, -0.9 * tensor.detach())
        assert fingerprint(model) != before
    before = lm_fingerprint(lm)
    way(lm.integer.head.bias, lm.integer.head.bias + torch.arange(len(lm.integer.head.bias), dtype=torch.int32))
    assert lm_fingerprint(lm) != before


def test_a_running_mean_of_the_codebooks_is_seen(small_models):
    model = copy.deepcopy(small_models["24khz"])
    before = codebook_fingerprint(model)
    model.quantizer.update_codebooks([model.quantizer(torch.randn(1, 16, 9)).statistics])
    assert codebook_fingerprint(model) != before
