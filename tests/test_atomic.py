"""Files and folders appear whole or not at all, whatever happens on the way and whenever."""

import errno
import os
import stat
import subprocess
import sys
import threading

import pytest
import torch
from fault_steps import died_at_every_step, failed_at_every_step
from safetensors.torch import save_file

from modeling_encodec.commands.shared import one_line
from modeling_encodec.system import atomic
from modeling_encodec.system.atomic import atomic_folder, atomic_path, clear_partials


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_file(target, text="new"):
    with atomic_path(target, durable=True) as temporary:
        temporary.write_text(text)


def write_folder(target, text="new"):
    """Two files that say the same."""
    with atomic_folder(target, durable=True) as new:
        for name in ("a", "b"):
            (new / name).write_text(text)


def read_folder(target) -> str | None:
    """What both files say; None if there is no folder."""
    if not target.exists():
        return None
    assert names(target) == ["a", "b"]
    (text,) = {(target / name).read_text() for name in ("a", "b")}
    return text


# ---- as it should be ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [True, False])
def test_a_folder_is_replaced_when_complete(tmp_path, monkeypatch, swap):
    if not swap:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target = tmp_path / "deep" / "model"
    for content in ("one", "two"):
        with atomic_folder(target) as new:
            assert not target.exists() or (target / "a").read_text() == "one"
            (new / "a").write_text(content)
            assert names(new) == ["a"]
        assert (target / "a").read_text() == content and names(target.parent) == ["model"]


