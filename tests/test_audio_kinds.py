"""Which files of a folder are audio to every command, and what is said of the others."""

import json
import shutil
import subprocess

import numpy as np
import pytest
import soundfile

from modeling_encodec import EncodecConfig, EncodecModel, read_audio
from modeling_encodec.cli import main
from modeling_encodec.evaluation.clips import list_clips
from modeling_encodec.processors import audio_ffmpeg
from modeling_encodec.processors.audio_files import AudioFile
from modeling_encodec.processors.audio_kinds import SNDFILE_SUFFIXES, OtherFiles, list_audio
from modeling_encodec.processors.audio_tokens import read_clip
from modeling_encodec.processors.corpus.clips import UnusableClip, measure_clip
from modeling_encodec.processors.corpus.reading import CorpusConfig
from modeling_encodec.processors.corpus.rows import audio_columns
from modeling_encodec.processors.corpus.sources import open_source
from modeling_encodec.training.corpora import open_corpus
from modeling_encodec.training.reverberation import ImpulseResponses


needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")
WRITTEN = {
    "wav": "WAV", "wave": "WAV", "wavex": "WAVEX", "rf64": "RF64", "w64": "W64", "aif": "AIFF", "aiff": "AIFF",
    "aifc": "AIFF", "au": "AU", "snd": "AU", "caf": "CAF", "flac": "FLAC", "ogg": "OGG", "oga": "OGG", "mp3": "MP3",
    "sph": "NIST", "nist": "NIST", "voc": "VOC", "svx": "SVX", "8svx": "SVX", "ircam": "IRCAM", "sf": "IRCAM",
    "paf": "PAF", "pvf": "PVF", "avr": "AVR", "htk": "HTK", "mp2": "MP3",
}  # fmt: skip


@pytest.fixture
def without_ffmpeg(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)


def ffmpeg(*arguments) -> None:
    subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, arguments)], check=True, stdin=subprocess.DEVNULL)


def write_m4a(path, seconds=1, rate=22050, channels=2):
    tone = f"sine=f=440:r={rate}:d={seconds}"
    ffmpeg("-f", "lavfi", "-i", tone, "-ac", channels, "-metadata", "title=" + "long " * 50, path)
    return path


def test_all_that_libsndfile_reads_is_listed_by_all(tmp_path):
    noise = 0.1 * np.random.default_rng(0).standard_normal(8000)
    for suffix, form in WRITTEN.items():
        soundfile.write(tmp_path / f"{suffix}.{suffix.upper()}", noise, 8000, format=form)
    names = sorted(f"{suffix}.{suffix.upper()}" for suffix in WRITTEN)
    assert [path.name for path in list_audio(tmp_path)] == names
    assert [row.name for shard in open_source(tmp_path).shards for row in shard.rows()] == names
    assert [clip.name for clip in list_clips(tmp_path)] == names and all(c.seconds == 1 for c in list_clips(tmp_path))
    assert len(open_corpus(CorpusConfig("a", str(tmp_path)), 1).clips) == len(names)


def test_suffixes_come_from_the_library():
    for name in soundfile.available_formats():
        assert (f".{name.lower()}" in SNDFILE_SUFFIXES) == (name != "RAW")
    assert SNDFILE_SUFFIXES[:5] == (".wav", ".flac", ".ogg", ".opus", ".mp3")


def write_mixture(folder):
    folder.mkdir()
    for name in ("a.wav", "b.flac"):
        soundfile.write(folder / name, 0.1 * np.random.default_rng(0).standard_normal(8000), 8000)
    for name in ("c.m4a", "d.M4A", "e.webm", "f.txt", "Makefile"):
        (folder / name).write_bytes(b"nothing")


def test_what_is_left_out_is_said_and_counted(tmp_path, without_ffmpeg, capsys, caplog):
    write_mixture(tmp_path / "mix")
    EncodecModel(EncodecConfig(num_filters=2, hidden_size=16)).save_pretrained(tmp_path / "model")
    line = "5 files of other kinds: no suffix (1), .m4a (2), .txt (1), .webm (1), left out; ffmpeg is not installed"
    model = ["-m", str(tmp_path / "model"), "-b", "1.5"]
    counts = {"read_by_ffmpeg": {}, "left_out": {"": 1, ".m4a": 2, ".txt": 1, ".webm": 1}}
    assert main(["tokenize", str(tmp_path / "mix"), str(tmp_path / "tokens"), *model]) == 0
    assert line in capsys.readouterr().err
    assert json.loads((tmp_path / "tokens" / "manifest.json").read_text())["other_files"] == counts
    assert main(["encode", str(tmp_path / "mix"), str(tmp_path / "coded"), *model]) == 0
    assert line in capsys.readouterr().err
    other = OtherFiles()
    assert len(list_clips(tmp_path / "mix", other=other)) == 2 and other.describe() == counts
    corpus = open_corpus(CorpusConfig("a", str(tmp_path / "mix")), 1)
    assert sorted(name.rpartition("/")[2] for name, _ in corpus.skipped) == ["c.m4a", "d.M4A", "e.webm"]
    assert "2 files of other kinds: no suffix (1), .txt (1), left out" in caplog.text
    with pytest.raises(ValueError, match="impulse_responses"):  # noise is no room, but it was looked at
        ImpulseResponses(tmp_path / "mix", 8000)
    assert "impulse responses: 5 files of other kinds" in caplog.text
    for suffix in (".wav", ".flac"):
        next((tmp_path / "mix").glob(f"*{suffix}")).unlink()
    for command in ("tokenize", "encode"):
        assert main([command, str(tmp_path / "mix"), str(tmp_path / f"none_{command}"), *model]) == 2
        assert "5 files of other kinds: no suffix (1), .m4a (2)" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"holds no clips.*\.m4a \(2\)"):
        list_clips(tmp_path / "mix")


