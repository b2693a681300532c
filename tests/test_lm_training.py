"""Training language models: they learn, and say what is wrong."""

import dataclasses
import json
import math
import shutil

import datasets
import numpy as np
import pytest
import soundfile
import torch
import transformers
from conftest import make_model
from lm_runs import (
    BANDWIDTHS,
    BOOKS,
    CODEC,
    SIZE,
    fixture_audio_config,  # noqa: F401
    fixture_config,  # noqa: F401
    fixture_place,  # noqa: F401
    patterns,
    record_losses,
    run,
    save_codes,
    sequences,
    write_recipe,
)
from run_results import (
    assert_equal,
    fresh_accelerate,  # noqa: F401
    log_of,
)
from safetensors.torch import load_file, save_file

from modeling_encodec import cli
from modeling_encodec.bitstream.compression import compress, decompress
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.fingerprints import codebook_fingerprint
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import IGNORED, EncodecLM
from modeling_encodec.training.lm_configuration import LMTrainingConfig
from modeling_encodec.training.lm_trainer import LMTrainer
from modeling_encodec.training.lm_update import choices_of
from modeling_encodec.training.optimization import NonFiniteLoss


# ---- it learns ---------------------------------------------------------------------------------------------------


def test_learns_patterns(config):
    """From 4 bits a code to near what the unknown first frame costs, 4 / 15 bits."""
    trainer = run(dataclasses.replace(config, updates_per_epoch=120, batch_size=16))
    assert trainer.losses[0]["loss"] > 3.9
    assert np.mean([losses["loss"] for losses in trainer.losses[-10:]]) < 1.5


def test_an_update_says_its_bits(config):
    """Loss, bits per second, saving and bits by codebook tell the same story."""
    trainer = run(dataclasses.replace(config, updates_per_epoch=12))
    books = {0.3: 1, 0.6: 2, 1.2: 4}
    assert {bandwidth for losses in trainer.losses for bandwidth in books if f"saving/{bandwidth:g}" in losses} == {
        *books
    }
    for losses in trainer.losses:
        (bandwidth,) = [bandwidth for bandwidth in books if f"saving/{bandwidth:g}" in losses]
        by_codebook = [value for name, value in losses.items() if name.startswith("codebook/")]
        assert len(by_codebook) == books[bandwidth]
        assert losses["loss"] == pytest.approx(np.mean(by_codebook))
        assert losses[f"bits_per_second/{bandwidth:g}"] == pytest.approx(losses["loss"] * books[bandwidth] * 75)
        assert losses[f"saving/{bandwidth:g}"] == pytest.approx(1 - losses["loss"] / 4)


def test_learns_from_audio_and_leaves_the_codec_as_it_was(audio_config, place):
    trainer = LMTrainer(audio_config)
    before = {name: tensor.clone() for name, tensor in trainer.codec.state_dict().items()}
    batch = next(iter(trainer.batches(0, workers=0)))
    codes = trainer._codes(batch)
    assert torch.equal(codes, trainer.codec.encode(batch["audio"], bandwidth=1.2).audio_codes[0])
    assert codes.shape == (4, BOOKS, 15)
    losses = record_losses(trainer)
    assert trainer.train() == "finished" and all(math.isfinite(one["loss"]) for one in losses)
    assert_equal(before, dict(trainer.codec.state_dict()))
    assert not trainer.codec.training and all(parameter.grad is None for parameter in trainer.codec.parameters())
    assert EncodecLM.from_pretrained(trainer.folder / "model").integer is not None


def test_mixed_precision_and_averages(config):
    options = dataclasses.replace(config, mixed_precision="bf16", weight_average=0.75)
    trainer = LMTrainer(options)
    expected, one_update = trainer.lm.head.bias.detach().clone(), trainer.one_update

    def averaged(batch: dict) -> dict:
        losses = one_update(batch)
        expected.lerp_(trainer.lm.head.bias.detach(), 0.25)
        return losses

    trainer.one_update = averaged
    trainer.train()
    saved = EncodecLM.from_pretrained(trainer.folder / "model")
    assert saved.dtype == torch.float32 and torch.allclose(saved.head.bias, expected, atol=1e-7)
    assert not torch.allclose(saved.head.bias, trainer.lm.head.bias, atol=1e-3)


