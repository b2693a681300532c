"""What PyTorch says of the precision of products. By itself, for each SETTING given, in a fork: what is said with it,
and what with it after `exact_float32` was held for a while."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch


# From the general to the particular.
PLACES = (
    "",
    "cudnn",
    "mkldnn",
    "cuda.matmul",
    "cudnn.conv",
    "cudnn.rnn",
    "mkldnn.matmul",
    "mkldnn.conv",
    "mkldnn.rnn",
)
FILE = Path(__file__).parents[1] / "modeling_encodec" / "models" / "precision_encodec.py"


def precisions() -> list[str]:
    """What each place says."""
    found = []
    for place in PLACES:
        owner = torch.backends
        for name in filter(None, place.split(".")):
            owner = getattr(owner, name)
        found.append(owner.fp32_precision)
    return found


def seen(setting: str, exact_float32) -> list[list[str]]:
    """What is said after `setting`, and then under each general one: what inherits follows that."""
    exec(setting)
    if exact_float32 is not None:
        before = precisions()
        with exact_float32():
            with exact_float32():
                pass
            assert set(precisions()) == {"ieee"}, precisions()
        assert precisions() == before, (precisions(), before)
    found = [precisions()]
    for precision in ("ieee", "tf32", "bf16", "none"):
        torch.backends.fp32_precision = precision
        found.append(precisions())
    return found


def in_a_fork(function, *arguments):
    """What `function` returns in a child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writer, "w") as file:
            json.dump(function(*arguments), file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        result = json.load(file)
    os.waitpid(child, 0)
    return result


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("precision_encodec", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for setting in sys.argv[1:]:
        print(json.dumps([in_a_fork(seen, setting, None), in_a_fork(seen, setting, module.exact_float32)]))
