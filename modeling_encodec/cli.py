"""The command line: `modeling-encodec COMMAND ...`.

A user's error is one line on stderr and exit code 2. The commands are in `commands/`; what takes long to import is
imported inside them.
"""

import typer

from modeling_encodec.commands.coding import decode, encode, info
from modeling_encodec.commands.convert import convert
from modeling_encodec.commands.demo import demo
from modeling_encodec.commands.evaluate import evaluate
from modeling_encodec.commands.models import export, train, train_lm
from modeling_encodec.commands.plot import plot
from modeling_encodec.commands.push import push
from modeling_encodec.commands.shared import UsageError, one_line, say, shown_warnings
from modeling_encodec.commands.tokenize import tokenize


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="EnCodec: audio to .ecdc files and back.",
)
for command in (encode, decode, info, export, demo, train, convert, push, plot):
    app.command()(command)
app.command("train-lm")(train_lm)
app.add_typer(evaluate, name="evaluate")
app.add_typer(tokenize, name="tokenize")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        with shown_warnings():
            code = app(args=argv, standalone_mode=False)  # of an exit before the end: 130 if interrupted
    except UsageError as error:
        say(f"modeling-encodec: {error.format_message()}")
        return 2
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError, ArithmeticError) as error:
        say(f"modeling-encodec: {one_line(error)}")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        say("modeling-encodec: interrupted")
    return code or 0
