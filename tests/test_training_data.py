"""The training examples: reverberation, mixtures, and batches."""

import os
import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_audio import RATE, batches, constant, equal, sound, speech_and_music, training_config, write

from modeling_encodec.processors.audio import read_audio
from modeling_encodec.processors.corpus.clips import read_crop
from modeling_encodec.processors.corpus.reading import CorpusConfig
from modeling_encodec.training import mixing, reverberation
from modeling_encodec.training.corpora import open_corpus
from modeling_encodec.training.mixing import TrainingAudio, batch_loader
from modeling_encodec.training.reverberation import ImpulseResponses, reach, reverberate, reverberation_time


# Reverberation


@pytest.mark.parametrize("seconds", [0.2, 0.3, 0.7, 1.3, 2.0])
@pytest.mark.parametrize("floor", [0, 3e-3])
def test_reverberation_time_of_exponential_decays(seconds, floor):
    rng = np.random.default_rng(1)
    times = np.arange(int(1.5 * seconds * 16000)) / 16000
    decay = rng.standard_normal(len(times)) * 10 ** (-3 * times / seconds)
    impulse = np.concatenate([np.zeros(500), [5.0], decay]) + floor / 5 * rng.standard_normal(len(times) + 501)
    assert reverberation_time(impulse, 16000) == pytest.approx(seconds, rel=0.1)


def test_reverberation_time_of_what_does_not_decay():
    assert reverberation_time(np.zeros(100), RATE) == 0
    assert reverberation_time(np.eye(1, 100)[0], RATE) == 0
    assert reverberation_time(np.ones(1), RATE) == 0


@given(direct=st.integers(0, 30), tail=st.integers(0, 40), samples=st.integers(1, 100))
@settings(max_examples=30, deadline=None)
def test_reverberation_is_aligned_convolution(direct, tail, samples):
    impulse = np.random.default_rng(0).uniform(-0.5, 0.5, direct + 1 + tail)
    impulse[direct] = 1
    audio = sound(samples, 2).T
    expected = np.stack([np.convolve(row, impulse)[direct : direct + samples] for row in audio])
    np.testing.assert_allclose(reverberate(audio, impulse), expected, atol=1e-6)
    assert reach(impulse) == (tail, direct)


def impulse_folder(folder, rate=RATE):
    rng = np.random.default_rng(0)
    for seconds in (0.1, 0.4, 0.8, 3.0):
        times = np.arange(int(1.3 * seconds * rate)) / rate
        impulse = 0.1 * rng.standard_normal(len(times)) * 10 ** (-3 * times / seconds)
        (folder / "irs").mkdir(exist_ok=True)
        soundfile.write(folder / "irs" / f"{seconds}.wav", np.concatenate([np.zeros(40), [0.9], impulse]), rate)
    soundfile.write(folder / "irs" / "silent.wav", np.zeros(100), rate)
    return folder / "irs"


def test_impulse_responses_within_the_papers_range_are_kept(tmp_path, caplog):
    folder = impulse_folder(tmp_path, 16000)
    with caplog.at_level("INFO"):
        impulses = ImpulseResponses(folder, RATE, cache_folder=tmp_path / "cache")
    assert [os.path.basename(path) for path in impulses.paths] == ["0.4.wav", "0.8.wav"]
    assert "2 impulse responses" in caplog.text and "2 with another, 1 not readable" in caplog.text
    impulse = impulses.draw(np.random.default_rng(0))
    assert np.square(impulse).sum() == pytest.approx(1) and abs(int(np.abs(impulse).argmax()) - 20) <= 1
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="impulse_responses: 0 impulse responses .* allowed: at least one"):
        ImpulseResponses(tmp_path / "none", RATE)


def test_reverberated_segment_hears_what_came_before_it(tmp_path, monkeypatch):
    """A segment equals the same stretch of the whole file reverberated at once."""
    path = write(tmp_path / "a" / "1.wav", 4 * RATE, subtype="FLOAT")
    config = training_config(
        tmp_path, impulse_responses=str(impulse_folder(tmp_path)), reverberation_chance=1.0, normalize="none",
        gain_min=0.0, gain_max=0.0, chance_of_two=0.0, chance_of_three=0.0,
    )  # fmt: skip
    dataset = TrainingAudio(config, [open_corpus(CorpusConfig("a", str(tmp_path / "a")), 1)], RATE, 1)
    seen, crop = [], read_crop
    monkeypatch.setattr(mixing, "read_crop", lambda clip, start, *rest: seen.append(start) or crop(clip, start, *rest))
    monkeypatch.setattr(mixing, "reverberate", lambda audio, given: seen.append(given) or reverberate(audio, given))
    audio = dataset[5]["audio"].numpy()
    start, impulse = seen
    whole = reverberate(read_audio(path)[0], impulse)
    start += reach(impulse)[0]
    np.testing.assert_allclose(audio, whole[:, start : start + 800], atol=1e-5)


