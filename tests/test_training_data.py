"""The training data: crops, indices, corpora, mixtures and batches."""

import json
import os
import pickle
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

from modeling_encodec.processors.audio import read_audio
from modeling_encodec.training import clips as clips_module
from modeling_encodec.training import mixing, reverberation
from modeling_encodec.training.clips import Clip, UnusableClip, index_files, measure_clip, read_crop
from modeling_encodec.training.configuration import CorpusConfig, TrainingConfig
from modeling_encodec.training.corpora import Corpus, StreamedCorpus, open_corpora, open_corpus
from modeling_encodec.training.mixing import TrainingAudio, batch_loader
from modeling_encodec.training.reverberation import ImpulseResponses, reach, reverberate, reverberation_time


RATE = 8000


def sound(samples: int, channels: int = 1, seed: int = 0, level: float = 0.1) -> np.ndarray:
    """Noise (samples, channels)."""
    return np.random.default_rng(seed).standard_normal((samples, channels)).clip(-4, 4) * level


def write(path, samples=RATE, rate=RATE, channels=1, seed=0, level=0.1, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound(samples, channels, seed, level), rate, **options)
    return path


def constant(path, value: float, samples=2 * RATE, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(samples, value), rate, subtype="FLOAT")
    return path


def training_config(folder, **options) -> TrainingConfig:
    return TrainingConfig(**{"segment_seconds": 0.1, "workers": 0, "output": str(folder / "out")} | options)


def speech_and_music(folder) -> list[Corpus]:
    for number in range(4):
        write(folder / "speech" / f"{number}.wav", RATE + 1000 * number, seed=number)
        write(folder / "music" / f"{number}.flac", 2 * RATE, 16000, 2, seed=10 + number)
    return [
        open_corpus(CorpusConfig("voices", str(folder / "speech"), domain="speech"), 1),
        open_corpus(CorpusConfig("songs", str(folder / "music"), domain="music"), 1),
    ]


def batches(dataset, count=4, **options) -> list[torch.Tensor]:
    return [batch["audio"] for batch in islice(batch_loader(dataset, batch_size=3, **options), count)]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others))


# Crops


@pytest.fixture(scope="module")
def crop_files(tmp_path_factory):
    """Clips of several rates, channels and formats, by name."""
    folder, found = tmp_path_factory.mktemp("crops"), {}
    for name, rate, channels in (
        ("same.wav", 24000, 1), ("half.flac", 48000, 2), ("odd.wav", 44100, 1), ("up.wav", 16000, 2),
        ("prime.wav", 11027, 1), ("lossy.mp3", 44100, 1), ("lossy.ogg", 44100, 2),
    ):  # fmt: skip
        found[name] = measure_clip(name, str(write(folder / name, int(1.7 * rate) + 13, rate, channels)))
    return found


@given(data=st.data(), start=st.integers(-9000, 48000), length=st.integers(1, 30000), channels=st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None)
def test_crop_is_the_same_stretch_of_the_whole_file(crop_files, data, start, length, channels):
    clip = crop_files[data.draw(st.sampled_from(sorted(crop_files)))]
    whole, _ = read_audio(clip.location, 24000, channels)
    crop = read_crop(clip, start, length, 24000, channels)
    expected = np.zeros((channels, length), np.float32)
    low, high = max(0, start), min(whole.shape[1], start + length)
    if low < high:
        expected[:, low - start : high - start] = whole[:, low:high]
    assert crop.dtype == np.float32 and crop.shape == (channels, length)
    np.testing.assert_allclose(crop, expected, atol=3e-6)


def test_crop_decodes_only_its_part(tmp_path, monkeypatch):
    clip = measure_clip("a", str(write(tmp_path / "a.flac", 60 * 16000, 16000)))
    frames, read = [], soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, n=-1, *a, **k: frames.append(n) or read(self, n, *a, **k)
    )
    read_crop(clip, 30 * 24000, 24000, 24000, 1)
    assert len(frames) == 1 and 16000 <= frames[0] <= 16000 + 600


