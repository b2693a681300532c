"""`evaluate MODEL DATA`, and under it `evaluate mushra …`: what a codec is worth, by metrics and by listeners."""

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from modeling_encodec.commands.mushra import mushra
from modeling_encodec.commands.shared import LM_DEVICE, Device, Precision, load, say


class _MetricsByDefault(TyperGroup):
    """`evaluate MODEL DATA` is `evaluate metrics MODEL DATA`."""

    def parse_args(self, ctx, args):
        if args and args[0] not in (*self.commands, "--help"):
            args = ["metrics", *args]
        return super().parse_args(ctx, args)


evaluate = typer.Typer(cls=_MetricsByDefault, help="What a codec is worth: evaluate MODEL DATA, evaluate mushra ...")
evaluate.add_typer(mushra, name="mushra", help="A listening test by the paper's protocol.")


@evaluate.command()
def metrics(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or Hub id, or 'bundled'.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="Folder, manifest (.jsonl, .csv, .txt) or dataset.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")] = Path("evaluation"),
    lm: Annotated[str | None, typer.Option("--lm", help="Language model: folder, Hub id, or 'bundled'.")] = None,
    bandwidth: Annotated[
        list[float] | None, typer.Option("--bandwidth", "-b", help="kbps (default: all). Repeatable.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="By name (default: all that are installed). Repeatable.")
    ] = None,
    anchor: Annotated[
        list[str] | None,
        typer.Option("--anchor", help="opus@KBPS, mp3@KBPS, none (default: opus@6, 12, 24, mp3@64). Repeatable."),
    ] = None,
    original: Annotated[
        Path | None,
        typer.Option("--original", help="Folder of the encodec package's weights (default: its own cache)."),
    ] = None,
    category: Annotated[
        str | None,
        typer.Option("--category", help="Field or column with the category (default: category, kind, domain)."),
    ] = None,
    most: Annotated[int | None, typer.Option("--most", min=1, help="Clips of each category (default: all).")] = None,
    least_seconds: Annotated[float, typer.Option("--least-seconds", help="Leave out clips of fewer seconds.")] = 0.0,
    most_seconds: Annotated[
        float | None,
        typer.Option("--most-seconds", help="Of longer clips take so much, the middle (ViSQOL of 10 min: 5 GB)."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the choice of clips.")] = 0,
    split: Annotated[str, typer.Option("--split", help="Split of a dataset.")] = "test",
    subset: Annotated[str | None, typer.Option("--subset", help="Configuration of a Hub dataset.")] = None,
    column: Annotated[str, typer.Option("--column", help="A dataset's audio column.")] = "audio",
    device: Device = "cpu",
    precision: Precision = "exact",
    force: Annotated[bool, typer.Option("--force", "-f", help="Begin anew over another evaluation.")] = False,
) -> None:
    """Metrics of a codec and of anchors, by bandwidth and category; stopped, the same command goes on."""
    from modeling_encodec.checkpoints import bundled_checkpoint, bundled_lm_checkpoint
    from modeling_encodec.evaluation.clips import describe_choice, list_clips, select_clips
    from modeling_encodec.evaluation.evaluation import Evaluation, run_evaluation
    from modeling_encodec.evaluation.report import table, write_report
    from modeling_encodec.evaluation.scoring import choose_metrics
    from modeling_encodec.evaluation.systems import ANCHORS, make_systems
    from modeling_encodec.processors.audio_kinds import OtherFiles

    names, missing = choose_metrics(metric)
    other = OtherFiles()
    clips = list_clips(data, category=category, split=split, subset=subset, column=column, other=other)
    for line in other.lines():
        say(line)
    chosen = {"most": most, "least_seconds": least_seconds, "most_seconds": most_seconds, "seed": seed}
    clips = select_clips(clips, **chosen)
    codec = load(str(bundled_checkpoint()) if model == "bundled" else model, device)
    codec.precision = precision
    language_model = lm and load(str(bundled_lm_checkpoint()) if lm == "bundled" else lm, LM_DEVICE, "EncodecLM")
    anchors = ANCHORS if anchor is None else [name for name in anchor if name != "none"]
    systems, absent = make_systems(codec, language_model, bandwidths=bandwidth, anchors=anchors, original=original)
    choice, missing = describe_choice(**chosen), missing | absent
    place = Path(data).resolve()
    source = place.stem if place.is_file() else place.name
    kinds = other.describe()
    evaluation = Evaluation(codec, language_model, systems, clips, names, source, choice, missing, kinds)
    if run_evaluation(evaluation, out, force=force):
        results = write_report(evaluation, out)
        typer.echo(table(results))
        for name, reason in results["missing"].items():
            typer.echo(f"not measured: {name}: {reason}")
        typer.echo(f"results are in {out}")