def test_a_failure_leaves_what_was_there(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_text("one")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model") as new:
        (new / "a").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "model" / "a").read_text() == "one" and names(tmp_path) == ["model"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as new:
        (new / "a").write_text("one")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").read_text() == "one"


def test_permissions_are_the_umasks_or_those_that_were(tmp_path):
    """Threads that write at once never see another's umask: nobody changes it."""
    before = os.umask(0o027)
    try:
        threads = [threading.Thread(target=write_file, args=(tmp_path / f"{number}",)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        write_folder(tmp_path / "folder")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("[0-9]")} == {0o640}
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750
    (tmp_path / "0").chmod(0o604)
    with atomic_path(tmp_path / "0") as temporary:
        assert stat.S_IMODE(temporary.stat().st_mode) & 0o060 == 0  # nor may others read it meanwhile
        temporary.write_text("new")
    assert stat.S_IMODE((tmp_path / "0").stat().st_mode) == 0o604


def test_long_names_and_hidden_names(tmp_path):
    for name in ("x" * 250 + ".wav", ".hidden", "many.dots.in.it"):
        write_file(tmp_path / name)
        assert (tmp_path / name).read_text() == "new"
        write_folder(tmp_path / "folders" / name)
        write_folder(tmp_path / "folders" / name, "newer")
        assert read_folder(tmp_path / "folders" / name) == "newer"
    assert len(names(tmp_path)) == 4 and len(names(tmp_path / "folders")) == 3


def test_what_is_no_file_is_refused_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(IsADirectoryError, match="folder"), atomic_path(tmp_path / "folder"):
        raise AssertionError("not to be reached")
    with pytest.raises(NotADirectoryError, match="file"), atomic_folder(tmp_path / "file"):
        raise AssertionError("not to be reached")


# ---- killed ------------------------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("old", [None, "old"])
def test_a_file_survives_a_kill_at_every_step(tmp_path, old):
    target = tmp_path / "file.txt"
    seen = set()
    if old:
        target.write_text(old)
    for _ in died_at_every_step(lambda: write_file(target)):
        found = target.read_text() if target.exists() else None
        assert found in (old, "new")
        seen.add(found)
        write_file(target, "again")
        assert target.read_text() == "again" and names(tmp_path) == ["file.txt"]
        if old:
            target.write_text(old)
        else:
            target.unlink()
    assert seen == {old, "new"}


@needs_fork
@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_folder_survives_a_kill_at_every_step(tmp_path, old, swap):
    """The old one or the new one is there at once; without the swap of two folders after the next start."""
    target = tmp_path / "model"
    seen = set()
    if old:
        write_folder(target, old)
    for number in died_at_every_step(lambda: write_folder(target), swap=swap):
        if not swap:
            clear_partials(tmp_path)
        found = read_folder(target)
        assert found in (old, "new"), number
        seen.add(found)
        write_folder(target, "again")
        assert read_folder(target) == "again" and names(tmp_path) == ["model"]
        if old:
            write_folder(target, old)
        else:
            atomic._remove(target)
    assert seen == {old, "new"}


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name in (".model.partial", ".model.partial-0123abcd", ".model.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rest").write_text("half")
    (tmp_path / ".file.partial.wav").write_text("half")
    clear_partials(tmp_path)
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["rest"]  # it was moved away: put back


def test_what_another_process_writes_is_left_alone(tmp_path):
    script = (
        "import sys; from pathlib import Path; from modeling_encodec.system.atomic import *\n"
        "folder = Path(sys.argv[1])\n"
        "with atomic_path(folder / 'file.txt') as file, atomic_folder(folder / 'model') as model:\n"
        "    file.write_text('theirs'); (model / 'a').write_text('theirs')\n"
        "    print('ready', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    clear_partials(tmp_path, owned=True)
    write_file(tmp_path / "file.txt", "ours")
    write_folder(tmp_path / "model", "ours")
    assert names(tmp_path) == [".file.partial.txt", ".model.partial", "file.txt", "model"]
    process.communicate()
    assert process.returncode == 0 and names(tmp_path) == ["file.txt", "model"]
    assert (tmp_path / "file.txt").read_text() == "theirs" == (tmp_path / "model" / "a").read_text()


def test_without_locks_only_an_owner_removes(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".file.partial.txt").write_text("half")
    write_file(tmp_path / "file.txt")
    write_folder(tmp_path / "model")
    write_folder(tmp_path / "model", "newer")
    clear_partials(tmp_path)
    assert names(tmp_path) == [".file.partial.txt", "file.txt", "model"] and read_folder(tmp_path / "model") == "newer"
    clear_partials(tmp_path, owned=True)
    assert names(tmp_path) == ["file.txt", "model"]


# ---- refused by the system ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EXDEV, errno.EBUSY, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("swap", [True, False])
def test_a_step_that_fails_leaves_the_old_and_nothing_else(tmp_path, code, swap):
    """Or the new, where only the removing of the old one failed."""
    file, folder = tmp_path / "file.txt", tmp_path / "model"
    write_file(file, "old")
    write_folder(folder, "old")
    steps = set()
    for step, error in failed_at_every_step(lambda: (write_file(file), write_folder(folder)), code, swap=swap):
        steps.add(step)
        assert error is None or isinstance(error, OSError)
        if error is not None and step not in ("exchange", "rename", "replace"):
            assert "\n" not in one_line(error)
            assert error.errno == code, step
        clear_partials(tmp_path)
        assert names(tmp_path) == ["file.txt", "model"], step
        assert file.read_text() in ("old", "new") and read_folder(folder) in ("old", "new"), step
        if step == "exchange" or (step == "rename" and error is not None):
            assert read_folder(folder) == "old"
        write_file(file, "old")
        write_folder(folder, "old")
    assert steps >= {"open", "fsync", "chmod", "replace", "mkdir", "rmdir", "exchange" if swap else "rename"}


@pytest.mark.parametrize("how", ["python", "torch", "safetensors"])
def test_libraries_that_do_not_say_why(tmp_path, how):
    """A limit on a file's size stands for a full disk; the line says what the system says, of the target."""
    resource = pytest.importorskip("resource")
    tensors = {"a": torch.zeros(1 << 18)}

    def write(path):
        if how == "torch":
            torch.save(tensors, path)
        elif how == "safetensors":
            save_file(tensors, path)
        else:
            path.write_bytes(bytes(1 << 20))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(OSError) as caught, atomic_path(tmp_path / "file.x") as temporary:
            write(temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert one_line(caught.value) == f"{tmp_path / 'file.x'}: File too large" and names(tmp_path) == []


def test_errors_of_other_files_keep_their_names(tmp_path):
    for error in (
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "source.wav"),
        OSError(errno.EIO, os.strerror(errno.EIO)),
        ValueError("no audio"),
    ):
        with pytest.raises(type(error)) as caught, atomic_path(tmp_path / "file.x"):
            raise error
        assert caught.value is error and names(tmp_path) == []
