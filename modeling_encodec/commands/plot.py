"""`plot`: what a file holds, as a picture."""

from pathlib import Path
from typing import Annotated

import typer

from modeling_encodec.commands.shared import Force, NamedModel, load


def plot(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Audio files to be seen side by side; an .ecdc file; a training run's folder or log.jsonl; an "
            "evaluation's folder or evaluation.json; a folder of tokens.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture, a PNG.")],
    model: NamedModel = None,
    force: Force = False,
) -> None:
    """A picture of what a file or folder holds.

    Audio: waveforms and mel spectrograms. An .ecdc file: its codes. Tokens: how the codebooks are used. A training
    run: its curves. An evaluation: scores by bitrate.
    """
    from modeling_encodec.evaluation.plots import save_figure

    if out.exists() and not force:
        raise FileExistsError(f"{out} exists; --force overwrites it")
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
    draw = _kind(paths[0])
    if draw is not _audio and len(paths) > 1:
        raise ValueError(f"{len(paths)} paths were given, allowed: one, or audio files")
    save_figure(draw(paths, model), out)
    typer.echo(str(out))


def _kind(path: Path):
    """The function that draws what is at `path`."""
    if path.is_dir():
        kinds = {"log.jsonl": _training, "evaluation.json": _evaluation, "manifest.json": _tokens}
        for name, draw in kinds.items():
            if (path / name).is_file():
                return draw
        raise ValueError(f"{path} holds none of {', '.join(kinds)}")
    return {".ecdc": _codes, ".jsonl": _training, ".json": _evaluation}.get(path.suffix.lower(), _audio)


def _audio(paths: list[Path], model: str | None):
    from modeling_encodec.evaluation.plots import plot_audio
    from modeling_encodec.processors.audio import read_audio

    versions, rate = {}, None
    for path in paths:
        audio, rate = read_audio(path, rate)  # all of them at the first one's rate
        versions[path.name if path.name not in versions else str(path)] = audio
    return plot_audio({"": versions}, rate)


def _codes(paths: list[Path], model: str | None):
    from modeling_encodec.bitstream.compression import read_any_header, read_codes
    from modeling_encodec.checkpoints import checkpoint_for
    from modeling_encodec.evaluation.plots import plot_codes

    with open(paths[0], "rb") as file:
        header, _ = read_any_header(file)
        file.seek(0)
        codec = load(model or checkpoint_for(header.model_name), "cpu")
        codes = read_codes(file, codec)
    config = codec.config
    return plot_codes(codes, config.codebook_size, frame_rate=config.sampling_rate / config.hop_length)


def _training(paths: list[Path], model: str | None):
    from modeling_encodec.evaluation.plots import plot_training, read_log

    return plot_training(read_log(_inside(paths[0], "log.jsonl")))


def _evaluation(paths: list[Path], model: str | None):
    import json

    from modeling_encodec.evaluation.plots import plot_rate_distortion

    path = _inside(paths[0], "evaluation.json")
    try:
        results = json.loads(path.read_bytes())
        results["results"], results["method"]["metrics"], results["model"]["name"]  # noqa: B018
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not what `evaluate` writes") from None
    return plot_rate_distortion(results)


def _tokens(paths: list[Path], model: str | None):
    from modeling_encodec.evaluation.plots import codebook_counts, plot_codebook_use
    from modeling_encodec.processors.dataset_tokenization import import_datasets, load_tokens, provenance_of

    import_datasets().disable_progress_bars()
    tokens = load_tokens(paths[0])
    size = provenance_of(tokens)["codebook_size"]
    return plot_codebook_use(sum(codebook_counts(codes, size) for codes in tokens.with_format("numpy")["codes"]))


def _inside(path: Path, name: str) -> Path:
    return path / name if path.is_dir() else path
