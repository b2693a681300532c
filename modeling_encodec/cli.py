"""The command line: `modeling-encodec COMMAND ...`.

A user's error is one line on stderr and exit code 2. The commands are in `commands/`; what takes long to import is
imported inside them.
"""

import os
import select
import sys
from contextlib import suppress

import typer

from modeling_encodec.commands.coding import decode, encode, info
from modeling_encodec.commands.convert import convert
from modeling_encodec.commands.demo import demo
from modeling_encodec.commands.doctor import doctor
from modeling_encodec.commands.evaluate import evaluate
from modeling_encodec.commands.models import export, train, train_lm
from modeling_encodec.commands.parts import parts
from modeling_encodec.commands.plot import plot
from modeling_encodec.commands.push import push
from modeling_encodec.commands.shared import UsageError, one_line, say, say_stopped, shown_warnings
from modeling_encodec.commands.tokenize import tokenize
from modeling_encodec.system.stop_signals import Stopped, stop_signals_raise


CLOSED_PIPE = 141  # as a shell tells of a program that SIGPIPE ended

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="EnCodec: audio to .ecdc files and back.",
)
for command in (encode, decode, info, export, demo, train, convert, push, plot, doctor):
    app.command()(command)
app.command("train-lm")(train_lm)
app.add_typer(evaluate, name="evaluate")
app.add_typer(tokenize, name="tokenize")
app.add_typer(parts, name="parts")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 for an error, 128 + n for signal n, as a shell does."""
    streams = sys.stdout, sys.stderr
    try:
        with stop_signals_raise(), shown_warnings():
            code = app(args=argv, standalone_mode=False)  # of an exit before the end: 130 if interrupted
            _flush_stdout()
    except UsageError as error:
        code = _failed(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Stopped as error:
        code = say_stopped(error)
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        # Typer makes this of a broken pipe, which need not be stdout's.
        code = CLOSED_PIPE if _is_closed_pipe(streams[0]) else _failed(one_line(error.__context__))
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError, ArithmeticError) as error:
        code = _failed(f"stdout: {one_line(error)}" if _is_of_stdout(error) else one_line(error))
    finally:
        sys.stdout, sys.stderr = streams
    if code == 130:
        say_stopped(KeyboardInterrupt())
    _give_up_stdout()
    return code or 0


def _failed(message: str) -> int:
    say(f"modeling-encodec: {message}")
    return 2


def _flush_stdout() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _is_of_stdout(error: Exception) -> bool:
    """Whether it is stdout that cannot be written, as on a full disk."""
    if not isinstance(error, OSError) or error.filename is not None:
        return False
    try:
        _flush_stdout()
    except OSError:
        return True
    return False


def _is_closed_pipe(stream) -> bool:
    """Whether nobody reads what is written to `stream`, as after `| head -1`."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors are always told
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except AttributeError:  # Windows, where that cannot be asked
        return True
    except (OSError, ValueError):  # no file at all
        return False


def _give_up_stdout() -> None:
    """Drop what could not be written: Python would try again at its end, and print an error of its own."""
    try:
        _flush_stdout()
    except OSError:
        with suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
