"""Files and folders appear whole or not at all: written under another name beside the target, renamed at the end.

What is being written is called `.NAME.partial` and something, and is locked (`flock`) as long as its process lives.
So what a killed process left can be told from what another one is writing, and the next write to the same target, or
`clear_partials`, removes it. Folders change places in one step where the system can do that (Linux, macOS). Elsewhere
the old one is called `.NAME.replaced` for a moment; if the process is killed then, the next write or `clear_partials`
puts it back.
"""

import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modeling_encodec.system.stop_signals import raise_if_stopped


PARTIAL, REPLACED = ".partial", ".replaced"
MAX_STEM = 32  # characters of the target's name in a temporary one, which must not become too long for the file system
# Errors that only writing gives, so that one without a file's name can be said to be of the target.
WRITE_ERRORS = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS") if hasattr(errno, name)}
PROBE = bytes(1 << 16)


@contextmanager
def atomic_path(target: str | os.PathLike, *, durable: bool = False) -> Iterator[Path]:
    """A temporary path of the same suffix beside `target`; it becomes `target` when the block ends without error.

    A link is followed, missing folders are made, and a file that is replaced hands on its permissions. A target that
    is no regular file, such as a device or a named pipe, is given out itself.

    Args:
        target: the file to write.
        durable: return when the file is on the disk, where it outlives a power failure (about 1 to 10 ms).

    Raises:
        OSError: with the target's name, also where a library's own error does not say what the system refused.
    """
    if _is_special(target):
        with named_errors(target):
            yield Path(target)
        return
    target = Path(os.path.realpath(target))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    mode = _mode(target)
    with _temporary(target, lambda path: _create_file(path, mode)) as temporary:
        yield temporary
        _finish(temporary, mode, durable)
        os.replace(temporary, target)
        if durable:
            _sync_folder(target.parent)


@contextmanager
def atomic_folder(target: str | os.PathLike, *, durable: bool = False) -> Iterator[Path]:
    """A new folder beside `target`, which takes its place when the block ends without error. A link is followed.

    There is always a folder called `target` if there was one, or, on file systems that cannot swap two folders, one
    that the next write puts back.

    Args:
        target: the folder to write.
        durable: return when the folder and what it holds are on the disk.

    Raises:
        OSError: as `atomic_path`.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    _restore(_beside(target, REPLACED), target)
    mode = _mode(target)
    with _temporary(target, Path.mkdir) as new:
        yield new
        _finish(new, mode, durable)
        _replace_folder(new, target, durable)


@contextmanager
def named_errors(target: str | os.PathLike, temporary: Path | None = None) -> Iterator[None]:
    """Errors of writing `target`, by way of `temporary`, become an OSError with its name and what the system says.

    A full disk is no "System error." (libsndfile) or "file write failed" (PyTorch).
    """
    try:
        yield
    except Exception as error:
        found = _system_error(error, os.fspath(target), temporary)
        if found is None:
            raise
        raise found from error


def clear_partials(folder: Path, *, below: bool = False, owned: bool = False) -> None:
    """Remove what killed processes left in `folder`, and put back a folder that one of them had moved away.

    Args:
        folder: to look in.
        below: also in the folders below it.
        owned: nobody else writes there; where files cannot be locked that cannot be known otherwise.
    """
    look = folder.rglob if below else folder.glob
    for path in list(look(f".*{PARTIAL}*")):
        _remove_abandoned(path, owned)
    for path in list(look(f".*{REPLACED}")):
        _restore(path, path.with_name(path.name[1:].removesuffix(REPLACED)))


# ---- temporary names ---------------------------------------------------------------------------------------------


@contextmanager
def _temporary(target: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """A new file or folder beside `target`, locked for the block and removed if that ends with an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary, lock = _claim(target, create)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None
    try:
        with named_errors(target, temporary):
            yield temporary
    except BaseException:
        _remove(temporary)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _claim(target: Path, create: Callable[[Path], None]) -> tuple[Path, int | None]:
    """Create something beside `target`; its path, and the descriptor that holds its lock."""
    mark = ""  # always tried first, so that what a killed process left is met again
    while True:
        path = _beside(target, PARTIAL + mark)
        mark = f"-{secrets.token_hex(4)}"
        _remove_abandoned(path)
        try:
            create(path)
        except FileExistsError:  # of a living process
            continue
        try:
            return path, _lock(path)
        except (BlockingIOError, FileNotFoundError):  # another process took it for abandoned before it was locked
            continue
        except OSError:
            return path, None


def _beside(target: Path, mark: str) -> Path:
    """The hidden name of `target` with this `mark`; temporary files keep the suffix, which may name a format."""
    if mark == REPLACED:
        return target.with_name(f".{target.name}{mark}")
    return target.with_name(f".{target.stem[:MAX_STEM]}{mark}{target.suffix}")


def _create_file(path: Path, mode: int | None) -> None:
    """A new file, which the kernel gives the permissions that the process's umask leaves it; not more than `mode`."""
    allowed = 0o666 if mode is None else mode & 0o666 | 0o600
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, allowed))


