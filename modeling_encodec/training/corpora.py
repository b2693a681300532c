"""Corpora to draw training clips from: folders, manifests, and `datasets` datasets, stored or streamed.

A stored corpus (`Corpus`) is indexed once (`clips.py`) and drawn from at random. A stream cannot be indexed, so
example number i draws from the block of rows that belongs to i (`StreamedCorpus`): what it gets depends on the seed
and i, not on the number of workers or on where the run was stopped. The price: every worker reads the whole stream.

Audio of datasets is decoded by libsndfile from the column's bytes or path, as everywhere in the project; `datasets`
would resample with other filters and needs torchcodec.
"""

import csv
import hashlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from modeling_encodec.processors.audio_ffmpeg import OTHER_SUFFIXES
from modeling_encodec.processors.audio_files import file_fault
from modeling_encodec.processors.audio_kinds import OtherFiles, list_audio, safe_name
from modeling_encodec.training.clips import (
    Clip,
    Location,
    UnusableClip,
    encoded_seconds,
    index_entries,
    index_files,
    measure_clip,
)
from modeling_encodec.training.options import CorpusConfig, RunConfig
from modeling_encodec.training.segments import (
    Segment,
    cut_location,
    row_path,
    row_segment,
    segment_keys,
    segment_name,
)


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


@dataclass(frozen=True)
class DatasetRow:
    """Encoded audio of one row of a stored dataset, fetched when called: bytes, a path, or a segment of them."""

    dataset: object
    column: str
    row: int

    def __call__(self) -> str | bytes | Segment:
        """The bytes, path or segment."""
        return row_audio("", self.dataset[self.row], self.column)[1]


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
        paths = _folder_paths(config, other, OTHER_SUFFIXES) if folder else _manifest_paths(config)
        clips, skipped = index_files(paths, cache, workers)
        for line in other.lines():
            logger.warning("corpus %s: %s", config.name, line)
    if channels == 2:
        skipped += [(clip.name, f"{clip.channels} channels do not go to 2") for clip in clips if clip.channels > 2]
        clips = [clip for clip in clips if clip.channels <= 2]
    return Corpus(config, clips, skipped)


def list_recordings(source: str | os.PathLike) -> list[tuple[str, str | Segment]]:
    """Names and locations of the audio of a folder or manifest, sorted.

    Raises:
        FileNotFoundError: if there is no such folder or manifest.
        ValueError: for a file that is no manifest.
    """
    if not Path(source).exists():
        raise FileNotFoundError(f"{source}: no such folder or manifest")
    config = CorpusConfig(Path(source).name, str(source))
    found = _folder_paths(config, OtherFiles()) if Path(source).is_dir() else _manifest_paths(config)
    named = [
        (segment_name(item.location, item.offset, item.duration), item)
        if isinstance(item, Segment)
        else (str(item),) * 2
        for item in found
    ]
    return sorted(named, key=lambda item: item[0])


def _folder_paths(config: CorpusConfig, other: OtherFiles, suffixes: tuple[str, ...] = ()) -> list[Path]:
    folder = Path(config.source)
    if not folder.is_dir():
        raise ValueError(f"corpus {config.name!r}: source is {config.source!r}, allowed: an existing folder")
    return list_audio(folder, other, suffixes=suffixes)


def _manifest_paths(config: CorpusConfig) -> list[Path | Segment]:
    manifest = Path(config.source)
    if not manifest.is_file() or manifest.suffix not in (".jsonl", ".csv", ".txt"):
        raise ValueError(
            f"corpus {config.name!r}: source is {config.source!r}, allowed: an existing .jsonl, .csv or .txt"
        )
    try:
        return [file_location(manifest, row) for row in manifest_rows(manifest)]
    except ValueError as error:
        raise ValueError(f"corpus {config.name!r}: {error}") from None


def file_location(manifest: Path, row: dict) -> Path | Segment:
    """Where the audio of a manifest's row lies."""
    path, (offset, duration) = manifest.parent / row_path(row), row_segment(row)
    return path if (offset, duration) == (None, None) else Segment(str(path), offset, duration)


@dataclass(frozen=True)
class BadRow:
    """A row of a manifest that names no file, and why."""

    reason: str


def read_manifest(manifest: Path) -> list[dict | BadRow]:
    """All rows of a .jsonl, .csv or .txt manifest.

    Raises:
        ValueError: if it is no file, or of CSV that cannot be told apart.
    """
    if fault := file_fault(manifest):
        raise ValueError(f"{manifest}: {fault}")
    with manifest.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if manifest.suffix == ".csv":
            return [_checked(row, of_csv=True) for row in _csv_rows(manifest, file)]
        lines = (line.strip() for line in file)
        return [_checked(_line_row(line, manifest.suffix)) for line in lines if line]


def _csv_rows(manifest: Path, file) -> list[dict]:
    before = csv.field_size_limit(sys.maxsize)  # texts of talks are longer than Python's 131,072 characters
    try:
        return list(csv.DictReader(file))
    except csv.Error as error:
        raise ValueError(f"{manifest} is no manifest ({error}), allowed: rows of CSV") from None
    finally:
        csv.field_size_limit(before)


def _line_row(line: str, suffix: str) -> dict | BadRow:
    if not _is_utf8(line):
        return BadRow("is not UTF-8")
    if suffix == ".txt":
        return {"path": line}
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return BadRow(f"is no JSON ({error})")


