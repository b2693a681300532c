"""The codes that language models learn from: sequences of them, and corpora encoded beforehand."""

import dataclasses
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from lm_runs import (
    BOOKS,
    SIZE,
    fixture_config,  # noqa: F401
    fixture_place,  # noqa: F401
    patterns,
    save_codes,
    sequences,
)
from run_results import (
    fresh_accelerate,  # noqa: F401
)

from modeling_encodec.modeling_encodec import EncodecModel
from modeling_encodec.training import code_corpus
from modeling_encodec.training.code_corpus import encode_files
from modeling_encodec.training.code_sequences import IGNORED, open_codes
from modeling_encodec.training.lm_trainer import LMTrainer
from modeling_encodec.training.mixing import batch_loader


# ---- sequences ---------------------------------------------------------------------------------------------------


def test_an_example_follows_from_seed_and_number(place):
    data, again = sequences(str(place / "codes")), sequences(str(place / "codes"))
    backwards = [again[number]["codes"] for number in reversed(range(20))][::-1]
    examples = [data[number]["codes"] for number in range(20)]
    assert all(torch.equal(one, other) for one, other in zip(examples, backwards))
    other = sequences(str(place / "codes"), seed=1)
    assert not all(torch.equal(one, other[number]["codes"]) for number, one in enumerate(examples))
    assert not all(torch.equal(one, examples[0]) for one in examples)
    halves = [
        batch["codes"]
        for rank in range(2)
        for batch in islice(batch_loader(data, batch_size=2, rank=rank, world_size=2, workers=rank), 1)
    ]
    assert torch.equal(torch.cat(halves), torch.stack(examples[:4]))


def test_sequences_are_pieces_of_recordings_then_padding(tmp_path):
    rng = np.random.default_rng(0)
    rows = [rng.integers(SIZE, size=(BOOKS + 2, frames)) for frames in (40, 15, 6)]  # the first codebooks count
    data, starts = sequences(save_codes(tmp_path / "codes", rows)), set()
    for number in range(400):
        codes = data[number]["codes"]
        assert codes.shape == (BOOKS, 15) and codes.dtype == torch.int64 and data[number]["skipped"] == []
        length = int((codes[0] != IGNORED).sum())
        assert length in (15, 6) and (codes[:, length:] == IGNORED).all()
        (found,) = [
            (row, start)
            for row, whole in enumerate(rows)
            for start in range(whole.shape[1] - length + 1)
            if np.array_equal(whole[:BOOKS, start : start + length], codes[:, :length])
        ]
        starts.add(found)
    assert starts == {*((0, start) for start in range(26)), (1, 0), (2, 0)}


def test_draws_are_proportional_to_frames(tmp_path):
    """Each recording holds one code; of 30, 10 and 60 frames in two datasets, and one without any."""
    first = save_codes(tmp_path / "first", [np.full((BOOKS, 30), 1), [[]] * BOOKS, np.full((BOOKS, 10), 2)])
    second = save_codes(tmp_path / "second", [np.full((BOOKS, 60), 3)])
    data = sequences(first, second)
    drawn = np.array([data[number]["codes"][0, 0].item() for number in range(2000)])
    for code, share in ((1, 0.3), (2, 0.1), (3, 0.6)):
        assert np.mean(drawn == code) == pytest.approx(share, abs=0.035)
    assert data.lengths.tolist() == [30, 0, 10, 60] and len(data) == 4
    assert torch.equal(data.recording(3), torch.full((BOOKS, 60), 3))
    one_frame = sequences(save_codes(tmp_path / "one", [[[]] * BOOKS, np.full((BOOKS, 1), 5), []]))
    assert one_frame[0]["codes"][:, 0].tolist() == [5] * BOOKS


