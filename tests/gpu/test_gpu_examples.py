"""The audio language model of the examples, trained and continued on a GPU."""

import re

import numpy as np
import pytest
import soundfile
from devices import REAL, gpu_or_pretended

from modeling_encodec.examples import audio_lm


@pytest.mark.slow
def test_learns_and_goes_on_from_a_clip(tmp_path, capsys):
    with one_gpu():
        audio_lm.main(tmp_path / "continued.wav", None, steps=8)
    samples, rate = soundfile.read(tmp_path / "continued.wav")
    assert samples.shape == (2 * rate,) and np.isfinite(samples).all()
    before, after = map(float, re.search(r"loss ([\d.]+) before, ([\d.]+) after", capsys.readouterr().out).groups())
    assert after < before


def one_gpu():
    """Of several, `Trainer` makes `nn.DataParallel`, which is not pretended."""
    return gpu_or_pretended() if REAL else gpu_or_pretended(count=1)
