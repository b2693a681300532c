"""Clips and annotators made up for the tests of listening tests."""

import csv
import json
from dataclasses import dataclass

import numpy as np


COLUMNS = [
    "session_test_id",
    "listener",
    "session_uuid",
    "trial_id",
    "rating_stimulus",
    "rating_score",
    "rating_time",
    "rating_comment",
]
SYSTEMS = ["reference", "good", "bad", "anchor35", "anchor70"]
# Of an annotator who hears well; scores vary by up to 4 around them.
MEANS = {"reference": 96, "good": 70, "bad": 30, "anchor35": 12, "anchor70": 40}


@dataclass
class MadeClip:
    """A clip that is already decoded."""

    name: str
    category: str
    audio: np.ndarray

    def read(self, sampling_rate, channels):
        return np.repeat(self.audio, channels, axis=0)


def made_clips(counts=None, *, seconds=1.5, rate=24000):
    """Noise, each clip of its own, as many in each category as asked."""
    clips = []
    for category, count in (counts or {"speech": 5, "music": 6}).items():
        for number in range(count):
            rng = np.random.default_rng([number, *category.encode()])
            audio = 0.1 * rng.standard_normal((1, round(seconds * rate))).astype(np.float32)
            clips.append(MadeClip(f"{category}_{number}", category, audio))
    return clips


def write_key(path, trials=10):
    """A key of `trials` trials, every other one of speech, labels in another order each; its content."""
    made = []
    for number in range(trials):
        order = np.roll(SYSTEMS[1:], number).tolist()
        stimuli = {f"C{place + 1:02}": {"system": system} for place, system in enumerate(order)}
        category = ["speech", "music"][number % 2]
        made.append({"id": f"t{number}", "category": category, "clip": f"clip{number}", "stimuli": stimuli})
    key = {"format": 1, "test_id": "mushra-0a", "systems": SYSTEMS, "trials": made}
    path.write_text(json.dumps(key))
    return key


def rate(key, annotator, *, offset=0, means=MEANS, odd=None):
    """Rows of an annotator of every trial: the means, `offset` off; `odd`: system -> scores of the first trials."""
    rows = []
    for number, trial in enumerate(key["trials"]):
        labels = {"reference": "reference"} | {label: one["system"] for label, one in trial["stimuli"].items()}
        for label, system in labels.items():
            special = (odd or {}).get(system, [])
            score = special[number] if number < len(special) else means[system] + offset
            row = [key["test_id"], annotator, f"uuid of {annotator}", trial["id"], label, str(score), "4000", ""]
            rows.append(dict(zip(COLUMNS, row)))
    return rows


def write_results(path, rows, delimiter=",", encoding="utf-8", columns=COLUMNS):
    """The rows as webMUSHRA writes them, or as a spreadsheet saves them."""
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, columns, delimiter=delimiter, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path
