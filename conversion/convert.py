"""Checkpoints from one form to another: read, understood, compared with other implementations, written, read again.

    checkpoint_files ──tensors──▶ key_mapping ──our names──▶ architecture ──configuration──▶ model
    model ──▶ verification ──▶ a folder for Transformers and this package, or a file of the original

Anything that does not fit is refused before a byte is written; there are no warnings. The price is some seconds and
the memory of three models. A target appears whole under its name or not at all.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from modeling_encodec.checkpoints.released import (
    RELEASED,
    ReleasedCheckpoint,
    checksum_in_name,
    released_by_checksum,
    released_by_name,
)
from modeling_encodec.conversion.architecture import BEHAVIOUR, Said, codec_config, released_with_shapes
from modeling_encodec.conversion.audiocraft_settings import audiocraft_codec
from modeling_encodec.conversion.checkpoint_files import Checkpoint, read_checkpoint
from modeling_encodec.conversion.checkpoint_writing import (
    check_target,
    form_of,
    transformers_loads,
    write_folder,
    write_original,
)
from modeling_encodec.conversion.key_mapping import (
    check_shapes,
    from_original,
    lm_config_from_original,
    lm_from_original,
    lm_to_original,
    to_original,
)
from modeling_encodec.conversion.verification import (
    check_equal,
    check_finite,
    compare_with_original,
    compare_with_original_lm,
    compare_with_original_steps,
    compare_with_transformers,
)
from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.models.fingerprints import codebook_fingerprint
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.processors.audio import read_audio


# What shapes of a language model do not tell.
LM_BEHAVIOUR = ("num_attention_heads", "frame_rate", "context_seconds")
HALVES = (torch.float16, torch.bfloat16)
NO_PEER = "encodec package: not compared, it or the torchaudio it needs is not installed"


@dataclass
class Report:
    """What was done, as `lines` of a name and a text."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, text: str) -> None:
        """One more line, of a `name` and a `text`."""
        self.lines.append((name, text))


def convert_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    to: str | None = None,
    settings: Mapping[str, object] | None = None,
    like: str | None = None,
    calibrate: Sequence[str | os.PathLike] = (),
    codec: EncodecModel | None = None,
    force: bool = False,
) -> Report:
    """Convert the checkpoint at `source` to `target`, and tell what was done.

    Args:
        source: a file of the original or of audiocraft, or a folder for Transformers.
        target: a folder; or, for the original's form, a file, or a folder that exists and gets a file named by its
            checksum.
        to: `"folder"` or `"original"`; by default what `target` looks like: `.th` is a file of the original.
        settings: fields of the configuration, before all that the checkpoint says.
        like: name of a released model that says what neither `settings` nor the checkpoint do.
        calibrate: audio files by which a language model gets its integer form, coded by `codec`.
        codec: the codec of the language model, for `calibrate`.
        force: replace a target that exists.

    Returns:
        A `Report`, whose `lines` say what was read, found out, compared and written.

    Raises:
        FileNotFoundError: if there is no such source.
        FileExistsError: if the target exists and may not be replaced.
        ValueError: for a checkpoint that cannot be read, does not say enough, contradicts what was said, or computes
            something else than in other implementations.

    Examples:
        >>> from modeling_encodec import EncodecConfig, EncodecModel, convert_checkpoint
        >>> config = EncodecConfig(num_filters=4, hidden_size=16, num_lstm_layers=1, codebook_size=64)
        >>> EncodecModel(config).save_pretrained("small")
        >>> report = convert_checkpoint("small", "small.th")  # of the original's form
        >>> [text.split()[0] for name, text in report.lines if name == "written"]
        ['small.th']
        >>> convert_checkpoint("small", "small.th")
        Traceback (most recent call last):
        ...
        FileExistsError: small.th exists; --force overwrites it
    """
    source, target = Path(source), Path(target)
    form = form_of(to, target)
    check_target(source, target, form, force)
    checkpoint, report = read_checkpoint(source), Report()
    report.add("source", _describe_source(checkpoint))
    _widen(checkpoint, report)
    check_finite(checkpoint.state)
    if like and checkpoint.kind == "transformers":
        raise ValueError("--like goes with files; a folder's config.json says how the model is run")
    make = _language_model if checkpoint.is_language_model else _codec
    if calibrate and not checkpoint.is_language_model:
        raise ValueError("calibrate goes with language models, this is a codec")
    model = make(checkpoint, dict(settings or {}), like, report)
    if calibrate:
        _calibrate(model, calibrate, codec, report)
    _write(model, target, form, re.sub(r"-[0-9a-f]{8}$", "", source.stem), report)
    return report


