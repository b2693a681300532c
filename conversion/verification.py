"""Whether a converted model computes what others compute from the same weights, and whether it was written as it is.

A codec's networks (encoder, code search, decoder) run on one chunk of a synthetic clip, beside Transformers'
EncodecModel and, where the `encodec` package is installed, beside that package's modules, which take the checkpoint's
tensors under their own names: so a wrong renaming shows. How a whole signal is cut into chunks is no matter of weights
and not compared here; at 48 kHz Transformers does it differently. Language models run beside the original's steps.

Codes may differ where two entries are equally near within float32 rounding, a tie; anything else is refused.
"""

import contextlib
import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import transformers
from transformers.models.encodec import modeling_encodec as stock

from modeling_encodec.bitstream.v0.language_model import OriginalSteps
from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import NO_CODE, EncodecLM
from modeling_encodec.models.precision_encodec import exact_float32
from modeling_encodec.models.ties import first_apart, is_tie


PROBE_SECONDS = 1.3
PROBE_FRAMES = 40  # at least, of models with few frames a second
LM_PROBE_FRAMES = 12
# Relative to the peak where that is above 1: audio, as promised, and latents, which are in no unit.
MOST_AUDIO_ERROR = 1e-4
MOST_LATENT_ERROR = 1e-4
MOST_PROBABILITY_ERROR = 1e-5


@dataclass(frozen=True)
class Comparison:
    """How far a model is from a peer, and what was compared: text for the report."""

    peer: str
    figures: str

    def __str__(self) -> str:
        return f"{self.peer}: {self.figures}"


