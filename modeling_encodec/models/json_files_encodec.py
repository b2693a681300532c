# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""JSON files that come with a model (config.json, indexes of weights and the like), read as if anybody had made them,
and errors of loading in one line.

This file lies in `modeling_encodec` and in `processors` alike, for models and processors travel to the Hub each with
the files beside them; where the package is installed only the first is loaded.
"""

import json
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


# Real ones have a few kilobytes; the index of a model in a thousand shards has one megabyte.
MAX_JSON_BYTES = 1 << 24


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file.

    Raises:
        OSError: if it is no file, or cannot be read.
        ValueError: if it is no JSON in UTF-8, no object, too large, or names a key twice.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        what = "a folder, allowed: a file" if os.path.isdir(path) else "no such file"
        raise FileNotFoundError(f"{path}: {what}")
    with open(path, "rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{path}: over {MAX_JSON_BYTES >> 20} MB, allowed for a file of settings: less")
    if not data:
        raise ValueError(f"{path}: is empty, allowed: a JSON object")
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"{path}: no JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({line_of(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, allowed: a JSON object")
    return content


@contextmanager
def read_with_care(source, names: Iterable[str], subfolder: str | None = None) -> Iterator[None]:
    """Within it something is loaded from `source`, a folder or Hub id: the JSON files `names` of a folder are read as
    `read_json` does first, and errors are those of `one_line_errors`."""
    with one_line_errors(str(source)):
        if os.path.isdir(source):
            for path in (os.path.join(source, subfolder or "", name) for name in names):
                if os.path.lexists(path):
                    read_json(path)
        yield


def line_of(error: BaseException) -> str:
    """What an error says, in one line that is not long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:497]}..."


@contextmanager
def one_line_errors(named: str) -> Iterator[None]:
    """Within it, whatever goes wrong while `named` is loaded becomes a ValueError, or stays an OSError or ImportError,
    of one line. What an accelerator lacks in memory stays as it is."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(f"{named}: its weights are a pickle: {what_pickle_wants(str(error))}") from error
    except OSError as error:
        if "\n" not in str(error):
            raise
        raise OSError(line_of(error)) from error
    except ValueError as error:
        line = line_of(error)
        if named in line and "\n" not in str(error):
            raise
        raise ValueError(line if named in line else f"{named}: {line}") from error
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise ValueError(f"{named}: cannot be loaded ({type(error).__name__}: {line_of(error)})") from error


def what_pickle_wants(message: str) -> str:
    """What is wrong with a pickle, by what PyTorch's restricted reader said of it: never is anything in it run."""
    wanted = re.search(r"GLOBAL ([\w.]+)", message)
    if wanted is None:
        return "no PyTorch file, or a damaged one, or one with more than tensors in it"
    if wanted[1].startswith(("omegaconf.", "audiocraft.", "flashy.", "dora.")):
        return (
            f"a training checkpoint with objects in it ({wanted[1]}), which are not loaded; export it with "
            "audiocraft.utils.export.export_encodec"
        )
    return f"wants to run code or make objects ({wanted[1]}), allowed: tensors alone; nothing was run"


def _unique(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in content if names.count(name) > 1)
        raise ValueError(f"{twice[:100]!r} is there twice")
    return content