# Mixtures


def test_strategies_come_as_often_as_configured(tmp_path, monkeypatch):
    """Counts files of each domain and reverberation of 3000 examples."""
    corpora = speech_and_music(tmp_path)
    config = training_config(tmp_path, impulse_responses=str(impulse_folder(tmp_path)), gain_max=-20.0, gain_min=-30.0)
    dataset = TrainingAudio(config, corpora, RATE, 1)
    drawn = []

    def crop(clip, start, length, rate, channels):
        drawn.append(("m" if "music" in clip.name else "o", length))
        return np.zeros((channels, length), np.float32)

    monkeypatch.setattr(mixing, "read_crop", crop)
    monkeypatch.setattr(mixing, "reverberate", lambda audio, impulse: audio)
    monkeypatch.setattr(reverberation, "_read_impulse", lambda path, rate: np.array([1.0, 0.5]))
    kinds, wet = [], {}
    for index in range(3000):
        drawn.clear()
        dataset[index]
        kinds.append("".join(kind for kind, _ in drawn))
        wet.setdefault(kinds[-1], []).append(drawn[0][1] > 800)
    count = {kind: kinds.count(kind) / 3000 for kind in sorted(set(kinds))}
    assert set(count) == {"m", "o", "mm", "mo", "om", "oo", "ooo"}
    assert count["m"] == pytest.approx(0.32, abs=0.03) and count["o"] == pytest.approx(0.32, abs=0.03)
    two = {kind: share for kind, share in count.items() if len(kind) == 2}
    assert sum(two.values()) == pytest.approx(0.24, abs=0.03) and count["ooo"] == pytest.approx(0.12, abs=0.02)
    music = corpora[1].weight / (corpora[0].weight + corpora[1].weight)
    assert (2 * two["mm"] + two["mo"] + two["om"]) / 2 / 0.24 == pytest.approx(music, abs=0.08)
    assert not any(wet["m"]) and np.mean(wet["o"]) == pytest.approx(0.2, abs=0.04)
    assert np.mean([item for kind in two for item in wet[kind]]) == pytest.approx(0.2, abs=0.05)


def test_strategies_without_corpora_are_left_out(tmp_path):
    speech, music = speech_and_music(tmp_path)

    def clips(corpora, **chances):
        return [(item.clips, len(item.corpora)) for item in TrainingAudio(
            training_config(tmp_path, **chances), corpora, RATE, 1).strategies]  # fmt: skip

    assert clips([speech, music]) == [(1, 1), (1, 1), (2, 2), (3, 1)]
    assert clips([speech]) == [(1, 1), (2, 1), (3, 1)]
    assert clips([music]) == [(1, 1), (2, 1)]
    none = {"chance_of_music": 0.0, "chance_of_two": 0.0}
    for corpora, chances in (
        ([], {}),
        ([music], none),
        ([music, speech], {**none, "chance_of_other": 0.0, "chance_of_three": 0.0}),
    ):
        with pytest.raises(ValueError, match="nothing to draw"):
            clips(corpora, **chances)
    music.weight = 0
    assert clips([speech, music]) == [(1, 1), (2, 1), (3, 1)]


@pytest.mark.parametrize(("normalize", "level"), [("peak", 1.0), ("rms", 0.1), ("none", 0.25)])
def test_levels_are_set_for_each_clip(normalize, level, tmp_path):
    constant(tmp_path / "a" / "1.wav", 0.25)
    corpus = open_corpus(CorpusConfig("a", str(tmp_path / "a")), 1)
    config = training_config(
        tmp_path, normalize=normalize, gain_min=-12.0, gain_max=-6.0, chance_of_two=0.0, chance_of_three=0.0
    )
    dataset = TrainingAudio(config, [corpus], RATE, 2)
    gains = []
    for index in range(200):
        audio = dataset[index]["audio"].numpy()
        assert audio.shape == (2, 800) and np.ptp(audio) < 1e-6
        gains.append(20 * np.log10(audio[0, 0] / level))
    assert -12 <= min(gains) < -11.7 and -6.3 < max(gains) <= -6 and np.mean(gains) == pytest.approx(-9, abs=0.4)


def test_mixtures_that_clip_are_drawn_anew_or_in_the_end_scaled(tmp_path):
    constant(tmp_path / "a" / "1.wav", 0.5)
    corpus = open_corpus(CorpusConfig("a", str(tmp_path / "a")), 1)
    dataset = TrainingAudio(training_config(tmp_path), [corpus], RATE, 1)
    peaks = [dataset[index]["audio"].abs().max().item() for index in range(200)]
    assert max(peaks) <= 1 and min(peaks) > 0.3 and max(peaks) != pytest.approx(0.99, abs=1e-5)
    loud = TrainingAudio(training_config(tmp_path, gain_min=3.0), [corpus], RATE, 1)
    assert loud[0]["audio"].abs().max().item() == pytest.approx(0.99, abs=1e-6)


