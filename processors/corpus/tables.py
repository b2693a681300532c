"""Corpora of tables: Parquet files, and `datasets` datasets, stored or streamed.

Parquet is read by pyarrow, 16 rows at a time from the shard's own file: `datasets`' reader does not open a corpus at
all if its first file is damaged. Memory is that of a few of the file's pages, which with long clips may be as large as
its row groups. Audio stays encoded, so that torchcodec is not needed.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow

from modeling_encodec.models.inputs_encodec import audio_array
from modeling_encodec.processors.audio_files import file_fault
from modeling_encodec.processors.audio_kinds import safe_name
from modeling_encodec.processors.corpus.clips import Location, failure
from modeling_encodec.processors.corpus.reading import CorpusConfig, audio_column, encoded_audio, load_dataset, refuse
from modeling_encodec.processors.corpus.rows import (
    LEAST_ROWS,
    MOST_ROWS,
    Listing,
    Reach,
    Row,
    Shard,
    Source,
    choose_column,
    one_line_reasons,
    refuse_options,
    shard_share,
)
from modeling_encodec.processors.corpus.segments import cut_location, segment_keys


TABLE_ROWS = 16  # that are in memory at a time


def parquet_source(
    folder: Path, files: list, name: str, keep: tuple[str, ...], column: str | None, reach: Reach
) -> Source:
    """Parquet files of a `folder`, as (name, state), a shard each; see `open_source`, also for its ValueErrors."""
    listing = Listing()
    sizes = [listing.add(*file) for file in files]
    schema = _first_schema(folder, [file for file, _ in files], name)
    column = choose_column(name, schema.names, column, typed=list(_features(schema, "Audio")))
    types = _kept_types(name, schema, keep, column)
    shards = [
        ParquetShard(number, size, str(folder / file), safe_name(file), column, types, reach)
        for number, (size, (file, _)) in enumerate(zip(sizes, files))
    ]
    about = {"kind": "parquet", "name": safe_name(name)} | listing.describe()
    return Source("B", shards, types, about | {"keep": list(keep), "column": column, "urls": list(reach.urls)})


def stored_source(
    config: CorpusConfig,
    keep: tuple[str, ...],
    column: str | None,
    shard_rows: int | None,
    *,
    revision: str | None,
    saved: bool,
    reach: Reach,
) -> Source:
    """A dataset of the Hub, or `saved` by `save_to_disk`; see `open_source`, also for its ValueErrors."""
    if saved and (config.subset, revision) != (None, None):
        name, value = ("subset", config.subset) if config.subset is not None else ("revision", revision)
        raise ValueError(f"{config.source}: {name} is {value!r}, allowed: none, since it is a saved dataset")
    if saved:
        return dataset_source(_loaded(config), config.name, keep, column, shard_rows, reach=reach)
    commit = _commit(config.source, revision)
    dataset = load_dataset(config, revision=commit)
    reach = Reach((*reach.urls, *_hub_urls(config.source)), _caches())
    source = dataset_source(dataset, config.name, keep, column, shard_rows, commit=commit, reach=reach)
    source.description.update(split=config.split, subset=config.subset)
    return source


def dataset_source(
    dataset,
    name: str,
    keep: tuple[str, ...],
    column: str | None,
    shard_rows: int | None,
    *,
    reach: Reach,
    commit: str | None = None,
) -> Source:
    """A `datasets.Dataset` or `IterableDataset`, of a Hub's `commit` if one is given; see `open_source`, also for its
    ValueErrors."""
    stored = hasattr(dataset, "__len__")
    if not hasattr(dataset, "features"):
        raise ValueError(f"source is a {type(dataset).__name__}, allowed: a path, Hub id, Dataset or IterableDataset")
    if dataset.features is None:  # a stream of what a function gives: a row tells
        dataset = dataset._resolve_features()
    schema = dataset.features.arrow_schema
    column = choose_column(name, schema.names, column, typed=list(_features(schema, "Audio")))
    types = _kept_types(name, schema, keep, column)
    about = {"kind": "dataset" if stored else "stream", "name": name, "keep": list(keep), "column": column}
    about["urls"] = list(reach.urls)
    if stored:
        shard_rows = shard_rows or shard_share(len(dataset), LEAST_ROWS, MOST_ROWS)
        about |= {"rows": len(dataset), "fingerprint": dataset._fingerprint, "shard_rows": shard_rows}
    else:
        about |= {"shards": dataset.num_shards, "fingerprint": commit or _stream_fingerprint(dataset)}
    dataset = audio_column(CorpusConfig(name, name, column=column), dataset, keep=keep)
    table = _Columns(column, types, _labels(schema), reach)
    if stored:
        starts = range(0, len(dataset), shard_rows)
        sizes = [min(shard_rows, len(dataset) - start) for start in starts]
        shards = [
            DatasetShard(number, size, dataset, table, start, start)
            for number, (size, start) in enumerate(zip(sizes, starts))
        ]
        return Source("rows", shards, types, about)
    of = dataset.num_shards
    return Source("shards", [StreamShard(number, 1, dataset, table, of) for number in range(of)], types, about)


@dataclass(frozen=True)
class _Columns:
    """The columns of a table that are read, and how: `audio`, the `kept` with their types, the texts of labels."""

    audio: str
    kept: dict[str, pyarrow.DataType]
    labels: dict[str, list[str]]
    reach: Reach

    def rows(self, table: pyarrow.Table | pyarrow.RecordBatch, name: str, first: int) -> Iterator[Row]:
        """The rows of a table whose first has the number `first`."""
        audio = table.column(self.audio)
        kept = {column: _each(table.column(column), partial(self._values, column=column)) for column in self.kept}
        parts = {key: _each(table.column(key), _python_values) for key in self.parts(table.schema)}
        for row in range(table.num_rows):
            title = f"{name} {first + row:06d}"
            values = {column: kept[column][row] for column in kept}
            try:
                for column, value in (values | {key: parts[key][row] for key in parts}).items():
                    if isinstance(value, BadValue):
                        raise ValueError(f"{column}: {value.reason}")
                location = cut_location(self._location(title, audio[row]), {key: parts[key][row] for key in parts})
            except Exception as error:  # of whatever kind: the row is at fault, and not its shard
                location = partial(refuse, title, failure(error))
            yield Row(title, location, {k: None if isinstance(v, BadValue) else v for k, v in values.items()})

    def _location(self, name: str, value: pyarrow.Scalar) -> Location | dict:
        kind = value.type
        if pyarrow.types.is_struct(kind) and {"array", "sampling_rate"} <= set(kind.names) and value.is_valid:
            return _array(name, value["array"], value["sampling_rate"].as_py())
        location = encoded_audio(name, value.as_py())[1]
        if not isinstance(location, str):
            return location
        if reason := self.reach.fault(location):
            raise ValueError(reason)
        return RemoteFile(location) if "://" in location else location

    def parts(self, schema: pyarrow.Schema) -> list[str]:
        """The columns that may say which part of a recording a row means."""
        return [key for key in segment_keys(schema.names) if key != self.audio]

    def _values(self, values: pyarrow.Array | pyarrow.ChunkedArray, column: str) -> list:
        if column in self.labels:
            return [_label(value, self.labels[column]) for value in values.to_pylist()]
        return (values if values.type == self.kept[column] else values.cast(self.kept[column])).to_pylist()


@dataclass(frozen=True)
class ParquetShard(Shard):
    """A Parquet file; `name` is relative to the corpus."""

    path: str
    name: str
    column: str
    kept: dict[str, pyarrow.DataType]
    reach: Reach

    def rows(self) -> Iterator[Row]:
        """Its rows."""
        columns, first = [self.column, *self.kept], 0
        with one_line_reasons(self.name), _parquet_file(self.path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise ValueError(f"has no column {missing[0]!r}, allowed: the columns of the corpus's first file")
            table = _Columns(self.column, self.kept, _labels(file.schema_arrow), self.reach)
            columns = list(dict.fromkeys([*columns, *table.parts(file.schema_arrow)]))
            for batch in file.iter_batches(TABLE_ROWS, columns=columns):
                yield from table.rows(batch, f"{self.name} row", first)
                first += batch.num_rows


@dataclass(frozen=True)
class DatasetShard(Shard):
    """Rows of a stored dataset from row `start` on, called after their numbers from `first` on."""

    dataset: object = field(repr=False)
    columns: _Columns
    start: int
    first: int

    def rows(self) -> Iterator[Row]:
        """Its rows."""
        number = self.first
        for table in self._part().with_format("arrow").iter(TABLE_ROWS):
            yield from self.columns.rows(table, "row", number)
            number += table.num_rows

    def _part(self):
        return self.dataset.select(range(self.start, self.start + self.size))

    def __getstate__(self) -> dict:
        part = self._part()
        if not part.cache_files:  # in memory, where a part would take the whole along
            rows = part.with_format("arrow")[:]
            part = type(part)(rows.take(np.arange(len(rows))))
        return self.__dict__ | {"dataset": part, "start": 0}


@dataclass(frozen=True)
class StreamShard(Shard):
    """One of the shards `of` a stream; of 1 if the stream is this shard alone."""

    dataset: object = field(repr=False)
    columns: _Columns
    of: int

    def rows(self) -> Iterator[Row]:
        """Its rows."""
        first = 0
        # Not iter(dataset): in a worker of a torch loader it gives only that worker's shards.
        for table in self._part().with_format("arrow").iter(TABLE_ROWS):
            yield from self.columns.rows(table, f"shard {self.number:05d} row", first)
            first += table.num_rows

    def _part(self):
        return self.dataset if self.of == 1 else self.dataset.shard(num_shards=self.of, index=self.number)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"dataset": self._part(), "of": 1}


@dataclass(frozen=True)
class RemoteFile:
    """A file under a URL, such as hf://, read when called."""

    url: str

    def __call__(self) -> bytes:
        """Its bytes."""
        import fsspec

        with fsspec.open(self.url, "rb") as file:
            return file.read()


