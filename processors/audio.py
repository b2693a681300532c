"""Audio in and out: files, sampling rates, channels, clipping.

Files go through libsndfile (wav, flac, ogg, opus, mp3 ...; other kinds through ffmpeg where it is installed), rates
through soxr "HQ", everywhere in the project, so that training, evaluation and use hear the same thing. Audio is
float32 (channels, T) in [-1, 1].

Channel policy: to mono, the mean of all channels; mono to stereo, the same signal twice; more than two channels to
stereo is refused, since there is no one right mix.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from modeling_encodec.models.inputs_encodec import array_is_finite, audio_array, check_rate, whole_number
from modeling_encodec.processors.audio_files import NO_FILE, AudioFile, check_segment, file_fault, segment_span
from modeling_encodec.processors.audio_kinds import AUDIO_SUFFIXES as AUDIO_SUFFIXES
from modeling_encodec.system.atomic import atomic_path


# Samples of a channel that are read at a time.
BLOCK_LENGTH = 1 << 18
# Blocks of more channels, or that resampling makes longer by more than that, are cut smaller.
MOST_CHANNELS, MOST_GROWTH = 8, 24
# What WAV's sizes of 32 bits leave for samples.
MOST_WAV_BYTES = (1 << 32) - 1024
# Peak that a clipping signal is rescaled to, as in the original.
RESCALED_PEAK = 0.99


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

    Attributes:
        seconds (float, optional): how long the audio is; `None` if only decoding tells, as of FLAC made in a pipe.

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec import AudioReader, write_audio
        >>> _ = write_audio("in.flac", np.zeros((2, 30000)), 48000)
        >>> with AudioReader("in.flac", 24000, 1, block_length=20000) as blocks:
        ...     print(blocks.seconds, sum(block.shape[1] for block in blocks))
        0.625 15000
    """

    def __init__(
        self,
        source: str | os.PathLike | BinaryIO,
        sampling_rate: int | None = None,
        channels: int | None = None,
        block_length: int = BLOCK_LENGTH,
        *,
        offset: float | None = None,
        duration: float | None = None,
        embedded: bool = False,
    ):
        """Args:
            source: a path, or a binary file that can be sought in.
            sampling_rate: of the blocks, in Hz; the file's own by default.
            channels: of the blocks, 1 or 2; the file's own by default.
            block_length: samples of a channel that are read at a time, at the file's rate; fewer of more than 8
                channels, or of a rate far below `sampling_rate`.
            offset: seconds into the file at which the audio begins, as a file of its own that is cut there at the
                nearest sample.
            duration: seconds of it; to the file's end by default.
            embedded: the file may be that segment already, if it is as long.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no audio, is cut off or says another length than it has, joins recordings of several
                rates, has no such segment, or `block_length` or `sampling_rate` is less than 1; while reading, if it
                is empty, holds samples that are not finite, or has more than two channels and is to be stereo.
        """
        block_length = whole_number("block_length", block_length, 1)
        given = getattr(source, "name", None) if hasattr(source, "read") else os.fspath(source)
        self.name = given if isinstance(given, str) else "the input"
        sampling_rate = None if sampling_rate is None else check_rate("sampling_rate", sampling_rate)
        channels = None if channels is None else whole_number("channels", channels, 1)
        if not hasattr(source, "read") and (fault := file_fault(self.name)):
            raise (FileNotFoundError if fault == NO_FILE else ValueError)(f"{self.name}: {fault}")
        with self._named():
            check_segment(offset, duration)
            self.file = AudioFile(source)
        self.channels, self.rate = channels, self.file.sampling_rate
        self.sampling_rate = self.rate if sampling_rate is None else sampling_rate
        # Of many channels, or of a rate that is much lower, a block would take gigabytes.
        growth = max(1, self.file.channels / MOST_CHANNELS, self.sampling_rate / self.rate / MOST_GROWTH)
        self.block_length = max(1, int(block_length / growth))
        self._left: int | None = None  # samples to read yet, None: all
        try:
            self.seconds = self._cut(offset, duration, embedded)
        except BaseException:
            self.file.close()
            raise

    def _cut(self, offset: float | None, duration: float | None, embedded: bool) -> float | None:
        with self._named():
            frames = self.file.known_frames
            if (offset, duration) == (None, None):
                return None if frames is None else frames / self.rate
            frames = self.file.count_frames() if frames is None else frames
            first, self._left = segment_span(offset, duration, self.rate, frames, embedded=embedded)
            self.file.seek(first)
            return self._left / self.rate

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
        count = self.block_length if self._left is None else min(self.block_length, self._left)
        with self._named():
            samples = self.file.read(count)
            if self._left is not None:
                if len(samples) < count:
                    raise ValueError(f"cut off: {self._left - len(samples)} samples of the segment are missing")
                self._left -= count
        block = np.ascontiguousarray(samples.T)
        return block if self.channels is None else match_channels(block, self.channels)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


