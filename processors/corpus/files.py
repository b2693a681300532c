"""Corpora of single files: the audio of a folder, and what a manifest lists."""

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

import pyarrow

from modeling_encodec.processors.audio_kinds import OtherFiles, is_audio, safe_name
from modeling_encodec.processors.corpus.reading import BadRow, no_manifest, read_manifest, refuse
from modeling_encodec.processors.corpus.rows import (
    LEAST_ROWS,
    MOST_ROWS,
    Listing,
    Row,
    Shard,
    Source,
    UniqueNames,
    refuse_options,
    shard_share,
)
from modeling_encodec.processors.corpus.segments import (
    PATH_KEYS,
    Segment,
    UnknownKey,
    row_path,
    row_segment,
    segment_name,
)


LEAST_BYTES, MOST_BYTES = 8 << 20, 256 << 20  # of the files of a shard, unless something else is asked for
ARCHIVE_SUFFIXES = (".parquet", ".tar")
WHOLE_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)")
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class FolderShard(Shard):
    """Files of a folder; `files` are their names relative to it as the file system has them, one string, to be small:
    apart they would take several times the memory."""

    folder: str
    files: bytes = field(repr=False)

    def rows(self) -> Iterator[Row]:
        """Its rows."""
        for file in self.files.split(b"\0"):
            name = os.fsdecode(file)
            path = os.path.join(self.folder, name)
            yield Row(safe_name(name), UnlistedFolder(path) if name.endswith("/") else path)


@dataclass(frozen=True)
class UnlistedFolder:
    """A folder whose files could not be listed."""

    path: str

    def __call__(self):
        """Say why."""
        try:
            os.scandir(self.path).close()
            reason = "it can be now; begin anew"
        except OSError as error:
            reason = error.strerror
        refuse(self.path, f"folder could not be listed: {reason}")


@dataclass(frozen=True)
class ManifestShard(Shard):
    """Files of a manifest: for each its name, its path relative to `folder`, offset and duration of the segment if it
    is one, and the values of the fields `keep`. Of a row that names no file the path is None, and the reason in place
    of the segment."""

    folder: str
    keep: tuple[str, ...]
    files: tuple[tuple[str, str | None, tuple | str | None, tuple], ...] = field(repr=False)

    def rows(self) -> Iterator[Row]:
        """Its rows."""
        for name, path, part, values in self.files:
            if path is None:
                location = partial(refuse, name, part)
            else:
                path = os.path.join(self.folder, path)
                location = Segment(path, *part) if part else path
            yield Row(name, location, dict(zip(self.keep, values)))


def folder_source(
    folder: Path, shard_rows: int | None, shard_bytes: int | None
) -> tuple[Source, list[tuple[str, os.stat_result]]]:
    """The audio of a folder, with no shards if it holds none, and the archives in it; see `open_source`."""
    listing, archives, other = Listing(), [], OtherFiles()

    def audio() -> Iterator[tuple[bytes, int]]:
        for name, state in _walk(folder, other):
            if name.endswith(ARCHIVE_SUFFIXES):
                archives.append((name, state))
            else:
                yield os.fsencode(name), listing.add(name, state)

    shards = [
        FolderShard(number, size, str(folder), b"\0".join(names))
        for number, (names, size) in enumerate(_runs(audio(), shard_rows, shard_bytes))
    ]
    about = {"kind": "folder", "name": safe_name(folder.name)} | listing.describe()
    return Source("B", shards, {}, about | {"shard_rows": shard_rows, "shard_bytes": shard_bytes}, other), archives


def _walk(folder: Path, other: OtherFiles) -> Iterator[tuple[str, os.stat_result | None]]:
    """Audio files and archives in the order of their posix paths relative to `folder`, the rest counted in `other`;
    links to files are followed, links to folders are not. What is called like audio and is no file, and folders that
    cannot be listed ("name/"), come too: their rows say why they give none."""
    waiting: list[tuple[str, os.DirEntry | None]] = [("", None)]
    while waiting:
        name, entry = waiting.pop()
        if entry is not None:
            state = _state(entry.path)
            a_file = state is not None and stat.S_ISREG(state.st_mode)
            if name.endswith(ARCHIVE_SUFFIXES) or (other.take(name) if a_file else is_audio(name)):
                yield name, state
            continue
        try:
            # With the "/" a folder's files come where they belong among all.
            with os.scandir(folder / name) as entries:
                found = {f"{e.name}/" if e.is_dir(follow_symlinks=False) else e.name: e for e in entries}
            below = sorted(found.items(), reverse=True)
            waiting += [(name + part, None if part.endswith("/") else entry) for part, entry in below]
        except OSError:
            if not name:
                raise
            yield name, None


