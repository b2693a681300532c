"""Audio in and out: files, sampling rates, channels, clipping.

Files go through libsndfile (wav, flac, ogg, opus, mp3), rates through soxr "HQ", everywhere in the project, so that
training, evaluation and use hear the same thing. Audio is float32 (channels, T) in [-1, 1].

Channel policy: to mono, the mean of all channels; mono to stereo, the same signal twice; more than two channels to
stereo is refused, since there is no one right mix.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from modeling_encodec.atomic import atomic_path


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


def read_audio(
    source: str | os.PathLike | BinaryIO, sampling_rate: int | None = None, channels: int | None = None
) -> tuple[np.ndarray, int]:
    """Audio of a file as float32 (channels, T) and its rate, brought to `sampling_rate` Hz and `channels` if given.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no audio, is empty, or holds samples that are not finite.
    """
    if hasattr(source, "read"):
        name = getattr(source, "name", "the input")
    else:
        name = os.fspath(source)
        if not Path(name).is_file():
            raise FileNotFoundError(f"{name}: no such file")
    try:
        samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name}: not readable as audio ({error.error_string.rstrip('.')})") from None
    if samples.shape[0] == 0:
        raise ValueError(f"{name}: holds no audio")
    if not np.isfinite(samples).all():
        raise ValueError(f"{name}: holds samples that are NaN or infinite")
    audio = np.ascontiguousarray(samples.T)
    if channels is not None:
        audio = match_channels(audio, channels)
    if sampling_rate is not None:
        audio, rate = resample(audio, rate, sampling_rate), sampling_rate
    return audio, rate


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
    audio = np.asarray(audio, dtype=np.float32)
    if audio.ndim != 2 or 0 in audio.shape:
        raise ValueError(f"audio has shape {audio.shape}, allowed: (channels, samples), none of them 0")
    if not np.isfinite(audio).all():
        raise ValueError("audio holds NaN or infinity, allowed: finite samples")
    peak = float(np.abs(audio).max())
    clipping = Clipping(int((np.abs(audio) > 1).sum()), peak, rescale and peak > 1)
    audio = audio * (RESCALED_PEAK / peak) if clipping.rescaled else audio.clip(-1, 1)
    if hasattr(target, "write"):
        soundfile.write(target, audio.T, sampling_rate, format="WAV", subtype="PCM_16")
        return clipping
    path = Path(target)
    form = path.suffix.lstrip(".").upper()
    if form not in soundfile.available_formats() and form != "OPUS":
        raise ValueError(f"{path}: cannot write audio as {path.suffix!r}, allowed: .wav, .flac, .ogg, .opus, .mp3")
    options = {"format": "OGG", "subtype": "OPUS"} if form == "OPUS" else {"format": form}
    if form in ("WAV", "FLAC", "AIFF", "W64", "CAF", "AU"):
        options["subtype"] = "PCM_16"
    with atomic_path(path) as temporary:
        soundfile.write(temporary, audio.T, sampling_rate, **options)
    return clipping
