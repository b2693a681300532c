"""Training language models: they go on where they stopped, and are the same on several processes."""

import dataclasses
import os
import shutil
import signal
import threading
import time
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import make_model
from lm_runs import (
    fixture_audio_config,  # noqa: F401
    fixture_config,  # noqa: F401
    fixture_place,  # noqa: F401
    patterns,
    record_losses,
    run,
    run_script,
    save_codes,
)
from run_results import (
    assert_equal,
    fresh_accelerate,  # noqa: F401
    log_of,
    state_of,
)
from safetensors.torch import load_file

from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import IGNORED
from modeling_encodec.training.lm_trainer import LMTrainer


# ---- stopped and resumed -----------------------------------------------------------------------------------------


def test_killed_and_resumed_is_uninterrupted(config, place, tmp_path):
    """3 updates, kill -9 after 5, resume: equal to the bit to 6 in one go, the log and the model too."""
    options = dataclasses.replace(
        config, save_every=3, log_every=2, workers=1, weight_average=0.9, decay_to=0.1, warmup_updates=2,
        validation_codes=str(place / "held_out"), validate_every=1,
    )  # fmt: skip
    run(options)
    killed = dataclasses.replace(options, output=str(tmp_path / "killed"))
    assert run_script(killed, "5") == -signal.SIGKILL
    assert state_of(killed)["update"] == 3 and max(line["update"] for line in log_of(killed)) == 5
    run(dataclasses.replace(killed, resume=True))
    assert_equal(state_of(options), state_of(killed))
    assert log_of(options) == log_of(killed)
    models = [load_file(Path(one.output) / "model" / "model.safetensors") for one in (options, killed)]
    assert_equal(*models)


def test_sigterm_leaves_a_resumable_checkpoint(config, tmp_path):
    run(config)
    stopped = dataclasses.replace(config, output=str(tmp_path / "stopped"))
    trainer = LMTrainer(stopped)
    one_update = trainer.one_update

    def signalled(batch: dict) -> dict:
        if trainer.update == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return one_update(batch)

    trainer.one_update = signalled
    assert trainer.train() == "stopped" and state_of(stopped)["update"] == trainer.update == 3
    run(dataclasses.replace(stopped, resume=True))
    assert_equal(state_of(config), state_of(stopped))
    assert log_of(config) == log_of(stopped)


class Hanging(torch.utils.data.Dataset):
    """Examples of which those from number `first` on never come."""

    def __init__(self, examples, first: int, then):
        self.examples, self.first, self.then = examples, first, then

    def __getitem__(self, index: int) -> dict:
        if index >= self.first:
            self.then()
        return self.examples[index]


