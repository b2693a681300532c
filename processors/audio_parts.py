"""Parts of audio files: stretches of bytes that libsndfile reads apart, and a file object that shows it one."""

import io
from dataclasses import dataclass
from typing import BinaryIO


# After the audio some programs leave zeros, up to a block of the disk, or a few bytes; these are no audio.
MOST_PADDING, MOST_STRAY_BYTES = 4096, 7
FAR_END = 1 << 40  # of parts whose length libsndfile estimates


@dataclass(frozen=True)
class Part:
    """A recording in a file, whole: the bytes `start` to `stop`, after the bytes `head` in place of what stood there.

    Attributes:
        frames: samples of a channel, where that is known better than by what libsndfile says; else None.
        known: whether libsndfile's count, or `frames`, is right; else only decoding tells.
        endless: whether libsndfile estimates the length by the size, so that it must be told a greater one.
        exact: whether one sample less than that is a fault of the file; of lossy formats a few may be missing.
        stride: samples after whose multiples decoding begins in the same state; where that is not 0, decoding begins
            four of them early to give what it gives from the start on.
        seek_last: the last sample that libsndfile seeks rightly; in the last page of Vorbis it is some samples off.
    """

    start: int
    stop: int
    head: bytes = b""
    frames: int | None = None
    known: bool = True
    endless: bool = False
    exact: bool = False
    stride: int = 0
    seek_last: int | None = None


class Window(io.RawIOBase):
    """A part of a file as a file of its own; `file` is moved in."""

    def __init__(self, file: BinaryIO, part: Part):
        self.file, self.part, self.place = file, part, 0
        self.size = len(part.head) + part.stop - part.start

    def readinto(self, buffer) -> int:
        """As of files."""
        head, data = self.part.head, b""
        if self.part.endless and self.place >= FAR_END - 128:  # where a tag would be is looked first
            data = bytes(min(len(buffer), FAR_END - self.place))
        wanted = min(len(buffer), max(0, self.size - self.place))
        if self.place < len(head):
            data = head[self.place : self.place + wanted]
        elif wanted:
            self.file.seek(self.part.start + self.place - len(head))
            data = self.file.read(wanted)
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of files; the end is far away if the part is endless."""
        end = FAR_END if self.part.endless else self.size
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: end}[whence]
        return self.place

    def tell(self) -> int:
        """As of files."""
        return self.place

    def readable(self) -> bool:
        """As of files."""
        return True

    def seekable(self) -> bool:
        """As of files."""
        return True


def read_at(file: BinaryIO, place: int, count: int) -> bytes:
    """So many bytes from there on, fewer at the end."""
    file.seek(place)
    return file.read(count)


def find_bytes(file: BinaryIO, sought: bytes, start: int, stop: int, block: int = 1 << 22) -> int:
    """Where `sought` begins, at or after `start` and before `stop`; -1 if it does not."""
    while start < stop:
        data = read_at(file, start, min(block, stop - start) + len(sought) - 1)
        place = data.find(sought)
        if place >= 0:
            return start + place if start + place < stop else -1
        start += block
    return -1


def skip_tags(file: BinaryIO, place: int, stop: int) -> int:
    """The first place from `place` on that is in no tag (ID3, APE, Lyrics3) and no padding."""
    while place < stop:
        start = read_at(file, place, 32)
        if start[:3] == b"ID3" and len(start) >= 10 and max(start[6:10]) < 128:
            place += 10 + _syncsafe(start[6:10]) + (10 if start[5] & 0x10 else 0)
        elif start[:3] == b"TAG" and stop - place >= 128:
            place += 128
        elif start[:8] == b"APETAGEX" and len(start) == 32:
            place += 32 + int.from_bytes(start[12:16], "little")
        elif start[:11] == b"LYRICSBEGIN":
            end = find_bytes(file, b"LYRICS200", place, min(stop, place + (1 << 20)))
            if end < 0:
                return place
            place = end + 9
        else:
            break
    rest = read_at(file, place, MOST_PADDING + 1)
    zeros = len(rest) - len(rest.lstrip(b"\0"))
    if place + zeros >= stop or (MOST_STRAY_BYTES < zeros <= MOST_PADDING):
        place += min(zeros, MOST_PADDING)
    return stop if stop - place <= MOST_STRAY_BYTES else place


def _syncsafe(data: bytes) -> int:
    return sum(byte << 7 * (3 - number) for number, byte in enumerate(data))