def test_rates_rise_and_fall(config):
    trainer = LMTrainer(dataclasses.replace(config, warmup_updates=2, decay_to=0.5, updates_per_epoch=8))
    rates, one_update = [], trainer.one_update

    def noted(batch: dict) -> dict:
        losses = one_update(batch)
        rates.append(trainer.learner.optimizer.param_groups[0]["lr"] / 1e-2)
        return losses

    trainer.one_update = noted
    trainer.train()
    assert rates == pytest.approx(
        [0.5, *(0.75 + 0.25 * math.cos(math.pi * update / 8) for update in range(1, 8))], rel=0.02
    )
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_accumulated_parts_are_the_whole_batch(config, tmp_path):
    """Recordings of different lengths: the parts hold different numbers of labels."""
    place = save_codes(tmp_path / "codes", patterns(8, [2, 40, 3, 5, 9, 15, 4, 12]))
    whole = run(dataclasses.replace(config, codes=[place]))
    parts = run(dataclasses.replace(config, codes=[place], accumulation_steps=4, output=str(tmp_path / "parts")))
    for ours, exact in zip(parts.losses, whole.losses, strict=True):
        assert ours == pytest.approx(exact, rel=1e-5, abs=1e-6)


def test_choices_follow_seed_and_update(config):
    drawn = [choices_of(config, BANDWIDTHS, 7, update) for update in range(600)]
    again = [choices_of(config, BANDWIDTHS, 7, update) for update in range(600)]
    for one, other in zip(drawn, again):
        assert one.bandwidth == other.bandwidth and np.array_equal(one.positions, other.positions)
    for bandwidth in BANDWIDTHS:
        assert np.mean([choice.bandwidth == bandwidth for choice in drawn]) == pytest.approx(1 / 3, abs=0.06)
    positions = np.concatenate([choice.positions for choice in drawn])
    assert len(positions) == 600 * config.batch_size and set(positions) == set(range(8))
    other_seed = choices_of(dataclasses.replace(config, seed=1), BANDWIDTHS, 1000, 0).positions
    assert not np.array_equal(other_seed, choices_of(config, BANDWIDTHS, 1000, 0).positions)


def test_positions_stay_within_those_that_are_learned(config):
    """Sequences of 15 frames begin at 0 to 5 of 20 positions, all of them drawn."""
    trainer = LMTrainer(dataclasses.replace(config, max_positions=20, updates_per_epoch=30))
    seen, bits = [], trainer.lm.training_bits

    def spy(codes, labels, position_offset):
        seen.append(position_offset)
        return bits(codes, labels, position_offset)

    trainer.lm.training_bits = spy
    trainer.train()
    assert set(torch.cat(seen).tolist()) == set(range(6))


def test_bandwidths_are_those_asked_for(config):
    trainer = run(dataclasses.replace(config, bandwidths=[0.6]))
    assert all("saving/0.6" in losses and len(losses) == 6 for losses in trainer.losses)


# ---- what it leaves ----------------------------------------------------------------------------------------------


def test_finished_model_codes_files(config, place):
    trainer = run(config)
    codec = EncodecModel.from_pretrained(place / "codec").eval()
    lm = EncodecLM.from_pretrained(trainer.folder / "model").eval()
    assert lm.config.has_integer_form and lm.config.codec_fingerprint == codebook_fingerprint(codec)
    assert json.loads((trainer.folder / "model" / "training_config.json").read_text())["hidden_size"] == 16
    audio = torch.from_numpy(soundfile.read(place / "audio" / "0.wav", dtype="float32")[0])[None]
    data = compress(codec, audio, bandwidth=1.2, lm=lm)
    plain = compress(codec, audio, bandwidth=1.2)
    assert torch.equal(decompress(data, codec, lm)[0], decompress(plain, codec)[0])


def test_an_unfinished_model_has_no_integer_form(config):
    trainer = LMTrainer(dataclasses.replace(config, max_minutes=1e-6))
    assert trainer.train() == "stopped" and trainer.update == 1
    assert EncodecLM.from_pretrained(trainer.folder / "model").integer is None


