"""Metrics on signals with known answers, and against second implementations."""

import math
import warnings

import numpy as np
import pytest
import torch
from conftest import noise

from modeling_encodec.evaluation.intervals import mean_interval
from modeling_encodec.evaluation.metrics import mel_distance, si_snr, windowed_si_snr
from modeling_encodec.evaluation.perceptual import pesq, stoi, visqol
from modeling_encodec.evaluation.scoring import METRICS, choose_metrics, find_lag
from modeling_encodec.processors.mel import MelSpectrogram


def orthogonal(seconds: float = 2.0, rate: int = 24000) -> tuple[torch.Tensor, torch.Tensor]:
    """Two signals of equal power that have nothing in common, (1, T)."""
    time = 2 * math.pi * 100 * torch.arange(int(seconds * rate)) / rate
    return torch.sin(time)[None], torch.cos(time)[None]


def voice(seconds: float = 3.0, rate: int = 24000) -> np.ndarray:
    """A buzz of harmonics in syllables, (1, T): enough like a voice for models of hearing."""
    time = np.arange(int(seconds * rate)) / rate
    pitch = 2 * np.pi * (120 * time + 3 * np.sin(2 * np.pi * 2 * time))
    buzz = sum(np.sin(k * pitch) / k for k in range(1, 25))
    return (0.15 * buzz * (0.55 + 0.45 * np.sin(2 * np.pi * 3 * time)))[None].astype(np.float32)


def degraded(audio: np.ndarray, level: float) -> np.ndarray:
    return audio + level * np.random.default_rng(0).standard_normal(audio.shape).astype(np.float32)


@pytest.mark.parametrize("decibels", [-10, 0, 20, 60])
def test_noise_of_known_power(decibels):
    reference, other = orthogonal()
    assert si_snr(reference, reference + 10 ** (-decibels / 20) * other).item() == pytest.approx(decibels, abs=1e-3)


def test_scale_and_offset_do_not_matter():
    torch.manual_seed(0)
    reference = torch.randn(2, 1, 1000)
    estimate = reference + 0.1 * torch.randn(2, 1, 1000)
    torch.testing.assert_close(si_snr(reference, 3 * estimate + 1), si_snr(reference, estimate), rtol=1e-5, atol=1e-5)


