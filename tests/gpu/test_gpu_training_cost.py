"""What an update costs on a GPU, counted on shapes alone: the host waits once, and kernels and memory have a bound."""

import types

import pytest
import torch
from devices import gpu_or_pretended

from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.training.codec_update import CodecUpdate, choices_of
from modeling_encodec.training.configuration import load_config
from modeling_encodec.training.lm_configuration import LMTrainingConfig
from modeling_encodec.training.lm_update import LMUpdate


@pytest.fixture(name="device")
def fixture_device():
    with gpu_or_pretended(shapes=True, detail=True) as found:
        yield found


def accelerator(precision: str):
    def autocast():
        return torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16")

    return types.SimpleNamespace(device=torch.device("cuda"), num_processes=1, process_index=0, autocast=autocast)


def spent(device, call) -> tuple[float, ...]:
    """Kernels, GB moved and GB at the peak of `call`, which waits once."""
    device.counts.reset()
    call()
    counts = device.counts
    assert counts.waits == 1, counts.syncs
    return counts.launches, counts.moved / 1e9, counts.peak / 1e9


# Kernels, GB moved and GB at its peak of an update of 64 x 1 s at all codebooks, discriminators learning.
COSTS = {
    "24 kHz": ("24khz", "no", (2800, 290, 20)),
    "24 kHz, bf16": ("24khz", "bf16", (3300, 210, 14)),
    "48 kHz": ("48khz", "no", (6000, 1020, 38)),
    "48 kHz, bf16": ("48khz", "bf16", (7200, 880, 30)),
}


@pytest.mark.parametrize(("name", "precision", "most"), COSTS.values(), ids=COSTS)
def test_update(device, name, precision, most):
    config = load_config(f"paper_{name}", discriminator_chance=1.0)
    model = EncodecModel(getattr(EncodecConfig, f"preset_{name}")()).to("cuda").train()
    update = CodecUpdate(model, config, accelerator(precision))
    audio = torch.zeros(64, model.config.audio_channels, model.config.sampling_rate, device="cuda")
    widest = (n for n in range(99) if choices_of(config, update.bandwidths, n).bandwidth == max(update.bandwidths))
    number = next(widest)
    update.run(audio, number)
    found = spent(device, lambda: update.run(audio, number))
    assert all(ours <= allowed for ours, allowed in zip(found, most)), found
    assert not [note for note in device.counts.notes if "float16" in note]  # what cuDNN's LSTM makes of autocast


def test_codebooks(device):
    quantizer = EncodecModel(EncodecConfig.preset_24khz()).quantizer.to("cuda")
    statistics = quantizer(torch.zeros(64, 128, 75, device="cuda")).statistics
    device.counts.reset()
    quantizer.update_codebooks([statistics], generator=torch.Generator("cpu").manual_seed(0))
    assert device.counts.waits == 0 and device.counts.launches <= 50


def test_language_model(device):
    """The loss is asked for, and nothing else; gradients of heads are put together once (22 GB else)."""
    codec = EncodecConfig.preset_24khz()
    lm = EncodecLM(EncodecLMConfig()).to("cuda").train()
    update = LMUpdate(lm, codec, LMTrainingConfig(batch_size=16, bandwidths=[24.0]), accelerator("no"))
    codes = torch.zeros(16, 32, 375, dtype=torch.int64, device="cpu")
    update.run(codes, 0)
    launches, moved, _ = spent(device, lambda: update.run(codes, 1))
    assert launches <= 1000 and moved <= 21