@dataclass(frozen=True)
class BadValue:
    """A value of a table that cannot be had, and why."""

    reason: str


def _each(values: pyarrow.Array | pyarrow.ChunkedArray, convert: Callable) -> list:
    """All values converted, together or, if that fails, each by itself, with a `BadValue` for those that fail."""
    try:
        return convert(values)
    except Exception:  # of whichever: the value at fault is looked for
        pass
    found = []
    for row in range(len(values)):
        try:
            found += convert(values.slice(row, 1))
        except Exception as error:
            found.append(BadValue(failure(error)))
    return found


def _python_values(values: pyarrow.Array | pyarrow.ChunkedArray) -> list:
    return values.to_pylist()


def _label(value: int | None, texts: list[str]) -> str | None:
    if value in (None, -1):  # -1 is the label of what has none
        return None
    if not 0 <= value < len(texts):
        raise ValueError(f"label is {value}, allowed: -1 to {len(texts) - 1}")
    return texts[value]


def _array(name: str, value: pyarrow.Scalar, rate) -> Location | dict:
    """Decoded audio: a list of samples, or one for each channel."""
    try:
        rows = value.values if value.is_valid else None
        nested = pyarrow.types.is_nested(rows.type)
        array = np.stack([_samples(row.values) for row in rows]) if nested else _samples(rows)
    except (AttributeError, ValueError, TypeError, pyarrow.ArrowException):
        return partial(refuse, name, "array is none of numbers, allowed: (samples) or (channels, samples)")
    return {"array": array, "sampling_rate": rate}


