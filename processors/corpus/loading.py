"""Shards of a corpus as decoded audio, made by worker processes ahead of the model.

A worker takes whole shards, one after the other, and sends what is in them: batches of clips of similar lengths, long
clips in blocks. What comes of a shard, and in which order, depends on it and the settings alone and not on the number
of workers, so that its tokens are the same whoever makes them. The price: a shard is read by one worker.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from modeling_encodec.models.batching_encodec import group_by_length
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.processors.audio import join_blocks
from modeling_encodec.processors.audio_tokens import open_clip
from modeling_encodec.processors.corpus.clips import failure
from modeling_encodec.processors.corpus.sources import Row, Shard
from modeling_encodec.streaming.streams import cut_blocks
from modeling_encodec.system.worker_processes import items_as_ready


WINDOW_BATCHES = 2  # batches' worth of clips that are sorted by length together
WINDOW_ROWS = 1024
AHEAD = 2  # batches or blocks of each worker that wait for the model


@dataclass(frozen=True)
class Place:
    """A row of a corpus: its number in its shard, its name, the values kept of it."""

    number: int
    name: str
    kept: dict


@dataclass(frozen=True)
class Clips:
    """Clips of similar lengths, whole: one after the other in `audio` (channels, all samples)."""

    shard: int
    places: list[Place]
    lengths: list[int]
    audio: np.ndarray


@dataclass(frozen=True)
class Block:
    """The next block (channels, T) of a long clip, and whether it is the last."""

    shard: int
    place: Place
    audio: np.ndarray
    last: bool


@dataclass(frozen=True)
class Unusable:
    """A row that gives no audio, and the reason. Blocks of it that came before do not count."""

    shard: int
    place: Place
    reason: str


@dataclass(frozen=True)
class WindowEnd:
    """All rows so far have been sent."""

    shard: int


@dataclass(frozen=True)
class ShardEnd:
    """The shard is at its end; or cannot be read further, for the reason `broken`. It had so many rows, and the whole
    clips among them so many samples."""

    shard: int
    rows: int
    samples: int
    broken: str | None = None


@dataclass(frozen=True)
class LoadingOptions:
    """How a corpus is decoded.

    Attributes:
        config: of the model.
        batch_seconds: audio of a batch, padding counted; longer clips come in blocks.
        block_length: samples of a block.
    """

    config: EncodecConfig
    batch_seconds: float
    block_length: int

    @property
    def most(self) -> int:
        """Samples of a batch."""
        return int(self.batch_seconds * self.config.sampling_rate)


def load_shards(shards: Sequence[Shard], options: LoadingOptions, workers: int) -> Iterator:
    """What is in the shards, decoded by so many worker processes; by this one for 0.

    Raises:
        RuntimeError: if a worker ends before it has sent all, or cannot be started.
    """
    workers = min(workers, len(shards))
    if workers == 0:
        return _decode_shards(shards, options)
    # In whatever order workers are ready: what is of one shard comes from one of them, in its order.
    makers = [partial(_decode_shards, shards[worker::workers], options) for worker in range(workers)]
    return items_as_ready(makers, method="spawn", ahead=AHEAD)


def default_workers(device: str, processes: int) -> int:
    """Workers of one of so many processes of a machine: beside a GPU they keep it busy; on a CPU they would take turns
    with the model on the same cores, so it decodes in between, which is a few percent of its time."""
    return 0 if device == "cpu" else max(1, min(8, (os.cpu_count() or 1) // processes - 1))


def _decode_shards(shards: Sequence[Shard], options: LoadingOptions) -> Iterator:
    for shard in shards:
        yield from decode_shard(shard, options)


def decode_shard(shard: Shard, options: LoadingOptions) -> Iterator:
    """What is in a shard, in windows."""
    window, broken, count = _Window(shard.number, options), None, 0
    try:
        for number, row in enumerate(shard.rows()):
            count = number + 1
            yield from window.take(number, row)
    except Exception as error:  # whatever a reader of archives makes of damage: the row's own errors are caught before
        broken = f"{type(error).__name__}: {' '.join(str(error).split())}"
    yield from window.close()
    yield ShardEnd(shard.number, count, window.decoded, broken)


class _Window:
    """Clips that wait to be sent in the order of their lengths; `decoded` are the samples of all whole ones so far."""

    def __init__(self, shard: int, options: LoadingOptions):
        self.shard, self.options = shard, options
        self.places: list[Place] = []
        self.audio: list[np.ndarray] = []
        self.rows = self.samples = self.decoded = 0

    def take(self, number: int, row: Row) -> Iterator:
        """The next row."""
        place = Place(number, row.name, row.kept)
        self.rows += 1
        samples = 0
        try:
            seconds, blocks = open_clip(row.location, self.options.config)
            if seconds > self.options.batch_seconds:
                for block, last in cut_blocks(blocks, self.options.block_length):
                    samples += block.shape[1]
                    yield Block(self.shard, place, np.ascontiguousarray(block), last)
            else:
                audio = join_blocks(blocks)
                samples = audio.shape[1]
                self.places.append(place)
                self.audio.append(audio)
                self.samples += samples
            self.decoded += samples
        except MemoryError:
            raise
        except Exception as error:  # of whatever kind: a damaged or hostile row is no reason to lose its shard
            yield Unusable(self.shard, place, failure(error))
        if self.samples >= WINDOW_BATCHES * self.options.most or self.rows == WINDOW_ROWS:
            yield from self.close()

    def close(self) -> Iterator:
        """What has waited."""
        for group in group_by_length([audio.shape[1] for audio in self.audio], self.options.most):
            audio = np.concatenate([self.audio[index] for index in group], axis=1)
            places, lengths = zip(*((self.places[index], self.audio[index].shape[1]) for index in group))
            yield Clips(self.shard, list(places), list(lengths), audio)
        self.places, self.audio, self.rows, self.samples = [], [], 0, 0
        yield WindowEnd(self.shard)