def test_torchmetrics_gives_the_same_si_snr():
    functional = pytest.importorskip("torchmetrics.functional.audio")
    reference, estimate = noise(3, 2, 5000, seed=1), noise(3, 2, 5000, seed=1) + 0.2 * noise(3, 2, 5000, seed=2)
    theirs = functional.scale_invariant_signal_noise_ratio(estimate.double(), reference.double())
    torch.testing.assert_close(si_snr(reference, estimate), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("samples", [100, 4000, 4001, 9999, 12000])
def test_windowed_si_snr_by_a_plain_loop(samples):
    reference, estimate = (noise(1, 1, samples, seed=seed)[0, 0].double().numpy() for seed in (3, 4))
    estimate = reference + 0.1 * estimate
    window, stride, scores = 4000, 2000, []
    for start in range(0, samples, stride):
        x, y = (np.pad(s[start : start + window], (0, max(0, window - len(s[start:])))) for s in (reference, estimate))
        x, y, epsilon = x - x.mean(), y - y.mean(), np.finfo(np.float32).eps * window
        signal = (x @ y) / (x @ x + epsilon) * x
        scores.append(10 * np.log10((signal @ signal + epsilon) / ((y - signal) @ (y - signal) + epsilon)))
    made = windowed_si_snr(torch.from_numpy(reference), torch.from_numpy(estimate), 8000, 0.5)
    assert made.item() == pytest.approx(np.mean(scores), abs=1e-9)


def test_silence_and_copies():
    signal = torch.sin(torch.arange(1000.0))
    assert si_snr(signal, signal) > 150
    assert si_snr(torch.zeros(10), torch.ones(10)).isnan() and si_snr(signal, torch.zeros(1000)) == -math.inf
    assert windowed_si_snr(torch.zeros(10), torch.zeros(10), 10) == 0
    for metric in (si_snr, lambda a, b: windowed_si_snr(a, b, 10), lambda a, b: mel_distance(a, b, 24000)):
        with pytest.raises(ValueError, match=r"\(10,\) and \(9,\)"):
            metric(torch.zeros(10), torch.zeros(9))


def test_mel_distance_of_a_gain_is_that_gain():
    audio = 100 * torch.randn(1, 48000, generator=torch.Generator().manual_seed(0))  # no band is as low as 1e-5
    filled = [(MelSpectrogram(24000, 2**e).filters.sum(0) > 0).float().mean().item() for e in range(5, 12)]
    assert mel_distance(audio, 10 * audio, 24000).item() == pytest.approx(2 * np.mean(filled), rel=1e-4)
    assert mel_distance(audio, audio, 24000) == 0


def test_mel_distance_by_numpy():
    reference, estimate = noise(1, 1, 6000, seed=5)[0], noise(1, 1, 6000, seed=6)[0]
    distances = []
    for window in (2**e for e in range(5, 12)):
        hop, hann = window // 4, np.hanning(window + 1)[:-1]
        filters = MelSpectrogram(24000, window).filters.numpy()
        logs = []
        for audio in (reference[0].numpy(), estimate[0].numpy()):
            audio = np.pad(audio, (window - hop) // 2, mode="reflect")
            audio = np.pad(audio, (0, -(len(audio) - window) % hop))
            frames = np.lib.stride_tricks.sliding_window_view(audio, window)[::hop]
            power = np.abs(np.fft.rfft(frames * hann)) ** 2 / (hann**2).sum()
            logs.append(np.log10(np.maximum(power @ filters, 1e-5)))
        distances.append(np.abs(logs[0] - logs[1]).mean())
    assert mel_distance(reference, estimate, 24000).item() == pytest.approx(np.mean(distances), rel=1e-4)


# ---- models of hearing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "best", "levels"), [("audio", 4.7, (1e-4, 1e-3, 1e-2)), ("speech", 4.5, (1e-3, 1e-2, 1e-1))]
)
def test_visqol_calls_a_copy_perfect_and_noise_worse_the_louder_it_is(mode, best, levels):
    pytest.importorskip("visqol")
    audio = voice()
    scores = [visqol(audio, degraded(audio, level), 24000, mode) for level in (0.0, *levels)]
    assert scores[0] >= best and scores == sorted(scores, reverse=True) and scores[-1] < 2


def test_visqol_is_the_package_at_its_own_rate():
    api = pytest.importorskip("visqol").VisqolApi()
    api.create(mode="audio")
    audio = voice(1.5, 48000)
    worse = degraded(audio, 0.01)
    theirs = api.measure_from_arrays(audio[0].astype(float), worse[0].astype(float), 48000).moslqo
    assert visqol(audio, worse, 48000) == theirs
    # Stereo is heard as its mean.
    assert visqol(np.concatenate([audio, audio]), np.concatenate([worse, worse]), 48000) == theirs


def test_pesq_and_stoi_are_the_packages():
    audio = voice(2.0, 16000)
    worse = degraded(audio, 0.02)
    package = pytest.importorskip("pystoi")
    assert stoi(audio, audio, 16000) == pytest.approx(1, abs=1e-6)
    assert stoi(audio, worse, 16000) == pytest.approx(package.stoi(audio[0], worse[0], 16000), abs=1e-9)
    package = pytest.importorskip("pesq")
    assert pesq(audio, audio, 16000) == pytest.approx(4.64, abs=0.01)
    assert pesq(audio, worse, 16000) == pytest.approx(package.pesq(16000, audio[0], worse[0], "wb"), abs=1e-6)


@pytest.mark.parametrize("name", ["visqol_audio", "visqol_speech", "pesq", "stoi"])
def test_nothing_to_judge_is_no_number(name):
    if choose_metrics(None)[1].get(name):
        pytest.skip(f"{name} is not installed")
    score = METRICS[name].score
    audio = voice(1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert score(np.zeros_like(audio), audio, 24000) is None  # ViSQOL itself calls that perfect
    assert score(audio[:, :23999], audio[:, :23999], 24000) is None
    assert score(audio, np.zeros_like(audio), 24000) == (0 if name == "stoi" else 1)  # and this not a number


def test_visqol_has_two_modes():
    with pytest.raises(ValueError, match="mode is 'music', allowed: audio, speech"):
        visqol(np.zeros((1, 8)), np.zeros((1, 8)), 48000, "music")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    names, missing = choose_metrics(None)
    assert names == ["si_snr", "si_snr_windowed", "mel_distance"]
    assert missing["pesq"] == "pesq is not installed: pip install pesq (needs a C compiler)"
    with pytest.raises(
        ImportError, match=r"visqol_audio: visqol is not installed: pip install .modeling-encodec\[eval\]"
    ):
        choose_metrics(["si_snr", "visqol_audio"])
    with pytest.raises(ImportError, match="pystoi is not installed"):
        stoi(voice(), voice(), 24000)
    with pytest.raises(ValueError, match="metric is 'snr', allowed: si_snr, "):
        choose_metrics(["snr"])


# ---- what metrics are made of ---------------------------------------------------------------------------------------


def test_scores_of_silence_and_copies_fit_into_json():
    silence, audio = np.zeros((1, 24000), np.float32), voice(1.0)
    assert METRICS["si_snr"].score(silence, audio, 24000) is None
    assert METRICS["si_snr"].score(audio, audio, 24000) == 100
    assert METRICS["si_snr"].score(audio, silence, 24000) == -100  # nothing is not left out of means


@pytest.mark.parametrize("lag", [-40, -1, 0, 7, 40])
def test_lag(lag):
    audio = noise(1, 2, 5000, seed=8)[0].numpy()
    late = np.roll(np.pad(audio, ((0, 0), (50, 50))), lag, axis=1)
    early = np.pad(audio, ((0, 0), (50, 50)))
    assert find_lag(early, 0.3 * late, 50) == lag
    assert find_lag(early, np.zeros_like(early), 50) == 0


def test_intervals_are_students():
    made = mean_interval([1, 2, 3, 4, 5])
    assert (made.mean, made.count) == (3, 5)
    assert made.high - 3 == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)  # t(0.975; 4)
    assert 3 - made.low == pytest.approx(made.high - 3)
    assert mean_interval([7.0]).mean == 7 and math.isnan(mean_interval([7.0]).low)
    for values in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="allowed: at least one, all of them finite"):
            mean_interval(values)