def test_calibration_is_on_the_first_sequences_without_padding(config, tmp_path):
    lengths = [3, 40, 5, 9]
    place = save_codes(tmp_path / "codes", patterns(4, lengths))
    trainer = LMTrainer(dataclasses.replace(config, codes=[place]))
    sequences = trainer._calibration_codes()
    assert len(sequences) == 5
    for number, codes in enumerate(sequences):
        example = trainer.data[number]["codes"]
        assert torch.equal(codes[0], example[:, : codes.shape[2]]) and (example[:, codes.shape[2] :] == IGNORED).all()
        assert codes.min() >= 0


@pytest.mark.parametrize("source", ["codes", "audio"])
def test_validation_is_what_can_be_computed_by_hand(source, config, place):
    """At every bandwidth, over all codes that are held out, in the weights that are saved."""
    held_out = (
        {"validation_codes": str(place / "held_out")} if source == "codes" else {"validation": str(place / "audio")}
    )
    options = dataclasses.replace(config, **held_out, validation_seconds=0.25, weight_average=0.9, validate_every=4)
    trainer = run(options)
    lm = EncodecLM.from_pretrained(trainer.folder / "model").eval()
    if source == "codes":
        rows = [torch.from_numpy(row)[:, :19] for row in patterns(3, [30, 12, 21], seed=1)]
    else:
        codec = EncodecModel.from_pretrained(place / "codec").eval()
        audio = [soundfile.read(path, dtype="float32")[0][:6000] for path in sorted((place / "audio").iterdir())]
        rows = [codec.encode(torch.from_numpy(one), bandwidth=1.2).audio_codes[0, 0] for one in audio]
    scores = [line for line in log_of(options) if "saving/0.3" in line]
    assert [line["update"] for line in scores] == [4, 6]
    for bandwidth, books in zip(BANDWIDTHS, (1, 2, 4)):
        bits, count = 0.0, 0
        for row in rows:
            row = row[None, :books]
            with torch.no_grad():
                chances = lm(row, position_offset=0).logits.double().softmax(-1)
            bits -= chances.gather(-1, row[..., None]).log2().sum().item()
            count += row.numel()
        assert scores[-1][f"bits_per_second/{bandwidth:g}"] == pytest.approx(bits / count * books * 75, rel=1e-5)
        assert scores[-1][f"saving/{bandwidth:g}"] == pytest.approx(1 - bits / count / 4, abs=1e-5)
    assert trainer.lm.training


def test_goes_on_from_a_model(config, tmp_path):
    parent = run(config)
    codec = make_model(EncodecConfig.preset_24khz(**CODEC, target_bandwidths=BANDWIDTHS), seed=1)
    codec.save_pretrained(tmp_path / "codec")
    places = {"codec": str(tmp_path / "codec"), "output": str(tmp_path / "child")}
    child = LMTrainer(dataclasses.replace(config, model=str(parent.folder / "model"), hidden_size=32, **places))
    assert_equal(dict(child.lm.state_dict()), dict(parent.lm.state_dict()))
    assert child.lm.integer is None and child.lm.config.hidden_size == 16
    assert child.train() == "finished"
    grown = EncodecLM.from_pretrained(child.folder / "model")
    assert grown.integer is not None and not torch.equal(grown.head.weight, parent.lm.head.weight)
    assert grown.config.codec_fingerprint == codebook_fingerprint(codec) != parent.lm.config.codec_fingerprint


def test_held_out_codes_are_spread_over_the_recordings(config, tmp_path):
    rows = [np.full((BOOKS, 30), number) for number in range(4)]
    source = save_codes(tmp_path / "held_out", [[], *rows])
    trainer = LMTrainer(dataclasses.replace(config, validation_codes=source, validation_clips=2))
    assert [codes[0, 0].item() for codes in trainer.held_out] == [0, 2]


