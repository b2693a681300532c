"""Reverberation with measured room impulse responses (paper 4.1: those with a reverberation time of 0.3 to 1.3 s)."""

import logging
import math
import os
from pathlib import Path

import numpy as np

from modeling_encodec.processors.audio import read_audio
from modeling_encodec.processors.audio_kinds import OtherFiles, list_audio
from modeling_encodec.processors.corpus.clips import Location, UnusableClip, file_entries, scan


logger = logging.getLogger(__name__)

SHORTEST, LONGEST = 0.3, 1.3  # seconds of reverberation


def reverberation_time(impulse: np.ndarray, rate: int) -> float:
    """RT60, seconds until the impulse response (samples,) has decayed by 60 dB; 0 if it does not decay over time.

    Schroeder's method (1965): the energy still to come is a smooth decay curve, a line in dB. T20: the line is fitted
    from -5 to -25 dB and extended, since few recordings stay 45 dB above their noise, as T30 asks.
    """
    energy = np.square(impulse[np.abs(impulse).argmax() :], dtype=np.float64)
    remaining = energy[::-1].cumsum()[::-1]
    if not remaining[0] > 0:
        return 0.0
    decay = 10 * np.log10(np.maximum(remaining / remaining[0], 1e-12))
    fitted = np.flatnonzero((decay <= -5) & (decay >= -25))
    if len(fitted) < 2:
        return 0.0
    slope = np.polyfit(fitted / rate, decay[fitted], 1)[0]  # dB per second
    return float(-60 / slope) if slope < 0 else 0.0


def reverberate(audio: np.ndarray, impulse: np.ndarray) -> np.ndarray:
    """Audio (channels, T) in the room of `impulse` (samples,), float32 (channels, T), not delayed.

    The impulse response's peak, the direct path, lands on the time of the sound itself.
    """
    direct, samples = int(np.abs(impulse).argmax()), audio.shape[1]
    size = 1 << (samples + len(impulse) - 2).bit_length()
    spectrum = np.fft.rfft(audio, size) * np.fft.rfft(impulse, size)
    return np.fft.irfft(spectrum, size)[:, direct : direct + samples].astype(np.float32)


def reach(impulse: np.ndarray) -> tuple[int, int]:
    """Samples before and after a stretch of sound that its reverberation depends on."""
    direct = int(np.abs(impulse).argmax())
    return len(impulse) - 1 - direct, direct


class ImpulseResponses:
    """The impulse responses of a folder whose reverberation time is within 0.3 to 1.3 s, read when drawn."""

    def __init__(
        self, folder: str | os.PathLike, rate: int, *, cache_folder: str | os.PathLike | None = None, workers: int = 1
    ):
        """Find and measure the files of `folder`, for a model at `rate` Hz.

        Raises:
            ValueError: if there is no usable one.
        """

        def measure(name: str, location: Location) -> list:
            return [reverberation_time(_read_impulse(name, rate), rate)]

        other = OtherFiles()
        entries, skipped = file_entries(list_audio(folder, other))
        for line in other.lines():
            logger.warning("impulse responses: %s", line)
        cache = cache_folder and Path(cache_folder) / f"impulse_responses_{rate}.jsonl"
        times, unusable = scan(entries, measure, cache, workers)
        self.rate, self.skipped = rate, skipped + unusable
        self.times = {path: time for path, (time,) in times.items() if SHORTEST <= time <= LONGEST}
        self.paths = list(self.times)
        found = (
            f"{len(self.paths)} impulse responses with a reverberation time of {SHORTEST} to {LONGEST} s in {folder}, "
            f"{len(times) - len(self.paths)} with another, {len(self.skipped)} not readable"
        )
        if not self.paths:
            raise ValueError(f"impulse_responses: {found}, allowed: at least one")
        logger.info(found)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """One of them at the model's rate, of unit energy, (samples,).

        It ends one reverberation time after the direct path: what follows is 60 dB down.

        Raises:
            UnusableClip: if its file cannot be read any more.
        """
        path = self.paths[rng.integers(len(self.paths))]
        impulse = _read_impulse(path, self.rate)
        end = np.abs(impulse).argmax() + math.ceil(self.times[path] * self.rate)
        impulse = impulse[:end]
        return impulse / np.linalg.norm(impulse)


def _read_impulse(path: str, rate: int) -> np.ndarray:
    try:
        # The first channel, not the mean: microphones of an array hear the sound at different times.
        impulse = read_audio(path, rate)[0][0]
    except (OSError, ValueError) as error:
        raise UnusableClip(path, str(error)) from error
    if not impulse.any():
        raise UnusableClip(path, "silent")
    return impulse
