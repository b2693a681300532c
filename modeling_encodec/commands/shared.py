"""What the commands share: options, loading a model, lines on stderr."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated

import typer

from modeling_encodec.system.stop_signals import Stopped


# Typer carries a click of its own, and of its errors names only this subclass.
UsageError = typer.BadParameter.__base__
# Where a language model is loaded: coders compute it on the CPU, whatever computes the codec.
LM_DEVICE = "cpu"

Model = Annotated[str | None, typer.Option("--model", "-m", help="Model folder or Hub id (default: the bundled one).")]
NamedModel = Annotated[
    str | None, typer.Option("--model", "-m", help="Model folder or Hub id (default: the one that a file names).")
]
LMModel = Annotated[
    str | None, typer.Option("--lm-model", help="Language model: folder or Hub id (default: the bundled one).")
]
Device = Annotated[str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1, mps ...")]
Precision = Annotated[str, typer.Option("--precision", help="exact, or fast: in bfloat16 where the machine has it.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite files that exist.")]


def load(name: str, device: str, kind: str = "EncodecModel"):
    """The model `name` of this class, ready to run on `device`."""
    import transformers

    import modeling_encodec
    from modeling_encodec.system.devices import find_device, move

    found = find_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    transformers.logging.disable_progress_bar()
    return move(getattr(modeling_encodec, kind).from_pretrained(name).eval(), found)


def one_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def say(line: str) -> None:
    """A line for whoever runs the command, if stderr is still open; results alone go to stdout."""
    with suppress(OSError):
        typer.echo(line, err=True)


def say_stopped(error: KeyboardInterrupt | Stopped) -> int:
    """Say which signal ended the command; its exit code."""
    if isinstance(error, Stopped):
        say(f"modeling-encodec: stopped by {error.signal_name}")
        return error.code
    say("modeling-encodec: interrupted")
    return 130


@contextmanager
def shown_warnings() -> Iterator[None]:
    """What the project warns of is a line on stderr meanwhile, each once; other warnings as Python shows them."""
    show = warnings.showwarning

    def show_ours(message, category, filename, *rest, **named):
        if category is UserWarning and os.path.basename(filename) == "inputs_encodec.py":
            say(f"modeling-encodec: warning: {message}")
        else:
            show(message, category, filename, *rest, **named)

    with warnings.catch_warnings():
        warnings.showwarning = show_ours
        yield
