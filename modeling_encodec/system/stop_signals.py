"""Signals that stop a command become exceptions, so that it removes its temporary files and ends its processes."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


# SIGHUP comes when a terminal or an SSH session is closed.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# For this long after a signal more of them are ignored: they would interrupt the cleaning up.
GRACE_SECONDS = 5

_received: int | None = None


class Stopped(SystemExit):
    """A signal told this process to stop. Its code is the shell's, 128 and the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP raise `Stopped` meanwhile.

    Signals that are ignored (SIGHUP under nohup) or that somebody else handles are left alone. In threads other than
    the main one nothing changes.
    """
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner, since = os.getpid(), 0.0

    def stop(number: int, frame) -> None:
        global _received
        nonlocal since
        if os.getpid() != owner:  # a forked child, which has nothing of ours to clean up
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            return
        if _received is not None and time.monotonic() - since < GRACE_SECONDS:
            return
        _received, since = number, time.monotonic()
        raise_if_stopped()

    theirs = {}
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            theirs[number] = signal.signal(number, stop)
    try:
        yield
        raise_if_stopped()
    finally:
        for number, handler in theirs.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)
        _received = None


def raise_if_stopped() -> None:
    """Raise for a signal that was received.

    To be called before something is called complete: a C library whose callback was interrupted may have printed the
    exception and taken it for the end of its input.

    Raises:
        KeyboardInterrupt: for SIGINT.
        Stopped: for the others.
    """
    if _received is not None:
        raise KeyboardInterrupt if _received == signal.SIGINT else Stopped(_received)
