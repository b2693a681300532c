"""From the records of clips to results: one JSON, a table with a row for each clip and system, and a table to read.

evaluation.json   everything but times, so that the same evaluation gives the same file
evaluation.png    scores by bitrate, if Matplotlib is installed
timings.json      real-time factors, which differ from run to run
clips.csv         and, where pyarrow is installed, clips.parquet
results.md        means by system
"""

import csv
import hashlib
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from modeling_encodec.evaluation.clips import ALL
from modeling_encodec.evaluation.evaluation import Evaluation, clip_path, read_record
from modeling_encodec.evaluation.intervals import mean_interval
from modeling_encodec.system.atomic import atomic_path


logger = logging.getLogger(__name__)


def write_report(evaluation: Evaluation, folder: Path) -> dict:
    """Write all of a finished evaluation's results into `folder`; returns what `evaluation.json` holds.

    Raises:
        ValueError: if no clip could be read.
    """
    records = [_record(evaluation, folder, number) for number in range(len(evaluation.clips))]
    done = [record for record in records if "failed" not in record]
    if not done:
        raise ValueError(f"none of {len(records)} clips could be read, the first: {records[0]['failed']}")
    results = summarise(evaluation, records)
    _write_text(folder / "evaluation.json", json.dumps(results, indent=1) + "\n")
    _write_text(folder / "timings.json", json.dumps(_timings(evaluation, done), indent=1) + "\n")
    _write_text(folder / "results.md", table(results) + "\n")
    _write_rows(folder, _rows_of_clips(evaluation, done))
    try:
        from modeling_encodec.evaluation.plots import plot_rate_distortion, save_figure

        save_figure(plot_rate_distortion(results), folder / "evaluation.png")
    except ImportError as error:
        logger.warning("no picture: %s", error)
    return results


def _record(evaluation: Evaluation, folder: Path, number: int) -> dict:
    record = read_record(evaluation, folder, number)
    if record is None:
        raise ValueError(f"{clip_path(folder, number)}: changed since it was scored; the same command scores it anew")
    return record


def summarise(evaluation: Evaluation, records: Sequence[dict]) -> dict:
    """What `evaluation.json` holds, of the clips' records."""
    done = [record for record in records if "failed" not in record]
    rate = evaluation.model.config.sampling_rate
    described = evaluation.describe()
    categories = {name: [] for name in _categories(done)}
    for record in done:
        categories[record["category"]].append(record)
    data = {
        **described.pop("data"),
        "clips": len(done),
        "seconds": round(sum(record["samples"] for record in done) / rate, 3),
        "categories": {name: len(chosen) for name, chosen in categories.items()},
        "sha256": hashlib.sha256("".join(record["sha256"] for record in done).encode()).hexdigest(),
        "failed": {record["clip"]: record["failed"] for record in records if "failed" in record},
        "other_files": evaluation.other_files,
    }
    results = []
    for number, system in enumerate(evaluation.systems):
        for category, chosen in ({ALL: done} | (categories if len(categories) > 1 else {})).items():
            results.append(_result(system, category, chosen, number, evaluation.metrics, rate))
    described.pop("systems")
    described.pop("clips_sha256")
    codebooks = _codebook_use(sum(record["counts"] for record in done))
    return {**described, "data": data, "results": results, "codebooks": codebooks}


def table(results: dict) -> str:
    """Markdown: means over all clips, and over each category, of every system."""
    names = list(results["method"]["metrics"])
    lines = [
        f"| system | clips | kbps | measured | with LM | {' | '.join(names)} |",
        f"|---|---|---|---|---|{'---|' * len(names)}",
    ]
    for row in results["results"]:
        scores = (row["metrics"].get(name) for name in names)
        cells = [
            row["system"],
            row["category"].replace("|", "\\|"),
            _cell(row["kbps"], "g"),
            _cell(row["measured_kbps"], ".2f"),
            _cell(row["lm_kbps"], ".2f"),
            *("-" if score is None else _score(score) for score in scores),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _result(system, category: str, records: list[dict], number: int, metrics: Sequence[str], rate: int) -> dict:
    rows = [record["rows"][number] for record in records]
    seconds = sum(record["samples"] for record in records) / rate
    scores = {}
    for metric in metrics:
        values = [row["scores"][metric] for row in rows if row["scores"][metric] is not None]
        if values:
            interval = mean_interval(values)
            bounds = [None if math.isnan(bound) else round(bound, 6) for bound in (interval.low, interval.high)]
            scores[metric] = {
                "mean": round(interval.mean, 6),
                "low": bounds[0],
                "high": bounds[1],
                "clips": interval.count,
            }
    return {
        "system": system.name,
        "kbps": system.kbps,
        "category": category,
        "clips": len(records),
        "seconds": round(seconds, 3),
        "measured_kbps": _kbps([row["bytes"] for row in rows], seconds),
        "lm_kbps": _kbps([row["lm_bytes"] for row in rows], seconds),
        "lag": median(row["lag"] for row in rows),
        "metrics": scores,
    }


def _kbps(sizes: list[int | None], seconds: float) -> float | None:
    return None if None in sizes else round(8 * sum(sizes) / seconds / 1000, 6)


def _timings(evaluation: Evaluation, done: list[dict]) -> list[dict]:
    """Real-time factors (seconds of audio per second of work) of each system, over all clips."""
    rate, made = evaluation.model.config.sampling_rate, []
    seconds = sum(record["samples"] for record in done) / rate
    for number, system in enumerate(evaluation.systems):
        spent = [sum(record["rows"][number][f"{side}_seconds"] for record in done) for side in ("encode", "decode")]
        factors = [round(seconds / time, 2) if time else None for time in spent]
        made.append({"system": system.name, "kbps": system.kbps, "encode_rtf": factors[0], "decode_rtf": factors[1]})
    return made


def _codebook_use(total: np.ndarray) -> list[dict]:
    """Share of entries that are used at all, and perplexity (of `entries`, if all are used alike), by codebook, of
    counts (codebooks, entries)."""
    used = []
    for counts in total:
        shares = counts[counts > 0] / counts.sum()
        perplexity = math.exp(-float((shares * np.log(shares)).sum()))
        used.append({"used": round(float((counts > 0).mean()), 6), "perplexity": round(perplexity, 3)})
    return used


def _rows_of_clips(evaluation: Evaluation, done: list[dict]) -> list[dict]:
    rate, rows = evaluation.model.config.sampling_rate, []
    for record in done:
        seconds = record["samples"] / rate
        for row in record["rows"]:
            sizes = {name: row[name] for name in ("bytes", "lm_bytes")}
            rates = {
                name: None if size is None else 8 * size / seconds / 1000
                for name, size in zip(("measured_kbps", "lm_kbps"), sizes.values())
            }
            named = {"clip": record["clip"], "category": record["category"], "seconds": seconds}
            asked = {"system": row["system"], "kbps": row["kbps"]}
            rows.append(named | asked | sizes | rates | {"lag": row["lag"]} | row["scores"])
    return rows


def _write_rows(folder: Path, rows: list[dict]) -> None:
    with atomic_path(folder / "clips.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    with atomic_path(folder / "clips.parquet") as temporary:
        parquet.write_table(pyarrow.table(columns), temporary)


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def _categories(records: Sequence[dict]) -> list[str]:
    return sorted({record["category"] for record in records})


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _score(score: dict) -> str:
    if score["low"] is None:
        return f"{score['mean']:.2f}"
    return f"{score['mean']:.2f} ± {score['mean'] - score['low']:.2f}"
