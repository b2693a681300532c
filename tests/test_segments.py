"""Segments of recordings, named in manifests and tables by `offset` and `duration`: cut to the sample, or refused."""

import io
import json

import numpy as np
import pytest
import soundfile

from modeling_encodec import EncodecConfig, EncodecModel, read_audio, write_audio
from modeling_encodec.evaluation.clips import list_clips
from modeling_encodec.processors.audio import resample
from modeling_encodec.processors.audio_files import AudioFile, segment_span
from modeling_encodec.processors.audio_tokens import PortableCodec, read_clip
from modeling_encodec.processors.corpus.clips import UnusableClip, read_crop
from modeling_encodec.processors.corpus.reading import CorpusConfig, manifest_rows
from modeling_encodec.processors.corpus.segments import Segment, row_segment
from modeling_encodec.processors.corpus.sources import open_source
from modeling_encodec.processors.corpus.tokenization import Tokenization, tokenize_corpus
from modeling_encodec.processors.dataset_tokenization import CodecTokenizer
from modeling_encodec.training.corpora import open_corpus
from modeling_encodec.training.validation import read_clips


CONFIG = EncodecConfig(num_filters=2, hidden_size=16)
RATE = 16000
ROWS = [{"offset": 1.0, "duration": 0.5}, {"offset": 2.25, "duration": 0.125}, {"offset": 0, "duration": 1}]


@pytest.fixture
def audio(tmp_path) -> np.ndarray:
    """Noise of 3 s, the file long.wav in `tmp_path`."""
    noise = 0.1 * np.random.default_rng(0).standard_normal((1, 3 * RATE))
    write_audio(tmp_path / "long.wav", noise, RATE)
    return read_audio(tmp_path / "long.wav")[0]