def read_audio(
    source: str | os.PathLike | BinaryIO,
    sampling_rate: int | None = None,
    channels: int | None = None,
    *,
    offset: float | None = None,
    duration: float | None = None,
    embedded: bool = False,
) -> tuple[np.ndarray, int]:
    """Audio of a file, brought to a sampling rate and a number of channels if they are given.

    Args:
        source: a path, or a binary file that can be sought in; what libsndfile reads (wav, flac, ogg, opus, mp3 ...),
            and other kinds (m4a, webm ...) where ffmpeg is installed.
        sampling_rate: of the result, in Hz; the file's own by default.
        channels: of the result, 1 or 2; the file's own by default.
        offset: seconds into the file at which the audio begins; see `AudioReader`.
        duration: seconds of it; to the file's end by default.
        embedded: the file may be that segment already, if it is as long.

    Returns:
        The audio, float32 (channels, T), and its sampling rate in Hz.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no audio, is empty, is cut off or says another length than it has, joins recordings of
            several rates, has no such segment, holds samples that are not finite, or has more than two channels and
            is to be stereo.

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec import read_audio, write_audio
        >>> _ = write_audio("in.wav", np.array([[0.5] * 48000, [0.25] * 48000]), 48000)
        >>> audio, rate = read_audio("in.wav", 24000, 1)
        >>> audio.shape, audio.dtype, rate, round(float(audio[0, 12000]), 3)
        ((1, 24000), dtype('float32'), 24000, 0.375)
    """
    part = {"offset": offset, "duration": duration, "embedded": embedded}
    with AudioReader(source, sampling_rate, channels, **part) as reader:
        return join_blocks(reader), reader.sampling_rate


