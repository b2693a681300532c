"""Files appear whole or not at all: written under a temporary name beside the target, renamed when complete."""

import os
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
