"""Corpora packed as Opus: within their bytes, with something of every source, and fit to train on."""

import json
import shutil

import numpy as np
import pytest
from training_audio import write

from modeling_encodec.processors.audio import read_audio
from modeling_encodec.processors.corpus.reading import CorpusConfig
from modeling_encodec.training.corpora import open_corpus
from modeling_encodec.training.packed_corpora import main, pack


pytestmark = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")


@pytest.fixture(name="sources")
def fixture_sources(tmp_path):
    """A folder of thirty clips of 2 s, and a manifest of one clip and of a segment of it."""
    for number in range(30):
        write(tmp_path / "many" / f"{number}.wav", 48000, 24000, seed=number)
    write(tmp_path / "few" / "1.flac", 96000, 48000, 2, seed=99)
    rows = [{"path": "few/1.flac"}, {"path": "few/1.flac", "offset": 0.5, "duration": 1.0}]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [tmp_path / "many", tmp_path / "few.jsonl"]


def test_within_their_bytes_and_fit_to_train_on(sources, tmp_path):
    packed = pack(sources, tmp_path / "packed", megabytes=0.3)
    files = sorted((tmp_path / "packed").rglob("*.opus"))
    assert sum(path.stat().st_size for path in files) == sum(size for _, size in packed.values()) <= 300_000
    assert packed["few"][0] == 2 and 8 < packed["many"][0] < 30
    for name, lasts in (("many", [2.0]), ("few", [1.0, 2.0])):
        corpus = open_corpus(CorpusConfig(name, str(tmp_path / "packed" / f"{name}.jsonl"), "manifest"), 1)
        assert len(corpus.clips) == packed[name][0] and not corpus.skipped
        assert sorted({round(clip.seconds, 1) for clip in corpus.clips}) == lasts
    audio, rate = read_audio(tmp_path / "packed" / "few" / "00000.opus", 24000)
    assert audio.shape[0] == 2 and rate == 24000 and 0.01 < np.sqrt(np.square(audio).mean()) < 0.2


def test_the_same_clips_again(sources, tmp_path):
    for name in ("one", "two"):
        pack(sources, tmp_path / name, megabytes=0.2)
    lines = [[(tmp_path / name / f"{source.stem}.jsonl").read_text() for source in sources] for name in ("one", "two")]
    assert lines[0] == lines[1] and "source" in lines[0][0]


def test_long_clips_are_cut(tmp_path):
    write(tmp_path / "long" / "1.wav", 24000 * 9, 24000)
    pack([tmp_path / "long"], tmp_path / "packed", megabytes=1, seconds=2.0)
    audio, rate = read_audio(tmp_path / "packed" / "long" / "00000.opus")
    assert audio.shape[1] / rate == pytest.approx(2.0, abs=0.02)


def test_errors_are_one_line(sources, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([*sources, tmp_path], "exists, allowed: a new folder"),
        ([tmp_path / "gone", tmp_path / "packed"], "gone: no such folder or manifest"),
        ([tmp_path / "empty", tmp_path / "packed"], "empty: not one clip in 0 bytes"),
        ([sources[0], sources[0], tmp_path / "packed"], "sources are called many, many, allowed: a name of its own"),
        ([*sources, tmp_path / "packed", "--megabytes", "0"], "megabytes is 0.0, allowed: a finite number above 0"),
        ([*sources, tmp_path / "packed", "--megabytes", "0.001"], "not one clip in"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "packed").exists()


def test_what_is_no_audio_is_left_out(sources, tmp_path):
    (tmp_path / "many" / "broken.wav").write_bytes(b"RIFF" + bytes(100))
    (tmp_path / "many" / "silence.wav").write_bytes((tmp_path / "many" / "1.wav").read_bytes()[:60])
    assert pack(sources[:1], tmp_path / "packed", megabytes=9)["many"][0] == 30
