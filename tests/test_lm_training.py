"""Training language models: they learn, go on where they stopped, are the same on several processes; and the codes
that they learn from."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
import transformers
from accelerate.state import AcceleratorState
from conftest import make_model
from safetensors.torch import load_file, save_file

from modeling_encodec import cli
from modeling_encodec.bitstream.compression import compress, decompress
from modeling_encodec.bitstream.fingerprints import codebook_fingerprint
from modeling_encodec.configuration_encodec import EncodecConfig
from modeling_encodec.modeling_encodec import EncodecModel
from modeling_encodec.modeling_lm_encodec import EncodecLM
from modeling_encodec.training import code_corpus
from modeling_encodec.training.code_corpus import encode_files
from modeling_encodec.training.code_sequences import PADDING, CodeSequences, open_codes
from modeling_encodec.training.lm_configuration import LMTrainingConfig, load_lm_config
from modeling_encodec.training.lm_trainer import LMTrainer
from modeling_encodec.training.lm_update import choices_of
from modeling_encodec.training.mixing import batch_loader
from modeling_encodec.training.optimization import NonFiniteLoss
from modeling_encodec.training.options import recipe_names


ROOT = Path(__file__).parents[1]
SIZE, BOOKS = 16, 4
CODEC = {"num_filters": 4, "hidden_size": 16, "num_lstm_layers": 1, "codebook_size": SIZE}
BANDWIDTHS = [0.3, 0.6, 1.2]  # 1, 2 and 4 codebooks of 4 bits, 75 times a second


def patterns(rows: int, frames: int | list[int], books: int = BOOKS, seed: int = 0) -> list[np.ndarray]:
    """Codes that count upwards, each codebook at its own pace from its own start: all but the first are certain."""
    rng = np.random.default_rng(seed)
    frames = [frames] * rows if isinstance(frames, int) else frames
    paces = 1 + np.arange(books)[:, None]
    return [(rng.integers(SIZE, size=(books, 1)) + paces * np.arange(count)) % SIZE for count in frames]


def save_codes(folder: Path, rows: list, column: str = "codes") -> str:
    values = [row.tolist() if isinstance(row, np.ndarray) else row for row in rows]
    datasets.Dataset.from_dict({column: values}).save_to_disk(folder)
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a small codec, codes/ and held_out/ to learn and audio/."""
    folder = tmp_path_factory.mktemp("lm_training")
    make_model(EncodecConfig.preset_24khz(**CODEC, target_bandwidths=BANDWIDTHS)).save_pretrained(folder / "codec")
    save_codes(folder / "codes", patterns(12, 40))
    save_codes(folder / "held_out", patterns(3, [30, 12, 21], seed=1))
    (folder / "audio").mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).standard_normal(24000) * np.linspace(0, 0.3, 24000)
        soundfile.write(folder / "audio" / f"{number}.wav", noise, 24000)
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps the first number format of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def config(place, tmp_path) -> LMTrainingConfig:
    """Six updates of a small model, of sequences of 15 frames."""
    return LMTrainingConfig(
        codec=str(place / "codec"), codes=[str(place / "codes")], segment_seconds=0.2,
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, context_seconds=0.1,
        max_positions=64, epochs=1, updates_per_epoch=6, batch_size=4, learning_rate=1e-2, warmup_updates=0,
        calibration_sequences=5, workers=0, trackers=[], device="cpu", log_every=1, output=str(tmp_path / "out"),
    )  # fmt: skip


@pytest.fixture
def audio_config(config, place) -> LMTrainingConfig:
    """The same from audio, encoded on the way."""
    corpora = [{"name": "noise", "source": str(place / "audio")}]
    return dataclasses.replace(config, codes=[], corpora=corpora, index=str(place / "index"))


def run(config: LMTrainingConfig) -> LMTrainer:
    trainer = LMTrainer(config)
    trainer.losses = record_losses(trainer)
    assert trainer.train() == "finished"
    return trainer


