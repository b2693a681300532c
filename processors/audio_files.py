"""Audio files as they truly are: every recording in them, to the end of the last.

What a file claims is checked against its bytes (`audio_containers`, `audio_streams`) before libsndfile reads it, part
by part. Lengths are had without decoding where the structure tells them, as it does of all but some FLAC.
"""

import dataclasses
import io
import math
import os
import stat
from typing import BinaryIO

import numpy as np
import soundfile

from modeling_encodec.models.inputs_encodec import array_is_finite
from modeling_encodec.processors.audio_containers import container_part
from modeling_encodec.processors.audio_ffmpeg import FfmpegAudio, ffmpeg_path, for_ffmpeg
from modeling_encodec.processors.audio_parts import Part, Window, skip_tags
from modeling_encodec.processors.audio_streams import stream_parts


# What libsndfile counts, or more, where a header has no count.
UNKNOWN_FRAMES = 1 << 62
# A lossy file that gives less than this part of what its header promises is cut off.
LEAST_COMPLETE = 0.9
# What is opened as audio is a file: a named pipe would be waited for, and a device may have no end.
NO_FILE = "no such file"
OTHER_THINGS = {
    stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}  # fmt: skip
# Seconds that a segment may end after the file, as durations are rounded.
SEGMENT_TOLERANCE = 0.01
MOST_LOOKED_AT = 4096  # files of which it is kept what was found
_LOOKED_AT: dict[tuple, tuple] = {}
BLOCK = 1 << 16  # samples of a channel that are decoded at a time to count them


