"""`doctor`: whether this machine computes what it should."""

import json
from typing import Annotated

import typer


def doctor(
    device: Annotated[
        list[str] | None, typer.Option("--device", help="Check this device alone: cpu, cuda:1 ... (default: all).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON, for machines.")] = False,
) -> None:
    """Check this machine: codes, audio and language model on every device beside what is stored, versions, what is
    missing. The exit code is 0 if it is healthy, and 1 if not."""
    from modeling_encodec.doctor.examination import examine, lines_of

    found = examine(device or ())
    for line in [json.dumps(found.as_json(), indent=1)] if as_json else lines_of(found):
        typer.echo(line)
    raise typer.Exit(0 if found.healthy else 1)
