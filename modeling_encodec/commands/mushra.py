"""`evaluate mushra prepare | analyse`: listening tests."""

from pathlib import Path
from typing import Annotated

import typer

from modeling_encodec.commands.shared import Device, Force, load, say


mushra = typer.Typer(help="Listening tests as the paper's: MUSHRA, made for webMUSHRA and analysed.")


@mushra.command()
def prepare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or Hub id, or 'bundled'.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="Clips: folder, manifest or dataset, with categories.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the test.")],
    bandwidth: Annotated[
        list[float] | None, typer.Option("--bandwidth", "-b", help="kbps (default: all). Repeatable.")
    ] = None,
    systems: Annotated[
        list[str] | None,
        typer.Option(
            "--systems", help="Beside the model: opus@KBPS, mp3@KBPS, none (default: opus@6, 12). Repeatable."
        ),
    ] = None,
    category: Annotated[
        str | None, typer.Option("--category", help="Field or column with the category (default: as evaluate).")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Split of a dataset.")] = "test",
    subset: Annotated[str | None, typer.Option("--subset", help="Configuration of a Hub dataset.")] = None,
    column: Annotated[str, typer.Option("--column", help="A dataset's audio column.")] = "audio",
    samples: Annotated[int, typer.Option("--samples", help="Samples of each category.")] = 50,
    seconds: Annotated[float, typer.Option("--seconds", help="Seconds of a sample.")] = 5.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of samples, places and names.")] = 0,
    per_listener: Annotated[int, typer.Option("--per-listener", help="Samples of one listening session.")] = 10,
    annotations: Annotated[int, typer.Option("--annotations", help="Ratings that each sample shall get.")] = 10,
    allow_fewer: Annotated[bool, typer.Option("--allow-fewer", help="Take what there is of a category.")] = False,
    device: Device = "cpu",
    force: Force = False,
) -> None:
    """A listening test: hidden reference, anchors and systems, anonymous and equally loud, for webMUSHRA."""
    from modeling_encodec.checkpoints import bundled_checkpoint
    from modeling_encodec.evaluation.clips import list_clips
    from modeling_encodec.evaluation.mushra_preparation import ANCHORS, anchors_at, prepare_mushra
    from modeling_encodec.evaluation.systems import make_systems
    from modeling_encodec.processors.audio_kinds import OtherFiles

    if out.exists() and not force:
        raise FileExistsError(f"{out} exists; --force replaces a listening test")
    codec = load(str(bundled_checkpoint()) if model == "bundled" else model, device)
    others = ["opus@6", "opus@12"] if systems is None else [name for name in systems if name != "none"]
    found, missing = make_systems(codec, bandwidths=bandwidth, anchors=others)
    for name, reason in missing.items():
        say(f"without {name}: {reason}")
    coded = [system for system in found if system.kbps is not None]  # without the copy: that is the hidden reference
    rate = codec.config.sampling_rate
    for name in ANCHORS.keys() - anchors_at(rate).keys():
        say(f"without {name}: {rate} Hz leave no room for it")
    other = OtherFiles()
    clips = list_clips(data, category=category, split=split, subset=subset, column=column, other=other)
    for line in other.lines():
        say(line)
    key = prepare_mushra(
        clips,
        {f"{one.name}@{one.kbps:g}": lambda audio, one=one: one.code(audio).audio for one in coded},
        out,
        sampling_rate=rate,
        channels=codec.config.audio_channels,
        samples=samples,
        seconds=seconds,
        seed=seed,
        per_listener=per_listener,
        annotations=annotations,
        allow_fewer=allow_fewer,
        force=force,
    )
    for category in sorted({trial["category"] for trial in key["trials"]}):
        count = sum(trial["category"] == category for trial in key["trials"])
        typer.echo(f"{category}: {count} samples" + (f", {samples} were asked" if count < samples else ""))
    typer.echo(f"{len(key['sessions'])} sessions of up to {per_listener} samples, {annotations} listeners each")
    typer.echo(f"{out / 'webmushra'} is to be served; {out / 'key.json'} is not; {out / 'README.md'} says how")


@mushra.command()
def analyse(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="webMUSHRA's CSV files.")],
    key: Annotated[Path, typer.Option("--key", help="The test's key.json.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for mushra.json and mushra.png.")] = Path(
        "mushra_results"
    ),
    annotations: Annotated[int, typer.Option("--annotations", help="Ratings that each sample needs.")] = 10,
    allow_fewer: Annotated[bool, typer.Option("--allow-fewer", help="Samples with fewer are only named.")] = False,
    over: Annotated[
        str, typer.Option("--over", help="What an interval takes as independent: ratings, samples, annotators.")
    ] = "ratings",
    annotator: Annotated[
        str | None, typer.Option("--annotator", help="Column that tells annotators apart (default: listener or uuid).")
    ] = None,
    force: Force = False,
) -> None:
    """Ratings to means with 95 % intervals, after dropping annotators as the paper does."""
    from modeling_encodec.evaluation.mushra_analysis import analyse_mushra, mushra_table, save_mushra

    exists = next((path for path in (out / "mushra.json", out / "mushra.png") if path.exists()), None)
    if exists and not force:
        raise FileExistsError(f"{exists} exists; --force overwrites it")
    report = analyse_mushra(
        results, key, annotations=annotations, allow_fewer=allow_fewer, over=over, annotator=annotator
    )
    written = save_mushra(report, out)
    for one in report["annotators"]["dropped"]:
        say(f"dropped {one['annotator']}: {'; '.join(one['reasons'])}")
    found = report["annotations"]
    if found["samples_with_fewer"]:
        say(
            f"{len(found['samples_with_fewer'])} of {found['samples']} samples have fewer than {annotations} "
            f"annotations, the least {found['minimum']}"
        )
    typer.echo("\n".join(mushra_table(report)))
    typer.echo(
        f"{report['annotators']['kept']} of {report['annotators']['all']} annotators, "
        f"{found['minimum']} to a sample at least, {found['median']:g} in the median; 95 % intervals over {over}"
    )
    typer.echo(f"{' and '.join(map(str, written))} are written")