def record_losses(trainer: LMTrainer) -> list[dict[str, float]]:
    """What every update of `trainer` returns from now on."""
    losses, one_update = [], trainer.one_update

    def recorded(batch: dict) -> dict[str, float]:
        losses.append(one_update(batch))
        return losses[-1]

    trainer.one_update = recorded
    return losses


def log_of(config: LMTrainingConfig) -> list[dict]:
    return [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]


def state_of(config: LMTrainingConfig) -> dict:
    state = torch.load(Path(config.output) / "checkpoint.pt", weights_only=True)
    state.pop("config")
    return state


def assert_equal(first, second, path=""):
    """Nested states are equal to the bit."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    else:
        assert first == second, path


def write_recipe(config: LMTrainingConfig) -> str:
    recipe = Path(config.output).with_suffix(".json")
    recipe.write_text(json.dumps(dataclasses.asdict(config)))
    return str(recipe)


def run_script(config: LMTrainingConfig, *more: str, processes: int = 1) -> int:
    """`training_run.py` in processes of its own; its exit code."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), str(Path(__file__).parent / "training_run.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, write_recipe(config), "lm", *more], env=environment, timeout=300)
    return done.returncode


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
    seen, forward = [], trainer.lm.forward

    def spy(*args, position_offset, **more):
        seen.append(position_offset)
        return forward(*args, position_offset=position_offset, **more)

    trainer.lm.forward = spy
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
        assert torch.equal(codes[0], example[:, : codes.shape[2]]) and (example[:, codes.shape[2] :] == PADDING).all()
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
    shares = [(batch["codes"][:, 0] != PADDING).sum(1) for batch in islice(alone.batches(0, 0), 6)]
    assert any(share[:2].sum() != share[2:].sum() for share in shares)
    losses = record_losses(alone)
    alone.train()
    for line, exact in zip(log_of(options), losses, strict=True):
        for name, value in exact.items():
            assert line[f"train/{name}"] == pytest.approx(value, rel=2e-5), (line["update"], name)


# ---- sequences ---------------------------------------------------------------------------------------------------


def sequences(*places: str, column: str = "codes", **options) -> CodeSequences:
    return CodeSequences(
        list(places), column, **{"codebooks": BOOKS, "size": SIZE, "frames": 15, "seed": 0} | options
    )  # fmt: skip


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
        length = int((codes[0] != PADDING).sum())
        assert length in (15, 6) and (codes[:, length:] == PADDING).all()
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


# ---- recipes -----------------------------------------------------------------------------------------------------


def test_recipes_load_and_take_overrides():
    assert recipe_names(LMTrainingConfig) == ["c16_debian", "paper"]
    for name in recipe_names(LMTrainingConfig):
        config = load_lm_config(name, seed=7, output="elsewhere")
        assert (config.seed, config.output) == (7, "elsewhere")
        assert bool(config.codes) != bool(config.corpora)
        assert config.validation or config.validation_codes
    with pytest.raises(ValueError, match="option 'mel_weight' does not exist"):
        load_lm_config("paper", mel_weight=1.0)


def test_the_papers_recipe_holds_the_papers_numbers():
    config = load_lm_config("paper")
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == (5, 8, 200)
    assert (config.intermediate_size, config.context_seconds, config.segment_seconds) == (800, 3.5, 5.0)
    assert config.bandwidths == []  # all
    assert config.chance_of_two == config.chance_of_three == 0


def test_the_debian_recipe_names_what_its_commands_write():
    text = (LMTrainingConfig.recipes / "c16_debian.toml").read_text()
    commands = [line.removeprefix("#").split() for line in text.splitlines() if "python -m" in line]
    config = load_lm_config("c16_debian")
    targets = [words[-1] for words in commands if words[2].endswith("code_corpus")]
    assert targets == [*config.codes, config.validation_codes]
    for words in commands:
        assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file(), words[2]


def test_recipes_are_packaged():
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for path in LMTrainingConfig.recipes.glob("*.toml"):
        name = path.relative_to(ROOT / "modeling_encodec" / "training").as_posix()
        globs = packaged["modeling_encodec.training"]
        assert any(fnmatch(name, glob) and name.count("/") == glob.count("/") for glob in globs), name


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
