"""Corpora to draw training clips from: folders, manifests, and `datasets` datasets, stored or streamed.

A stored corpus (`Corpus`) is indexed once (`clips.py`) and drawn from at random. A stream cannot be indexed, so
example number i draws from the block of rows that belongs to i (`StreamedCorpus`): what it gets depends on the seed
and i, not on the number of workers or on where the run was stopped. The price: every worker reads the whole stream.

Audio of datasets is decoded by libsndfile from the column's bytes or path, as everywhere in the project; `datasets`
would resample with other filters and needs torchcodec.
"""

import hashlib
import logging
import math
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from modeling_encodec.processors.audio_ffmpeg import OTHER_SUFFIXES
from modeling_encodec.processors.audio_kinds import OtherFiles, safe_name
from modeling_encodec.processors.corpus.clips import (
    Clip,
    Location,
    encoded_seconds,
    index_entries,
    index_files,
    measure_clip,
)
from modeling_encodec.processors.corpus.reading import (
    CorpusConfig,
    DatasetRow,
    audio_column,
    folder_paths,
    load_dataset,
    manifest_paths,
    row_audio,
)
from modeling_encodec.training.options import RunConfig


logger = logging.getLogger(__name__)


def choose(rng: np.random.Generator, ends: np.ndarray) -> int:
    """A number with chances proportional to the steps of the cumulative sum `ends`."""
    return min(int(np.searchsorted(ends, rng.random() * ends[-1], side="right")), len(ends) - 1)


class Corpus:
    """Indexed clips under one name; each is drawn as often as it is long.

    Attributes:
        clips: the usable clips.
        skipped: the others, as (name, reason).
        weight: chance beside the other corpora of a pool; hours of audio if the config gives none.
    """

    def __init__(self, config: CorpusConfig, clips: list[Clip], skipped: list[tuple[str, str]]):
        first = f", the first: {safe_name(skipped[0][0])}: {skipped[0][1]}" if skipped else ""
        if not clips:
            raise ValueError(
                f"corpus {config.name!r}: no usable audio in {config.source!r} ({len(skipped)} skipped{first})"
            )
        if skipped:
            total = len(clips) + len(skipped)
            logger.warning("corpus %s: %d of %d clips skipped%s", config.name, len(skipped), total, first)
        self.name, self.domain = config.name, config.domain
        self.clips, self.skipped = clips, skipped
        self._ends = np.cumsum([clip.seconds for clip in clips])
        self.weight = self._ends[-1] / 3600 if config.weight is None else config.weight

    @property
    def digest(self) -> str:
        """Changes with the lengths or the order of the clips, which decide what clip an example gets."""
        lengths = [(clip.samples, clip.sampling_rate) for clip in self.clips]
        return hashlib.sha256(repr(lengths).encode()).hexdigest()

    def draw(self, rng: np.random.Generator, index: int) -> Clip:
        """A clip for the example of number `index`."""
        return self.clips[choose(rng, self._ends)]


