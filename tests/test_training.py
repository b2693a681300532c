"""Training runs: they learn, and say what is wrong."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from accelerate.state import AcceleratorState
from codec_runs import (
    fixture_config,  # noqa: F401
    fixture_place,  # noqa: F401
    run,
)
from run_results import (
    assert_equal,
    fresh_accelerate,  # noqa: F401
    log_of,
)

from modeling_encodec import cli
from modeling_encodec.evaluation.metrics import si_snr
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.processors.feature_extraction_encodec import EncodecFeatureExtractor
from modeling_encodec.training import run as run_module
from modeling_encodec.training.adversary import Adversary
from modeling_encodec.training.checkpoint import load_discriminators
from modeling_encodec.training.codec_update import CodecUpdate, NonFiniteLoss, choices_of
from modeling_encodec.training.run import make_accelerator
from modeling_encodec.training.trainer import CodecTrainer, build_model


GOLDEN = Path(__file__).parent / "golden" / "training.json"


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


def test_discriminators_judge_a_stretch(config, monkeypatch):
    """The same samples of both signals, of the length asked for, at a place that chance and the seed decide."""
    options = dataclasses.replace(config, discriminator_seconds=0.1, segment_seconds=0.2)
    seen, judge = [], Adversary.losses

    def losses(self, decoded, target, **options):
        seen.append(target)
        assert decoded.shape == target.shape
        return judge(self, decoded, target, **options)

    monkeypatch.setattr(Adversary, "losses", losses)
    codec = CodecUpdate(build_model(options), options, make_accelerator(options))
    audio = torch.randn(4, 1, 4800, generator=torch.Generator().manual_seed(0)) * 0.1
    for update in range(20):
        codec.run(audio, update)
    windows = audio.unfold(2, 2400, 1)
    places = [(windows == part[:, :, None]).all(3).all(0).all(0).nonzero().item() for part in seen]
    assert len(places) == 20 and max(places) - min(places) > 1200 and max(places) <= 2400


def test_gradient_norms_are_measured_now_and_then(config, tmp_path):
    """Between measurements the factors stay; a loss that joins is measured at once."""
    options = dataclasses.replace(
        config, balancer_every=4, adversarial_start=2, updates_per_epoch=8, output=str(tmp_path / "now and then")
    )
    codec = CodecUpdate(build_model(options), options, make_accelerator(options))
    audio = torch.randn(4, 1, 4800, generator=torch.Generator().manual_seed(0)) * 0.1
    sums = []
    for update in range(8):
        codec.run(audio, update)
        sums.append({name: float(value) for name, value in codec.balancer.sums.items()})
    changed = [update for update in range(1, 8) if sums[update] != sums[update - 1]]
    assert changed == [2, 4] and set(sums[1]) == {"waveform", "mel"} and len(sums[2]) == 4


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
    monkeypatch.setattr(run_module, "push_folder", lambda *arguments, message: pushed.append(arguments))
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
