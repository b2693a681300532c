"""`convert`: released checkpoints, audiocraft's and Transformers' folders to one another."""

import json
from pathlib import Path
from typing import Annotated

import typer

from modeling_encodec.commands.shared import Force, load


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="File of encodec or audiocraft, or folder for Transformers.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DEST", help="Folder for Transformers; NAME.th for a file of encodec.")
    ],
    to: Annotated[str | None, typer.Option("--to", help="folder or original (default: what DEST is called).")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="A field of the configuration; repeatable."),
    ] = None,
    like: Annotated[
        str | None, typer.Option("--like", help="Released model that is run as this one: encodec_24khz ...")
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option("--calibrate", help="Audio that gives a language model its integer form; repeatable."),
    ] = None,
    codec: Annotated[
        str | None, typer.Option("--codec", help="With --calibrate: the language model's codec, folder or Hub id.")
    ] = None,
    force: Force = False,
) -> None:
    """Checkpoints of encodec and audiocraft as folders for Transformers, and back; compared before written."""
    import transformers

    from modeling_encodec.conversion.convert import convert_checkpoint

    if bool(calibrate) != bool(codec):
        raise ValueError("--calibrate and --codec go together")
    transformers.logging.disable_progress_bar()
    report = convert_checkpoint(
        source,
        target,
        to=to,
        settings=dict(map(_setting, settings or [])),
        like=like,
        calibrate=calibrate or [],
        codec=load(codec, "cpu") if codec else None,
        force=force,
    )
    for name, text in report.lines:
        typer.echo(f"{name:13} {text}")


def _setting(text: str) -> tuple[str, object]:
    """A field and its value, which is JSON, or a word."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set is {text!r}, allowed: FIELD=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, {"none": None, "true": True, "false": False}.get(value.lower(), value)