def _checked(row, *, of_csv: bool = False) -> dict | BadRow:
    """The row, if it names a file."""
    if isinstance(row, BadRow):
        return row
    if not isinstance(row, dict):
        return BadRow(f"is a {type(row).__name__}, allowed: an object with a path")
    if None in row:
        return BadRow("has more values than there are columns")
    try:
        path = row_path(row)
    except KeyError:
        return BadRow("has no path")
    except ValueError as error:
        return BadRow(str(error))
    if not isinstance(path, str) or not path:
        return BadRow(f"path is {path!r}, allowed: a text")
    return BadRow("is not UTF-8") if of_csv and not all(map(_is_utf8, filter(None, row.values()))) else row


def _is_utf8(text: str) -> bool:
    """Whether text that was read with `surrogateescape` held no other bytes."""
    return text.isascii() or not any("\udc80" <= character <= "\udcff" for character in text)


def manifest_rows(manifest: Path) -> list[dict]:
    """The rows of a .jsonl, .csv or .txt manifest, each with the `path` (or `audio_filepath`) of a file, relative to
    the manifest, and perhaps `offset` and `duration`, in seconds, of a part of it.

    Raises:
        ValueError: if a row has no path, or a key that would change what it means, or the file is not what its name
            says.
    """
    rows = read_manifest(manifest)
    for number, row in enumerate(rows, 1):
        if isinstance(row, BadRow):
            raise no_manifest(manifest, number, row)
        try:
            row_segment(row)
        except ValueError as error:
            raise ValueError(f"{manifest}, row {number}: {error}") from None
    return rows


def no_manifest(manifest: Path, number: int, row: BadRow) -> ValueError:
    """What is to be raised for a file of such rows."""
    return ValueError(f"{manifest} is no manifest (row {number}: {row.reason}), allowed: a path in every row")


def _import_datasets():
    try:
        import datasets
    except ImportError:
        raise ImportError('datasets need: pip install "modeling-encodec[train]"') from None
    return datasets


def load_dataset(config: CorpusConfig, *, revision: str | None = None):
    """The dataset of a corpus, from the Hub (a branch, tag or commit: `revision`) or a folder of `save_to_disk`.

    Raises:
        ValueError: for a split that it has not.
        ImportError: if `datasets` is missing.
    """
    datasets = _import_datasets()
    folder = Path(config.source)
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return datasets.load_dataset(
            config.source, config.subset, split=config.split, streaming=config.streaming, revision=revision
        )
    dataset = datasets.load_from_disk(config.source)
    if isinstance(dataset, dict):
        if config.split not in dataset:
            raise ValueError(f"corpus {config.name!r}: split is {config.split!r}, allowed: {', '.join(dataset)}")
        dataset = dataset[config.split]
    return dataset.to_iterable_dataset() if config.streaming else dataset


def audio_column(config: CorpusConfig, dataset, *, keep: Sequence[str] = ()):
    """The dataset's audio column, its audio left encoded, the columns to `keep`, and those that may say which part of
    a recording a row means; no others.

    Raises:
        ValueError: if it is no dataset, or has no such column.
        ImportError: without `datasets`.
    """
    datasets = _import_datasets()
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise ValueError(
            f"corpus {config.name!r}: dataset is a {type(dataset).__name__}, allowed: Dataset, IterableDataset"
        )
    if dataset.features is not None:  # a stream may not know its columns
        if config.column not in dataset.features:
            raise ValueError(
                f"corpus {config.name!r}: column is {config.column!r}, allowed: {', '.join(dataset.features)}"
            )
        if isinstance(dataset.features[config.column], datasets.Audio):
            dataset = dataset.cast_column(config.column, datasets.Audio(decode=False))
    parts = [key for key in segment_keys(dataset.column_names or ()) if key not in (config.column, *keep)]
    return dataset.with_format(None).select_columns([config.column, *keep, *parts])


def _index_dataset(config: CorpusConfig, dataset, cache: Path | None, workers: int):
    mark = dataset._fingerprint
    entries = [
        (f"{config.name}, row {row}", (mark, row), DatasetRow(dataset, config.column, row))
        for row in range(len(dataset))
    ]
    return index_entries(entries, cache and cache / "dataset.jsonl", workers)


def encoded_audio(name: str, value) -> tuple[str, Location]:
    """Name and location of a row's audio: a path, bytes, or both as {"path", "bytes"}; of anything else a location
    that refuses when it is called."""
    if isinstance(value, dict) and {"path", "bytes"} & set(value):
        if value.get("path"):
            name = f"{name} ({value['path']})"
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (str, bytes)):
        return name, value
    kind = type(value).__name__
    return name, partial(refuse, name, f"audio is a {kind}, allowed: a path, bytes, or a struct of path and bytes")


def row_audio(name: str, row: dict, column: str) -> tuple[str, Location]:
    """Name and location of the audio in a row of a table, or of the segment of it that the row means."""
    name, location = encoded_audio(name, row[column])
    try:
        return name, cut_location(location, {key: row[key] for key in segment_keys(row) if key != column})
    except ValueError as error:
        return name, partial(refuse, name, str(error))


def refuse(name: str, reason: str):
    """Raise UnusableClip: with `functools.partial` the location of what gives no audio."""
    raise UnusableClip(name, reason)