def test_crop_of_bytes_and_of_a_function(tmp_path):
    path = write(tmp_path / "a.wav", channels=2)
    expected = read_crop(measure_clip("a", str(path)), 100, 500, RATE, 1)
    for location in (path.read_bytes(), lambda: str(path), path.read_bytes):
        assert np.array_equal(read_crop(measure_clip("a", location), 100, 500, RATE, 1), expected)


def test_clip_that_changed_is_refused(tmp_path):
    path = write(tmp_path / "a.wav")
    clip = measure_clip("name", str(path))
    write(path, RATE // 2)
    with pytest.raises(UnusableClip, match="name: shorter"):
        read_crop(clip, 0, RATE, RATE, 1)
    write(path, RATE, 16000)
    with pytest.raises(UnusableClip, match="not the audio"):
        read_crop(clip, 0, RATE, RATE, 1)
    path.unlink()
    with pytest.raises(UnusableClip, match="no such file") as caught:
        read_crop(clip, 0, RATE, RATE, 1)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


# Index


def bad_files(folder) -> dict[str, str]:
    """Files that give no audio: path and what the reason says."""
    flac = write(folder / "whole.flac", 5 * RATE).read_bytes()
    (folder / "whole.flac").unlink()
    (folder / "truncated.flac").write_bytes(flac[: len(flac) // 2])
    mp3 = write(folder / "whole.mp3", 50 * RATE).read_bytes()
    (folder / "whole.mp3").unlink()
    (folder / "truncated.mp3").write_bytes(mp3[: len(mp3) // 2])
    (folder / "corrupt.wav").write_bytes(b"no audio at all")
    (folder / "nothing.wav").write_bytes(b"")
    soundfile.write(folder / "empty.wav", np.zeros((0, 1)), RATE)
    soundfile.write(folder / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(folder / "nan.wav", np.array([0.1, np.nan]), RATE, subtype="FLOAT")
    reasons = {"truncated.flac": "sync", "truncated.mp3": "cut off", "corrupt.wav": "not readable",
               "nothing.wav": "not readable", "empty.wav": "no audio", "silent.wav": "silent",
               "nan.wav": "NaN", "missing.wav": "No such file"}  # fmt: skip
    return {str(folder / name): reason for name, reason in reasons.items()}


def test_index_measures_and_lists_what_is_bad(tmp_path):
    stereo = write(tmp_path / "b.wav", 100_000, 44100, 2, subtype="FLOAT")
    mono = write(tmp_path / "a.wav")
    bad = bad_files(tmp_path)
    clips, skipped = index_files([*bad, stereo, mono, mono], tmp_path / "cache", 3)
    assert [clip.name for clip in clips] == [str(mono), str(stereo)]
    audio = sound(100_000, 2).astype(np.float32)
    assert (clips[1].samples, clips[1].sampling_rate, clips[1].channels) == (100_000, 44100, 2)
    assert clips[1].peak == np.abs(audio).max()
    assert clips[1].rms == pytest.approx(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))
    assert [path for path, _ in skipped] == sorted(bad)
    for path, reason in skipped:
        assert bad[path] in reason


def test_index_reads_again_only_what_changed(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{number}.wav", seed=number) for number in range(5)]
    read, measure = [], measure_clip
    monkeypatch.setattr(clips_module, "measure_clip", lambda name, place: read.append(name) or measure(name, place))

    def index():
        read.clear()
        return index_files(paths, tmp_path / "cache", 2)[0]

    first = index()
    assert len(read) == 5
    assert index() == first and not read
    write(paths[1], level=0.2)
    os.utime(paths[1], ns=(1, 1))
    second = index()
    assert read == [str(paths[1])] and second[1] != first[1] and second[2:] == first[2:]
    cache = tmp_path / "cache" / "files.jsonl"
    for damage in (
        cache.read_text()[:-9],
        "",
        "\0",
        "[]\n[1]",
        cache.read_text().replace('"version": 1', '"version": 0'),
    ):
        cache.write_text(damage)
        assert index() == second and len(read) == 5
    assert index() == second and not read
    paths.pop()
    assert index() == second[:-1] and not read


# Corpora


def test_folder_is_recursive_sorted_and_only_audio(tmp_path):
    for name in ("b/deep/2.FLAC", "b/1.wav", "a.ogg"):
        write(tmp_path / name)
    (tmp_path / "readme.txt").write_text("x")
    corpus = open_corpus(CorpusConfig("c", str(tmp_path)), 1)
    assert [clip.name for clip in corpus.clips] == [
        str(tmp_path / name) for name in ("a.ogg", "b/1.wav", "b/deep/2.FLAC")
    ]
    assert corpus.weight == pytest.approx(3 / 3600) and (corpus.name, corpus.domain) == ("c", "speech")
    assert open_corpus(CorpusConfig("c", str(tmp_path), weight=7.0), 1).weight == 7


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
def test_manifests(suffix, tmp_path):
    inside, outside = write(tmp_path / "lists" / "ä" / "1.wav"), write(tmp_path / "2.wav")
    rows = [{"path": "ä/1.wav", "speaker": "x"}, {"path": str(outside), "speaker": "y"}]
    text = {
        "jsonl": "\n".join(map(json.dumps, rows)) + "\n\n",
        "csv": "speaker,path\n" + "".join(f"{row['speaker']},{row['path']}\n" for row in rows),
        "txt": "\n".join(row["path"] for row in rows),
    }[suffix]
    manifest = tmp_path / "lists" / f"m.{suffix}"
    manifest.write_text(text, encoding="utf-8")
    corpus = open_corpus(CorpusConfig("c", str(manifest), kind="manifest"), 1)
    assert {clip.name for clip in corpus.clips} == {str(inside), str(outside)}
    if suffix != "txt":
        manifest.write_text(text.replace("path", "file"), encoding="utf-8")
        with pytest.raises(ValueError, match="allowed: a path in every row"):
            open_corpus(CorpusConfig("c", str(manifest), kind="manifest"), 1)


def test_three_channels_go_to_mono_but_not_to_stereo(tmp_path):
    write(tmp_path / "1.wav")
    three = write(tmp_path / "3.wav", channels=3)
    assert len(open_corpus(CorpusConfig("c", str(tmp_path)), 1).clips) == 2
    corpus = open_corpus(CorpusConfig("c", str(tmp_path)), 2)
    assert len(corpus.clips) == 1 and corpus.skipped == [(str(three), "3 channels do not go to 2")]


def test_clips_are_drawn_as_often_as_they_are_long(tmp_path):
    for seconds in (1, 2, 5):
        write(tmp_path / f"{seconds}.wav", seconds * RATE)
    corpus = open_corpus(CorpusConfig("c", str(tmp_path)), 1)
    rng = np.random.default_rng(0)
    drawn = [corpus.draw(rng, 0).samples // RATE for _ in range(4000)]
    for seconds in (1, 2, 5):
        assert drawn.count(seconds) / 4000 == pytest.approx(seconds / 8, abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "empty"}, r"corpus 'c': no usable audio in .*empty' \(1 skipped, the first: .*bad.wav: not read"),
        ({"source": "absent"}, "allowed: an existing folder"),
        ({"source": "absent.txt", "kind": "manifest"}, "allowed: an existing .jsonl, .csv or .txt"),
        ({"source": "empty", "weight": -1.0}, "weight is -1.0, allowed"),
        ({"source": "empty", "weight": float("nan")}, "weight is nan, allowed"),
    ],
)
def test_errors_of_corpora(options, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "bad.wav").write_bytes(b"x")
    with pytest.raises(ValueError, match=message):
        open_corpus(CorpusConfig("c", **options | {"source": str(tmp_path / options["source"])}), 1)


# Datasets


def rows(folder, count: int, first: int = 0) -> list[dict]:
    """Encoded constants: row k holds (k + 1) / 100."""
    paths = [constant(folder / f"{k}.wav", (k + 1) / 100, RATE) for k in range(first, first + count)]
    return [{"bytes": path.read_bytes(), "path": path.name} for path in paths]


def test_stored_dataset_in_all_its_forms(tmp_path):
    datasets = pytest.importorskip("datasets")
    structs = rows(tmp_path / "files", 3)
    paths = [str(tmp_path / "files" / row["path"]) for row in structs]
    columns = {
        "struct": structs,
        "path only": [{"bytes": None, "path": path} for path in paths],
        "string": paths,
        "binary": [row["bytes"] for row in structs],
    }
    for audio in columns.values():
        given = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "audio": audio})
        corpus = open_corpus(CorpusConfig("d", "", kind="dataset"), 1, dataset=given, workers=2)
        assert [clip.peak for clip in corpus.clips] == pytest.approx([0.01, 0.02, 0.03])
        assert read_crop(pickle.loads(pickle.dumps(corpus.clips[1])), 10, 50, RATE, 1) == pytest.approx(0.02)
    given = datasets.Dataset.from_dict({"audio": structs}).cast_column("audio", datasets.Audio(decode=True))
    assert len(open_corpus(CorpusConfig("d", "", kind="dataset"), 1, dataset=given).clips) == 3


def test_saved_dataset_and_its_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    structs = rows(tmp_path / "files", 3) + [{"bytes": b"bad", "path": "bad.wav"}]
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"sound": structs})}).save_to_disk(tmp_path / "saved")
    config = CorpusConfig("d", str(tmp_path / "saved"), kind="dataset", column="sound")
    corpus = open_corpus(config, 1, cache_folder=tmp_path / "cache")
    assert len(corpus.clips) == 3 and corpus.skipped[0][0] == "d, row 3"
    read, measure = [], measure_clip
    monkeypatch.setattr(clips_module, "measure_clip", lambda name, place: read.append(name) or measure(name, place))
    again = open_corpus(config, 1, cache_folder=tmp_path / "cache")
    assert read == ["d, row 3"] and [clip.peak for clip in again.clips] == [clip.peak for clip in corpus.clips]
    for change, message in (({"split": "test"}, "allowed: train"), ({"column": "audio"}, "allowed: sound")):
        with pytest.raises(ValueError, match=message):
            open_corpus(CorpusConfig(**vars(config) | change), 1)
    streamed = open_corpus(CorpusConfig(**vars(config) | {"streaming": True, "weight": 1.0}), 1)
    assert isinstance(streamed, StreamedCorpus)


