"""The GPU that the tests of this folder run on: the machine's, or the pretended one; and how results are compared."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pretended import NoCompiler, load_guard, pretended_device

from modeling_encodec.models.precision_encodec import has_bfloat16


REAL = torch.cuda.is_available()


@contextlib.contextmanager
def gpu_or_pretended(**options):
    """The machine's GPU, or a pretended one of these options, which can count; skips where it cannot be built."""
    if REAL:
        if options:
            pytest.skip("counted on the pretended device, on machines without a GPU")
        yield SimpleNamespace(real=True, count=torch.cuda.device_count())
        return
    try:
        load_guard()
    except NoCompiler as reason:
        pytest.skip(f"no pretended GPU: {reason}")
    has_bfloat16.cache_clear()  # which knows devices by their names
    try:
        with pretended_device(**options) as device:
            yield device
    finally:
        has_bfloat16.cache_clear()


@contextlib.contextmanager
def full_float32():
    """Convolutions without TF32, which PyTorch allows them: what trains would be rounded."""
    places = torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before):
            place.fp32_precision = precision


def moved(value, where: str):
    """Tensors on a device, in whatever they are nested."""
    if isinstance(value, torch.Tensor):
        return value.to(where)
    if isinstance(value, dict):
        return {key: moved(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, where) for item in value)
    return value


def assert_on(where: str, *tensors: torch.Tensor) -> None:
    """All of them are there."""
    for tensor in tensors:
        assert tensor.device == torch.device(where), tensor.device


def assert_same_codes(ours, theirs) -> None:
    """Equal codes; on a real GPU all but a few, which are ties."""
    ours, theirs = (np.asarray(codes.cpu() if isinstance(codes, torch.Tensor) else codes) for codes in (ours, theirs))
    assert ours.shape == theirs.shape
    other = (ours.astype(np.int64) != theirs.astype(np.int64)).mean() if ours.size else 0
    assert other <= (0.02 if REAL else 0), f"{other:.2%} of the codes are others"


def assert_near(ours, theirs, tolerance: float | None = None) -> None:
    """Equal within float32 rounding, relative to the loudest."""
    ours, theirs = (torch.as_tensor(values).detach().float().cpu() for values in (ours, theirs))
    assert ours.shape == theirs.shape
    if theirs.numel():
        apart = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)
        assert apart <= (tolerance or (1e-3 if REAL else 2e-5)), f"{apart:g} apart"


def ragged(lengths: list[int], channels: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (B, channels, longest), and its mask (B, longest)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return 0.2 * torch.randn(len(lengths), channels, max(lengths), generator=generator) * mask[:, None], mask
