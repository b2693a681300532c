"""What every training run has: its corpora, schedule and outputs, as options with help; recipes that set them.

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
from typing import ClassVar, Literal, get_args, get_type_hints

from modeling_encodec.models.inputs_encodec import as_python
from modeling_encodec.processors.corpus.reading import CorpusConfig


RECIPES = Path(__file__).parent / "recipes"


def option(default, help: str):
    """A dataclass field with its `default` and line of `help`, from which the command line is made."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class RunConfig:
    """Options that all runs share. Lengths are in seconds, levels in dB, counts in updates."""

    # Options that say how long a run is; another length may change what its past would have been.
    length_options: ClassVar[tuple[str, ...]] = ("epochs", "updates_per_epoch")
    # The folder of the shipped recipes of this kind.
    recipes: ClassVar[Path] = RECIPES
    # Options that may differ between a run and its continuation: they do not change what is learned.
    free_options: ClassVar[set[str]] = {
        *("output", "resume", "extend", "max_minutes", "workers", "device", "trackers", "push_to", "index", "model"),
        *(
            "save_every",
            "save_minutes",
            "validate_every",
            "log_every",
            "validation",
            "validation_clips",
            "validation_seconds",
        ),
    }
    at_least_1: ClassVar[tuple[str, ...]] = (
        *("epochs", "updates_per_epoch", "batch_size", "accumulation_steps", "save_every", "validate_every"),
        *("log_every", "validation_clips"),
    )
    at_least_0: ClassVar[tuple[str, ...]] = ("workers", "warmup_updates", "seed")
    below_1: ClassVar[tuple[str, ...]] = ("weight_average", "beta1", "beta2")
    above_0: ClassVar[tuple[str, ...]] = ("learning_rate", "segment_seconds", "validation_seconds")

    # Data
    corpora: list[CorpusConfig] = option([], "In recipe files: the corpora.")
    segment_seconds: float = option(1.0, "Seconds of a training example.")
    chance_of_music: float = option(0.32, "Chance of one music clip (paper 4.1, strategy 1).")
    chance_of_other: float = option(0.32, "Chance of one clip of speech or other sound (strategy 2).")
    chance_of_two: float = option(0.24, "Chance of the sum of two clips from anywhere (strategy 3).")
    chance_of_three: float = option(0.12, "Chance of the sum of three clips other than music (strategy 4).")
    normalize: Literal["peak", "rms", "none"] = option(
        "peak", "What each file is brought to before the gain: peak 1, root mean square 0.1, or left."
    )
    gain_min: float = option(-10.0, "Least random gain of each clip, dB.")
    gain_max: float = option(6.0, "Greatest random gain of each clip, dB; mixtures that clip are drawn again.")
    impulse_responses: str | None = option(None, "Folder of room impulse responses, for reverberation.")
    reverberation_chance: float = option(0.2, "Chance of reverberation, but for single music clips (paper 4.1).")
    index: str | None = option(None, "Folder that keeps what is learned of the files (default: index in the output).")
    data_in_memory: bool = option(
        False, "Decode all corpora into memory first, by all cores; 4 bytes a sample at the model's rate."
    )
    workers: int = option(2, "Processes that read audio; any number gives the same batches.")
    validation: str | None = option(None, "Folder or manifest of held-out files, for SI-SNR and mel distance.")
    validation_clips: int = option(20, "Clips of --validation that are used, at most.")
    validation_seconds: float = option(8.0, "Seconds that are used of each clip to validate on or listen to, at most.")

    # Schedule
    epochs: int = option(300, "Epochs.")
    updates_per_epoch: int = option(2000, "Updates of an epoch.")
    batch_size: int = option(64, "Examples of an update, over all processes and accumulation steps.")
    accumulation_steps: int = option(1, "Parts in which a process computes its share of a batch.")
    seed: int = option(0, "Every random choice follows from it and the update's number.")
    max_minutes: float | None = option(
        None, "Stop in time to be saved so many minutes after the start; one update is always done."
    )

    # Optimisation
    learning_rate: float = option(3e-4, "Adam's rate for the codec (paper 4.4).")
    beta1: float = option(0.5, "Adam's first decay.")
    beta2: float = option(0.9, "Adam's second decay.")
    warmup_updates: int = option(0, "Updates over which the rates rise from 0.")
    decay_to: float = option(1.0, "Fraction of the rate reached, along a cosine, at the last update.")
    max_gradient_norm: float | None = option(
        None, "Norm that gradients are scaled down to (default: none, as in audiocraft)."
    )
    weight_average: float = option(0.0, "Decay of averaged weights (audiocraft: 0.99); these are saved. 0: none.")
    mixed_precision: Literal["auto", "no", "bf16"] = option(
        "auto", "Number format of the networks, auto: what Accelerate is configured for; codebooks stay float32."
    )
    bandwidths: list[float] = option([], "kbps, of which one is drawn for each batch (default: all of the model).")

    # What is kept and shown
    output: str = option("encodec_training", "Folder of checkpoints, logs and the finished model.")
    resume: bool = option(False, "Go on from the output folder's checkpoint, as if never stopped.")
    extend: bool = option(
        False, "With --resume and other --epochs: go on although the rate's past would have been another with them."
    )
    save_every: int = option(1000, "Updates between checkpoints.")
    save_minutes: float | None = option(None, "Minutes between checkpoints, besides.")
    validate_every: int = option(1000, "Updates between validations.")
    log_every: int = option(50, "Updates between lines of the log.")
    trackers: list[str] = option(["tensorboard"], "Accelerate's trackers; log.jsonl is always written.")
    device: Literal["auto", "cpu"] = option("auto", "auto takes an accelerator where there is one.")
    push_to: str | None = option(None, "Hub repository that gets the finished model.")

    def __post_init__(self):
        tables = isinstance(self.corpora, list) and all(isinstance(one, (dict, CorpusConfig)) for one in self.corpora)
        require(tables, "corpora", self.corpora, "a list of corpora")
        self.corpora = [
            corpus if isinstance(corpus, CorpusConfig) else _build(CorpusConfig, corpus, "corpus")
            for corpus in self.corpora
        ]
        for item in self.corpora:
            _check_types(item)
            _refuse_nan(item)
        _check_types(self)
        self._check_ranges()
        _refuse_nan(self)  # where no range has done so

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return self.epochs * self.updates_per_epoch

    def rate_factor(self, update: int) -> float:
        """What learning rates are multiplied by in update number `update`: a rise over the warm-up, times a cosine
        from 1 down to `decay_to` over the whole run."""
        rise = min(1.0, (update + 1) / self.warmup_updates) if self.warmup_updates else 1.0
        cosine = (1 + math.cos(math.pi * min(1.0, update / self.updates))) / 2
        return rise * (self.decay_to + (1 - self.decay_to) * cosine)

    def _check_ranges(self):
        for name in self.at_least_1:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in self.at_least_0:
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        chances = [item.name for item in dataclasses.fields(self) if "chance" in item.name]
        for name in (*chances, "decay_to"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a number in [0, 1]")
        for name in self.below_1:
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "a number in [0, 1)")
        for name in self.above_0:
            value = getattr(self, name)
            require(value > 0 and math.isfinite(value), name, value, "a finite number above 0")
        require(self.resume or not self.extend, "extend", self.extend, "no without resume")
        require(self.gain_min <= self.gain_max, "gain_min", self.gain_min, f"at most gain_max ({self.gain_max})")
        for name in ("gain_min", "gain_max"):
            require(math.isfinite(getattr(self, name)), name, getattr(self, name), "a finite number")
        for name in ("max_minutes", "save_minutes", "max_gradient_norm"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, name, value, "none or a finite number above 0")
        names = [corpus.name for corpus in self.corpora]
        require(len(set(names)) == len(names), "corpora", names, "a name of its own for each")


