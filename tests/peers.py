"""The two existing implementations, given our weights: Transformers' EncodecModel and the `encodec` package 0.1.1."""

import importlib.util
import sys
import types

import torch
import transformers

from modeling_encodec.conversion.key_mapping import to_original
from modeling_encodec.modeling_encodec import EncodecModel


def stock_model(model: EncodecModel) -> transformers.EncodecModel:
    """Transformers' own model with the weights of `model`."""
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "transformers_version")}
    stock = transformers.EncodecModel(transformers.EncodecConfig(**fields)).eval()
    stock.load_state_dict(model.state_dict())
    return stock


def import_encodec():
    """The `encodec` package, or None where it is not installed. Its import of torchaudio, which it needs for files and
    resampling only and whose wheels want CUDA, is met with an empty module."""
    if importlib.util.find_spec("encodec") is None:
        return None
    sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))
    import encodec

    return encodec


def original_model(model: EncodecModel):
    """The `encodec` package's 24 or 48 kHz model with the weights of `model`."""
    encodec = import_encodec()
    make = {24000: encodec.EncodecModel.encodec_model_24khz, 48000: encodec.EncodecModel.encodec_model_48khz}
    original = make[model.config.sampling_rate](pretrained=False)
    original.load_state_dict(to_original(model.state_dict(), model.config))
    original.name = f"encodec_{model.config.sampling_rate // 1000}khz"
    return original.eval()


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
