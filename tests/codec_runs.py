"""Small training runs of a codec."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import make_model

from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.training.configuration import TrainingConfig
from modeling_encodec.training.trainer import CodecTrainer


SMALL = {"num_filters": 4, "hidden_size": 16, "num_lstm_layers": 1, "codebook_size": 64}


@pytest.fixture(name="place", scope="module")
def fixture_place(tmp_path_factory) -> Path:
    """A folder with audio/ (six sweeps in noise), small models for 24 kHz and 48 kHz, and a parent to fine-tune."""
    folder = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(0)
    time_axis = np.arange(24000) / 24000
    (folder / "audio").mkdir()
    for number in range(6):
        tone = 0.3 * np.sin(2 * np.pi * (200 + 150 * number) * time_axis * (1 + 0.1 * time_axis))
        soundfile.write(folder / "audio" / f"{number}.wav", tone + 0.03 * rng.standard_normal(24000), 24000)
    make_model(EncodecConfig.preset_24khz(**SMALL, target_bandwidths=[0.9, 1.8])).save_pretrained(folder / "24khz")
    make_model(EncodecConfig.preset_48khz(**SMALL, target_bandwidths=[1.8, 3.6])).save_pretrained(folder / "48khz")
    return folder


@pytest.fixture(name="config")
def fixture_config(place, tmp_path) -> TrainingConfig:
    """Six updates of a small model."""
    return TrainingConfig(
        model=str(place / "24khz"),
        corpora=[{"name": "sweeps", "source": str(place / "audio")}],
        segment_seconds=0.1,
        epochs=1,
        updates_per_epoch=6,
        batch_size=4,
        discriminator_filters=4,
        workers=0,
        trackers=[],
        device="cpu",
        output=str(tmp_path / "out"),
        index=str(place / "index"),
        log_every=1,
    )


def run(config: TrainingConfig) -> CodecTrainer:
    trainer = CodecTrainer(config)
    assert trainer.train() == "finished"
    return trainer
