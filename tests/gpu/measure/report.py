"""All parts as one value, and as Markdown that can go into docs/speed.md."""

import json
from pathlib import Path


def read_parts(folder: Path) -> dict[str, dict]:
    """Part -> what it found, of those that are there."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.stem != "gpu"}
    return {name: part for name, part in found.items() if "results" in part}


def markdown(parts: dict[str, dict]) -> str:
    """A table of what was said and one of times for each part, and with what it was measured."""
    lines = []
    for name, part in parts.items():
        about = ", ".join(f"{key} {value}" for key, value in part["about"].items())
        lines += [f"### {name}", ""]
        if part["rehearsal"]:
            lines += ["A rehearsal on a CPU in tiny sizes: no measurement.", ""]
        lines += [f"{about}.", ""]
        if part["limits"]:
            rates = ", ".join(f"{value:g} {key}" for key, value in part["limits"].items())
            lines += [f"The card's own rates: {rates}.", ""]
        lines += _said(part["results"]) + _times(part["results"], part["limits"])
        if not part["done"]:
            lines += ["Not finished: the same command goes on.", ""]
    return "\n".join(lines)


def _said(results: dict) -> list[str]:
    rows = [f"| {label} | {found['said']} |" for label, found in results.items() if "said" in found]
    return ["| | |", "|---|---|", *rows, ""] if rows else []


def _times(results: dict, limits: dict) -> list[str]:
    rows = []
    for label, found in results.items():
        for name, side in found.get("sides", {}).items():
            rows.append(f"| {label} | {name} | {' | '.join(_cells(side, found['sides'], found['seconds'], limits))} |")
    head = "| | | ms | x real time | to the fastest | peak GB | of FLOP/s | of bandwidth |"
    return [head, "|---|---|---|---|---|---|---|---|", *rows, ""] if rows else []


def _cells(side: dict, sides: dict, seconds: float | None, limits: dict) -> list[str]:
    if "error" in side:
        return [side["error"].replace("|", "/"), *[""] * 5]
    best = min(other["ms"] for other in sides.values() if "ms" in other)
    rate = limits.get(f"TFLOP/s {side.get('kind')}")
    return [
        f"{side['ms']:.2f}",
        f"{1000 * seconds / side['ms']:.0f}" if seconds else "",
        f"{best / side['ms']:.2f}",
        f"{side['peak_GB']:.2f}" if "peak_GB" in side else "",
        f"{side['GFLOP'] / side['ms'] / rate:.0%}" if rate and "GFLOP" in side else "",
        f"{1000 * side['GB'] / side['ms'] / limits['GB/s']:.0%}" if limits and "GB" in side else "",
    ]
