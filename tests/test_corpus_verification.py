"""`tokenize --verify` and `tokenize compare`: each finds what the other does."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from corpus_files import sound
from ties import count_ties

from modeling_encodec.models.ties import is_tie
from modeling_encodec.processors.audio_tokens import PortableCodec, Tokens
from modeling_encodec.processors.corpus import comparison
from modeling_encodec.processors.corpus.comparison import (
    Agreement,
    TokenFiles,
    code_again,
    compare_outputs,
    open_again,
)
from modeling_encodec.processors.corpus.sources import open_source
from modeling_encodec.processors.corpus.tokenization import Tokenization, tokenize_corpus


CLIPS = {f"{number}.wav": 3000 + 320 * number for number in range(7)}


@pytest.fixture(scope="module")
def place(tmp_path_factory, small_models):
    """Folder of clips, of the model, and of finished tokens of three shards."""
    place = tmp_path_factory.mktemp("place")
    (place / "clips").mkdir()
    for seed, (name, samples) in enumerate(CLIPS.items()):
        soundfile.write(place / "clips" / name, sound(24000, 1, samples, seed), 24000)
    (place / "clips" / "no.wav").write_bytes(b"no audio")
    small_models["24khz"].save_pretrained(place / "model")
    tokenize_corpus(run_of(place, place / "tokens"), workers=0, progress=False)
    return place


def run_of(place, out, count=8, source=None) -> Tokenization:
    source = open_source(source or place / "clips", shard_rows=3)
    return Tokenization(source, out, PortableCodec(place / "model"), count)


@pytest.fixture
def copy(place, tmp_path):
    return shutil.copytree(place / "tokens", tmp_path / "copy")


def damage(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("spelling", [("--verify",), ("verify",)])
def test_verify_names_the_shards_that_are_damaged(place, copy, run, spelling):
    code, out, lines = run("tokenize", *spelling, copy)
    assert (code, lines) == (0, []) and out.startswith("3 shards are whole: ")
    shards = sorted(copy.glob("data/*"))
    for path in shards[:2]:
        damage(path, 0.3)
    (copy / "skipped.jsonl").write_text("")
    code, out, lines = run("tokenize", *spelling, copy)
    assert code == 2 and [line.split(":")[0] for line in out.splitlines()] == [
        f"data/{shards[0].name}", f"data/{shards[1].name}", "skipped.jsonl",
    ]  # fmt: skip
    assert len(lines) == 1 and "3 files are damaged" in lines[0] and shards[0].name in lines[0]
    code, _, lines = run("tokenize", "compare", copy, place / "tokens")
    assert code == 2 and shards[0].name in lines[0]  # what cannot be trusted is not compared
    tokenize_corpus(run_of(place, copy), workers=0, progress=False)
    assert run("tokenize", *spelling, copy)[0] == 0
    assert run("tokenize", "compare", copy, place / "tokens")[0] == 0
    assert [path.read_bytes() for path in shards] == [
        path.read_bytes() for path in sorted(place.glob("tokens/data/*"))
    ]


def test_what_is_no_finished_output(place, copy, run, tmp_path):
    (copy / "manifest.json").unlink()
    for command in (("--verify", copy), ("compare", copy, place / "tokens"), ("verify", tmp_path / "nothing")):
        code, _, lines = run("tokenize", *command)
        assert code == 2 and len(lines) == 1 and "holds no manifest.json, allowed: a finished output" in lines[0]
    code, _, lines = run("tokenize", "verify", place / "tokens", "--share", 0)
    assert code == 2 and "share is 0.0, allowed: above 0, up to 1" in lines[0]


@pytest.mark.parametrize("spelling", [("compare",), ("--compare",)])
def test_compare_of_equal_tokens(place, run, tmp_path, spelling):
    """Also where they are cut and coded in another way."""
    source = open_source(place / "clips", shard_rows=2)
    other = Tokenization(source, tmp_path / "other", PortableCodec(place / "model"), 8, batch_seconds=1)
    tokenize_corpus(other, workers=0, progress=False)
    for one, two in ((place / "tokens", place / "tokens"), (place / "tokens", tmp_path / "other")):
        code, out, _ = run("tokenize", *spelling, one, two)
        assert code == 0 and out.startswith("7 rows of ") and ", 7 equal\n" in out
        assert out.count("100.0000%") == 8


def test_compare_says_where_tokens_differ(place, run, tmp_path):
    clips = shutil.copytree(place / "clips", tmp_path / "clips")
    audio, rate = soundfile.read(clips / "3.wav")
    audio[2000:] += 0.2 * np.random.default_rng(0).standard_normal(len(audio) - 2000)
    soundfile.write(clips / "3.wav", audio, rate)
    (clips / "5.wav").unlink()
    soundfile.write(clips / "new.wav", sound(24000, 1, 2000), 24000)
    tokenize_corpus(run_of(place, tmp_path / "other", source=clips), workers=0, progress=False)
    code, out, _ = run("tokenize", "compare", place / "tokens", tmp_path / "other")
    assert code == 1 and "6 rows of " in out and ", 5 equal" in out
    found = compare_outputs(place / "tokens", tmp_path / "other")
    one, two = (
        {
            row["name"]: row["codes"]
            for path in sorted(folder.glob("data/*"))
            for row in pq.read_table(path).to_pylist()
        }
        for folder in (place / "tokens", tmp_path / "other")
    )
    ours, theirs = np.array(one["3.wav"]), np.array(two["3.wav"])
    first = int(np.flatnonzero((ours != theirs).any(0))[0])
    book = int(np.flatnonzero(ours[:, first] != theirs[:, first])[0])
    count = int((ours != theirs).any(0).sum())
    assert f"differs: 3.wav: first in frame {first}, codebook {book}; {count} frames in all\n" in out
    assert "only in A: 5.wav\n" in out and "only in B: new.wav\n" in out
    assert found.equal.tolist() == [found.frames - int((ours[k] != theirs[k]).sum()) for k in range(8)]
    tokenize_corpus(run_of(place, tmp_path / "fewer", count=4), workers=0, progress=False)
    code, out, _ = run("tokenize", "compare", place / "tokens", tmp_path / "fewer")
    assert code == 1 and "num_quantizers: 8 in A, 4 in B" in out and out.count("100.0000%") == 4


def test_audio_coded_again(place, run, tmp_path):
    verify = ("tokenize", "--verify", place / "tokens", "-m", place / "model")
    code, out, _ = run(*verify, "--audio", place / "clips")
    assert code == 0 and "1 rows of " in out and ", 1 equal" in out and "coded again, seed " in out
    code, out, _ = run(*verify, "--audio", place / "clips", "--share", 1, "--seed", 3)
    assert code == 0 and "7 rows of " in out and ", 7 equal" in out and "seed 3:" in out
    clips = shutil.copytree(place / "clips", tmp_path / "clips")
    soundfile.write(clips / "2.wav", sound(24000, 1, CLIPS["2.wav"], 55), 24000)
    (clips / "4.wav").write_bytes(b"damaged")
    code, out, lines = run(*verify, "--audio", clips, "--share", 1)
    assert code == 2 and "differs: 2.wav: first in frame 0" in out and "no ties" in out
    assert "4.wav: its audio gives no tokens now (not readable as audio" in out and "2 rows are not what" in lines[-1]
    code, _, lines = run("tokenize", "verify", place / "tokens", "--audio", place / "clips")
    assert code == 2 and "model is encodec_24khz_c16, with weights " in lines[-1]


@pytest.mark.parametrize("name", ["24khz", "48khz"])
def test_ties_are_told_from_errors(place, small_models, tmp_path, name):
    """A code moved to an entry that is as near is a tie; to any other it is none."""
    model = small_models[name]
    codec = PortableCodec(model)
    source = open_source(place / "clips")
    tokenize_corpus(Tokenization(source, tmp_path / "t", codec, 4), workers=0, progress=False)
    files = TokenFiles(tmp_path / "t")
    again = open_again(place / "clips", files.manifest)
    assert code_again(files, again, codec, 1.0, 0)
    tokens = files.tokens
    book = model.quantizer.layers[1].codebook.embed

    def moved(file, row):
        made = tokens(file, row)
        codes = made.codes.copy()
        codes[1, 2] = (codes[1, 2] + 7) % len(book)
        return Tokens(codes, made.scales, made.audio_length)

    files.tokens = moved
    found = code_again(files, open_again(place / "clips", files.manifest), codec, 1.0, 0)
    assert {(apart.frame, apart.codebook, apart.frames, apart.tie) for apart in found.apart} == {(2, 1, 1, False)}


def test_a_tie_here_is_a_tie_to_the_tests(small_models):
    model = small_models["24khz"]
    torch.manual_seed(0)
    entry = model.quantizer.layers[0].codebook.embed
    middle = (entry[3] + entry[9]) / 2
    nearest = torch.tensor([3]), torch.tensor([9])
    for shift in (0.0, 1e-7, 1e-5, 1e-3):
        latent = middle + shift * (entry[3] - entry[9])
        try:
            seen = count_ties(model, latent[:, None], *(codes[:, None] for codes in nearest)) == 1
        except AssertionError:
            seen = False
        assert is_tie(model, latent, *nearest) == seen == (shift < 1e-4)


def test_lists_are_not_endless():
    found = Agreement()
    for number in range(50):
        codes = np.zeros((2, 5), np.uint16)
        found.add(str(number), Tokens(codes, None, 9), Tokens(codes + 1, None, 9))
    lines = list(found.lines(most=3))
    assert len([line for line in lines if line.startswith("differs: ")]) == 4 and lines[-1] == "differs: 47 more"
    assert comparison.Agreement() and not found
