"""What containers of uncompressed audio claim, held against the bytes that are there: WAV, RF64, AIFF, SVX, W64, CAF,
AU, VOC, NIST Sphere.

A header's size of the samples is right if what follows them is a chunk chain to the file's end, a tag, or the next of
several joined files. Sizes that say nothing, as programs leave them that write to a pipe or die, mean up to the end.
Any other claim is refused with both numbers. Sizes of the whole file (RIFF, FORM) are not needed and not believed.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

from modeling_encodec.processors.audio_parts import Part, read_at, skip_tags


MOST_CHUNKS = 10_000  # of a file
# What may follow the samples and be cut off without harm to them.
KNOWN_CHUNKS = {b"LIST", b"fact", b"cue ", b"smpl", b"bext", b"iXML", b"id3 ", b"ID3 ", b"PEAK", b"junk", b"JUNK"}
W64_TAIL = bytes.fromhex("f3acd3118cd100c04f8edb8a")


@dataclass(frozen=True)
class Layout:
    """How a container writes chunks: the bytes of a name, whether these are four letters or a GUID that ends so, the
    bytes of the size after it and their order, whether the size counts the head, and what sizes are padded to."""

    name: int = 4
    tail: bytes | None = None
    size: int = 4
    order: Literal["little", "big"] = "little"
    counts_head: bool = False
    pad: int = 2

    def chunk(self, file: BinaryIO, place: int) -> tuple[bytes, int, int] | None:
        """Name, size and beginning of the content of the chunk there; None if there is none."""
        length = self.name + self.size
        head = read_at(file, place, length)
        named = head[4:16] == self.tail if self.tail else all(32 <= byte < 127 for byte in head[:4])
        if len(head) < length or not named:
            return None
        size = int.from_bytes(head[self.name :], self.order, signed=self.size == 8)
        return head[:4], size - length if self.counts_head else size, place + length

    def chunks(self, file: BinaryIO, place: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
        """All from there on."""
        for _ in range(MOST_CHUNKS):
            if place >= stop or (found := self.chunk(file, place)) is None:
                return
            yield found
            place = self.after(found)

    def after(self, chunk: tuple[bytes, int, int]) -> int:
        """Where the next chunk begins."""
        _, size, content = chunk
        return content + max(0, -(-size // self.pad) * self.pad)

    def find(self, file: BinaryIO, name: bytes, place: int, stop: int) -> tuple[bytes, int, int] | None:
        """The first chunk of this name."""
        return next((found for found in self.chunks(file, place, stop) if found[0] == name), None)


LITTLE, BIG = Layout(), Layout(order="big")
WAVE64 = Layout(16, W64_TAIL, 8, counts_head=True, pad=8)
CORE = Layout(size=8, order="big", pad=1)


def container_part(file: BinaryIO, start: int, stop: int) -> tuple[Part, int] | None:
    """The recording that begins at `start` and where it ends with all that belongs to it; None for other kinds.

    Raises:
        ValueError: if its header and the bytes of the file do not agree.
    """
    magic = read_at(file, start, 20)
    find = next((find for name, find in FINDERS.items() if magic.startswith(name)), None)
    return find(file, start, stop) if find else None


def _riff(file: BinaryIO, start: int, stop: int) -> tuple[Part, int] | None:
    head = read_at(file, start, 12)
    if head[8:] != b"WAVE":
        return None
    layout = BIG if head[:4] == b"RIFX" else LITTLE
    found = layout.find(file, b"data", start + 12, stop)
    if found is None:
        return None
    _, said, content = found
    if said == 0xFFFFFFFF and (wide := layout.find(file, b"ds64", start + 12, content)):
        said = int.from_bytes(read_at(file, wide[2] + 8, 8), "little")
    form = layout.find(file, b"fmt ", start + 12, content)
    block = int.from_bytes(read_at(file, form[2] + 12, 2), layout.order) if form else 1
    unset = said in (0, (1 << 64) - 1) or 0x7FFFF000 <= said <= 0x80000000 or 0xFFFFF000 <= said <= 0xFFFFFFFF
    end, after = _samples_end(file, content, said, stop, layout, unset, block)
    there = end - content
    if there == said:
        return Part(start, end, exact=True), after
    if there < 1 << 32:
        head = read_at(file, start, content - start - 4) + there.to_bytes(4, layout.order)
        return Part(content, end, head, exact=True), after
    # Its sizes have 32 bits: as RF64 it has 64.
    chunks = [
        read_at(file, place - 8, 8 + size + size % 2)
        for name, size, place in layout.chunks(file, start + 12, content - 8)
        if name != b"ds64"
    ]
    sizes = b"ds64" + struct.pack("<IQQQI", 28, there, there, 0, 0)
    head = b"RF64\xff\xff\xff\xffWAVE" + sizes + b"".join(chunks) + b"data\xff\xff\xff\xff"
    return Part(content, end, head, exact=True), after


def _form(file: BinaryIO, start: int, stop: int) -> tuple[Part, int] | None:
    sought = {b"AIFF": b"SSND", b"AIFC": b"SSND", b"8SVX": b"BODY", b"16SV": b"BODY"}.get(read_at(file, start + 8, 4))
    found = sought and BIG.find(file, sought, start + 12, stop)
    if not found:
        return None
    _, said, content = found
    unset = said in (0, 8) or 0x7F000000 <= said <= 0x80000000 or 0xFFFFF000 <= said <= 0xFFFFFFFF
    end, after = _samples_end(file, content, said, stop, BIG, unset)
    if end - content == said:
        return Part(start, end, exact=True), after
    head = read_at(file, start, content - start - 4) + min(end - content, 0xFFFFFFFF).to_bytes(4, "big")
    return Part(content, end, head, exact=True), after


def _w64(file: BinaryIO, start: int, stop: int) -> tuple[Part, int] | None:
    found = WAVE64.find(file, b"data", start + 40, stop)
    if found is None:
        return None
    _, said, content = found
    end, after = _samples_end(file, content, said, stop, WAVE64, said in (-24, 0) or not 0 < said < 1 << 62)
    return Part(start, end, exact=True), after  # libsndfile reads to the end, whatever the size


def _caf(file: BinaryIO, start: int, stop: int) -> tuple[Part, int] | None:
    found = CORE.find(file, b"data", start + 8, stop)
    if found is None:
        return None
    _, said, content = found
    end, after = _samples_end(file, content, said, stop, CORE, said in (-1, 0))
    if end - content == said:
        return Part(start, end, exact=True), after
    head = read_at(file, start, content - start - 8) + (end - content).to_bytes(8, "big")
    return Part(content, end, head, exact=True), after


def _au(file: BinaryIO, start: int, stop: int) -> tuple[Part, int] | None:
    offset, said = struct.unpack(">II", read_at(file, start + 4, 8).ljust(8, b"\0"))
    content = start + offset
    if not 24 <= offset <= stop - start:
        return None
    end, after = _samples_end(file, content, said, stop, None, said in (0, 0xFFFFFFFF))
    if end - content == said:
        return Part(start, end, exact=True), after
    head = read_at(file, start, 8) + b"\xff" * 4 + read_at(file, start + 12, offset - 12)
    return Part(content, end, head, exact=True), after


def _voc(file: BinaryIO, start: int, stop: int) -> tuple[Part, int] | None:
    content = start + int.from_bytes(read_at(file, start + 20, 2), "little")
    place = content
    for _ in range(MOST_CHUNKS):
        head = read_at(file, place, 4)
        if place >= stop or not 1 <= head[0] <= 9 or len(head) < 4:
            break
        place += 4 + int.from_bytes(head[1:], "little")
    place += read_at(file, place, 1) == b"\0"  # the end's own mark
    end, after = _samples_end(file, content, place - content, stop, None, False)
    return Part(start, end, exact=True), after


def _nist(file: BinaryIO, start: int, stop: int) -> tuple[Part, int] | None:
    lines = read_at(file, start, 1024).split(b"end_head")[0].decode("latin-1").splitlines()
    fields = {words[0]: words[2] for line in lines if len(words := line.split(maxsplit=2)) == 3}
    try:
        content = start + int(lines[1])
        said = int(fields["sample_count"]) * int(fields["channel_count"]) * int(fields["sample_n_bytes"])
    except (KeyError, ValueError, IndexError):
        return None
    if "," in fields.get("sample_coding", ""):  # compressed, which libsndfile refuses
        return None
    end, after = _samples_end(file, content, said, stop, None, False)
    return Part(start, end, exact=True), after


FINDERS: dict[bytes, Callable[[BinaryIO, int, int], tuple[Part, int] | None]] = {
    b"RIFF": _riff,
    b"RIFX": _riff,
    b"RF64": _riff,
    b"BW64": _riff,
    b"FORM": _form,
    b"riff\x2e\x91\xcf\x11": _w64,
    b"caff": _caf,
    b".snd": _au,
    b"Creative Voice File": _voc,
    b"NIST_1A": _nist,
}


def _samples_end(
    file: BinaryIO, content: int, said: int, stop: int, layout: Layout | None, unset: bool, block: int = 1
) -> tuple[int, int]:
    """Where the samples end that begin at `content`, and where all that belongs to them does.

    Args:
        file: the file.
        content: where the samples begin.
        said: their bytes, as the header says.
        stop: where the file ends.
        layout: of the chunks that may follow; None for containers without.
        unset: whether that is what programs write where they do not know it.
        block: bytes of a sample of all channels.

    Raises:
        ValueError: if the header says something else than what is there.
    """
    there = stop - content
    for begin in dict.fromkeys((layout.after((b"", said, content)) if layout else content + said, content + said)):
        if 0 <= said <= there and (after := _walk(file, min(begin, stop), stop, layout)) is not None:
            return content + said, after
    if unset or 0 < said - there < block:
        return stop, stop
    cut = "cut off: " if said > there else ""
    raise ValueError(f"{cut}header says {said} bytes of samples, file holds {there}")


def _walk(file: BinaryIO, place: int, stop: int, layout: Layout | None) -> int | None:
    """Where the chunks, tags and padding end that follow samples: at the file's end, or at the next recording; None
    if something else follows."""
    for _ in range(MOST_CHUNKS):
        place = skip_tags(file, place, stop)
        if place == stop or read_at(file, place, 20).startswith((*FINDERS, b"OggS", b"fLaC")):
            return place
        found = layout and layout.chunk(file, place)
        if not found or found[1] < 0:
            return None
        if found[0] in (b"data", b"SSND"):
            raise ValueError("holds several chunks of samples, allowed: one")
        place = layout.after(found)
        if place > stop + 1:
            return stop if found[0] in KNOWN_CHUNKS else None
        place = min(place, stop)
    return None