def test_models_that_do_not_fit_are_refused(config, tmp_path):
    parent = run(config)
    other = make_model(EncodecConfig.preset_24khz(**CODEC, target_bandwidths=[0.3, 0.6]))
    other.save_pretrained(tmp_path / "other")
    options = dataclasses.replace(config, model=str(parent.folder / "model"), output=str(tmp_path / "child"))
    with pytest.raises(ValueError, match="has 4 codebooks of 16, allowed: 2 of 16, as the codec has"):
        LMTrainer(dataclasses.replace(options, codec=str(tmp_path / "other")))
    alone = shutil.copytree(parent.folder / "model", tmp_path / "alone")
    tensors = load_file(alone / "model.safetensors")
    integers = {name: tensor for name, tensor in tensors.items() if name.startswith("integer.")}
    save_file(integers, alone / "model.safetensors", {"format": "pt"})
    settings = json.loads((alone / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps(settings | {"has_float_form": False}))
    with pytest.raises(ValueError, match="integer form alone"):
        LMTrainer(dataclasses.replace(options, model=str(alone)))


# ---- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "message"), [("loss", "loss nan; "), ("gradient", "gradients' norm is nan; ")])
def test_non_finite_loss_stops_with_the_batch_saved(where, message, config):
    trainer = LMTrainer(config)
    if where == "loss":
        torch.nn.init.constant_(trainer.lm.input_norm.bias, math.nan)
    else:
        trainer.lm.head.bias.register_hook(lambda gradient: gradient * math.nan)
    before = {name: tensor.clone() for name, tensor in trainer.lm.state_dict().items()}
    with pytest.raises(NonFiniteLoss, match=f"update 0: .*{message}the batch is in .*nonfinite_0_0.safetensors"):
        trainer.train()
    for name, tensor in trainer.lm.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7), before[name].nan_to_num(7)), name
    saved = load_file(trainer.folder / "nonfinite_0_0.safetensors")["codes"]
    assert torch.equal(saved, next(iter(trainer.batches(0, workers=0)))["codes"])


def test_options_that_cannot_be(config, audio_config, tmp_path):
    empty = save_codes(tmp_path / "empty", [[[], []], []])
    flat = save_codes(tmp_path / "flat", [[1, 2, 3]])
    for base, change, error, message in (
        (config, {"codes": []}, ValueError, r"codes is \[\], corpora has 0 entries, allowed: one of the two"),
        (config, {"corpora": audio_config.corpora}, ValueError, "corpora has 1 entries, allowed: one of the two"),
        (config, {"codes": [empty]}, ValueError, "allowed: datasets with frames of codes"),
        (config, {"codes": [flat]}, ValueError, "allowed: lists of lists of whole numbers"),
        (config, {"codes": ["/nonesuch"]}, FileNotFoundError, "/nonesuch: no such dataset of codes"),
        (config, {"codes_column": "tokens"}, ValueError, "codes_column is 'tokens', allowed: one of codes"),
        (config, {"model": "/nonesuch"}, FileNotFoundError, "/nonesuch: no such model folder"),
        (config, {"hidden_size": 15}, ValueError, "hidden_size is 15, allowed: an even multiple"),
        (config, {"batch_size": 6, "accumulation_steps": 4}, ValueError, "batch_size is 6, allowed: a multiple of 4"),
        (config, {"bandwidths": [6.0]}, ValueError, r"bandwidths are \[6.0\], allowed: \[0.3, 0.6, 1.2\]"),
        (config, {"validation": "/nonesuch"}, FileNotFoundError, "/nonesuch: no such folder or manifest"),
        (config, {"calibration_sequences": 0}, ValueError, "calibration_sequences is 0, allowed: at least 1"),
        (config, {"max_positions": 0}, ValueError, "max_positions is 0, allowed: at least 1"),
        (config, {"context_seconds": 0.0}, ValueError, "context_seconds is 0.0, allowed: a finite number above 0"),
        (audio_config, {"corpora": [{"name": "a", "source": str(tmp_path)}]}, ValueError, "no usable audio"),
    ):
        with pytest.raises(error, match=message):
            LMTrainer(dataclasses.replace(base, **change))


def test_audio_longer_than_a_chunk_is_refused(audio_config, small_models, tmp_path):
    small_models["48khz"].save_pretrained(tmp_path / "48khz")
    options = dataclasses.replace(audio_config, codec=str(tmp_path / "48khz"), segment_seconds=1.5)
    with pytest.raises(ValueError, match="segment_seconds is 1.5, allowed with audio: up to 1.0"):
        LMTrainer(options)
    trainer = LMTrainer(dataclasses.replace(options, segment_seconds=0.2))
    codes = trainer._codes(next(iter(trainer.batches(0, workers=0))))
    assert codes.shape == (4, trainer.lm.config.num_codebooks, 30)


