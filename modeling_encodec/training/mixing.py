"""Training examples: clips drawn from the corpora, levelled, mixed and reverberated (paper 4.1), in batches.

Everything about example number i follows from the seed and i. So the batches are the same for any number of reading
processes, a run goes on where it stopped without a state of its data, and one process with a batch of 2B trains on
what two processes with B train on.

What the paper leaves open, decided here: levels are set for each clip, before mixing; pools draw a corpus by weight
(hours, unless given), then a clip by duration; a mixture that clips is drawn anew as a whole.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from modeling_encodec.processors.corpus.clips import Clip, UnusableClip, read_crop
from modeling_encodec.system.worker_processes import items_in_turn
from modeling_encodec.training.corpora import Corpus, StreamedCorpus, choose, index_folder
from modeling_encodec.training.in_memory import decode_corpora
from modeling_encodec.training.options import RunConfig
from modeling_encodec.training.reverberation import ImpulseResponses, reach, reverberate


MIXTURE_ATTEMPTS = 100
CLIP_ATTEMPTS = 100
LAST_RESORT_PEAK = 0.99
NORMALIZED_RMS = 0.1
AHEAD = 2  # batches of each worker that wait


@dataclass(frozen=True)
class Strategy:
    """One way to make an example: how often, from which corpora, of how many clips, and whether rooms are applied."""

    chance: float
    corpora: Sequence[Corpus | StreamedCorpus]
    clips: int
    reverberated: bool = True


class TrainingAudio(Dataset):
    """Endless examples by number (paper 4.1): {"audio": float32 (channels, T), "skipped": [(name, reason), ...]}.

    `skipped` lists the clips that were drawn for the example and could not be read; others took their place.
    """

    def __init__(
        self, config: RunConfig, corpora: Sequence[Corpus | StreamedCorpus], sampling_rate: int, channels: int
    ):
        """For a model at `sampling_rate` Hz with so many `channels`.

        Raises:
            ValueError: if the corpora and the chances leave nothing to draw, no impulse response is usable, or the
                corpora do not fit into memory where they are to.
        """
        self.config, self.sampling_rate, self.channels = config, sampling_rate, channels
        self.samples = round(config.segment_seconds * sampling_rate)
        if self.samples < 1:
            raise ValueError(f"segment_seconds is {config.segment_seconds}, allowed: at least one sample")
        if config.data_in_memory:
            decode_corpora(corpora, sampling_rate, channels, config.workers)
        self.strategies = _strategies(config, corpora)
        self.impulses = None
        if config.impulse_responses and config.reverberation_chance > 0:
            self.impulses = ImpulseResponses(
                config.impulse_responses, sampling_rate, cache_folder=index_folder(config), workers=config.workers
            )

    def __getitem__(self, index: int) -> dict:
        """Example number `index`, from 0 on without end.

        Raises:
            RuntimeError: if a hundred of the clips drawn for it could not be read.
        """
        rng = np.random.default_rng([self.config.seed, index])
        skipped: list[tuple[str, str]] = []
        for _ in range(MIXTURE_ATTEMPTS):
            mixture = self._draw_mixture(rng, index, skipped)
            peak = float(np.abs(mixture).max())
            if peak <= 1:
                break
        else:
            # Gains that always clip must not hang the run; cut samples would teach the codec distortion.
            mixture *= LAST_RESORT_PEAK / peak
        return {"audio": torch.from_numpy(mixture), "skipped": skipped}

    def _draw_mixture(self, rng: np.random.Generator, index: int, skipped: list) -> np.ndarray:
        strategy = self.strategies[choose(rng, np.cumsum([item.chance for item in self.strategies]))]
        impulse, before, after = None, 0, 0
        if strategy.reverberated and self.impulses and rng.random() < self.config.reverberation_chance:
            impulse = _until_usable(lambda: self.impulses.draw(rng), skipped)
            before, after = reach(impulse)

        def draw_voice() -> np.ndarray:
            corpus = strategy.corpora[choose(rng, np.cumsum([item.weight for item in strategy.corpora]))]
            return self._draw_crop(rng, corpus.draw(rng, index), before, after)

        mixture = sum(_until_usable(draw_voice, skipped) for _ in range(strategy.clips))
        if impulse is not None:
            # The crops began earlier, so that the segment hears the room's answer to what came before it.
            mixture = np.ascontiguousarray(reverberate(mixture, impulse)[:, before : before + self.samples])
        return mixture

    def _draw_crop(self, rng: np.random.Generator, clip: Clip, before: int, after: int) -> np.ndarray:
        """A levelled crop of segment length anywhere in the clip, or all of a shorter clip anywhere in silence."""
        spare = clip.length(self.sampling_rate) - self.samples
        start = int(rng.integers(min(0, spare), max(0, spare) + 1))
        gain = 10 ** (rng.uniform(self.config.gain_min, self.config.gain_max) / 20)
        if self.config.normalize == "peak":
            gain /= clip.peak
        elif self.config.normalize == "rms":
            gain *= NORMALIZED_RMS / clip.rms
        length = before + self.samples + after
        return np.float32(gain) * read_crop(clip, start - before, length, self.sampling_rate, self.channels)


def batch_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_batch: int = 0,
    workers: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[dict]:
    """Endless batches of one process: the examples' tensors, stacked, and all that they skipped.

    Batch number u of the process `rank` holds the examples from (u * world_size + rank) * batch_size on; the first is
    batch `start_batch`. `workers` processes read ahead, or none; `close()` ends them. They end early, and so do the
    batches, when `stop`, which is asked before every batch and while one is waited for, says so.

    Raises:
        ValueError: for a number that cannot be.
        RuntimeError: while iterating, if a worker ends or cannot be started.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("start_batch", start_batch, 0),
        ("workers", workers, 0),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}, allowed: at least {least}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}, allowed: 0 to {world_size - 1}")

    step = max(1, workers)
    makers = [_BatchMaker(dataset, batch_size, rank, world_size, start_batch + turn, step) for turn in range(step)]
    return _batches_in_turn(makers, stop) if workers else _batches_here(makers[0], stop)


