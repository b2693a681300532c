"""The two ends of a pipe: neither can seek."""

import io


class Sink:
    """The writing end of a pipe: has nothing but `write`."""

    def __init__(self):
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data


class Trickle(io.RawIOBase):
    """A pipe: never seeks, gives few bytes at a time, counts what it gave."""

    def __init__(self, data: bytes, step: int = 3):
        self.data, self.step, self.given = data, step, 0

    def read(self, size: int = -1) -> bytes:
        piece = self.data[self.given : self.given + min(size, self.step)]
        self.given += len(piece)
        return piece

    def seekable(self) -> bool:
        return False

    def seek(self, *_):
        raise io.UnsupportedOperation("seek")
