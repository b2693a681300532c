"""`modeling-encodec doctor`: a sound machine is healthy, and every kind of wrong arithmetic is caught and named."""

import copy
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_encodec.doctor import environment, examination
from modeling_encodec.doctor.checks import Checks
from modeling_encodec.doctor.golden import load_golden, load_models
from modeling_encodec.doctor.remake import make_golden, save_golden
from modeling_encodec.models import kernels_encodec, layers_encodec
from modeling_encodec.models.integer_lm_encodec import _Place


@pytest.fixture(scope="module")
def golden():
    return load_golden()


@pytest.fixture(scope="module")
def loaded():
    return load_models()


@pytest.fixture
def wrong(golden, loaded):
    """`wrong(change, precision)`: stages found wrong of models that `change(model, lm)` has changed."""

    def check(change=lambda model, lm: None, precision: str = "exact") -> set[str]:
        model, lm = copy.deepcopy(loaded)
        change(model, lm)
        model.precision = precision
        return {check.stage for check in Checks(model, lm, golden, loaded[0]).run(precision).checks if not check.right}

    return check


# ---- what is stored ------------------------------------------------------------------------------------------------


def test_stored_results_are_what_the_bundled_models_give(golden, tmp_path):
    made = make_golden()
    save_golden(made, tmp_path / "golden.safetensors")
    again = load_golden(tmp_path / "golden.safetensors")
    for name in ("audio", "lengths", "codes", "frequencies"):
        assert torch.equal(getattr(again, name), getattr(golden, name)), name
    for name in ("latents", "decoded"):
        torch.testing.assert_close(getattr(again, name), getattr(golden, name), rtol=1e-4, atol=1e-4)
    assert (
        made.about.items() - {("torch", torch.__version__)} - {("machine", made.about["machine"])}
        <= golden.about.items()
    )


# ---- a sound machine -----------------------------------------------------------------------------------------------


def test_a_sound_machine_is_healthy(run):
    code, out, err = run("doctor", "--device", "cpu")
    lines = out.splitlines()
    assert code == 0 and err == [] and lines[-1].startswith("healthy: cpu exact"), out
    assert "WRONG" not in out and re.search(r"torch +\d", out) and re.search(r"LM step +[\d.]+ ms \([\d.]+ on", out)


def test_json_says_the_same(run):
    code, out, _ = run("doctor", "--device", "cpu", "--json")
    found = json.loads(out)
    assert code == 0 and found["healthy"] and found["problems"] == []
    assert (
        found["checkups"][0]["device"] == "cpu"
        and {"encode", "decode", "hop", "LM step"} <= found["checkups"][0]["times"].keys()
    )
    assert found["versions"]["torch"] == torch.__version__


def test_a_device_that_is_not_there_is_one_line(run):
    code, _, lines = run("doctor", "--device", "cuda:7")
    assert code == 2 and lines[0].startswith("modeling-encodec: device is 'cuda:7', allowed: cpu")


# ---- wrong arithmetic ----------------------------------------------------------------------------------------------


def test_nothing_is_wrong_with_right_models(wrong):
    assert wrong() == wrong(precision="fast") == set()


