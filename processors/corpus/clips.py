"""Single audio clips: what is known of one before it is drawn (`Clip`), crops of it, and the index of many.

A crop decodes only its own part of the file and resamples only that, so that drawing a second of an hour costs a
second. The part begins where samples of both rates fall together and reaches past the crop by the resampler's memory,
so that the crop equals the same stretch of the whole file read and resampled, within float32 rounding.

The index reads every file once, block by block, on threads: libsndfile and NumPy work outside Python's lock, and
threads need no copies of the clips, no start method and no import guard in a user's script.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from modeling_encodec.processors.audio import match_channels, resample
from modeling_encodec.processors.audio_files import AudioFile, file_fault, segment_span
from modeling_encodec.processors.corpus.segments import Segment, segment_name
from modeling_encodec.system.atomic import atomic_path


logger = logging.getLogger(__name__)

# Where encoded audio lies: a path, the bytes themselves, a segment of one of the two, or a function that gives any of
# these (a dataset's row).
Location = str | bytes | Segment | Callable[[], str | bytes | Segment]

CACHE_HEADER = {"format": "modeling-encodec index", "version": 2}
BLOCK = 1 << 16  # samples decoded at a time while indexing
# The memory of soxr "HQ" on each side, in samples of the lower rate: at 100 crops are exact within 3e-7, at 50 not.
RESAMPLER_MARGIN = 128
# Of a corpus, in Hz: at a lower rate a small file would be days of audio, and computed for days; no recording has a
# higher one.
LEAST_RATE, MOST_RATE = 1000, 10_000_000
SAVE_SECONDS = 120  # a long index is saved so often, so that little is lost when it is stopped


class UnusableClip(ValueError):
    """A clip that gives no audio: its `name` and the `reason`."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Clip:
    """Encoded audio and what is known of it. `samples` at its own `sampling_rate`, from the file's sample `first` on;
    peak and rms over all channels. `decoded`: all of it as crops are wanted, (channels, T), if it is in memory."""

    name: str  # for messages
    location: Location = field(repr=False)
    samples: int
    sampling_rate: int
    channels: int
    peak: float
    rms: float
    first: int = 0
    decoded: np.ndarray | None = field(default=None, repr=False, compare=False)

    @property
    def seconds(self) -> float:
        """Its duration."""
        return self.samples / self.sampling_rate

    def length(self, rate: int) -> int:
        """Whole samples it lasts at `rate` Hz."""
        return self.samples * rate // self.sampling_rate

    def longest(self, rate: int) -> int:
        """Samples at `rate` Hz beyond which crops of it are silent."""
        return -(-self.samples * rate // self.sampling_rate)


def check_corpus_rate(rate: int) -> None:
    """Refuse with a ValueError a sampling rate in Hz that no recording has."""
    if not LEAST_RATE <= rate <= MOST_RATE:
        raise ValueError(f"sampling rate is {rate} Hz, allowed in a corpus: {LEAST_RATE} to {MOST_RATE}")


def failure(error: Exception) -> str:
    """What went wrong in one line, with the error's type where the project did not foresee it."""
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    foreseen = isinstance(error, (OSError, ValueError)) and text
    return text if foreseen else f"{type(error).__name__}: {text}".rstrip(": ")


def read_crop(clip: Clip, start: int, length: int, rate: int, channels: int) -> np.ndarray:
    """Samples `start` to `start + length` of the clip at `rate` Hz, float32 (channels, length); zeros beyond its ends.

    Raises:
        UnusableClip: if it cannot be read, is not what it was when indexed, or has more channels than fit.
    """
    step = math.gcd(clip.sampling_rate, rate)
    given, made = (
        clip.sampling_rate // step,
        rate // step,
    )  # so many samples of the clip last as long as so many of ours
    margin = 0 if given == made else math.ceil(RESAMPLER_MARGIN * max(1, clip.sampling_rate / rate) / given)
    first = max(0, (start // made - margin) * given)
    last = min(clip.samples, (-(-(start + length) // made) + margin) * given)
    crop = np.zeros((channels, length), np.float32)
    if first >= last:
        return crop
    if clip.decoded is not None:
        audio, begin = clip.decoded, 0
    else:
        with _reasons(clip.name):
            audio = resample(match_channels(_read(clip, first, last), channels), clip.sampling_rate, rate)
        begin = first // given * made
    low, high = max(start, begin), min(start + length, begin + audio.shape[1])
    if low < high:
        crop[:, low - start : high - start] = audio[:, low - begin : high - begin]
    return crop


def measure_clip(name: str, location: Location) -> Clip:
    """The clip at `location`, decoded once in blocks.

    Raises:
        UnusableClip: if it is no audio, cut off, empty, silent, or holds samples that are not finite.
    """
    samples, peak, energy = 0, 0.0, 0.0
    with _reasons(name), _opened(location) as (file, first, count):
        if file.decoder != "libsndfile":
            raise ValueError(f"is read by {file.decoder}, which crops are not drawn with; convert it, as to .flac")
        check_corpus_rate(file.sampling_rate)
        file.seek(first)
        while len(block := file.read(BLOCK if count is None else min(BLOCK, count - samples))):
            samples += len(block)
            peak = max(peak, float(np.abs(block).max()))
            energy += float(np.square(block, dtype=np.float64).sum())
        if samples == 0:
            raise ValueError("holds no audio")
        if count is not None and samples < count:
            raise ValueError(f"cut off: segment has {count} samples, file holds {samples} of them")
        if peak == 0:
            raise ValueError("silent")
        rms = math.sqrt(energy / (samples * file.channels))
        return Clip(name, location, samples, file.sampling_rate, file.channels, peak, rms, first)


def encoded_seconds(location: Location) -> float:
    """Duration in seconds, without decoding where the file's structure tells it; 0 where it cannot be read."""
    try:
        with _reasons(""), _opened(location) as (file, _, count):
            return (file.count_frames() if count is None else count) / file.sampling_rate
    except UnusableClip:
        return 0.0


def index_files(
    paths: Sequence[str | os.PathLike | Segment], cache_folder: str | os.PathLike | None = None, workers: int = 1
) -> tuple[list[Clip], list[tuple[str, str]]]:
    """The usable clips among audio files and segments of them, sorted by path and each once, and the rest as (path,
    reason).

    What was learned is kept in `cache_folder`, and a file read again only when its size or time of change differ.
    """
    entries, skipped = file_entries(paths)
    clips, unusable = index_entries(entries, cache_folder and Path(cache_folder) / "files.jsonl", workers)
    return clips, sorted(skipped + unusable)


def resolve(location: Location | dict) -> tuple[str | bytes | dict, dict]:
    """A path, bytes or array itself, and which segment of it is meant, as options of `AudioReader`."""
    options = {}
    while callable(location) or isinstance(location, Segment):
        if isinstance(location, Segment):
            options = {"offset": location.offset, "duration": location.duration, "embedded": location.embedded}
            location = location.location
        else:
            location = location()
    return location, options


# A clip to learn of: its name, what it is known by in the cache, where it lies.
Entry = tuple[str, tuple, Location]


def file_entries(paths: Sequence[str | os.PathLike | Segment]) -> tuple[list[Entry], list[tuple[str, str]]]:
    """Entries of files, or of segments of files, known by path, size, time of change and segment, sorted; and the
    missing ones as (path, reason)."""
    entries, skipped = [], {}
    wanted = {(os.path.abspath(item), None, None) for item in paths if not isinstance(item, Segment)}
    wanted |= {(os.path.abspath(s.location), s.offset, s.duration) for s in paths if isinstance(s, Segment)}
    states: dict[str, os.stat_result] = {}
    for path, *part in sorted(wanted, key=lambda item: (item[0], item[1] or 0, item[2] or math.inf)):
        try:
            state = states[path] = states.get(path) or os.stat(path)
        except (OSError, ValueError) as error:  # ValueError: a path that cannot be, with a zero byte
            skipped[path] = getattr(error, "strerror", None) or "cannot be looked up"
            continue
        key = (path, state.st_size, state.st_mtime_ns)
        if part == [None, None]:
            entries.append((path, key, path))
        else:
            name = segment_name(path, *part) if part[0] is not None else f"{path} 0-{part[1]:.10g} s"
            entries.append((name, (*key, *part), Segment(path, *part)))
    return entries, list(skipped.items())


def index_entries(
    entries: Sequence[Entry], cache: Path | None, workers: int
) -> tuple[list[Clip], list[tuple[str, str]]]:
    """The usable clips among `entries`, in their order, and the rest as (name, reason)."""

    def measure(name: str, location: Location) -> list:
        clip = measure_clip(name, location)
        return [clip.samples, clip.sampling_rate, clip.channels, clip.peak, clip.rms, clip.first]

    known, skipped = scan(entries, measure, cache, workers)
    return [Clip(name, location, *known[name]) for name, _, location in entries if name in known], skipped


def scan(
    entries: Sequence[Entry], measure: Callable[[str, Location], list], cache: Path | None, workers: int
) -> tuple[dict[str, list], list[tuple[str, str]]]:
    """What `measure` learns of each entry, by name, as numbers; and those it refused (UnusableClip), with the reason.

    The answers are kept in the file `cache`. Refusals are not: the file may have been mended, or the disk away for a
    moment. A cache that cannot be read is made anew.
    """
    known = _read_cache(cache)
    missing = [entry for entry in entries if entry[1] not in known]
    skipped = []
    if missing:
        logger.info("indexing %d of %d clips", len(missing), len(entries))

    def attempt(entry: Entry) -> tuple[Entry, list | UnusableClip]:
        try:
            return entry, measure(entry[0], entry[2])
        except UnusableClip as error:
            return entry, error

    saved = time.monotonic()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for first in range(0, len(missing), 512):  # in parts, so that an interrupt ends soon
            for (name, key, _), answer in pool.map(attempt, missing[first : first + 512]):
                if isinstance(answer, UnusableClip):
                    skipped.append((name, answer.reason))
                else:
                    known[key] = answer
            if time.monotonic() - saved > SAVE_SECONDS:
                _write_cache(cache, known)
                saved = time.monotonic()
                logger.info("indexed %d of %d clips", first + 512, len(missing))
    found = {name: known[key] for name, key, _ in entries if key in known}
    if len(missing) > len(skipped):
        _write_cache(cache, {key: known[key] for _, key, _ in entries if key in known})
    return found, skipped


def _read_cache(path: Path | None) -> dict[tuple, list]:
    try:
        if path is None:
            return {}
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(header) != CACHE_HEADER:
            return {}
        return {tuple(key): values for key, values in map(json.loads, lines)}
    except (OSError, ValueError, TypeError):
        return {}


def _write_cache(path: Path | None, known: dict[tuple, list]) -> None:
    if path is None:
        return
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(CACHE_HEADER) + "\n")
        file.writelines(json.dumps(item) + "\n" for item in known.items())


def _read(clip: Clip, first: int, last: int) -> np.ndarray:
    """Samples `first` to `last` of the clip as they are, (its channels, last - first)."""
    with _opened(clip.location, whole=True) as (file, *_):
        if (file.sampling_rate, file.channels) != (clip.sampling_rate, clip.channels):
            raise ValueError("not the audio that was indexed")
        file.seek(clip.first + first)
        audio = file.read(last - first)
    if len(audio) < last - first:
        raise ValueError("shorter than when it was indexed")
    return audio.T


@contextmanager
def _opened(location: Location, *, whole: bool = False) -> Iterator[tuple[AudioFile, int, int | None]]:
    """The file, and the first sample and number of samples that are meant, 0 and None for all, as if `whole`."""
    location, part = resolve(location)
    if isinstance(location, str) and (fault := file_fault(location)):
        raise ValueError(fault)
    with AudioFile(location) as file:
        if not part or whole:
            yield file, 0, None
            return
        frames = file.count_frames() if file.known_frames is None else file.known_frames
        offset, duration = part["offset"], part["duration"]
        yield file, *segment_span(offset, duration, file.sampling_rate, frames, embedded=part["embedded"])


@contextmanager
def _reasons(name: str) -> Iterator[None]:
    """Whatever makes reading fail becomes an UnusableClip of `name`."""
    try:
        yield
    except UnusableClip as error:
        raise UnusableClip(name, error.reason) from error
    except MemoryError:
        raise
    except Exception as error:  # of whatever kind: a damaged or hostile clip is no reason to lose the others
        raise UnusableClip(name, failure(error)) from error
