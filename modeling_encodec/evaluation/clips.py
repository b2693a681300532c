"""Clips to evaluate on: of a folder, a manifest, or a `datasets` dataset; each with its category.

Categories are the folders directly inside a folder, a manifest's field, or a dataset's column. Audio is decoded by
libsndfile and resampled by soxr, as everywhere in the project.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import numpy as np

from modeling_encodec.models.inputs_encodec import as_python, real_number, whole_number
from modeling_encodec.processors.audio import AudioReader, join_blocks
from modeling_encodec.processors.audio_kinds import AUDIO_SUFFIXES, OtherFiles, list_audio
from modeling_encodec.processors.corpus.clips import (
    Location,
    UnusableClip,
    check_corpus_rate,
    encoded_seconds,
    failure,
    resolve,
)
from modeling_encodec.processors.corpus.reading import (
    CorpusConfig,
    DatasetRow,
    audio_column,
    file_location,
    load_dataset,
    manifest_rows,
)
from modeling_encodec.processors.corpus.segments import Segment, row_path, segment_name


# Of a manifest or dataset: the first of these that is there, unless another is asked for.
CATEGORY_FIELDS = ("category", "kind", "domain")
NO_CATEGORY = "uncategorised"
ALL = "all"  # the name of everything together in results


@dataclass(frozen=True)
class Clip:
    """Encoded audio: its `name`, of which no two are equal, and its `category`. `seconds`: as its header says, or what
    is left of that: `offset` seconds into the file it begins."""

    name: str
    category: str
    seconds: float
    location: Location = field(repr=False)
    offset: float = 0.0

    def read(self, sampling_rate: int, channels: int) -> np.ndarray:
        """Its audio as float32 (channels, T) at `sampling_rate` Hz.

        Raises:
            ValueError: if it cannot be read, or has more channels than fit.
        """
        location = self.location
        try:
            location, part = resolve(location)
            file = BytesIO(location) if isinstance(location, bytes) else location
            with AudioReader(file, sampling_rate, channels, **part) as reader:
                check_corpus_rate(reader.rate)
                audio = join_blocks(reader)
        except UnusableClip as error:
            raise ValueError(f"{self.name}: {error.reason}") from None
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.name}: {failure(error).removeprefix(f'{location}: ')}") from None
        first = round(self.offset * sampling_rate)
        return audio[:, first : first + max(1, round(self.seconds * sampling_rate))]

    def mark(self) -> list:
        """Changes when its audio does: of a file its size and time of change, of a dataset its fingerprint."""
        try:
            path = self.location.location if isinstance(self.location, Segment) else self.location
            if isinstance(path, str):
                found = os.stat(path)
                return [found.st_size, found.st_mtime_ns, self.offset, self.seconds]
        except OSError:
            return []
        return [getattr(getattr(self.location, "dataset", None), "_fingerprint", None), self.offset, self.seconds]


def list_clips(
    source: str | os.PathLike,
    *,
    category: str | None = None,
    split: str = "test",
    subset: str | None = None,
    column: str = "audio",
    other: OtherFiles | None = None,
) -> list[Clip]:
    """Every clip of a source, sorted by name (of a dataset: in its order).

    Args:
        source: a folder of audio; a manifest (.jsonl or .csv with a `path` in each row and perhaps `offset` and
            `duration`, .txt with paths, relative to the manifest); a folder of `datasets`' `save_to_disk`; or a
            dataset's Hub id.
        category: the manifest's field or dataset's column that names categories.
        split: of a dataset.
        subset: of a dataset of the Hub.
        column: of a dataset: that with the audio.
        other: counts the files of a folder or manifest that libsndfile does not read.

    Raises:
        FileNotFoundError: if there is no such source.
        ValueError: if it holds no audio, or has no such field.
        ImportError: if `datasets` is needed and missing.
    """
    path, other = Path(source), OtherFiles() if other is None else other
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if path.is_file():
        clips = _of_manifest(path, category, other)
    elif path.is_dir() and not saved:
        clips = _of_folder(path, other)
    elif saved or _like_hub_id(source):
        clips = _of_dataset(
            CorpusConfig(path.name, str(source), "dataset", split=split, subset=subset, column=column), category
        )
    else:
        raise FileNotFoundError(f"{source}: no such folder, manifest or dataset")
    if not clips:
        there = "".join(f"; {line}" for line in other.lines())
        raise ValueError(f"{source}: holds no clips, allowed: at least one ({', '.join(AUDIO_SUFFIXES)}){there}")
    for clip in clips:
        if clip.category == ALL:
            raise ValueError(f"{clip.name}: category is {ALL!r}, allowed: other names, for that one is of all clips")
        for text in (clip.name, clip.category):
            if not text.isprintable():
                raise ValueError(f"a clip or category is called {text!a}, allowed: printable text")
    return clips


def select_clips(
    clips: Sequence[Clip],
    *,
    most: int | None = None,
    least_seconds: float = 0.0,
    most_seconds: float | None = None,
    seed: int = 0,
) -> list[Clip]:
    """The clips of at least `least_seconds`, `most` of each category, equal for equal seeds; of a clip longer than
    `most_seconds` its middle.

    Raises:
        ValueError: if none is left, or for a length that is none.
    """
    seed = whole_number("seed", seed)
    most = None if most is None else whole_number("most", most, 0)
    least_seconds, most_seconds = real_number("least_seconds", least_seconds), as_python(most_seconds)
    if not 0 <= least_seconds < math.inf:
        raise ValueError(f"least_seconds is {least_seconds:g}, allowed: 0 or more")
    if most_seconds is not None and not 0 < most_seconds < math.inf:
        raise ValueError(f"most_seconds is {most_seconds:g}, allowed: above 0")
    ranks = {clip.name: hashlib.sha256(f"{seed} {clip.name}".encode()).hexdigest() for clip in clips}
    long: dict[str, list[Clip]] = {}
    for clip in clips:
        if clip.seconds >= least_seconds:
            long.setdefault(clip.category, []).append(clip)
    chosen = [clip for some in long.values() for clip in sorted(some, key=lambda clip: ranks[clip.name])[:most]]
    if not chosen:
        raise ValueError(f"none of {len(clips)} clips is left, allowed: some of at least {least_seconds:g} s")
    kept = {clip.name for clip in chosen}
    return [_middle(clip, most_seconds) for clip in clips if clip.name in kept]


def describe_choice(*, most: int | None, least_seconds: float, most_seconds: float | None, seed: int) -> str:
    """What `select_clips` does with these, in words."""
    parts = ["all" if most is None else f"up to {most} of each category, drawn by seed {seed}"]
    parts += [f"of at least {least_seconds:g} s"] if least_seconds else []
    parts += [] if most_seconds is None else [f"the middle {most_seconds:g} s of longer ones"]
    return ", ".join(parts)


def _middle(clip: Clip, most_seconds: float | None) -> Clip:
    if most_seconds is None or clip.seconds <= most_seconds:
        return clip
    return replace(clip, seconds=most_seconds, offset=(clip.seconds - most_seconds) / 2)


def _of_folder(folder: Path, other: OtherFiles) -> list[Clip]:
    clips = []
    for path in list_audio(folder, other):
        place = path.relative_to(folder)
        category = place.parts[0] if len(place.parts) > 1 else NO_CATEGORY
        clips.append(Clip(place.as_posix(), category, encoded_seconds(str(path)), str(path)))
    return clips


def _of_manifest(manifest: Path, category: str | None, other: OtherFiles) -> list[Clip]:
    if manifest.suffix not in (".jsonl", ".csv", ".txt"):
        raise ValueError(f"{manifest}: no manifest, allowed: .jsonl, .csv, .txt, or a folder or dataset")
    rows = manifest_rows(manifest)
    if any(None in row for row in rows):
        raise ValueError(f"{manifest}: a row has more values than there are columns, allowed: as many")
    category = _category_field(category, {key for row in rows for key in row}, manifest)
    clips: dict[tuple, Clip] = {}
    names: Counter[str] = Counter()
    for row in rows:
        given, location = row_path(row), file_location(manifest, row)
        other.take(given, listed=True)
        path, part = (location.location, location) if isinstance(location, Segment) else (str(location), None)
        # Places of this machine are no names.
        name = os.path.relpath(path, manifest.parent) if os.path.isabs(given) else given
        key = (os.path.realpath(path), *(part and (part.offset, part.duration) or (None, None)))
        if key in clips and clips[key].category != (found := _category(row.get(category), name)):
            raise ValueError(f"{name}: is listed as {clips[key].category!r} and {found!r}, allowed: one category")
        if key not in clips:
            name = segment_name(name, part.offset, part.duration) if part else name
            names[name] += 1
            name = f"{name} ({names[name]})" if names[name] > 1 else name
            location = part or path
            clips[key] = Clip(name, _category(row.get(category), name), encoded_seconds(location), location)
    return sorted(clips.values(), key=lambda clip: clip.name)


def _category(value, name: str) -> str:
    if value is None or value == "":
        return NO_CATEGORY
    if isinstance(value, (str, int, float)):
        return str(value)
    raise ValueError(f"{name}: category is a {type(value).__name__}, allowed: text")


def _of_dataset(config: CorpusConfig, category: str | None) -> list[Clip]:
    dataset = load_dataset(config)
    category = _category_field(category, set(dataset.column_names), config.source)
    values = dataset[category] if category else [None] * len(dataset)
    if category and hasattr(dataset.features[category], "int2str"):  # numbers of classes
        values = [None if value is None else dataset.features[category].int2str(value) for value in values]
    audio = audio_column(config, dataset)
    clips = []
    for row, value in enumerate(values):
        name, location = f"{config.name}, row {row:06d}", DatasetRow(audio, config.column, row)
        clips.append(Clip(name, _category(value, name), encoded_seconds(location), location))
    return clips


def _category_field(asked: str | None, there: set[str], source) -> str | None:
    if asked is not None and asked not in there:
        raise ValueError(f"{source}: category is {asked!r}, allowed: {', '.join(sorted(there))}")
    return asked or next((name for name in CATEGORY_FIELDS if name in there), None)


def _like_hub_id(source: str | os.PathLike) -> bool:
    parts = str(source).split("/")
    return len(parts) == 2 and all(parts) and not str(source).startswith(".")