def test_every_form_of_a_dataset_gives_the_same(place, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    rows = datasets.Dataset.from_dict({"tokens": [row.tolist() for row in patterns(12, 40)], "name": ["a"] * 12})
    rows.to_parquet(tmp_path / "codes.parquet")
    rows.to_json(tmp_path / "codes.jsonl")
    rows.save_to_disk(tmp_path / "disk")
    (tmp_path / "many").mkdir()
    rows.to_parquet(tmp_path / "many" / "train.parquet")
    exact = sequences(str(place / "codes"))
    for name in ("codes.parquet", "codes.jsonl", "disk", "many"):
        data = sequences(str(tmp_path / name), column="tokens")
        assert all(torch.equal(data[number]["codes"], exact[number]["codes"]) for number in range(5)), name
        assert data.digest == sequences(str(tmp_path / name), column="tokens").digest, name
    (tmp_path / "codes.txt").write_text("1 2 3")
    with pytest.raises(ValueError, match="codes is .*codes.txt', allowed: a folder, Hub id, or a file: .parquet"):
        open_codes(tmp_path / "codes.txt", "codes")
    datasets.Dataset.from_dict({"tokens": [[[1.5]]]}).save_to_disk(tmp_path / "floats")
    with pytest.raises(RuntimeError, match="could not be used, .*codes are float"):
        sequences(str(tmp_path / "floats"), column="tokens", codebooks=1)[0]


# ---- code_corpus -------------------------------------------------------------------------------------------------


def test_code_corpus_holds_what_encode_gives(place, tmp_path):
    codec = EncodecModel.from_pretrained(place / "codec").eval()
    files = sorted((place / "audio").iterdir())
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF and nothing more")
    skipped = encode_files([files[0], broken, *files[1:]], codec, tmp_path / "codes")
    assert [path for path, _ in skipped] == [broken] and "not readable as audio" in skipped[0][1]
    assert "broken.wav" in (tmp_path / "codes" / "skipped_files.jsonl").read_text()
    rows = datasets.load_from_disk(str(tmp_path / "codes")).with_format("numpy")
    assert list(rows["path"]) == [str(path) for path in files]
    assert rows.features["codes"].feature.feature.dtype == "int16"
    for path, codes in zip(files, rows["codes"], strict=True):
        audio = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        assert torch.equal(torch.from_numpy(np.asarray(codes)), codec.encode(audio, bandwidth=1.2).audio_codes[0, 0])
    assert sequences(str(tmp_path / "codes"))[0]["codes"].shape == (BOOKS, 15)
    with pytest.raises(FileExistsError, match="exists, allowed: a new folder"):
        encode_files(files, codec, tmp_path / "codes")


# The second of three chunks is shorter than a chunk by a frame, the third has a frame alone.
THREE_CHUNKS = round(1.982 * 48000)


def write_three_chunks(folder: Path) -> np.ndarray:
    audio = np.random.default_rng(0).standard_normal((THREE_CHUNKS, 2)).astype(np.float32) * 0.1
    folder.mkdir()
    soundfile.write(folder / "a.wav", audio, 48000, subtype="FLOAT")
    return audio


def test_code_corpus_joins_chunks(small_models, tmp_path):
    codec = small_models["48khz"]
    audio = torch.from_numpy(write_three_chunks(tmp_path / "audio").T)
    encode_files(sorted((tmp_path / "audio").iterdir()), codec, tmp_path / "codes")
    codes = torch.tensor(datasets.load_from_disk(str(tmp_path / "codes"))[0]["codes"])
    spans = list(codec.config.chunk_spans(THREE_CHUNKS))
    alone = [codec.encode(audio[None, :, start:stop], bandwidth=3.6).audio_codes[0, 0] for start, stop in spans]
    assert [chunk.shape[1] for chunk in alone] == [150, 149, 1]
    assert torch.equal(codes, torch.cat(alone, dim=1))


def test_held_out_audio_joins_chunks(small_models, config, tmp_path):
    audio = torch.from_numpy(write_three_chunks(tmp_path / "audio").T)
    codec = small_models["48khz"]
    codec.save_pretrained(tmp_path / "48khz")
    rows = [np.zeros((codec.config.num_quantizers, 40), dtype=int)]
    options = dataclasses.replace(
        config, codec=str(tmp_path / "48khz"), codes=[save_codes(tmp_path / "codes", rows)],
        validation=str(tmp_path / "audio"),
    )  # fmt: skip
    (held_out,) = LMTrainer(options).held_out
    spans = codec.config.chunk_spans(THREE_CHUNKS)
    alone = [codec.encode(audio[None, :, start:stop], bandwidth=3.6).audio_codes[0, 0] for start, stop in spans]
    assert torch.equal(held_out, torch.cat(alone, dim=1))


def test_code_corpus_appears_whole_or_not_at_all(place, tmp_path, monkeypatch):
    codec = EncodecModel.from_pretrained(place / "codec").eval()
    files = sorted((place / "audio").iterdir())
    with pytest.raises(ValueError, match="none of 1 files could be read"):
        encode_files([place / "nonesuch.wav"], codec, tmp_path / "codes")

    def save_half(dataset, folder):
        Path(folder, "half.arrow").write_text("half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "save_to_disk", save_half)
        with pytest.raises(OSError, match="disk full"):
            encode_files(files, codec, tmp_path / "codes")
    assert not (tmp_path / "codes").exists()
    encode_files(files, codec, tmp_path / "codes")
    assert len(datasets.load_from_disk(str(tmp_path / "codes"))) == 3
    assert not (tmp_path / "codes" / "half.arrow").exists()


def test_code_corpus_command(place, tmp_path, capsys):
    """Two processes give what one gives, in the order of the files."""
    codec = EncodecModel.from_pretrained(place / "codec").eval()
    arguments = [str(place / "audio"), str(tmp_path / "two"), "--codec", str(place / "codec")]
    assert code_corpus.main([*arguments, "--processes", "2"]) == 0
    assert f"3 of 3 files are in {tmp_path / 'two'}" in capsys.readouterr().out
    encode_files(sorted((place / "audio").iterdir()), codec, tmp_path / "one")
    one, two = (datasets.load_from_disk(str(tmp_path / name)) for name in ("one", "two"))
    assert one[:] == two[:]
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    for wrong, message in (
        (arguments, "exists, allowed: a new folder"),
        ([str(tmp_path / "nonesuch"), str(tmp_path / "x")], "no such folder or manifest"),
        ([str(tmp_path / "empty"), str(tmp_path / "x")], "none of 0 files could be read"),
        ([*arguments[:1], str(tmp_path / "x"), "--processes", "0"], "processes is 0, allowed: at least 1"),
    ):
        assert code_corpus.main(wrong) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1
