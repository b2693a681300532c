"""What a run leaves on disk: one file to go on from, and a model folder that `from_pretrained` loads."""

import dataclasses
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from modeling_encodec.atomic import atomic_folder, atomic_path
from modeling_encodec.modeling_encodec import EncodecModel
from modeling_encodec.processors.feature_extraction_encodec import EncodecFeatureExtractor
from modeling_encodec.training.options import RunConfig


CHECKPOINT = "checkpoint.pt"


def save_checkpoint(folder: Path, state: dict, config: RunConfig) -> None:
    """Write all that a run needs to go on, in one file that appears whole or not at all."""
    with atomic_path(folder / CHECKPOINT) as temporary:
        torch.save({"config": dataclasses.asdict(config), **state}, temporary)


def load_checkpoint(folder: Path, config: RunConfig) -> dict:
    """The state that `save_checkpoint` wrote, if this configuration continues that run.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is damaged, or an option that shapes the training is another one now.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint to resume from")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch raises for a damaged file
        raise ValueError(f"{path}: not readable as a checkpoint ({' '.join(str(error).split())[:100]})") from None
    now = dataclasses.asdict(config)
    before = dataclasses.asdict(type(config)()) | state.pop("config")  # options are newer than some runs
    changed = sorted(name for name in now if name not in config.free_options and now[name] != before[name])
    if changed:
        name = changed[0]
        raise ValueError(f"{name} is {now[name]!r}, allowed: {before[name]!r}, as in the run to be resumed")
    return state


def save_model(folder: Path, model: EncodecModel, weights: dict, discriminators: dict, config: RunConfig) -> None:
    """Write a model folder: codec with `weights`, feature extractor, discriminators and options beside it."""
    with atomic_folder(folder / "model") as new:
        model.save_pretrained(new, state_dict=dict(weights))  # a copy: saving may empty the dict that it is given
        EncodecFeatureExtractor.for_model(model.config).save_pretrained(new)
        if discriminators:
            tensors = {
                f"{name}/{key}": tensor.contiguous()
                for name, state in discriminators.items()
                for key, tensor in state.items()
            }
            save_file(tensors, new / "discriminators.safetensors")
        (new / "training_config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load_discriminators(path: str | os.PathLike) -> dict[str, dict[str, torch.Tensor]]:
    """State dicts of the discriminators saved beside a model, by bandwidth in kbps (or "all")."""
    states = {}
    for key, tensor in load_file(path).items():
        name, _, rest = key.partition("/")
        states.setdefault(name, {})[rest] = tensor
    return states
