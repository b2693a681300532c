"""The command line: `modeling-encodec encode | decode | info | export | demo | train | train-lm`.

A user's error is one line on stderr and exit code 2. The commands are in `commands/`; what takes long to import is
imported inside them.
"""

import typer

from modeling_encodec.commands.coding import decode, encode, info
from modeling_encodec.commands.models import demo, export, train, train_lm
from modeling_encodec.commands.shared import UsageError, one_line, say


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="EnCodec: audio to .ecdc files and back.",
)
for command in (encode, decode, info, export, demo, train):
    app.command()(command)
app.command("train-lm")(train_lm)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        app(args=argv, standalone_mode=False)
    except UsageError as error:
        say(f"modeling-encodec: {error.format_message()}")
        return 2
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError, ArithmeticError) as error:
        say(f"modeling-encodec: {one_line(error)}")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        say("modeling-encodec: interrupted")
        return 130
    except typer.Exit as stop:
        return stop.exit_code
    return 0
