"""Audio in and out: files, sampling rates, channels, clipping.

Files go through libsndfile (wav, flac, ogg, opus, mp3), rates through soxr "HQ", everywhere in the project, so that
training, evaluation and use hear the same thing. Audio is float32 (channels, T) in [-1, 1].

Channel policy: to mono, the mean of all channels; mono to stereo, the same signal twice; more than two channels to
stereo is refused, since there is no one right mix.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from modeling_encodec.atomic import atomic_path


# Samples of a channel that are read at a time.
BLOCK_LENGTH = 1 << 18
# What libsndfile counts, or more, where a header has no count.
UNKNOWN_FRAMES = 1 << 62
# What WAV's sizes of 32 bits leave for samples.
MOST_WAV_BYTES = (1 << 32) - 1024
# Peak that a clipping signal is rescaled to, as in the original.
RESCALED_PEAK = 0.99
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64", ".caf")


@dataclass(frozen=True)
class Clipping:
    """Samples outside [-1, 1] met on writing: how many, the peak, and whether the signal was rescaled for them."""

    samples: int
    peak: float
    rescaled: bool

    def __bool__(self) -> bool:
        return self.samples > 0


class AudioReader:
    """A file's audio block by block, in memory that does not grow with it: float32 (channels, T), at `sampling_rate`
    Hz and with `channels` if given. Together the blocks are what `read_audio` returns, to the bit.

        with AudioReader("in.flac", 24000, 1) as blocks:
            for block in blocks: ...

    Attributes:
        seconds (`float`, *optional*): how long the file says it is; `None` if it does not, as FLAC made in a pipe.
    """

    def __init__(
        self,
        source: str | os.PathLike | BinaryIO,
        sampling_rate: int | None = None,
        channels: int | None = None,
        block_length: int = BLOCK_LENGTH,
    ):
        """Args:
            source: a path, or a binary file that can be sought in.
            block_length: samples of a channel that are read at a time.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no audio; while reading, if it is empty, or holds samples that are not finite.
        """
        if block_length < 1:
            raise ValueError(f"block_length is {block_length}, allowed: at least 1")
        given = getattr(source, "name", None) if hasattr(source, "read") else os.fspath(source)
        self.name = given if isinstance(given, str) else "the input"
        if not hasattr(source, "read") and not Path(self.name).is_file():
            raise FileNotFoundError(f"{self.name}: no such file")
        try:
            # Names as the file system has them: they need not be UTF-8.
            self.file = soundfile.SoundFile(source if hasattr(source, "read") else os.fsencode(source))
        except soundfile.LibsndfileError as error:
            raise self._unreadable(error) from None
        self.channels, self.block_length = channels, block_length
        self.rate, self.sampling_rate = self.file.samplerate, sampling_rate or self.file.samplerate
        self.seconds = self.file.frames / self.rate if self.file.frames < UNKNOWN_FRAMES else None
        if self.seconds is None:
            self.file.seekable = lambda: False  # else soundfile seeks after reading, which fails here

    def __enter__(self) -> "AudioReader":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def __iter__(self) -> Iterator[np.ndarray]:
        stream, first, given = None, None, 0
        last = False
        while not last:
            block = self._read()
            last = block.shape[1] < self.block_length
            first = block[:, :1] if first is None else first
            if self.rate != self.sampling_rate:
                if stream is None:
                    stream = soxr.ResampleStream(self.rate, self.sampling_rate, len(block), quality="HQ")
                resampled = stream.resample_chunk(np.ascontiguousarray(block.T), last=last)
                block = np.ascontiguousarray(resampled.reshape(-1, len(block)).T)
            given += block.shape[1]
            if block.shape[1]:
                yield block
        if first.shape[1] == 0:
            raise ValueError(f"{self.name}: holds no audio")
        if given == 0:  # as `resample` does: at least one sample remains
            yield first

    def _read(self) -> np.ndarray:
        try:
            samples = self.file.read(self.block_length, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise self._unreadable(error) from None
        if not np.isfinite(samples).all():
            raise ValueError(f"{self.name}: holds samples that are NaN or infinite")
        block = np.ascontiguousarray(samples.T)
        return block if self.channels is None else match_channels(block, self.channels)

    def _unreadable(self, error: soundfile.LibsndfileError) -> ValueError:
        return ValueError(f"{self.name}: not readable as audio ({error.error_string.rstrip('.')})")


def read_audio(
    source: str | os.PathLike | BinaryIO, sampling_rate: int | None = None, channels: int | None = None
) -> tuple[np.ndarray, int]:
    """Audio of a file as float32 (channels, T) and its rate, brought to `sampling_rate` Hz and `channels` if given.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no audio, is empty, or holds samples that are not finite.
    """
    with AudioReader(source, sampling_rate, channels) as reader:
        return join_blocks(reader), reader.sampling_rate


def join_blocks(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Blocks (channels, T) as one; one alone is not copied."""
    blocks = list(blocks)
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)