def _runs(files: Iterable[tuple[object, int]], most: int | None, most_bytes: int | None) -> Iterator[tuple[list, int]]:
    """Consecutive files with the sum of their sizes: at least one, and no more than fit."""
    if most is None or most_bytes is None:
        files = list(files)
        most = most or shard_share(len(files), LEAST_ROWS, MOST_ROWS)
        most_bytes = most_bytes or shard_share(sum(size for _, size in files), LEAST_BYTES, MOST_BYTES)
    run, total = [], 0
    for file, size in files:
        if run and (len(run) == most or total + size > most_bytes):
            yield run, total
            run, total = [], 0
        run.append(file)
        total += size
    if run:
        yield run, total


def manifest_source(
    manifest: Path, keep: tuple[str, ...], column: str | None, shard_rows: int | None, shard_bytes: int | None
) -> Source:
    """The files that a manifest lists; see `open_source`."""
    rows = [_with_segment(manifest, number, row) for number, row in enumerate(read_manifest(manifest), 1)]
    if not rows:
        raise ValueError(f"{manifest}: holds no rows, allowed: at least one")
    if all(isinstance(row, BadRow) for row in rows):
        raise no_manifest(manifest, 1, rows[0])
    fields = [{} if isinstance(row, BadRow) else row for row in rows]
    refuse_options(manifest, keep, column, {key for row in fields for key in row} - set(PATH_KEYS))
    of_csv = manifest.suffix == ".csv"
    types, columns = {}, []
    for name in keep:
        types[name], values = _typed([row.get(name) for row in fields], of_csv)
        columns.append(values)
    listing, names, other = Listing(), UniqueNames(), OtherFiles()
    segments = Counter(row_path(row) for row in fields if row and row_segment(row) != (None, None))

    def files() -> Iterator[tuple[tuple, int]]:
        for number, (row, *values) in enumerate(zip(rows, *columns), 1):
            if isinstance(row, BadRow):
                name = names.add(f"{safe_name(manifest.name)} row {number}")
                listing.add(name, None, row.reason)
                yield (name, None, row.reason, tuple(values)), 0
                continue
            given, part = row_path(row), row_segment(row)
            path = str(manifest.parent / given)
            other.take(given, listed=True)
            # Places of this machine are no names.
            name = os.path.relpath(path, manifest.parent) if os.path.isabs(given) else str(PurePosixPath(given))
            name = names.add(safe_name(segment_name(name, *part)))
            part = None if part == (None, None) else part
            size = listing.add(name, _state(path), *values, *((part,) if part else ()))
            yield (
                (name, given, part, tuple(values)),
                -(-size // segments[given]) if part else size,
            )  # segments share a file's bytes

    shards = [
        ManifestShard(number, size, str(manifest.parent), keep, tuple(found))
        for number, (found, size) in enumerate(_runs(files(), shard_rows, shard_bytes))
    ]
    cut = {"keep": list(keep), "shard_rows": shard_rows, "shard_bytes": shard_bytes}
    about = {"kind": "manifest", "name": safe_name(manifest.name)} | listing.describe() | cut
    return Source("B", shards, types, about, other)


def _with_segment(manifest: Path, number: int, row: dict | BadRow) -> dict | BadRow:
    """The row, if what it says of a segment can be."""
    try:
        if not isinstance(row, BadRow):
            row_segment(row)
    except UnknownKey as error:
        raise ValueError(f"{manifest}, row {number}: {error}") from None
    except ValueError as error:
        return BadRow(str(error))
    return row


def _state(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):  # ValueError: a path that cannot be, with a zero byte
        return None


def _typed(values: list, of_csv: bool) -> tuple[pyarrow.DataType, list]:
    """The type of a field and its values in it. `of_csv`: they come from CSV, where empty ones are missing and text
    that is a number as one would write it is a number: "7", not "007"."""
    values = [None if of_csv and value == "" else value for value in values]
    read = [_of_text(value) if of_csv and value is not None else value for value in values]
    kinds = {type(value) for value in read if value is not None}
    if kinds == {bool}:
        return pyarrow.bool_(), read
    if kinds == {int} and all(value is None or -(1 << 63) <= value < 1 << 63 for value in read):
        return pyarrow.int64(), read
    # Beyond 2**53 a float would be another number.
    if kinds in ({float}, {int, float}) and not any(isinstance(value, int) and abs(value) > 1 << 53 for value in read):
        return pyarrow.float64(), [None if value is None else float(value) for value in read]
    return pyarrow.string(), [None if value is None else _as_text(value) for value in values]


def _of_text(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if WHOLE_NUMBER.fullmatch(text):
        return int(text) if len(text) < 20 else text
    return float(text) if NUMBER.fullmatch(text) else text


def _as_text(value) -> str:
    """Text as it is, anything else as JSON; halves of characters, that UTF-8 has none of, as Python writes them."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
