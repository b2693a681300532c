"""Runs that several processes share through a folder, and that go on where they were stopped.

What decides the results is written to `run.json` when a run begins; a folder with another is refused. Results are
files that appear whole, so what is there need not be made again, whoever made it.
"""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from modeling_encodec.atomic import atomic_path


def start_run(description: dict, folder: Path, results: str, *, force: bool = False) -> None:
    """Make the folder, or go on in it. `results` is the folder in it that results lie in; `force` deletes those.

    Raises:
        FileExistsError: if it holds something else, or another run and `force` is not set.
        ValueError: if what it holds is damaged.
    """
    begun = folder / "run.json"
    if not begun.exists():
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} holds other things, allowed: a new folder, or that of this run")
    elif force:
        for path in (folder / results).glob("*"):
            path.unlink()
    else:
        _check_same(description, begun)
    with atomic_path(begun) as temporary:
        temporary.write_text(json.dumps(description, indent=1))
    (folder / results).mkdir(exist_ok=True)


def join_processes() -> tuple[int, int, Callable[[], None]]:
    """Number of this process, how many a launcher started, and what waits for all of them.

    Raises:
        ImportError: if there are several, and Accelerate is missing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, lambda: None
    import torch
    from accelerate import PartialState

    # A process that is done waits for the slowest, for as long as that takes.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=30))
    return state.process_index, state.num_processes, state.wait_for_everyone


def _check_same(description: dict, begun: Path) -> None:
    try:
        old = dict(json.loads(begun.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{begun}: damaged; --force begins anew") from None
    changed = ", ".join(key for key in description if description[key] != old.get(key))
    if changed:
        raise FileExistsError(f"{begun.parent} holds another run ({changed} differ); --force begins anew")
