"""EncodecConfig: the stock fields and numbers, and no value that cannot work."""

import json
import math

import pytest
import torch
import transformers
from conftest import make_model, noise

from modeling_encodec import EncodecProcessor
from modeling_encodec.bitstream.compression import compress, decompress
from modeling_encodec.checkpoints import bundled_checkpoint
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.processors.audio import read_audio, write_audio
from modeling_encodec.processors.code_vocabulary import CodeVocabulary
from modeling_encodec.processors.dataset_tokenization import CodecTokenizer
from modeling_encodec.streaming.streams import StreamingEncoder


PRESETS = {
    "24khz": EncodecConfig.preset_24khz(),
    "48khz": EncodecConfig.preset_48khz(),
    "32khz": EncodecConfig.preset_32khz(),
}
DERIVED = (
    *("chunk_length", "chunk_stride", "hop_length", "codebook_nbits", "frame_rate", "num_quantizers"),
    *("codebook_dim", "model_type"),
)


def fields(config) -> dict:
    return {key: value for key, value in config.to_dict().items() if key not in ("model_type", "transformers_version")}


def test_fields_and_defaults_are_those_of_stock():
    assert EncodecConfig().to_dict().keys() == transformers.EncodecConfig().to_dict().keys()
    ours, stock = fields(EncodecConfig()), fields(transformers.EncodecConfig())
    assert json.loads(json.dumps(ours)) == json.loads(json.dumps(stock))


@pytest.mark.parametrize("name", PRESETS)
def test_derived_numbers_are_those_of_stock(name):
    config = PRESETS[name]
    stock = transformers.EncodecConfig(**fields(config))
    assert {key: getattr(config, key) for key in DERIVED} == {key: getattr(stock, key) for key in DERIVED}


@pytest.mark.parametrize(
    ("name", "hop", "rate", "codebooks"), [("24khz", 320, 75, 32), ("48khz", 320, 150, 16), ("32khz", 640, 50, 4)]
)
def test_presets_are_the_released_models(name, hop, rate, codebooks):
    config = PRESETS[name]
    assert (config.hop_length, config.frame_rate, config.num_quantizers) == (hop, rate, codebooks)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("24khz", [2, 4, 8, 16, 32]), ("48khz", [2, 4, 8, 16]), ("32khz", [4])],
)
def test_codebooks_per_bandwidth(name, expected):
    config = PRESETS[name]
    assert [config.num_quantizers_for_bandwidth(b) for b in config.target_bandwidths] == expected


def test_parameter_counts_are_the_published_ones(released_models):
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in released_models.items()}
    assert counts == {"24khz": 14_851_810, "48khz": 14_856_294, "32khz": 56_884_674}


@pytest.mark.parametrize("size", [2, 3, 600, 1000, 1024, 1025])
def test_codebook_size_need_not_be_a_power_of_two(size):
    config = EncodecConfig(codebook_size=size, num_filters=2)
    assert config.codebook_nbits == math.ceil(math.log2(size))
    for bandwidth in config.target_bandwidths:
        assert 1 <= config.num_quantizers_for_bandwidth(bandwidth) <= config.num_quantizers


def test_reads_a_saved_config_unchanged(tmp_path):
    text = json.loads((bundled_checkpoint() / "config.json").read_text())
    config = EncodecConfig.from_pretrained(bundled_checkpoint())
    assert all(config.to_dict()[key] == value for key, value in text.items() if key != "transformers_version")
    config.save_pretrained(tmp_path)
    assert fields(EncodecConfig.from_pretrained(tmp_path)) == fields(config)
    stock = transformers.EncodecConfig.from_pretrained(tmp_path).to_dict()
    assert all(stock[key] == value for key, value in text.items() if key != "transformers_version")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("norm_type", "batch_norm", "weight_norm"),
        ("pad_mode", "circular", "reflect"),
        ("target_bandwidths", [], "one or more"),
        ("target_bandwidths", [1.5, 0.7], "0.75"),
        ("target_bandwidths", [0, 3.0], "above 0"),
        ("target_bandwidths", [1.5, float("nan")], "finite"),
        ("target_bandwidths", [1.5, float("inf")], "finite"),
        ("target_bandwidths", [-1.5, 3.0], "above 0"),
        ("overlap", 1.0, r"\[0, 1\)"),
        ("overlap", -0.1, r"\[0, 1\)"),
        ("chunk_length_s", 0.001, "one hop"),
        ("chunk_length_s", 1.0, "overlap"),
        ("upsampling_ratios", [], "one or more"),
        ("upsampling_ratios", [8, 0], "at least 1"),
        ("upsampling_ratios", [8, -5], "at least 1"),
        ("sampling_rate", 0, "at least 1"),
        ("audio_channels", 0, "at least 1"),
        ("hidden_size", 0, "at least 1"),
        ("num_filters", 0, "at least 1"),
        ("num_residual_layers", -1, "at least 0"),
        ("kernel_size", 0, "at least 1"),
        ("last_kernel_size", -7, "at least 1"),
        ("residual_kernel_size", 0, "at least 1"),
        ("dilation_growth_rate", 0, "at least 1"),
        ("compress", 0, "at least 1"),
        ("compress", 64, "num_filters"),
        ("num_lstm_layers", 0, "at least 1"),
        ("trim_right_ratio", 1.5, r"\[0, 1\]"),
        ("codebook_size", 1, "at least 2"),
        ("codebook_dim", 64, "hidden_size"),
    ],
)
def test_refuses_what_cannot_work_with_the_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=allowed) as caught:
        EncodecConfig(**{field: value})
    message = str(caught.value)
    assert "\n" not in message
    if message.startswith(field):
        assert repr(value) in message


