"""`push FOLDER REPO`: a model folder to the Hugging Face Hub."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from modeling_encodec.commands.shared import say


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Model folder: a codec or a language model.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="BRANCH", help="Branch, made if it is not there (default: main)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be uploaded.")] = False,
    evaluation: Annotated[
        Path | None, typer.Option("--evaluation", help="evaluation.json of `evaluate`, for a card written anew.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", help="Of the commit.")] = None,
) -> None:
    """A model folder to the Hub in one commit: weights, code, card. The token is HF_TOKEN, or of `hf auth login`."""
    import huggingface_hub.utils
    import transformers

    from modeling_encodec.conversion.push_to_hub import check_repository, hub_token, readable_size, staged, upload

    check_repository(repository)
    if not dry_run:
        hub_token()  # one that is missing is better known before the work
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # what does not load is told in our line
    huggingface_hub.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    tell = typer.echo if dry_run else say
    with staged(folder, repository, evaluation=evaluation) as staging:
        width = max(map(len, staging.sizes))
        for name, size in staging.sizes.items():
            tell(f"{name:{width}}  {readable_size(size):>8}")
        tell(f"{'total':{width}}  {readable_size(sum(staging.sizes.values())):>8}, {len(staging.sizes)} files")
        if staging.left_behind:
            tell(f"not uploaded of {folder}: {', '.join(staging.left_behind)}")
        visibility = "private" if private else "as it is, public if new"
        tell(f"to {repository}, branch {revision or 'main'}, visibility: {visibility}")
        if dry_run:
            return
        pushed = upload(staging, repository, private=private, revision=revision, message=message)
    if not pushed.is_new:
        say(f"{repository} has all of this already; nothing was changed")
    typer.echo(pushed.url)