def test_dataset_files_load_by_name(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict({"audio": rows(tmp_path, 3)}).to_parquet(tmp_path / "hub" / "train.parquet")
    config = CorpusConfig("d", str(tmp_path / "hub"), kind="dataset", streaming=True, weight=1.0)
    corpus = open_corpus(config, 1)
    assert corpus.draw(np.random.default_rng(0), 0).peak in np.float32([0.01, 0.02, 0.03])
    assert len(open_corpus(CorpusConfig(**vars(config) | {"streaming": False}), 1).clips) == 3


def test_missing_datasets_package_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'^datasets need: pip install "modeling-encodec\[train\]"$'):
        open_corpus(CorpusConfig("d", str(tmp_path), kind="dataset"), 1)


def stream(folder, count: int, **options) -> StreamedCorpus:
    datasets = pytest.importorskip("datasets")
    given = datasets.Dataset.from_dict({"audio": rows(folder, count)}).to_iterable_dataset(num_shards=2)
    corpus = open_corpus(CorpusConfig("s", "", kind="dataset", streaming=True, weight=1.0), 1, dataset=given)
    corpus.block_clips, corpus.samples_per_block = options.get("block_clips", 4), options.get("samples_per_block", 6)
    return corpus


@pytest.fixture(scope="module")
def stream_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stream")