def _write(model: EncodecModel | EncodecLM, target: Path, form: str, name: str, report: Report) -> None:
    if form == "folder":
        written = write_folder(model, target)
        if isinstance(model, EncodecModel) and not transformers_loads(model.config):
            report.add("note", "Transformers' own class does not load it: it takes codebooks of 2, 4, 8 ... entries")
    else:
        written = write_original(_original_state(model), target, name)
        if not _released_in_original(model.config):
            report.add("note", "the encodec package has no such model by name: build one of it to load these weights")
    for path in written:
        if path.suffix != ".py":
            report.add("written", f"{path}  {path.stat().st_size:,} bytes")
    if any(path.suffix == ".py" for path in written):
        report.add("written", f"{target / '*.py'}  the model's code, for trust_remote_code")


def _widen(checkpoint: Checkpoint, report: Report) -> None:
    """Half precision becomes float32, which has all its values."""
    halves = {name: tensor for name, tensor in checkpoint.state.items() if tensor.dtype in HALVES}
    if halves:
        kinds = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in halves.values()}))
        report.add("note", f"{len(halves)} tensors are {kinds}; they are written as float32, which is exact")
        checkpoint.state |= {name: tensor.float() for name, tensor in halves.items()}


def _describe_source(checkpoint: Checkpoint) -> str:
    what = "language model" if checkpoint.is_language_model else "codec"
    kinds = {"original": "state dict of the original", "audiocraft": "audiocraft export", "transformers": "folder"}
    promised = checksum_in_name(checkpoint.path)
    checksum = ""
    if checkpoint.sha256:
        checksum = f", SHA-256 {checkpoint.sha256[:8]}…" + (" as its name says" if promised else "")
    return f"{checkpoint.path}: {kinds[checkpoint.kind]}, {what}{checksum}"


# ---- codecs ------------------------------------------------------------------------------------------------------


def _codec(checkpoint: Checkpoint, settings: dict, like: str | None, report: Report) -> EncodecModel:
    """The model of a codec's checkpoint, compared with others of the same weights."""
    _check_fields(settings, EncodecConfig)
    original = checkpoint.kind != "transformers"
    ours = from_original(checkpoint.state) if original else checkpoint.state
    said, told = [Said("--set", settings)], None
    if checkpoint.kind == "audiocraft":
        told = audiocraft_codec(checkpoint.settings)
        said.append(Said("xp.cfg", told.fields))
    elif checkpoint.kind == "transformers":
        given = EncodecConfig().to_dict() | {"codebook_dim": None} | checkpoint.settings
        said.append(Said("config.json", {name: given[name] for name in _fields(EncodecConfig)}))
    if like:
        said.append(Said(f"--like {like}", _behaviour_of(like, EncodecConfig)))
    named = checkpoint.state if original else None
    config, who = _typed(codec_config, ours, said, state=named, all_halves=bool(told and told.trained_for_fewer))
    if told and told.codebooks not in (None, config.num_quantizers):
        raise ValueError(f"xp.cfg: rvq.n_q is {told.codebooks}, allowed: {config.num_quantizers}, as in the weights")
    model = _model_of(EncodecModel, config, ours)
    released = released_with_shapes(ours, original=False)
    report.add("architecture", _describe_architecture(config, released))
    for name, origin in _grouped(config, who):
        report.add("settings", f"{name}  ({origin})")
    _add_numbers(report, model, config.num_quantizers, config.codebook_size)
    _add_licence(report, checkpoint, released)
    report.add("checked", "names and shapes of all tensors, all of them finite")
    report.add("checked", str(compare_with_transformers(model)))
    state = checkpoint.state if original else to_original(ours, config)
    report.add("checked", str(compare_with_original(model, state) or NO_PEER))
    return model


def _describe_architecture(config: EncodecConfig, released: ReleasedCheckpoint | None) -> str:
    if released is None:
        return (
            f"its own: {config.num_filters} filters, strides {list(config.upsampling_ratios)}, latent "
            f"{config.hidden_size}, {config.num_residual_layers} residual and {config.num_lstm_layers} LSTM layers"
        )
    theirs = released.make_config()
    names = [name for name in _fields(EncodecConfig) if _value(config, name) != _value(theirs, name)]
    different = ", ".join(f"{name} {_value(config, name)} (there {_value(theirs, name)})" for name in names)
    return f"that of {released.name}" + (f", but {different}" if different else "")


def _value(config, name: str):
    value = getattr(config, name)
    return list(value) if isinstance(value, tuple) else value


