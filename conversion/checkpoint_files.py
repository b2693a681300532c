"""Checkpoint files as they are found: what kind they are, their tensors under their own names, what they say of
themselves. Nothing in them is executed.

Three kinds: `original`, a state dict as the `encodec` package publishes it; `audiocraft`, a dictionary of a state dict
and the configuration of its training as YAML text; `transformers`, a folder with `config.json`. Pickles are read by
PyTorch's restricted reader, which knows tensors and containers and no code. So a training checkpoint of audiocraft,
which holds objects of other packages, cannot be read; audiocraft exports it.
"""

import hashlib
import pickle
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from modeling_encodec.checkpoints.released import checksum_in_name
from modeling_encodec.models.json_files_encodec import read_json, what_pickle_wants
from modeling_encodec.models.loading_encodec import WEIGHT_FILES, indexed_files


MODEL_TYPES = ("encodec", "encodec_lm")
AUDIOCRAFT_FILE = "compression_state_dict.bin"
# Weight norm under the names of other versions of PyTorch.
OTHER_NAMES = [
    (".parametrizations.weight.original0", ".weight_g"),
    (".parametrizations.weight.original1", ".weight_v"),
]
# Of what a file holds so many names are told.
NAMES_TOLD = 10


@dataclass
class Checkpoint:
    """What was read.

    Args:
        path: of the file or folder.
        kind: `"original"`, `"audiocraft"` or `"transformers"`.
        is_language_model: whether it is a language model and no codec.
        state: tensors under the checkpoint's own names, of weight norm the older ones in files and the newer ones in
            folders.
        settings: `config.json`, or audiocraft's `xp.cfg`; nothing in an original file.
        sha256: of a file; `None` for a folder.
    """

    path: Path
    kind: str
    is_language_model: bool
    state: dict[str, torch.Tensor]
    settings: dict = field(default_factory=dict)
    sha256: str | None = None


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a file or folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: for a damaged file, one whose checksum is not the one in its name, one with code in it, or one that
            holds no EnCodec model.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    sha256, promised = file_sha256(path), checksum_in_name(path)
    if promised and not sha256.startswith(promised):
        raise ValueError(f"{path}: the checksum in the name is {promised}, that of the file {sha256[:8]}: damaged?")
    content = _read_tensors(path)
    if {"best_state", "xp.cfg", "pretrained"} & content.keys():
        state, settings = _open_audiocraft(path, content)
        kind = "audiocraft"
    else:
        state, settings, kind = content, {}, "original"
    state = _rename(path, _only_tensors(path, state), OTHER_NAMES)
    if not any(name.startswith(("encoder.", "decoder.", "quantizer.", "emb.", "linears.")) for name in state):
        raise ValueError(f"{path}: no EnCodec model, but {_told(state)}")
    return Checkpoint(path, kind, _is_language_model(state), state, settings, sha256)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_language_model(state: dict) -> bool:
    return not any(name.startswith(("encoder.", "decoder.", "quantizer.")) for name in state)


# ---- folders of Transformers -------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> Checkpoint:
    if not (folder / "config.json").is_file():
        hint = f"; convert {folder / AUDIOCRAFT_FILE}" if (folder / AUDIOCRAFT_FILE).is_file() else ""
        raise FileNotFoundError(f"{folder}: a folder without config.json{hint}")
    settings = read_json(folder / "config.json")
    if settings.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"{folder}: model_type is {settings.get('model_type')!r}, allowed: {' or '.join(MODEL_TYPES)}"
        )
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{folder}: a folder without {' or '.join(WEIGHT_FILES)}")
    state = {}
    for path in indexed_files(weights) if weights.suffix == ".json" else [weights]:
        shard = _only_tensors(path, _read_tensors(path))
        if twice := sorted(state.keys() & shard.keys()):
            raise ValueError(f"{path}: tensors that are in another file too: {_told(twice)}")
        state |= shard
    state = _rename(folder, state, [(old, new) for new, old in OTHER_NAMES])
    return Checkpoint(folder, "transformers", settings["model_type"] == "encodec_lm", state, settings)


# ---- audiocraft --------------------------------------------------------------------------------------------------


def _open_audiocraft(path: Path, content: dict) -> tuple[dict, dict]:
    """State dict and configuration of an exported compression model."""
    if "pretrained" in content:
        raise ValueError(
            f"{path}: no weights, it only names {content['pretrained']!r}; convert that model's {AUDIOCRAFT_FILE}"
        )
    missing = sorted({"best_state", "xp.cfg"} - content.keys())
    text, state = content.get("xp.cfg"), content.get("best_state")
    if missing or not isinstance(text, str) or not isinstance(state, dict):
        what = f"lacks {', '.join(missing)}" if missing else "has a best_state and an xp.cfg of other types"
        raise ValueError(f"{path}: {what}; export it with audiocraft.utils.export.export_encodec")
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: xp.cfg is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: xp.cfg is a {type(settings).__name__}, allowed: keys and values")
    kind = settings.get("compression_model")
    if "lm_model" in settings and _is_language_model(state):
        raise ValueError(f"{path}: a language model of audiocraft, allowed: its codec, {AUDIOCRAFT_FILE} beside it")
    if kind != "encodec":
        raise ValueError(f"{path}: compression_model is {kind!r}, allowed: 'encodec'")
    if isinstance(state.get("model"), dict):  # not exported, but without objects
        state = state["model"]
    return state, settings


# ---- files -------------------------------------------------------------------------------------------------------


def _read_tensors(path: Path) -> dict:
    """What is in a file of safetensors or a pickle, on the CPU."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles of other versions, which are read or refused all the same
            content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path}: no safetensors, or damaged: {error}") from None
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: {what_pickle_wants(str(error))}") from None
    except Exception as error:  # damaged bytes make the reader fail in any way there is
        what = "empty" if path.stat().st_size == 0 else "no PyTorch file, or a damaged one"
        raise ValueError(f"{path}: {what} ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, allowed: a state dict")
    return content


def _only_tensors(path: Path, state: dict) -> dict[str, torch.Tensor]:
    others = [
        f"{name} ({type(value).__name__})" for name, value in state.items() if not isinstance(value, torch.Tensor)
    ]
    if others:
        raise ValueError(f"{path}: unexpected: {_told(others)}; allowed: tensors alone")
    if not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path}: tensors without names, allowed: a state dict")
    return dict(state)


def _rename(path: Path, state: dict[str, torch.Tensor], names: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for old, new in names:
            if name.endswith(old):
                name = name.removesuffix(old) + new
        if name in renamed:
            raise ValueError(f"{path}: {name} is there twice, under an old name and a new one")
        renamed[name] = tensor
    return renamed


def _told(names) -> str:
    names = [str(name) for name in names]
    more = f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
    return (", ".join(names[:NAMES_TOLD]) or "nothing") + more
