"""Corpora that nobody should have to read: for each what is good in it, and what is bad.

A case is a function of an empty folder that returns a `Hostile`.
"""

import io
import json
import os
import socket
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from corpus_files import sound


@dataclass
class Hostile:
    """What to tokenize, the names of rows with tokens, those without and what is said of them, and more options of the
    command."""

    source: Path
    good: list[str]
    bad: dict[str, str]
    options: tuple = ()


CASES: dict[str, Callable[[Path], Hostile]] = {}


def case(name: str):
    """Add a function to the table."""

    def add(function):
        CASES[name] = function
        return function

    return add


def clip(seed: int = 0, form: str = "WAV", samples: int = 1200) -> bytes:
    """A good clip."""
    file = io.BytesIO()
    soundfile.write(file, sound(24000, 1, samples, seed), 24000, format=form)
    return file.getvalue()


def wav(rate: int = 24000, channels: int = 1, frames: int = 900, said: int | None = None) -> bytes:
    """WAV with a header of any kind."""
    block, data = 2 * channels, bytes(range(1, 201)) * (2 * channels * frames // 200)
    size = len(data) if said is None else said
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * block & 0xFFFFFFFF, block & 0xFFFF, 16)
    head = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", 36 + len(data)) + head + data


def flac(samples: int) -> bytes:
    """FLAC that says that it has so many samples."""
    data = bytearray(clip(form="FLAC"))
    data[21] = data[21] & 0xF0 | samples >> 32
    data[22:26] = (samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


# ---- folders -------------------------------------------------------------------------------------------------------


def of_folder(name: str, reason: str, make: Callable[[Path], None], *, shown: str | None = None):
    """A case of one bad file among two good ones."""

    def build(folder: Path) -> Hostile:
        (folder / "clips").mkdir()
        for seed, good in enumerate(("a.wav", "z.wav")):
            (folder / "clips" / good).write_bytes(clip(seed))
        make(folder / "clips")
        return Hostile(folder / "clips", ["a.wav", "z.wav"], {shown or name: reason})

    return build


def bind(path: Path) -> None:
    """A socket; its name is short enough only from within its folder."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def link_to_a_pipe(path: Path) -> None:
    """A link to what would be waited for."""
    os.mkfifo(path.parent / "pipe")
    path.symlink_to("pipe")


def loop(folder: Path) -> None:
    """Links of folders in a circle, and one that is called like audio."""
    (folder / "deep").mkdir()
    (folder / "deep" / "up").symlink_to(folder)
    (folder / "up.wav").symlink_to(folder)


PLAYLIST = "ffconcat version 1.0\nfile 'a.wav'\n"  # of which ffmpeg would open what it names
FILES = {
    "a named pipe": ("p.wav", "is a named pipe, allowed: a file", lambda path: os.mkfifo(path)),
    "a socket": ("s.wav", "is a socket, allowed: a file", bind),
    "a link to itself": ("l.wav", "Too many levels of symbolic links", lambda path: path.symlink_to(path.name)),
    "a dangling link": ("d.wav", "no such file", lambda path: path.symlink_to("nowhere.wav")),
    "a link to a device": ("n.wav", "is a device, allowed: a file", lambda path: path.symlink_to("/dev/zero")),
    "a link to a pipe": ("n.wav", "is a named pipe", link_to_a_pipe),
    "an empty file": ("e.wav", "not readable as audio", lambda path: path.touch()),
    "a file of the kernel's": ("k.wav", "Invalid|not readable", lambda path: path.symlink_to("/proc/self/status")),
    "text": ("t.wav", "not readable as audio", lambda path: path.write_text("<html>")),
    "zeros": ("0.wav", "not readable as audio", lambda path: path.write_bytes(bytes(9000))),
    "2**31 - 1 Hz": ("r.wav", "sampling rate is 2147483647 Hz", lambda path: path.write_bytes(wav(2**31 - 1))),
    "1 Hz": ("r.wav", "sampling rate is 1 Hz", lambda path: path.write_bytes(wav(1, frames=90000))),
    "0 Hz": ("r.wav", "not readable as audio", lambda path: path.write_bytes(wav(0))),
    "65535 channels": ("c.wav", "not readable as audio", lambda path: path.write_bytes(wav(channels=65535, frames=2))),
    "no channels": ("c.wav", "not readable as audio", lambda path: path.write_bytes(wav(channels=0))),
    "gigabytes claimed": ("h.wav", "cut off: header says", lambda path: path.write_bytes(wav(said=2**32 - 6000))),
    "2**36 - 1 samples claimed": ("h.flac", "cut off: header says", lambda path: path.write_bytes(flac(2**36 - 1))),
    "half a file": ("h.flac", "not readable|cut off", lambda path: path.write_bytes(clip(form="FLAC")[:900])),
    "samples that are NaN": (
        "n.wav", "NaN or infinite",
        lambda path: soundfile.write(path, np.full(900, np.nan, np.float32), 24000, subtype="FLOAT"),
    ),
    "a playlist": ("p.m4a", "not readable as audio", lambda path: path.write_text(PLAYLIST)),
    "a name with a newline": ("n\nm.wav", "no audio|not readable", lambda path: path.write_bytes(b"x" * 99)),
}  # fmt: skip
for title, (name, reason, make) in FILES.items():
    CASES[f"folder: {title}"] = of_folder(
        name, reason, lambda clips, make=make, name=name: make(clips / name), shown=name.replace("\n", "\\n")
    )
CASES["folder: links of folders in a circle"] = of_folder("up.wav", "is a folder, allowed: a file", loop)
CASES["folder: a name that is no UTF-8"] = of_folder(
    "", "not readable", lambda clips: Path(os.fsdecode(os.fsencode(clips) + b"/\xff.wav")).touch(), shown="\\udcff.wav"
)


@case("folder: more channels than a file has, and many")
def many_channels(folder: Path) -> Hostile:
    """1024 of them are read."""
    (folder / "clips").mkdir()
    (folder / "clips" / "a.wav").write_bytes(wav(channels=1024, frames=900))
    return Hostile(folder / "clips", ["a.wav"], {})


# ---- manifests -----------------------------------------------------------------------------------------------------

NO_ROWS = {
    "null": (b"null", "is a NoneType, allowed: an object"),
    "a number": (b"7", "is a int, allowed: an object"),
    "a list": (b'["a.wav"]', "is a list, allowed: an object"),
    "a text": (b'"a.wav"', "is a str, allowed: an object"),
    "no JSON": (b'{"path": ', "is no JSON"),
    "deep JSON": (b"[" * 100_000, "is no JSON"),
    "no UTF-8": (b'{"path": "\xff.wav"}', "is not UTF-8"),
    "no path": (b'{"file": "a.wav"}', "has no path"),
    "an empty path": (b'{"path": ""}', "path is ''"),
    "a path of another type": (b'{"path": {"a": 1}}', "path is {'a': 1}, allowed: a text"),
    "two paths": (b'{"path": "a.wav", "audio_filepath": "z.wav"}', "allowed: one"),
    "an offset below 0": (b'{"path": "a.wav", "offset": -1}', "offset is -1"),
    "an offset that is text": (b'{"path": "a.wav", "offset": "soon"}', "offset is 'soon'"),
    "an endless duration": (b'{"path": "a.wav", "duration": Infinity}', "duration is inf"),
    "a number of 5,000 digits": (b'{"path": "a.wav", "n": ' + b"9" * 5000 + b"}", "is no JSON"),
}
NO_FILES = {
    "a zero byte": ("nul\0.wav", "no such file"),
    "a very long path": ("x" * 5000 + ".wav", "File name too long"),
    "half a character": ("\ud800.wav", "no such file"),
    "a URL": ("http://127.0.0.1:9/a.wav", "no such file"),
    "a URL of a file": ("file:///etc/passwd", "no such file"),
    "a path in an archive": ("zip://x::file:///etc/passwd", "no such file"),
    "a folder": (".", "is a folder, allowed: a file"),
    "a pipe": ("pipe.wav", "is a named pipe, allowed: a file"),
    "a device": ("/dev/zero", "is a device, allowed: a file"),
}


def of_lines(line: bytes, name: str, reason: str, *, last: bytes = b'{"path": "z.wav"}') -> Callable[[Path], Hostile]:
    """A manifest with a bad line between two good ones."""

    def build(folder: Path) -> Hostile:
        for seed, good in enumerate(("a.wav", "z.wav")):
            (folder / good).write_bytes(clip(seed))
        os.mkfifo(folder / "pipe.wav")
        (folder / "m.jsonl").write_bytes(b'{"path": "a.wav"}\n' + line + b"\n\n" + last + b"\n")
        return Hostile(folder / "m.jsonl", ["a.wav", "z.wav"], {name: reason})

    return build


for title, (line, reason) in NO_ROWS.items():
    CASES[f"jsonl: {title}"] = of_lines(line, "m.jsonl row 2", reason)
for title, (path, reason) in NO_FILES.items():
    shown = {"a zero byte": "nul\\x00.wav", "half a character": "\\ud800.wav"}.get(title, path)
    shown = "" if "/" in path else shown
    CASES[f"jsonl: {title}"] = of_lines(json.dumps({"path": path}).encode(), shown, reason)


@case("csv: a field of 140 kB, zero bytes, too many values and no UTF-8")
def odd_csv(folder: Path) -> Hostile:
    """All in one."""
    for seed, name in enumerate(("a.wav", "b.wav", "c.wav")):
        (folder / name).write_bytes(clip(seed))
    long = b"x" * 140_000
    rows = (b"path,text", b"a.wav," + long, b"b.wav,x,y,z", b"\xff.wav,x", b"b.wav,nul\0", b",x", b"c.wav")
    (folder / "m.csv").write_bytes(b"\r\n".join(rows) + b"\r\n")
    bad = {
        "m.csv row 2": "more values than",
        "m.csv row 3": "is not UTF-8",
        "m.csv row 5": "path is '', allowed: a text",
    }
    return Hostile(folder / "m.csv", ["a.wav", "b.wav", "c.wav"], bad, ("--keep", "text"))


@case("csv: a bad header")
def no_header(folder: Path) -> Hostile:
    """Columns without a name, and one twice."""
    (folder / "a.wav").write_bytes(clip())
    (folder / "m.csv").write_text("path,,text,text\na.wav,1,2,3\n\nmissing.wav,,,\n")
    return Hostile(folder / "m.csv", ["a.wav"], {"missing.wav": "no such file"})


@case("txt: no UTF-8")
def odd_txt(folder: Path) -> Hostile:
    """Among good lines."""
    (folder / "a.wav").write_bytes(clip())
    (folder / "m.txt").write_bytes(b"\xef\xbb\xbfa.wav\r\n\xff.wav\r\nb\0.wav\r\n")
    return Hostile(folder / "m.txt", ["a.wav"], {"m.txt row 2": "is not UTF-8", "b\\x00.wav": "no such file"})


# ---- tables --------------------------------------------------------------------------------------------------------


def of_table(audio, reason: str, **columns) -> Callable[[Path], Hostile]:
    """Parquet with a bad row between good ones; `audio` is its audio."""

    def build(folder: Path) -> Hostile:
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        rows = [{"bytes": clip(0), "path": "http://127.0.0.1:9/name.wav"}, audio, {"bytes": clip(1), "path": None}]
        pq.write_table(pa.table({"audio": pa.array(rows, kind)} | columns), folder / "t.parquet")
        keep = tuple(word for name in columns for word in ("--keep", name))
        good = ["t.parquet row 000000", "t.parquet row 000002"]
        return Hostile(folder / "t.parquet", good, {"t.parquet row 000001": reason}, keep)

    return build


URLS = (
    "http://127.0.0.1:9/latest", "https://localhost:9/x", "file:///etc/passwd", "zip://x::file:///etc/passwd",
    "hf://datasets/a/b@main/x.wav", "s3://bucket/x.wav", "memory://x.wav", "simplecache::http://127.0.0.1:9/x",
    "reference://::file:///etc/passwd", "ftp://127.0.0.1:9/x", "data://text,x", "HTTP://127.0.0.1:9/x",
)  # fmt: skip
for url in URLS:
    CASES[f"parquet: {url}"] = of_table({"bytes": None, "path": url}, "audio is at the URL ")
ROWS = {
    "nothing": (None, "audio is a NoneType"),
    "neither bytes nor path": ({"bytes": None, "path": None}, "audio is a NoneType"),
    "empty bytes": ({"bytes": b"", "path": None}, "audio is a NoneType|not readable"),
    "a device": ({"bytes": None, "path": "/dev/zero"}, "is a device"),
    "a file that is none of audio": ({"bytes": None, "path": "/etc/passwd"}, "not readable as audio"),
    "a folder": ({"bytes": None, "path": "/"}, "is a folder"),
    "a missing file": ({"bytes": None, "path": "nul\0"}, "no such file"),
    "a playlist": ({"bytes": b"ffconcat version 1.0\nfile '/etc/passwd'\n", "path": "x.m4a"}, "not readable as audio"),
}
for title, (audio, reason) in ROWS.items():
    CASES[f"parquet: {title}"] = of_table(audio, reason)


def labelled(value: int) -> Callable[[Path], Hostile]:
    """A label that has no name."""

    def build(folder: Path) -> Hostile:
        kind = {"names": ["x", "y"], "_type": "ClassLabel"}
        rows = [{"bytes": clip(seed), "path": None} for seed in range(3)]
        table = pa.table({"audio": rows, "label": [0, value, -1]})
        about = {"info": {"features": {"label": kind}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
        pq.write_table(table, folder / "t.parquet")
        good = ["t.parquet row 000000", "t.parquet row 000002"]
        bad = {"t.parquet row 000001": f"label: label is {value}, allowed: -1 to 1"}
        return Hostile(folder / "t.parquet", good, bad, ("--keep", "label"))

    return build


CASES["parquet: a label that is too high"] = labelled(2)
CASES["parquet: a label below -1"] = labelled(-2)


@case("parquet: a text that is no UTF-8, and values of another type in the second file")
def odd_values(folder: Path) -> Hostile:
    """Of columns that are kept."""
    (folder / "t").mkdir()
    rows = [{"bytes": clip(seed), "path": None} for seed in range(3)]
    offsets = np.array([0, 1, 3, 4], np.int32)
    text = pa.StringArray.from_buffers(3, pa.py_buffer(offsets), pa.py_buffer(b"a\xff\xfec"))
    pq.write_table(pa.table({"audio": rows, "text": text, "n": [1, 2, 3]}), folder / "t" / "a.parquet")
    pq.write_table(pa.table({"audio": rows, "text": ["x"] * 3, "n": ["1", "two", "3"]}), folder / "t" / "b.parquet")
    bad = {"a.parquet row 000001": "text: ", "b.parquet row 000001": "n: .*two"}
    good = ["a.parquet row 000000", "a.parquet row 000002", "b.parquet row 000000", "b.parquet row 000002"]
    return Hostile(folder / "t", good, bad, ("--keep", "text", "--keep", "n"))


@case("parquet: dictionaries and other types")
def dictionaries(folder: Path) -> Hostile:
    """Audio and text as dictionaries."""
    audio = pa.array([clip(0), clip(1), clip(0), b"no audio"]).dictionary_encode()
    text = pa.array(["x", "y", "x", "x"]).dictionary_encode()
    pq.write_table(pa.table({"audio": audio, "text": text}), folder / "t.parquet")
    good = [f"t.parquet row {row:06d}" for row in range(3)]
    return Hostile(folder / "t.parquet", good, {"t.parquet row 000003": "not readable"}, ("--keep", "text"))


@case("parquet: arrays of all kinds")
def arrays(folder: Path) -> Hostile:
    """Decoded audio."""
    good = [0.1, -0.2] * 300
    kind = pa.struct([("array", pa.list_(pa.float64())), ("sampling_rate", pa.int64())])
    rows = [(good, 24000), (good, 0), (good, -5), (good, None), (good, 1), ([], 24000), ([float("nan")], 24000)]
    rows += [(None, 24000), (good, 2**62), (good, 8000)]
    table = pa.array([dict(zip(("array", "sampling_rate"), row)) for row in rows], kind)
    pq.write_table(pa.table({"audio": table}), folder / "t.parquet")
    reasons = ("", "sampling_rate is 0", "sampling_rate is -5", "sampling_rate is None", "1 Hz", "shape", "NaN")
    reasons += ("none of numbers", "sampling rate is 4611686018427387904 Hz")
    bad = {f"t.parquet row {row:06d}": reason for row, reason in enumerate(reasons) if reason}
    return Hostile(folder / "t.parquet", ["t.parquet row 000000", "t.parquet row 000009"], bad)


@case("parquet: many tiny rows in one row group")
def tiny_rows(folder: Path) -> Hostile:
    """Without audio but one."""
    rows = [b"x"] * 5000 + [clip()]
    pq.write_table(pa.table({"audio": rows}), folder / "t.parquet")
    bad = {f"t.parquet row {row:06d}": "not readable as audio" for row in range(5000)}
    return Hostile(folder / "t.parquet", ["t.parquet row 005000"], bad)


# ---- tars ----------------------------------------------------------------------------------------------------------


def of_member(key: str, reason: str | None, change: Callable[[tarfile.TarInfo], None]) -> Callable[[Path], Hostile]:
    """A tar with an odd member between good ones; `reason` None: it is a good one too."""

    def build(folder: Path) -> Hostile:
        with tarfile.open(folder / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for seed, name in enumerate(("a.wav", "odd.wav", "z.wav")):
                member, data = tarfile.TarInfo(name), clip(seed)
                member.size = len(data)
                if name == "odd.wav":
                    change(member)
                tar.addfile(member, io.BytesIO(data))
        good = ["a", "z"] if reason else ["a", key, "z"]
        return Hostile(folder / "x.tar", good, {key: reason} if reason else {}, ("--column", "wav"))

    return build


def as_(kind: bytes, link: str = ""):
    """Make a member something else."""

    def change(member: tarfile.TarInfo) -> None:
        member.type, member.linkname, member.size = kind, link, 0

    return change


def called(name: str):
    """Give a member another name."""

    def change(member: tarfile.TarInfo) -> None:
        member.name = name

    return change


CASES |= {
    "tar: a link that leads out": of_member("odd", "is a link in the tar", as_(tarfile.SYMTYPE, "/etc/passwd")),
    "tar: a link to itself": of_member("odd", "is a link in the tar", as_(tarfile.SYMTYPE, "odd.wav")),
    "tar: a hard link": of_member("odd", "is a link in the tar", as_(tarfile.LNKTYPE, "a.wav")),
    "tar: a named pipe": of_member("odd", "is a named pipe in the tar", as_(tarfile.FIFOTYPE)),
    "tar: a device": of_member("odd", "is a device in the tar", as_(tarfile.CHRTYPE)),
    "tar: a path of the machine": of_member("/etc/cron", None, called("/etc/cron.wav")),
    "tar: a path that leads out": of_member("../../odd", None, called("../../odd.wav")),
    "tar: a name with a newline": of_member("o\\nd", None, called("o\nd.wav")),
}  # fmt: skip


@case("tar: a sparse file of a terabyte")
def sparse(folder: Path) -> Hostile:
    """It holds a block, and says to be 2**40 bytes long."""
    hostile = of_member("odd", "is a sparse file in the tar", lambda member: None)(folder)
    data = bytearray((folder / "x.tar").read_bytes())
    place = data.index(b"odd.wav")
    block = data[place : place + 512]
    block[156:157] = tarfile.GNUTYPE_SPARSE
    size = int(bytes(block[124:135]), 8)
    block[386:410] = b"%011o\0%011o\0" % (0, size)
    block[410:482] = bytes(72)
    block[482:483] = b"\0"
    block[483:495] = b"\x80" + (2**40).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    data[place : place + 512] = block
    (folder / "x.tar").write_bytes(data)
    return hostile


# ---- saved datasets ------------------------------------------------------------------------------------------------


@case("saved dataset: URLs, nothing and labels")
def saved(folder: Path) -> Hostile:
    """Of all kinds."""
    import datasets

    audio = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    rows = [
        {"bytes": clip(0), "path": None}, {"bytes": None, "path": "http://127.0.0.1:9/x"}, None,
        {"bytes": b"x", "path": "x"}, {"bytes": clip(1), "path": "x"},
    ]  # fmt: skip
    features = datasets.Features({"audio": audio})
    datasets.Dataset.from_dict({"audio": rows}, features).save_to_disk(folder / "saved")
    bad = {"row 000001": "audio is at the URL", "row 000002": "audio is a NoneType", "row 000003": "not readable"}
    return Hostile(folder / "saved", ["row 000000", "row 000004"], bad)