def test_wrong_types_are_refused():
    for field, value in {"num_filters": 2.5, "normalize": "yes", "target_bandwidths": 6.0}.items():
        with pytest.raises(Exception, match=field):
            EncodecConfig(**{field: value})


def test_a_model_with_an_odd_codebook_codes():
    model = EncodecModel(EncodecConfig(codebook_size=1000, num_filters=2)).eval()
    output = model.encode(torch.randn(1, 1, 3200), bandwidth=24.0)
    assert output.audio_codes.shape == (1, 1, 32, 10) and output.audio_codes.max() < 1000


STOCK_FIELDS = set(transformers.EncodecConfig.__annotations__)
SMALL = {"num_filters": 4, "hidden_size": 16, "num_lstm_layers": 1, "codebook_size": 64}
STOCK = {
    # A codebook costs 4.5 kbps here, and the default bandwidths begin at 1.5: Transformers' own tests use its like.
    "a codebook dearer than the first bandwidths": {"upsampling_ratios": [8, 4], "audio_channels": 2},
    "unsorted": {"target_bandwidths": [3, 0.9, 1.8]},
    "more asked for than there is": {"target_bandwidths": [3.6, 0.1, 3.6, 0.9]},
    "whole numbers": {"target_bandwidths": [1, 2], "trim_right_ratio": 0, "chunk_length_s": 1, "overlap": 0},
    "causal with group norm": {"norm_type": "time_group_norm", "target_bandwidths": [0.9, 3.6]},
    "group norm, cut on both sides": {"norm_type": "time_group_norm", "trim_right_ratio": 0.5},
    "causal chunks with group norm": {
        **{"norm_type": "time_group_norm", "chunk_length_s": 0.2, "overlap": 0.1, "normalize": True},
        "target_bandwidths": [0.9, 3.6],
    },
    "three channels": {"audio_channels": 3},
}


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_what_stock_loads_loads_here_and_the_other_way_round(name, tmp_path):
    ours = make_model(EncodecConfig(**SMALL | STOCK[name]))
    ours.save_pretrained(tmp_path / "ours")
    stock = transformers.EncodecModel.from_pretrained(tmp_path / "ours").eval()
    stock.save_pretrained(tmp_path / "stock")
    again, own = EncodecModel.from_pretrained(tmp_path / "stock").config.to_dict(), ours.config.to_dict()
    assert all(again[key] == value for key, value in own.items() if key in STOCK_FIELDS)
    assert len(stock.quantizer.layers) == len(ours.quantizer.layers) == ours.config.num_quantizers
    audio = noise(2, ours.config.audio_channels, 7001)
    for bandwidth in (None, *ours.config.target_bandwidths):
        coded = ours.encode(audio, bandwidth=bandwidth)
        if ours.config.audio_channels > 2:  # its `encode` takes no more, its networks do
            latents = ours.encode(audio, return_latents=True).latents[0]
            assert torch.allclose(latents, stock.encoder(audio), atol=1e-3)
            theirs = stock.decoder(stock.quantizer.decode(coded.audio_codes[0].transpose(0, 1)))
        else:
            assert torch.equal(stock.encode(audio, bandwidth=bandwidth).audio_codes, coded.audio_codes)
            pad = coded.last_frame_pad_length
            theirs = stock.decode(coded.audio_codes, coded.audio_scales, last_frame_pad_length=pad).audio_values
        decoded = ours.decode(**coded).audio_values
        assert torch.allclose(decoded, theirs[..., : decoded.shape[2]], atol=1e-5)
        if bandwidth is not None:
            count = CodeVocabulary.for_model(ours.config, bandwidth=bandwidth).num_quantizers
            assert count == coded.audio_codes.shape[2] == ours.quantizer.get_num_quantizers_for_bandwidth(bandwidth)


def test_whole_numbers_are_saved_as_what_stock_takes(tmp_path):
    config = EncodecConfig(target_bandwidths=[3, 6])
    config.overlap, config.trim_right_ratio = 0, 1  # set later too
    config.save_pretrained(tmp_path)
    assert '"overlap": 0.0' in (tmp_path / "config.json").read_text()
    stock = transformers.EncodecConfig.from_pretrained(tmp_path)
    assert [stock.target_bandwidths, stock.overlap, stock.trim_right_ratio] == [[3.0, 6.0], 0.0, 1.0]


@torch.no_grad()
def test_three_channels_go_through_files_streams_and_processors(tmp_path):
    model = make_model(EncodecConfig(**SMALL, audio_channels=3, target_bandwidths=[0.3, 3.6]))
    audio = noise(1, 3, 7001)
    coded = model.encode(audio, bandwidth=3.6)
    decoded = model.decode(**coded).audio_values[0]
    assert torch.equal(decompress(compress(model, audio[0], 3.6), model)[0], decoded)
    encoder = StreamingEncoder(model, 3.6)
    assert torch.equal(encoder.finish(audio), coded.audio_codes[0])
    write_audio(tmp_path / "three.wav", audio[0].numpy(), 24000)
    read, _ = read_audio(tmp_path / "three.wav", 24000, 3)
    batch = EncodecProcessor.for_model(model, bandwidth=0.3)(read, 24000)
    assert batch["input_ids"].shape == (1, 22 + 2)  # one codebook, though 0.3 kbps does not pay for it
    tokens = CodecTokenizer(model, 3.6)({"audio": [{"array": audio[0].numpy(), "sampling_rate": 24000}]})["codes"][0]
    assert torch.equal(torch.as_tensor(tokens.astype("int64")), coded.audio_codes[0, 0])