def join_blocks(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Blocks (channels, T), at least one, as one; one alone is not copied."""
    blocks = list(blocks)
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)


def resample(audio: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """Audio (channels, T) at `rate` Hz brought to `target_rate` Hz; at least one sample remains. What is at that rate
    already is given back as it is, all else as float32; integer PCM is scaled to [-1, 1) first.

    Raises:
        ValueError: for a rate below 1.

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec.processors.audio import resample
        >>> resample(np.zeros((2, 44100), np.float32), 44100, 24000).shape
        (2, 24000)
    """
    rate, target_rate = check_rate("rate", rate), check_rate("target_rate", target_rate)
    audio = _floats(audio)
    if rate == target_rate:
        return audio
    resampled = soxr.resample(audio.T, rate, target_rate, quality="HQ").T
    if resampled.shape[1] == 0:
        resampled = audio[:, :1]
    return np.ascontiguousarray(resampled, dtype=np.float32)


def match_channels(audio: np.ndarray, channels: int) -> np.ndarray:
    """Audio (any channels, T) with `channels` 1 or 2: their mean, or one channel twice.

    Raises:
        ValueError: where there is no one right mix, so for more than two channels to stereo.

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec.processors.audio import match_channels
        >>> match_channels(np.array([[1.0, 0.0], [0.0, 0.5]]), 1)
        array([[0.5 , 0.25]])
    """
    audio, channels = _floats(audio), whole_number("channels", channels, 1)
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
    """Write audio as 16-bit PCM or the format's own coding, and say what clipped.

    A path is written under a temporary name and renamed when complete.

    Args:
        target: a path, whose suffix names the format (.wav, .flac, .ogg, .opus, .mp3 and others of libsndfile's); or
            a binary file, which gets WAV.
        audio: (channels, T); an array or a tensor, in [-1, 1], or integer PCM, which is scaled to that.
        sampling_rate: in Hz.
        rescale: scale the whole signal down to a peak of 0.99 if samples are outside [-1, 1]. Otherwise these are cut
            there; they never wrap.

    Returns:
        A `Clipping`, true if samples were outside [-1, 1].

    Raises:
        ValueError: for a suffix that names no format, audio of another shape, without samples or with samples that
            are not finite, or more of it than WAV holds (4 GB).

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec import write_audio
        >>> write_audio("out.wav", np.array([[0.0, 2.0, -0.5]]), 24000, rescale=True)
        Clipping(samples=1, peak=2.0, rescaled=True)
    """
    return write_audio_blocks(target, [audio], sampling_rate, rescale=rescale)


def write_audio_blocks(
    target: str | os.PathLike | BinaryIO, blocks: Iterable[np.ndarray], sampling_rate: int, *, rescale: bool = False
) -> Clipping:
    """`write_audio` of audio that comes in blocks, in memory that does not grow with it.

    Args:
        target: as of `write_audio`.
        blocks: audio (channels, T) piece by piece, all of as many channels.
        sampling_rate: in Hz.
        rescale: as of `write_audio`; the blocks wait in a temporary file until the peak is known.

    Returns:
        A `Clipping`, true if samples were outside [-1, 1].

    Raises:
        ValueError: as of `write_audio`, or if there are no blocks.

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec import read_audio, write_audio_blocks
        >>> clipping = write_audio_blocks("out.wav", (np.zeros((2, 1000)) for _ in range(3)), 48000)
        >>> bool(clipping), read_audio("out.wav")[0].shape
        (False, (2, 3000))
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
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        if file.seekable():
            return _write(file, blocks, sampling_rate, rescale, options)
        with tempfile.TemporaryFile() as waiting:  # for a pipe: most formats end by going back to their header
            clipping = _write(waiting, blocks, sampling_rate, rescale, options)
            waiting.seek(0)
            shutil.copyfileobj(waiting, file)
            return clipping


def _write(file, blocks: Iterable[np.ndarray], sampling_rate: int, rescale: bool, options: dict) -> Clipping:
    sampling_rate = check_rate("sampling_rate", sampling_rate)
    outside, peak, out, channels = 0, 0.0, None, None
    with contextlib.ExitStack() as stack:
        for block in blocks:
            block = _checked(block, channels)
            channels = len(block)
            if out is None:
                # With `rescale` written first as it is, then read back and scaled.
                waiting = stack.enter_context(tempfile.TemporaryFile(buffering=0)) if rescale else file
                kind = {"format": "RF64", "subtype": "FLOAT"} if rescale else options
                name = tempfile.gettempdir() if rescale else None
                out = stack.enter_context(_sound_file(waiting, sampling_rate, channels, kind, name))
            outside, peak = outside + int((np.abs(block) > 1).sum()), max(peak, float(np.abs(block).max()))
            _write_block(out, block.T if rescale else block.T.clip(-1, 1))
        if out is None:
            raise ValueError("audio has no samples, allowed: at least one")
        if rescale:
            out.close()
            waiting.seek(0)
            gain = RESCALED_PEAK / peak if peak > 1 else 1.0
            with _sound_file(file, sampling_rate, channels, options) as scaled:
                for block in AudioReader(waiting):
                    _write_block(scaled, block.T * np.float32(gain))
    return Clipping(outside, peak, rescale and peak > 1)


class _WatchedFile:
    """A binary file for libsndfile to write, which keeps the first error: on the way through C it would be lost."""

    def __init__(self, file: BinaryIO, name: str | None):
        self.file, self.name, self.error = file, name or getattr(file, "name", None), None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of files; 0 after an error."""
        return self._do(self.file.seek, offset, whence)

    def tell(self) -> int:
        """As of files; 0 after an error."""
        return self._do(self.file.tell)

    def flush(self) -> None:
        """As of files, where there is something to flush."""
        self._do(getattr(self.file, "flush", lambda: None))

    def write(self, data: bytes) -> int:
        """Write all of it; 0 after an error."""
        left = memoryview(data)
        while left and self.error is None:
            written = self._do(self.file.write, left)
            left = left[len(left) if written is None else written :]
        return 0 if self.error else len(data)

    def _do(self, call: Callable, *arguments) -> int | None:
        if self.error is None:
            try:
                return call(*arguments)
            except BaseException as error:  # also that of a signal
                self.error = error
                if isinstance(error, OSError) and error.filename is None and isinstance(self.name, str):
                    self.error = OSError(error.errno, error.strerror, self.name)
        return 0


@contextlib.contextmanager
def _sound_file(
    target: BinaryIO, sampling_rate: int, channels: int, options: dict, name: str | None = None
) -> Iterator[soundfile.SoundFile]:
    """`target`, which errors call `name`, as a sound file to write; raises what the system says where libsndfile has
    only "System error."."""
    file = _WatchedFile(target, name)
    try:
        with soundfile.SoundFile(file, "w", sampling_rate, channels, **options) as out:
            yield out
        file.flush()
    finally:
        if file.error is not None:
            raise file.error from None


def _write_block(out: soundfile.SoundFile, samples: np.ndarray) -> None:
    """Write (T, channels) samples, not too many at a time: libsndfile's Vorbis writer takes them onto its stack."""
    if out.format == "WAV" and 2 * (out.tell() + len(samples)) * out.channels > MOST_WAV_BYTES:
        raise ValueError("the audio does not fit into WAV (4 GB), allowed: .flac, .w64")
    for start in range(0, len(samples), BLOCK_LENGTH):
        out.write(samples[start : start + BLOCK_LENGTH])


def _checked(block: np.ndarray, channels: int | None) -> np.ndarray:
    block = audio_array("audio", block)
    if block.ndim != 2 or 0 in block.shape or channels not in (None, len(block)):
        allowed = "channels" if channels is None else channels
        raise ValueError(f"audio has shape {block.shape}, allowed: ({allowed}, samples), none of them 0")
    if not array_is_finite(block):
        raise ValueError("audio holds NaN or infinity, allowed: finite samples")
    return block


def _floats(audio) -> np.ndarray:
    """Audio of any kind: arrays of float32 and float64 as they are, all else as float32."""
    is_float = isinstance(audio, np.ndarray) and audio.dtype in (np.float32, np.float64)
    return audio if is_float else audio_array("audio", audio)