class StreamedCorpus:
    """Clips of a stream of encoded rows, `block_clips` at hand at a time; each is drawn as often as it is long.

    Block b of the stream, repeated without end, serves the examples b * samples_per_block and following. Going forward
    is cheap; going back, and starting late, walk the stream again from its start.
    """

    def __init__(self, config: CorpusConfig, stream, *, block_clips: int = 256, samples_per_block: int = 2048):
        """`stream`: a `datasets.IterableDataset` with encoded audio in the config's column. A ValueError without a
        weight in the config."""
        if config.weight is None:
            raise ValueError(f"corpus {config.name!r} is streamed and needs a weight: its hours are not known")
        self.name, self.domain, self.weight = config.name, config.domain, config.weight
        self.block_clips, self.samples_per_block = block_clips, samples_per_block
        self._stream, self._column = stream, config.column
        self._length: int | None = None  # rows of the stream, once its end was seen
        self._forget()

    def draw(self, rng: np.random.Generator, index: int) -> Clip:
        """A clip for the example of number `index`.

        Raises:
            UnusableClip: if the drawn row gives no audio.
            ValueError: if the stream holds no rows.
        """
        self._go_to(index // self.samples_per_block)
        row = choose(rng, self._ends)
        if row not in self._measured:
            self._measured[row] = measure_clip(*self._rows[row])
        return self._measured[row]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_process": None, "_walk": None, "_rows": [], "_measured": {}}

    def _forget(self) -> None:
        self._process = os.getpid()
        self._block, self._walk = -1, None
        self._rows: list[tuple[str, Location]] = []
        self._ends = np.zeros(0)
        self._measured: dict[int, Clip] = {}

    def _go_to(self, block: int) -> None:
        if self._process != os.getpid():  # forked: files that the stream has open are shared with the other process
            self._forget()
        if block == self._block:
            return
        if self._walk is None or block < self._block:
            self._walk = self._rows_from(block * self.block_clips)
        else:
            between = (block - self._block - 1) * self.block_clips
            next(islice(self._walk, between, between), None)
        self._rows = list(islice(self._walk, self.block_clips))
        # A row without a header counts as a second, so that it is drawn now and then and reported.
        self._ends = np.cumsum([encoded_seconds(location) or 1.0 for _, location in self._rows])
        self._block, self._measured = block, {}

    def _rows_from(self, first: int) -> Iterator[tuple[str, Location]]:
        """(name, location) of the rows from number `first` on, of the stream repeated without end."""
        while True:
            if self._length:
                first %= self._length
            number = first
            for row in self._values(first):
                yield row_audio(f"{self.name}, row {number}", row, self._column)
                number += 1
            if number == first > 0:  # shorter than what was to be skipped: count it
                self._length = sum(1 for _ in self._values(0))
            else:
                self._length, first = number, 0
            if not self._length:
                raise ValueError(f"corpus {self.name!r}: the stream holds no rows")

    def _values(self, first: int) -> Iterator:
        stream = self._stream.skip(first) if first else self._stream
        # Not iter(stream): in a worker of a torch loader it gives only that worker's shards.
        for rows in stream.iter(batch_size=16):
            yield from (dict(zip(rows, values)) for values in zip(*rows.values()))


def open_corpora(config: RunConfig, channels: int, *, datasets: dict | None = None) -> list:
    """The corpora of a run, for a model of so many `channels`.

    `datasets`: `datasets.Dataset` or `IterableDataset` objects by corpus name, used instead of the corpus's source.

    Raises:
        ValueError: for a corpus without usable audio, or a configuration that cannot work.
        ImportError: if `datasets` is needed and missing.
    """
    datasets = datasets or {}
    unknown = sorted(set(datasets) - {corpus.name for corpus in config.corpora})
    if unknown:
        names = ", ".join(corpus.name for corpus in config.corpora)
        raise ValueError(f"dataset given for corpus {unknown[0]!r}, allowed: {names}")
    return [
        open_corpus(
            corpus, channels, cache_folder=index_folder(config), workers=config.workers,
            dataset=datasets.get(corpus.name),
        )
        for corpus in config.corpora
    ]  # fmt: skip


def index_folder(config: RunConfig) -> Path:
    """Where a run keeps what it learned of its files."""
    return Path(config.index) if config.index else Path(config.output) / "index"


def open_corpus(
    config: CorpusConfig,
    channels: int,
    *,
    cache_folder: str | os.PathLike | None = None,
    workers: int = 1,
    dataset=None,
) -> Corpus | StreamedCorpus:
    """One corpus, indexed by so many `workers`; from `dataset` if one is given, else from the config's source.

    Raises:
        ValueError: if it holds no usable audio, or the configuration cannot work.
        ImportError: if `datasets` is needed and missing.
    """
    if config.weight is not None and not (config.weight >= 0 and math.isfinite(config.weight)):
        raise ValueError(
            f"corpus {config.name!r}: weight is {config.weight}, allowed: a finite number of at least 0, or none"
        )
    # A folder for each corpus, so that opening one does not drop what is known of the others.
    cache = cache_folder and Path(cache_folder) / re.sub(r"[^\w.-]", "_", config.name)
    if dataset is not None or config.kind == "dataset":
        dataset = audio_column(config, load_dataset(config) if dataset is None else dataset)
        if not hasattr(dataset, "__len__"):
            return StreamedCorpus(config, dataset)
        clips, skipped = _index_dataset(config, dataset, cache, workers)
    else:
        other = OtherFiles()
        # What ffmpeg alone reads is listed too, so that each of these files is told of as skipped.
        folder = config.kind == "folder"
        paths = folder_paths(config, other, OTHER_SUFFIXES) if folder else manifest_paths(config)
        clips, skipped = index_files(paths, cache, workers)
        for line in other.lines():
            logger.warning("corpus %s: %s", config.name, line)
    if channels == 2:
        skipped += [(clip.name, f"{clip.channels} channels do not go to 2") for clip in clips if clip.channels > 2]
        clips = [clip for clip in clips if clip.channels <= 2]
    return Corpus(config, clips, skipped)


def _index_dataset(config: CorpusConfig, dataset, cache: Path | None, workers: int):
    mark = dataset._fingerprint
    entries = [
        (f"{config.name}, row {row}", (mark, row), DatasetRow(dataset, config.column, row))
        for row in range(len(dataset))
    ]
    return index_entries(entries, cache and cache / "dataset.jsonl", workers)
