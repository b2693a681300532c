"""The folder of a training run: one run at a time, whole whenever the run is killed, and left when it is deleted."""

import dataclasses
import os
import shutil
import signal
from pathlib import Path

import pytest
from fault_steps import Killed, killed_at
from lm_runs import (
    fixture_config,  # noqa: F401
    fixture_place,  # noqa: F401
    run,
    run_script,
    write_recipe,
)
from run_results import (
    assert_equal,
    fresh_accelerate,  # noqa: F401
    log_of,
    state_of,
)
from safetensors.torch import load_file

from modeling_encodec.cli import main
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.training.lm_configuration import LMTrainingConfig
from modeling_encodec.training.lm_trainer import LMTrainer


def model_of(config) -> dict:
    return load_file(Path(config.output) / "model" / "model.safetensors")


def names(config) -> list[str]:
    return sorted(path.name for path in Path(config.output).iterdir())


def at_update(trainer: LMTrainer, number: int, act) -> LMTrainer:
    """Call `act` when `trainer` is to do update `number`."""
    one_update = trainer.one_update

    def acting(batch: dict) -> dict:
        if trainer.update == number:
            act()
        return one_update(batch)

    trainer.one_update = acting
    return trainer


# ---- one run at a time -------------------------------------------------------------------------------------------


def test_a_second_run_is_refused(config):
    """As a new one, resumed, and by the command with one line; the first is what it is alone."""
    alone = dataclasses.replace(config, output=f"{config.output}_alone", save_every=2)
    run(alone)
    refused = []

    def try_again():
        for again in (config, dataclasses.replace(config, resume=True)):
            with pytest.raises(ValueError, match="another process is at work there"):
                LMTrainer(again)
        refused.append(main(["train-lm", write_recipe(config), "--resume"]))

    first = dataclasses.replace(config, save_every=2)
    assert at_update(LMTrainer(first), 3, try_again).train() == "finished" and refused == [2]
    assert_equal(state_of(alone), state_of(config))
    assert log_of(alone) == log_of(config)


def test_a_run_that_another_went_on_with_is_refused(config):
    """Both took up the same checkpoint; the second to begin would train the other's updates again."""
    config = dataclasses.replace(config, decay_to=1.0)
    run(dataclasses.replace(config, updates_per_epoch=2))
    longer = dataclasses.replace(config, resume=True)
    first, second = LMTrainer(longer), LMTrainer(longer)
    assert first.train() == "finished"
    with pytest.raises(ValueError, match="another process has trained there meanwhile"):
        second.train()
    assert state_of(config)["update"] == 6
    new = dataclasses.replace(config, output=f"{config.output}_new")
    first, second = LMTrainer(new), LMTrainer(new)
    first.train()
    with pytest.raises(ValueError, match="another process has trained there meanwhile"):
        second.train()


