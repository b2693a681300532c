"""How things are measured: sides by turns, medians, synchronised, with peak memory and the work that was done.

Every result is written at once, and what is there already is not measured again.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path


ROOT = Path(__file__).parents[3]
# After so many seconds a part begins nothing more; it is ended by force at 480.
LAST_BEGIN = 390


def from_the_tree(folder: Path) -> dict[str, str]:
    """Environment in which processes import this tree's package, be it installed or not, and the tests' helpers: its
    parts are linked into `folder` as an installation would lay them."""
    package = folder.resolve() / "modeling_encodec"
    package.mkdir(parents=True, exist_ok=True)
    for path in [*(ROOT / "modeling_encodec").iterdir(), ROOT / "processors", ROOT / "conversion"]:
        link = package / path.name
        if not link.exists():
            link.symlink_to(path)
    # The tests' folder for their helpers; and no folder is put before these because a command stands in it.
    return {"PYTHONPATH": os.pathsep.join([str(package.parent), str(ROOT / "tests")]), "PYTHONSAFEPATH": "1"}


def describe(device: str) -> dict[str, str]:
    """With what is measured."""
    import platform

    import torch
    import transformers

    about = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        return about | {
            "device": f"{card.name}, {card.total_memory / 1e9:.0f} GB",
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
        }
    return about | {"device": "cpu"}


class Bench:
    """The results of one part, in `path`.

    Args:
        part: its name.
        device: where is measured.
        rehearse: whether sizes are tiny and nothing is repeated.
        path: the JSON file.
        about: with what is measured; results of another machine are not gone on with.
    """

    def __init__(self, part: str, device: str, rehearse: bool, path: Path, about: dict[str, str]):
        self.device, self.rehearse, self.path = device, rehearse, path
        self.on_gpu = device.startswith("cuda")
        self.begin = time.monotonic()
        self.found = {"part": part, "done": False, "rehearsal": rehearse, "about": about, "limits": {}, "results": {}}
        if path.exists():
            before = json.loads(path.read_text())
            if before["about"] == about and before["rehearsal"] == rehearse:
                self.found = before | {"done": False}
        self.left_out = []

    def wanted(self, label: str) -> bool:
        """Whether this is still to be measured, and there is time for it."""
        if label in self.found["results"]:
            return False
        if time.monotonic() - self.begin > LAST_BEGIN:
            self.left_out.append(label)
            return False
        return True

    def note(self, label: str, said: str) -> None:
        """A result in words."""
        print(f"{label}: {said}", flush=True)
        self.found["results"][label] = {"said": said}
        self._write()

    def try_note(self, label: str, find: Callable[[], str]) -> None:
        """What `find` says, or what went wrong in it."""
        if self.wanted(label):
            try:
                self.note(label, find())
            except Exception as error:  # the next one is still wanted
                self.note(label, f"FAILED: {one_line(error)}")
                self.free()

    def compare(
        self,
        label: str,
        sides: dict[str, Callable],
        *,
        seconds: float | None = None,
        repeats: int = 5,
        kinds: dict[str, str] | None = None,
        count: bool = False,
    ) -> None:
        """Median milliseconds of the sides, which take turns.

        Args:
            label: what is measured.
            sides: name -> the call.
            seconds: of audio that a call takes, for its speed.
            repeats: of all sides, after two rounds to warm up.
            kinds: side -> `ieee`, `tf32` or `bf16`: by which of the card's matrix rates it is judged.
            count: whether operations and bytes of a call are counted, too.
        """
        if not self.wanted(label):
            return
        found, times = {}, {}
        for name, call in sides.items():
            found[name] = self._warm_up(call, (kinds or {}).get(name), count)
            times[name] = []
        for _ in range(1 if self.rehearse else repeats):
            for name, call in sides.items():
                if "error" not in found[name]:
                    times[name].append(self._milliseconds(call))
        for name, taken in times.items():
            if taken:
                found[name] |= {"ms": statistics.median(taken), "least_ms": min(taken)}
        said = [f"{name} {side.get('error') or format(side['ms'], '.2f') + ' ms'}" for name, side in found.items()]
        print(f"{label}: {', '.join(said)}", flush=True)
        self.found["results"][label] = {"sides": found, "seconds": seconds}
        self._write()

    def _warm_up(self, call: Callable, kind: str | None, count: bool) -> dict:
        import torch

        side = {} if kind is None else {"kind": kind}
        try:
            call()
            if self.on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            if self.on_gpu or not self.rehearse:
                call()
            if self.on_gpu:
                torch.cuda.synchronize()
                side["peak_GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9  # above models and inputs
            if count:
                from work import work_of

                side |= work_of(call)
        except Exception as error:  # out of memory, or what one of the peers does not do
            self.free()
            return {"error": one_line(error)}
        return side

    def _milliseconds(self, call: Callable) -> float:
        begin = time.perf_counter()
        call()
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - begin)

    def free(self) -> None:
        """Give memory back."""
        if self.on_gpu:
            import torch

            torch.cuda.empty_cache()

    def measure_limits(self) -> None:
        """The card's own rate of copies, and of products of large matrices, here and now."""
        if not self.found["limits"]:
            from work import limits

            self.found["limits"] = limits(self)
            print(f"limits: {self.found['limits']}", flush=True)
            self._write()

    def finish(self) -> bool:
        """Whether all is measured."""
        self.found["done"] = not self.left_out
        self._write()
        return not self.left_out

    def _write(self) -> None:
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(json.dumps(self.found, indent=1))
        os.replace(temporary, self.path)


def one_line(error: BaseException) -> str:
    """What went wrong."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
