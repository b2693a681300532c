"""Corpora in WebDataset's form: tars of samples, members of one key one after the other, "key.column".

Read by `tarfile`, a sample at a time, of which the audio is read when it is asked for. `datasets`' reader takes the
columns from the first five samples and refuses others, ends at a file of bad JSON, and does not open a corpus at all
if its first tar is damaged. The price: tars must not be compressed, and members are kept as their text.
"""

import itertools
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow

from modeling_encodec.processors.audio_files import file_fault
from modeling_encodec.processors.audio_kinds import safe_name
from modeling_encodec.processors.corpus.clips import Location, UnusableClip
from modeling_encodec.processors.corpus.reading import refuse
from modeling_encodec.processors.corpus.rows import (
    Listing,
    Row,
    Shard,
    Source,
    UniqueNames,
    audio_columns,
    choose_column,
    one_line_reasons,
)


KINDS = {
    tarfile.LNKTYPE: "link", tarfile.SYMTYPE: "link", tarfile.FIFOTYPE: "named pipe", tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
}  # fmt: skip
PEEKED_MEMBERS = 1000  # of a tar that tell which columns there are
# A sample's key and column in the name of a member, by WebDataset's convention; hidden files are no members.
MEMBER_NAME = re.compile(r"(?:\./)?((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


def tar_source(folder: Path, files: list, name: str, keep: tuple[str, ...], column: str | None) -> Source:
    """Tars of a `folder`, as (name, state), a shard each; see `open_source`, also for its ValueErrors."""
    listing = Listing()
    sizes = [listing.add(*file) for file in files]
    paths = [str(folder / file) for file, _ in files]
    column, types = _columns(name, paths, keep, column)
    shards = [
        TarShard(number, size, path, safe_name(file), column, keep, len(files) > 1)
        for number, (size, path, (file, _)) in enumerate(zip(sizes, paths, files))
    ]
    about = {"kind": "webdataset", "name": safe_name(name)} | listing.describe()
    return Source("B", shards, types, about | {"keep": list(keep), "column": column})


@dataclass(frozen=True)
class TarShard(Shard):
    """A tar of samples: members of one key one after the other, "key.column". `column` None: whichever is audio."""

    path: str
    name: str
    column: str | None
    keep: tuple[str, ...]
    several: bool  # tars in the corpus

    def rows(self) -> Iterator[Row]:
        """Its rows."""
        names = UniqueNames()
        with one_line_reasons(self.name), _open_tar(self.path) as tar:
            for key, members in _samples(_members(tar)):
                name = names.add(f"{self.name}/{safe_name(key)}" if self.several else safe_name(key))
                location = self._location(name, members)
                kept = dict.fromkeys(self.keep)
                for column in set(self.keep) & members.keys():
                    try:
                        kept[column] = TarMember(self.path, members[column])().decode("utf-8")
                    except UnicodeDecodeError:
                        location = partial(refuse, name, f"{column} is no text, allowed: UTF-8")
                    except UnusableClip as error:
                        location = partial(refuse, name, f"{column} {error.reason}")
                yield Row(name, location, kept)

    def _location(self, name: str, members: dict[str, tarfile.TarInfo]) -> Location:
        audio = [self.column] if self.column else audio_columns(members)
        found = [members[column] for column in audio if column in members]
        if len(found) != 1:
            allowed = f"one of {self.column}" if self.column else "one, or the name of a column"
            return partial(refuse, name, f"has {len(found)} members of audio, allowed: {allowed}")
        return TarMember(self.path, found[0])


class TarMember:
    """A file in a tar, read when called."""

    def __init__(self, path: str, member: tarfile.TarInfo):
        self.path, self.name, self.offset, self.size = path, member.name, member.offset_data, member.size
        kind = "file" if member.isreg() else next((word for type_, word in KINDS.items() if member.type == type_), "?")
        self.kind = "sparse file" if member.issparse() else kind

    def __call__(self) -> bytes:
        """Its bytes; an UnusableClip if it is no whole file, of which nothing is followed or made."""
        if self.kind != "file":
            refuse(self.name, f"is a {self.kind} in the tar, allowed: a whole file")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def _open_tar(path: str) -> tarfile.TarFile:
    if fault := file_fault(path):
        raise ValueError(fault)
    return tarfile.open(path, "r:")


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files in a tar, without keeping a list of them.

    Raises:
        ValueError: after the last that can be read, if the tar does not end as it should.
        tarfile.ReadError: if it ends within a file.
    """
    place = -1
    while (member := tar.next()) is not None:
        tar.members.clear()
        if tar.offset <= place:
            raise ValueError(f"damaged: the member after {place} bytes has a size below 0")
        place = tar.offset
        if not member.isdir():
            yield member
    # `tarfile` takes a header that is damaged, or not there, for the end.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError(f"cut off or damaged after {tar.offset} bytes")


def _samples(members: Iterable[tarfile.TarInfo]) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Keys and members by column."""
    key, sample = None, {}
    for member in members:
        if (match := MEMBER_NAME.fullmatch(member.name)) is None:
            continue
        new, column = match.groups()
        if sample and (new != key or column in sample):
            yield key, sample
            sample = {}
        key, sample[column] = new, member
    if sample:
        yield key, sample


def _columns(name: str, paths: list[str], keep: tuple, column: str | None) -> tuple[str | None, dict]:
    """The audio column, None if it differs between samples, and the kept ones, by the first tar that holds any."""
    samples = next(filter(None, (_first_samples(path) for path in paths)), [])
    columns = sorted({column for sample in samples for column in sample})
    most = max((len(audio_columns(sample)) for sample in samples), default=0)
    named = audio_columns(columns)
    if column is not None or "audio" in columns or most != 1:
        column = choose_column(name, columns, column)
    for asked in keep:
        if asked not in columns or asked == column or (column is None and asked in named):
            allowed = [other for other in columns if other != column and (column or other not in named)]
            raise ValueError(f"{name}: keep is {asked!r}, allowed: {', '.join(allowed) or 'none'}")
    return column, {asked: pyarrow.string() for asked in keep}


def _first_samples(path: str) -> list[dict]:
    members = []
    try:
        with _open_tar(path) as tar:
            for member in itertools.islice(_members(tar), PEEKED_MEMBERS):
                members.append(member)
    except Exception:
        pass  # it is met, and reported, when its shard is
    return [sample for _, sample in _samples(members)]
