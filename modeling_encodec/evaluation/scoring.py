"""One clip through every system: what each metric says of it."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from modeling_encodec.evaluation.clips import Clip
from modeling_encodec.evaluation.metrics import mel_distance, si_snr, windowed_si_snr
from modeling_encodec.evaluation.perceptual import missing_package, pesq, stoi, visqol
from modeling_encodec.evaluation.plots import codebook_counts
from modeling_encodec.evaluation.systems import System
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.streaming.streams import encode_blocks


# SI-SNR of an exact copy is infinite, which JSON and means have no place for.
MOST_DECIBELS = 100.0
# Delays up to this are looked for, to either side.
MOST_LAG_SECONDS = 0.05


@dataclass(frozen=True)
class Metric:
    """A number for a clip: `definition` says how it is computed; `score(reference, estimate, sampling_rate)` takes
    audio (channels, T) and gives None where it is not defined."""

    definition: str
    score: Callable[[np.ndarray, np.ndarray, int], float | None]


def _tensors(score: Callable, lowest: float = -math.inf, highest: float = math.inf) -> Callable:
    def of_arrays(reference: np.ndarray, estimate: np.ndarray, sampling_rate: int) -> float | None:
        value = score(torch.from_numpy(reference), torch.from_numpy(estimate), sampling_rate).mean().item()
        return None if math.isnan(value) else min(max(value, lowest), highest)

    return of_arrays


METRICS = {
    "si_snr": Metric(
        "SI-SNR in dB of the whole clip (paper 4.3), mean of channels, cut to -100 to 100; none for a silent original",
        _tensors(lambda reference, estimate, _: si_snr(reference, estimate), -MOST_DECIBELS, MOST_DECIBELS),
    ),
    "si_snr_windowed": Metric(
        "SI-SNR in dB of windows of 5 s overlapping by half, their mean, as in audiocraft (silence: 0 dB), cut alike",
        _tensors(windowed_si_snr, -MOST_DECIBELS, MOST_DECIBELS),
    ),
    "mel_distance": Metric(
        "mean |difference| of log10 mel power, 64 bands, windows of 2^5 to 2^11 samples; lower is closer",
        _tensors(mel_distance),
    ),
    "visqol_audio": Metric(
        "ViSQOL MOS-LQO, audio mode: mean of channels at 48 kHz, no silence added; from 1 s",
        lambda reference, estimate, rate: visqol(reference, estimate, rate, "audio"),
    ),
    "visqol_speech": Metric(
        "ViSQOL MOS-LQO, speech mode (lattice): mean of channels at 16 kHz, no silence added; from 1 s",
        lambda reference, estimate, rate: visqol(reference, estimate, rate, "speech"),
    ),
    "pesq": Metric("wideband PESQ, MOS-LQO: mean of channels at 16 kHz; from 1 s, where speech is found", pesq),
    "stoi": Metric("STOI: mean of channels; from 1 s, where enough is not silence", stoi),
}


def choose_metrics(names: Sequence[str] | None) -> tuple[list[str], dict[str, str]]:
    """The metrics of these names; all that can be computed here by default, and which cannot, with the reason.

    Raises:
        ValueError: for a name that nobody knows.
        ImportError: for a metric that was asked for and needs a package that is missing.
    """
    missing = {}
    for name in names or METRICS:
        if name not in METRICS:
            raise ValueError(f"metric is {name!r}, allowed: {', '.join(METRICS)}")
        reason = missing_package(name)
        if reason is not None:
            if names:
                raise ImportError(f"{name}: {reason}")
            missing[name] = reason
    return [name for name in METRICS if name in (names or METRICS) and name not in missing], missing


def score_clip(
    clip: Clip, reference: np.ndarray, sampling_rate: int, systems: Sequence[System], metrics: Sequence[str]
) -> dict:
    """What is kept of a clip, whose audio is `reference` (channels, T): a record for JSON, with a row for each system
    in `rows`."""
    rows = []
    for system in systems:
        coded = system.code(reference)
        scores = {name: METRICS[name].score(reference, coded.audio, sampling_rate) for name in metrics}
        rows.append(
            {
                "system": system.name,
                "kbps": system.kbps,
                "bytes": coded.bytes,
                "lm_bytes": coded.lm_bytes,
                "lag": find_lag(reference, coded.audio, int(MOST_LAG_SECONDS * sampling_rate)),
                "scores": scores,
                "encode_seconds": coded.encode_seconds,
                "decode_seconds": coded.decode_seconds,
            }
        )
    return {
        "clip": clip.name,
        "mark": clip.mark(),
        "category": clip.category,
        "samples": reference.shape[1],
        "sha256": hashlib.sha256(np.ascontiguousarray(reference, "<f4").tobytes()).hexdigest(),
        "rows": rows,
    }


@torch.no_grad()
def count_codes(audio: np.ndarray, model: EncodecModel) -> np.ndarray:
    """How often audio (channels, T) uses each entry of each codebook at the highest bandwidth, (codebooks, entries)
    uint32."""
    config = model.config
    pieces = encode_blocks(model, [audio], config.num_quantizers)
    return sum(codebook_counts(piece.cpu().numpy(), config.codebook_size) for piece, _ in pieces).astype(np.uint32)


def find_lag(reference: np.ndarray, estimate: np.ndarray, most: int) -> int:
    """By how many samples, up to `most`, the estimate (channels, T) comes late, by the peak of the cross-correlation;
    0 where nothing correlates."""
    size = 1 << (reference.shape[1] + most).bit_length()
    spectra = [np.fft.rfft(x.mean(0, dtype=np.float64), size) for x in (reference, estimate)]
    correlation = np.fft.irfft(spectra[0].conj() * spectra[1], size)
    near = np.concatenate([correlation[-most:], correlation[: most + 1]]) if most else correlation[:1]
    return int(near.argmax()) - most if near.max() > 0 else 0
