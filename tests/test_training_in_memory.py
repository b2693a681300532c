"""Corpora in memory: examples are those that would be read, and what does not fit is refused before it is decoded."""

import dataclasses

import numpy as np
import pytest
import torch
from codec_runs import (
    fixture_config,  # noqa: F401
    fixture_place,  # noqa: F401
    run,
)
from run_results import assert_equal, fresh_accelerate, state_of  # noqa: F401
from training_audio import RATE, batches, equal, speech_and_music, training_config, write

from modeling_encodec.processors.corpus.clips import read_crop
from modeling_encodec.processors.corpus.reading import CorpusConfig
from modeling_encodec.training import in_memory
from modeling_encodec.training.corpora import StreamedCorpus, open_corpus
from modeling_encodec.training.in_memory import free_memory
from modeling_encodec.training.mixing import TrainingAudio


@pytest.mark.parametrize("workers", [0, 2])
def test_examples_are_those_that_are_read(tmp_path, workers):
    """The half of the clips that have another rate within float32 rounding; with none of these, to the bit."""
    config = training_config(tmp_path, segment_seconds=0.5, data_in_memory=True)
    read = TrainingAudio(dataclasses.replace(config, data_in_memory=False), speech_and_music(tmp_path), RATE, 1)
    kept = TrainingAudio(config, speech_and_music(tmp_path), RATE, 1)
    for ours, theirs in zip(batches(kept, 12, workers=workers), batches(read, 12)):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
    speech = [TrainingAudio(config, speech_and_music(tmp_path)[:1], RATE, 1), None]
    speech[1] = TrainingAudio(
        dataclasses.replace(config, data_in_memory=False), speech_and_music(tmp_path)[:1], RATE, 1
    )
    assert equal(batches(speech[0], workers=workers), batches(speech[1]))


@pytest.mark.parametrize("rate", [RATE, 12000, 44100])
def test_crops_anywhere(tmp_path, rate):
    """Before the clip, across its ends, and beyond them."""
    write(tmp_path / "a" / "1.wav", 1001, rate)
    corpora = [open_corpus(CorpusConfig("a", str(tmp_path / "a")), 1)]
    (before,) = corpora[0].clips
    in_memory.decode_corpora(corpora, RATE, 1, 0)
    (after,) = corpora[0].clips
    assert after == before and after.decoded.shape == (1, -(-1001 * RATE // rate))
    for start in (-5000, -40, -1, 0, 7, 100, after.decoded.shape[1] - 3, after.decoded.shape[1], 9999):
        crops = [read_crop(clip, start, 300, RATE, 1) for clip in (before, after)]
        np.testing.assert_allclose(*crops, atol=2e-6)


def test_a_run_is_the_one_that_reads(config):
    """Its clips have the model's rate."""
    kept = dataclasses.replace(config, data_in_memory=True, workers=1, output=f"{config.output}_kept")
    run(config)
    run(kept)
    assert_equal(state_of(config), state_of(kept))


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(in_memory, "free_memory", lambda: 100_000)
    config = training_config(tmp_path, data_in_memory=True)
    corpora = speech_and_music(tmp_path)
    with pytest.raises(
        ValueError, match="data_in_memory is True, allowed: no, for 0.0 hours take 0.0 GB and 0.0 GB can"
    ):
        TrainingAudio(config, corpora, RATE, 1)
    assert all(clip.decoded is None for corpus in corpora for clip in corpus.clips)
    stream = StreamedCorpus(CorpusConfig("far", "x", weight=1.0), None)
    with pytest.raises(ValueError, match="data_in_memory is True, allowed: no with streams, as corpus 'far' is"):
        TrainingAudio(config, [*corpora, stream], RATE, 1)


def test_a_clip_that_is_gone_is_skipped_when_it_is_drawn(tmp_path):
    corpora = speech_and_music(tmp_path)
    (tmp_path / "speech" / "2.wav").unlink()
    dataset = TrainingAudio(training_config(tmp_path, data_in_memory=True), corpora, RATE, 1)
    skipped = [item for number in range(60) for item in dataset[number]["skipped"]]
    assert {name for name, _ in skipped} == {str(tmp_path / "speech" / "2.wav")}


def test_free_memory_is_plausible():
    assert 1e7 < free_memory() < 1e14
