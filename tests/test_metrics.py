"""Metrics on signals with known answers."""

import math

import pytest
import torch

from modeling_encodec.evaluation.metrics import si_snr


def test_noise_of_known_power():
    time = torch.arange(48000) / 48000
    reference, noise = torch.sin(2 * math.pi * 100 * time), torch.cos(2 * math.pi * 100 * time)  # orthogonal
    for decibels in (-10, 0, 20):
        estimate = reference + 10 ** (-decibels / 20) * noise
        assert si_snr(reference, estimate).item() == pytest.approx(decibels, abs=1e-3)


def test_scale_and_offset_do_not_matter():
    torch.manual_seed(0)
    reference = torch.randn(2, 1, 1000)
    estimate = reference + 0.1 * torch.randn(2, 1, 1000)
    torch.testing.assert_close(si_snr(reference, 3 * estimate + 1), si_snr(reference, estimate), rtol=1e-5, atol=1e-5)


def test_edges():
    signal = torch.sin(torch.arange(1000.0))
    assert si_snr(signal, signal) > 150
    assert si_snr(torch.zeros(10), torch.ones(10)).isnan()
    with pytest.raises(ValueError, match=r"\(10,\) and \(9,\)"):
        si_snr(torch.zeros(10), torch.zeros(9))
