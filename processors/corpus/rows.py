"""Rows of a corpus, the shards that they are read in, and what listings of all kinds of corpora share.

Names of rows are text that JSON, Parquet and terminals can hold: one with a backslash, or with anything unprintable or
not UTF-8, is written with Python's escapes, so that no two become equal. The file itself is read under its own name.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow

from modeling_encodec.processors.audio_ffmpeg import OTHER_SUFFIXES
from modeling_encodec.processors.audio_kinds import SNDFILE_SUFFIXES, OtherFiles, safe_name
from modeling_encodec.processors.corpus.clips import Location
from modeling_encodec.processors.corpus.segments import PATH_KEYS


# That name a member of a file, whose address follows.
ARCHIVE_PROTOCOLS = ("zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4")
LEAST_ROWS, MOST_ROWS = 16, 1024  # of a shard, unless something else is asked for
SHARDS = 64


@dataclass(frozen=True)
class Row:
    """One audio of a corpus: its `name`, of which no two of a corpus are equal, where it lies, and the values that are
    taken along.

    `location` may also be {"array", "sampling_rate"} with a float32 array (T,) or (channels, T), or what raises
    UnusableClip when called.
    """

    name: str
    location: Location | dict = field(repr=False)
    kept: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Shard:
    """A part of a corpus that is read apart from the others; `size` is in the unit of its source."""

    number: int
    size: int

    def rows(self) -> Iterator[Row]:
        """Its rows, always the same in the same order.

        Raises:
            ValueError: while iterating, if a file cannot be read on from there; the rows before that have come.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Source:
    """A corpus: its shards, the unit of their sizes ("B" of files, "rows" or "shards"), the Arrow types of the kept
    values, and the files that libsndfile does not read."""

    unit: str
    shards: list[Shard] = field(repr=False)
    kept: dict[str, pyarrow.DataType]
    description: dict = field(repr=False)
    other: OtherFiles = field(default_factory=OtherFiles, repr=False)

    def describe(self) -> dict:
        """JSON, equal for the same corpus cut in the same way: of files the names, sizes and times of change, of
        datasets the fingerprint."""
        return dict(self.description)


def shard_share(total: int, least: int, most: int) -> int:
    """So much of a corpus for each shard that there are enough for many processes, and progress is seen."""
    return min(max(-(-total // SHARDS), least), most)


class Listing:
    """What decides whether files are the same: hashed as they are listed, so that the list need not be kept."""

    def __init__(self):
        self.files = self.bytes = 0
        self._digest = hashlib.sha256()

    def add(self, name: str, state: os.stat_result | None, *more) -> int:
        """Count a file (`state` None: it is missing); returns its size."""
        size, changed = (0, None) if state is None else (state.st_size, state.st_mtime_ns)
        self.files, self.bytes = self.files + 1, self.bytes + size
        self._digest.update(repr((name, size, changed, *more)).encode())
        return size

    def describe(self) -> dict:
        """JSON of what was counted."""
        return {"files": self.files, "bytes": self.bytes, "sha256": self._digest.hexdigest()}


class UniqueNames:
    """Names that have been given, so that no two are equal."""

    def __init__(self):
        self._given: dict[str, int] = {}  # and how many numbers each has been tried with, so that none is tried again

    def add(self, name: str) -> str:
        """The name, or "name (2)" if it was given before."""
        new = name
        while new in self._given:
            self._given[name] += 1
            new = f"{name} ({self._given[name]})"
        self._given[new] = 1
        return new


@dataclass(frozen=True)
class Reach:
    """What rows of tables may have opened that the user has not named: a table may be anybody's.

    Attributes:
        urls: beginnings of URLs; "" for any.
        folders: where local paths must lead to; None for anywhere.
    """

    urls: tuple[str, ...] = ()
    folders: tuple[str, ...] | None = None

    def fault(self, address: str) -> str | None:
        """Why an address is not to be opened; None if it is."""
        if "://" in address:
            *inner, outer = address.split("::")  # "zip://member::hf://..." is in what comes last
            within = all(part.partition("://")[0] in ARCHIVE_PROTOCOLS for part in inner) and ".." not in outer
            if "" in self.urls or (within and outer.startswith(self.urls)):
                return None
            given = safe_name(address)[:200]
            return f"audio is at the URL {given}, allowed: in the row itself, or a local file; allow_urls allows any"
        if self.folders is None:
            return None
        path = os.path.realpath(address)
        if any(os.path.commonpath([path, folder]) == folder for folder in self.folders):
            return None
        return "audio is a local file, allowed for datasets of the Hub: only those that they brought along"


@contextmanager
def one_line_reasons(name: str) -> Iterator[None]:
    """What a damaged file brings about becomes a ValueError of one line with its `name`, and not with its place on
    this machine."""
    try:
        yield
    except (OSError, ValueError, tarfile.TarError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{name}: {' '.join(reason.split())}") from error


def refuse_options(source, keep: Sequence[str], column: str | None, allowed: Sequence[str]) -> None:
    """Check the options of a source without columns of audio, of whose fields those `allowed` can be kept.

    Raises:
        ValueError: for a `column`, or a field to `keep` that is not there.
    """
    if column is not None:
        raise ValueError(f"{source}: column is {column!r}, allowed: none, since it has no columns of audio")
    for name in keep:
        if name not in allowed:
            raise ValueError(f"{source}: keep is {name!r}, allowed: {', '.join(sorted(allowed)) or 'none'}")


def named_as_audio(column: str) -> bool:
    """Whether a column's name ends as audio files do: "flac", "0.wav"."""
    return f".{column.rpartition('.')[2].lower()}" in SNDFILE_SUFFIXES


def audio_columns(columns: Iterable[str]) -> list[str]:
    """The columns that are called like audio files; of those that only ffmpeg reads, if there are no others."""
    columns = list(columns)
    other = [column for column in columns if f".{column.rpartition('.')[2].lower()}" in OTHER_SUFFIXES]
    return [column for column in columns if named_as_audio(column)] or other


def choose_column(source, columns: Sequence[str], asked: str | None, *, typed: Sequence[str] = ()) -> str:
    """The column of audio: the one that is `asked` for; else "audio", the only one of that type (`typed`), or the only
    one that is called like a kind of audio file.

    Raises:
        ValueError: if there is none, or no single one.
    """
    if asked is not None:
        if asked not in columns:
            raise ValueError(f"{source}: column is {asked!r}, allowed: {', '.join(columns) or 'none'}")
        return asked
    named = [column for column in columns if f".{column.lower()}" in SNDFILE_SUFFIXES]
    paths = [column for column in PATH_KEYS if column in columns]
    for found in (["audio"] if "audio" in columns else [], typed, named, paths):
        if len(found) == 1:
            return found[0]
    raise ValueError(
        f"{source}: none of its columns is the audio by its name, name one: {', '.join(columns) or 'none'}"
    )
