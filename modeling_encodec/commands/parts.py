"""`parts split` and `parts join`: a folder, such as a run's, out of a machine that lets no large files out."""

from pathlib import Path
from typing import Annotated

import typer

from modeling_encodec.commands.shared import say


parts = typer.Typer(help="A folder in parts of bounded size, and back.")


@parts.command()
def split(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Such as that of a training run.")],
    target: Annotated[Path, typer.Argument(metavar="PARTS", help="New folder for the parts.")],
    size: Annotated[float, typer.Option("--size", help="MB of a part, at most.")] = 15.0,
    leave_out: Annotated[
        list[str] | None, typer.Option("--leave-out", help="Pattern of names not wanted. Repeatable.")
    ] = None,
) -> None:
    """Write a folder's files as parts with checksums; hidden files stay behind."""
    from modeling_encodec.system.parts import split_folder

    written = split_folder(folder, target, part_bytes=int(size * 1e6), leave_out=leave_out or ())
    total = sum(path.stat().st_size for path in written)
    say(f"{len(written) - 1} parts, {total / 1e6:.1f} MB, and {written[-1].name} in {target}")


@parts.command()
def join(
    source: Annotated[Path, typer.Argument(metavar="PARTS", help="Folder of all parts and their list.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder for the files.")],
) -> None:
    """Put the files together again, to the bit, or say which part is missing or damaged."""
    from modeling_encodec.system.parts import join_parts

    written = join_parts(source, folder)
    say(f"{len(written)} files in {folder}")
