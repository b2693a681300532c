"""Training runs: they learn, go on where they stopped, are the same on several processes, and say what is wrong."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from accelerate.state import AcceleratorState
from conftest import make_model

from modeling_encodec import cli
from modeling_encodec.configuration_encodec import EncodecConfig
from modeling_encodec.evaluation.metrics import si_snr
from modeling_encodec.modeling_encodec import EncodecModel
from modeling_encodec.processors.feature_extraction_encodec import EncodecFeatureExtractor
from modeling_encodec.training import run as run_module
from modeling_encodec.training.checkpoint import load_discriminators
from modeling_encodec.training.codec_update import CodecUpdate, NonFiniteLoss, choices_of
from modeling_encodec.training.configuration import TrainingConfig
from modeling_encodec.training.run import make_accelerator
from modeling_encodec.training.trainer import CodecTrainer, build_model


GOLDEN = Path(__file__).parent / "golden" / "training.json"
SMALL = {"num_filters": 4, "hidden_size": 16, "num_lstm_layers": 1, "codebook_size": 64}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with audio/ (six sweeps in noise), small models for 24 kHz and 48 kHz, and a parent to fine-tune."""
    folder = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(0)
    time_axis = np.arange(24000) / 24000
    (folder / "audio").mkdir()
    for number in range(6):
        tone = 0.3 * np.sin(2 * np.pi * (200 + 150 * number) * time_axis * (1 + 0.1 * time_axis))
        soundfile.write(folder / "audio" / f"{number}.wav", tone + 0.03 * rng.standard_normal(24000), 24000)
    make_model(EncodecConfig.preset_24khz(**SMALL, target_bandwidths=[0.9, 1.8])).save_pretrained(folder / "24khz")
    make_model(EncodecConfig.preset_48khz(**SMALL, target_bandwidths=[1.8, 3.6])).save_pretrained(folder / "48khz")
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps the first number format of a process, the tests use several."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def config(place, tmp_path) -> TrainingConfig:
    """Six updates of a small model."""
    return TrainingConfig(
        model=str(place / "24khz"),
        corpora=[{"name": "sweeps", "source": str(place / "audio")}],
        segment_seconds=0.1,
        epochs=1,
        updates_per_epoch=6,
        batch_size=4,
        discriminator_filters=4,
        workers=0,
        trackers=[],
        device="cpu",
        output=str(tmp_path / "out"),
        index=str(place / "index"),
        log_every=1,
    )


def run(config: TrainingConfig) -> CodecTrainer:
    trainer = CodecTrainer(config)
    assert trainer.train() == "finished"
    return trainer


def log_of(config: TrainingConfig) -> list[dict]:
    return [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]


