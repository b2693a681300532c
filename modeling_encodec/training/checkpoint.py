"""What a run leaves on disk: one file to go on from, and a model folder that `from_pretrained` loads."""

import dataclasses
import json
import logging
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.processors.feature_extraction_encodec import EncodecFeatureExtractor
from modeling_encodec.system.atomic import atomic_folder, atomic_path
from modeling_encodec.training.options import RunConfig


logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"


def save_checkpoint(folder: Path, state: dict, config: RunConfig) -> None:
    """Write all that a run needs to go on, in one file that appears whole or not at all."""
    with atomic_path(folder / CHECKPOINT, durable=True) as temporary:
        torch.save({"config": dataclasses.asdict(config), **state}, temporary)


def load_checkpoint(folder: Path, config: RunConfig) -> dict:
    """The state that `save_checkpoint` wrote, if this configuration continues that run, which may now be longer or
    shorter.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is damaged, an option that shapes the training is another one now, or the run's new length
            would have shaped what is done.
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
    for name in changed:
        if name not in config.length_options:
            raise ValueError(f"{name} is {now[name]!r}, allowed: {before[name]!r}, as in the run to be resumed")
    if changed:
        old = dataclasses.replace(config, **{name: before[name] for name in config.length_options})
        _check_length(config, old, changed[0], state["update"])
    return state


def _check_length(config: RunConfig, old: RunConfig, name: str, done: int) -> None:
    """Refuse a new length of the run, by the option `name`, that its `done` updates rule out; say what it changes."""
    value, before = getattr(config, name), getattr(old, name)
    if config.updates < done:
        least = -(-done // (config.updates // value))
        raise ValueError(f"{name} is {value}, allowed: at least {least}, for {done} updates are done")
    if all(config.rate_factor(update) == old.rate_factor(update) for update in range(done)):
        return
    if not config.extend:
        raise ValueError(
            f"{name} is {value}, allowed: {before}, as in the run to be resumed: the learning rate falls over the "
            "whole run, and would not have been what it was; --extend goes on from here with the new length's rate"
        )
    factors = [each.rate_factor(min(done, each.updates - 1)) for each in (old, config)]
    logger.warning(
        "extended from %d to %d updates: the learning rate now falls until update %d; at update %d it is %.4g of its "
        "full value, where it was %.4g",
        old.updates, config.updates, config.updates, done, factors[1], factors[0],
    )  # fmt: skip


def save_model(folder: Path, model: EncodecModel, weights: dict, discriminators: dict, config: RunConfig) -> None:
    """Write a model folder: codec with `weights`, feature extractor, discriminators and options beside it."""
    with atomic_folder(folder / "model", durable=True) as new:
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