def test_a_file_that_only_ffmpeg_reads_is_refused_without_it(tmp_path, without_ffmpeg):
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    with pytest.raises(
        ValueError, match=r"a.m4a: not readable as audio \(ffmpeg, which may read it, is not installed"
    ):
        read_audio(tmp_path / "a.m4a")


@needs_ffmpeg
def test_other_kinds_are_read_by_ffmpeg_at_their_rate_and_channels(tmp_path):
    path = write_m4a(tmp_path / "-a b;'c.m4a")
    audio, rate = read_audio(path)
    assert rate == 22050 and audio.shape[0] == 2 and abs(audio.shape[1] - rate) < 2100
    assert np.array_equal(read_clip(path.read_bytes(), EncodecConfig()), read_audio(path, 24000, 1)[0])
    with path.open("rb") as file:
        assert np.array_equal(read_audio(file)[0], audio)
    part, _ = read_audio(path, offset=0.25, duration=0.1)
    assert np.array_equal(part, audio[:, 5512 : 5512 + 2205])
    with AudioFile(path) as file:
        assert file.decoder == "ffmpeg" and file.known_frames is None and file.count_frames() == audio.shape[1]
        assert np.array_equal(file.read(1000).T, audio[:, :1000])
    with pytest.raises(UnusableClip, match="is read by ffmpeg, which crops are not drawn with; convert it"):
        measure_clip("a", str(path))


@needs_ffmpeg
def test_ffmpeg_decodes_what_libsndfile_would(tmp_path):
    noise = (0.1 * np.random.default_rng(0).standard_normal((2, 22050))).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise.T, 22050, subtype="PCM_24")
    ffmpeg("-i", tmp_path / "a.wav", "-c:a", "pcm_s24le", tmp_path / "a.mka")
    assert np.array_equal(read_audio(tmp_path / "a.mka")[0], read_audio(tmp_path / "a.wav")[0])


@needs_ffmpeg
def test_what_ffmpeg_reads_is_said(tmp_path, capsys):
    (tmp_path / "mix").mkdir()
    write_m4a(tmp_path / "mix" / "a.m4a")
    write_m4a(tmp_path / "mix" / "b.webm", rate=48000)
    soundfile.write(tmp_path / "mix" / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(8000), 8000)
    EncodecModel(EncodecConfig(num_filters=2, hidden_size=16)).save_pretrained(tmp_path / "model")
    model = ["-m", str(tmp_path / "model"), "-b", "1.5"]
    line = f"2 files of other kinds: .m4a (1), .webm (1), read by ffmpeg {audio_ffmpeg.ffmpeg_version()}"
    assert main(["tokenize", str(tmp_path / "mix"), str(tmp_path / "tokens"), *model]) == 0
    assert line in capsys.readouterr().err
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    assert manifest["totals"]["rows"] == 3 and manifest["versions"]["ffmpeg"] == audio_ffmpeg.ffmpeg_version()
    assert manifest["other_files"] == {"read_by_ffmpeg": {".m4a": 1, ".webm": 1}, "left_out": {}}
    assert main(["encode", str(tmp_path / "mix"), str(tmp_path / "coded"), *model]) == 0
    assert line in capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "coded").iterdir())
    assert names == ["a.m4a.ecdc", "a.wav.ecdc", "b.ecdc"]  # none takes the place of another


@needs_ffmpeg
def test_what_ffmpeg_cannot_read_whole_is_refused_in_one_line(tmp_path):
    path = write_m4a(tmp_path / "a.m4a", seconds=5)
    cases = {"cut.m4a": path.read_bytes()[:-3000], "none.m4a": b"nothing at all" * 100, "empty.m4a": b""}
    ffmpeg(
        "-f", "lavfi", "-i", "sine=d=1", "-f", "lavfi", "-i", "sine=d=1", "-map", 0, "-map", 1, tmp_path / "two.m4a"
    )
    cases["two.m4a"] = (tmp_path / "two.m4a").read_bytes()
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError) as error:
            read_audio(tmp_path / name)
        assert "\n" not in str(error.value)
    assert "holds 2 streams of audio, allowed: one" in str(error.value)
    (tmp_path / "a.wav").write_text("a text is no audio, though ffmpeg would play it\n" * 50)
    with pytest.raises(ValueError, match="Format not recognised"):
        read_audio(tmp_path / "a.wav")


def test_columns_of_other_kinds_are_audio_where_there_are_no_others():
    assert audio_columns(["mp4", "0.wav", "json"]) == ["0.wav"]
    assert audio_columns(["m4a", "json"]) == ["m4a"] and audio_columns(["json"]) == []
