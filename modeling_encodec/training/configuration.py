"""The options of a codec's training run, from a recipe file and the command line."""

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import ClassVar, Literal

from modeling_encodec.training.options import RunConfig, load_recipe, option, require


@dataclass
class TrainingConfig(RunConfig):
    """Every option of a codec's training run, given by name; `modeling-encodec train --help` says what each is. Counts
    are in updates of the codec.

    Raises:
        ValueError: for an option of another type, or a value that is not allowed.

    Examples:
        >>> from modeling_encodec import TrainingConfig
        >>> config = TrainingConfig(epochs=2, updates_per_epoch=100, warmup_updates=10)
        >>> config.updates, config.rate_factor(4)
        (200, 0.5)
        >>> TrainingConfig(batch_size=0)
        Traceback (most recent call last):
        ...
        ValueError: batch_size is 0, allowed: at least 1
    """

    free_options: ClassVar[set[str]] = RunConfig.free_options | {"listen_every", "listening", "listening_clips"}
    at_least_1: ClassVar[tuple[str, ...]] = (
        *RunConfig.at_least_1,
        *("kmeans_batches", "kmeans_iterations", "listen_every", "discriminator_filters", "listening_clips"),
        "balancer_every",
    )
    at_least_0: ClassVar[tuple[str, ...]] = (*RunConfig.at_least_0, "adversarial_start", "discriminator_warmup")
    below_1: ClassVar[tuple[str, ...]] = (
        *RunConfig.below_1,
        *("codebook_decay", "balancer_decay", "dead_code_threshold"),
    )
    above_0: ClassVar[tuple[str, ...]] = (*RunConfig.above_0, "discriminator_learning_rate")

    # What is trained
    model: str | None = option(None, "Checkpoint to start from: folder or Hub id (default: random weights).")
    architecture: Literal["24khz", "48khz", "32khz", "c16"] = option("24khz", "Model to build without a checkpoint.")
    freeze: Literal["none", "encoder", "decoder"] = option(
        "none", "Part kept as it is, with the codebooks. With the encoder kept, all codes stay what they are."
    )
    restart_codebooks_from: int | None = option(
        None, "Start codebooks from this one on anew by k-means (0: all). New models always start so."
    )

    # Data
    listening: str | None = option(None, "Folder or manifest of clips to decode and listen to in the course.")
    listening_clips: int = option(4, "Clips of --listening that are decoded.")

    # Optimisation
    discriminator_learning_rate: float = option(3e-4, "Adam's rate for the discriminators.")
    compile: bool = option(False, "torch.compile encoder, decoder and discriminators.")

    # Losses (paper 3.4)
    waveform_weight: float = option(0.1, "Share of the L1 distance of waveforms.")
    mel_weight: float = option(1.0, "Share of the multi-scale mel distance.")
    adversarial_weight: float = option(3.0, "Share of the adversarial loss (paper: 3 at 24 kHz, 4 at 48 kHz).")
    feature_weight: float = option(3.0, "Share of feature matching (paper: 3 at 24 kHz, 4 at 48 kHz).")
    commitment_weight: float = option(1.0, "Weight of the commitment loss, outside the balancer.")
    balancer: bool = option(True, "Balance gradients; without, losses are summed with their weights.")
    balancer_decay: float = option(0.999, "Decay of the balancer's averages of gradient norms.")
    balancer_every: int = option(1, "Updates between measurements of gradient norms, which cost a pass back each.")
    mel_loss: Literal["paper", "audiocraft", "log"] = option(
        "paper", "Mel distance: scales 2^5 to 2^11, audiocraft's five with logs, or of logs alone."
    )
    generator_loss: Literal["hinge", "linear"] = option(
        "hinge", "Adversarial loss: max(0, 1 - D), or audiocraft's -D."
    )
    feature_loss: Literal["relative", "absolute"] = option(
        "relative", "Feature distances divided by the real features, or not."
    )

    # Quantiser (paper 3.2)
    upstream_quantizer: bool = option(
        False, "The original's quantiser: only codebook 1 gets commitment, dead codes stay."
    )
    codebook_decay: float = option(0.99, "Decay of the codebooks' averages.")
    dead_code_threshold: float = option(0.1, "A code used less than this part of the mean is replaced.")
    kmeans_iterations: int = option(50, "Rounds of the codebooks' k-means start.")
    kmeans_batches: int = option(1, "Batches whose latents the k-means start sees.")

    # Discriminators (paper 3.4)
    discriminator_filters: int = option(32, "Channels of the discriminators' convolutions.")
    discriminator_chance: float = option(
        2 / 3, "Chance that an update trains the discriminator (paper: 0.5 at 48 kHz)."
    )
    discriminator_seconds: float | None = option(
        None, "Seconds of each example, at a random place, that discriminators judge (default: all)."
    )
    discriminators: Literal["per_bandwidth", "single"] = option(
        "per_bandwidth", "One for each bandwidth, or a single one as in audiocraft."
    )
    adversarial_start: int = option(0, "Update from which discriminators count; before it the codec learns without.")
    discriminator_warmup: int = option(
        0, "Updates before --adversarial-start in which discriminators learn, but the codec not from them."
    )

    # What is shown
    listen_every: int = option(2000, "Updates between decodings of the listening clips.")

    def _check_ranges(self):
        super()._check_ranges()
        for item in dataclasses.fields(self):
            if item.name.endswith("_weight"):
                value = getattr(self, item.name)
                require(value >= 0 and math.isfinite(value), item.name, value, "a finite number of at least 0")
        require(
            self.waveform_weight + self.mel_weight > 0,
            "mel_weight",
            self.mel_weight,
            "above 0 if waveform_weight is 0",
        )
        seconds = self.discriminator_seconds
        require(seconds is None or 0 < seconds < math.inf, "discriminator_seconds", seconds, "none or above 0")
        first = self.restart_codebooks_from
        require(first is None or first >= 0, "restart_codebooks_from", first, "none or at least 0")
        if self.freeze != "none":
            require(self.model, "freeze", self.freeze, "none for a new model")
            require(first is None, "restart_codebooks_from", first, f"none when the {self.freeze} is frozen")
        require(
            self.discriminator_warmup <= self.adversarial_start,
            "discriminator_warmup",
            self.discriminator_warmup,
            f"at most adversarial_start ({self.adversarial_start})",
        )


def load_config(source: str | os.PathLike, **overrides) -> TrainingConfig:
    """The options of a codec's recipe.

    Args:
        source: name of a recipe that comes with the package, or a .toml or .json file. Paths in a file are relative to
            the working folder.
        **overrides (keyword arguments): options that replace the recipe's, by name; see `TrainingConfig`.

    Returns:
        The options, checked.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: for options that do not exist or values that are not allowed.

    Examples:
        >>> from modeling_encodec import load_config
        >>> config = load_config("paper_24khz", output="runs/24khz", batch_size=32)
        >>> config.learning_rate, config.batch_size, len(config.corpora) > 0
        (0.0003, 32, True)
    """
    return load_recipe(TrainingConfig, source, **overrides)
