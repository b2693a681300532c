"""Our mel filters and the pictures' spectrogram are those of Transformers 5.23, which may take its own away."""

import warnings

import numpy as np
import pytest

from modeling_encodec.evaluation.plots import mel_spectrogram_db
from modeling_encodec.processors.mel_filters import mel_filters


try:
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function
except ImportError:
    mel_filter_bank = None

upstream = pytest.mark.skipif(mel_filter_bank is None, reason="this version of transformers has no mel_filter_bank")
RATES = (8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000)
# Of Transformers 5.23: for (rate, window, lowest), the sum of all weights, of each times its bin and of each times its
# band, and how many are not 0.
HTK = {
    (24000, 32, 0.0): (15.000000000000004, 120.00000000000006, 692.4499891867031, 31),
    (24000, 512, 0.0): (249.58600533113784, 31277.19132389923, 11234.252178606723, 500),
    (24000, 2048, 0.0): (998.9689142996904, 500459.3290594285, 44938.37778709803, 1998),
    (48000, 1024, 0.0): (497.4430805842194, 124006.43872802015, 23497.900475834955, 994),
    (24000, 1024, 64.0): (497.10051258079, 125282.180326116, 22200.07067014077, 995),
    (48000, 64, 64.0): (30.583122291877487, 483.07679104820215, 1452.7195243153892, 61),
}
SLANEY = {
    16000: (5.11865763300399, 785.6450375696447, 202.239280047956, 1001),
    24000: (3.412236603395775, 472.3533051627967, 134.82584420820615, 1000),
    48000: (1.7059890658204298, 200.70263855105117, 67.41156181238549, 997),
}
DECIBELS = [
    -5.9382,
    -94.9694,
    -100.0000,
    -100.0000,
    -27.7078,
    -57.6466,
    -100.0000,
    -100.0000,
    -40.9633,
    -16.2504,
    -80.5877,
    -100.0000,
    -52.7404,
    -100.0000,
    -79.3078,
    -15.1927,
    -63.4594,
    -100.0000,
    -100.0000,
    -100.0000,
]


def digest(filters: np.ndarray) -> tuple:
    bins, bands = np.arange(filters.shape[0])[:, None], np.arange(filters.shape[1])
    return filters.sum(), (filters * bins).sum(), (filters * bands).sum(), int((filters > 0).sum())


def signal() -> np.ndarray:
    """A rising tone, without a random number."""
    time = np.arange(6000) / 24000
    return (0.3 * np.sin(2 * np.pi * (200 + 8000 * time) * time)).astype(np.float32)


@upstream
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("lowest", [0.0, 64.0])
def test_filters_of_the_losses_are_upstreams_to_the_bit(rate, lowest):
    for window in (32, 64, 128, 256, 512, 1024, 2048):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the empty bands
            theirs = mel_filter_bank(window // 2 + 1, 64, lowest, rate / 2, rate)
        np.testing.assert_array_equal(mel_filters(window, 64, rate, lowest), theirs)


@upstream
@pytest.mark.parametrize("rate", RATES)
def test_filters_of_the_pictures_are_upstreams(rate):
    theirs = mel_filter_bank(513, 80, 0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(1024, 80, rate, slaney=True), theirs, rtol=0, atol=1e-14 * theirs.max())


@upstream
@pytest.mark.parametrize("samples", [1, 700, 1024, 1025, 6000])
def test_spectrograms_of_the_pictures_are_upstreams(samples):
    theirs = mel_filter_bank(513, 80, 0, 12000, 24000, norm="slaney", mel_scale="slaney")
    audio = signal()[:samples]
    padded = np.pad(audio, (0, max(0, 1024 - samples)))
    options = {"mel_filters": theirs, "mel_floor": 1e-5, "log_mel": "dB"}
    expected, ours = spectrogram(padded, window_function(1024), 1024, 256, **options), mel_spectrogram_db(audio, 24000)
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=1e-3)


@pytest.mark.parametrize("key", HTK)
def test_filters_of_the_losses_stay_what_they_are(key):
    rate, window, lowest = key
    assert digest(mel_filters(window, 64, rate, lowest)) == pytest.approx(HTK[key], rel=1e-12)


@pytest.mark.parametrize("rate", SLANEY)
def test_filters_of_the_pictures_stay_what_they_are(rate):
    assert digest(mel_filters(1024, 80, rate, slaney=True)) == pytest.approx(SLANEY[rate], rel=1e-12)


def test_spectrograms_of_the_pictures_stay_what_they_are():
    assert mel_spectrogram_db(signal(), 24000)[::16, ::6].ravel().tolist() == pytest.approx(DECIBELS, abs=1e-3)
