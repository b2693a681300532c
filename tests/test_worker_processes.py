"""Worker processes: what they make arrives, all of it and in order, or the reason why not."""

import itertools
import os
import signal
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest

from modeling_encodec.processors.corpus.clips import UnusableClip
from modeling_encodec.system import worker_processes
from modeling_encodec.system.worker_processes import items_as_ready, items_in_turn


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, for speed; signals as on Linux")


def in_turn(makers, stop=lambda: False):
    return items_in_turn(makers, method="fork", ahead=2, stop=stop)


def as_ready(makers):
    return items_as_ready(makers, method="fork", ahead=2)


WAYS = pytest.mark.parametrize("take", [in_turn, as_ready])


def test_one_of_each_in_turn():
    makers = [partial(itertools.count, first, 3) for first in range(3)]
    items = in_turn(makers)
    assert list(itertools.islice(items, 50)) == list(range(50))
    items.close()


def test_all_of_all_each_in_its_order():
    taken = list(as_ready([partial(map, partial(pow, base), range(20)) for base in (2, 3)] + [list]))
    assert len(taken) == 40 and sorted(taken) == sorted([2**n for n in range(20)] + [3**n for n in range(20)])
    assert [n for n in taken if n > 1 and n % 2 == 0] == [2**n for n in range(1, 20)]


@WAYS
def test_items_larger_than_a_pipe(take):
    arrays = [np.arange(size, dtype=np.float32) for size in (0, 1, 1 << 20)]
    taken = list(take([lambda: arrays]))
    assert all(map(np.array_equal, taken, arrays)) and len(taken) == 3 and taken[2].flags.writeable


def three_then(what):
    yield from range(3)
    yield what()


def fail(error):
    raise error


class LocalError(Exception):
    def __init__(self, first, second):  # cannot be unpickled
        super().__init__(first)


@WAYS
@pytest.mark.parametrize(
    "what, kind, message",
    [
        (lambda: fail(UnusableClip("a.wav", "no audio")), UnusableClip, "a.wav: no audio"),
        (lambda: fail(MemoryError("of 2 GB")), MemoryError, "of 2 GB"),
        (lambda: fail(LocalError("this", "that")), RuntimeError, "LocalError: this"),
        (lambda: fail(SystemExit(3)), RuntimeError, "SystemExit: 3"),
        (lambda: lambda: 0, Exception, "pickle.*lambda"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), RuntimeError, "killed by SIGKILL, as systems do where memory"),
        (
            lambda: os.kill(os.getpid(), signal.SIGUSR1),
            RuntimeError,
            r"ended before its work did \(killed by SIGUSR1\)",
        ),
        (lambda: os._exit(7), RuntimeError, "exit code 7"),
        (lambda: os._exit(0), RuntimeError, "ended before its work did .exit code 0"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_raised(take, what, kind, message):
    taken = []
    with pytest.raises(kind, match=message):
        for item in take([partial(three_then, what)]):
            taken.append(item)
    assert taken == [0, 1, 2]


@WAYS
@pytest.mark.parametrize("written", [0, 100])
def test_what_cannot_be_sent(take, written, monkeypatch, capfd):
    """Nothing, or a part, of a message goes through."""
    connection = type(worker_processes.multiprocessing.Pipe(duplex=False)[1])
    send = connection.send_bytes

    def broken(pipe, data):
        if len(data) > 1000:
            os.write(pipe.fileno(), data[:written])
            raise OSError(24, "Too many open files")
        send(pipe, data)

    monkeypatch.setattr(connection, "send_bytes", broken)
    with pytest.raises(RuntimeError, match="ended before its work did .exit code 1"):
        list(take([partial(three_then, lambda: bytes(2000))]))
    assert "worker process: OSError: [Errno 24] Too many open files" in capfd.readouterr().err


@WAYS
def test_an_item_that_does_not_arrive_is_missed(take, monkeypatch):
    send = worker_processes._send
    monkeypatch.setattr(worker_processes, "_send", lambda pipe, message: message[0] == 2 or send(pipe, message))
    with pytest.raises(RuntimeError, match="item 2 did not arrive, but 3"):
        list(take([lambda: range(9)]))


@WAYS
def test_processes_that_cannot_be_started(take, monkeypatch):
    def no_more(*args, **options):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_more)
    with pytest.raises(
        RuntimeError, match=r"cannot be started \(Resource temporarily unavailable\); fewer, or --workers 0"
    ):
        list(take([range]))


def test_a_wait_can_be_stopped():
    asked = threading.Event()
    threading.Timer(0.5, asked.set).start()
    began = time.monotonic()
    assert list(in_turn([partial(three_then, lambda: time.sleep(600))], asked.is_set)) == [0, 1, 2]
    assert time.monotonic() - began < 60
    assert not worker_processes.multiprocessing.active_children()


def test_nothing_is_left_of_an_iteration_that_is_broken_off():
    threads = threading.active_count()
    items = as_ready([partial(itertools.repeat, bytes(1 << 20)) for _ in range(3)])
    next(items)
    assert len(worker_processes.multiprocessing.active_children()) == 3
    items.close()
    assert not worker_processes.multiprocessing.active_children() and threading.active_count() == threads
