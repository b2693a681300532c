"""Judgements by models of hearing: ViSQOL, PESQ and STOI. Each comes from a package of its own, imported when used.

All of them hear one channel: the mean of the channels. Signals are resampled by soxr to the rate that the model was
made for: 48 kHz for ViSQOL's audio mode, 16 kHz for its speech mode and for PESQ; STOI resamples to 10 kHz itself.
`None` stands where a model has nothing to judge: a silent reference, a clip of less than a second, no speech found. An
estimate that is silent where the reference is not gets the lowest score, which the packages do not give it.
"""

import functools
import importlib.util

import numpy as np

from modeling_encodec.models.inputs_encodec import audio_array, check_rate
from modeling_encodec.processors.audio import match_channels, resample


# What has to be importable, and what to install for it.
PACKAGES = {
    "visqol_audio": (("visqol",), 'pip install "modeling-encodec[eval]"'),
    "visqol_speech": (("visqol", "ai_edge_litert"), 'pip install "modeling-encodec[eval]"'),
    "pesq": (("pesq",), "pip install pesq (needs a C compiler)"),
    "stoi": (("pystoi",), 'pip install "modeling-encodec[eval]"'),
}
LEAST_SECONDS = 1.0
# What pystoi gives, with a warning, where too little is not silence.
STOI_OF_TOO_LITTLE = 1e-5
LOWEST_OPINION = 1.0  # of a mean opinion score


def missing_package(metric: str) -> str | None:
    """Why `metric` cannot be computed here, with what to install; None if it can."""
    packages, advice = PACKAGES.get(metric, ((), ""))
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{absent[0]} is not installed: {advice}" if absent else None


def visqol(reference: np.ndarray, estimate: np.ndarray, sampling_rate: int, mode: str = "audio") -> float | None:
    """ViSQOL's MOS-LQO of audio (channels, T): of music and all else in mode "audio" (1 to some 4.73), of speech in
    mode "speech" (1 to some 4.7, by the lattice model). None where there is nothing to judge.

    Raises:
        ImportError: without the package.
        ValueError: for shapes that differ, or another mode.
    """
    rates = {"audio": 48_000, "speech": 16_000}
    if mode not in rates:
        raise ValueError(f"mode is {mode!r}, allowed: {', '.join(rates)}")
    rate = rates[mode]
    signals = _signals(reference, estimate, sampling_rate, rate, f"visqol_{mode}")
    if signals is None:
        return None
    if not signals[1].any():
        return LOWEST_OPINION
    try:
        return float(_visqol(mode).measure_from_arrays(*signals, rate).moslqo)
    except (ValueError, IndexError):  # too short, once silence is cut off
        return None


def pesq(reference: np.ndarray, estimate: np.ndarray, sampling_rate: int) -> float | None:
    """Wideband PESQ (ITU-T P.862.2, MOS-LQO from 1.04 to 4.64) of speech (channels, T); 1 for silence in its place,
    and None where there is nothing to judge.

    Raises:
        ImportError: without the package.
        ValueError: for shapes that differ.
    """
    signals = _signals(reference, estimate, sampling_rate, 16_000, "pesq")
    if signals is None:
        return None
    if not signals[1].any():
        return LOWEST_OPINION
    from pesq import PesqError
    from pesq import pesq as judge

    try:
        return float(judge(16_000, *signals, "wb"))
    except PesqError:  # no speech found
        return None


def stoi(reference: np.ndarray, estimate: np.ndarray, sampling_rate: int) -> float | None:
    """Short-time objective intelligibility of speech (channels, T), 0 to 1; None where there is nothing to judge.

    Raises:
        ImportError: without the package.
        ValueError: for shapes that differ.
    """
    signals = _signals(reference, estimate, sampling_rate, sampling_rate, "stoi")
    if signals is None:
        return None
    if not signals[1].any():
        return 0.0
    from pystoi import stoi as judge

    score = float(judge(*signals, sampling_rate))
    return None if score == STOI_OF_TOO_LITTLE else score


def _signals(
    reference: np.ndarray, estimate: np.ndarray, rate: int, target_rate: int, metric: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Both as (T,) at `target_rate`, cut to [-1, 1]; None where there is nothing to judge."""
    reason = missing_package(metric)
    if reason is not None:
        raise ImportError(reason)
    reference, estimate = audio_array("reference", reference), audio_array("estimate", estimate)
    rate, target_rate = check_rate("sampling_rate", rate), check_rate("target_rate", target_rate)
    if reference.shape != estimate.shape:
        raise ValueError(f"shapes are {reference.shape} and {estimate.shape}, allowed: equal ones")
    if reference.shape[1] < LEAST_SECONDS * rate or not match_channels(reference, 1).any():
        return None
    mono = (match_channels(x, 1) for x in (reference, estimate))
    return tuple(resample(x, rate, target_rate)[0].clip(-1, 1).astype(np.float64) for x in mono)


@functools.lru_cache
def _visqol(mode: str):
    from visqol import VisqolApi

    judge = VisqolApi()
    judge.create(mode=mode, use_lattice_model=True if mode == "speech" else None)
    return judge