def test_segments_lie_anywhere_and_short_clips_anywhere_in_silence(tmp_path):
    ramp = np.arange(1, 1001) / 1000
    (tmp_path / "long").mkdir()
    (tmp_path / "short").mkdir()
    soundfile.write(tmp_path / "long" / "a.wav", ramp, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "short" / "a.wav", ramp[:300], RATE, subtype="FLOAT")
    options = {"normalize": "none", "gain_min": 0.0, "gain_max": 0.0, "chance_of_two": 0.0, "chance_of_three": 0.0}
    starts = {}
    for name in ("long", "short"):
        corpus = open_corpus(CorpusConfig(name, str(tmp_path / name)), 1)
        dataset = TrainingAudio(training_config(tmp_path, **options), [corpus], RATE, 1)
        audio = [dataset[index]["audio"][0].numpy() for index in range(1500)]
        if name == "long":
            starts[name] = [round(item[0] * 1000) - 1 for item in audio]
        else:
            starts[name] = [int(np.flatnonzero(item)[0]) for item in audio]
            assert all(np.count_nonzero(item) == 300 for item in audio)
    assert (min(starts["long"]), max(starts["long"])) == (0, 200) and np.mean(starts["long"]) == pytest.approx(
        100, abs=6
    )
    assert (
        min(starts["short"]) < 5
        and max(starts["short"]) > 495
        and np.mean(starts["short"]) == pytest.approx(250, abs=15)
    )


def test_clips_that_vanish_are_listed_and_replaced(tmp_path):
    corpora = speech_and_music(tmp_path)
    dataset = TrainingAudio(training_config(tmp_path), corpora, RATE, 1)
    gone = tmp_path / "speech" / "2.wav"
    gone.unlink()
    loader = batch_loader(dataset, batch_size=8, workers=1)
    skipped = [item for batch in islice(loader, 6) for item in batch["skipped"]]
    assert skipped and set(skipped) == {(str(gone), "no such file")}
    for path in (tmp_path / "speech").iterdir():
        path.unlink()
    with pytest.raises(RuntimeError, match="100 clips of one example could not be read, the last: .*no such file"):
        TrainingAudio(training_config(tmp_path), corpora[:1], RATE, 1)[0]


# Batches


def test_batches_are_the_same_for_any_workers_start_and_ranks(tmp_path):
    config = training_config(tmp_path, impulse_responses=str(impulse_folder(tmp_path)), reverberation_chance=0.5)
    dataset = TrainingAudio(config, speech_and_music(tmp_path), RATE, 2)
    expected = batches(dataset, 6)
    assert expected[0].shape == (3, 2, 800) and expected[0].dtype == torch.float32
    assert not torch.equal(expected[0], expected[1])
    for workers in (1, 3):
        assert equal(batches(dataset, 6, workers=workers), expected)
    assert equal(batches(dataset, 2, start_batch=4, workers=2), expected[4:])
    ranks = [batches(dataset, 3, rank=rank, world_size=2) for rank in (0, 1)]
    assert equal([batch for pair in zip(*ranks) for batch in pair], expected)
    wide = [batch["audio"] for batch in islice(batch_loader(dataset, batch_size=6), 3)]
    assert equal(wide, [torch.cat(pair) for pair in zip(*ranks)])
    config.seed = 1
    assert not torch.equal(dataset[0]["audio"], expected[0][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"start_batch": -1}, "start_batch is -1"),
        ({"workers": -1}, "workers is -1"),
        ({"rank": 2, "world_size": 2}, "rank is 2, allowed: 0 to 1"),
    ],
)
def test_errors_of_the_loader(options, message):
    with pytest.raises(ValueError, match=message):
        batch_loader(None, **{"batch_size": 1} | options)


SCRIPT = """
import multiprocessing, os, signal, sys, time
from modeling_encodec.training.configuration import TrainingConfig
from modeling_encodec.processors.corpus.reading import CorpusConfig
from modeling_encodec.training.corpora import open_corpus
from modeling_encodec.training.mixing import TrainingAudio, batch_loader

stop = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stop.append(1))
corpus = open_corpus(CorpusConfig("a", sys.argv[1]), 1)
dataset = TrainingAudio(TrainingConfig(segment_seconds=0.1), [corpus], 8000, 1)
loader = iter(batch_loader(dataset, batch_size=2, workers=2))
next(loader)
print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
while not stop:
    time.sleep(0.05)
time.sleep(0.5)
for _ in range(20):
    next(loader)
print("saved", flush=True)
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc as on Linux")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_workers_outlive_signals_but_not_the_main_process(number, tmp_path):
    write(tmp_path / "a.wav")
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2 and all(map(alive, workers))
    if number == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=30)
    if number != signal.SIGKILL:
        assert (process.returncode, output, errors) == (0, "saved\n", "")
    end = time.monotonic() + 15
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(alive, workers))
