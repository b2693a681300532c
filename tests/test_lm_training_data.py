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

from modeling_encodec.models.modeling_encodec import EncodecModel
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


# ---- what tokenize writes ----------------------------------------------------------------------------------------


def test_sequences_of_what_tokenize_writes(place, run, tmp_path):
    codec = EncodecModel.from_pretrained(place / "codec").eval()
    files = sorted((place / "audio").iterdir())
    assert (
        run("tokenize", place / "audio", tmp_path / "codes", "-m", place / "codec", "-b", 1.2, "--workers", 0)[0] == 0
    )
    data = sequences(str(tmp_path / "codes"))
    assert len(data) == len(files) and data[0]["codes"].shape == (BOOKS, 15)
    for number, path in enumerate(files):
        audio = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        assert torch.equal(data.recording(number), codec.encode(audio, bandwidth=1.2).audio_codes[0, 0])


# The second of three chunks is shorter than a chunk by a frame, the third has a frame alone.
THREE_CHUNKS = round(1.982 * 48000)


def write_three_chunks(folder: Path) -> np.ndarray:
    audio = np.random.default_rng(0).standard_normal((THREE_CHUNKS, 2)).astype(np.float32) * 0.1
    folder.mkdir()
    soundfile.write(folder / "a.wav", audio, 48000, subtype="FLOAT")
    return audio


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