def write_manifest(path, rows, key="path", source="long.wav"):
    rows = [{key: source, **row} for row in rows]
    if path.suffix == ".csv":
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines = [",".join(str(row.get(name, "")) for name in names) for row in rows]
        path.write_text("\n".join([",".join(names), *lines]) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cut(audio: np.ndarray, row: dict) -> np.ndarray:
    first = round(row["offset"] * RATE)
    return audio[:, first : first + round(row["duration"] * RATE)]


def as_model(audio: np.ndarray) -> np.ndarray:
    return resample(audio, RATE, CONFIG.sampling_rate)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("key", ["path", "audio_filepath"])
def test_all_readers_cut_a_manifests_segments_alike(tmp_path, audio, suffix, key):
    manifest = write_manifest(tmp_path / f"m.{suffix}", ROWS, key)
    wanted = [cut(audio, row) for row in ROWS]
    source = open_source(manifest, keep=["offset", "duration"])
    rows = [row for shard in source.shards for row in shard.rows()]
    assert [row.name for row in rows] == ["long.wav 1-1.5 s", "long.wav 2.25-2.375 s", "long.wav 0-1 s"]
    assert [row.kept for row in rows] == ROWS
    for row, part in zip(rows, wanted):
        assert np.array_equal(read_clip(row.location, CONFIG), as_model(part))
    corpus = open_corpus(CorpusConfig("a", str(manifest), "manifest"), 1)
    assert [clip.samples for clip in corpus.clips] == [RATE, RATE // 2, RATE // 8]  # by their places
    for clip, part in zip(corpus.clips, [wanted[2], wanted[0], wanted[1]]):
        crop = read_crop(clip, 100, 500, RATE, 1)
        assert np.array_equal(crop, part[:, 100:600])
        past = read_crop(clip, clip.samples - 10, 20, RATE, 1)  # what follows in the file is not in the segment
        assert np.array_equal(past[:, :10], part[:, -10:]) and not past[:, 10:].any()
    clips = list_clips(manifest)
    assert [clip.seconds for clip in clips] == [1.0, 0.5, 0.125]
    for clip, part in zip(clips, [wanted[2], wanted[0], wanted[1]]):
        assert np.array_equal(clip.read(CONFIG.sampling_rate, 1), as_model(part))
    model = EncodecModel(CONFIG).eval()
    held = read_clips(manifest, model, 3, 10.0)
    assert [clip.shape[-1] for clip in held.values()] == [24000, 12000, 3000]


def test_a_segment_does_not_decode_what_is_before_it(tmp_path, audio, monkeypatch):
    read, counts = soundfile.SoundFile.read, []
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, n=-1, *a, **k: counts.append(n) or read(self, n, *a, **k)
    )
    read_audio(tmp_path / "long.wav", offset=2.0, duration=0.25)
    assert sum(counts) == RATE // 4


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3", "joined"])
def test_segments_of_every_kind_of_file_are_cut_to_the_sample(tmp_path, audio, kind):
    path = tmp_path / "x"
    file = io.BytesIO()
    soundfile.write(file, audio[0], RATE, format="FLAC" if kind == "joined" else kind)
    path.write_bytes(file.getvalue() * (2 if kind == "joined" else 1))
    whole, _ = read_audio(path)
    for offset, duration in ((0.0, 0.3), (1.00003, 0.2), (2.9, 0.1)):
        part, _ = read_audio(path, offset=offset, duration=duration)
        first = round(offset * RATE)
        expected = whole[:, first : first + round(duration * RATE)]
        assert part.shape == expected.shape
        np.testing.assert_allclose(part, expected, rtol=0, atol=2e-7 if kind == "MP3" else 0)
    assert np.array_equal(read_audio(path, offset=1.0)[0][:, -100:], whole[:, -100:])


def test_where_a_segment_may_end():
    assert segment_span(None, 3.0, RATE, 48000) == (0, 48000)
    assert segment_span(None, 2.995, RATE, 48000) == segment_span(None, 3.005, RATE, 48000) == (0, 48000)  # rounded
    assert segment_span(None, 2.5, RATE, 48000) == (0, 40000)
    assert segment_span(0.0, 2.995, RATE, 48000) == (0, 47920)  # with an offset to the sample
    assert segment_span(1.0, 2.009, RATE, 48000) == (16000, 32000)
    assert segment_span(1.0, None, RATE, 48000) == (16000, 32000)
    assert segment_span(5.0, 3.0, RATE, 48000, embedded=True) == (0, 48000)  # cut already
    for offset, duration in ((1.0, 2.02), (3.0, 1.0), (4.0, None), (None, 3.02)):
        with pytest.raises(ValueError, match=r"segment is .*, file holds 3 s"):
            segment_span(offset, duration, RATE, 48000)


def test_segments_past_the_end_are_listed_with_the_numbers(tmp_path, audio):
    manifest = write_manifest(tmp_path / "m.jsonl", [*ROWS, {"offset": 2.5, "duration": 2.0}])
    codec = PortableCodec(EncodecModel(CONFIG).eval())
    report = tokenize_corpus(Tokenization(open_source(manifest), tmp_path / "t", codec, 2), workers=0, progress=False)
    assert report.manifest["totals"]["rows"] == 3
    skipped = json.loads((tmp_path / "t" / "skipped.jsonl").read_text())
    assert skipped["name"] == "long.wav 2.5-4.5 s" and skipped["reason"] == "segment is 2.5 s to 4.5 s, file holds 3 s"
    corpus = open_corpus(CorpusConfig("a", str(manifest), "manifest"), 1)
    assert [(name.endswith("long.wav 2.5-4.5 s"), reason) for name, reason in corpus.skipped] == [
        (True, skipped["reason"])
    ]
    with pytest.raises(ValueError, match="segment is 2.5 s to 4.5 s, file holds 3 s"):
        next(clip for clip in list_clips(manifest) if "2.5-" in clip.name).read(24000, 1)


def test_a_manifests_durations_alone_are_of_whole_files_or_their_beginnings(tmp_path, audio):
    manifest = write_manifest(
        tmp_path / "m.jsonl", [{"duration": 2.996}, {"duration": 3}, {"duration": 2}], "audio_filepath"
    )
    rows = [row for shard in open_source(manifest).shards for row in shard.rows()]
    assert [row.name for row in rows] == ["long.wav", "long.wav (2)", "long.wav (3)"]
    assert [read_clip(row.location, CONFIG).shape[1] for row in rows] == [72000, 72000, 48000]
    assert sorted(clip.seconds for clip in list_clips(manifest)) == [2.0, 3.0, 3.0]


@pytest.mark.parametrize(
    "row",
    [
        {"start": 1}, {"end": 2.0}, {"start_time": "1.5"}, {"endTime": 3}, {"begin": "00:01.5"}, {"channel": 1},
        {"channel": [0]}, {"segments": [[0, 1]]}, {"Offset": 3} , {"offset_ms": 30}, {"tmin": 0.5}, {"start-sec": 2},
        {"frame_offset": 100}, {"offset": -1}, {"duration": 0}, {"offset": "soon"}, {"duration": [1]},
        {"offset": True}, {"duration": float("inf")}, {"offset": float("nan")},
    ],
)  # fmt: skip
def test_keys_that_would_change_the_meaning_are_refused_by_all(tmp_path, audio, row):
    manifest = write_manifest(tmp_path / "m.jsonl", [{}, row])
    key = next(iter(row))
    for reader in (
        manifest_rows,
        open_source,
        list_clips,
        lambda path: open_corpus(CorpusConfig("a", str(path), "manifest"), 1),
    ):
        if reader is open_source and key in ("offset", "duration"):  # a row that cannot be is skipped
            bad = [row for shard in open_source(manifest).shards for row in shard.rows()][1]
            with pytest.raises(UnusableClip, match=rf"m.jsonl row 2: {key} is .*allowed: .*seconds"):
                bad.location()
            continue
        with pytest.raises(ValueError, match=rf"row 2: {key} is .*allowed: .*seconds"):
            reader(manifest)


def test_other_keys_stay_what_they_are(tmp_path, audio):
    row = {
        "channel": "News at ten",
        "start": "",
        "end": None,
        "segment": "a12",
        "text": "start",
        "channels": 1,
        "speaker_start": 3,
    }
    assert row_segment(row) == (None, None)
    assert len(manifest_rows(write_manifest(tmp_path / "m.jsonl", [row]))) == 1
    manifest = write_manifest(tmp_path / "two.jsonl", [{"audio_filepath": "other.wav"}])
    with pytest.raises(ValueError, match="path and audio_filepath are 'long.wav' and 'other.wav', allowed: one"):
        manifest_rows(manifest)


def test_tables_name_segments_as_manifests_do(tmp_path, audio):
    datasets = pytest.importorskip("datasets")
    path = str(tmp_path / "long.wav")
    table = {"audio": [path] * 3, "offset": [1.0, 2.25, 0.0], "duration": [0.5, 0.125, 1.0]}
    dataset = datasets.Dataset.from_dict(table)
    dataset.to_parquet(tmp_path / "p" / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    wanted = [as_model(cut(audio, row)) for row in ROWS]
    for source in (tmp_path / "p" / "rows.parquet", tmp_path / "saved", dataset, dataset.to_iterable_dataset()):
        rows = [row for shard in open_source(source, keep=["duration"]).shards for row in shard.rows()]
        assert all(
            np.array_equal(read_clip(row.location, CONFIG), part) for row, part in zip(rows, wanted, strict=True)
        )
        assert [row.kept for row in rows] == [{"duration": row["duration"]} for row in ROWS]
    tokenizer = CodecTokenizer(EncodecModel(CONFIG).eval(), num_quantizers=2)
    assert tokenizer(table)["audio_length"] == [12000, 3000, 24000]
    assert tokenizer.map(dataset)["audio_length"][:] == [12000, 3000, 24000]
    corpus = open_corpus(CorpusConfig("a", "a", "dataset"), 1, dataset=dataset)
    assert [clip.seconds for clip in corpus.clips] == [0.5, 0.125, 1.0]
    stream = open_corpus(CorpusConfig("a", "a", "dataset", weight=1.0), 1, dataset=dataset.to_iterable_dataset())
    assert stream.draw(np.random.default_rng(0), 0).seconds in (0.5, 0.125, 1.0)
    [clip, *_] = list_clips(tmp_path / "saved")
    assert clip.seconds == 0.5 and np.array_equal(clip.read(24000, 1), wanted[0])
    refused = tokenizer({"audio": [path], "start": [1.5]})["error"][0]
    assert "start is 1.5, allowed: offset and duration" in refused


def test_audio_in_a_row_itself_may_be_cut_already(tmp_path, audio):
    data = (tmp_path / "long.wav").read_bytes()
    tokenizer = CodecTokenizer(EncodecModel(CONFIG).eval(), num_quantizers=2)
    array = {"array": audio, "sampling_rate": RATE}
    for value in (data, {"bytes": data, "path": None}, array):
        batch = {"audio": [value] * 4, "offset": [500.0, 1.0, None, 9.0], "duration": [3.0, 0.5, 77.0, 1.0]}
        made = tokenizer(batch | {"start": [3, 4, 5, 6]})
        assert made["audio_length"][:3] == [72000, 12000, 72000] and "file holds 3 s" in made["error"][3]


def test_tokens_of_segments_are_the_same_bytes_in_any_cut_and_when_gone_on_with(tmp_path, audio):
    manifest = write_manifest(tmp_path / "m.jsonl", [{"offset": n / 8, "duration": 0.25} for n in range(20)])
    codec = PortableCodec(EncodecModel(CONFIG).eval())
    run = Tokenization(open_source(manifest, shard_rows=5), tmp_path / "t", codec, 2)
    assert len(run.source.shards) == 4  # a long file does not fill a shard with every segment of it
    tokenize_corpus(run, workers=0, progress=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "t" / "data").iterdir()}
    (tmp_path / "t" / "data" / sorted(before)[1]).unlink()
    tokenize_corpus(
        Tokenization(open_source(manifest, shard_rows=5), tmp_path / "t", codec, 2), workers=0, progress=False
    )
    assert {path.name: path.read_bytes() for path in (tmp_path / "t" / "data").iterdir()} == before
    write_manifest(manifest, [{"offset": n / 8, "duration": 0.25 + (n == 3) / 100} for n in range(20)])
    with pytest.raises(FileExistsError):
        tokenize_corpus(
            Tokenization(open_source(manifest, shard_rows=5), tmp_path / "t", codec, 2), workers=0, progress=False
        )


def test_a_segment_of_a_file_without_a_count(tmp_path, audio):
    file = io.BytesIO()
    soundfile.write(file, audio[0], RATE, format="FLAC")
    data = bytearray(file.getvalue())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    assert AudioFile(bytes(data)).known_frames is None
    part = read_clip(Segment(bytes(data), 1.0, 0.5), CONFIG)
    assert np.array_equal(part, as_model(audio[:, 16000:24000]))