class AudioFile:
    """An audio file, open for reading, by libsndfile or, where that does not know it, by ffmpeg.

    Attributes:
        sampling_rate: in Hz.
        channels: how many.
    """

    def __init__(self, source: str | os.PathLike | bytes | BinaryIO):
        """`source`: a path, encoded bytes, or a binary file that can be sought in.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is no audio, cut off, says something else than it holds, or joins recordings of several
                rates or numbers of channels.
        """
        self._source = io.BytesIO(source) if isinstance(source, bytes) else source
        self._opened = not hasattr(self._source, "read")
        self._file = open(self._source, "rb") if self._opened else self._source  # noqa: SIM115
        self._sound, self._number, self._place = None, -1, 0
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self._size = self._file.seek(0, os.SEEK_END)
        if not self._size:  # libsndfile would wait for the bytes of files in /proc
            raise ValueError("not readable as audio (empty file)")
        key = (
            (os.path.abspath(self._source), self._size, os.fstat(self._file.fileno()).st_mtime_ns)
            if self._opened
            else None
        )
        if key in _LOOKED_AT:  # a file is walked once, and not for every crop of it
            self._parts, self._claims, self.sampling_rate, self.channels = _LOOKED_AT[key]
        else:
            self._look()
            if key is not None and self.decoder == "libsndfile":
                if len(_LOOKED_AT) >= MOST_LOOKED_AT:
                    _LOOKED_AT.clear()
                _LOOKED_AT[key] = self._parts, self._claims, self.sampling_rate, self.channels
        self._lengths = [claim if part.known else None for part, claim in zip(self._parts, self._claims)]
        self._go_to(0)

    def _look(self) -> None:
        """Find the parts, and what is said of them."""
        self._parts = find_parts(self._file, self._size)
        self._claims: list[int | None] = []
        kinds = {}
        for number, part in enumerate(list(self._parts)):
            if number >= len(self._parts):  # ffmpeg reads all of them
                break
            try:
                self._go_to(number)
            except soundfile.LibsndfileError as error:
                if number or not for_ffmpeg(self._file, self._name()):
                    raise _unreadable(error) from None
                if ffmpeg_path() is None:
                    raise ValueError("not readable as audio (ffmpeg, which may read it, is not installed)") from None
                part = Part(0, self._size, known=False)
                self._parts, self._number = [part], 0
                self._sound = FfmpegAudio(self._source)
            kinds[self._sound.samplerate, self._sound.channels] = None
            unknown = self._sound.frames >= UNKNOWN_FRAMES
            if unknown and part.frames is None:
                self._parts[number] = dataclasses.replace(self._parts[number], known=False)
            self._claims.append(part.frames if part.frames or unknown else self._sound.frames)
        if len(kinds) > 1:
            joined = " and ".join(f"{rate} Hz with {channels} channels" for rate, channels in kinds)
            raise ValueError(f"joins recordings of {joined}, allowed: of one rate and number of channels")
        self.sampling_rate, self.channels = next(iter(kinds))

    @property
    def decoder(self) -> str:
        """What decodes it."""
        return "ffmpeg" if isinstance(self._sound, FfmpegAudio) else "libsndfile"

    def _name(self) -> str:
        name = self._source if self._opened else getattr(self._source, "name", "")
        return os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else ""

    def __enter__(self) -> "AudioFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, unless it was given open."""
        if self._sound is not None:
            self._sound.close()
        if self._opened:
            self._file.close()

    @property
    def known_frames(self) -> int | None:
        """Samples of a channel, None if only decoding tells."""
        return None if None in self._lengths else sum(self._lengths)

    def count_frames(self) -> int:
        """Samples of a channel, decoding what is needed; the next read is of the first one.

        Raises:
            ValueError: if it cannot be decoded to its end.
        """
        for number, length in enumerate(self._lengths):
            if length is None:
                self._go_to(number)
                while len(self._read(BLOCK)):
                    pass
                self._lengths[number] = self._place
        self._go_to(0)
        return sum(self._lengths)

    def read(self, count: int) -> np.ndarray:
        """The next samples, float32 (T, channels): so many, fewer at the end alone.

        Raises:
            ValueError: if it cannot be decoded, ends before it should, or holds samples that are not finite.
        """
        blocks, missing = [np.zeros((0, self.channels), np.float32)], count
        while missing:
            block = self._read(missing)
            blocks.append(block)
            missing -= len(block)
            if missing:
                self._check_end()
                self._lengths[self._number] = self._place
                if self._number + 1 == len(self._parts):
                    break
                self._go_to(self._number + 1)
        samples = blocks[1] if len(blocks) == 2 else np.concatenate(blocks)
        if not array_is_finite(samples):
            raise ValueError("holds samples that are NaN or infinite")
        return samples

    def seek(self, frame: int) -> None:
        """The next read is from sample `frame` on."""
        for number in range(len(self._parts)):
            if number + 1 == len(self._parts):
                break
            if self._lengths[number] is None:
                self.count_frames()
            if frame < self._lengths[number]:
                break
            frame -= self._lengths[number]
        self._go_to(number)
        if not frame:
            return
        part, length = self._parts[number], self._lengths[number]
        start = max(0, frame // part.stride - 4) * part.stride if part.stride else frame
        start = start if part.seek_last is None else min(start, part.seek_last)
        # libsndfile does not seek where it has no count.
        if part.known and start and (length is None or start < length):
            try:
                self._place = self._sound.seek(start)
            except soundfile.LibsndfileError as error:
                raise _unreadable(error) from None
        self._skip(frame - self._place)

    def _skip(self, frames: int) -> None:
        while frames and (got := len(self._read(min(frames, BLOCK)))):
            frames -= got

    def _go_to(self, number: int) -> None:
        """Open a part at its beginning."""
        if self._number == number and self._place == 0 and self._sound is not None:
            return
        if isinstance(self._sound, FfmpegAudio):
            self._sound.seek(0)
            self._place = 0
            return
        if self._sound is not None:
            self._sound.close()
            self._sound = None
        part = self._parts[number]
        whole = (part.start, part.stop, part.head, part.endless) == (0, self._size, b"", False)
        if whole and self._opened:  # names as the file system has them: they need not be UTF-8
            self._sound = soundfile.SoundFile(os.fsencode(self._source))
        else:
            self._file.seek(0)
            self._sound = soundfile.SoundFile(self._file if whole else Window(self._file, part))
        # Else soundfile reads no more than it says, and seeks after reading, which changes the last bits of MP3.
        self._sound.seekable = lambda: False
        self._number, self._place = number, 0

    def _read(self, count: int) -> np.ndarray:
        length = self._claims[self._number]
        if self._parts[self._number].exact and self._parts[self._number].known and length is not None:
            count = min(count, max(0, length - self._place))  # what follows FLAC it would take for damage
        try:
            block = self._sound.read(count, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise _unreadable(error) from None
        self._place += len(block)
        return block

    def _check_end(self) -> None:
        claim, part = self._claims[self._number], self._parts[self._number]
        if claim and self._place < claim * (1 if part.exact else LEAST_COMPLETE):
            raise ValueError(f"cut off: header says {claim} samples, file holds {self._place}")


def file_fault(path: str | os.PathLike) -> str | None:
    """Why something under that name is not to be opened: it is missing, or no regular file. None for files."""
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that cannot be, with a zero byte
        return NO_FILE
    except OSError as error:
        return error.strerror
    return None if kind == stat.S_IFREG else f"is a {OTHER_THINGS.get(kind, 'special file')}, allowed: a file"


def find_parts(file: BinaryIO, size: int) -> list[Part]:
    """The recordings in a file of so many bytes; of a kind that is not known here, the file as one.

    Raises:
        ValueError: if the file says something else than it holds.
    """
    parts: list[Part] = []
    place = 0
    while place < size:
        found = container_part(file, place, size)
        more, end = ([found[0]], found[1]) if found else stream_parts(file, place, size) or ([], place)
        if end == place and parts:
            raise ValueError(f"header says {place} bytes, file holds {size}, of which the last are no audio")
        if end == place:
            return [Part(0, size)]
        parts += more
        place = skip_tags(file, end, size)
    return parts or [Part(0, size)]


def check_segment(offset: float | None, duration: float | None) -> None:
    """Refuse with a ValueError what is no segment of any file."""
    for name, value, allowed in (("offset", offset, "0 or more"), ("duration", duration, "above 0")):
        number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        if value is not None and not (number and 0 <= value < math.inf and (value or name == "offset")):
            raise ValueError(f"{name} is {value!r}, allowed: {allowed}, in seconds")


def segment_span(
    offset: float | None, duration: float | None, rate: int, frames: int, *, embedded: bool = False
) -> tuple[int, int]:
    """The first sample and the number of samples of a segment, in seconds, of audio of so many `frames`.

    Without `offset` a `duration` that is the audio's own, within `SEGMENT_TOLERANCE`, means all of it; so it does
    with one for `embedded` audio, that may be cut already.

    Raises:
        ValueError: if the segment is not within the audio.
    """
    first = round((offset or 0) * rate)
    count = None if duration is None else round(duration * rate)
    tolerance = SEGMENT_TOLERANCE * rate
    if count is not None and (offset is None or embedded) and abs(frames - count) <= tolerance:
        return 0, frames
    left = frames - first
    if left <= 0 or (count is not None and count - left > tolerance):
        end = "its end" if duration is None else f"{(offset or 0) + duration:g} s"
        raise ValueError(f"segment is {offset or 0:g} s to {end}, file holds {frames / rate:g} s")
    return first, left if count is None else min(count, left)


def _unreadable(error: soundfile.LibsndfileError) -> ValueError:
    return ValueError(f"not readable as audio ({error.error_string.rstrip('.')})")
