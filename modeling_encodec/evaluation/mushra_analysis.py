"""Means of a MUSHRA test with 95 % intervals, after the paper's screening of annotators (4.3).

An annotator is dropped who rates the hidden reference below 90 in at least 20 % of cases, or the low anchor above 80
in more than 50 %. Every sample needs 10 annotations by those who remain. Intervals are over all ratings, as the
paper's presumably are. The price: ratings of one sample, or by one annotator, go together, so that these intervals are
narrower than what holds for other samples or listeners; `over` takes the means of samples or annotators instead.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from modeling_encodec.evaluation.intervals import mean_interval
from modeling_encodec.evaluation.mushra_key import ANNOTATIONS, LOW_ANCHOR, REFERENCE, MushraKey, read_key
from modeling_encodec.evaluation.mushra_results import Rating, read_ratings
from modeling_encodec.evaluation.plots import as_label, new_figure, save_figure
from modeling_encodec.system.atomic import atomic_path


REFERENCE_BELOW, REFERENCE_SHARE = 90, 0.2
ANCHOR_ABOVE, ANCHOR_SHARE = 80, 0.5
RULE = (
    f"dropped: who rates the hidden reference below {REFERENCE_BELOW} in at least {REFERENCE_SHARE:.0%} of cases, or "
    f"the low anchor above {ANCHOR_ABOVE} in more than {ANCHOR_SHARE:.0%} of cases"
)
# What the values of an interval are: each rating, or the mean of those that share a sample or an annotator.
OVER = {"ratings": None, "samples": "trial", "annotators": "annotator"}
NAMED = 5  # samples that an error names


def analyse_mushra(
    results: Iterable[str | os.PathLike],
    key: str | os.PathLike,
    *,
    annotations: int = ANNOTATIONS,
    allow_fewer: bool = False,
    over: str = "ratings",
    annotator: str | None = None,
) -> dict:
    """What a listening test found, as it goes into `mushra.json`.

    Args:
        results: webMUSHRA's CSV files.
        key: the test's `key.json`.
        annotations: what each sample needs after the screening; with `allow_fewer` those with fewer are only named.
        over: what an interval takes as independent values: ratings, samples or annotators.
        annotator: the results' column that tells annotators apart (default: `listener`, else `session_uuid`).

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if files do not fit the key, samples have too few annotations, or nobody is left.
    """
    if over not in OVER:
        raise ValueError(f"over is {over!r}, allowed: {', '.join(OVER)}")
    if annotations < 1:
        raise ValueError(f"annotations is {annotations}, allowed: 1 or more")
    test = read_key(key)
    ratings = read_ratings(results, test, annotator=annotator)
    annotators = screen(ratings)
    dropped = [one for one in annotators if one["reasons"]]
    out = {one["annotator"] for one in dropped}
    kept = [rating for rating in ratings if rating.annotator not in out]
    if not kept:
        raise ValueError(f"all {len(annotators)} annotators are dropped by the screening, needed: at least one left")
    counts, short = _annotations(kept, test, annotations, allow_fewer)
    return {
        "test_id": test.test_id,
        "screening": RULE,
        "annotators": {"all": len(annotators), "kept": len(annotators) - len(dropped), "dropped": dropped},
        "annotations": {
            "needed": annotations,
            "minimum": min(counts),
            "median": median(counts),
            "samples": len(counts),
            "samples_with_fewer": short,
        },
        "interval": {"level": 0.95, "distribution": "Student's t", "over": over},
        "categories": test.categories,
        "systems": {system: _means(kept, test, system, over) for system in test.systems},
    }


def screen(ratings: Iterable[Rating]) -> list[dict]:
    """Every annotator, sorted: trials rated, the two shares of the screening rule, and reasons to drop, if any."""
    scores = defaultdict(lambda: {REFERENCE: [], LOW_ANCHOR: []})
    for rating in ratings:
        if rating.system in (REFERENCE, LOW_ANCHOR):
            scores[rating.annotator][rating.system].append(rating.score)
    found = []
    for annotator, of in sorted(scores.items()):
        cases = len(of[REFERENCE])
        below = sum(score < REFERENCE_BELOW for score in of[REFERENCE]) / cases
        above = sum(score > ANCHOR_ABOVE for score in of[LOW_ANCHOR]) / cases
        reasons = []
        if below >= REFERENCE_SHARE:
            reasons.append(f"hidden reference below {REFERENCE_BELOW} in {below:.0%} of {cases} cases")
        if above > ANCHOR_SHARE:
            reasons.append(f"low anchor above {ANCHOR_ABOVE} in {above:.0%} of {cases} cases")
        found.append(
            {
                "annotator": annotator,
                "trials": cases,
                "reference_below": below,
                "low_anchor_above": above,
                "reasons": reasons,
            }
        )
    return found


def _annotations(
    kept: Sequence[Rating], test: MushraKey, needed: int, allow_fewer: bool
) -> tuple[list[int], list[dict]]:
    """Annotations of every sample, and the samples that have too few."""
    counts = dict.fromkeys(test.trials, 0)
    for rating in kept:
        counts[rating.trial] += rating.system == REFERENCE
    short = [
        {
            "trial": trial,
            "category": test.trials[trial].category,
            "clip": test.trials[trial].clip,
            "annotations": count,
        }
        for trial, count in sorted(counts.items())
        if count < needed
    ]
    if short and not allow_fewer:
        named = ", ".join(
            f"{one['trial']} ({one['category']}, {one['clip']}) {one['annotations']}" for one in short[:NAMED]
        )
        more = f" and {len(short) - NAMED} more" if len(short) > NAMED else ""
        raise ValueError(
            f"{len(short)} of {len(counts)} samples have fewer than {needed} annotations after the screening: "
            f"{named}{more}; allowed: {needed} or more, or fewer than asked (allow_fewer)"
        )
    return list(counts.values()), short


def _means(kept: Sequence[Rating], test: MushraKey, system: str, over: str) -> dict:
    """Intervals of one system: over all, and in every category (none where nobody rated it)."""
    of_system = [rating for rating in kept if rating.system == system]
    by_category = defaultdict(list)
    for rating in of_system:
        by_category[test.trials[rating.trial].category].append(rating)
    return {
        "all": _interval(of_system, over),
        "categories": {name: _interval(by_category[name], over) for name in test.categories if by_category[name]},
    }


def _interval(ratings: Sequence[Rating], over: str) -> dict:
    shared = OVER[over]
    values = [rating.score for rating in ratings]
    if shared:
        groups = defaultdict(list)
        for rating in ratings:
            groups[getattr(rating, shared)].append(rating.score)
        values = [math.fsum(scores) / len(scores) for scores in groups.values()]
    found = mean_interval(values)
    low, high = (None if math.isnan(bound) else bound for bound in (found.low, found.high))
    return {"mean": found.mean, "low": low, "high": high, "count": found.count}


# ---- what is shown and kept ----------------------------------------------------------------------------------------


def mushra_table(report: dict) -> list[str]:
    """The report's means and half intervals as lines of text, a system each."""
    columns = ["all", *report["categories"]]
    width = max(len(name) for name in report["systems"])
    lines = [" ".join([" " * width, *(f"{name:>14}" for name in columns)])]
    for system, found in report["systems"].items():
        cells = [_cell(found["all"]), *(_cell(found["categories"].get(name)) for name in report["categories"])]
        cells = [f"{cell:>{max(14, len(name))}}" for name, cell in zip(columns, cells)]
        lines.append(" ".join([f"{system:{width}}", *cells]))
    return lines


