"""What a training run leaves, of a codec or a language model."""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from modeling_encodec.training.options import RunConfig


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps the first number format of a process, the tests use several."""
    AcceleratorState._reset_state(reset_partial_state=True)


def log_of(config: RunConfig) -> list[dict]:
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


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def state_of(config: RunConfig) -> dict:
    state = torch.load(Path(config.output) / "checkpoint.pt", weights_only=True)
    state.pop("config")
    return state
