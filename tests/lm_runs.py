"""Small training runs of a language model, and codes to learn."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from conftest import make_model

from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.training.code_sequences import CodeSequences
from modeling_encodec.training.lm_configuration import LMTrainingConfig
from modeling_encodec.training.lm_trainer import LMTrainer


SIZE, BOOKS = 16, 4
CODEC = {"num_filters": 4, "hidden_size": 16, "num_lstm_layers": 1, "codebook_size": SIZE}
BANDWIDTHS = [0.3, 0.6, 1.2]  # 1, 2 and 4 codebooks of 4 bits, 75 times a second


def patterns(rows: int, frames: int | list[int], books: int = BOOKS, seed: int = 0) -> list[np.ndarray]:
    """Codes that count upwards, each codebook at its own pace from its own start: all but the first are certain."""
    rng = np.random.default_rng(seed)
    frames = [frames] * rows if isinstance(frames, int) else frames
    paces = 1 + np.arange(books)[:, None]
    return [(rng.integers(SIZE, size=(books, 1)) + paces * np.arange(count)) % SIZE for count in frames]


def save_codes(folder: Path, rows: list, column: str = "codes") -> str:
    values = [row.tolist() if isinstance(row, np.ndarray) else row for row in rows]
    datasets.Dataset.from_dict({column: values}).save_to_disk(folder)
    return str(folder)


@pytest.fixture(name="place", scope="module")
def fixture_place(tmp_path_factory) -> Path:
    """A folder with a small codec, codes/ and held_out/ to learn and audio/."""
    folder = tmp_path_factory.mktemp("lm_training")
    make_model(EncodecConfig.preset_24khz(**CODEC, target_bandwidths=BANDWIDTHS)).save_pretrained(folder / "codec")
    save_codes(folder / "codes", patterns(12, 40))
    save_codes(folder / "held_out", patterns(3, [30, 12, 21], seed=1))
    (folder / "audio").mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).standard_normal(24000) * np.linspace(0, 0.3, 24000)
        soundfile.write(folder / "audio" / f"{number}.wav", noise, 24000)
    return folder


@pytest.fixture(name="config")
def fixture_config(place, tmp_path) -> LMTrainingConfig:
    """Six updates of a small model, of sequences of 15 frames."""
    return LMTrainingConfig(
        codec=str(place / "codec"), codes=[str(place / "codes")], segment_seconds=0.2,
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, context_seconds=0.1,
        max_positions=64, epochs=1, updates_per_epoch=6, batch_size=4, learning_rate=1e-2, warmup_updates=0,
        calibration_sequences=5, workers=0, trackers=[], device="cpu", log_every=1, output=str(tmp_path / "out"),
    )  # fmt: skip


@pytest.fixture(name="audio_config")
def fixture_audio_config(config, place) -> LMTrainingConfig:
    """The same from audio, encoded on the way."""
    corpora = [{"name": "noise", "source": str(place / "audio")}]
    return dataclasses.replace(config, codes=[], corpora=corpora, index=str(place / "index"))


def run(config: LMTrainingConfig) -> LMTrainer:
    trainer = LMTrainer(config)
    trainer.losses = record_losses(trainer)
    assert trainer.train() == "finished"
    return trainer


def record_losses(trainer: LMTrainer) -> list[dict[str, float]]:
    """What every update of `trainer` returns from now on."""
    losses, one_update = [], trainer.one_update

    def recorded(batch: dict) -> dict[str, float]:
        losses.append(one_update(batch))
        return losses[-1]

    trainer.one_update = recorded
    return losses


def write_recipe(config: LMTrainingConfig) -> str:
    recipe = Path(config.output).with_suffix(".json")
    recipe.write_text(json.dumps(dataclasses.asdict(config)))
    return str(recipe)


def run_script(config: LMTrainingConfig, *more: str, processes: int = 1) -> int:
    """`training_run.py` in processes of its own; its exit code."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), str(Path(__file__).parent / "training_run.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, write_recipe(config), "lm", *more], env=environment, timeout=300)
    return done.returncode


def sequences(*places: str, column: str = "codes", **options) -> CodeSequences:
    return CodeSequences(
        list(places), column, **{"codebooks": BOOKS, "size": SIZE, "frames": 15, "seed": 0} | options
    )  # fmt: skip
