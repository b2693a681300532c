"""Segments of recordings, as manifests and tables name them: `offset` and `duration` in seconds beside a path.

Keys of other formats that would change what a row means (`start`, `channel` ...) are refused where they hold such a
value: read as a whole file, the row would be another recording than its text.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from modeling_encodec.processors.audio_files import check_segment


PATH_KEYS = ("path", "audio_filepath")
SEGMENT_KEYS = ("offset", "duration")
# Names of other ways to mean a part of a recording, in lower case and without what is no letter or digit.
UNIT = "(time|pos|s|secs?|seconds?|ms|samples?|frames?)?"
UNKNOWN_KEY = re.compile(
    f"(time|clip|audio|seg|segment|utt|chunk|frame|sample|t)?(start|end|begin|stop|onset){UNIT}(offset)?"
    f"|[tx](min|max)|(frame|sample)offset|offset{UNIT}|(from|to){UNIT}|segments?|channel(id|index|selector)?"
)
TIME = re.compile(r"[\d\s:.,]*\d[\d\s:.,]*")


@dataclass(frozen=True)
class Segment:
    """A part of encoded audio: where this lies, and the `offset` and `duration` in seconds, None for its beginning or
    end. `embedded`: the audio came in the row itself, so that it may be cut already."""

    location: str | bytes | dict | Callable = field(repr=False)
    offset: float | None
    duration: float | None
    embedded: bool = False


class UnknownKey(ValueError):
    """A row says in a way of its own which part of a recording it means, as then most often all rows do."""


def row_path(row: Mapping) -> str:
    """The path of a manifest's row.

    Raises:
        KeyError: if there is none.
        ValueError: if there are two.
    """
    paths = [row[key] for key in PATH_KEYS if row.get(key) is not None]
    if not paths:
        raise KeyError(PATH_KEYS[0])
    if any(path != paths[0] for path in paths):
        raise ValueError(f"{' and '.join(PATH_KEYS)} are {paths[0]!r} and {paths[1]!r}, allowed: one")
    return paths[0]


def segment_keys(keys: Iterable[str]) -> list[str]:
    """Those of the keys that say, or may say, which part of a recording a row means."""
    return [key for key in keys if isinstance(key, str) and (key in SEGMENT_KEYS or _is_unknown(key))]


def row_segment(row: Mapping) -> tuple[float | None, float | None]:
    """The `offset` and `duration` of a row; None for what it does not say.

    Raises:
        ValueError: for what is no number of seconds, and for keys that would change what the row means.
    """
    for key, value in row.items():
        if isinstance(key, str) and _is_unknown(key) and _tells(value):
            raise UnknownKey(f"{key} is {value!r}, allowed: offset and duration, in seconds, to name a part of a file")
    offset, duration = (_seconds(key, row.get(key)) for key in SEGMENT_KEYS)
    check_segment(offset, duration)
    return offset, duration


def segment_name(name: str, offset: float | None, duration: float | None) -> str:
    """The name of a file's segment; the file's own where it begins with it."""
    if offset is None:
        return name
    end = "" if duration is None else f"{offset + duration:.10g}"
    return f"{name} {offset:.10g}-{end} s"


def cut_location(location, row: Mapping, *, decoded: bool = False):
    """The location of what a row of a table means: that of its audio, or a segment of it. `decoded`: it is a function
    that gives the audio of the row itself.

    Raises:
        ValueError: as of `row_segment`, which is asked only if the audio is not in the row itself.
    """
    embedded = decoded or isinstance(location, (bytes, dict))
    if embedded:  # what else the row says is then most often about where it was cut from
        row = {key: row[key] for key in SEGMENT_KEYS if row.get(key) is not None and row.get("offset") is not None}
    offset, duration = row_segment(row)
    return location if (offset, duration) == (None, None) else Segment(location, offset, duration, embedded)


def _is_unknown(key: str) -> bool:
    return key not in SEGMENT_KEYS and UNKNOWN_KEY.fullmatch(re.sub(r"[\W_]", "", key.lower())) is not None


def _tells(value) -> bool:
    """Whether a value says something of time or channels; names and empty ones do not."""
    if isinstance(value, str):
        return TIME.fullmatch(value) is not None
    return value is not None and not isinstance(value, bool) and value not in ([], {})


def _seconds(key: str, value) -> float | None:
    if value is None or value == "":
        return None
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError(f"{key} is {value!r}, allowed: seconds") from None