def test_a_run_in_pieces_by_one_trainer(config):
    """`train` may be called again where it stopped; the log keeps what was."""
    whole = dataclasses.replace(config, output=f"{config.output}_whole")
    run(whole)
    trainer = LMTrainer(config)
    one_update = trainer.one_update
    at_update(trainer, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert trainer.train() == "stopped" and trainer.update == 3
    trainer.one_update = one_update
    assert trainer.train() == "finished"
    assert_equal(state_of(whole), state_of(config))
    assert log_of(whole) == log_of(config)


@pytest.mark.slow
def test_the_processes_of_one_run_share_the_folder(config):
    """And are all refused where another run is at work."""
    options = dataclasses.replace(config, save_every=2)
    assert run_script(options, processes=2) == 0
    other = dataclasses.replace(config, output=f"{config.output}_other")
    codes = []
    at_update(LMTrainer(other), 1, lambda: codes.append(run_script(other, processes=2))).train()
    assert codes == [1] and state_of(other)["update"] == 6


# ---- stopped -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_saves_and_the_run_goes_on_equal(config, name):
    run(dataclasses.replace(config, output=f"{config.output}_whole"))
    trainer = at_update(LMTrainer(config), 2, lambda: os.kill(os.getpid(), getattr(signal, name)))
    assert trainer.train() == "stopped" and state_of(config)["update"] == 3
    run(dataclasses.replace(config, resume=True))
    whole = dataclasses.replace(config, output=f"{config.output}_whole")
    assert_equal(state_of(whole), state_of(config))
    assert_equal(model_of(whole), model_of(config))
    assert log_of(whole) == log_of(config)


def test_nohup_goes_on(config):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = at_update(LMTrainer(config), 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert trainer.train() == "finished"
    finally:
        signal.signal(signal.SIGHUP, before)


def steps_of_a_run(config: LMTrainingConfig) -> list[str]:
    with killed_at(1 << 30) as made:
        run(config)
    return made


def check_killed_at(step: int, config: LMTrainingConfig, whole: LMTrainingConfig) -> None:
    """Killed at that step, what is there can be loaded; then begun again or resumed it ends as if never stopped."""
    with pytest.raises(Killed), killed_at(step):
        LMTrainer(config).train()
    folder, begun = Path(config.output), False
    if (folder / "checkpoint.pt").exists():
        begun = state_of(config)["update"] >= 0
    if (folder / "model").exists():
        EncodecLM.from_pretrained(folder / "model")
    else:
        assert not begun or state_of(config)["update"] == 0
    run(dataclasses.replace(config, resume=begun))
    assert names(config) == names(whole)
    assert_equal(state_of(whole), state_of(config))
    assert_equal(model_of(whole), model_of(config))
    assert log_of(whole) == log_of(config)


def test_killed_where_the_folder_changes_and_resumed(config, tmp_path):
    """At every step that gives something its name in the saves after the first update and after the third."""
    options = dataclasses.replace(config, save_every=1, updates_per_epoch=2, log_every=1, calibration_sequences=2)
    whole = dataclasses.replace(options, output=str(tmp_path / "whole"))
    made = steps_of_a_run(whole)
    numbers = [number for number, name in enumerate(made, 1) if name in ("exchange", "rename", "replace")]
    assert len(numbers) >= 6 and "exchange" in made
    for step in (*numbers, numbers[-1] + 1):
        check_killed_at(step, dataclasses.replace(options, output=str(tmp_path / f"killed{step}")), whole)


@pytest.mark.slow
def test_killed_at_every_step_and_resumed(config, tmp_path):
    options = dataclasses.replace(config, save_every=1, updates_per_epoch=2, log_every=1, calibration_sequences=2)
    whole = dataclasses.replace(options, output=str(tmp_path / "whole"))
    for step in range(1, len(steps_of_a_run(whole)) + 1):
        check_killed_at(step, dataclasses.replace(options, output=str(tmp_path / f"killed{step}")), whole)


@pytest.mark.slow
def test_killed_for_good_and_resumed_at_once(config, tmp_path):
    """By SIGKILL, of the main process alone: its reader, which outlives it for a moment, does not keep the lock."""
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"), workers=1, save_every=1)
    run(whole)
    killed = dataclasses.replace(whole, output=str(tmp_path / "killed"))
    for update in (1, 3, 5):
        assert run_script(killed, str(update)) == -signal.SIGKILL
        killed = dataclasses.replace(killed, resume=True)
    run(killed)
    assert_equal(state_of(whole), state_of(killed))
    assert_equal(model_of(whole), model_of(killed))
    assert log_of(whole) == log_of(killed)


def test_leftovers_of_kills_are_cleared_by_the_next_start(config):
    options = dataclasses.replace(config, updates_per_epoch=2)
    run(options)
    before = names(options)
    folder = Path(options.output)
    for name in (".checkpoint.partial.pt", ".log.partial-0123abcd.jsonl"):
        (folder / name).write_text("half")
    (folder / ".model.partial").mkdir()
    os.rename(folder / "model", folder / ".model.replaced")  # as where two folders cannot be swapped
    (folder / "listening").mkdir()
    (folder / "listening" / ".clip.partial.wav").write_text("half")
    (folder / ".mine").write_text("a user's")
    trainer = LMTrainer(dataclasses.replace(options, resume=True))
    assert names(options) == sorted([*before, "listening", ".mine"]) and not list((folder / "listening").iterdir())
    EncodecLM.from_pretrained(folder / "model")
    trainer.train()


# ---- deleted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_is_deleted_ends_the_run(config, again, capsys, monkeypatch):
    """With one line; and nothing is written where it was, nor into what has its name now."""
    folder = Path(config.output)
    one_update = LMTrainer.one_update

    def deleting(trainer, batch: dict) -> dict:
        if trainer.update == 2:
            shutil.rmtree(folder)
            if again:
                folder.mkdir()
        return one_update(trainer, batch)

    monkeypatch.setattr(LMTrainer, "one_update", deleting)
    assert main(["train-lm", write_recipe(config)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("modeling-encodec")]
    assert lines == [f"modeling-encodec: {folder}: deleted or replaced while the run was at work there"]
    assert list(folder.iterdir()) == [] if again else not folder.exists()


# ---- full --------------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_last_checkpoint(config):
    """A limit on a file's size stands for it, after two updates; the run then goes on from there."""
    resource = pytest.importorskip("resource")
    options = dataclasses.replace(config, save_every=2)
    run(dataclasses.replace(options, output=f"{config.output}_whole"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = at_update(LMTrainer(options), 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1])))
    try:
        with pytest.raises(OSError, match="File too large: '.*/out/checkpoint.pt'"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert state_of(options)["update"] == 2
    assert names(options) == [".lock", "checkpoint.pt", "log.jsonl", "model"]
    run(dataclasses.replace(options, resume=True))
    assert_equal(state_of(dataclasses.replace(options, output=f"{config.output}_whole")), state_of(options))


def test_the_log_of_a_full_disk_names_itself(config, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    trainer = LMTrainer(config)
    at_update(trainer, 1, lambda: (os.unlink(trainer.folder / "log.jsonl"), make_full(trainer.folder / "log.jsonl")))
    with pytest.raises(OSError, match="No space left on device: '.*log.jsonl'"):
        trainer.train()


def make_full(path: Path) -> None:
    path.symlink_to("/dev/full")
