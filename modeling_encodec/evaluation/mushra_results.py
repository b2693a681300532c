"""webMUSHRA's results, checked: every rating is of a stimulus that there is, once, and no trial is half rated.

webMUSHRA writes one row a rating: `session_test_id`, a column for each question asked at the end, `session_uuid`
(newer versions), `trial_id`, `rating_stimulus`, `rating_score`, `rating_time`, `rating_comment`. A spreadsheet's byte
order mark and semicolons are read as well. What does not fit is an error and not left out in silence.
"""

import csv
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from modeling_encodec.evaluation.mushra_key import LISTENER, MushraKey


COLUMNS = ("session_test_id", "trial_id", "rating_stimulus", "rating_score")
# What tells annotators apart, the first that a file has; webMUSHRA makes a new `session_uuid` for each visit.
ANNOTATORS = (LISTENER, "session_uuid")


class Rating(NamedTuple):
    """One annotator's score, 0 to 100, of one system in one trial."""

    trial: str
    annotator: str
    system: str
    score: float


def read_ratings(paths: Iterable[str | os.PathLike], key: MushraKey, *, annotator: str | None = None) -> list[Rating]:
    """All ratings of result files, sorted, whatever the order of rows and files.

    Args:
        paths: webMUSHRA's CSV files.
        key: of the test, from `read_key`.
        annotator: the column that tells annotators apart (default: `listener`, else `session_uuid`).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and row, if a file is no result of this test, if a score is not 0 to 100, or if an
            annotator rated a trial twice or in part.
    """
    trials = {}  # (trial, annotator) -> label -> (score, where)
    for path in paths:
        for where, row, person in _rows(Path(path), annotator):
            trial, label, score = _checked(where, row, key)
            rated = trials.setdefault((trial, person), {})
            if label in rated:
                raise ValueError(
                    f"{where}: annotator {person!r} rated {label} of trial {trial} before ({rated[label][1]}), "
                    "allowed: once"
                )
            rated[label] = score, where
    ratings = []
    for (trial, person), rated in trials.items():
        systems = key.trials[trial].systems
        missing = sorted(set(systems) - set(rated))
        if missing:
            _, first = next(iter(rated.values()))
            raise ValueError(
                f"{first}: annotator {person!r} rated {len(rated)} of {len(systems)} stimuli of trial {trial}, "
                f"missing: {', '.join(missing)}"
            )
        ratings += [Rating(trial, person, systems[label], score) for label, (score, _) in rated.items()]
    return sorted(ratings)


def _rows(path: Path, annotator: str | None) -> Iterator[tuple[str, dict[str, str], str]]:
    """Where each row is, what it holds, and whose it is."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        delimiter = ";" if first.count(";") > first.count(",") else ","
        lines = list(csv.reader(io.StringIO(text), delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{path}: not readable, allowed: the CSV that webMUSHRA writes, in UTF-8") from None
    header, rows = (lines[0], lines[1:]) if lines else ([], [])
    if not any(rows):
        raise ValueError(f"{path}: holds no ratings")
    column = annotator or next((name for name in ANNOTATORS if name in header), LISTENER)
    missing = [name for name in (*COLUMNS, column) if name not in header]
    if missing:
        raise ValueError(f"{path}: has no column {missing[0]!r}, but {', '.join(header)[:200]}")
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        where = f"{path}, row {number}"
        if len(row) != len(header):
            raise ValueError(f"{where}: has {len(row)} values, allowed: {len(header)}, one a column")
        named = {name: value.strip() for name, value in zip(header, row)}
        if not named[column]:
            raise ValueError(f"{where}: {column} is empty, needed: whose rating it is")
        yield where, named, named[column]


def _checked(where: str, row: dict[str, str], key: MushraKey) -> tuple[str, str, float]:
    """Trial, label and score of a row."""
    test, trial, label, score = (row[name] for name in COLUMNS)
    if test != key.test_id:
        raise ValueError(f"{where}: is of the test {test!r}, allowed: {key.test_id!r}, the key's")
    if trial not in key.trials:
        raise ValueError(f"{where}: trial_id is {trial!r}, allowed: one of the key's {len(key.trials)} trials")
    labels = key.trials[trial].systems
    if label not in labels:
        raise ValueError(f"{where}: rating_stimulus is {label!r}, allowed: {', '.join(labels)}")
    try:
        value = float(score)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 100:
        raise ValueError(f"{where}: rating_score is {score!r}, allowed: 0 to 100")
    return trial, label, value
