"""What a corpus holds: the audio that a folder, a manifest or a dataset names, and where each piece of it lies."""

import csv
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from modeling_encodec.processors.audio_files import file_fault
from modeling_encodec.processors.audio_kinds import OtherFiles, list_audio
from modeling_encodec.processors.corpus.clips import Location, UnusableClip
from modeling_encodec.processors.corpus.segments import (
    Segment,
    cut_location,
    row_path,
    row_segment,
    segment_keys,
    segment_name,
)


@dataclass
class CorpusConfig:
    """Where one corpus lies and how often it is drawn."""

    name: str
    source: str  # a folder, a manifest (.jsonl, .csv, .txt), or a dataset: Hub id or folder of `save_to_disk`
    kind: Literal["folder", "manifest", "dataset"] = "folder"
    domain: Literal["speech", "music", "general"] = "speech"
    weight: float | None = None  # chance beside the other corpora of a pool; its hours of audio without one
    split: str = "train"  # datasets only, like the rest
    subset: str | None = None
    column: str = "audio"
    streaming: bool = False
    licence: str = ""  # for the card


@dataclass(frozen=True)
class DatasetRow:
    """Encoded audio of one row of a stored dataset, fetched when called: bytes, a path, or a segment of them."""

    dataset: object
    column: str
    row: int

    def __call__(self) -> str | bytes | Segment:
        """The bytes, path or segment."""
        return row_audio("", self.dataset[self.row], self.column)[1]


def list_recordings(source: str | os.PathLike) -> list[tuple[str, str | Segment]]:
    """Names and locations of the audio of a folder or manifest, sorted.

    Raises:
        FileNotFoundError: if there is no such folder or manifest.
        ValueError: for a file that is no manifest.
    """
    if not Path(source).exists():
        raise FileNotFoundError(f"{source}: no such folder or manifest")
    config = CorpusConfig(Path(source).name, str(source))
    found = folder_paths(config, OtherFiles()) if Path(source).is_dir() else manifest_paths(config)
    named = [
        (segment_name(item.location, item.offset, item.duration), item)
        if isinstance(item, Segment)
        else (str(item),) * 2
        for item in found
    ]
    return sorted(named, key=lambda item: item[0])


def folder_paths(config: CorpusConfig, other: OtherFiles, suffixes: tuple[str, ...] = ()) -> list[Path]:
    """The audio files of a corpus that is a folder."""
    folder = Path(config.source)
    if not folder.is_dir():
        raise ValueError(f"corpus {config.name!r}: source is {config.source!r}, allowed: an existing folder")
    return list_audio(folder, other, suffixes=suffixes)


def manifest_paths(config: CorpusConfig) -> list[Path | Segment]:
    """The audio files, and segments of them, of a corpus that is a manifest."""
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
