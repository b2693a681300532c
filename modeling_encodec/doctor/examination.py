"""The whole of it: what is here, the checks on every device, and a verdict; as a value, for text and JSON."""

import copy
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

from modeling_encodec.doctor import environment


@dataclass
class Examination:
    """What was found.

    Args:
        versions: of everything that is installed, by name.
        devices: what PyTorch can compute on.
        missing: required packages that are not there, with what does not work without them.
        optional: the same of optional ones.
        notes: what is unusual but wrong by no check.
        problems: what is wrong, one line each.
        checkups: as JSON has them, one for each device and precision.
        stored: with what the stored results were made, and the milliseconds of the same steps there.
    """

    versions: dict[str, str] = field(default_factory=dict)
    devices: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    optional: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    checkups: list[dict] = field(default_factory=list)
    stored: dict[str, str] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def verdict(self) -> str:
        """One line."""
        if not self.healthy:
            more = len(self.problems) - 1
            return f"not healthy: {self.problems[0]}{f' (and {more} more)' if more else ''}"
        names = {}
        for checkup in self.checkups:
            names.setdefault(checkup["device"], []).append(checkup["precision"])
        return "healthy: " + "; ".join(f"{device} {' and '.join(kinds)}" for device, kinds in names.items())

    def as_json(self) -> dict:
        """All of it as JSON has it."""
        return {"healthy": self.healthy, "verdict": self.verdict, **asdict(self)}


def examine(wanted: Iterable[str] = ()) -> Examination:
    """Look at this machine, and check the `wanted` devices, or all.

    Raises:
        ValueError: for a device that is not there.
    """
    found = Examination(versions=environment.versions())
    found.missing, found.optional = environment.missing()
    found.problems += [f"{name} is missing: needed for {without}" for name, without in found.missing.items()]
    found.notes += [f"{name} is {text}" for name, text in environment.unfit_versions().items()]
    if {"torch", "numpy", "transformers", "safetensors"} & found.missing.keys():
        return found
    found.versions |= environment.drivers()
    found.devices = environment.devices()
    wanted = list(dict.fromkeys("cuda:0" if name == "cuda" else name for name in wanted))
    if absent := [name for name in wanted if name not in found.devices]:
        raise ValueError(f"device is {absent[0]!r}, allowed: {', '.join(found.devices)}")
    try:
        found.problems += _check_all(found, wanted or list(found.devices))
    except Exception as error:  # told as what it is: whoever calls a doctor does not want a traceback
        found.problems.append(f"the bundled models do not load: {type(error).__name__}: {_one_line(error)}")
    return found


def _check_all(found: Examination, devices: list[str]) -> Iterator[str]:
    """Checks on each of the devices, added to `found`; what is wrong."""
    from transformers import logging

    from modeling_encodec.doctor.golden import fingerprints, load_golden, load_models

    logging.disable_progress_bar()
    golden = load_golden()
    found.stored = golden.about
    reference, lm = load_models()
    for name, digest in fingerprints(reference, lm).items():
        if digest != golden.about[name]:
            wrong = f"the bundled {name} has fingerprint {digest}, stored is {golden.about[name]}"
            yield f"weights: {wrong}: install the package again"
    for device in devices:
        try:
            moved = [copy.deepcopy(module).to(device) for module in (reference, lm)]
        except Exception as error:
            yield f"{device}: the models do not get there: {type(error).__name__}: {_one_line(error)}"
            continue
        yield from _check_device(found, golden, reference, *moved)


def _check_device(found: Examination, golden, reference, model, lm) -> Iterator[str]:
    from modeling_encodec.doctor.checks import Checks

    for precision in ("exact", "fast"):
        model.precision = precision
        if precision == "fast" and model.compute_dtype == model.dtype:
            found.notes.append(f"{model.device}: fast is exact, for bfloat16 does not pay there")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch's own, about kernels
            checkup = Checks(model, lm, golden, reference).run(precision)
        found.checkups.append(asdict(checkup))
        wrong = [check for check in checkup.checks if not check.right]
        yield from (f"{checkup.device} {precision}: {check.stage}: {check.found}" for check in wrong)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def lines_of(found: Examination) -> Iterator[str]:
    """What a person reads; the verdict is the last line."""
    for name, version in found.versions.items():
        yield f"{name:18} {version}"
    yield ""
    for name, text in found.devices.items():
        yield f"{name:18} {text}"
    for checkup in found.checkups:
        yield ""
        yield f"{checkup['device']}, {checkup['precision']}"
        for check in checkup["checks"]:
            yield f"  {'ok   ' if check['right'] else 'WRONG'} {check['stage']:30} {check['found']}"
        for name, taken in checkup["times"].items():
            stored = found.stored[f"{name}, {checkup['precision']}"]
            yield f"        {name:30} {taken:.2f} ms ({stored} on one core of {found.stored['machine']})"
    yield ""
    for name, without in (found.missing | found.optional).items():
        yield f"missing: {name}, for {without}"
    for note in found.notes:
        yield f"note: {note}"
    for problem in found.problems:
        yield f"WRONG: {problem}"
    yield found.verdict
