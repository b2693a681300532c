"""`export`, `train` and `train-lm`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from modeling_encodec.commands.shared import Force, Model, load, say
from modeling_encodec.training.command import with_training_options
from modeling_encodec.training.configuration import TrainingConfig
from modeling_encodec.training.lm_configuration import LMTrainingConfig
from modeling_encodec.training.options import RunConfig


def export(
    form: Annotated[str, typer.Argument(metavar="FORM", help="onnx.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the files.")],
    model: Model = None,
    bandwidth: Annotated[
        float | None, typer.Option("--bandwidth", "-b", help="kbps of the encoder (default: all codebooks).")
    ] = None,
    force: Force = False,
) -> None:
    """The codec as ONNX: encoder, decoder, and one streaming step of each."""
    from modeling_encodec.checkpoints import bundled_checkpoint
    from modeling_encodec.models.onnx_export import export_onnx

    if form != "onnx":
        raise ValueError(f"form is {form!r}, allowed: onnx")
    if folder.exists() and not force:
        raise FileExistsError(f"{folder} exists; --force writes into it all the same")
    codec = load(model or str(bundled_checkpoint()), "cpu")
    count = None if bandwidth is None else codec.resolve_quantizers(bandwidth, None)
    for path in export_onnx(codec, folder, count):
        typer.echo(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


@with_training_options
def train(config: TrainingConfig) -> None:
    """Train a codec by a recipe; run by `accelerate launch` or `torchrun`, on several devices."""
    _train("CodecTrainer", "modeling_encodec.training.trainer", config)


@with_training_options
def train_lm(config: LMTrainingConfig) -> None:
    """Train a language model on a codec's codes; run by `accelerate launch` or `torchrun`, on several devices."""
    _train("LMTrainer", "modeling_encodec.training.lm_trainer", config)


def _train(kind: str, module: str, config: RunConfig) -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise ImportError('training needs accelerate: pip install "modeling-encodec[train]"') from None
    import importlib
    import logging

    import transformers

    transformers.logging.disable_progress_bar()
    first = os.environ.get("RANK", "0") == "0"  # of several processes one is enough to listen to
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    trainer = getattr(importlib.import_module(module), kind)(config)
    end = trainer.train()
    if first:
        say(f"{end} after {trainer.update} of {config.updates} updates; the model is in {trainer.folder / 'model'}")
