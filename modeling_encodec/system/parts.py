"""A folder in parts of bounded size, for ways out of a machine that take no large files, and back from them.

The parts, one after the other, are the folder's files one after the other, as `parts.json` lists them with their
sizes and SHA-256 sums. Every part has a sum too, so that what is missing or damaged is told by its name.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from modeling_encodec.system.atomic import atomic_folder


LIST = "parts.json"
FORMAT = {"format": "modeling-encodec parts", "version": 1}
PIECE = 1 << 20  # bytes at a time


def split_folder(
    folder: str | os.PathLike, parts: str | os.PathLike, *, part_bytes: int = 15_000_000, leave_out: Sequence[str] = ()
) -> list[Path]:
    """Write the files of `folder`, hidden ones apart, as a new folder `parts` of files of up to `part_bytes` bytes.

    `leave_out`: patterns of names, or of paths below the folder, that are not wanted. Returns the files written.

    Raises:
        ValueError: for a folder without files, or a size below 1.
        FileNotFoundError: if there is no such folder.
        FileExistsError: if `parts` exists.
    """
    folder, parts = Path(folder), Path(parts)
    if part_bytes < 1:
        raise ValueError(f"part_bytes is {part_bytes}, allowed: at least 1")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    _refuse_existing(parts)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if _is_wanted(name, leave_out)]
    if not names:
        raise ValueError(f"{folder}: no files to split")
    with atomic_folder(parts, durable=True) as new:
        files: list[dict] = []
        pieces = _pieces([(name, folder / name) for name in names], files)
        written = _write_parts(new, pieces, part_bytes)
        (new / LIST).write_text(json.dumps({**FORMAT, "files": files, "parts": written}, indent=1) + "\n")
    return [parts / item["name"] for item in (*written, {"name": LIST})]


def join_parts(parts: str | os.PathLike, folder: str | os.PathLike) -> list[Path]:
    """Put the files that `split_folder` wrote as `parts` together, as a new folder. Returns the files written.

    Raises:
        ValueError: for a part or a list that is damaged.
        FileNotFoundError: for a part, or their list, that is missing.
        FileExistsError: if `folder` exists.
    """
    parts, folder = Path(parts), Path(folder)
    _refuse_existing(folder)
    files, listed = _read_list(parts / LIST)
    for item in listed:  # all of them before anything is written
        path = parts / item["name"]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing, one of {len(listed)} parts")
        if _measured(path) != (item["size"], item["sha256"]):
            raise ValueError(f"{path}: damaged, for it is not what {LIST} says of it")
    with atomic_folder(folder, durable=True) as new:
        pieces = _Stream(_pieces([(item["name"], parts / item["name"]) for item in listed], []))
        for item in files:
            path = new / item["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for piece in pieces.take(item["size"]):
                    file.write(piece)
            if _measured(path) != (item["size"], item["sha256"]):
                raise ValueError(f"{parts / LIST}: damaged, for {item['name']} is not what it says of it")
    return [folder / item["name"] for item in files]


class _Stream:
    """Bytes that come in pieces, taken as many as are wanted at a time."""

    def __init__(self, pieces: Iterator[bytes]):
        self.pieces, self.rest = pieces, b""

    def take(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes, in pieces, or what there is of them."""
        while size > 0:
            piece = self.rest or next(self.pieces, b"")
            if not piece:
                return
            yield piece[:size]
            self.rest = piece[size:]
            size -= min(size, len(piece))


def _pieces(paths: Sequence[tuple[str, Path]], described: list[dict]) -> Iterator[bytes]:
    """The bytes of the files, one after the other; the name, size and sum of each that was read are `described`."""
    for name, path in paths:
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                size += len(piece)
                yield piece
        described.append({"name": name, "size": size, "sha256": digest.hexdigest()})


def _write_parts(folder: Path, pieces: Iterator[bytes], part_bytes: int) -> list[dict]:
    """The pieces as files of `part_bytes` bytes, and what is to be said of these."""
    stream, written = _Stream(pieces), []
    while True:
        path, digest, size = folder / f"part_{len(written):04d}", hashlib.sha256(), 0
        with path.open("wb") as file:
            for piece in stream.take(part_bytes):
                digest.update(piece)
                size += len(piece)
                file.write(piece)
        if size == 0:
            path.unlink()
            return written
        written.append({"name": path.name, "size": size, "sha256": digest.hexdigest()})


def _read_list(path: Path) -> tuple[list[dict], list[dict]]:
    """What `parts.json` says of the files and of the parts."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, the list of the parts")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if {name: about[name] for name in FORMAT} != FORMAT:
            raise ValueError
        lists = [[_checked(item) for item in about[name]] for name in ("files", "parts")]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: damaged, or no list of parts") from None
    return lists[0], lists[1]


def _checked(item: dict) -> dict:
    """An entry of the list; its name may not lead out of the folder."""
    name, size, digest = item["name"], item["size"], item["sha256"]
    path = PurePosixPath(name)
    whole = type(size) is int and size >= 0 and isinstance(digest, str)
    if not whole or path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or "\0" in name:
        raise ValueError
    return item


def _is_wanted(name: str, leave_out: Sequence[str]) -> bool:
    parts = PurePosixPath(name).parts
    if any(part.startswith(".") for part in parts):  # locks, and what is being written
        return False
    return not any(fnmatch(name, pattern) or any(fnmatch(part, pattern) for part in parts) for pattern in leave_out)


def _measured(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise FileExistsError(f"{folder} exists, allowed: a new folder")