def check_finite(state: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that are not float32 (whole numbers may be) or hold NaN or infinity.

    Raises:
        ValueError: with the first one's name.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}, allowed: float32, float16 or bfloat16")
        if tensor.is_complex() or not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN, infinity or complex numbers, allowed: finite ones")


# ---- codecs ------------------------------------------------------------------------------------------------------


def probe_clip(config: EncodecConfig) -> torch.Tensor:
    """The same audio (1, channels, T) for a configuration each time, at most a chunk of it, in the loudness that the
    encoder sees: gliding tones, and noise that comes and goes."""
    samples = max(int(PROBE_SECONDS * config.sampling_rate), PROBE_FRAMES * config.hop_length + 1)
    samples = min(samples, config.chunk_length or samples)
    generator = torch.Generator("cpu").manual_seed(0)
    time = torch.linspace(0, 1, samples, dtype=torch.float32, device="cpu")
    shape = config.audio_channels, samples
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    noise = noise * (time * 7 * math.pi).sin().square()
    tones = [(40 * n * math.pi * time * (1 + time) + n).sin() for n in range(1, config.audio_channels + 4)]
    tones = torch.stack([sum(tones[channel : channel + 4]) for channel in range(config.audio_channels)])
    audio = (0.1 * tones + 0.2 * noise)[None]
    return audio / audio.square().mean().sqrt() if config.normalize else audio


@torch.no_grad()
@exact_float32()
def compare_with_transformers(model: EncodecModel) -> Comparison:
    """`model` beside the networks of Transformers' EncodecModel of its configuration and weights.

    Raises:
        ValueError: if the two give other codes or audio.
    """
    fields = {name: getattr(model.config, name) for name in EncodecConfig.__annotations__}
    config = transformers.EncodecConfig(**fields)
    # The parts, for the whole does not take every size of codebooks.
    parts = {
        "encoder": stock.EncodecEncoder(config),
        "decoder": stock.EncodecDecoder(config),
        "quantizer": stock.EncodecResidualVectorQuantizer(config),
    }
    peer = torch.nn.ModuleDict(parts).eval().to(model.device)
    peer.load_state_dict(model.state_dict())
    name, quantizer = f"transformers {transformers.__version__}", peer["quantizer"]
    return _compare_codecs(name, model, peer["encoder"], quantizer.encode, quantizer.decode, peer["decoder"])


@torch.no_grad()
@exact_float32()
def compare_with_original(model: EncodecModel, state: Mapping[str, torch.Tensor]) -> Comparison | None:
    """`model` beside the `encodec` package's networks with the weights `state` under its names; `None` where that
    package cannot be imported.

    Raises:
        ValueError: if the two give other codes or audio.
    """
    modules, quantization = _import("encodec.modules"), _import("encodec.quantization")
    if modules is None or quantization is None:
        return None
    config = model.config
    arguments = {
        "channels": config.audio_channels,
        "dimension": config.hidden_size,
        "n_filters": config.num_filters,
        "n_residual_layers": config.num_residual_layers,
        "ratios": list(config.upsampling_ratios),
        "norm": config.norm_type,
        "kernel_size": config.kernel_size,
        "last_kernel_size": config.last_kernel_size,
        "residual_kernel_size": config.residual_kernel_size,
        "dilation_base": config.dilation_growth_rate,
        "causal": config.use_causal_conv,
        "pad_mode": config.pad_mode,
        "true_skip": not config.use_conv_shortcut,
        "compress": config.compress,
        "lstm": config.num_lstm_layers,
    }
    quantizer = {"dimension": config.hidden_size, "n_q": config.num_quantizers, "bins": config.codebook_size}
    with _without_warnings():
        parts = {
            "encoder": modules.SEANetEncoder(**arguments),
            "decoder": modules.SEANetDecoder(**arguments, trim_right_ratio=config.trim_right_ratio),
            "quantizer": quantization.ResidualVectorQuantizer(**quantizer),
        }
    peer = torch.nn.ModuleDict(parts).eval().to(model.device)
    peer.load_state_dict(dict(state))
    search, decode = peer["quantizer"].vq.encode, peer["quantizer"].vq.decode
    return _compare_codecs("encodec package", model, peer["encoder"], search, decode, peer["decoder"])


def _compare_codecs(
    name: str, model: EncodecModel, encoder: Callable, search: Callable, embed: Callable, decoder: Callable
) -> Comparison:
    audio = probe_clip(model.config).to(model.device)
    latents, their_latents = model.encoder(audio), encoder(audio)
    latent_error = _error(latents, their_latents)
    if not latent_error <= MOST_LATENT_ERROR:
        raise ValueError(f"latents differ from those of {name} by {latent_error:.1e}, allowed: {MOST_LATENT_ERROR:g}")
    codes, their_codes = model.quantizer.encode(latents), search(their_latents)
    frames = _frames_apart(model, latents, codes, their_codes)
    ours, theirs = model.decoder(model.quantizer.decode(codes)), decoder(embed(codes))
    audio_error = _error(ours, theirs)
    if not audio_error <= MOST_AUDIO_ERROR:
        raise ValueError(f"audio differs from that of {name} by {audio_error:.1e}, allowed: {MOST_AUDIO_ERROR:g}")
    count = codes.shape[2]
    return Comparison(
        name,
        f"{count - frames} of {count} frames of {len(codes)} codes equal{', the others ties' if frames else ''}; "
        f"latents within {latent_error:.1e}, audio within {audio_error:.1e}",
    )


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.shape != theirs.shape:
        return math.inf
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()


def _frames_apart(model: EncodecModel, latents: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """Frames where codes (K, 1, F) of `latents` (1, D, F) differ, each of them seen to be a tie.

    The first stage that differs decides; later ones code another residual.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"codes have shape {tuple(ours.shape)} and {tuple(theirs.shape)}, allowed: equal ones")
    frames = (ours != theirs).any(0)[0].nonzero().flatten().tolist()
    for frame in frames:
        mine, other = ours[:, 0, frame], theirs[:, 0, frame]
        if not is_tie(model, latents[0, :, frame], mine, other):
            stage = first_apart(mine, other)
            raise ValueError(
                f"codes of frame {frame} in codebook {stage + 1} are {int(mine[stage])} and {int(other[stage])}, "
                "allowed: equal ones, or a tie"
            )
    return len(frames)


# ---- language models ---------------------------------------------------------------------------------------------


@torch.no_grad()
@exact_float32()
def compare_with_original_steps(lm: EncodecLM) -> Comparison:
    """All frames at once beside the original's steps, frame by frame, in this package.

    Raises:
        ValueError: if probabilities differ.
    """
    codes = _probe_codes(lm.config)
    steps = OriginalSteps(lm, codes.shape[1])
    theirs = torch.stack([steps(frame) for frame in _previous(codes)[0].T.tolist()], dim=1)[None]
    return _compare_probabilities("the original's steps", lm, codes, theirs)


@torch.no_grad()
@exact_float32()
def compare_with_original_lm(lm: EncodecLM, state: Mapping[str, torch.Tensor]) -> Comparison | None:
    """`lm` beside the `encodec` package's `LMModel` with the weights `state` under its names; `None` where that
    package cannot be imported.

    Raises:
        ValueError: if probabilities differ.
    """
    model = _import("encodec.model")
    if model is None:
        return None
    config = lm.config
    peer = model.LMModel(
        config.num_codebooks,
        config.codebook_size,
        config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        hidden_scale=config.intermediate_size / config.hidden_size,
        past_context=config.context_frames,
    ).eval()
    peer.to(lm.device).load_state_dict(dict(state))
    codes = _probe_codes(config).to(lm.device)
    theirs, states, offset = [], None, 0
    for frame in _previous(codes).split(1, dim=2):
        probabilities, states, offset = peer(1 + frame, states, offset)
        theirs.append(probabilities.permute(0, 2, 3, 1))
    return _compare_probabilities("encodec package", lm, codes, torch.cat(theirs, dim=2))


def _probe_codes(config: EncodecLMConfig) -> torch.Tensor:
    shape = (1, config.num_codebooks, LM_PROBE_FRAMES)
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randint(config.codebook_size, shape, generator=generator, device="cpu")


def _previous(codes: torch.Tensor) -> torch.Tensor:
    """The frame before each of `codes` (1, K, F)."""
    return torch.cat([torch.full_like(codes[:, :, :1], NO_CODE), codes[:, :, :-1]], dim=2)


def _compare_probabilities(name: str, lm: EncodecLM, codes: torch.Tensor, theirs: torch.Tensor) -> Comparison:
    error = (lm.eval()(codes).logits.softmax(-1) - theirs.to(lm.device)).abs().max().item()
    if not error <= MOST_PROBABILITY_ERROR:
        raise ValueError(
            f"probabilities differ from those of {name} by {error:.1e}, allowed: {MOST_PROBABILITY_ERROR:g}"
        )
    count = math.prod(codes.shape)
    return Comparison(name, f"probabilities of {count} codes within {error:.1e}")


# ---- what was written --------------------------------------------------------------------------------------------


def check_equal(written: Mapping[str, torch.Tensor], meant: Mapping[str, torch.Tensor], what: str) -> None:
    """Refuse tensors that were not read back as they were written, bit for bit.

    Raises:
        ValueError: with the first one's name.
    """
    if written.keys() != meant.keys():
        raise ValueError(f"{what} has other tensors than were written: {sorted(written.keys() ^ meant.keys())[0]}")
    for name, tensor in meant.items():
        if written[name].dtype != tensor.dtype or not torch.equal(written[name], tensor):
            raise ValueError(f"{what} has another {name} than was written")


def _import(name: str):
    """A module of the `encodec` package, or `None` where that, or the torchaudio it wants, does not work."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's weight norm is deprecated
        yield
