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
    """Every option of a language model's training run."""

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
    context_seconds: float = option(3.5, "How far back a new model's attention sees.")
    max_positions: int = option(1024, "Positions that a new model learns, in frames.")

    # Data
    codes: list[str] = option(
        [], "Tokenised datasets with a column of codes: folders, files or Hub ids; instead of corpora."
    )
    codes_column: str = option("codes", "Their column: (codebooks, frames) whole numbers.")
    validation_codes: str | None = option(None, "A tokenised dataset that is held out, instead of validation.")
    segment_seconds: float = option(5.0, "Length of a training sequence.")

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
    max_gradient_norm: float | None = option(1.0, "Gradients are scaled down to it.")

    # The integer form, made at the end
    calibration_sequences: int = option(32, "Training sequences on which its units are found.")


def load_lm_config(source: str | os.PathLike, **overrides) -> LMTrainingConfig:
    """The options of a language model's recipe; see `load_recipe`."""
    return load_recipe(LMTrainingConfig, source, **overrides)
