"""`--help` of every command: each says what it does, and of every argument and option what it means."""

import re

import pytest
import typer

from modeling_encodec.cli import app


# What ends a sentence of help: a full stop, a default or choices in brackets, or dots of a list that goes on.
SENTENCE = re.compile(r"[^\s].*(?:[.\]\)]|\.\.\.)", re.DOTALL)
UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX|TBD)\b")
# A number is of something: its help or its name says of what.
UNITS = re.compile(
    r"\b(kbps|seconds|minutes|hours|dB|MiB|megabytes|samples|frames|epochs|layers|updates?|clips|codebooks?|processes|positions|heads|"
    r"width|channels|examples|sequences|batches|rounds|ratings|parts?|chance|decay|rate|share|weight|fraction|norm|seed|port)"
    r"\b",
    re.IGNORECASE,
)


def walk(command, names: tuple[str, ...] = ()):
    """Every command and group below `command`, by the words that call it."""
    yield names, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*names, name))


COMMANDS = dict(walk(typer.main.get_command(app)))
by_name = pytest.mark.parametrize("names", COMMANDS, ids=lambda names: " ".join(names) or "modeling-encodec")


def test_commands_are_found():
    assert {("encode",), ("decode",), ("train",), ("tokenize",), ("evaluate", "mushra", "prepare")} <= COMMANDS.keys()


@by_name
def test_help_is_printed_and_names_everything(names, run):
    command = COMMANDS[names]
    code, out, err = run(*names, "--help")
    assert (code, err) == (0, [])
    shown = "".join(out.split())
    assert "Usage:" in out and "".join(command.help.split("\n\n")[0].split()) in shown
    for parameter in command.params:
        assert "".join(parameter.help.split()) in shown, parameter.name
        assert all(option in shown for option in parameter.opts if option.startswith("-"))
    for name, inner in getattr(command, "commands", {}).items():
        assert re.search(rf"^\s+{name}\b", out, re.MULTILINE) and inner.help.split()[0] in out


@by_name
def test_every_command_and_parameter_is_described(names):
    command = COMMANDS[names]
    first = (command.help or "").split("\n\n")[0]
    assert SENTENCE.fullmatch(first) and len(first) < 200, first
    for parameter in command.params:
        assert SENTENCE.fullmatch(parameter.help or ""), f"{parameter.name}: {parameter.help!r}"
    texts = [command.help, *(parameter.help for parameter in command.params)]
    assert not any(UNFINISHED.search(text) for text in texts)


@by_name
def test_numbers_have_units(names, run):
    _, out, _ = run(*names, "--help")
    numbers = re.findall(r"--([\w-]+)\s+<?(?:list\[)?(?:int|float)", out.lower())
    assert len(numbers) > 30 or "train" not in names
    helps = {option: one.help for one in COMMANDS[names].params for option in one.opts}
    for name in numbers:
        text = f"{name} {helps[f'--{name}']}".replace("-", " ")
        assert UNITS.search(text), text


@by_name
def test_no_option_is_there_twice(names):
    flags = [flag for one in COMMANDS[names].params for flag in (*one.opts, *one.secondary_opts)]
    options = [flag for flag in flags if flag.startswith("-")]
    assert sorted(options) == sorted(set(options))
    assert "--help" not in options and "-h" not in options


def test_a_letter_means_the_same_everywhere():
    meanings = {}
    for command in COMMANDS.values():
        for parameter in command.params:
            for letter in (option for option in parameter.opts if re.fullmatch("-[a-z]", option)):
                meanings.setdefault(letter, set()).add(next(o for o in parameter.opts if o.startswith("--")))
    assert {letter: names for letter, names in meanings.items() if len(names) > 1} == {}
    assert meanings["-b"] == {"--bandwidth"} and meanings["-f"] == {"--force"}


@pytest.mark.parametrize("command", ["train", "train-lm"])
def test_training_options_show_their_defaults(command, run):
    """Zeros too; what is off or absent by default shows none."""
    lines = {one.name: one.help for one in COMMANDS[(command,)].params}
    assert lines["seed"].endswith(" [0]") and lines["trackers"].endswith(" [tensorboard]")
    assert lines["batch_size"].endswith(" [64]" if command == "train" else " [32]")
    assert lines["mixed_precision"].endswith("One of auto, no, bf16. [auto]")
    assert not lines["resume"].endswith("]") and not lines["max_minutes"].endswith("]")