def assert_equal(first, second, path=""):
    """Nested states are equal to the bit."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), path
        for number, (one, other) in enumerate(zip(first, second)):
            assert_equal(one, other, f"{path}/{number}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    else:
        assert first == second, path


# ---- it learns ---------------------------------------------------------------------------------------------------


def test_one_batch_overfits(place, tmp_path, config):
    """A codec with wide codebooks learns one batch of tones to more than 10 dB in 250 updates."""
    torch.manual_seed(0)
    settings = EncodecConfig.preset_24khz(
        num_filters=8, hidden_size=16, num_lstm_layers=1, codebook_size=64, target_bandwidths=[3.6]
    )
    model = EncodecModel(settings).train()
    options = dataclasses.replace(
        config, waveform_weight=1.0, adversarial_weight=0.0, feature_weight=0.0, learning_rate=3e-3, beta1=0.9
    )
    codec = CodecUpdate(model, options, make_accelerator(options))
    phase = torch.arange(4800) / 24000
    audio = torch.stack([0.3 * torch.sin(2 * torch.pi * pitch * phase) for pitch in (220, 330, 440, 550)])[:, None]
    codec.start_codebooks([audio])
    for update in range(250):
        codec.run(audio, update)
    with torch.no_grad():
        decoded = model.eval()(audio).audio_values
    assert si_snr(audio, decoded).mean() > 10


def test_golden_trajectory(config):
    """Ten updates with every loss, as they came out when the file was written; it holds the options and the losses."""
    golden = json.loads(GOLDEN.read_text())
    options = dataclasses.replace(config, **golden["config"])
    run(options)
    for line, expected in zip(log_of(options), golden["losses"], strict=True):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=5e-3, abs=1e-5), (line["update"], name)


def test_48khz_stereo_and_bf16(place, config):
    options = dataclasses.replace(config, model=str(place / "48khz"), mixed_precision="bf16", segment_seconds=0.2)
    run(options)
    model = EncodecModel.from_pretrained(Path(options.output) / "model")
    assert model.config.audio_channels == 2 and model.dtype == torch.float32
    assert all(np.isfinite(line["train/mel"]) for line in log_of(options))


def test_bf16_is_close_to_float32(config, tmp_path):
    run(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    half = dataclasses.replace(config, mixed_precision="bf16", output=str(tmp_path / "half"))
    run(half)
    for ours, exact in zip(log_of(half)[:3], log_of(config)[:3]):
        for name in ("train/mel", "train/waveform", "train/adversarial"):
            assert ours[name] == pytest.approx(exact[name], rel=0.05)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_is_close_to_eager(config, tmp_path):
    short = dataclasses.replace(config, updates_per_epoch=2)
    run(short)
    compiled = dataclasses.replace(short, compile=True, output=str(tmp_path / "compiled"))
    run(compiled)
    for ours, exact in zip(log_of(compiled), log_of(short)):
        assert ours["train/mel"] == pytest.approx(exact["train/mel"], rel=1e-3)


def test_accumulated_parts_are_the_whole_batch(config, tmp_path):
    """Without the balancer, whose norms are measured on the first part, sums are the same but for rounding."""
    whole = dataclasses.replace(config, balancer=False)
    parts = dataclasses.replace(whole, accumulation_steps=4, output=str(tmp_path / "parts"))
    a, b = run(whole), run(parts)
    for ours, exact in zip(log_of(parts), log_of(whole)):
        for name in ("train/mel", "train/feature", "train/discriminator", "train/commitment"):
            assert ours[name] == pytest.approx(exact[name], rel=1e-3), name
    for one, other in zip(a.model.state_dict().values(), b.model.state_dict().values()):
        assert torch.allclose(one, other, rtol=1e-2, atol=2e-3)


def test_choices_follow_seed_and_update(config):
    options = dataclasses.replace(config, bandwidths=[0.9, 1.8])
    drawn = [choices_of(options, [0.9, 1.8], update) for update in range(3000)]
    assert drawn == [choices_of(options, [0.9, 1.8], update) for update in range(3000)]
    assert np.mean([choice.discriminator_learns for choice in drawn]) == pytest.approx(2 / 3, abs=0.03)
    assert np.mean([choice.bandwidth == 0.9 for choice in drawn]) == pytest.approx(1 / 2, abs=0.03)


def test_discriminators_join_when_told(config):
    options = dataclasses.replace(config, adversarial_start=4, discriminator_warmup=2, discriminator_chance=1.0)
    trainer = run(options)
    lines = log_of(options)
    assert ["train/discriminator" in line for line in lines] == [False, False, True, True, True, True]
    assert ["share/adversarial" in line for line in lines] == [False, False, False, False, True, True]
    assert len(trainer.codec.adversaries) == 2  # one for each bandwidth


def test_rates_rise_and_fall(config):
    options = dataclasses.replace(config, warmup_updates=2, decay_to=0.5, updates_per_epoch=100)
    codec = CodecUpdate(build_model(options), options, make_accelerator(options))
    rates = []
    for update in (0, 1, 50, 99):
        codec._set_rates(update)
        rates.append(codec.optimizer.param_groups[0]["lr"] / options.learning_rate)
    assert rates == pytest.approx([0.5, 1.0, 0.75, 0.5], abs=1e-3)


# ---- what it leaves ----------------------------------------------------------------------------------------------


def test_saved_model_is_a_normal_folder(config, place):
    options = dataclasses.replace(
        config, validation=str(place / "audio"), listening=str(place / "audio"), listening_clips=1, validate_every=3,
        trackers=["tensorboard"], weight_average=0.5,
    )  # fmt: skip
    trainer = run(options)
    folder = trainer.folder / "model"
    ours, stock = EncodecModel.from_pretrained(folder).eval(), transformers.EncodecModel.from_pretrained(folder).eval()
    audio = torch.randn(1, 1, 4800, generator=torch.Generator().manual_seed(0)) * 0.1
    assert torch.equal(ours.encode(audio, bandwidth=1.8)[0], stock.encode(audio, bandwidth=1.8)[0])
    assert EncodecFeatureExtractor.from_pretrained(folder).sampling_rate == 24000
    assert_equal(dict(ours.state_dict()), trainer.averages.state)
    assert set(load_discriminators(folder / "discriminators.safetensors")) == {"0.9", "1.8"}
    scores = [line for line in log_of(options) if "si_snr/0.9" in line]
    assert [line["update"] for line in scores] == [3, 6] and "mel_distance/1.8" in scores[0]
    assert (trainer.folder / "listening" / "update_0000006" / "spectrograms.png").exists()
    assert list(trainer.folder.rglob("events.out.tfevents*"))
    assert trainer.model.training and not torch.equal(
        trainer.model.decoder.layers[0].conv.bias, trainer.averages.state["decoder.layers.0.conv.bias"]
    )


def test_discriminators_go_on_with_their_codec(config, tmp_path):
    first = run(config)
    again = dataclasses.replace(config, model=str(first.folder / "model"), output=str(tmp_path / "again"))
    with pytest.raises(ValueError, match="discriminator_filters is 5, allowed: 4, as in .*discriminators.safetensors"):
        CodecTrainer(dataclasses.replace(again, discriminator_filters=5))
    second = CodecTrainer(again)
    for name, adversary in first.codec.adversaries.items():
        assert_equal(dict(adversary.network.state_dict()), dict(second.codec.adversaries[name].network.state_dict()))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_frozen_part_and_codes_stay(part, config, place):
    trainer = run(dataclasses.replace(config, freeze=part))
    parent = EncodecModel.from_pretrained(place / "24khz").eval()
    child = EncodecModel.from_pretrained(trainer.folder / "model").eval()
    other = {"encoder": "decoder", "decoder": "encoder"}[part]
    for name, tensor in parent.state_dict().items():
        kept = name.startswith((part, "quantizer"))
        if kept or name.endswith("original1"):
            assert torch.equal(tensor, child.state_dict()[name]) == kept, name
    audio = torch.randn(2, 1, 9600, generator=torch.Generator().manual_seed(0)) * 0.1
    if part == "encoder":
        assert torch.equal(parent.encode(audio, bandwidth=1.8)[0], child.encode(audio, bandwidth=1.8)[0])
    assert not torch.equal(getattr(parent, other).layers[0].conv.bias, getattr(child, other).layers[0].conv.bias)


def test_bad_files_are_listed_and_never_fatal(config, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    soundfile.write(folder / "good.wav", 0.1 * np.random.default_rng(0).standard_normal(24000), 24000)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "corrupt.flac").write_bytes(b"fLaC and then nothing of the kind" * 20)
    options = dataclasses.replace(config, corpora=[{"name": "mixed", "source": str(folder)}])
    run(options)
    lines = [json.loads(line) for line in (Path(options.output) / "skipped_files.jsonl").read_text().splitlines()]
    assert {Path(line["file"]).name for line in lines} == {"empty.wav", "corrupt.flac"}
    assert all(line["reason"] for line in lines)


def test_pushes_the_finished_model(config, monkeypatch):
    pushed = []
    monkeypatch.setattr(run_module, "make_repository", pushed.append)
    monkeypatch.setattr(run_module, "push", lambda folder, repository: pushed.append((folder, repository)))
    trainer = run(dataclasses.replace(config, push_to="someone/codec"))
    assert pushed == ["someone/codec", (trainer.folder / "model", "someone/codec")]


# ---- what goes wrong ---------------------------------------------------------------------------------------------


def test_non_finite_loss_stops_with_the_batch_saved(config, monkeypatch):
    trainer = CodecTrainer(config)
    before = {name: tensor.clone() for name, tensor in trainer.codec.state_dict()["model"].items()}
    spoiled = trainer.codec.mel_loss.forward
    monkeypatch.setattr(trainer.codec.mel_loss, "forward", lambda *audio: spoiled(*audio) * float("nan"))
    with pytest.raises(NonFiniteLoss, match="update 0: losses are .*mel nan.*nonfinite_0_0.safetensors"):
        trainer.train()
    assert_equal(before, dict(trainer.model.state_dict()))
    assert (trainer.folder / "nonfinite_0_0.safetensors").exists()


def test_warnings_are_named(config, caplog):
    """A silent decoder, and codebooks that have collapsed."""
    trainer = CodecTrainer(dataclasses.replace(config, learning_rate=1e-9))
    with torch.no_grad():
        last = trainer.model.decoder.layers[-1].conv
        last.parametrizations.weight.original0.zero_()
        last.bias.zero_()
        codebook = trainer.model.quantizer.layers[1].codebook
        codebook.start(codebook.embed + 1000 * (torch.arange(64)[:, None] > 0), codebook.cluster_size)
    trainer.config.dead_code_threshold = 0
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "silent_output" in caplog.text and "codebook_collapse: codebooks [1]" in caplog.text
    assert set(log_of(config)[0]["warnings"]) >= {"silent_output", "codebook_collapse"}


def test_options_that_cannot_be(config, tmp_path):
    for change, message in (
        ({"corpora": []}, "corpora is \\[\\], allowed"),
        ({"batch_size": 5, "accumulation_steps": 2}, "batch_size is 5, allowed: a multiple of 2"),
        ({"bandwidths": [6.0]}, "bandwidths are \\[6.0\\], allowed: \\[0.9, 1.8\\]"),
        ({"segment_seconds": 0.01}, "segment_seconds is 0.01, allowed: at least 0.085"),
        ({"validation": str(tmp_path / "none")}, "none"),
        ({"freeze": "encoder", "restart_codebooks_from": 1}, "restart_codebooks_from is 1, allowed: none when"),
        ({"freeze": "decoder", "model": None}, "freeze is 'decoder', allowed: none for a new model"),
        ({"restart_codebooks_from": 4}, "restart_codebooks_from is 4, allowed: less than the model's 4 codebooks"),
        ({"max_gradient_norm": -1.0}, "max_gradient_norm is -1.0, allowed: none or a finite number above 0"),
        ({"max_minutes": float("nan")}, "max_minutes is nan, allowed: none or a finite number above 0"),
        ({"waveform_weight": 0.0, "mel_weight": 0.0}, "mel_weight is 0.0, allowed: above 0"),
        ({"trackers": ["nonesuch"]}, "trackers are \\['nonesuch'\\], allowed: those installed"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            CodecTrainer(dataclasses.replace(config, **change)).train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "corpora is []"),
        (["nonesuch"], "nonesuch: no such recipe, allowed: a file, c16_debian"),
        (["--data", "speech"], "data is 'speech', allowed: speech=…"),
        (["--data", "speech=/nonesuch"], "/nonesuch: no such folder, manifest or dataset"),
        (["--data", "speech=.", "--model", "/nonesuch"], "/nonesuch: no such model folder"),
        (["--data", "speech=.", "--architecture", "c16"], "corpus 'speech_0': no usable audio in '.'"),
        (["--data", "speech=.", "--resume"], "no checkpoint to resume from"),
        (["--data", "speech=.", "--mel-loss", "best"], "mel_loss is 'best', allowed: one of paper, audiocraft"),
    ],
)
def test_errors_of_the_command_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert not Path("encodec_training").exists() or not list(Path("encodec_training").glob("*.*"))


def test_command_trains_on_a_folder(place, tmp_path, capsys):
    """The command line, from a folder given by --data to a model folder."""
    output = tmp_path / "out"
    arguments = ["--data", f"speech={place / 'audio'}", "--model", str(place / "24khz"), "--output", str(output)]
    arguments += ["--listening", "none", "--trackers", "none"]
    numbers = ["--epochs", "1", "--updates-per-epoch", "2", "--batch-size", "2", "--segment-seconds", "0.1"]
    small = ["--discriminator-filters", "2", "--workers", "0", "--device", "cpu", "--bandwidths", "0.9"]
    assert cli.main(["train", *arguments, *numbers, *small]) == 0
    assert "finished after 2 of 2 updates" in capsys.readouterr().err
    assert json.loads((output / "model" / "training_config.json").read_text())["bandwidths"] == [0.9]


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


# ---- stopped and resumed -----------------------------------------------------------------------------------------


def command_of(config: TrainingConfig, *more: str) -> list[str]:
    recipe = Path(config.output).with_suffix(".json")
    recipe.write_text(json.dumps(dataclasses.asdict(config)))
    return [sys.executable, "-m", "modeling_encodec", "train", str(recipe), *more]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def state_of(config: TrainingConfig) -> dict:
    state = torch.load(Path(config.output) / "checkpoint.pt", weights_only=True)
    state.pop("config")
    return state


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
                assert ours[name] == pytest.approx(single[name], rel=0.02, abs=1e-4), (single["update"], name)


def test_accelerate_launch_runs_it(config):
    options = dataclasses.replace(config, updates_per_epoch=2)
    recipe = Path(options.output).with_suffix(".json")
    recipe.write_text(json.dumps(dataclasses.asdict(options)))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    subprocess.run([*launch, "-m", "modeling_encodec", "train", str(recipe)], check=True, env=ENVIRONMENT, timeout=300)
    assert state_of(options)["update"] == 2