def load_recipe(kind: type[RunConfig], source: str | os.PathLike, **overrides) -> RunConfig:
    """The options of a recipe of this kind: a shipped one's name, or a .toml or .json file of one's own.

    `overrides` are options that replace the file's. Paths in a file are relative to the working folder.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: for options that do not exist or values that are not allowed.
    """
    path = kind.recipes / f"{source}.toml"
    if str(source) not in recipe_names(kind):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{source}: no such recipe, allowed: a file, {', '.join(recipe_names(kind))}")
    try:
        values = json.loads(path.read_text()) if path.suffix == ".json" else tomllib.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a recipe ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a recipe (a {type(values).__name__}), allowed: options by name")
    try:
        return _build(kind, values | overrides, "option")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def recipe_names(kind: type[RunConfig]) -> list[str]:
    """Names of the recipes of this kind that come with the package."""
    return sorted(path.stem for path in kind.recipes.glob("*.toml"))


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
    """Every field has its annotated type; whole numbers pass for floats, and any library's numbers become Python's."""
    hints = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        setattr(config, item.name, as_python(getattr(config, item.name)))
        value, kinds = getattr(config, item.name), get_args(hints[item.name])
        literal = isinstance(kinds[0], str) if kinds else False
        if literal:
            require(value in kinds, item.name, value, f"one of {', '.join(kinds)}")
            continue
        plain = [getattr(kind, "__origin__", kind) for kind in (kinds or [hints[item.name]])]
        if getattr(hints[item.name], "__origin__", None) is list:
            inner = kinds[0]
            plain = [list]
            good = isinstance(value, list) and all(_fits(one, inner) for one in value)
        else:
            good = any(_fits(value, kind) for kind in plain)
        allowed = " or ".join("none" if kind is type(None) else kind.__name__ for kind in plain)
        require(good, item.name, value, allowed)


def _refuse_nan(config) -> None:
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        numbers = value if isinstance(value, list) else [value]
        nan = any(isinstance(number, float) and math.isnan(number) for number in numbers)
        require(not nan, item.name, value, "a number")


def _fits(value, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def require(condition, name: str, value, allowed: str) -> None:
    """A ValueError, that names the option, its `value` and what is `allowed`, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name} is {value!r}, allowed: {allowed}")