def _cell(interval: dict | None) -> str:
    if interval is None:
        return "-"
    if interval["low"] is None:
        return f"{interval['mean']:.1f}"
    return f"{interval['mean']:.1f} ± {(interval['high'] - interval['low']) / 2:.1f}"


def save_mushra(report: dict, folder: str | os.PathLike) -> list[Path]:
    """Write `mushra.json` and `mushra.png`, a figure of the means and intervals, into `folder`; their paths.

    Raises:
        ImportError: without Matplotlib; nothing is written then.
    """
    systems, columns = report["systems"], ["all", *report["categories"]]
    figure = new_figure(3 + 0.2 * len(systems) * len(columns), 4.5)
    axis = figure.subplots()
    for index, column in enumerate(columns):
        found = [one["all"] if index == 0 else one["categories"].get(column) for one in systems.values()]
        there = [(place, one) for place, one in enumerate(found) if one is not None]
        offset = 0.7 * ((index + 0.5) / len(columns) - 0.5)
        means = [one["mean"] for _, one in there]
        halves = [0.0 if one["low"] is None else one["high"] - one["mean"] for _, one in there]
        style = {"color": "black", "marker": "D"} if index == 0 else {"marker": "o"}
        style |= {"label": as_label(column), "linestyle": "", "capsize": 3}
        axis.errorbar([p + offset for p, _ in there], means, halves, **style)
    axis.set_xticks(range(len(systems)), map(as_label, systems), rotation=30, ha="right")
    axis.set(ylim=(0, 100), ylabel=f"MUSHRA score, mean and 95 % interval over {report['interval']['over']}")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize="small")
    folder = Path(folder)
    save_figure(figure, folder / "mushra.png")
    with atomic_path(folder / "mushra.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [folder / "mushra.json", folder / "mushra.png"]
