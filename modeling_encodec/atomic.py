"""Files and folders appear whole or not at all: written under another name beside the target, renamed at the end."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(target: str | os.PathLike) -> Iterator[Path]:
    """A temporary path of the same suffix beside `target`; it becomes `target` when the block ends without error.

    A link is followed, missing folders are made. A target that is no regular file, such as a device or a named pipe,
    is given out itself.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_file():
        yield target
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp gives 0600
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A new folder beside `target`, which takes its place when the block ends without error. A link is followed.

    Its name is fixed, so that what a killed process leaves is removed by the next one.
    """
    target = Path(os.path.realpath(target))
    new, old = (target.with_name(f".{target.name}-{word}") for word in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)
