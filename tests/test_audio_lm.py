"""The example script: tokens of real clips, a language model trained on them, and the sound that it makes."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import warnings

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise

from modeling_encodec.demo.table import demo_clips
from modeling_encodec.examples import audio_lm
from modeling_encodec.processors.audio import read_audio, write_audio
from modeling_encodec.processors.processing_encodec import EncodecProcessor


def run_example(folder, *arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "modeling_encodec.examples.audio_lm", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_learns_and_goes_on_from_a_clip(tmp_path, bundled_model):
    done = run_example(tmp_path, "--out", "continued.wav", "--steps", "40")
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.search(r"loss ([\d.]+) before, ([\d.]+) after 40 steps", done.stdout).groups())
    assert abs(before - np.log(2 * 1024 + 3)) < 0.2  # it begins by knowing nothing
    assert after < before - 0.8
    samples, rate = soundfile.read(tmp_path / "continued.wav")
    assert rate == 24000 and samples.shape == (48000,)  # half a second of prompt, and more up to two
    assert np.isfinite(samples).all()
    prompt, continuation = samples[:12000], samples[12000:]
    clip, _ = read_audio(demo_clips()[0], 24000, 1)
    with torch.no_grad():
        coded = bundled_model.encode(torch.from_numpy(clip[None, :, :12000]), num_quantizers=audio_lm.NUM_QUANTIZERS)
        expected = bundled_model.decode(**coded).audio_values[0, 0].numpy()
    assert np.corrcoef(prompt, expected)[0, 1] > 0.999
    assert 0.1 < continuation.std() / prompt.std() < 10
    assert [path.name for path in tmp_path.iterdir()] == ["continued.wav"]


def test_refuses_what_it_cannot_do_in_one_line(tmp_path, monkeypatch, capsys):
    there = tmp_path / "there.wav"
    there.write_bytes(b"mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["audio_lm", "--out", "there.wav"])
    with pytest.raises(SystemExit) as left, warnings.catch_warnings(action="ignore"):  # runpy: it is imported already
        runpy.run_module("modeling_encodec.examples.audio_lm", run_name="__main__")
    assert left.value.code == 2
    assert capsys.readouterr() == ("", "audio_lm: there.wav exists; --force overwrites it\n")
    assert there.read_bytes() == b"mine"
    with pytest.raises(FileNotFoundError, match=r"no recordings, allowed: a folder of \.wav"):
        audio_lm.main(tmp_path / "new.wav", clips=tmp_path / "nowhere")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else find(name))
    with pytest.raises(ImportError, match=r"needs accelerate: pip install \S*modeling-encodec\[train\]"):
        audio_lm.main(tmp_path / "new.wav")


def test_force_and_clips_of_ones_own(tmp_path, monkeypatch, bundled_model):
    """A folder within the folder, two rates, stereo, and clips shorter than a window and than the prompt."""
    (tmp_path / "clips" / "inner").mkdir(parents=True)
    write_audio(tmp_path / "clips" / "a.wav", noise(1, 2, 22050)[0].numpy(), 44100)
    write_audio(tmp_path / "clips" / "inner" / "b.flac", noise(1, 1, 24000)[0].numpy(), 16000)
    there = tmp_path / "there.wav"
    there.write_bytes(b"mine")
    monkeypatch.setattr(audio_lm, "EXAMPLES", 4)
    audio_lm.main(there, clips=tmp_path / "clips", steps=1, force=True)
    samples, rate = soundfile.read(there)
    assert rate == 24000 and len(samples) == (38 + 112) * 320


def test_examples_are_windows_of_the_clips(monkeypatch, bundled_model):
    processor = EncodecProcessor.for_model(bundled_model, num_quantizers=2)
    clips = [noise(1, 1, samples)[0, 0].numpy() for samples in (24000, 96000)]
    monkeypatch.setattr(audio_lm, "EXAMPLES", 12)
    examples = audio_lm.make_examples(processor, clips)
    assert len(examples) == 12
    short = [example for example in examples if (example["labels"] == -100).any()]
    assert 0 < len(short) < 12
    for example in examples:
        frames = 75 if (example["labels"] == -100).any() else 150
        length = 1 + 2 * frames
        assert {len(value) for value in example.values()} == {1 + 2 * 150}
        assert example["attention_mask"].tolist() == [1] * length + [0] * (301 - length)
        assert torch.equal(example["labels"][:length], example["input_ids"][:length])
        assert (example["labels"][length:] == -100).all()
        assert example["input_ids"][0] == processor.bos_token_id
        ids = example["input_ids"][1:length].view(-1, 2)
        assert ((ids // 1024) == torch.tensor([0, 1])).all()
    assert torch.equal(short[0]["input_ids"], short[-1]["input_ids"])  # a short clip is one window
    long = [example["input_ids"] for example in examples if (example["labels"] != -100).all()]
    assert not torch.equal(long[0], long[1])


def test_next_codebook_leaves_the_one_whose_turn_it_is():
    processor = audio_lm.NextCodebook(3, 4)  # ids 0 to 11, specials 12 to 14
    last = torch.tensor([[13], [2], [7], [11], [0]])  # BOS, then ids of codebooks 0, 1, 2, 0
    scores = processor(torch.cat([torch.full((5, 2), 1), last], dim=1), torch.zeros(5, 15))
    allowed = [row.isfinite().nonzero()[:, 0].tolist() for row in scores]
    first, second, third = [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]
    assert allowed == [first, second, third, first, second]
    assert (scores[scores.isfinite()] == 0).all()