@pytest.mark.parametrize("first", [0, 12])
def test_sigterm_ends_the_wait_for_a_batch(config, tmp_path, first):
    """Also for the very first; what was learned until then is saved."""
    run(config)
    stopped = dataclasses.replace(config, output=str(tmp_path / "stopped"), workers=2)
    trainer = LMTrainer(stopped)
    trainer.data = Hanging(trainer.data, first, partial(time.sleep, 600))
    threading.Timer(5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    assert trainer.train() == "stopped" and state_of(stopped)["update"] == trainer.update == first // 4
    assert time.monotonic() - began < 120
    run(dataclasses.replace(stopped, resume=True))
    assert_equal(state_of(config), state_of(stopped))


def test_a_reader_that_is_killed_ends_the_run(config, tmp_path):
    run(config)
    killed = dataclasses.replace(config, output=str(tmp_path / "killed"), workers=2, save_every=1)
    trainer = LMTrainer(killed)
    trainer.data = Hanging(trainer.data, 12, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match="a worker process ended before its work did .killed by SIGKILL"):
        trainer.train()
    assert trainer.update == 3
    run(dataclasses.replace(killed, resume=True))
    assert_equal(state_of(config), state_of(killed))


def test_resuming_another_run_is_refused(config, audio_config, place, tmp_path):
    codes = shutil.copytree(place / "codes", tmp_path / "codes")
    options = dataclasses.replace(config, codes=[str(codes)])
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        LMTrainer(dataclasses.replace(options, resume=True))
    run(options)
    with pytest.raises(FileExistsError, match="--resume"):
        LMTrainer(options)
    again = dataclasses.replace(options, resume=True)
    for change, message in (
        ({"learning_rate": 0.1}, "learning_rate is 0.1, allowed: 0.01, as in the run to be resumed"),
        ({"segment_seconds": 0.1}, "segment_seconds is 0.1, allowed: 0.2, as in the run"),
        ({"codes": [str(place / "codes")]}, "codes is .*, allowed: .* as in the run"),
        ({"codes": [], "corpora": audio_config.corpora}, "codes is .*, allowed: .* as in the run"),
    ):
        with pytest.raises(ValueError, match=message):
            LMTrainer(dataclasses.replace(again, **change))
    LMTrainer(dataclasses.replace(again, workers=1, save_every=7, validation=str(place / "audio")))
    shutil.rmtree(codes)
    save_codes(codes, patterns(12, 40, seed=5))
    with pytest.raises(ValueError, match="corpus 'codes' holds other files now"):
        LMTrainer(again)


def test_a_finished_run_goes_on_with_more_epochs(config):
    """With a constant rate it is to the bit the longer run from the start; the integer form is made anew."""
    options = dataclasses.replace(config, updates_per_epoch=3, decay_to=1.0, warmup_updates=2)
    long = dataclasses.replace(options, epochs=2, output=f"{config.output}_long")
    run(long)
    run(options)
    again = dataclasses.replace(options, epochs=2, resume=True)
    run(again)
    assert_equal(state_of(long), state_of(options))
    models = [load_file(Path(one.output) / "model" / "model.safetensors") for one in (long, options)]
    assert_equal(*models)
    falling = dataclasses.replace(config, updates_per_epoch=3, decay_to=0.0, output=f"{config.output}_falling")
    run(falling)
    with pytest.raises(ValueError, match="epochs is 2, allowed: 1, .* --extend"):
        LMTrainer(dataclasses.replace(falling, epochs=2, resume=True))
    run(dataclasses.replace(falling, epochs=2, resume=True, extend=True))


def test_resuming_on_other_audio_is_refused(audio_config, place, tmp_path):
    folder = shutil.copytree(place / "audio", tmp_path / "audio")
    options = dataclasses.replace(audio_config, corpora=[{"name": "a", "source": str(folder)}], index=None)
    run(options)
    LMTrainer(dataclasses.replace(options, resume=True))
    (folder / "0.wav").unlink()
    with pytest.raises(ValueError, match="corpus 'a' holds other files now"):
        LMTrainer(dataclasses.replace(options, resume=True))


def test_resuming_with_another_codec_is_refused(audio_config, place, tmp_path):
    folder = shutil.copytree(place / "codec", tmp_path / "codec")
    options = dataclasses.replace(audio_config, codec=str(folder))
    run(options)
    make_model(EncodecModel.from_pretrained(folder).config, seed=1).save_pretrained(folder)
    with pytest.raises(ValueError, match="codec"):
        LMTrainer(dataclasses.replace(options, resume=True))


def test_resuming_with_other_validation_codes(config, place):
    run(config)
    LMTrainer(dataclasses.replace(config, resume=True, validation_codes=str(place / "held_out")))


# ---- several processes -------------------------------------------------------------------------------------------


def test_two_processes_are_equal_and_like_one(config, tmp_path):
    """Of recordings of different lengths: processes hold different numbers of labels, the mean is over all."""
    source = save_codes(tmp_path / "codes", patterns(8, [2, 40, 3, 5, 9, 15, 4, 12]))
    options = dataclasses.replace(config, codes=[source], output=str(tmp_path / "two"))
    assert run_script(options, processes=2) == 0
    first, second = [torch.load(Path(options.output) / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name
    alone = LMTrainer(dataclasses.replace(options, output=str(tmp_path / "one")))
    shares = [(batch["codes"][:, 0] != IGNORED).sum(1) for batch in islice(alone.batches(0, 0), 6)]
    assert any(share[:2].sum() != share[2:].sum() for share in shares)
    losses = record_losses(alone)
    alone.train()
    for line, exact in zip(log_of(options), losses, strict=True):
        for name, value in exact.items():
            assert line[f"train/{name}"] == pytest.approx(value, rel=2e-5), (line["update"], name)
