"""What a training run is made of: `TrainingConfig` and the corpora it names, from a recipe file and the command line.

Defaults are the paper's 24 kHz recipe (arXiv 2210.13438, sections 3.2, 3.4, 4.1 and 4.4). Where the paper, the
`encodec` package and audiocraft disagree, the paper is the default and the other behaviour a named option.
"""

import dataclasses
import json
import math
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_type_hints


RECIPES = Path(__file__).parent / "recipes"


def option(default, help: str):
    """A dataclass field with its line of help, from which the command line is made."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class CorpusConfig:
    """Where one corpus lies and how often it is drawn."""

    name: str
    source: str  # a folder, a manifest (.jsonl, .csv, .txt), or a dataset: Hub id or folder of `save_to_disk`
    kind: Literal["folder", "manifest", "dataset"] = "folder"
    domain: Literal["speech", "music", "general"] = "speech"
    weight: float | None = None  # chance beside the other corpora of a pool; its hours of audio without one
    split: str = "train"  # datasets only, like the rest
    subset: str | None = None
    column: str = "audio"
    streaming: bool = False
    licence: str = ""  # for the card


@dataclass
class TrainingConfig:
    """Every option of a training run. Lengths are in seconds, levels in dB, counts in updates of the codec."""

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
    corpora: list[CorpusConfig] = option([], "In recipe files: the corpora.")
    validation: str | None = option(None, "Folder or manifest of held-out files, for SI-SNR and mel distance.")
    validation_clips: int = option(20, "Clips of it that are used, at most.")
    validation_seconds: float = option(8.0, "What is used of each clip, of the listening clips too, at most.")
    listening: str | None = option(None, "Folder or manifest of which some clips are decoded and logged.")
    listening_clips: int = option(4, "Clips of it that are decoded.")
    segment_seconds: float = option(1.0, "Length of a training example.")
    chance_of_music: float = option(0.32, "Chance of one music clip (paper 4.1, strategy 1).")
    chance_of_other: float = option(0.32, "Chance of one clip of speech or other sound (strategy 2).")
    chance_of_two: float = option(0.24, "Chance of the sum of two clips from anywhere (strategy 3).")
    chance_of_three: float = option(0.12, "Chance of the sum of three clips other than music (strategy 4).")
    normalize: Literal["peak", "rms", "none"] = option(
        "peak", "What each file is brought to before the gain: peak 1, root mean square 0.1, or left."
    )
    gain_min: float = option(-10.0, "Least random gain of each clip, dB.")
    gain_max: float = option(6.0, "Greatest random gain, dB; mixtures that clip are drawn again.")
    impulse_responses: str | None = option(None, "Folder of room impulse responses, for reverberation.")
    reverberation_chance: float = option(0.2, "Chance of reverberation, but for single music clips (paper 4.1).")
    index: str | None = option(None, "Folder that keeps what is learned of the files (default: index in the output).")
    workers: int = option(2, "Processes that read audio; any number gives the same batches.")

    # Schedule
    epochs: int = option(300, "Epochs.")
    updates_per_epoch: int = option(2000, "Updates of an epoch.")
    batch_size: int = option(64, "Examples of an update, over all processes and accumulation steps.")
    accumulation_steps: int = option(1, "Parts in which a process computes its share of a batch.")
    seed: int = option(0, "Every random choice follows from it and the update's number.")
    max_minutes: float | None = option(None, "Stop cleanly and save so long after the first update began.")

    # Optimisation
    learning_rate: float = option(3e-4, "Adam's rate for the codec (paper 4.4).")
    discriminator_learning_rate: float = option(3e-4, "Adam's rate for the discriminators.")
    beta1: float = option(0.5, "Adam's first decay.")
    beta2: float = option(0.9, "Adam's second decay.")
    warmup_updates: int = option(0, "Updates over which the rates rise from 0.")
    decay_to: float = option(1.0, "Fraction of the rate reached, along a cosine, at the last update.")
    max_gradient_norm: float | None = option(
        None, "Codec gradients are scaled down to it; audiocraft and paper: none."
    )
    weight_average: float = option(0.0, "Decay of averaged weights (audiocraft: 0.99); these are saved. 0: none.")
    mixed_precision: Literal["auto", "no", "bf16"] = option(
        "auto", "Number format of the networks, auto: what Accelerate is configured for; codebooks stay float32."
    )
    compile: bool = option(False, "torch.compile encoder, decoder and discriminators.")

    # Losses (paper 3.4)
    waveform_weight: float = option(0.1, "Share of the L1 distance of waveforms.")
    mel_weight: float = option(1.0, "Share of the multi-scale mel distance.")
    adversarial_weight: float = option(3.0, "Share of the adversarial loss (paper: 3 at 24 kHz, 4 at 48 kHz).")
    feature_weight: float = option(3.0, "Share of feature matching (paper: 3 at 24 kHz, 4 at 48 kHz).")
    commitment_weight: float = option(1.0, "Weight of the commitment loss, outside the balancer.")
    balancer: bool = option(True, "Balance gradients; without, losses are summed with their weights.")
    balancer_decay: float = option(0.999, "Decay of the balancer's averages of gradient norms.")
    mel_loss: Literal["paper", "audiocraft"] = option("paper", "Scales 2^5 to 2^11, or audiocraft's five with logs.")
    generator_loss: Literal["hinge", "linear"] = option("hinge", "max(0, 1 - D), or audiocraft's -D.")
    feature_loss: Literal["relative", "absolute"] = option("relative", "Divided by the real features, or not.")

    # Quantiser (paper 3.2)
    upstream_quantizer: bool = option(False, "The original's: only codebook 1 gets commitment, dead codes stay.")
    codebook_decay: float = option(0.99, "Decay of the codebooks' averages.")
    dead_code_threshold: float = option(0.1, "A code used less than this part of the mean is replaced.")
    kmeans_iterations: int = option(50, "Rounds of the codebooks' k-means start.")
    kmeans_batches: int = option(1, "Batches whose latents the start sees.")
    bandwidths: list[float] = option([], "kbps drawn from, one for each batch (default: all of the model).")

    # Discriminators (paper 3.4)
    discriminator_filters: int = option(32, "Channels of their convolutions.")
    discriminator_chance: float = option(2 / 3, "Chance that an update trains them (paper: 0.5 at 48 kHz).")
    discriminators: Literal["per_bandwidth", "single"] = option("per_bandwidth", "audiocraft has a single one.")
    adversarial_start: int = option(0, "Update from which they count; before it the codec learns without.")
    discriminator_warmup: int = option(
        0, "Updates before adversarial_start in which they learn already, but the codec not yet from them."
    )

    # What is kept and shown
    output: str = option("encodec_training", "Folder of checkpoints, logs and the finished model.")
    resume: bool = option(False, "Go on from the output folder's checkpoint, as if never stopped.")
    save_every: int = option(1000, "Updates between checkpoints.")
    validate_every: int = option(1000, "Updates between validations.")
    listen_every: int = option(2000, "Updates between decodings of the listening clips.")
    log_every: int = option(50, "Updates between lines of the log.")
    trackers: list[str] = option(["tensorboard"], "Accelerate's trackers; log.jsonl is always written.")
    device: Literal["auto", "cpu"] = option("auto", "auto takes an accelerator where there is one.")
    push_to: str | None = option(None, "Hub repository that gets the finished model.")

    def __post_init__(self):
        tables = isinstance(self.corpora, list) and all(isinstance(one, (dict, CorpusConfig)) for one in self.corpora)
        _require(tables, "corpora", self.corpora, "a list of corpora")
        self.corpora = [
            corpus if isinstance(corpus, CorpusConfig) else _build(CorpusConfig, corpus, "corpus")
            for corpus in self.corpora
        ]
        for item in self.corpora:
            _check_types(item)
        _check_types(self)
        self._check_ranges()

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return self.epochs * self.updates_per_epoch

    def _check_ranges(self):
        for name in ("epochs", "updates_per_epoch", "batch_size", "accumulation_steps", "kmeans_batches",
                     "kmeans_iterations", "save_every", "validate_every", "listen_every", "log_every",
                     "discriminator_filters", "validation_clips", "listening_clips"):  # fmt: skip
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("workers", "warmup_updates", "adversarial_start", "discriminator_warmup", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        chances = [item.name for item in dataclasses.fields(self) if "chance" in item.name]
        for name in (*chances, "decay_to"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a number in [0, 1]")
        for name in ("weight_average", "codebook_decay", "balancer_decay", "beta1", "beta2", "dead_code_threshold"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a number in [0, 1)")
        for name in ("learning_rate", "discriminator_learning_rate", "segment_seconds", "validation_seconds"):
            value = getattr(self, name)
            _require(value > 0 and math.isfinite(value), name, value, "a finite number above 0")
        for item in dataclasses.fields(self):
            if item.name.endswith("_weight"):
                value = getattr(self, item.name)
                _require(value >= 0 and math.isfinite(value), item.name, value, "a finite number of at least 0")
        _require(
            self.waveform_weight + self.mel_weight > 0,
            "mel_weight",
            self.mel_weight,
            "above 0 if waveform_weight is 0",
        )
        _require(self.gain_min <= self.gain_max, "gain_min", self.gain_min, f"at most gain_max ({self.gain_max})")
        for name in ("gain_min", "gain_max"):
            _require(math.isfinite(getattr(self, name)), name, getattr(self, name), "a finite number")
        for name in ("max_minutes", "max_gradient_norm"):
            value = getattr(self, name)
            _require(value is None or 0 < value < math.inf, name, value, "none or a finite number above 0")
        first = self.restart_codebooks_from
        _require(first is None or first >= 0, "restart_codebooks_from", first, "none or at least 0")
        if self.freeze != "none":
            _require(self.model, "freeze", self.freeze, "none for a new model")
            _require(first is None, "restart_codebooks_from", first, f"none when the {self.freeze} is frozen")
        names = [corpus.name for corpus in self.corpora]
        _require(len(set(names)) == len(names), "corpora", names, "a name of its own for each")
        _require(
            self.discriminator_warmup <= self.adversarial_start,
            "discriminator_warmup",
            self.discriminator_warmup,
            f"at most adversarial_start ({self.adversarial_start})",
        )


def load_config(source: str | os.PathLike, **overrides) -> TrainingConfig:
    """The options of a recipe: a shipped one's name (`recipe_names`), or a .toml or .json file of one's own.

    `overrides` are options that replace the file's. Paths in a file are relative to the working folder.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: for options that do not exist or values that are not allowed.
    """
    path = RECIPES / f"{source}.toml"
    if str(source) not in recipe_names():
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{source}: no such recipe, allowed: a file, {', '.join(recipe_names())}")
    try:
        values = json.loads(path.read_text()) if path.suffix == ".json" else tomllib.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a recipe ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a recipe (a {type(values).__name__}), allowed: options by name")
    try:
        return _build(TrainingConfig, values | overrides, "option")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def _build(kind: type, values: dict, noun: str):
    known = {item.name for item in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{noun} {unknown[0]!r} does not exist, allowed: {', '.join(sorted(known))}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{noun} is incomplete: {error}") from None


def _check_types(config) -> None:
    """Every field has its annotated type; whole numbers pass for floats."""
    hints = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, kinds = getattr(config, item.name), get_args(hints[item.name])
        literal = isinstance(kinds[0], str) if kinds else False
        if literal:
            _require(value in kinds, item.name, value, f"one of {', '.join(kinds)}")
            continue
        plain = [getattr(kind, "__origin__", kind) for kind in (kinds or [hints[item.name]])]
        if getattr(hints[item.name], "__origin__", None) is list:
            inner = kinds[0]
            plain = [list]
            good = isinstance(value, list) and all(_fits(one, inner) for one in value)
        else:
            good = any(_fits(value, kind) for kind in plain)
        allowed = " or ".join("none" if kind is type(None) else kind.__name__ for kind in plain)
        _require(good, item.name, value, allowed)


def _fits(value, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _require(condition, name: str, value, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}, allowed: {allowed}")
