"""File systems that fail, and processes that die, at the Nth step that changes something."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from unittest import mock

from modeling_encodec.system import atomic


STEPS = ("open", "replace", "rename", "unlink", "remove", "rmdir", "mkdir", "chmod", "fsync")


class Killed(BaseException):
    """This process is taken for dead: nothing that it does any more reaches the disk."""


@contextmanager
def at_step(number: int, act: Callable[[], None], *, swap: bool = True) -> Iterator[list[str]]:
    """Call `act` in place of step `number`; collects the names of the steps that were made. Without `swap` two
    folders cannot change places in one step."""
    made: list[str] = []

    def watched(name: str, function: Callable) -> Callable:
        def step(*arguments, **options):
            if name == "open" and not arguments[1] & (os.O_CREAT | os.O_TRUNC):
                return function(*arguments, **options)
            made.append(name)
            if len(made) == number:
                act()
            return function(*arguments, **options)

        return step

    exchange = atomic._exchange if swap else lambda one, other: False
    with (
        mock.patch.multiple(os, **{name: watched(name, getattr(os, name)) for name in STEPS}),
        mock.patch.object(atomic, "_exchange", watched("exchange", exchange) if swap else exchange),
    ):
        yield made


def died_at_every_step(operation: Callable[[], None], *, swap: bool = True) -> Iterator[int]:
    """Run `operation` in one process after another that ends before its first step, its second ...; yields after each
    but the one that gets to its end."""
    for number in count(1):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with at_step(number, lambda: os._exit(9), swap=swap):
                    operation()
                status = 0
            finally:
                os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return
        assert code == 9, f"step {number}: exit code {code}"
        yield number


def failed_at_every_step(operation: Callable[[], None], code: int, *, swap: bool = True) -> Iterator[tuple]:
    """Run `operation` where the first step fails with this error, then the second ...; yields (name of the step,
    error or None) after each but the one whose steps are all made."""
    for number in count(1):

        def refuse():
            raise OSError(code, os.strerror(code))

        error = None
        with at_step(number, refuse, swap=swap) as made:
            try:
                operation()
            except Exception as caught:
                error = caught
        if len(made) < number:
            return
        yield made[number - 1], error


@contextmanager
def killed_at(number: int) -> Iterator[list[str]]:
    """This process is taken for dead from step `number` on: every step raises `Killed`, so that nothing that it does
    while it unwinds reaches the disk."""

    def watched(name: str, function: Callable) -> Callable:
        def step(*arguments, **options):
            if name == "open" and not arguments[1] & (os.O_CREAT | os.O_TRUNC):
                return function(*arguments, **options)
            made.append(name)
            if len(made) >= number:
                raise Killed
            return function(*arguments, **options)

        return step

    made: list[str] = []
    with (
        mock.patch.multiple(os, **{name: watched(name, getattr(os, name)) for name in STEPS}),
        mock.patch.object(atomic, "_exchange", watched("exchange", atomic._exchange)),
    ):
        yield made
