"""The options of a language model's training run, from a recipe file and the command line.

The paper gives the architecture, 5 s sequences, sampled bandwidths and random positions (section 3.3); optimiser,
rate, batch and length of training it leaves open, and they are this project's.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modeling_encodec.training.options import RECIPES, RunConfig, load_recipe, option


@dataclass
class LMTrainingConfig(RunConfig):
    """Every option of a language model's training run, given by name; `modeling-encodec train-lm --help` says what
    each is.

    Raises:
        ValueError: for an option of another type, or a value that is not allowed.

    Examples:
        >>> from modeling_encodec import LMTrainingConfig
        >>> config = LMTrainingConfig(codes=["tokens/"], epochs=3)
        >>> config.updates, config.hidden_size, config.num_hidden_layers
        (3000, 200, 5)
    """

    recipes: ClassVar[Path] = RECIPES / "lm"
    free_options: ClassVar[set[str]] = RunConfig.free_options | {"validation_codes"}
    at_least_1: ClassVar[tuple[str, ...]] = (*RunConfig.at_least_1, "calibration_sequences", "max_positions")
    above_0: ClassVar[tuple[str, ...]] = (*RunConfig.above_0, "context_seconds")

    # What is trained
    codec: str | None = option(None, "Codec whose codes are learned: folder or Hub id (default: the bundled one).")
    model: str | None = option(None, "Language model to start from: folder or Hub id (default: random weights).")
    hidden_size: int = option(200, "Width of a new model (paper 3.3).")
    num_hidden_layers: int = option(5, "Layers of a new model.")
    num_attention_heads: int = option(8, "Attention heads of a new model.")
    intermediate_size: int = option(800, "Width of a new model's feed-forward parts.")
    context_seconds: float = option(3.5, "Seconds back that a new model's attention sees.")
    max_positions: int = option(1024, "Positions that a new model learns, in frames.")

    # Data
    codes: list[str] = option(
        [], "Tokenised datasets with a column of codes: folders, files or Hub ids; instead of corpora."
    )
    codes_column: str = option("codes", "Column of --codes: (codebooks, frames) whole numbers.")
    validation_codes: str | None = option(None, "A held-out tokenised dataset, instead of --validation.")
    segment_seconds: float = option(5.0, "Seconds of a training sequence.")

    # Schedule
    epochs: int = option(100, "Epochs.")
    updates_per_epoch: int = option(1000, "Updates of an epoch.")
    batch_size: int = option(32, "Sequences of an update, over all processes and accumulation steps.")

    # Optimisation
    learning_rate: float = option(1e-3, "AdamW's rate.")
    beta1: float = option(0.9, "AdamW's first decay.")
    beta2: float = option(0.95, "AdamW's second decay.")
    weight_decay: float = option(0.01, "AdamW's decay of weights.")
    warmup_updates: int = option(500, "Updates over which the rate rises from 0.")
    decay_to: float = option(0.0, "Fraction of the rate reached, along a cosine, at the last update.")
    max_gradient_norm: float | None = option(1.0, "Norm that gradients are scaled down to.")

    # The integer form, made at the end
    calibration_sequences: int = option(32, "Training sequences by which the integer form's units are found.")


def load_lm_config(source: str | os.PathLike, **overrides) -> LMTrainingConfig:
    """The options of a language model's recipe.

    Args:
        source: name of a recipe that comes with the package, or a .toml or .json file. Paths in a file are relative to
            the working folder.
        **overrides (keyword arguments): options that replace the recipe's, by name; see `LMTrainingConfig`.

    Returns:
        The options, checked.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: for options that do not exist or values that are not allowed.

    Examples:
        >>> from modeling_encodec import load_lm_config
        >>> load_lm_config("paper", output="runs/lm").num_attention_heads
        8
        >>> load_lm_config("paper", epoch=3)
        Traceback (most recent call last):
        ...
        ValueError: paper: option 'epoch' does not exist, allowed: ...
    """
    return load_recipe(LMTrainingConfig, source, **overrides)
