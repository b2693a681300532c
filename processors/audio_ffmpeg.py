"""Audio of kinds that libsndfile does not read, such as m4a and webm, by the program ffmpeg where it is installed.

It writes samples as they are decoded, float32 at the file's own rate and channels, into a pipe: memory does not grow
with the file. A file of several audio streams is refused, since one of them would be lost.
"""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np


# What it reads and libsndfile does not.
OTHER_SUFFIXES = (
    ".m4a", ".mp4", ".m4b", ".m4v", ".mov", ".webm", ".weba", ".mka", ".mkv", ".aac", ".adts", ".ac3", ".eac3", ".wma",
    ".asf", ".wmv", ".wv", ".ape", ".amr", ".3gp", ".3g2", ".tta", ".mpc", ".spx", ".dts", ".dsf", ".dff", ".tak",
    ".ra", ".rm", ".avi", ".ogv", ".flv", ".mpg", ".mpeg", ".oma", ".g722", ".gsm", ".qcp", ".shn",
)  # fmt: skip
# How files of other kinds begin, at the place that comes first: what is none of these is not given to ffmpeg, that
# takes text and pictures for sound.
MAGIC = (
    (4, b"ftyp"), (0, b"\x1aE\xdf\xa3"), (0, b"0&\xb2u\x8ef\xcf\x11"), (0, b"\xff\xf1"), (0, b"\xff\xf9"),
    (0, b"\x0bw"), (0, b"OggS"), (0, b"wvpk"), (0, b"MAC "), (0, b"#!AMR"), (0, b"TTA1"), (0, b"MPCK"), (0, b"MP+"),
    (0, b"\x7f\xfe\x80\x01"), (0, b"DSD "), (0, b"FRM8"), (0, b"caff"), (0, b"tBaK"), (0, b".RMF"), (8, b"AVI "),
    (0, b"ADIF"), (0, b"ID3"),
)  # fmt: skip
# What ffmpeg may take a file for: no playlists, which would have it open other files.
FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,dtshd,eac3,flac,flv,g722,gsm,iff,loas,matroska,mov,mp3,mpc,mpc8,"
    "mpeg,mpegts,mpegvideo,ogg,oma,qcp,rm,shn,tak,tta,w64,wav,wv"
)
AU_HEAD = 24  # bytes of the header that ffmpeg writes before the samples, at least
SECONDS_TO_LOOK = 60


def ffmpeg_path() -> str | None:
    """Where ffmpeg is; None if it is not installed."""
    return shutil.which("ffmpeg")


@functools.cache
def ffmpeg_version() -> str | None:
    """The version of ffmpeg; None if it is not installed."""
    program = ffmpeg_path()
    if program is None:
        return None
    told = subprocess.run([program, "-version"], capture_output=True, text=True, errors="replace").stdout.split()
    return told[2] if len(told) > 2 else "unknown"


def for_ffmpeg(file: BinaryIO, name: str) -> bool:
    """Whether ffmpeg is to try a file that libsndfile does not read: by its first bytes, or its name's suffix."""
    file.seek(0)
    head = file.read(16)
    kind = any(head[place : place + len(magic)] == magic for place, magic in MAGIC)
    return kind or Path(name).suffix.lower() in OTHER_SUFFIXES


class FfmpegAudio:
    """Decoded audio of a file, read as from `soundfile.SoundFile`; how long it is shows at its end.

    Attributes:
        samplerate: in Hz.
        channels: how many.
        frames: the greatest number, since it is not known.
    """

    frames = (1 << 63) - 1

    def __init__(self, source: str | os.PathLike | BinaryIO):
        """`source`: a path, or a binary file.

        Raises:
            ValueError: if it holds no audio that ffmpeg knows, or several streams of it.
        """
        self._copy, self._process, self._place = None, None, 0
        self._path = source if not hasattr(source, "read") else self._copied(source)
        try:
            self._check_streams()
            self._start()
        except BaseException:
            self.close()
            raise

    def _copied(self, file: BinaryIO) -> str:
        self._copy = tempfile.NamedTemporaryFile()  # noqa: SIM115
        file.seek(0)
        shutil.copyfileobj(file, self._copy)
        self._copy.flush()
        return self._copy.name

    def _command(self, *options: str) -> list[str]:
        # "file:" and the list of protocols: a name is never taken for an address.
        path = "file:" + os.fsdecode(os.path.abspath(self._path))
        allowed = ("-protocol_whitelist", "file,pipe", "-format_whitelist", FORMATS)
        return [ffmpeg_path(), "-nostdin", "-hide_banner", *allowed, "-i", path, *options]

    def _check_streams(self) -> None:
        try:
            run = subprocess.run(
                self._command(), stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS_TO_LOOK
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"not readable as audio (ffmpeg has not opened it in {SECONDS_TO_LOOK} s)") from None
        told = run.stderr.decode("utf-8", "replace")
        streams = re.findall(r"^\s*Stream #\d+:\d+.*?: Audio: ", told, re.MULTILINE)
        if not streams:
            raise ValueError(f"not readable as audio (ffmpeg: {_last_line(told)})")
        if len(streams) > 1:
            raise ValueError(f"holds {len(streams)} streams of audio, allowed: one")

    def _start(self) -> None:
        self._stop()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        options = ("-v", "error", "-xerror", "-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "pipe:1")
        self._process = subprocess.Popen(
            self._command(*options), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors
        )
        head = self._process.stdout.read(AU_HEAD)
        if len(head) < AU_HEAD:
            self._end()
            raise ValueError("holds no audio")
        self.samplerate, self.channels = (int.from_bytes(head[at : at + 4], "big") for at in (16, 20))
        self._process.stdout.read(int.from_bytes(head[4:8], "big") - AU_HEAD)
        self._place = 0

    def read(self, frames: int, dtype: str = "float32", always_2d: bool = True) -> np.ndarray:
        """So many samples, float32 (T, channels); fewer at the end alone.

        Raises:
            ValueError: at the end, if ffmpeg met an error.
        """
        data = self._process.stdout.read(frames * 4 * self.channels) if self._process else b""
        samples = np.frombuffer(data, ">f4").astype(np.float32).reshape(-1, self.channels)
        self._place += len(samples)
        if len(samples) < frames and self._process:
            self._end()
        return samples

    def seek(self, frame: int) -> int:
        """To sample `frame`, by decoding up to it: exact in every format."""
        if frame < self._place or self._process is None:
            self._start()
        while self._place < frame and len(self.read(min(1 << 16, frame - self._place))):
            pass
        return self._place

    def close(self) -> None:
        """End ffmpeg."""
        self._stop()
        if self._copy is not None:
            self._copy.close()
            self._copy = None

    def _end(self) -> None:
        """ffmpeg has said all: see whether it is content."""
        self._process.stdout.close()
        code = self._process.wait()
        self._errors.seek(0)
        told = self._errors.read().decode("utf-8", "replace")
        self._stop()
        if code or told.strip():
            raise ValueError(f"not readable as audio to its end (ffmpeg: {_last_line(told)})")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.stdout.close()
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            self._process = None
            self._errors.close()

    def __del__(self):
        self.close()


def _last_line(told: str) -> str:
    # Without places in memory and of files, which are others each time.
    told = re.sub(r"\[[^][]* @ 0x[0-9a-f]+\] |file:/.*?: ", "", told)
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("At least one output file")]
    return lines[-1] if lines else "no reason given"
