"""Runs that several processes share through a folder, and that go on where they were stopped.

What decides the results is written to `run.json` when a run begins; a folder with another is refused. Results are
files that appear whole, so what is there need not be made again, whoever made it.
"""

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import datetime, timedelta
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, SoftFileLock, Timeout

from modeling_encodec.system.atomic import PARTIAL, atomic_path, clear_partials


T = TypeVar("T")


def start_run(
    description: dict, folder: Path, results: str, finals: Sequence[str] = (), *, force: bool = False
) -> AbstractContextManager:
    """Make the folder, or go on in it; at the end of what is returned other runs may work there again.

    `results` is the folder in it that results lie in; `force` deletes those. `finals` are files that say that the run
    is complete; they are deleted first, and so is what killed processes began to write.

    Raises:
        FileExistsError: if it holds something else, or another run and `force` is not set.
        ValueError: if what it holds is damaged, or another process is at work in it.
    """
    begun = folder / "run.json"
    if not begun.exists() and folder.exists():
        others = [path.name for path in folder.iterdir() if not fnmatch(path.name, f".run{PARTIAL}*.json")]
        if set(others) - {".lock"}:
            raise FileExistsError(f"{folder} holds other things, allowed: a new folder, or that of this run")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(OwnFolder(folder))
        if begun.exists() and not force:
            _check_same(description, begun)
        for name in finals:
            (folder / name).unlink(missing_ok=True)
        for path in (folder / results).glob("*" if force else ".*"):
            path.unlink()
        with atomic_path(begun, durable=True) as temporary:
            temporary.write_text(json.dumps(description, indent=1))
        (folder / results).mkdir(exist_ok=True)
        return stack.pop_all()


@dataclass(frozen=True)
class Processes:
    """The processes of a run: the `number` of this one, and how many there are (`count`)."""

    number: int
    count: int

    def wait(self) -> None:
        """Wait for all of them to get here."""
        self.from_all(None)  # not by a barrier, which takes the GPU of each process's number, and there may be none

    def from_first(self, value: T) -> T:
        """The first one's `value`, on all of them."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def from_all(self, value: T) -> list[T]:
        """Each one's `value`, by their numbers, on all of them."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])


def join_processes() -> Processes:
    """This process among those that a launcher started.

    Raises:
        ImportError: if there are several, and Accelerate is missing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(0, 1)
    from accelerate import PartialState

    # What they exchange lies on the CPU, and there may be more of them than GPUs, which NCCL does not take. A process
    # that is done waits for the slowest, for as long as that takes.
    state = PartialState(cpu=True, backend="gloo", timeout=timedelta(days=30))
    return Processes(state.process_index, state.num_processes)


class OwnFolder:
    """A folder in which no other run works while the block lasts; what killed processes began to write is removed.

    Raises:
        ValueError: if another run is at work there.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> "OwnFolder":
        with ExitStack() as stack:
            stack.enter_context(_keep_others_out(self.folder))
            clear_partials(self.folder, owned=True)
            self.opened = None
            if os.name != "nt":  # as long as it is open no other folder gets its number
                self.opened = os.open(self.folder, os.O_RDONLY)
                stack.callback(os.close, self.opened)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self.stack.close()

    def check(self) -> None:
        """See that the folder is still there.

        Raises:
            FileNotFoundError: if it was deleted, or another one has its name now.
        """
        if self.opened is None:
            return
        try:
            same = os.path.samestat(os.fstat(self.opened), os.stat(self.folder))
        except FileNotFoundError:
            same = False
        if not same:
            raise FileNotFoundError(f"{self.folder}: deleted or replaced while the run was at work there")


def _keep_others_out(folder: Path) -> AbstractContextManager:
    """The folder's lock; where there can be none, a file that names its holder, as another host may have left it."""
    path = folder / ".lock"
    if _has_locks(folder) and not _size(path):
        try:
            return FileLock(path).acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{folder}: another process is at work there, allowed: one run at a time") from None
    if _size(path) == 0:  # left by a run that had a lock
        path.unlink(missing_ok=True)
    try:
        return SoftFileLock(path).acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder}: {_holder(path)} is at work there, allowed: one run at a time; if it is no more, delete {path}"
        ) from None


def _has_locks(folder: Path) -> bool:
    """Whether files can be locked there: on shared folders not always, and with errors of many kinds."""
    try:
        import fcntl
    except ImportError:  # Windows, where they can
        return True
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _holder(path: Path) -> str:
    """Who made a lock's file, and when, as far as it says."""
    try:
        since = datetime.fromtimestamp(path.stat().st_mtime).astimezone().isoformat(" ", "minutes")
        process, host, *_ = path.read_text(errors="replace").splitlines()
    except (OSError, ValueError):
        return "another process"
    return f"process {process} on {host}, since {since},"


def _check_same(description: dict, begun: Path) -> None:
    try:
        old = dict(json.loads(begun.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{begun}: damaged; --force begins anew") from None
    changed = ", ".join(key for key in description if description[key] != old.get(key))
    if changed:
        raise FileExistsError(f"{begun.parent} holds another run ({changed} differ); --force begins anew")
