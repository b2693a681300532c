"""The options of `modeling-encodec train` and `train-lm`, made from the fields of their configurations."""

import dataclasses
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import typer

from modeling_encodec.processors.corpus.reading import CorpusConfig
from modeling_encodec.training.options import RunConfig, load_recipe, recipe_names


Data = Annotated[
    list[str] | None,
    typer.Option("--data", help="Corpus as DOMAIN=PLACE, such as music=songs/; instead of the recipe's. Repeatable."),
]


def with_training_options(run: Callable[[RunConfig], None]) -> Callable:
    """A command that takes a recipe and, as options that replace what it says, every field of the configuration that
    `run` is annotated with.

    The word none takes back what a recipe says, where there can be none.
    """
    config = get_type_hints(run)["config"]

    def command(recipe: str | None = None, data: list[str] | None = None, **options):
        given = {name: value for name, value in options.items() if value not in (None, [])}
        for name, value in given.items():  # what a recipe says can be taken back
            if value in ("none", ["none"]) and name != "freeze":
                given[name] = None if value == "none" else []
        if data:
            given["corpora"] = [dataclasses.asdict(parse_corpus(text, number)) for number, text in enumerate(data)]
        run(load_recipe(config, recipe, **given) if recipe else config(**given))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = ", ".join(recipe_names(config))
    recipe_help = typer.Argument(help=f"A .toml or .json file, or one of: {names}.")
    parameters = [
        inspect.Parameter("recipe", kind, default=None, annotation=Annotated[str | None, recipe_help]),
        inspect.Parameter("data", kind, default=None, annotation=Data),
    ]
    hints = get_type_hints(config)
    for item in dataclasses.fields(config):
        if item.name != "corpora":
            annotation = Annotated[_plain(hints[item.name]) | None, typer.Option(help=_help(item, hints[item.name]))]
            parameters.append(inspect.Parameter(item.name, kind, default=None, annotation=annotation))
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__name__, command.__doc__ = run.__name__, run.__doc__
    return command


def parse_corpus(text: str, number: int) -> CorpusConfig:
    """The corpus that `text`, DOMAIN=PLACE, means: a folder, a manifest, or else a `datasets` dataset. Its name ends
    in `number`.

    Raises:
        ValueError: for text of another form, or an unknown domain.
        FileNotFoundError: for a whole path that is not there.
    """
    domain, equals, place = text.partition("=")
    allowed = get_args(get_type_hints(CorpusConfig)["domain"])
    if not equals or domain not in allowed or not place:
        raise ValueError(f"data is {text!r}, allowed: {'=…, '.join(allowed)}=… with a folder, manifest or dataset")
    if Path(place).is_absolute() and not Path(place).exists():
        raise FileNotFoundError(f"{place}: no such folder, manifest or dataset")
    kind = "dataset"
    if Path(place).suffix in (".jsonl", ".csv", ".txt"):
        kind = "manifest"
    elif Path(place).is_dir() and not (Path(place) / "state.json").exists():  # which `save_to_disk` writes
        kind = "folder"
    return CorpusConfig(f"{Path(place).stem or domain}_{number}", place, kind, domain)


def _plain(hint):
    """The type that the command line reads: choices as words, for the configuration checks them."""
    if get_origin(hint) is Literal:
        return str
    if isinstance(hint, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _help(item: dataclasses.Field, hint) -> str:
    text = item.metadata["help"]
    if get_origin(hint) is Literal:
        text += f" One of {', '.join(get_args(hint))}."
    default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
    if default is None or default is False or default == []:
        return text
    shown = f"{default:g}" if type(default) is float else default
    shown = ", ".join(map(str, default)) if isinstance(default, list) else shown
    return f"{text} [{'yes' if default is True else shown}]"
