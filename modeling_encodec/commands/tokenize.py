"""`tokenize SOURCE OUT`, `tokenize verify` and `tokenize compare`: corpora to codes, and what was made checked."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from modeling_encodec.commands.shared import Force, Model, Precision, say


class _CorpusByDefault(TyperGroup):
    """`tokenize SOURCE OUT` is `tokenize corpus SOURCE OUT`, and `tokenize --verify OUT` is `tokenize verify OUT`."""

    def parse_args(self, ctx, args):
        flag = next((name for name in ("verify", "compare") if f"--{name}" in args), None)
        if flag:
            args = [flag, *(word for word in args if word != f"--{flag}")]
        elif args and args[0] not in (*self.commands, "--help"):
            args = ["corpus", *args]
        return super().parse_args(ctx, args)


tokenize = typer.Typer(
    cls=_CorpusByDefault,
    help="A corpus to a dataset of codes: tokenize SOURCE OUT; verify and compare check what was made.",
)


@tokenize.command()
def corpus(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of audio, manifest (.jsonl, .csv, .txt), Parquet or WebDataset files or a folder of them, "
            "saved dataset, or a dataset's Hub id.",
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the dataset of tokens.")],
    model: Model = None,
    bandwidth: Annotated[
        float | None, typer.Option("--bandwidth", "-b", help="kbps; needed where the model has several.")
    ] = None,
    num_quantizers: Annotated[int | None, typer.Option("--num-quantizers", help="Codebooks, instead of kbps.")] = None,
    precision: Precision = "exact",
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda:1 ... (default: each process its GPU, or the CPU).")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", help="Processes that decode, for each that computes (default: on a CPU 0, else 1-8)."
        ),
    ] = None,
    keep: Annotated[list[str] | None, typer.Option("--keep", help="Column to take along; may be repeated.")] = None,
    column: Annotated[str | None, typer.Option("--column", help="The audio's column (default: found out).")] = None,
    split: Annotated[
        str, typer.Option("--split", help="Split of a dataset; also the output's name for it.")
    ] = "train",
    subset: Annotated[str | None, typer.Option("--subset", help="Configuration of a Hub dataset.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub dataset.")] = None,
    streaming: Annotated[
        bool | None, typer.Option("--streaming/--no-streaming", help="Stream a dataset (default: from the Hub).")
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option("--shard-rows", help="Clips of a file of tokens, at most (default: 16 to 1024).")
    ] = None,
    shard_megabytes: Annotated[
        float | None,
        typer.Option("--shard-megabytes", help="MiB of audio files in one of tokens, about (default: 8 to 256)."),
    ] = None,
    batch_seconds: Annotated[
        float, typer.Option("--batch-seconds", help="Seconds of audio computed together; longer clips go in blocks.")
    ] = 300,
    keep_broken: Annotated[
        bool, typer.Option("--keep-broken", help="Take what can be read of a source's file that breaks off.")
    ] = False,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Open whatever URL a row of a table names as its audio.")
    ] = False,
    engine: Annotated[
        str, typer.Option("--engine", help="local: this process, or those of torchrun; ray: a Ray cluster.")
    ] = "local",
    force: Force = False,
) -> None:
    """A corpus to a dataset of codes; the same command goes on where it was stopped.

    On several devices or machines: torchrun --nproc_per_node N -m modeling_encodec tokenize ...
    """
    import logging

    from modeling_encodec.checkpoints import bundled_checkpoint
    from modeling_encodec.processors.audio_tokens import PortableCodec
    from modeling_encodec.processors.corpus.sources import open_source
    from modeling_encodec.processors.corpus.tokenization import Tokenization, tokenize_corpus

    if engine not in ("local", "ray"):
        raise ValueError(f"engine is {engine!r}, allowed: local, ray")
    if shard_megabytes is not None and not 1 <= shard_megabytes < float("inf"):
        raise ValueError(f"shard_megabytes is {shard_megabytes}, allowed: at least 1, and finite")
    if Path(source).is_dir() and Path(source).resolve() in (output.resolve(), *output.resolve().parents):
        raise ValueError(f"OUT is {output}, allowed: a folder outside of {source}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    codec = PortableCodec(model or str(bundled_checkpoint()), precision)
    count = codec.count(bandwidth, num_quantizers)
    found = open_source(
        source, keep=keep or (), column=column, split=split, subset=subset, revision=revision, streaming=streaming,
        allow_urls=allow_urls,
        shard_rows=shard_rows, shard_bytes=None if shard_megabytes is None else int(shard_megabytes * (1 << 20)),
    )  # fmt: skip
    for line in found.other.lines():
        say(line)
    run = Tokenization(found, output, codec, count, split, batch_seconds, keep_broken)
    if engine == "ray":
        from modeling_encodec.processors.corpus.ray import tokenize_on_ray

        report = tokenize_on_ray(run, device=device, workers=workers, force=force)
    else:
        report = tokenize_corpus(run, device=device, workers=workers, force=force)
    if report is not None:
        _tell(report, output)


@tokenize.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `tokenize SOURCE OUT` finished.")],
    audio: Annotated[
        str | None,
        typer.Option("--audio", help="SOURCE of the tokens: a share of its rows is coded again and compared."),
    ] = None,
    share: Annotated[float, typer.Option("--share", help="Share of the rows that are coded again.")] = 0.01,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of their choice (default: another each time).")
    ] = None,
    model: Model = None,
    device: Annotated[str, typer.Option("--device", help="Where they are coded again: cpu, cuda, cuda:1 ...")] = "cpu",
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Open whatever URL a row of a table names as its audio.")
    ] = False,
) -> None:
    """Read all tokens and hold them against their checksums; damaged files are named, with exit code 2."""
    import time

    from modeling_encodec.processors.corpus.checksums import find_faults, find_summary_faults, read_manifest

    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, allowed: above 0, up to 1")
    manifest, begun = read_manifest(folder), time.monotonic()
    faults = [*find_faults(folder, manifest), *find_summary_faults(folder, manifest)]
    for name, reason in faults:
        typer.echo(f"{name}: {reason}")
    total = manifest["totals"]["bytes"]
    if faults:
        names = ", ".join(name for name, _ in faults[:3]) + (" ..." if len(faults) > 3 else "")
        raise ValueError(f"{folder}: {len(faults)} files are damaged ({names}); the tokenize command makes them anew")
    typer.echo(f"{len(manifest['files'])} shards are whole: {total / 1e6:.1f} MB, {time.monotonic() - begun:.2f} s")
    if audio is not None:
        _code_again(folder, audio, share, seed, model, device, allow_urls)


def _code_again(folder: Path, audio: str, share: float, seed: int | None, model, device: str, allow_urls: bool):
    import random

    from modeling_encodec.checkpoints import bundled_checkpoint
    from modeling_encodec.processors.audio_tokens import PortableCodec
    from modeling_encodec.processors.corpus.comparison import TokenFiles, code_again, open_again

    files = TokenFiles(folder)
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    codec = PortableCodec(model or str(bundled_checkpoint()), files.manifest["provenance"]["precision"])
    source = open_again(audio, files.manifest, allow_urls=allow_urls)
    found = code_again(files, source, codec, share, seed, device)
    typer.echo(f"coded again, seed {seed}:")
    for line in found.lines():
        typer.echo(line)
    wrong = [apart.name for apart in found.apart if not apart.tie] + found.only[0] + found.notes
    if wrong:
        raise ValueError(f"{folder}: {len(wrong)} rows are not what {audio} gives, the first: {wrong[0]}")


@tokenize.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of tokens.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Folder of tokens, as of another engine or device.")],
) -> None:
    """Compare two folders of tokens row by row; exit code 0 if they are equal, 1 if not."""
    from modeling_encodec.processors.corpus.comparison import compare_outputs

    found = compare_outputs(a, b)
    for line in found.lines():
        typer.echo(line)
    if not found:
        raise typer.Exit(1)


def _tell(report, output: Path) -> None:
    import json

    totals = report.manifest["totals"]
    codes = totals["frames"] * report.manifest["provenance"]["num_quantizers"]
    with (output / "skipped.jsonl").open(encoding="utf-8") as lines:
        reasons = Counter(json.loads(line)["reason"] for line in lines)
    typer.echo(
        f"{totals['rows']} clips, {totals['hours']:.3f} hours, {len(report.manifest['files'])} files, "
        f"{totals['bytes'] / 1e6:.1f} MB, {8 * totals['bytes'] / max(1, codes):.2f} bits a code; in {output}"
    )
    if report.hours:
        speed = report.hours * 3600 / report.seconds
        typer.echo(
            f"made now: {report.hours:.3f} hours in {report.seconds:.0f} s, {speed:.1f} hours of audio an hour; "
            f"the model waited for audio {report.waited / report.seconds:.1%} of the time"
        )
    for reason, count in reasons.most_common():
        typer.echo(f"skipped {count}: {reason}")
