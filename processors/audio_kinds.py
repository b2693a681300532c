"""Kinds of files by their suffixes: what is audio to every command, and what is said of the rest."""

import os
from collections import Counter
from pathlib import Path

import soundfile

from modeling_encodec.processors.audio_ffmpeg import OTHER_SUFFIXES, ffmpeg_path, ffmpeg_version


_ALIASES = {
    "AIFF": (".aif", ".aifc"), "AU": (".snd",), "IRCAM": (".sf",), "MP3": (".mp2", ".mp1", ".mpga"),
    "NIST": (".sph",), "OGG": (".oga", ".opus"), "SVX": (".8svx", ".16svx", ".iff"),
    "W64": (".wave64",), "WAV": (".wave", ".bwf"), "RF64": (".bw64",),
}  # fmt: skip


def _libsndfile_suffixes() -> tuple[str, ...]:
    first = (".wav", ".flac", ".ogg", ".opus", ".mp3")
    there = [name for name in soundfile.available_formats() if name != "RAW"]  # it has no header
    found = {suffix for name in there for suffix in (f".{name.lower()}", *_ALIASES.get(name, ()))}
    return (*(suffix for suffix in first if suffix in found), *sorted(found - set(first)))


# What libsndfile reads, the usual ones first; and all that can be read here.
SNDFILE_SUFFIXES = _libsndfile_suffixes()
AUDIO_SUFFIXES = (*SNDFILE_SUFFIXES, *(OTHER_SUFFIXES if ffmpeg_path() else ()))


class OtherFiles:
    """Files met in listing a corpus that libsndfile does not read, counted by suffix.

    Attributes:
        decoded (Counter): of what ffmpeg reads, if it is installed.
        left_out (Counter): of what nothing reads.
    """

    def __init__(self):
        self.decoded, self.left_out = Counter(), Counter()

    def take(self, name: str, *, listed: bool = False) -> bool:
        """Whether a file is audio by its name, or because a manifest has it `listed`; it is counted if libsndfile does
        not read it."""
        suffix = os.path.splitext(name)[1].lower()
        if suffix in SNDFILE_SUFFIXES:
            return True
        if not suffix.isprintable():  # it is to be shown and stored
            suffix = suffix.encode("unicode_escape").decode("ascii")
        decoded = suffix in OTHER_SUFFIXES and ffmpeg_path() is not None
        if decoded:
            self.decoded[suffix] += 1
        elif not listed:
            self.left_out[suffix] += 1
        return decoded or listed

    def describe(self) -> dict:
        """JSON: how many of which suffix are read by ffmpeg, and left out."""
        return {"read_by_ffmpeg": _sorted(self.decoded), "left_out": _sorted(self.left_out)}

    def lines(self) -> list[str]:
        """What is to be said of them; nothing if there are none."""
        said = []
        if self.decoded:
            said.append(f"{_count(self.decoded)}, read by ffmpeg {ffmpeg_version()}")
        if self.left_out:
            lacking = set(self.left_out) & set(OTHER_SUFFIXES)
            why = "; ffmpeg is not installed, which reads some of them" if lacking else ""
            said.append(f"{_count(self.left_out)}, left out{why}")
        return said


def is_audio(name: str) -> bool:
    """Whether a file is audio by its name."""
    return os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES


def list_audio(
    folder: str | os.PathLike, other: OtherFiles | None = None, *, suffixes: tuple[str, ...] = ()
) -> list[Path]:
    """The audio files in a folder and below it, and those with other `suffixes` that are asked for, sorted; the rest
    is counted in `other`."""
    other = OtherFiles() if other is None else other
    found, waiting = [], [os.fspath(folder)]
    while waiting:  # without recursion: folders may be deeper than the stack, and links go in circles
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif os.path.isfile(entry.path):
                        found.append(Path(entry.path))
        except OSError:
            continue  # a folder that may not be listed, or is gone
    return [path for path in sorted(found) if path.suffix.lower() in suffixes or other.take(path.name)]


def _sorted(counts: Counter) -> dict[str, int]:
    return {suffix: counts[suffix] for suffix in sorted(counts)}


def _count(counts: Counter) -> str:
    total = counts.total()
    kinds = ", ".join(f"{suffix or 'no suffix'} ({count})" for suffix, count in _sorted(counts).items())
    return f"{total} {'file' if total == 1 else 'files'} of other kinds: {kinds}"


def safe_name(name: str) -> str:
    """A file's name as text that can be stored and shown; different for different names."""
    return name if name.isprintable() and "\\" not in name else name.encode("unicode_escape").decode("ascii")