def drawn_rows(corpus, indices) -> list[int]:
    return [round(corpus.draw(np.random.default_rng(index), index).peak * 100) - 1 for index in indices]


def test_stream_goes_through_its_blocks_and_begins_again(tmp_path):
    drawn = drawn_rows(stream(tmp_path, 10), range(60))
    for index, row in enumerate(drawn):
        first = index // 6 * 4
        assert row in {number % 10 for number in range(first, first + 4)}
    assert len(set(drawn)) == 10


@given(indices=st.lists(st.integers(0, 300), min_size=1, max_size=8))
@settings(max_examples=10, deadline=None)
def test_stream_gives_the_same_from_anywhere(stream_folder, indices):
    expected = drawn_rows(stream(stream_folder, 10), range(301))
    assert drawn_rows(stream(stream_folder, 10), indices) == [expected[index] for index in indices]


def test_stream_is_the_same_for_any_workers_and_start(tmp_path):
    def dataset():
        return TrainingAudio(training_config(tmp_path), [stream(tmp_path, 10)], RATE, 1)

    used = dataset()
    expected = batches(used, 8)
    assert equal(batches(used, 8, workers=2), expected)  # whose stream is open already when the workers start
    assert equal(batches(dataset(), 8, workers=3), expected)
    assert equal(batches(pickle.loads(pickle.dumps(used)), 3, start_batch=5), expected[5:])


