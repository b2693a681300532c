"""What a run says of itself: log.jsonl, Accelerate's trackers, and the files it had to skip."""

import dataclasses
import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from modeling_encodec.system.atomic import atomic_path, named_errors
from modeling_encodec.training.options import RunConfig


logger = logging.getLogger(__name__)

LOG, SKIPPED = "log.jsonl", "skipped_files.jsonl"


class Reporter:
    """Writes for the main process; on the others it only keeps the means of the interval."""

    def __init__(self, folder: Path, config: RunConfig, accelerator: Accelerator):
        self.folder, self.config, self.accelerator = folder, config, accelerator
        self.interactive = sys.stderr.isatty()
        self.sums: dict[str, list[float]] = {}
        rank = accelerator.process_index
        self.skip_list = folder / (SKIPPED if rank == 0 else f"{rank}_{SKIPPED}")
        self.known: set[str] = set()
        self.update = 0

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            self._drop_lines()
        options = {
            name: value if isinstance(value, (int, float, str, bool)) else json.dumps(value)
            for name, value in dataclasses.asdict(self.config).items()
        }
        # TensorBoard then drops what it has of updates that are done again.
        purge = {"tensorboard": {"purge_step": self.update + 1}}
        self.accelerator.init_trackers("encodec", options, init_kwargs=purge)
        return self

    def __exit__(self, *error):
        self.accelerator.end_training()

    def add(self, losses: dict[str, float]) -> None:
        """Add one update's losses to the interval."""
        for name, value in losses.items():
            entry = self.sums.setdefault(name, [0.0, 0])
            entry[0] += value
            entry[1] += 1

    def means(self) -> dict[str, float]:
        """Means since the last call."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means

    def write(self, update: int, values: dict[str, float], **more) -> None:
        """One line of log.jsonl, and the values to the trackers; None stands for what is not a number."""
        self.accelerator.log(values, step=update)
        if self.accelerator.is_main_process:
            rounded = {name: float(f"{v:.6g}") if math.isfinite(v) else None for name, v in values.items()}
            with named_errors(self.folder / LOG), open(self.folder / LOG, "a") as file:
                file.write(json.dumps({"update": update, **rounded, **more}) + "\n")

    def show_clips(self, update: int, rows: dict, sampling_rate: int, picture: Path) -> None:
        """Decoded clips (clip -> version -> audio (channels, T)) and their spectrograms to TensorBoard, if in use."""
        if "tensorboard" not in self.config.trackers:
            return
        writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
        for clip, versions in rows.items():
            for name, audio in versions.items():
                mono = audio.mean(0, keepdims=True).clip(-1, 1)
                writer.add_audio(f"{clip}/{name}", mono, update, sample_rate=sampling_rate)
        if picture.exists():
            from PIL import Image

            writer.add_image("spectrograms", np.asarray(Image.open(picture).convert("RGB")), update, dataformats="HWC")

    def skipped(self, files: list[tuple[str, str]]) -> None:
        """List files that could not be used, each once."""
        if files and not self.known and self.skip_list.exists():
            self.known = {json.loads(line)["file"] for line in self.skip_list.read_text().splitlines()}
        for name, reason in files:
            if name in self.known:
                continue
            self.known.add(name)
            logger.warning("skipped %s: %s", name, reason)
            self.folder.mkdir(parents=True, exist_ok=True)
            with named_errors(self.skip_list), open(self.skip_list, "a") as file:
                file.write(json.dumps({"file": name, "reason": reason}) + "\n")

    def state_dict(self) -> dict:
        """The interval so far."""
        return {name: list(entry) for name, entry in self.sums.items()}

    def load_state_dict(self, state: dict) -> None:
        """Take up the interval."""
        self.sums = {name: list(entry) for name, entry in state.items()}

    def _drop_lines(self) -> None:
        """Drop what the log says of updates that are to be done again, by a run that was stopped or killed."""
        path = self.folder / LOG
        if self.update == 0:
            path.unlink(missing_ok=True)
        elif path.exists():
            lines = [line for line in path.read_text().splitlines() if _update_of(line) <= self.update]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines))


def _update_of(line: str) -> float:
    """The update a log line is of; one cut short by a crash is of none."""
    try:
        return json.loads(line)["update"]
    except ValueError:
        return float("inf")
