"""Training runs: they go on where they stopped, and are the same on several processes."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from codec_runs import (
    fixture_config,  # noqa: F401
    fixture_place,  # noqa: F401
    run,
)
from run_results import (
    ENVIRONMENT,
    assert_equal,
    fresh_accelerate,  # noqa: F401
    log_of,
    state_of,
)

import modeling_encodec.training.run
from modeling_encodec.training.configuration import TrainingConfig
from modeling_encodec.training.trainer import CodecTrainer


# ---- stopped and resumed -----------------------------------------------------------------------------------------


def test_resuming_another_run_is_refused(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        CodecTrainer(dataclasses.replace(config, resume=True))
    run(dataclasses.replace(config, updates_per_epoch=1))
    with pytest.raises(ValueError, match="learning_rate is 0.1, allowed: 0.0003, as in the run to be resumed"):
        CodecTrainer(dataclasses.replace(config, updates_per_epoch=1, resume=True, learning_rate=0.1))
    shutil.copytree(Path(config.corpora[0].source), tmp_path / "more")
    shutil.copy(tmp_path / "more" / "0.wav", tmp_path / "more" / "00.wav")
    more = [{"name": "sweeps", "source": str(tmp_path / "more")}]
    with pytest.raises(ValueError, match="corpora is .*, allowed: .* as in the run"):
        CodecTrainer(dataclasses.replace(config, updates_per_epoch=1, resume=True, corpora=more))
    (Path(config.output) / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="not readable as a checkpoint"):
        CodecTrainer(dataclasses.replace(config, updates_per_epoch=1, resume=True))


def test_a_finished_run_goes_on_with_more_epochs(config, place):
    """With a constant rate it is to the bit the longer run from the start, though it was finished in between."""
    options = dataclasses.replace(config, updates_per_epoch=2, weight_average=0.9, validation=str(place / "audio"))
    run(dataclasses.replace(options, epochs=3, output=f"{config.output}_long"))
    run(options)
    run(dataclasses.replace(options, epochs=2, resume=True))
    run(dataclasses.replace(options, updates_per_epoch=6, resume=True))
    assert_equal(state_of(dataclasses.replace(options, output=f"{config.output}_long")), state_of(options))
    for shorter, message in (
        ({"epochs": 2}, "epochs is 2, allowed: at least 3, for 6 updates are done"),
        ({"updates_per_epoch": 5}, "updates_per_epoch is 5, allowed: at least 6, for 6 updates are done"),
    ):
        with pytest.raises(ValueError, match=message):
            CodecTrainer(dataclasses.replace(options, resume=True, **shorter))
    with pytest.raises(ValueError, match="learning_rate is 0.1, allowed: 0.0003"):
        CodecTrainer(dataclasses.replace(options, resume=True, extend=True, epochs=4, learning_rate=0.1))


def test_a_longer_schedule_is_asked_for_by_name(config, caplog):
    options = dataclasses.replace(config, updates_per_epoch=2, decay_to=0.5, warmup_updates=1)
    run(options)
    longer = dataclasses.replace(options, epochs=2, resume=True)
    with pytest.raises(ValueError, match="epochs is 2, allowed: 1, as in the run .* learning rate falls .* --extend"):
        CodecTrainer(longer)
    with caplog.at_level("WARNING"):
        trainer = run(dataclasses.replace(longer, extend=True))
    assert (
        "extended from 2 to 4 updates" in caplog.text
        and "at update 2 it is 0.75 of its full value, where" in caplog.text
    )
    assert trainer.update == 4
    run(longer)  # from now on that is its length
    with pytest.raises(ValueError, match="extend is True, allowed: no without resume"):
        dataclasses.replace(longer, resume=False, extend=True)


def test_resuming_on_other_files_is_refused(config, tmp_path):
    """The same folder with another file would give other examples without a word."""
    folder = shutil.copytree(Path(config.corpora[0].source), tmp_path / "audio")
    options = dataclasses.replace(config, corpora=[{"name": "a", "source": str(folder)}])
    run(options)
    (folder / "0.wav").unlink()
    with pytest.raises(ValueError, match="corpus 'a' holds other files now"):
        CodecTrainer(dataclasses.replace(options, resume=True))


def test_resuming_needs_the_checkpoint_alone_and_lists_files_once(config, tmp_path):
    folder = shutil.copytree(Path(config.corpora[0].source), tmp_path / "audio")
    (folder / "empty.wav").write_bytes(b"")
    options = dataclasses.replace(
        config, corpora=[{"name": "a", "source": str(folder)}], model=None, architecture="c16", weight_average=0.5
    )
    trainer = CodecTrainer(dataclasses.replace(options, max_minutes=1e-6))
    assert trainer.train() == "stopped" and trainer.update == 1
    shutil.rmtree(trainer.folder / "model")
    again = CodecTrainer(dataclasses.replace(options, resume=True, max_minutes=1e-6))
    assert_equal(trainer.codec.state_dict(), again.codec.state_dict())
    assert_equal(trainer.averages.state, again.averages.state)
    assert trainer.averages.state.keys() == trainer.model.state_dict().keys()
    assert len((trainer.folder / "skipped_files.jsonl").read_text().splitlines()) == 1


def test_a_run_is_not_written_over(config):
    run(config)
    with pytest.raises(FileExistsError, match="--resume"):
        CodecTrainer(config)


def command_of(config: TrainingConfig, *more: str) -> list[str]:
    recipe = Path(config.output).with_suffix(".json")
    recipe.write_text(json.dumps(dataclasses.asdict(config)))
    return [sys.executable, "-m", "modeling_encodec", "train", str(recipe), *more]


def wait_for(condition, process: subprocess.Popen) -> None:
    limit = time.monotonic() + 240
    while not condition():
        assert process.poll() is None and time.monotonic() < limit, "the run ended or hung"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def hundred(place, tmp_path_factory) -> TrainingConfig:
    """A hundred updates without a stop, with averaged weights, workers, and all losses."""
    output = tmp_path_factory.mktemp("hundred") / "out"
    config = TrainingConfig(
        model=str(place / "24khz"),
        corpora=[{"name": "sweeps", "source": str(place / "audio")}],
        segment_seconds=0.1, epochs=2, updates_per_epoch=50, batch_size=2, discriminator_filters=2, workers=1,
        trackers=[], device="cpu", output=str(output), index=str(place / "index"), log_every=7, save_every=50,
        weight_average=0.9, adversarial_start=20, discriminator_warmup=10, decay_to=0.2,
    )  # fmt: skip
    subprocess.run(command_of(config), check=True, env=ENVIRONMENT, timeout=400)
    return config


def test_killed_and_resumed_is_uninterrupted(hundred, tmp_path):
    """50 updates, kill -9 somewhere after, resume: equal to the bit to 100 in one go, the log too."""
    config = dataclasses.replace(hundred, output=str(tmp_path / "out"))
    process = subprocess.Popen(command_of(config), env=ENVIRONMENT, start_new_session=True)
    try:
        log = Path(config.output) / "log.jsonl"
        wait_for(lambda: log.exists() and '"update": 56' in log.read_text(), process)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert state_of(config)["update"] == 50
    subprocess.run(command_of(config, "--resume"), check=True, env=ENVIRONMENT, timeout=400)
    assert_equal(state_of(hundred), state_of(config))
    assert log_of(hundred) == log_of(config)


def test_sigterm_leaves_a_resumable_checkpoint(hundred, tmp_path):
    config = dataclasses.replace(hundred, output=str(tmp_path / "out"))
    process = subprocess.Popen(command_of(config), env=ENVIRONMENT, start_new_session=True, stderr=subprocess.PIPE)
    log = Path(config.output) / "log.jsonl"
    wait_for(lambda: log.exists() and '"update": 14' in log.read_text(), process)
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 0, error
    assert "stopped after" in error
    stopped = state_of(config)["update"]
    assert 14 <= stopped < 100
    subprocess.run(command_of(config, "--resume"), check=True, env=ENVIRONMENT, timeout=400)
    assert_equal(state_of(hundred), state_of(config))
    assert log_of(hundred) == log_of(config)


def test_max_minutes_stops_cleanly(config):
    options = dataclasses.replace(config, updates_per_epoch=100_000, max_minutes=0.02)
    trainer = CodecTrainer(options)
    assert trainer.train() == "stopped"
    assert 0 < state_of(options)["update"] == trainer.update < 100_000
    again = CodecTrainer(dataclasses.replace(options, resume=True))
    assert again.update == trainer.update and again.train() == "stopped"
    assert again.update > trainer.update


def test_the_time_limit_counts_what_saving_takes(config, monkeypatch):
    """A save takes 40 s, an update 10, by a clock of the test's: two minutes are over when the last save is done."""
    clock = types.SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(modeling_encodec.training.run, "time", clock)
    trainer = CodecTrainer(dataclasses.replace(config, updates_per_epoch=100_000, max_minutes=2.0))

    def slowed(work, seconds):
        def slow(*given):
            clock.now += seconds
            return work(*given)

        return slow

    trainer.save, trainer.one_update = slowed(trainer.save, 40), slowed(trainer.one_update, 10)
    assert trainer.train() == "stopped"
    assert trainer.update == 5 and clock.now == 40 + 5 * 10 + 40


