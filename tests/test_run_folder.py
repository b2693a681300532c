"""Folders of runs keep other runs out, also where files cannot be locked."""

import errno
import os
import socket
import subprocess
import sys

import pytest
from filelock import SoftFileLock

from modeling_encodec.system.run_folder import start_run


fcntl = pytest.importorskip("fcntl")


def start(folder):
    return start_run({"a": 1}, folder, "data")


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO, errno.EPERM])
def no_locks(request, monkeypatch):
    """`flock` as on shared folders of all kinds."""

    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


def assert_one_at_a_time(folder):
    with (
        start(folder),
        pytest.raises(ValueError, match=f"process {os.getpid()} on {socket.gethostname()}, since 20.* one run at"),
    ):
        start(folder)
    with start(folder):
        pass
    with pytest.raises(FileExistsError, match="another run"):
        start_run({"a": 2}, folder, "data")
    assert not (folder / ".lock").exists()


def test_one_run_at_a_time_without_locks(no_locks, tmp_path, recwarn):
    assert_one_at_a_time(tmp_path / "out")
    (tmp_path / "out" / ".lock").touch()  # as one that was locked leaves it
    assert_one_at_a_time(tmp_path / "out")
    assert not (tmp_path / "out" / ".lock").exists() and not recwarn.list


def leave_a_lock(folder):
    """As a process does that is killed."""
    folder.mkdir()
    script = "import sys, os, filelock; lock = filelock.SoftFileLock(sys.argv[1]); lock.acquire(); os._exit(0)"
    subprocess.run([sys.executable, "-c", script, str(folder / ".lock")], check=True)
    (folder / "run.json").write_text('{"a": 1}')
    return (folder / ".lock").read_text().splitlines()


def test_a_lock_that_was_left_here_is_taken(no_locks, tmp_path):
    leave_a_lock(tmp_path / "out")
    with start(tmp_path / "out"):
        pass


@pytest.mark.parametrize("locks", [True, False])
def test_a_lock_that_was_left_elsewhere_is_named(locks, request, tmp_path, monkeypatch):
    """It blocks, whether this host has locks there or not: whether its holder lives cannot be known."""
    folder = tmp_path / "out"
    process, host, *more = leave_a_lock(folder)
    (folder / ".lock").write_text("\n".join([process, "elsewhere", *more, ""]))
    os.utime(folder / ".lock", (1.7e9, 1.7e9))
    if not locks:
        monkeypatch.setattr(fcntl, "flock", lambda *_: os.close(-1))
    message = (
        f"process {process} on elsewhere, since 2023-11-1.* is at work there.*if it is no more, delete .*out/.lock"
    )
    with pytest.raises(ValueError, match=message):
        start(folder)
    (folder / ".lock").unlink()
    with start(folder):
        pass


def test_a_lock_without_a_name(no_locks, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text('{"a": 1}')
    (tmp_path / "out" / ".lock").write_text("?")
    with pytest.raises(ValueError, match="another process is at work there, allowed: .* delete .*out/.lock"):
        start(tmp_path / "out")


def test_locks_of_both_kinds_see_each_other(tmp_path, monkeypatch):
    with start(tmp_path / "out"), pytest.raises(ValueError, match="another process is at work there"):
        start(tmp_path / "out")
    with SoftFileLock(tmp_path / "out" / ".lock2"):
        os.replace(tmp_path / "out" / ".lock2", tmp_path / "out" / ".lock")
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
            start(tmp_path / "out")
