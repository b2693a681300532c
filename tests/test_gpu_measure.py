"""`make gpu` without a GPU: every part is rehearsed on the CPU, results are kept, what is missing is gone on with."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


MEASURE = Path(__file__).parent / "gpu" / "measure"
sys.path.insert(0, str(MEASURE))
import bench as measuring  # noqa: E402
from report import markdown, read_parts  # noqa: E402
from work import work_of  # noqa: E402

from modeling_encodec.doctor.examination import examine  # noqa: E402
from modeling_encodec.models.precision_encodec import has_bfloat16  # noqa: E402


QUICK = ("codes", "files", "kernels", "lm")
SLOW = ("devices", "codec", "streams", "tokenizing", "training")


def measure(*words, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, MEASURE, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=540, **options)


def all_is_well(out: Path, part: str) -> dict:
    """The part's results, none of which failed."""
    found = json.loads((out / f"{part}.json").read_text())
    assert found["done"] and found["rehearsal"] and found["results"]
    for label, result in found["results"].items():
        assert "FAILED" not in result.get("said", "") and "WRONG" not in result.get("said", ""), (label, result)
        assert "NOT" not in result.get("said", ""), (label, result)
        for side, times in result.get("sides", {}).items():
            assert "error" not in times and times["ms"] > 0, (label, side, times)
    return found["results"]


# ---- the parts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("gpu")
    done = measure("--rehearse", "--out", out, *QUICK, cwd=out)  # from anywhere
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.parametrize("part", QUICK)
def test_a_quick_part_is_rehearsed(quick, part):
    all_is_well(quick, part)


@pytest.mark.slow
@pytest.mark.parametrize("part", SLOW)
def test_a_slow_part_is_rehearsed(tmp_path, part):
    done = measure("--rehearse", "--out", tmp_path, part)
    assert done.returncode == 0, done.stdout + done.stderr
    all_is_well(tmp_path, part)


def test_what_the_parts_say_of_a_cpu_beside_itself(quick):
    codes = all_is_well(quick, "codes")
    exact = [result["said"] for label, result in codes.items() if label.endswith("exact")]
    assert len(exact) == 4 and all("(100.000%), 0 ties; latents within 0.0e+00" in said for said in exact)
    files = {label: result["said"] for label, result in all_is_well(quick, "files").items()}
    assert "all equal to the bit" in files.pop("frequencies") and len(files) == 2


def test_the_tables_hold_every_result(quick):
    found = json.loads((quick / "gpu.json").read_text())
    text = (quick / "gpu.md").read_text()
    assert found == read_parts(quick) and sorted(found) == sorted(QUICK)
    for part in found.values():
        assert f"### {part['part']}" in text and all(f"| {label} |" in text for label in part["results"])
    assert text.count("A rehearsal on a CPU in tiny sizes: no measurement.") == len(QUICK)


def test_what_is_there_is_not_measured_again(quick):
    before = (quick / "lm.json").read_bytes()
    done = measure("--rehearse", "--out", quick, "lm")
    assert done.returncode == 0 and "lm: there already" in done.stdout and (quick / "lm.json").read_bytes() == before


# ---- the same on the pretended card --------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """The pretended CUDA device of tests/gpu; `make gpu` itself is for a real one."""
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    monkeypatch.syspath_prepend(str(MEASURE.parent))
    pretended = pytest.importorskip("pretended")
    try:
        pretended.load_guard()
    except pretended.NoCompiler as reason:
        pytest.skip(f"no pretended GPU: {reason}")
    has_bfloat16.cache_clear()  # which knows devices by their names
    with pretended.pretended_device():
        yield "cuda:0"
    has_bfloat16.cache_clear()


def measure_here(part: str, card: str, out: Path) -> dict:
    """The part's results there, in this process."""
    bench = measuring.Bench(part, card, True, out / f"{part}.json", measuring.describe(card))
    importlib.import_module(f"part_{part}").measure(bench)
    assert bench.finish()
    return all_is_well(out, part)


