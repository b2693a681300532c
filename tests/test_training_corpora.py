"""The training corpora: crops of files, indices, folders, manifests, datasets and streams."""

import json
import os
import pickle
import sys

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from training_audio import RATE, batches, constant, equal, sound, training_config, write

from modeling_encodec.processors.audio import read_audio
from modeling_encodec.processors.corpus import clips as clips_module
from modeling_encodec.processors.corpus.clips import Clip, UnusableClip, index_files, measure_clip, read_crop
from modeling_encodec.processors.corpus.reading import CorpusConfig
from modeling_encodec.training.corpora import StreamedCorpus, open_corpora, open_corpus
from modeling_encodec.training.mixing import TrainingAudio


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
        cache.read_text().replace('"version": 2', '"version": 1'),
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


def test_clip_says_its_length():
    clip = Clip("a", "a.wav", 44100, 44100, 1, 1.0, 0.1)
    assert clip.seconds == 1 and clip.length(24000) == 24000 and "location" not in repr(clip)
