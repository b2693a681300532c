"""Commands whose disk is full, whose reader goes away or that are told to stop: one line or none, and nothing left."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import soundfile

from modeling_encodec.checkpoints import bundled_checkpoint
from modeling_encodec.cli import main
from modeling_encodec.processors.audio import write_audio
from modeling_encodec.system import stop_signals
from modeling_encodec.system.atomic import atomic_path
from modeling_encodec.system.stop_signals import Stopped, raise_if_stopped, stop_signals_raise


COMMAND = [sys.executable, "-m", "modeling_encodec"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(name="place", scope="module")
def fixture_place(tmp_path_factory):
    """A folder with clip.wav, a second of noise, and clip.ecdc."""
    folder = tmp_path_factory.mktemp("faults")
    soundfile.write(folder / "clip.wav", 0.1 * np.random.default_rng(0).standard_normal(24000), 24000)
    assert main(["encode", str(folder / "clip.wav"), str(folder / "clip.ecdc")]) == 0
    return folder


@pytest.fixture
def nearly_full():
    """`with nearly_full(): ...`: files of at most 512 bytes can be written, the rest is refused as by a full disk."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limit():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


# ---- full disks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["encode", "{place}/clip.wav", "{out}/o.ecdc"], "{out}/o.ecdc"),
        (["encode", "{place}/clip.wav", "{out}/o.ecdc", "--original"], "{out}/o.ecdc"),
        (["decode", "{place}/clip.ecdc", "{out}/o.wav"], "{out}/o.wav"),
        (["decode", "{place}/clip.ecdc", "{out}/o.flac"], "{out}/o.flac"),
        (["decode", "{place}/clip.ecdc", "{out}/o.ogg"], "{out}/o.ogg"),
        (["decode", "{place}/clip.ecdc", "{out}/o.wav", "--rescale"], "{tmp}"),
        (["decode", "{place}/clip.ecdc", "-"], "{tmp}"),
        (["plot", "{place}/clip.ecdc", "-o", "{out}/o.png"], "{out}/o.png"),
        (["convert", "{model}", "{out}/o.th"], "{out}/o.th"),
        (["demo", "{place}/clip.wav", "-o", "{out}", "--force"], "{out}/clip_original.wav"),
    ],
)
def test_a_full_disk_is_named(arguments, named, place, tmp_path, run, nearly_full, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    if "plot" in arguments:
        pytest.importorskip("matplotlib")
    words = {"place": place, "out": tmp_path / "out", "tmp": tmp_path / "tmp", "model": bundled_checkpoint()}
    with nearly_full():
        code, out, lines = run(*[argument.format(**words) for argument in arguments])
    assert code == 2 and out == "" and len(lines) == 1, lines
    assert lines[0].endswith(f"{named.format(**words)}: File too large")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_device_and_stdout(place, run, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    code, _, lines = run("encode", place / "clip.wav", "/dev/full", "--force")
    assert code == 2 and lines == [f"modeling-encodec: {place / 'clip.wav'}: /dev/full: No space left on device"]
    (tmp_path / "full.wav").symlink_to("/dev/full")
    code, _, lines = run("decode", place / "clip.ecdc", tmp_path / "full.wav", "--force")
    assert code == 2 and len(lines) == 1 and lines[0].endswith("full.wav: No space left on device")
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*COMMAND, "--help"], stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"No space left on device" in done.stderr


@pytest.mark.parametrize("rescale", [False, True])
def test_what_a_file_object_raises_arrives(rescale):
    """Through libsndfile, which would print it and say "System error."; a signal's exception too."""
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        class Refusing:
            name = "theirs.wav"

            def seek(self, *_):
                return 0

            def tell(self):
                return 0

            def write(self, data, error=error):
                raise error

        with pytest.raises(type(error)) as caught:
            write_audio(Refusing(), np.zeros((1, 1000), np.float32), 24000, rescale=rescale)
        assert isinstance(error, KeyboardInterrupt) or caught.value.filename == "theirs.wav"


def test_targets_that_cannot_be_written(place, run, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    for arguments, words in (
        (["plot", place / "clip.ecdc", "-o", tmp_path / "folder.png", "--force"], "folder.png: Is a directory"),
        (["encode", place / "clip.wav", tmp_path / ("x" * 300)], "File name too long"),
        (["encode", place / "clip.wav", tmp_path / "file" / "o.ecdc"], "file"),
        (["decode", place / "clip.ecdc", "/proc/o.wav"], "/proc/o.wav: No such file or directory"),
    ):
        if "/proc/o.wav" in arguments and not os.path.isdir("/proc/self"):
            continue
        code, _, lines = run(*arguments)
        assert code == 2 and len(lines) == 1 and words in lines[0], lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_missing_permission_is_named(place, run, tmp_path):
    if os.name == "nt" or os.geteuid() == 0:
        pytest.skip("may write everywhere")
    (tmp_path / "mine").mkdir(mode=0o500)
    code, _, lines = run("encode", place / "clip.wav", tmp_path / "mine" / "o.ecdc")
    assert code == 2 and len(lines) == 1 and lines[0].endswith("mine/o.ecdc: Permission denied")


# ---- closed pipes ------------------------------------------------------------------------------------------------


@contextmanager
def closed_stdout():
    """stdout is a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stdout, open(os.devnull, "wb") as nowhere, mock.patch.object(sys, "stdout", stdout):
        yield
        os.dup2(nowhere.fileno(), write)  # what was not written is tried again when it is closed


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["encode", "--help"],
        ["evaluate", "mushra", "--help"],
        ["info", "{place}/clip.ecdc"],
        ["encode", "{place}/clip.wav", "-"],
        ["decode", "{place}/clip.ecdc", "-"],
        ["decode", "--stream", "-", "-"],
        ["tokenize", "{place}", "{tmp}/tokens", "-b", "6"],
    ],
)
def test_a_closed_pipe_ends_quietly(arguments, place, tmp_path, monkeypatch, capfd):
    with open(place / "clip.ecdc") as stdin, closed_stdout():
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main([argument.format(place=place, tmp=tmp_path) for argument in arguments]) == 141
    errors = capfd.readouterr().err
    assert errors == "" or (arguments[0] == "tokenize" and "Error" not in errors and "rror:" not in errors)


def test_a_closed_pipe_at_the_end_of_the_process():
    """What Python would flush at its end is dropped."""
    read, write = os.pipe()
    os.close(read)
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([*COMMAND, "--help"], stdout=write, stderr=subprocess.PIPE, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_pipe_that_breaks_is_an_error(place, tmp_path, run):
    """A named pipe whose reader goes away is no closed stdout."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes")
    os.mkfifo(tmp_path / "pipe.ecdc")
    reader = threading.Thread(target=lambda: os.close(os.open(tmp_path / "pipe.ecdc", os.O_RDONLY)))
    reader.start()
    code, _, lines = run("encode", place / "clip.wav", tmp_path / "pipe.ecdc", "--force")
    reader.join()
    assert code == 2 and len(lines) == 1 and "Broken pipe" in lines[0]


def test_a_named_pipe_gets_audio(place, tmp_path, run):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes")
    os.mkfifo(tmp_path / "pipe.wav")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe.wav").read_bytes()))
    reader.start()
    assert run("decode", place / "clip.ecdc", tmp_path / "pipe.wav", "--force")[0] == 0
    reader.join()
    assert run("decode", place / "clip.ecdc", tmp_path / "file.wav")[0] == 0
    assert got == [(tmp_path / "file.wav").read_bytes()]


# ---- signals -----------------------------------------------------------------------------------------------------

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_unwinds_and_later_ones_wait(number):
    cleaned = []
    with pytest.raises((KeyboardInterrupt, Stopped)) as caught, stop_signals_raise():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # impatience, or the system's
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(True)
    assert cleaned == [True]
    assert number == signal.SIGINT or caught.value.code == 128 + number
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    raise_if_stopped()  # nothing is left of it


def test_a_signal_long_after_the_first_counts(monkeypatch):
    monkeypatch.setattr(stop_signals, "GRACE_SECONDS", 0.05)
    with pytest.raises(Stopped, match="143"), stop_signals_raise():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            time.sleep(0.1)
            signal.raise_signal(signal.SIGTERM)


def test_an_exception_that_was_swallowed_completes_nothing(tmp_path):
    """As by a callback from C, which prints it and goes on with half of its input."""
    with pytest.raises(KeyboardInterrupt), stop_signals_raise(), atomic_path(tmp_path / "file") as temporary:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            temporary.write_text("half")
    assert list(tmp_path.iterdir()) == []


def test_ignored_signals_and_other_peoples_handlers_stay():
    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        heard = []
        signal.signal(signal.SIGINT, lambda *_: heard.append(True))
        with stop_signals_raise():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        assert heard == [True]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    errors = []

    def in_a_thread():
        try:
            with stop_signals_raise():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert errors == []


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_signals_to_encode_leave_nothing(tmp_path):
    """What SIGKILL leaves the next run of the same command removes."""
    soundfile.write(tmp_path / "long.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 24000 * 200), 24000)
    for name, code in (("SIGKILL", -9), ("SIGTERM", 143)):
        command = [*COMMAND, "encode", str(tmp_path / "long.wav"), str(tmp_path / "out.ecdc")]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env=ENVIRONMENT)
        begun, limit = tmp_path / ".out.partial.ecdc", time.monotonic() + 60
        left = begun.stat().st_mtime_ns if begun.exists() else None
        while not begun.exists() or begun.stat().st_mtime_ns == left:
            assert process.poll() is None and time.monotonic() < limit, process.communicate()
            time.sleep(0.02)
        process.send_signal(getattr(signal, name))
        error = process.communicate()[1].decode()
        assert process.returncode == code
        if name != "SIGKILL":
            assert error == f"modeling-encodec: stopped by {name}\n"
            assert [path.name for path in tmp_path.iterdir()] == ["long.wav"]
