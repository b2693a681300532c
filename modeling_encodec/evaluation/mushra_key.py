"""The key of a listening test: which system is behind which anonymous stimulus. It is never served to listeners."""

import json
import os
from dataclasses import dataclass
from pathlib import Path


FORMAT = 1
# The name under which webMUSHRA itself adds the reference to each trial's stimuli, hidden.
REFERENCE = "reference"
LOW_ANCHOR = "anchor35"
MID_ANCHOR = "anchor70"
# Annotations of each sample (paper 4.3).
ANNOTATIONS = 10
# What listeners are asked for at the end, a column of webMUSHRA's results.
LISTENER = "listener"


@dataclass(frozen=True)
class MushraTrial:
    """One sample: the category and clip it is of, and the system behind every label, the reference's included."""

    category: str
    clip: str
    systems: dict[str, str]


@dataclass(frozen=True)
class MushraKey:
    """What the analysis needs of `key.json`: systems in the order of reports, trials by their ids."""

    test_id: str
    systems: list[str]
    trials: dict[str, MushraTrial]

    @property
    def categories(self) -> list[str]:
        """Sorted."""
        return sorted({trial.category for trial in self.trials.values()})


def read_key(path: str | os.PathLike) -> MushraKey:
    """The key in the file `path`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no key, or one of a format unknown here.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        found = content["format"]
        if found == FORMAT:
            trials = {
                trial["id"]: MushraTrial(
                    trial["category"],
                    trial["clip"],
                    {REFERENCE: REFERENCE}
                    | {label: stimulus["system"] for label, stimulus in trial["stimuli"].items()},
                )
                for trial in content["trials"]
            }
            return MushraKey(content["test_id"], content["systems"], trials)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: is no key of a listening test, allowed: the key.json that prepare wrote") from None
    raise ValueError(f"{path}: key of format {found!r}, allowed: {FORMAT}")