@pytest.mark.parametrize("part", ["codes", "files", "kernels", "streams", "lm"])
def test_a_part_is_rehearsed_on_the_pretended_card(part, card, tmp_path):
    found = measure_here(part, card, tmp_path)
    sides = [side for result in found.values() for side in result.get("sides", {}).values()]
    assert all("peak_GB" in side for side in sides)


@pytest.mark.slow
def test_the_codec_is_rehearsed_on_the_pretended_card(card, tmp_path):
    assert len(measure_here("codec", card, tmp_path)) == 13


def test_doctor_finds_the_pretended_card_healthy(card):
    found = examine([card])
    assert found.healthy and found.verdict == "healthy: cuda:0 exact and fast", found.problems


# ---- the command ---------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = measure("--out", tmp_path / "out")
    assert done.returncode == 0 and done.stdout.startswith("not run: no GPU") and not (tmp_path / "out").exists()


def test_an_unknown_part_is_refused(tmp_path):
    done = measure("--out", tmp_path, "everything")
    assert done.returncode == 2 and "PART is 'everything', allowed: devices, codes" in done.stderr


def test_a_part_that_fails_stops_no_other(tmp_path):
    (tmp_path / "lm.partial").mkdir()  # so that nothing can be written
    done = measure("--rehearse", "--out", tmp_path, "lm", "files")
    assert done.returncode == 1 and "lm: not finished" in done.stdout and "files: done" in done.stdout


# ---- how it measures ------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path):
    def make(**about) -> measuring.Bench:
        return measuring.Bench("a part", "cpu", True, tmp_path / "a part.json", {"device": "cpu"} | about)

    return make


def test_results_are_kept_and_gone_on_with(bench, monkeypatch):
    first = bench()
    first.compare("one", {"ours": lambda: 1})
    monkeypatch.setattr(measuring, "LAST_BEGIN", -1)  # no time is left
    first.compare("two", {"ours": lambda: 1})
    assert not first.finish() and first.left_out == ["two"]
    assert "Not finished" in markdown({"a part": first.found})
    monkeypatch.undo()
    second, calls = bench(), []
    second.compare("one", {"ours": lambda: calls.append("one")})
    second.compare("two", {"ours": lambda: calls.append("two")})
    assert second.finish() and set(calls) == {"two"} and set(second.found["results"]) == {"one", "two"}
    assert bench(torch="another").found["results"] == {}  # nothing is mixed


def test_a_side_that_fails_is_named_and_the_others_measured(bench):
    one = bench()
    one.compare("both", {"ours": lambda: 1, "theirs": lambda: 1 / 0}, seconds=1)
    sides = one.found["results"]["both"]["sides"]
    assert sides["theirs"] == {"error": "ZeroDivisionError: division by zero"} and sides["ours"]["ms"] >= 0
    one.try_note("words", lambda: 1 / 0)
    assert one.found["results"]["words"]["said"].startswith("FAILED: ZeroDivisionError")
    assert "| both | theirs | ZeroDivisionError" in markdown({"a part": one.found})


def test_shares_of_the_limits():
    side = {"ms": 10.0, "GFLOP": 100.0, "GB": 2.0, "kind": "ieee"}
    part = {
        "part": "a",
        "done": True,
        "rehearsal": False,
        "about": {},
        "limits": {"GB/s": 1000.0, "TFLOP/s ieee": 20.0},
    }
    text = markdown({"a": part | {"results": {"b": {"sides": {"c": side}, "seconds": 5}}}})
    assert "| b | c | 10.00 | 500 | 1.00 |  | 50% | 20% |" in text


def test_work_is_counted():
    a, b = torch.randn(8, 16), torch.randn(16, 4)
    work = work_of(lambda: (a @ b).view(-1))
    assert work == {"GFLOP": 2 * 8 * 16 * 4 / 1e9, "GB": 4 * (8 * 16 + 16 * 4 + 8 * 4) / 1e9}
    lstm, x = torch.nn.LSTM(6, 6, 2), torch.randn(30, 3, 6)
    with torch.no_grad():
        assert work_of(lambda: lstm(x))["GFLOP"] == pytest.approx(2 * 30 * 3 * 4 * 4 * 36 / 1e9)