def test_bad_rows_of_a_stream_are_listed_and_a_bad_stream_ends(tmp_path):
    datasets = pytest.importorskip("datasets")
    config = CorpusConfig("s", "", kind="dataset", streaming=True, weight=1.0)

    def audio(structs):
        given = datasets.Dataset.from_dict({"audio": structs}).to_iterable_dataset()
        return TrainingAudio(training_config(tmp_path), [open_corpus(config, 1, dataset=given)], RATE, 1)

    mixed = audio([*rows(tmp_path, 1), {"bytes": b"bad", "path": "bad.wav"}])
    skipped = dict(item for index in range(20) for item in mixed[index]["skipped"])
    assert list(skipped) == ["s, row 1 (bad.wav)"] and "not readable" in skipped["s, row 1 (bad.wav)"]
    with pytest.raises(RuntimeError, match=r"100 clips .* the last: s, row \d \(bad"):
        audio([{"bytes": b"bad", "path": "bad.wav"}] * 3)[0]
    with pytest.raises(ValueError, match="holds no rows"):
        given = datasets.Dataset.from_dict({"audio": rows(tmp_path, 1)}).to_iterable_dataset().take(0)
        drawn_rows(open_corpus(config, 1, dataset=given), [5000])
    with pytest.raises(ValueError, match="'s' is streamed and needs a weight"):
        StreamedCorpus(CorpusConfig("s", ""), None)
    with pytest.raises(ValueError, match="dataset is a list, allowed: Dataset, IterableDataset"):
        open_corpus(config, 1, dataset=[])


def test_datasets_are_given_by_corpus_name(tmp_path):
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "a" / "1.wav")
    given = datasets.Dataset.from_dict({"audio": rows(tmp_path, 2)})
    config = training_config(
        tmp_path, corpora=[{"name": "a", "source": str(tmp_path / "a")}, {"name": "b", "source": ""}]
    )
    corpora = open_corpora(config, 1, datasets={"b": given})
    assert [len(corpus.clips) for corpus in corpora] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "out" / "index").rglob("*.jsonl")) == [
        "dataset.jsonl",
        "files.jsonl",
    ]
    with pytest.raises(ValueError, match="corpus 'c', allowed: a, b"):
        open_corpora(config, 1, datasets={"c": given})


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
import os, signal, sys, time
from modeling_encodec.training.configuration import CorpusConfig, TrainingConfig
from modeling_encodec.training.corpora import open_corpus
from modeling_encodec.training.mixing import TrainingAudio, batch_loader

stop = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stop.append(1))
corpus = open_corpus(CorpusConfig("a", sys.argv[1]), 1)
dataset = TrainingAudio(TrainingConfig(segment_seconds=0.1), [corpus], 8000, 1)
loader = iter(batch_loader(dataset, batch_size=2, workers=2))
next(loader)
print(*[worker.pid for worker in loader._workers], flush=True)
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


def test_clip_says_its_length():
    clip = Clip("a", "a.wav", 44100, 44100, 1, 1.0, 0.1)
    assert clip.seconds == 1 and clip.length(24000) == 24000 and "location" not in repr(clip)