def _released_in_original(config: EncodecConfig | EncodecLMConfig) -> bool:
    """Whether the `encodec` package itself makes a model of this configuration."""
    if isinstance(config, EncodecLMConfig):
        return _released_lm(config) is not None
    theirs = [entry.make_config() for entry in RELEASED if entry.describes_behaviour and not entry.is_language_model]
    return any(all(_value(config, n) == _value(one, n) for n in _fields(EncodecConfig)) for one in theirs)


def _grouped(config: EncodecConfig, who: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What each source of settings said, in one text."""
    for origin in dict.fromkeys(who.values()):
        names = [name for name in who if who[name] == origin and hasattr(config, name)]
        yield ", ".join(f"{name} {_value(config, name)}" for name in names), origin


# ---- language models ---------------------------------------------------------------------------------------------


def _language_model(checkpoint: Checkpoint, settings: dict, like: str | None, report: Report) -> EncodecLM:
    """The model of a language model's checkpoint, compared with the original's steps."""
    _check_fields(settings, EncodecLMConfig)
    if checkpoint.kind == "transformers":
        model, who = _lm_of_folder(checkpoint, settings), {}
    else:
        model, who = _lm_of_file(checkpoint, settings, like)
    config = model.config
    released = _released_lm(config)
    sizes = f"{config.hidden_size} wide, {config.num_hidden_layers} layers, {config.frame_rate} frames a second"
    report.add("architecture", f"that of {released.name}" if released else f"its own: {sizes}")
    for name, origin in who.items():
        report.add("settings", f"{name} {getattr(config, name)}  ({origin})")
    _add_numbers(report, model, config.num_codebooks, config.codebook_size)
    _add_licence(report, checkpoint, released)
    report.add("checked", "names and shapes of all tensors, all of them finite")
    if config.zero_past_key:
        report.add("checked", str(compare_with_original_steps(model)))
        state = lm_to_original(model.state_dict(), config) if checkpoint.kind == "transformers" else checkpoint.state
        report.add("checked", str(compare_with_original_lm(model, state) or NO_PEER))
    else:
        report.add("checked", "no other implementation has zero_past_key False: not compared")
    return model


def _lm_of_file(checkpoint: Checkpoint, settings: dict, like: str | None) -> tuple[EncodecLM, dict[str, str]]:
    ours = lm_from_original(checkpoint.state)
    sizes = lm_config_from_original(checkpoint.state, frame_rate=75)
    fields = {name: getattr(sizes, name) for name in _fields(EncodecLMConfig) if name not in LM_BEHAVIOUR}
    behaviour = {}
    same = [
        entry.name
        for entry in RELEASED
        if entry.is_language_model and _lm_sizes(entry.make_config()) == _lm_sizes(sizes)
    ]
    for name, who in ((same[0] if same else None, "as"), (like, "--like")):
        if name:
            behaviour |= {key: (value, f"{who} {name}") for key, value in _behaviour_of(name, EncodecLMConfig).items()}
    behaviour |= {name: (value, "--set") for name, value in settings.items()}
    missing = [name for name in LM_BEHAVIOUR if name not in behaviour]
    if missing:
        raise ValueError(
            f"the weights do not tell {', '.join(missing)}: give --set FIELD=VALUE for each, or --like "
            "encodec_lm_24khz or encodec_lm_48khz"
        )
    for name, value in settings.items():
        if name in _lm_sizes(sizes) and value != fields[name]:
            raise ValueError(f"{name} is {value!r} (--set), allowed: {fields[name]!r}, as in the weights")
    fields |= {name: value for name, (value, _) in behaviour.items()}
    model = _model_of(EncodecLM, _typed(EncodecLMConfig, **fields), ours)
    return model, {name: who for name, (_, who) in behaviour.items()}


def _lm_of_folder(checkpoint: Checkpoint, settings: dict) -> EncodecLM:
    fields = {name: value for name, value in checkpoint.settings.items() if name in EncodecLMConfig.__annotations__}
    config = _typed(EncodecLMConfig, **(fields | settings))
    if not config.has_float_form:
        raise ValueError(f"{checkpoint.path}: holds the integer form alone, allowed: a model with float weights")
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in EncodecLM(config).state_dict().items()}
    check_shapes(checkpoint.state, expected, "language model")
    return _model_of(EncodecLM, config, checkpoint.state)


def _lm_sizes(config: EncodecLMConfig) -> dict[str, int]:
    names = (
        "codebook_size",
        "num_codebooks",
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "zero_past_key",
    )
    return {name: getattr(config, name) for name in names}


def _released_lm(config: EncodecLMConfig) -> ReleasedCheckpoint | None:
    def numbers(one: EncodecLMConfig) -> dict:
        return _lm_sizes(one) | {name: getattr(one, name) for name in LM_BEHAVIOUR}

    entries = (entry for entry in RELEASED if entry.is_language_model)
    return next((entry for entry in entries if numbers(entry.make_config()) == numbers(config)), None)


@torch.no_grad()
def _calibrate(lm: EncodecLM, files: Sequence, codec: EncodecModel | None, report: Report) -> None:
    """Give a language model its integer form, by the codes of audio files."""
    if codec is None:
        raise ValueError("calibrate needs the codec of the language model")
    theirs = codec.config
    for name, ours, value in (
        ("codebook_size", lm.config.codebook_size, theirs.codebook_size),
        ("frame_rate", lm.config.frame_rate, theirs.frame_rate),
        ("num_codebooks", lm.config.num_codebooks, theirs.num_quantizers),
    ):
        if ours != value:
            raise ValueError(f"the codec's {name} is {value}, allowed: {ours}, as in the language model")
    batches, seconds = [], 0.0
    for path in files:
        audio, rate = read_audio(path, theirs.sampling_rate, theirs.audio_channels)
        coded = codec.encode(torch.from_numpy(audio)[None], num_quantizers=theirs.num_quantizers)
        chunks = [theirs.num_frames(stop - start) for start, stop in theirs.chunk_spans(audio.shape[1])]
        batches += [codes[..., :frames] for codes, frames in zip(coded.audio_codes, chunks)]
        seconds += audio.shape[1] / rate
    lm.quantize(batches)
    lm.config.codec_fingerprint = codebook_fingerprint(codec)
    report.add("integer form", f"made by {seconds:.1f} s of audio, for the codec {lm.config.codec_fingerprint}")


def _model_of(kind: type, config: EncodecConfig | EncodecLMConfig, state: Mapping[str, torch.Tensor]):
    """A model with these weights and no others: none are drawn first, which takes longer than all else."""
    with torch.device("meta"):
        model = kind(config)
    model.to_empty(device="cpu").load_state_dict(state)
    return model.eval()


# ---- settings and report -----------------------------------------------------------------------------------------


def _fields(kind: type) -> list[str]:
    """Fields of a configuration class, without those that say what is in a folder."""
    return [name for name in kind.__annotations__ if name not in ("has_integer_form", "has_float_form")]


def _check_fields(settings: dict, kind: type) -> None:
    for name in settings:
        if name not in _fields(kind):
            raise ValueError(f"no field is called {name!r}, allowed: {', '.join(_fields(kind))}")


def _behaviour_of(like: str, kind: type) -> dict[str, object]:
    """What the released model `like` says that weights do not."""
    entry = released_by_name(like)
    config = entry.make_config()
    if not isinstance(config, kind) or not entry.describes_behaviour:
        allowed = [e.name for e in RELEASED if isinstance(e.make_config(), kind) and e.describes_behaviour]
        raise ValueError(f"--like is {like!r}, allowed: {', '.join(allowed)}")
    names = BEHAVIOUR if kind is EncodecConfig else LM_BEHAVIOUR
    return {name: getattr(config, name) for name in names}


def _typed(make, *arguments, **fields):
    """`make(...)`, whose complaints about types of settings come as one line."""
    try:
        return make(*arguments, **fields)
    except TypeError as error:
        raise ValueError(f"a setting is of the wrong type: {' '.join(str(error).split())}") from None


def _add_numbers(report: Report, model, codebooks: int, size: int) -> None:
    report.add("parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}")
    report.add("codebooks", f"{codebooks} of {size} entries")


def _add_licence(report: Report, checkpoint: Checkpoint, released: ReleasedCheckpoint | None) -> None:
    """Whose weights these are or may be, and what their licence is said to be."""
    known = checkpoint.sha256 and released_by_checksum(checkpoint.sha256)
    if known:
        report.add("licence", f"{known.licence}: {known.licence_note}; check before you publish ({known.name})")
    elif released:
        report.add(
            "licence",
            f"if these are the weights of {released.name}, {released.licence}: {released.licence_note}; check before "
            "you publish",
        )
    else:
        report.add("licence", "unknown: that of whoever trained it; check before you publish")


def _original_state(model: EncodecModel | EncodecLM) -> dict[str, torch.Tensor]:
    """The model's state dict under the original's names, sure to give the model back."""
    state, config = model.state_dict(), model.config
    if isinstance(model, EncodecLM):
        theirs, state = lm_to_original(state, config), {n: t for n, t in state.items() if not n.startswith("integer.")}
        check_equal(lm_from_original(theirs), state, "the original's form")
    else:
        theirs = to_original(state, config)
        check_equal(from_original(theirs), state, "the original's form")
    return theirs
