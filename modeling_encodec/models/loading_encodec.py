# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""Models as they are loaded: whole, or not at all.

Transformers fills what a checkpoint lacks with random numbers and a warning, which serves whoever puts a new head on
an old model. A codec with one random layer writes files that nobody can decode. So here a model whose weights are
missing, unexpected, of another shape or not finite is an error that names them, before memory is taken, unless the
caller says otherwise as Transformers has it: `output_loading_info=True` returns the lists with the model, for the
caller to look at; `ignore_mismatched_sizes=True` makes tensors of another shape anew; a class's
`_keys_to_ignore_on_load_missing` and `_keys_to_ignore_on_load_unexpected` name what it does without.
"""

import contextvars
import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .json_files_encodec import line_of, one_line_errors, read_json


# In the order in which Transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES_TOLD = 4
# Whether the caller looks at what is missing itself.
_looks = contextvars.ContextVar("looks", default=False)


class WholeCheckpoints:
    """A model class whose `from_pretrained` takes whole checkpoints alone."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """The model saved at `pretrained_model_name_or_path`; arguments as of Transformers' method.

        Args:
            pretrained_model_name_or_path (str or Path): the folder or Hub id.
            *model_args (arguments): of the class, after its configuration.
            output_loading_info (bool): return what was missing, unexpected or of another shape too, whatever it is.
            **kwargs (keyword arguments): others of Transformers' method, such as `dtype` or `device_map`.

        Raises:
            OSError: if there is no such model, or the Hub cannot be reached.
            ValueError: for a damaged file, one with code in it, settings that cannot be, and tensors that are missing,
                unexpected, of another shape or not finite; in one line that names them.
        """
        named = "the state dict" if pretrained_model_name_or_path is None else str(pretrained_model_name_or_path)
        token = _looks.set(bool(output_loading_info))
        try:
            with one_line_errors(named):
                if os.path.isdir(named):
                    check_weight_files(Path(named) / (kwargs.get("subfolder") or ""), kwargs.get("variant"))
                elif os.path.lexists(named) or os.path.isabs(named):  # which is no repository's id
                    what = "no folder, allowed: a model's" if os.path.lexists(named) else "no such model folder"
                    raise FileNotFoundError(f"{named}: {what}")
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
                )
                if output_loading_info:
                    return model, info
                # What `_finalize_model_loading` has seen before, where this version of Transformers calls it.
                mismatched = [] if kwargs.get("ignore_mismatched_sizes") else info["mismatched_keys"]
                refuse_incomplete(named, cls, info["missing_keys"], info["unexpected_keys"], mismatched)
                refuse_not_finite(named, model)
                return model
        finally:
            _looks.reset(token)

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        """As Transformers', which draws random numbers for what is missing; that is refused first."""
        seen = dataclasses.replace(loading_info)
        model._adjust_missing_and_unexpected_keys(seen)
        missing = set(seen.missing_keys) - set(getattr(model, "all_tied_weights_keys", None) or ())
        missing, unexpected = ((), ()) if _looks.get() else (missing, seen.unexpected_keys)
        mismatched = () if load_config.ignore_mismatched_sizes else seen.mismatched_keys
        named = load_config.pretrained_model_name_or_path or "the state dict"
        refuse_incomplete(named, type(model), missing, unexpected, mismatched)
        return super(WholeCheckpoints, type(model))._finalize_model_loading(model, load_config, loading_info)


def refuse_incomplete(named: str, kind: type, missing: Iterable, unexpected: Iterable, mismatched: Iterable) -> None:
    """Refuse weights that are not those of the model `named`, of the class `kind`.

    Raises:
        ValueError: which names them.
    """
    shapes = [f"{name} {tuple(found)} instead of {tuple(wanted)}" for name, found, wanted in mismatched]
    faults = [
        f"{what} {_told(names)}"
        for what, names in (("lack", missing), ("have", unexpected), ("have in another shape", shapes))
        if names
    ]
    if faults:
        how = "ignore_mismatched_sizes=True makes those anew" if shapes else "output_loading_info=True loads the rest"
        raise ValueError(
            f"{named}: the weights {'; they '.join(faults)}; allowed: all tensors of {kind.__name__} as config.json "
            f"says and no others ({how})"
        )


def refuse_not_finite(named: str, model: torch.nn.Module) -> None:
    """Refuse NaN and infinity in the weights of a `model`, and weights that are nowhere.

    Raises:
        ValueError: which names them.
    """
    # Others are made by quantization, whose scales are its own, or lie on several machines.
    tensors = {n: t for n, t in model.state_dict().items() if type(t) is torch.Tensor and t.dtype in FLOATS}
    if not hasattr(model, "hf_device_map") and (nowhere := [name for name, one in tensors.items() if one.is_meta]):
        raise ValueError(f"{named}: the weights have shapes but no numbers in {_told(nowhere)}, allowed: numbers")
    tensors = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta and tensor.numel()}
    wrong = [name for name, tensor in tensors.items() if not torch.stack(torch.aminmax(tensor)).isfinite().all()]
    if wrong:
        raise ValueError(f"{named}: the weights hold NaN or infinity in {_told(wrong)}, allowed: finite numbers")


def check_weight_files(folder: Path, variant: str | None = None) -> None:
    """Refuse the weights in a `folder` that are damaged, empty, or an index of files that are not there or elsewhere.
    Pickles are left to PyTorch's restricted reader.

    Raises:
        ValueError: which names the file.
        OSError: for a file that an index names and that is not there, or cannot be read.
    """
    for name in WEIGHT_FILES:
        stem, dot, suffix = name.partition(".")
        if variant is not None:
            stem, dot = (stem, f".{variant}.")
        path = folder / f"{stem}{dot}{suffix}"
        if path.is_file():
            for file in indexed_files(path) if path.suffix == ".json" else [path]:
                _check_weight_file(file)
            return


def indexed_files(index: Path) -> list[Path]:
    """The files of weights that an `index` names, all of its own folder.

    Raises:
        ValueError: for what is no index, or names files elsewhere.
        OSError: for files that are not there.
    """
    content = read_json(index)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: no weight_map of tensors and files")
    paths = []
    for name in sorted(set(names.values())):
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise ValueError(f"{index}: names {name[:200]!r}, allowed: files of its own folder")
        paths.append(index.parent / name)
        if not paths[-1].is_file():
            raise FileNotFoundError(f"{paths[-1]}: no such file, but {index.name} names it")
    if not isinstance(content.get("metadata", {}), dict):
        raise ValueError(f"{index}: metadata is {content['metadata']!r:.100}, allowed: a JSON object")
    return paths


def _check_weight_file(path: Path) -> None:
    with open(path, "rb") as file:  # an OSError where it cannot be read
        start = file.read(2)
    if not start:
        raise ValueError(f"{path}: is empty, allowed: weights")
    if start[:1] == b"\x80" and path.suffix == ".bin" and start[1:] != b"\x02":
        raise ValueError(f"{path}: a pickle that PyTorch did not write, allowed: tensors alone; nothing was run")
    if path.suffix != ".safetensors":
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path}: no safetensors, or damaged ({line_of(error)})") from None


def _told(names: Iterable) -> str:
    names = sorted(map(str, names))
    more = f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
    return ", ".join(names[:NAMES_TOLD]) + more
