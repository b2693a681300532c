"""Floating point on the scale of integer PCM is taken as it is, and said once, everywhere audio enters."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import soundfile
import torch
from conftest import clip

from modeling_encodec import (
    CodecTokenizer,
    EncodecFeatureExtractor,
    EncodecProcessor,
    StreamingEncoder,
    bundled_checkpoint,
    compress,
    read_audio,
    write_audio,
)
from modeling_encodec.models.inputs_encodec import PCM_WARNING
from modeling_encodec.processors.corpus.clips import measure_clip, read_crop


@pytest.fixture(scope="module")
def entries(small_models, tmp_path_factory):
    """Where audio enters, by name: `entries(gain)` are calls with audio of this peak."""
    model, folder = small_models["24khz"], tmp_path_factory.mktemp("pcm")
    tokenizer = CodecTokenizer(model, 1.8)

    def of(peak: float) -> dict:
        audio = clip(model, 0.1).numpy()
        audio = (audio * (peak / np.abs(audio).max())).astype(np.float32)
        path = folder / "a.wav"
        soundfile.write(path, audio[0], 24000, subtype="FLOAT")
        return {
            "EncodecFeatureExtractor": lambda: EncodecFeatureExtractor()(audio, sampling_rate=24000),
            "EncodecModel.encode": lambda: model.encode(audio[None], bandwidth=1.8),
            "EncodecModel.forward": lambda: model(torch.from_numpy(audio)[None], bandwidth=1.8),
            "StreamingEncoder.push": lambda: StreamingEncoder(model, 1.8).push(audio[None]),
            "compress": lambda: compress(model, audio, 1.8),
            "CodecTokenizer": lambda: tokenizer({"audio": [{"array": audio, "sampling_rate": 24000}]}),
            "CodecTokenizer of a file": lambda: tokenizer({"audio": [str(path)]}),
            "EncodecProcessor": lambda: EncodecProcessor.for_model(model, 1.8)(audio, 24000),
            "read_audio": lambda: read_audio(path, 16000),
            "write_audio": lambda: write_audio(folder / "b.flac", audio, 24000),
            "training": lambda: read_crop(measure_clip("a", str(path)), 0, 2400, 24000, 1),
        }

    return of


def said(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("peak", [-32768.0, 32767.0, 8_388_607.0, 2.0**31, 128.0])
def test_it_is_said_wherever_audio_enters(entries, peak):
    for name, call in entries(abs(peak)).items():
        assert PCM_WARNING in said(call), name


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("peak", [1e-4, 1.0, 1.5, 16.0, 99.0])
def test_honest_audio_is_never_warned_of(entries, peak):
    for call in entries(peak).values():
        call()


@pytest.mark.filterwarnings("error")
def test_whole_numbers_are_never_warned_of(small_models):
    pcm = np.array([[32767, -32768] * 1000], np.int16)
    for given in (pcm, torch.from_numpy(pcm), pcm.astype(np.int32) << 16):
        small_models["24khz"].encode(given[None], bandwidth=1.8)


def test_it_is_a_warning_and_the_audio_is_taken(small_models):
    """What is divided by 32768 afterwards is another signal: nothing is scaled without a word."""
    model = small_models["24khz"]
    audio = clip(model, 0.1)
    with pytest.warns(UserWarning, match="scale of integers"):
        loud = EncodecFeatureExtractor()((audio * 32768).numpy(), return_tensors="pt")["input_values"]
    assert torch.equal(loud[0], audio * 32768)


ONCE = """
import numpy as np, torch
from modeling_encodec import EncodecConfig, EncodecModel, EncodecProcessor
model = EncodecModel(EncodecConfig(num_filters=2, hidden_size=16, num_lstm_layers=1)).eval()
processor = EncodecProcessor.for_model(model, 1.5)
for _ in range(3):
    audio = 20000 * torch.rand(1, 3200)
    processor(audio, 24000)
    model.encode(audio[None])
"""


def test_it_is_said_once_in_a_process():
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    done = subprocess.run([sys.executable, "-c", ONCE], capture_output=True, text=True, env=environment, check=True)
    assert done.stderr.count(PCM_WARNING) == 1


@pytest.mark.filterwarnings("default::UserWarning:modeling_encodec")
def test_commands_say_it_in_one_line(run, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / "in" / name, np.sin(np.arange(2400.0)) * 30000, 24000, subtype="FLOAT")
    for _ in range(2):  # each run by itself
        code, _, lines = run(
            "encode", tmp_path / "in", tmp_path / "out", "-b", 6, "-f", "--model", bundled_checkpoint()
        )
        ours = [line for line in lines if PCM_WARNING in line]
        assert code == 0 and ours == [f"modeling-encodec: warning: {PCM_WARNING}"], lines
