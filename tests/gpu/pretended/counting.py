"""What the work on a device costs, counted."""

import sys
import weakref
from collections import Counter
from pathlib import Path

import torch


PROJECT = Path(__file__).parents[3]
OURS = tuple(str(PROJECT / folder) for folder in ("modeling_encodec", "processors", "conversion"))
HERE = str(Path(__file__).parent)


def asking_line() -> str:
    """The innermost line of the project that led here, or else of the test: `folder/file.py:12`."""
    frame, test = sys._getframe(1), "elsewhere"
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OURS):
            return f"{Path(name).relative_to(PROJECT)}:{frame.f_lineno}"
        if test == "elsewhere" and name.startswith(str(PROJECT / "tests")) and not name.startswith(HERE):
            test = f"{Path(name).relative_to(PROJECT)}:{frame.f_lineno}"
        frame = frame.f_back
    return test


class Counts:
    """Launches, synchronisations by the line that asked, bytes moved, time steps of LSTMs, and the peak of memory
    (bytes) since the last `reset`; what would be slow or different on a GPU, in words, is in `notes`.

    With `detail`, launches and bytes by line as well, which takes longer.
    """

    def __init__(self, detail: bool = False):
        self.detail, self.live = detail, 0
        self._known = weakref.WeakKeyDictionary()
        self.reset()

    def reset(self) -> None:
        """Begin anew; what lives goes on living."""
        self.launches, self.moved, self.lstm_steps, self.peak = 0, 0, 0, self.live
        self.syncs, self.notes = Counter(), Counter()
        self.launches_by_line, self.moved_by_line = Counter(), Counter()

    def add(self, launches: int, moved: int) -> None:
        """Some kernels, and the bytes that they read and write."""
        self.launches += launches
        self.moved += moved
        if self.detail and launches:
            line = asking_line()
            self.launches_by_line[line] += launches
            self.moved_by_line[line] += moved

    def wait(self, kind: str) -> None:
        """The host waits for the device."""
        self.syncs[f"{kind} at {asking_line()}"] += 1

    def note(self, text: str) -> None:
        """Something a GPU would do worse, or differently."""
        self.notes[f"{text} ({asking_line()})"] += 1

    def hold(self, tensor: torch.Tensor) -> None:
        """The memory of `tensor` lives as long as something refers to it."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = self._known[storage] = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size

    @property
    def waits(self) -> int:
        """Synchronisations."""
        return self.syncs.total()

    def report(self) -> dict[str, float]:
        """The numbers, bytes in GB."""
        return {
            "launches": self.launches,
            "syncs": self.waits,
            "GB": round(self.moved / 1e9, 2),
            "peak GB": round(self.peak / 1e9, 2),
        }
