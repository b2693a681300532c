"""Converted models on disk: a folder for Transformers and this package, or a file of the original.

Both are written beside their place, read again and compared bit for bit, and only then given their name.
"""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from modeling_encodec.checkpoints.released import checksum_in_name
from modeling_encodec.conversion.verification import check_equal
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.processors.feature_extraction_encodec import EncodecFeatureExtractor
from modeling_encodec.system.atomic import atomic_folder, atomic_path


FORMS = ("folder", "original")


def form_of(to: str | None, target: Path) -> str:
    """Which of `FORMS` is asked for: what `to` says, or what `target` is called.

    Raises:
        ValueError: for another form, or a name that contradicts it.
    """
    if to is None:
        return "original" if target.suffix == ".th" else "folder"
    if to not in FORMS:
        raise ValueError(f"--to is {to!r}, allowed: {' or '.join(FORMS)}")
    if to == "folder" and target.suffix == ".th":
        raise ValueError(f"{target} is called as a file of the original, allowed with --to folder: another name")
    return to


def check_target(source: Path, target: Path, form: str, force: bool) -> None:
    """Refuse a target that exists and may not be replaced, or that holds the source.

    Raises:
        FileExistsError: without `force`, or for what is neither a model's folder nor, for the original's form, a file.
        ValueError: if the source would be replaced.
    """
    if not target.exists() or (form == "original" and target.is_dir()):
        return  # nothing is there, or a folder that a new file goes into
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"{target} is the source or holds it, allowed: another place")
    if not force:
        raise FileExistsError(f"{target} exists; --force overwrites it")
    replaceable = target.is_file() if form == "original" else _is_model_folder(target)
    if not replaceable:
        what = "file" if form == "original" else "folder of a model"
        raise FileExistsError(f"{target} exists and is no {what}; it is not overwritten")


def _is_model_folder(path: Path) -> bool:
    return path.is_dir() and ((path / "config.json").is_file() or not any(path.iterdir()))


def write_folder(model: EncodecModel | EncodecLM, target: Path) -> list[Path]:
    """Write a model, and a codec's feature extractor, as the folder `target`, in place of one that is there.

    Returns the files. Our class and, of codecs that it takes, Transformers' have loaded it before it gets its name.
    """
    with atomic_folder(target) as folder:
        model.save_pretrained(folder)
        config, state = model.config, model.state_dict()
        check_equal(type(model).from_pretrained(folder).state_dict(), state, "the folder written")
        if isinstance(model, EncodecModel):
            EncodecFeatureExtractor.for_model(config).save_pretrained(folder)
            if transformers_loads(config):
                stock = transformers.EncodecModel.from_pretrained(folder)
                check_equal(stock.state_dict(), state, "the folder written, loaded by Transformers,")
    return sorted(path for path in target.rglob("*") if path.is_file())


def transformers_loads(config: EncodecConfig) -> bool:
    """Whether Transformers' own class takes the configuration: only codebooks of a power of two entries."""
    return config.codebook_size & (config.codebook_size - 1) == 0


def write_original(state: Mapping[str, torch.Tensor], target: Path, name: str) -> list[Path]:
    """Write a state dict of the original to the file `target`, or into the folder `target` as NAME-xxxxxxxx.th with
    the checksum of its bytes. Returns the file.

    Raises:
        ValueError: if the name of `target` promises another checksum than the file has.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    data = buffer.getvalue()
    check_equal(torch.load(io.BytesIO(data), weights_only=True), state, "the file written")
    sha256 = hashlib.sha256(data).hexdigest()
    path = target / f"{name}-{sha256[:8]}.th" if target.is_dir() else target
    promised = checksum_in_name(path)
    if promised and not sha256.startswith(promised):
        raise ValueError(
            f"{path}: the name promises the checksum {promised}, the file's is {sha256[:8]}; give a name without "
            "checksum, or a folder"
        )
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return [path]