def resample(audio: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """Audio (channels, T) at `rate` Hz brought to `target_rate` Hz; at least one sample remains."""
    for name, value in (("rate", rate), ("target_rate", target_rate)):
        if value < 1:
            raise ValueError(f"{name} is {value} Hz, allowed: at least 1")
    if rate == target_rate:
        return audio
    resampled = soxr.resample(audio.T, rate, target_rate, quality="HQ").T
    if resampled.shape[1] == 0:
        resampled = audio[:, :1]
    return np.ascontiguousarray(resampled, dtype=np.float32)


def match_channels(audio: np.ndarray, channels: int) -> np.ndarray:
    """Audio (any channels, T) with `channels` 1 or 2, by the policy above."""
    given = audio.shape[0]
    if given == channels:
        return audio
    if channels == 1:
        return audio.mean(axis=0, keepdims=True)
    if channels == 2 and given == 1:
        return np.repeat(audio, 2, axis=0)
    raise ValueError(f"audio with {given} channels does not go to {channels}, allowed: any to 1, 1 to 2")


def write_audio(
    target: str | os.PathLike | BinaryIO, audio: np.ndarray, sampling_rate: int, *, rescale: bool = False
) -> Clipping:
    """Write audio (channels, T), as 16-bit PCM or the format's own coding, and say what clipped.

    Samples outside [-1, 1] are cut there, or with `rescale` the whole signal is scaled down to a peak of 0.99; they
    never wrap. A path is written under a temporary name and renamed when complete. A file object gets WAV.
    """
    return write_audio_blocks(target, [audio], sampling_rate, rescale=rescale)


def write_audio_blocks(
    target: str | os.PathLike | BinaryIO, blocks: Iterable[np.ndarray], sampling_rate: int, *, rescale: bool = False
) -> Clipping:
    """`write_audio` of audio that comes in blocks (channels, T), in memory that does not grow with it.

    With `rescale` the blocks wait in a temporary file until the peak is known.
    """
    if hasattr(target, "write"):
        return _write(target, blocks, sampling_rate, rescale, {"format": "WAV", "subtype": "PCM_16"})
    path = Path(target)
    form = path.suffix.lstrip(".").upper()
    if form not in soundfile.available_formats() and form != "OPUS":
        raise ValueError(f"{path}: cannot write audio as {path.suffix!r}, allowed: .wav, .flac, .ogg, .opus, .mp3")
    options = {"format": "OGG", "subtype": "OPUS"} if form == "OPUS" else {"format": form}
    if form in ("WAV", "FLAC", "AIFF", "W64", "CAF", "AU"):
        options["subtype"] = "PCM_16"
    with atomic_path(path) as temporary:
        return _write(temporary, blocks, sampling_rate, rescale, options)


def _write(file, blocks: Iterable[np.ndarray], sampling_rate: int, rescale: bool, options: dict) -> Clipping:
    outside, peak, out, channels = 0, 0.0, None, None
    with contextlib.ExitStack() as stack:
        for block in blocks:
            block = _checked(block, channels)
            channels = len(block)
            if out is None:
                # With `rescale` written first as it is, then read back and scaled.
                waiting = stack.enter_context(tempfile.TemporaryFile()) if rescale else file
                kind = {"format": "RF64", "subtype": "FLOAT"} if rescale else options
                out = stack.enter_context(soundfile.SoundFile(waiting, "w", sampling_rate, channels, **kind))
            outside, peak = outside + int((np.abs(block) > 1).sum()), max(peak, float(np.abs(block).max()))
            _write_block(out, block.T if rescale else block.T.clip(-1, 1))
        if out is None:
            raise ValueError("audio has no samples, allowed: at least one")
        if rescale:
            out.close()
            waiting.seek(0)
            gain = RESCALED_PEAK / peak if peak > 1 else 1.0
            with soundfile.SoundFile(file, "w", sampling_rate, channels, **options) as scaled:
                for block in AudioReader(waiting):
                    _write_block(scaled, block.T * np.float32(gain))
    return Clipping(outside, peak, rescale and peak > 1)


def _write_block(out: soundfile.SoundFile, samples: np.ndarray) -> None:
    """Write (T, channels) samples, not too many at a time: libsndfile's Vorbis writer takes them onto its stack."""
    if out.format == "WAV" and 2 * (out.tell() + len(samples)) * out.channels > MOST_WAV_BYTES:
        raise ValueError("the audio does not fit into WAV (4 GB), allowed: .flac, .w64")
    for start in range(0, len(samples), BLOCK_LENGTH):
        out.write(samples[start : start + BLOCK_LENGTH])


def _checked(block: np.ndarray, channels: int | None) -> np.ndarray:
    block = np.asarray(block, dtype=np.float32)
    if block.ndim != 2 or 0 in block.shape or channels not in (None, len(block)):
        allowed = "channels" if channels is None else channels
        raise ValueError(f"audio has shape {block.shape}, allowed: ({allowed}, samples), none of them 0")
    if not np.isfinite(block).all():
        raise ValueError("audio holds NaN or infinity, allowed: finite samples")
    return block