def test_checkpoints_by_the_clock(config, monkeypatch):
    """Each is one to resume from, to the bit."""
    options = dataclasses.replace(config, save_minutes=1e-9, updates_per_epoch=3)
    trainer, saved = CodecTrainer(options), []
    save = trainer.save
    trainer.save = lambda: (save(), saved.append(trainer.update))
    trainer.train()
    assert saved == [0, 1, 2, 3]
    whole = state_of(options)
    stopped = dataclasses.replace(options, output=f"{config.output}_stopped", max_minutes=1e-6)
    assert CodecTrainer(stopped).train() == "stopped"
    run(dataclasses.replace(stopped, resume=True, max_minutes=None))
    assert_equal(state_of(stopped), whole)


# ---- several processes -------------------------------------------------------------------------------------------


def train_in(processes: int, config: TrainingConfig) -> list[dict]:
    """The state that each process ends with."""
    recipe = Path(config.output).with_suffix(".json")
    recipe.write_text(json.dumps(dataclasses.asdict(config)))
    script = str(Path(__file__).parent / "training_run.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    subprocess.run([*launch, script, str(recipe)], check=True, env=ENVIRONMENT, timeout=400)
    return [torch.load(Path(config.output) / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


def test_two_processes_are_equal_and_like_one(config, place, tmp_path):
    """After 50 updates on different data both processes have the same bits; their losses are those of one process."""
    options = dataclasses.replace(
        config, updates_per_epoch=50, batch_size=4, discriminator_filters=2, validation=str(place / "audio"),
        restart_codebooks_from=0, output=str(tmp_path / "two"),
    )  # fmt: skip
    first, second = train_in(2, options)
    assert_equal(first, second)
    alone = dataclasses.replace(options, output=str(tmp_path / "one"))
    train_in(1, alone)
    for ours, single in zip(log_of(options)[:5], log_of(alone)[:5]):
        for name in single:
            if name.startswith(("train/", "share/")):
                # Rounding that differs between the two grows with every update, and most in the gradient's norm.
                near = 0.05 if name == "train/gradient_norm" else 0.02
                assert ours[name] == pytest.approx(single[name], rel=near, abs=1e-4), (single["update"], name)


def test_accelerate_launch_runs_it(config):
    options = dataclasses.replace(config, updates_per_epoch=2)
    recipe = Path(options.output).with_suffix(".json")
    recipe.write_text(json.dumps(dataclasses.asdict(options)))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    subprocess.run([*launch, "-m", "modeling_encodec", "train", str(recipe)], check=True, env=ENVIRONMENT, timeout=300)
    assert state_of(options)["update"] == 2