def test_one_convolution_a_little_off(wrong):
    def of(net: str):
        def change(model, lm):
            conv = next(layer for layer in getattr(model, net).modules() if isinstance(layer, torch.nn.Conv1d))
            conv.register_forward_hook(lambda module, given, output: output * 1.0005)

        return change

    found = wrong(of("encoder"))
    assert {"latents, 1 thread", "latents, 2 threads"} <= found and not any("audio" in stage for stage in found)
    assert wrong(of("decoder")) == {"audio, clip 1", "audio, clip 2", "audio, streamed"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_lstm_in_half_precision(wrong, dtype, monkeypatch):
    def half(lstm, x, states):
        weights = [weight.to(dtype) for weight in lstm.parameters()]
        y, *state = kernels_encodec.lstm(x.to(dtype), *(part.to(dtype) for part in states), weights)
        return y.to(x.dtype), tuple(part.to(x.dtype) for part in state)

    monkeypatch.setattr(torch.nn.LSTM, "forward", half)
    found = wrong()
    assert {"latents, 1 thread", "audio, clip 1"} <= found and not any("LM" in stage for stage in found)


@pytest.mark.parametrize("kind", ["zeros", "noise", "nan", "shifted"])
def test_convolutions_that_return_garbage(wrong, kind, monkeypatch):
    right = kernels_encodec.convolve
    garbage = {
        "zeros": torch.zeros_like,
        "noise": torch.randn_like,
        "nan": lambda y: y * float("nan"),
        "shifted": lambda y: y.roll(1, 3),
    }[kind]
    monkeypatch.setattr(kernels_encodec, "convolve", lambda *given: garbage(right(*given)))
    for precision in ("exact", "fast"):
        found = wrong(precision=precision)
        assert {"codes, 1 thread", "audio, clip 1", "audio, clip 2"} <= found, found


def test_a_device_that_refuses(wrong, monkeypatch):
    def refuse(*given):
        raise NotImplementedError("not on this\ndevice")

    monkeypatch.setattr(kernels_encodec, "convolve", refuse)
    assert wrong() == {"codes", "codes, streamed", "audio"}


def test_a_wrong_codebook(wrong):
    def swap(model, lm):
        embed = model.quantizer.layers[5].codebook.embed
        embed.copy_(embed.roll(1, 0))

    found = wrong(swap)
    assert {"codes, 1 thread", "codes, streamed", "audio, clip 1"} <= found and "latents, 1 thread" not in found


def test_results_that_depend_on_the_number_of_threads(wrong, monkeypatch):
    right = kernels_encodec.convolve

    def convolve(*given):
        return right(*given) * (1 if torch.get_num_threads() == 1 else 1.01)

    monkeypatch.setattr(kernels_encodec, "convolve", convolve)
    found = wrong()
    assert {"latents, 2 threads", "codes, 2 threads"} <= found and not {"latents, 1 thread", "codes, 1 thread"} & found


def test_whole_numbers_rounded_otherwise(wrong, monkeypatch):
    monkeypatch.setattr(_Place, "floor", lambda self, x: np.rint(x, out=x))
    assert wrong() == {"LM frequencies", "LM frequencies, frame by frame"}


def test_streams_apart_from_the_whole(wrong, monkeypatch):
    right = layers_encodec.lstm_steps
    monkeypatch.setattr(layers_encodec, "lstm_steps", lambda x, *rest: right(1.05 * x, *rest))
    assert wrong() == {"codes, streamed", "audio, streamed"}


# ---- what is said of it --------------------------------------------------------------------------------------------


def test_an_unhealthy_machine_ends_with_a_line_and_code_1(run, monkeypatch):
    right = kernels_encodec.convolve
    monkeypatch.setattr(kernels_encodec, "convolve", lambda *given: 1.01 * right(*given))
    code, out, err = run("doctor", "--device", "cpu")
    assert code == 1 and err == []
    assert out.splitlines()[-1].startswith("not healthy: cpu exact: latents, 1 thread: off by")
    code, out, _ = run("doctor", "--device", "cpu", "--json")
    found = json.loads(out)
    assert code == 1 and not found["healthy"] and found["verdict"].startswith("not healthy: ")


def test_changed_weights_are_named(run, monkeypatch):
    from modeling_encodec.doctor import golden

    def load():
        model, lm = load_models()
        model.encoder.layers[0].conv.bias.data[0] += 1e-3
        return model, lm

    monkeypatch.setattr(golden, "load_models", load)
    code, out, _ = run("doctor", "--device", "cpu")
    assert code == 1 and "weights: the bundled codec has fingerprint" in out.splitlines()[-1]


def test_what_is_missing_is_told(run, monkeypatch):
    there = environment.importlib.util.find_spec
    gone = {"constriction", "ray"}
    monkeypatch.setattr(
        environment.importlib.util, "find_spec", lambda name, *rest: None if name in gone else there(name, *rest)
    )
    code, out, _ = run("doctor", "--device", "cpu")
    lines = out.splitlines()
    assert code == 1 and lines[-1].startswith("not healthy: constriction is missing: needed for files coded")
    assert 'missing: ray, for tokenizing on Ray (pip install "modeling-encodec[ray]")' in lines


def test_nothing_is_computed_without_torch(monkeypatch):
    there = environment.importlib.util.find_spec
    monkeypatch.setattr(
        environment.importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else there(name, *rest)
    )
    found = examination.examine()
    assert not found.healthy and found.devices == {} and "torch is missing" in found.verdict


def test_an_older_transformers_is_noted(monkeypatch):
    version = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: "5.17.0" if name == "transformers" else version(name))
    assert environment.unfit_versions() == {"transformers": "5.17.0, asked for is <6,>=5.23"}


def test_the_tables_of_packages_are_those_of_pyproject():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    name_of = lambda line: re.match(r"[\w-]+", line).group().lower()  # noqa: E731
    assert environment.REQUIRED.keys() == {name_of(line) for line in project["dependencies"]}
    for name, (_, extra, _) in environment.OPTIONAL.items():
        assert name in {name_of(line) for line in project["optional-dependencies"][extra]}, name
