"""Worker processes that make items ahead of their use, and of which no item is lost in silence.

Every worker has a pipe of its own, which its items go through as bytes: there is no shared memory to run out of, and
no item holds a file open. Items are numbered, and the last message says how many there were. What a worker cannot make
or pickle is raised where items are taken; so is a worker's end before its last item, in whatever way it ended.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence

from modeling_encodec.system.stop_signals import SIGNALS


POLL_SECONDS = 0.2  # how long a wait goes on before it is asked whether to stop
END_SECONDS = 5  # that a process is given to end
ITEM, END, FAILED, GONE = range(4)

Maker = Callable[[], Iterable]


def items_in_turn(makers: Sequence[Maker], *, method: str, ahead: int, stop: Callable[[], bool]) -> Iterator:
    """What the `makers` give, one item of each in turn, until the first of them is at its end; each is iterated in a
    process of its own, which is some `ahead` items before.

    Args:
        makers: give something to iterate over when called in their process.
        method: "fork" or "spawn": how processes are started.
        ahead: items of each that wait at most, besides one that its process has in hand.
        stop: asked during waits; if it holds the iteration ends.

    Raises:
        RuntimeError: if a process ended before its last item, or cannot be started.
        Exception: what a maker raised.
    """
    inboxes = [queue.Queue(ahead) for _ in makers]
    with _Workers(makers, method, inboxes) as workers:
        while True:
            for inbox in inboxes:
                message = workers.take(inbox, stop)
                if message is None or message[0] == END:
                    return
                yield message[1]


def items_as_ready(makers: Sequence[Maker], *, method: str, ahead: int) -> Iterator:
    """The same, whichever is ready first, until all are at their ends."""
    inbox = queue.Queue(ahead * len(makers))
    with _Workers(makers, method, [inbox] * len(makers)) as workers:
        left = len(makers)
        while left:
            kind, value = workers.take(inbox)
            if kind == END:
                left -= 1
            else:
                yield value


class _Workers:
    """The processes, each with a thread that takes what it sends and puts (kind, value) into its inbox."""

    def __init__(self, makers: Sequence[Maker], method: str, inboxes: Sequence[queue.Queue]):
        self.closed = threading.Event()
        self.processes, self.pipes, self.threads = [], [], []
        context = multiprocessing.get_context(method)
        try:
            with _stop_signals_blocked():
                for maker in makers:
                    self._start(context, maker)
        except OSError as error:
            self.close()
            reason = error.strerror or type(error).__name__
            raise RuntimeError(
                f"worker processes cannot be started ({reason}); fewer, or --workers 0, may do"
            ) from None
        except BaseException:
            self.close()
            raise
        for number, inbox in enumerate(inboxes):  # after the last fork
            self.threads.append(threading.Thread(target=self._receive, args=(number, inbox), daemon=True))
            self.threads[-1].start()

    def _start(self, context, maker: Maker) -> None:
        ours, theirs = context.Pipe(duplex=False)
        self.pipes.append(ours)
        with theirs:  # closed here, so that it ends with the process
            process = context.Process(target=_work, args=(maker, theirs), daemon=True)
            process.start()
        self.processes.append(process)

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def take(self, inbox: queue.Queue, stop: Callable[[], bool] | None = None) -> tuple | None:
        """The next (kind, value), of kind ITEM or END; None if stopped."""
        while True:
            if stop is not None and stop():
                return None
            try:
                kind, value = inbox.get(timeout=POLL_SECONDS)
                break
            except queue.Empty:
                continue
        if kind == GONE:
            raise RuntimeError(self._how_it_ended(*value))
        if kind == FAILED:
            error, text = value
            raise error from RuntimeError(f"in a worker process:\n{text}")
        return kind, value

    def _receive(self, number: int, inbox: queue.Queue) -> None:
        """Take what process `number` sends, until its end."""
        try:
            for expected in range(sys.maxsize):
                sent, kind, value = pickle.loads(self.pipes[number].recv_bytes())
                if sent != expected:
                    kind, value = GONE, (number, f"item {expected} did not arrive, but {sent}")
                self._put(inbox, (kind, value))
                if kind != ITEM:
                    return
        except (EOFError, OSError):  # cut off between messages, or within one
            self._put(inbox, (GONE, (number, None)))
        except BaseException as error:  # in a thread it would be lost: memory that runs out, for one
            self._put(inbox, (FAILED, (error, traceback.format_exc())))

    def _put(self, inbox: queue.Queue, message: tuple) -> None:
        while not self.closed.is_set():
            try:
                return inbox.put(message, timeout=POLL_SECONDS)
            except queue.Full:
                continue

    def _how_it_ended(self, number: int, what: str | None) -> str:
        process = self.processes[number]
        process.join(END_SECONDS)
        code = process.exitcode
        if what is None and code is not None and code < 0:
            what = f"killed by {signal.Signals(-code).name}"
            what += ", as systems do where memory runs out: fewer --workers need less" * (-code == signal.SIGKILL)
        what = what or ("its pipe broke" if code is None else f"exit code {code}, its own message is above")
        return f"a worker process ended before its work did ({what}); nothing of it is taken for whole"

    def close(self) -> None:
        """End the processes, whatever they do."""
        if sys.is_finalizing():  # an iteration that nobody ended: `multiprocessing` has ended them by now
            return
        self.closed.set()
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(END_SECONDS)
            if process.is_alive():
                process.kill()
                process.join(END_SECONDS)
        for thread in self.threads:
            thread.join(END_SECONDS)
        for pipe in self.pipes:
            pipe.close()


class _stop_signals_blocked:
    """Workers are born with these signals blocked: one that comes before `_begin` would end them."""

    def __enter__(self):
        if hasattr(signal, "pthread_sigmask"):  # not on Windows
            self.before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def __exit__(self, *error):
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_SETMASK, self.before)


# ---- in the worker -------------------------------------------------------------------------------------------------


def _work(maker: Maker, pipe) -> None:
    """Send what `maker` gives, then how many there were, or what went wrong."""
    _begin()
    number = 0
    try:
        for item in maker():
            _send(pipe, (number, ITEM, item))
            number += 1
        last = (number, END, None)
    except BaseException as error:
        last = (number, FAILED, (_portable(error), traceback.format_exc()))
    _send(pipe, last)


def _send(pipe, message: tuple) -> None:
    data = pickle.dumps(message, protocol=5)  # what cannot be pickled raises before anything is sent
    try:
        pipe.send_bytes(data)
    except BaseException as error:  # a part of it may be sent: nothing after it could be read
        if not isinstance(error, BrokenPipeError):  # nobody listens
            print(f"worker process: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _portable(error: BaseException) -> BaseException:
    """The error, or what can be sent of it."""
    try:
        pickle.loads(pickle.dumps(error))
        if isinstance(error, Exception):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")


def _begin() -> None:
    """One thread, and no end by signals that are meant for the main process.

    Ctrl-C, the end of a terminal, `kill` on the process group and Slurm signal every process. The main process then
    saves and closes; were the workers gone, it would fail first. So SIGTERM counts only when it comes from the main
    process, which sends it to end workers; should that die, they notice within 2 s and end.
    """
    import torch

    torch.set_num_threads(1)
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):  # macOS, Windows
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    parent = multiprocessing.parent_process().pid

    def wait_for_end():
        while os.getppid() == parent:
            received = signal.sigtimedwait([signal.SIGTERM], 2)
            if received is not None and received.si_pid == parent:
                break
        os._exit(0)

    threading.Thread(target=wait_for_end, daemon=True).start()