def _batches_here(maker: "_BatchMaker", stop: Callable[[], bool]) -> Iterator[dict]:
    batches = maker()
    while not stop():
        yield _to_tensors(next(batches))


def _batches_in_turn(makers: "list[_BatchMaker]", stop: Callable[[], bool]) -> Iterator[dict]:
    # Forking is safe here: workers use no CUDA and no thread pool of the parent's (one torch thread each). In return
    # they start at once, scripts need no import guard, and streams with local functions need not be pickled.
    method = "fork" if sys.platform == "linux" else "spawn"
    with closing(items_in_turn(makers, method=method, ahead=AHEAD, stop=stop)) as batches:
        yield from map(_to_tensors, batches)


@dataclass(frozen=True)
class _BatchMaker:
    """When called gives every `step`th batch from number `first` on, without end."""

    dataset: Dataset
    batch_size: int
    rank: int
    world_size: int
    first: int
    step: int

    def __call__(self) -> Iterator[dict]:
        for batch in itertools.count(self.first, self.step):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield _collate([self.dataset[number] for number in range(first, first + self.batch_size)])


def _collate(examples: list[dict]) -> dict:
    """Tensors are stacked, as arrays: those go through a pipe as their bytes."""
    tensors = [name for name, value in examples[0].items() if isinstance(value, torch.Tensor)]
    stacked = {name: torch.stack([example[name] for example in examples]).numpy() for name in tensors}
    return {**stacked, "skipped": [item for example in examples for item in example["skipped"]]}


def _to_tensors(batch: dict) -> dict:
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}


def _strategies(config: RunConfig, corpora: Sequence[Corpus | StreamedCorpus]) -> list[Strategy]:
    """Paper 4.1, without those that have nothing to draw from."""
    drawn = [corpus for corpus in corpora if corpus.weight > 0]
    music = [corpus for corpus in drawn if corpus.domain == "music"]
    other = [corpus for corpus in drawn if corpus.domain != "music"]
    strategies = [
        Strategy(config.chance_of_music, music, 1, reverberated=False),
        Strategy(config.chance_of_other, other, 1),
        Strategy(config.chance_of_two, drawn, 2),
        Strategy(config.chance_of_three, other, 3),
    ]
    possible = [strategy for strategy in strategies if strategy.chance > 0 and strategy.corpora]
    if not possible:
        chances = ", ".join(str(strategy.chance) for strategy in strategies)
        raise ValueError(
            f"nothing to draw: chances of music, other, two and three are {chances}, corpora with a weight: "
            f"{len(music)} of music, {len(other)} other, allowed: a chance above 0 that has corpora"
        )
    return possible


def _until_usable(draw: Callable[[], np.ndarray], skipped: list[tuple[str, str]]) -> np.ndarray:
    while True:
        try:
            return draw()
        except UnusableClip as error:
            skipped.append((error.name, error.reason))
            if len(skipped) >= CLIP_ATTEMPTS:
                raise RuntimeError(
                    f"{len(skipped)} clips of one example could not be read, the last: {error}"
                ) from error
