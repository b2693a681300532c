"""An evaluation: every clip through every system, kept clip by clip, so that it can be stopped, gone on with, and
shared by several processes.

    OUT/run.json             what is evaluated, on what, and how; the run goes on only if that is the same
    OUT/clips/000017.json    what is known of a clip; its .npz: how often each code was used
    OUT/evaluation.json …    made at the end from all of these (`report.py`), whoever computed them

Process r of w takes the clips r, r + w, …; no results travel between processes but through these files.
"""

import hashlib
import importlib.metadata
import json
import logging
import zipfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from modeling_encodec.bitstream.compression import name_of
from modeling_encodec.evaluation.clips import Clip
from modeling_encodec.evaluation.scoring import METRICS, count_codes, score_clip
from modeling_encodec.evaluation.systems import System, program_versions
from modeling_encodec.models.fingerprints import stream_fingerprint
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.system.atomic import atomic_path
from modeling_encodec.system.run_folder import Processes, join_processes, start_run


logger = logging.getLogger(__name__)

PACKAGES = ("modeling-encodec", "torch", "transformers", "numpy", "soundfile", "soxr", "scipy")
METRIC_PACKAGES = {"visqol_audio": "visqol-python", "visqol_speech": "visqol-python", "pesq": "pesq", "stoi": "pystoi"}


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated: a model, beside others, on clips, by metrics. `data` names the clips' source, `selection` how
    they were chosen from it; `missing` says what could not be measured, and why; `other_files` which files of the
    source libsndfile does not read."""

    model: EncodecModel
    lm: EncodecLM | None
    systems: Sequence[System]
    clips: Sequence[Clip]
    metrics: Sequence[str]
    data: str
    selection: str
    missing: dict[str, str]
    other_files: dict = field(default_factory=dict)

    def describe(self) -> dict:
        """What decides the results, and nothing else: equal for equal evaluations. An ImportError for a package that
        is missing."""
        config = self.model.config
        return {
            "format": 1,
            "model": {
                "name": name_of(self.model),
                "weights_sha256": weights_sha256(self.model),
                "fingerprint": stream_fingerprint(self.model),
                "sampling_rate": config.sampling_rate,
                "audio_channels": config.audio_channels,
                "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
                "precision": self.model.precision,
                "language_model": self.lm and {"name": name_of(self.lm), "weights_sha256": weights_sha256(self.lm)},
            },
            "systems": [{"system": system.name, "kbps": system.kbps} for system in self.systems],
            "data": {"name": self.data, "selection": self.selection},
            "method": method(self.metrics),
            "versions": versions(self.metrics),
            "missing": self.missing,
            "clips_sha256": _sha256([[clip.name, clip.category, clip.seconds, clip.offset] for clip in self.clips]),
        }


def run_evaluation(evaluation: Evaluation, folder: Path, *, force: bool = False) -> bool:
    """Score every clip that is not scored yet, all of them with `force`; True on the first of several processes, when
    all have done theirs.

    Raises:
        FileExistsError: if `folder` holds something else, or another evaluation and `force` is not set.
        ValueError: if what it holds is damaged.
        ImportError: if a package is missing that the results need.
    """
    processes = join_processes()
    first = processes.number == 0
    with start_run(evaluation.describe(), folder, "clips", force=force) if first else nullcontext():
        processes.wait()
        _score_clips(evaluation, folder, processes)
        processes.wait()
    return first


def _score_clips(evaluation: Evaluation, folder: Path, processes: Processes) -> None:
    numbers = range(processes.number, len(evaluation.clips), processes.count)
    todo = [number for number in numbers if "rows" not in (read_record(evaluation, folder, number) or {})]
    with tqdm(total=len(numbers), initial=len(numbers) - len(todo), unit="clip", disable=processes.number > 0) as bar:
        for number in todo:
            _keep(evaluation, evaluation.clips[number], clip_path(folder, number))
            bar.update()


def read_record(evaluation: Evaluation, folder: Path, number: int) -> dict | None:
    """What is kept of a clip, with how often it used each code as `counts`; None unless it is whole, and of the clip
    as it is now."""
    path, clip = clip_path(folder, number), evaluation.clips[number]
    try:
        record = json.loads(path.read_text())
        if (record["clip"], record["mark"]) != (clip.name, clip.mark()):
            return None
        if "failed" not in record:
            with np.load(path.with_suffix(".npz")) as kept:
                record["counts"] = kept["counts"].astype(np.int64)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    return record


def clip_path(folder: Path, number: int) -> Path:
    """Where the record of clip `number` lies."""
    return folder / "clips" / f"{number:06d}.json"


def method(metrics: Sequence[str]) -> dict:
    """How everything is measured, of the `metrics` by their names; for `evaluation.json`."""
    return {
        "resampler": 'soxr "HQ", for files, between systems and for metrics',
        "alignment": "decoded audio cut or padded with zeros to the clip's length; no delay is taken out; `lag` is "
        "the median delay in samples by cross-correlation, looked for up to 50 ms",
        "bitrate": "bytes of whole files with their headers, of all clips together, over their seconds; `lm_kbps` "
        "with the language model",
        "interval": "mean over clips and its 95 % confidence interval by Student's t distribution",
        "metrics": {name: METRICS[name].definition for name in metrics},
    }


def versions(metrics: Sequence[str]) -> dict[str, str]:
    """Packages and programs that are used, also for these `metrics`, in which version.

    Raises:
        ImportError: for a package that is missing, before the work.
    """
    packages = dict.fromkeys([*PACKAGES, *(METRIC_PACKAGES[name] for name in metrics if name in METRIC_PACKAGES)])
    try:
        return {name: importlib.metadata.version(name) for name in packages} | program_versions()
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f'evaluation needs {error.name}: pip install "modeling-encodec[eval]"') from None


def weights_sha256(model: EncodecModel | EncodecLM) -> str | None:
    """Of the file that a model was loaded from; None where that is not one file at hand."""
    from transformers.utils import cached_file

    source = model.config.name_or_path
    try:
        path = source and cached_file(source, "model.safetensors", local_files_only=True)
    except OSError:
        path = None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None


def _keep(evaluation: Evaluation, clip: Clip, path: Path) -> None:
    model = evaluation.model
    rate, channels = model.config.sampling_rate, model.config.audio_channels
    try:
        audio = clip.read(rate, channels)
    except ValueError as error:
        logger.warning("left out: %s", error)
        record = {"clip": clip.name, "mark": clip.mark(), "category": clip.category, "failed": str(error)}
    else:
        record = score_clip(clip, audio, rate, evaluation.systems, evaluation.metrics)
        with atomic_path(path.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, counts=count_codes(audio, model))
    with atomic_path(path) as temporary:  # last: a clip with a record is done
        temporary.write_text(json.dumps(record))


def _sha256(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
