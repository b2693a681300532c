"""Model folders as damage, mistakes and malice leave them: each a change to a good folder, and what is said of it."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


WEIGHTS, BIN, INDEX = "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


def with_config(**fields) -> Callable[[Path], None]:
    """Other fields in config.json."""

    def change(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | fields))

    return change


def with_text(name: str, text: str | bytes) -> Callable[[Path], None]:
    """Another file `name`."""
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode()) and None


def with_tensors(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    """Other tensors, what `change` makes of the good ones."""

    def save(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})

    return save


def with_bin(change: Callable[[dict], object], damage: Callable[[bytes], bytes] = bytes) -> Callable[[Path], None]:
    """A pickle of PyTorch's in place of the safetensors."""

    def save(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        torch.save(change(state), folder / BIN)
        (folder / BIN).write_bytes(damage((folder / BIN).read_bytes()))

    return save


def with_pickle(folder: Path) -> None:
    """A plain pickle of an object that runs code, under the name of weights."""
    (folder / WEIGHTS).unlink()
    (folder / BIN).write_bytes(pickle.dumps(Evil(folder.parent / "RAN")))


def with_index(weight_map: object, metadata: object = None) -> Callable[[Path], None]:
    """An index of weights, and no weights beside it."""

    def save(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(json.dumps({"metadata": metadata or {}, "weight_map": weight_map}))

    return save


def in_shards(folder: Path, lost: int = 0) -> None:
    """The good weights in two files, of the second without its last `lost` tensors."""
    state = load_file(folder / WEIGHTS)
    names = sorted(state)
    parts = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for name, part in parts.items():
        kept = part[: len(part) - lost] if name.startswith("b") else part
        save_file({key: state[key] for key in kept}, folder / name, metadata={"format": "pt"})
    with_index({key: name for name, part in parts.items() for key in part})(folder)


def as_folder(name: str) -> Callable[[Path], None]:
    """A folder in the place of the file `name`."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


FIRST = "encoder.layers.0.conv.bias"
NOT_WHOLE = {
    "one tensor missing": (with_tensors(lambda s: {k: s[k] for k in s if k != FIRST}), f"lack {FIRST}; allowed"),
    "no encoder": (with_tensors(lambda s: {k: s[k] for k in s if k[:2] != "en"}), r"lack encoder\..* and \d+ more"),
    "no tensor at all": (with_tensors(lambda s: {"x": torch.zeros(1)}), r"lack decoder\..*; they have x; allowed"),
    "one tensor more": (with_tensors(lambda s: s | {"encoder.x": torch.zeros(1)}), "have encoder.x; allowed"),
    "another shape": (with_tensors(lambda s: s | {FIRST: torch.zeros(3)}), rf"{FIRST} \(3,\) instead of \(4,\)"),
    "NaN": (with_tensors(lambda s: s | {FIRST: s[FIRST] * torch.nan}), f"NaN or infinity in {FIRST}"),
    "infinity": (with_tensors(lambda s: s | {FIRST: s[FIRST] / 0}), f"NaN or infinity in {FIRST}"),
    "cut off": (lambda f: os.truncate(f / WEIGHTS, 5000), f"{WEIGHTS}: no safetensors, or damaged"),
    "other bytes": (with_text(WEIGHTS, b"\xff" * 99), f"{WEIGHTS}: no safetensors, or damaged"),
    "header of a petabyte": (with_text(WEIGHTS, b"\0\0\0\0\0\0\4\0{}"), "no safetensors, or damaged"),
    "empty weights": (with_text(WEIGHTS, b""), f"{WEIGHTS}: is empty"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no file named model.safetensors"),
    "a folder as weights": (as_folder(WEIGHTS), "no file named model.safetensors"),
}
PICKLES = {
    "a pickle with code": (with_pickle, f"{BIN}: a pickle that PyTorch did not write.*nothing was run"),
    "a pickle with code inside": (with_bin(lambda s: {"a": Evil(Path("RAN"))}), r"code or make objects .posix.system"),
    "a pickled list": (with_bin(lambda s: [1, 2]), "cannot be loaded"),
    "numbers for tensors": (with_bin(lambda s: s | {FIRST: 3}), "cannot be loaded"),
    "names that are none": (with_bin(lambda s: {1: torch.zeros(1)}), "cannot be loaded"),
    "tensors without numbers": (with_bin(lambda s: s | {FIRST: s[FIRST].to("meta")}), "cannot be loaded"),
    "a sparse tensor": (with_bin(lambda s: s | {FIRST: s[FIRST].to_sparse()}), "cannot be loaded"),
    "a pickle cut off": (with_bin(dict, lambda data: data[:-3000]), "cannot be loaded"),
    "an empty pickle": (with_bin(dict, lambda data: b""), f"{BIN}: is empty"),
    "a pickle of noise": (with_bin(dict, lambda data: b"\x80\4noise"), f"{BIN}: a pickle that PyTorch did not write"),
    "text for a pickle": (with_bin(dict, lambda data: b"hello"), "cannot be loaded"),
}
INDEXES = {
    "an index to elsewhere": (
        with_index({"a": "../../../../etc/passwd"}),
        "names '../../.*', allowed: files of",
    ),
    "an index to a path": (with_index({"a": "/etc/passwd"}), "names '/etc/passwd', allowed: files of its own folder"),
    "an index to below": (with_index({"a": "below/x.safetensors"}), "names 'below/x.safetensors', allowed"),
    "an index to nothing": (with_index({"a": "x.safetensors"}), "x.safetensors: no such file, but .*index.json names"),
    "an index to itself": (with_index({"a": "."}), "names '.', allowed"),
    "an index to text": (with_index({"a": "config.json"}), "a pickle: no PyTorch file, or a damaged one"),
    "an index of no names": (with_index([]), "no weight_map"),
    "an index of numbers": (with_index({"a": 3}), "no weight_map"),
    "an index without metadata": (with_index({"a": "config.json"}, "x"), "metadata is 'x'"),
    "shards that lack a tensor": (lambda f: in_shards(f, lost=1), "lack quantizer.*inited; allowed"),
}
TEXTS = {
    **{"null": ("null", "holds a NoneType"), "a list": ("[]", "holds a list"), "a number": ("3", "holds a int")},
    **{"text": ('"x"', "holds a str"), "nothing": ("", "is empty"), "half": ('{"a":', "no JSON .Expecting value")},
    **{"no UTF-8": (b"\xff\xfe{}", "no JSON .'utf-8' codec"), "depth": ("[" * 200_000, "no JSON .nested too")},
    **{
        "depth of objects": ('{"a":' * 200_000, "no JSON .nested too"),
        "size": (b" " * 2**24 + b"{}", "over 16 MB"),
    },
    **{"a key twice": ('{"overlap": 0, "overlap": 1}', "no JSON .'overlap' is there twice")},
    **{"a number of 5000 digits": ('{"num_filters": ' + "9" * 5000 + "}", "no JSON .Exceeds the limit")},
}
CONFIGS = {
    **{
        f"{name} as config.json": (with_text("config.json", text), f"config.json: {said}")
        for name, (text, said) in TEXTS.items()
    },
    "an object without anything": (with_text("config.json", "{}"), "no config.json in it, or an empty one"),
    "no model_type": (with_text("config.json", '{"num_filters": 4}'), "model_type is None, allowed: 'encodec'"),
    "another model_type": (with_config(model_type="bert"), "model_type is 'bert', allowed: 'encodec'"),
    "a model_type that is none": (with_config(model_type=["encodec"]), r"model_type is \['encodec'\], allowed"),
    "a folder as config.json": (as_folder("config.json"), "no config.json in it"),
    "a width that the weights have not": (with_config(num_filters=8), r"\(64,\) instead of \(128,\)"),
    "more codebooks than the weights": (with_config(target_bandwidths=[24.0]), "lack quantizer.layers"),
    "a dtype that is none": (with_config(dtype="floot"), "no attribute 'floot'"),
    "a dtype of a number": (with_config(dtype=7), "cannot be loaded"),
    "a name of a method": (with_config(chunk_spans=3), "chunk_spans is no setting of a EncodecConfig"),
    "a name of what is derived": (with_config(hop_length=3), "hop_length is no setting of a EncodecConfig"),
    "labels without end": (with_config(num_labels=10**12), "num_labels is 1000000000000, allowed: 0 to 65536"),
    "labels that are none": (with_config(id2label=[1]), "a setting of Transformers' own cannot be"),
    "weights elsewhere": (with_config(transformers_weights="../x.safetensors"), "inside the model directory"),
    "quantization that is none": (with_config(quantization_config=3), "cannot be loaded"),
}
ALL = NOT_WHOLE | PICKLES | INDEXES | CONFIGS
