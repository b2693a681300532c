"""What a MUSHRA trial is made of: an excerpt that holds sound, and its low-pass anchors."""

import numpy as np


try:
    from scipy.signal import firwin, kaiserord, oaconvolve
except ImportError:
    raise ImportError('anchors need SciPy: pip install "modeling-encodec[eval]"') from None


# An anchor is whole up to its cut-off and this much down 500 Hz above. BS.1534 asks of the 3.5 kHz one: a ripple of at
# most 0.1 dB, 25 dB down at 4 kHz and 50 dB at 4.5 kHz.
ATTENUATION = 65.0
TRANSITION = 500.0
# A stretch holds sound where its blocks of 0.1 s are less than 30 dB below the clip's loudest one and above -60 dBFS.
BLOCK_SECONDS = 0.1
QUIETEST_OF_CLIP = 10 ** (-30 / 20)
QUIETEST = 10 ** (-60 / 20)
SHARE_WITH_SOUND = 0.5


def low_pass_filter(cutoff: float, sampling_rate: int) -> np.ndarray:
    """Linear-phase FIR filter of an anchor, an odd number of taps; `cutoff` and `sampling_rate` in Hz.

    Raises:
        ValueError: if the sampling rate leaves no room for the filter's slope.
    """
    lowest = 2 * (cutoff + TRANSITION)
    if sampling_rate < lowest:
        raise ValueError(
            f"sampling_rate is {sampling_rate} Hz, allowed with an anchor at {cutoff:g} Hz: {lowest:g} or more"
        )
    taps, beta = kaiserord(ATTENUATION, 2 * TRANSITION / sampling_rate)
    return firwin(taps | 1, cutoff + TRANSITION / 2, window=("kaiser", beta), fs=sampling_rate)


def low_pass(audio: np.ndarray, cutoff: float, sampling_rate: int) -> np.ndarray:
    """Audio (channels, T) through `low_pass_filter`, of the same length and without delay; its ValueError."""
    taps = low_pass_filter(cutoff, sampling_rate)
    return oaconvolve(audio, taps[None], mode="same", axes=1).astype(np.float32)


def find_excerpt(audio: np.ndarray, length: int, sampling_rate: int, rng: np.random.Generator) -> int | None:
    """First sample of a stretch of `length` samples of audio (channels, T) that holds sound in at least half of it.

    It is drawn evenly from all those that begin at a whole 0.1 s; None if there is none.
    """
    total, block = audio.shape[1], max(1, round(BLOCK_SECONDS * sampling_rate))
    if total < length:
        return None
    edges = np.arange(0, total, block)
    sizes = np.diff(edges, append=total)
    levels = np.sqrt(np.add.reduceat(np.square(audio, dtype=np.float64).mean(0), edges) / sizes)
    with_sound = levels > max(QUIETEST, QUIETEST_OF_CLIP * levels.max())
    so_far = np.concatenate([[0], np.cumsum(np.repeat(with_sound, sizes))])
    starts = edges[edges <= total - length]
    starts = starts[so_far[starts + length] - so_far[starts] >= SHARE_WITH_SOUND * length]
    return int(rng.choice(starts)) if len(starts) else None
