"""Small audio files and corpora for the tests of the training data."""

from itertools import islice

import numpy as np
import soundfile
import torch

from modeling_encodec.processors.corpus.reading import CorpusConfig
from modeling_encodec.training.configuration import TrainingConfig
from modeling_encodec.training.corpora import Corpus, open_corpus
from modeling_encodec.training.mixing import batch_loader


RATE = 8000


def sound(samples: int, channels: int = 1, seed: int = 0, level: float = 0.1) -> np.ndarray:
    """Noise (samples, channels)."""
    return np.random.default_rng(seed).standard_normal((samples, channels)).clip(-4, 4) * level


def write(path, samples=RATE, rate=RATE, channels=1, seed=0, level=0.1, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound(samples, channels, seed, level), rate, **options)
    return path


def constant(path, value: float, samples=2 * RATE, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(samples, value), rate, subtype="FLOAT")
    return path


def training_config(folder, **options) -> TrainingConfig:
    return TrainingConfig(**{"segment_seconds": 0.1, "workers": 0, "output": str(folder / "out")} | options)


def speech_and_music(folder) -> list[Corpus]:
    for number in range(4):
        write(folder / "speech" / f"{number}.wav", RATE + 1000 * number, seed=number)
        write(folder / "music" / f"{number}.flac", 2 * RATE, 16000, 2, seed=10 + number)
    return [
        open_corpus(CorpusConfig("voices", str(folder / "speech"), domain="speech"), 1),
        open_corpus(CorpusConfig("songs", str(folder / "music"), domain="music"), 1),
    ]


def batches(dataset, count=4, **options) -> list[torch.Tensor]:
    return [batch["audio"] for batch in islice(batch_loader(dataset, batch_size=3, **options), count)]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others))
