"""The device checks for real: `doctor` on the card, and the tests of tests/gpu, which take it where there is one."""

import importlib.util
import subprocess
import sys

from bench import ROOT


def measure(bench) -> None:
    """Doctor, then pytest."""
    bench.try_note("doctor", lambda: _doctor(bench.device))
    bench.try_note("tests/gpu", lambda: _tests(bench.rehearse))


def _doctor(device: str) -> str:
    from modeling_encodec.doctor.examination import examine, lines_of

    found = examine([device])
    print("\n".join(lines_of(found)))
    wrong = [problem for problem in found.problems if problem.startswith(device)]
    return "; ".join(wrong) if wrong else f"right in {', '.join(one['precision'] for one in found.checkups)}"


def _tests(rehearse: bool) -> str:
    for name in ("pytest", "soundfile", "constriction"):
        if importlib.util.find_spec(name) is None:
            return f"not run: {name} is not installed"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    words += ["--collect-only"] * rehearse
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=380)
    print(run.stdout[-6000:])
    return (run.stdout.strip() or run.stderr.strip() or "no output").splitlines()[-1]
