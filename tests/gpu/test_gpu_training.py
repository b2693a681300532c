"""Updates on a GPU beside the same ones on the CPU: losses, what is saved, what is validated."""

import types
from pathlib import Path

import pytest
import torch
from conftest import make_model, noise
from devices import REAL, assert_near, assert_on, full_float32, moved
from lm_models import make_lm

from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.quantization_encodec import codebook_usage
from modeling_encodec.training.codec_update import CodecUpdate
from modeling_encodec.training.configuration import TrainingConfig
from modeling_encodec.training.lm_configuration import LMTrainingConfig
from modeling_encodec.training.lm_update import LMUpdate
from modeling_encodec.training.optimization import Averages
from modeling_encodec.training.validation import decode_clips, validate


@pytest.fixture(autouse=True)
def in_full_float32(device):
    with full_float32():
        yield


SMALL = {"num_filters": 4, "hidden_size": 16, "num_lstm_layers": 1, "codebook_size": 64}
AUDIOCRAFT = {
    "mel_loss": "audiocraft", "generator_loss": "linear", "feature_loss": "absolute", "discriminators": "single",
    "balancer": False, "upstream_quantizer": True,
}  # fmt: skip
QUICK = {
    "24 kHz": ("24khz", {}, "no"),
    "48 kHz": ("48khz", {}, "no"),
    "bf16": ("24khz", {}, "bf16"),
}
SLOW = {
    "audiocraft's losses": ("24khz", AUDIOCRAFT, "no"),
    "in parts": ("24khz", {"accumulation_steps": 2, "max_gradient_norm": 1.0}, "no"),
    "encoder frozen": ("24khz", {"freeze": "encoder", "model": "x"}, "no"),
    "decoder frozen": ("24khz", {"freeze": "decoder", "model": "x"}, "no"),
    "bf16, 48 kHz": ("48khz", {}, "bf16"),
    "no discriminators": ("24khz", {"adversarial_weight": 0.0, "feature_weight": 0.0}, "no"),
}
VARIANTS = [*(pytest.param(*v, id=k) for k, v in QUICK.items())]
VARIANTS += [pytest.param(*v, id=k, marks=pytest.mark.slow) for k, v in SLOW.items()]


def accelerator(where: str, precision: str = "no"):
    device = torch.device(where)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    about = {"num_processes": 1, "process_index": 0, "is_main_process": True}
    return types.SimpleNamespace(device=device, autocast=autocast, **about)


def codec(name: str):
    preset = getattr(EncodecConfig, f"preset_{name}")
    return make_model(preset(**SMALL, target_bandwidths=[0.9, 1.8] if name == "24khz" else [1.8, 3.6]))


def updates(model, options: dict, precision: str, where: str, count: int = 2):
    """So many updates, the codebooks begun first: the losses of each, and what did them."""
    defaults = {"batch_size": 4, "segment_seconds": 0.1, "discriminator_filters": 4, "discriminator_chance": 1.0}
    config = TrainingConfig(**(defaults | options))
    torch.manual_seed(0)
    update = CodecUpdate(model.to(where).train(), config, accelerator(where, precision))
    losses = []
    for number in range(count):
        audio = noise(4, model.config.audio_channels, model.config.sampling_rate // 10, seed=number).to(where)
        if number == 0 and "freeze" not in options:
            update.start_codebooks([audio])
        losses.append(update.run(audio, number))
    return losses, update, audio


@pytest.mark.parametrize(("name", "options", "precision"), VARIANTS)
def test_losses_are_those_of_the_cpu(name, options, precision):
    ours, update, audio = updates(codec(name), options, precision, "cuda")
    theirs, *_ = updates(codec(name), options, "no", "cpu")
    allowed = 0.3 if precision == "bf16" else 0.1 if REAL else 0.02
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=allowed, abs=1e-2 if precision == "bf16" else 1e-5), key
    assert_on("cuda:0", *update.model.state_dict().values(), update.code_counts)
    assert codebook_usage(update.code_counts)
    update.load_state_dict(moved(update.state_dict(), "cpu"))  # as a checkpoint is read
    update.run(audio, 2)
    assert_on("cuda:0", *update.model.state_dict().values(), update.code_counts)


@pytest.mark.slow
def test_resumed_from_the_cpu_is_not_interrupted():
    whole, *_ = updates(codec("24khz"), {}, "no", "cuda", 3)
    _, update, _ = updates(codec("24khz"), {}, "no", "cuda", 2)
    state = moved(update.state_dict(), "cpu")
    _, again, _ = updates(codec("24khz"), {}, "no", "cuda", 1)
    again.load_state_dict(state)
    losses = again.run(noise(4, 1, 2400, seed=2).to("cuda"), 2)
    assert losses == pytest.approx(whole[2], rel=0.05 if REAL else 1e-5)


def test_validation_and_averaged_weights(tmp_path):
    clips = {"a": noise(1, 1, 24000), "b": noise(1, 1, 9000, seed=1)}
    expected = validate(codec("24khz"), clips)
    model = codec("24khz").to("cuda")
    averages = Averages(model, 0.9)
    averages.update()
    with averages:
        found = validate(model, clips, accelerator("cuda"))
        decode_clips(model, clips, Path(tmp_path))
    assert {path.name for path in tmp_path.iterdir()}
    for kbps, values in expected.items():
        assert_near(found[kbps]["mel_distance"], values["mel_distance"], 1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_language_model(precision):
    codes = torch.randint(16, (4, 4, 30), generator=torch.Generator().manual_seed(0))
    codes[1, :, 20:] = -100
    config = LMTrainingConfig(batch_size=4, accumulation_steps=2)
    about = types.SimpleNamespace(
        target_bandwidths=[0.3, 1.2], num_quantizers_for_bandwidth=lambda kbps: round(kbps / 0.3), sampling_rate=24000,
        hop_length=320, codebook_nbits=4, frame_rate=75,
    )  # fmt: skip
    losses = []
    for where in ("cpu", "cuda"):
        update = LMUpdate(make_lm().to(where).train(), about, config, accelerator(where, precision))
        rows = [update.run(codes.to(where), 0)]
        update.load_state_dict(moved(update.state_dict(), "cpu"))
        rows.append(update.run(codes.to(where), 1))
        losses.append(rows)
    for ours, theirs in zip(*losses, strict=True):
        assert ours == pytest.approx(theirs, rel=0.05 if precision == "bf16" else 1e-3, abs=1e-3)
