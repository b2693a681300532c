"""The two existing implementations, given our weights: Transformers' EncodecModel and the `encodec` package 0.1.1.
And peers of a test itself: the same function in several processes."""

import importlib.util
import os
import sys
import time
import types
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from discriminator_mapping import discriminator_to_original
from torch import distributed, multiprocessing

from modeling_encodec.conversion.key_mapping import (
    lm_config_from_original,
    lm_from_original,
    to_original,
)
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.training.discriminator import MultiScaleSTFTDiscriminator


LM_FRAME_RATE = 75
# Language models: codebooks, codebook size, width, layers, frames of context
SMALL_LM = (4, 61, 32, 2, 20)
RELEASED_LM = (32, 1024, 200, 5, 262)


def stock_model(model: EncodecModel) -> transformers.EncodecModel:
    """Transformers' own model with the weights of `model`."""
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "transformers_version")}
    stock = transformers.EncodecModel(transformers.EncodecConfig(**fields)).eval()
    stock.load_state_dict(model.state_dict())
    return stock


class Spectrogram(torch.nn.Module):
    """torchaudio's, as the original's discriminator uses it: complex, not centred, divided by the window's L2 norm."""

    def __init__(self, n_fft, hop_length, win_length, window_fn, normalized, center, pad_mode, power):
        super().__init__()
        assert (normalized, center, power) == (True, False, None)
        self.sizes = (n_fft, hop_length, win_length)
        self.register_buffer("window", window_fn(win_length))

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        spectrum = torch.stft(audio.flatten(0, -2), *self.sizes, self.window, center=False, return_complex=True)
        return spectrum.unflatten(0, audio.shape[:-1]) / self.window.square().sum().sqrt()


def import_encodec(module: str = "encodec"):
    """A module of the `encodec` package, or None where that is not installed. Its import of torchaudio, whose wheels
    want CUDA, is met with a stand-in. (Transformers asks for the spec of any torchaudio it sees, so it looks before.)
    """
    if importlib.util.find_spec("encodec") is None:
        return None
    transformers.utils.is_torchaudio_available()
    stand_in = types.ModuleType("torchaudio")
    stand_in.transforms = types.SimpleNamespace(Spectrogram=Spectrogram)
    sys.modules.setdefault("torchaudio", stand_in)
    return importlib.import_module(module)


def original_model(model: EncodecModel):
    """The `encodec` package's 24 or 48 kHz model with the weights of `model`."""
    encodec = import_encodec()
    make = {24000: encodec.EncodecModel.encodec_model_24khz, 48000: encodec.EncodecModel.encodec_model_48khz}
    original = make[model.config.sampling_rate](pretrained=False)
    original.load_state_dict(to_original(model.state_dict(), model.config))
    original.name = f"encodec_{model.config.sampling_rate // 1000}khz"
    return original.eval()


def original_discriminator(discriminator: MultiScaleSTFTDiscriminator):
    """The `encodec` package's discriminator with the weights of `discriminator`."""
    windows, filters = discriminator.windows, discriminator.discriminators[0].convs[0].out_channels
    sizes = {"n_ffts": windows, "hop_lengths": [window // 4 for window in windows], "win_lengths": windows}
    original = import_encodec("encodec.msstftd").MultiScaleSTFTDiscriminator(filters, **sizes)
    original.load_state_dict(discriminator_to_original(discriminator.state_dict(), windows))
    return original


@torch.no_grad()
def lm_pair(codebooks, codebook_size, width, layers, context, seed=0):
    """The original's language model with random weights, none of them zero or one, and ours with the same."""
    if import_encodec() is None:
        import pytest  # here alone: measurements take peers where there are no tests

        pytest.skip("the encodec package is not installed")
    torch.manual_seed(seed)
    make = import_encodec("encodec.model").LMModel
    original = make(codebooks, codebook_size, width, num_layers=layers, past_context=context).eval()
    for name, parameter in original.named_parameters():
        if parameter.dim() == 1:
            parameter += 0.2 * torch.randn_like(parameter)
        elif name.startswith("linears"):
            parameter *= 3  # so that probabilities are far from even
    config = lm_config_from_original(original.state_dict(), LM_FRAME_RATE)
    config.context_seconds = (context + 0.5) / LM_FRAME_RATE
    assert config.context_frames == context
    lm = EncodecLM(config).eval()
    lm.load_state_dict(lm_from_original(original.state_dict()))
    return original, lm


def in_processes(work: Callable, folder: Path, *, world: int = 2, timeout: float = 120) -> Sequence:
    """What `work(rank)` returns in each of `world` gloo processes; an error if they are not done in time."""
    context = multiprocessing.start_processes(
        _one_process, (work, str(folder), world, timeout), world, join=False, start_method="spawn"
    )
    end = time.monotonic() + timeout
    try:
        while not context.join(1):
            assert time.monotonic() < end, f"{work.__name__} hangs"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def _one_process(rank: int, work: Callable, folder: str, world: int, timeout: float) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    distributed.init_process_group(
        "gloo", f"file://{folder}/meet", timedelta(seconds=timeout), world_size=world, rank=rank
    )
    torch.save(work(rank), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@torch.no_grad()
def fill_codebooks(model: EncodecModel, seconds: float = 4.0) -> None:
    """Codebooks drawn from what their stage really meets, so that codes spread as in a trained model."""
    config = model.config
    samples = int((config.chunk_length_s or seconds) * config.sampling_rate)
    size, frames = config.codebook_size, -(-samples // config.hop_length)
    rows = -(-2 * size // frames)
    audio = torch.randn(rows, config.audio_channels, samples) * torch.rand(rows, 1, 1)
    residual = model.encoder(audio / (audio.std() if config.normalize else 1)).transpose(1, 2).flatten(0, 1)
    for layer in model.quantizer.layers:
        spread = 0.3 * residual.std() * torch.randn(size, residual.shape[1])
        layer.codebook.embed.copy_(residual[torch.randperm(len(residual))[:size]] + spread)
        residual = residual - layer.codebook.decode(layer.codebook.encode(residual))


@torch.no_grad()
def level_output(model: EncodecModel) -> None:
    """Scale the decoder's last convolution so that codes of noise decode to a peak of about 1, as audio has."""
    codes = torch.randint(model.config.codebook_size, (1, model.config.num_quantizers, 150))
    peak = model.decoder(model.embed(codes)).abs().max()
    for name, parameter in model.decoder.layers[-1].named_parameters():
        if name.endswith(("original0", "norm.weight", "bias")):
            parameter /= peak
