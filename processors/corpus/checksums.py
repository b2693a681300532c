"""Checksums of tokenized corpora: every bit of the data is covered by one.

    manifest.json     its own checksum, those of all shards, of run.json and skipped.jsonl
    a shard's footer  its own checksum, and the SHA-256 of each of its row groups

A shard's checksum is that of its footer, which in turn covers the row groups: so a shard can be checked without the
manifest (a run that was killed has none), and a row group without the rest of its file. A checksum within the bytes
that it covers is computed with zeros in its place, as in the headers of tar.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

from modeling_encodec.processors.audio_parts import read_at


MARK = b'{"checksum": "'
BLANK = "0" * 64
MAGIC = b"PAR1"  # the first and the last bytes of Parquet
TAIL = 8  # the footer's length, then the magic
MISSING = "missing"
PIECE = 1 << 20  # bytes that are hashed at a time


def seal(data: bytes) -> bytes:
    """JSON, perhaps with bytes around it, that begins with a `BLANK` checksum, with its checksum in that place."""
    place = data.rindex(MARK + BLANK.encode()) + len(MARK)
    return data[:place] + hashlib.sha256(data).hexdigest().encode() + data[place + len(BLANK) :]


def unseal(data: bytes) -> dict:
    """The JSON in what `seal` returned.

    Raises:
        ValueError: if a single bit is another.
    """
    start = data.rfind(MARK)
    place = start + len(MARK)
    blank = data[:place] + BLANK.encode() + data[place + len(BLANK) :]
    if start < 0 or hashlib.sha256(blank).hexdigest().encode() != data[place : place + len(BLANK)]:
        raise ValueError("damaged: its checksum is not that of its bytes")
    return json.JSONDecoder().raw_decode(data[start:].decode("utf-8", "replace"))[0]


# ---- shards --------------------------------------------------------------------------------------------------------


def hash_span(file: BinaryIO, start: int, stop: int) -> str:
    """SHA-256 of these bytes of a file."""
    digest = hashlib.sha256()
    file.seek(start)
    while start < stop and (data := file.read(min(PIECE, stop - start))):
        digest.update(data)
        start += len(data)
    return digest.hexdigest()


def seal_shard(path: Path) -> None:
    """Write the checksum of a new shard's footer into it."""
    with open(path, "r+b") as file:
        start, footer = _footer(file)
        file.seek(start)
        file.write(seal(footer))


def read_notes(path: str | os.PathLike) -> dict:
    """What a shard's footer says of it, and its `bytes`. The footer is checked, row groups are not.

    Raises:
        ValueError: if it is missing, cut off, damaged, or no shard.
    """
    try:
        with open(path, "rb") as file:
            start, footer = _footer(file)
            notes = unseal(footer)
            groups = notes["row_groups"]
            if start != (groups[-1]["end"] if groups else len(MAGIC)) or (not groups and file.read(4) != MAGIC):
                raise ValueError("damaged: row groups do not end where the footer begins")
            return notes | {"bytes": start + len(footer)}
    except OSError as error:
        raise ValueError(MISSING if isinstance(error, FileNotFoundError) else error.strerror) from None
    except (KeyError, TypeError):
        raise ValueError("damaged: its footer is none of a shard of tokens") from None


def _footer(file: BinaryIO) -> tuple[int, bytes]:
    """Where the footer of a Parquet file begins, and its bytes; the next read is of the file's first byte."""
    size = file.seek(0, os.SEEK_END)
    tail = read_at(file, max(0, size - TAIL), TAIL)
    start = size - TAIL - int.from_bytes(tail[:4], "little")
    if start < len(MAGIC) or tail[4:] != MAGIC:
        raise ValueError("cut off, or no Parquet")
    footer = read_at(file, start, size - start)
    file.seek(0)
    return start, footer


def check_row_groups(path: str | os.PathLike, notes: dict, wanted: Iterable[int] | None = None) -> None:
    """Hold the row groups of a shard, or the `wanted` ones, against the SHA-256 in its notes.

    Raises:
        ValueError: for the first that differs.
    """
    groups = notes["row_groups"]
    with open(path, "rb") as file:
        for number in range(len(groups)) if wanted is None else wanted:
            start = groups[number - 1]["end"] if number else 0
            if hash_span(file, start, groups[number]["end"]) != groups[number]["sha256"]:
                raise ValueError(
                    f"damaged: row group {number} of {len(groups)}, bytes {start}-{groups[number]['end']}"
                )


def shard_fault(path: str | os.PathLike, expected: dict, *, whole: bool = True) -> str | None:
    """What is wrong with a shard; None if nothing is.

    Args:
        path: of the shard.
        expected: what its notes must say, such as the number of the `shard`, the `run` or the `checksum`.
        whole: check the row groups too.
    """
    try:
        notes = read_notes(path)
        if whole:
            check_row_groups(path, notes)
    except (OSError, ValueError) as error:
        return str(error)
    for name, value in expected.items():
        if notes.get(name) != value:
            given = f"{name} {notes.get(name)}" if name == "shard" else f"a {name} of its own"
            return f"another shard: has {given}, allowed: {value if name == 'shard' else 'that of this run'}"
    return None


def find_shard_faults(shards: dict[Path, dict], *, whole: bool = True) -> Iterator[tuple[Path, str]]:
    """Those of the shards in which something is wrong, and what; the values are what `shard_fault` expects."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # reading and hashing work outside Python's lock
        for path, reason in zip(shards, pool.map(partial(shard_fault, whole=whole), shards, shards.values())):
            if reason:
                yield path, reason


def description_hash(description: dict) -> str:
    """What shards of a run say of it."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


# ---- whole outputs -------------------------------------------------------------------------------------------------


def read_manifest(folder: str | os.PathLike) -> dict:
    """The manifest of a finished output.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: holds no manifest.json, allowed: a finished output of tokenize")
    try:
        return unseal(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; the tokenize command that made it writes it anew") from None


def find_faults(folder: Path, manifest: dict, *, whole: bool = True) -> Iterator[tuple[str, str]]:
    """The data files of an output that are not what its manifest says, as (name, reason). `whole` as of
    `shard_fault`."""
    shards = {
        folder / entry["file"]: {"shard": number, "run": manifest["run"], "checksum": entry["checksum"]}
        for number, entry in enumerate(manifest["files"])
    }
    for path, reason in find_shard_faults(shards, whole=whole):
        yield f"data/{path.name}", reason
    for path in sorted(folder.glob(f"data/{manifest['split']}-*")):  # `datasets` would read it too
        if path not in shards:
            yield f"data/{path.name}", "is not in the manifest"


def find_summary_faults(folder: Path, manifest: dict) -> Iterator[tuple[str, str]]:
    """The files beside the data that are not what the manifest says, as (name, reason)."""
    for name, digest in manifest["sha256"].items():
        path = folder / name
        if not path.is_file():
            yield name, MISSING
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            yield name, "damaged: its SHA-256 is not that in the manifest"