def _samples(values: pyarrow.Array) -> np.ndarray:
    return audio_array("array", values.to_numpy(zero_copy_only=False))


def _features(schema: pyarrow.Schema, kind: str) -> dict[str, dict]:
    """The columns that `datasets` noted to be of this kind, such as Audio, with what it noted of them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: feature
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == kind
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _labels(schema: pyarrow.Schema) -> dict[str, list[str]]:
    named = {column: feature.get("names") for column, feature in _features(schema, "ClassLabel").items()}
    return {
        column: names
        for column, names in named.items()
        if isinstance(names, list) and all(isinstance(name, str) for name in names)
    }


def _kept_types(source: str, schema: pyarrow.Schema, keep: tuple[str, ...], column: str) -> dict:
    refuse_options(source, keep, None, [name for name in schema.names if name != column])
    labels = _labels(schema)
    return {name: pyarrow.string() if name in labels else _plain(schema.field(name).type) for name in keep}


def _plain(kind: pyarrow.DataType) -> pyarrow.DataType:
    """What a type of somebody's own, or a dictionary, is stored as."""
    if pyarrow.types.is_dictionary(kind):
        return kind.value_type
    return kind.storage_type if isinstance(kind, pyarrow.BaseExtensionType) else kind


@contextmanager
def _parquet_file(path: str | Path) -> Iterator:
    from pyarrow.parquet import ParquetFile

    if fault := file_fault(path):
        raise ValueError(fault)
    # Read piece by piece: else a row group, which may be all of the file, is fetched at once.
    with open(path, "rb") as file, ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as parquet:
        yield parquet


def _first_schema(folder: Path, files: list[str], name: str) -> pyarrow.Schema:
    """Of the first file that can be read: one that is damaged is met when its shard is."""
    reasons = []
    for file in files:
        try:
            with one_line_reasons(safe_name(file)), _parquet_file(folder / file) as parquet:
                return parquet.schema_arrow
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(f"{name}: holds no Parquet that can be read ({reasons[0]})")


def _commit(source: str, revision: str | None) -> str | None:
    """The commit that a Hub's dataset is at, so that all processes, and a run gone on with, read the same."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source, revision=revision).sha
    except Exception:  # of whichever HTTP package the client uses
        return revision  # the dataset is in the cache, or `datasets` says what is wrong


def _hub_urls(source: str) -> tuple[str, ...]:
    """How the URLs of a Hub dataset's own files begin."""
    from huggingface_hub.constants import ENDPOINT

    return f"hf://datasets/{source}@", f"hf://datasets/{source}/", f"{ENDPOINT}/datasets/{source}/resolve/"


def _caches() -> tuple[str, ...]:
    """Where files lie that `datasets` and the Hub's client have loaded."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    folders = (HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH)
    return tuple(os.path.realpath(folder) for folder in folders)


def _loaded(config: CorpusConfig):
    """A saved dataset.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        return load_dataset(config)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # of whatever kind: its files are read as they are
        raise ValueError(f"{config.source}: {failure(error).removeprefix(f'corpus {config.name!r}: ')}") from None


def _stream_fingerprint(dataset) -> str:
    """Of where a stream's rows come from and what is done to them."""
    from datasets.fingerprint import Hasher

    return Hasher.hash(dataset._ex_iterable)