def _lock(path: Path) -> int | None:
    """A descriptor of `path` that holds its lock; None where there are no locks.

    Raises:
        BlockingIOError: if a living process has the lock, or another file is at `path` by now.
        OSError: if it is not there, or cannot be opened.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(path, (os.O_RDONLY if path.is_dir() else os.O_RDWR) | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False)):
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(path))
        return descriptor
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        raise
    except OSError:  # not on this file system
        os.close(descriptor)
        return None


def _remove_abandoned(path: Path, owned: bool = False) -> None:
    """Remove what no living process holds; where that cannot be known only if it is `owned`."""
    try:
        lock = _lock(path)
    except OSError:
        return
    if lock is not None or owned:
        _remove(path)
    if lock is not None:
        os.close(lock)


def _remove(path: Path) -> None:
    """Remove a file or folder as far as that can be done."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


# ---- taking the target's place -----------------------------------------------------------------------------------


def _finish(temporary: Path, mode: int | None, durable: bool) -> None:
    """What is to be done before `temporary` gets its name."""
    raise_if_stopped()
    if mode is not None:
        with suppress(OSError):  # on file systems without permissions
            temporary.chmod(mode)
    if not durable:
        return
    if temporary.is_dir():
        for folder, _, files in os.walk(temporary):
            for name in files:
                _sync_file(os.path.join(folder, name))
            _sync_folder(folder)
    else:
        _sync_file(temporary)


def _replace_folder(new: Path, target: Path, durable: bool) -> None:
    """Call `new` what `target` is called, and remove what was there."""
    if not target.exists():
        os.rename(new, target)
        if durable:
            _sync_folder(target.parent)
        return
    lock = None
    with suppress(OSError):  # so that nobody takes the old one for abandoned and its name for free
        lock = _lock(target)
    try:
        old = new
        if not _exchange(new, target):
            old = _beside(target, REPLACED)
            os.rename(target, old)
            try:
                os.rename(new, target)
            except BaseException:
                os.rename(old, target)
                raise
        if durable:
            _sync_folder(target.parent)
        _remove(old)
    finally:
        if lock is not None:
            os.close(lock)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot do that."""
    names = os.fsencode(one), os.fsencode(other)
    here, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = library.renamex_np(*names, swap)
        else:
            failed = library.renameat2(here, names[0], here, names[1], swap)
    except (AttributeError, TypeError, OSError):  # Windows, or an old C library
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _restore(old: Path, target: Path) -> None:
    """Put back the folder that a killed process had moved away; or finish removing it."""
    if not os.path.isdir(old):
        return
    try:
        lock = _lock(old)
    except OSError:  # of a living process
        return
    try:
        if target.exists():
            _remove(old)
        else:
            os.rename(old, target)
    finally:
        if lock is not None:
            os.close(lock)


def _sync_file(path: str | Path) -> None:
    """Return when the file is on the disk; network file systems say only now that theirs is full."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def _sync_folder(path: str | Path) -> None:
    """The same for the names in a folder, where the file system can do it."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


# ---- targets and their errors ------------------------------------------------------------------------------------


def _is_special(target: str | os.PathLike) -> bool:
    """Whether it is a device, a named pipe, or `/dev/stdout`."""
    try:
        mode = os.stat(target).st_mode
    except (OSError, ValueError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _mode(target: Path) -> int | None:
    try:
        return stat.S_IMODE(target.stat().st_mode) & 0o777
    except FileNotFoundError:
        return None


def _system_error(error: BaseException, target: str, temporary: Path | None) -> OSError | None:
    """What the system said, with the target's name; None if `error` is no error of writing it, or says so itself."""
    one = error
    while one is not None:
        if isinstance(one, OSError) and one.errno is not None:
            if one.filename is None:
                return OSError(one.errno, os.strerror(one.errno), target) if one.errno in WRITE_ERRORS else None
            name = str(one.filename if isinstance(one.filename, int) else os.fsdecode(one.filename))
            if temporary is None or Path(name) != temporary and temporary not in Path(name).parents:
                return None
            rest = os.path.relpath(name, temporary)
            name = target if rest == os.curdir else os.path.join(target, rest)
            return OSError(one.errno, one.strerror, name)
        if match := re.search(r"\(os error (\d+)\)", str(one)):  # of a library in Rust
            return OSError(int(match[1]), os.strerror(int(match[1])), target)
        one = one.__cause__ or one.__context__
    if isinstance(error, (RuntimeError, AssertionError)) and temporary is not None:
        return _probe(target, temporary)
    return None


def _probe(target: str, temporary: Path) -> OSError | None:
    """What the system says to some more bytes, where a library did not say why it cannot write."""
    try:
        with open(temporary / "probe" if temporary.is_dir() else temporary, "ab", buffering=0) as file:
            for _ in range(16):
                file.write(PROBE)
            os.fsync(file.fileno())
    except OSError as error:
        return OSError(error.errno, os.strerror(error.errno), target)
    return None