def test_a_dataset_without_rows_is_refused(config, tmp_path):
    features = datasets.Features({"codes": datasets.List(datasets.List(datasets.Value("int16")))})
    datasets.Dataset.from_dict({"codes": []}, features).save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="codes is .*none', allowed: "):
        LMTrainer(dataclasses.replace(config, codes=[str(tmp_path / "none")]))


def test_held_out_rows_that_are_no_codes_are_passed_over(config, tmp_path):
    good = np.full((BOOKS, 30), 3)
    source = save_codes(tmp_path / "held_out", [good, np.full((BOOKS, 30), SIZE)])
    (codes,) = LMTrainer(dataclasses.replace(config, validation_codes=source)).held_out
    assert torch.equal(codes, torch.from_numpy(good))


def test_a_codec_that_is_not_there_is_named(config):
    with pytest.raises(FileNotFoundError, match="/nonesuch: no such model folder"):
        LMTrainer(dataclasses.replace(config, codec="/nonesuch"))


def test_rows_that_are_no_codes_are_listed_and_never_fatal(config, tmp_path):
    good = patterns(1, 30)[0].tolist()
    bad = {
        1: [[SIZE] * 30] * BOOKS,
        2: [[-1] * 30] * BOOKS,
        3: [*good[:3], good[3][:-1]],
        4: good[:3],
        5: [*good[:3], None],
    }
    source = save_codes(tmp_path / "codes", [good, *bad.values(), [], [[], [], [], []], None])
    trainer = run(dataclasses.replace(config, codes=[*config.codes, source], updates_per_epoch=25))
    lines = [json.loads(line) for line in (trainer.folder / "skipped_files.jsonl").read_text().splitlines()]
    reasons = {line["file"]: line["reason"] for line in lines}
    assert reasons.keys() == {f"{source} row {number}" for number in bad} and len(lines) == len(bad)
    assert "from 16 to 16, allowed: 0 to 15" in reasons[f"{source} row 1"]
    assert "from -1 to -1, allowed: 0 to 15" in reasons[f"{source} row 2"]
    for number in (3, 4, 5):
        assert "allowed: at least 4 rows of whole numbers" in reasons[f"{source} row {number}"]
    with pytest.raises(RuntimeError, match="100 rows of one example could not be used"):
        sequences(save_codes(tmp_path / "bad", [bad[1]]))[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "codes is [], corpora has 0 entries, allowed: one of the two"),
        (["nonesuch"], "nonesuch: no such recipe, allowed: a file, c16_debian, paper"),
        (["--codes", "/nonesuch"], "/nonesuch: no such dataset of codes"),
        (["--data", "speech=."], "corpus 'speech_0': no usable audio in '.'"),
        (["--codes", "/nonesuch", "--resume"], "no checkpoint to resume from"),
        (["--codes", "/nonesuch", "--model", "/nonesuch"], "/nonesuch: no such model folder"),
        (["--codec", "/nonesuch"], "/nonesuch"),
        (["--mixed-precision", "fp8"], "mixed_precision is 'fp8', allowed: one of auto, no, bf16"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_errors_of_the_command_are_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    transformers.logging.disable_progress_bar()  # see the next test
    assert cli.main(["train-lm", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_an_error_is_the_only_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    transformers.logging.enable_progress_bar()
    assert cli.main(["train-lm", "--codes", "/nonesuch"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_command_trains_by_a_recipe(config, tmp_path, capsys):
    recipe = write_recipe(config)
    assert cli.main(["train-lm", recipe, "--updates-per-epoch", "2", "--output", str(tmp_path / "mine")]) == 0
    assert "finished after 2 of 2 updates" in capsys.readouterr().err
    assert EncodecLM.from_pretrained(tmp_path / "mine" / "model").integer is not None


def test_help_shows_every_option(capsys):
    assert cli.main(["train-lm", "--help"]) == 0
    text = capsys.readouterr().out
    for item in dataclasses.fields(LMTrainingConfig):
        assert item.name == "corpora" or f"--{item.name.replace('_', '-')}" in text, item.name
    assert "c16_debian" in text
