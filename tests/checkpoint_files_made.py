"""Checkpoint files of the structures that conversion reads, with random weights; and how a refusal is checked."""

import hashlib
from pathlib import Path

import pytest
import torch
import yaml
from peers import import_encodec

from modeling_encodec.conversion.architecture import BEHAVIOUR, codec_shapes
from modeling_encodec.conversion.convert import convert_checkpoint
from modeling_encodec.conversion.key_mapping import to_original
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel


# A small codec that no released model is like, and its settings as `--set` takes them.
OWN = {
    **{"num_filters": 4, "hidden_size": 12, "upsampling_ratios": [5, 3, 2], "num_lstm_layers": 1, "codebook_size": 32},
    **{"sampling_rate": 3000, "target_bandwidths": [1.5], "pad_mode": "constant", "chunk_length_s": None},
}


def own_config(**fields) -> EncodecConfig:
    return EncodecConfig(**(OWN | fields))


def behaviour(config: EncodecConfig) -> dict[str, object]:
    """What the shapes of its weights do not tell."""
    return {name: getattr(config, name) for name in (*BEHAVIOUR, "target_bandwidths")}


def save_original(path: Path, model: EncodecModel) -> Path:
    """A file as the original publishes them."""
    torch.save(to_original(model.state_dict(), model.config), path)
    return path


def named_by_checksum(path: Path) -> Path:
    """The file NAME.th as NAME-xxxxxxxx.th."""
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path.rename(path.with_name(f"{path.stem}-{digits}.th"))


def weightless_state(config: EncodecConfig) -> dict[str, torch.Tensor]:
    """An original's state dict of the right names and shapes, whose file takes hardly any room."""
    return {name: torch.zeros(1).expand(shape) for name, shape in codec_shapes(config, original=True).items()}


def audiocraft_settings(config: EncodecConfig, **rvq) -> dict:
    """`xp.cfg` of a codec, with values that stand for one another as in audiocraft's own."""
    return {
        "solver": "compression",
        "sample_rate": config.sampling_rate,
        "channels": config.audio_channels,
        "compression_model": "encodec",
        "encodec": {
            **{"autoencoder": "seanet", "quantizer": "rvq", "sample_rate": "${sample_rate}"},
            **{"channels": "${channels}", "causal": config.use_causal_conv, "renormalize": config.normalize},
        },
        "seanet": {
            **{"dimension": config.hidden_size, "channels": "${channels}", "causal": "${encodec.causal}"},
            **{"n_filters": config.num_filters, "n_residual_layers": config.num_residual_layers},
            **{"ratios": list(config.upsampling_ratios), "activation": "ELU", "activation_params": {"alpha": 1.0}},
            **{"norm": config.norm_type, "norm_params": {}, "kernel_size": config.kernel_size},
            **{"residual_kernel_size": config.residual_kernel_size, "last_kernel_size": config.last_kernel_size},
            **{"dilation_base": config.dilation_growth_rate, "pad_mode": config.pad_mode},
            **{"true_skip": not config.use_conv_shortcut, "compress": config.compress},
            **{"lstm": config.num_lstm_layers, "disable_norm_outer_blocks": 0, "encoder": {}},
            "decoder": {
                **{"trim_right_ratio": config.trim_right_ratio},
                **{"final_activation": None, "final_activation_params": None},
            },
        },
        "rvq": {"n_q": config.num_quantizers, "q_dropout": False, "bins": config.codebook_size, "decay": 0.99} | rvq,
        "optim": {"lr": 3e-4, "epochs": 200},
    }


def save_audiocraft(path: Path, state: dict, settings: dict) -> Path:
    """A file as audiocraft's `export_encodec` writes them."""
    torch.save({"best_state": state, "xp.cfg": yaml.safe_dump(settings), "version": "1.3.0", "exported": True}, path)
    return path


@torch.no_grad()
def released_codec(name: str):
    """The `encodec` package's 24 or 48 kHz model with random weights, its codebooks of the size of its latents."""
    if import_encodec() is None:
        pytest.skip("the encodec package is not installed")
    torch.manual_seed(0)
    original = getattr(import_encodec().EncodecModel, f"encodec_model_{name}")(pretrained=False).eval()
    size = original.encoder(torch.randn(1, original.channels, 9600)).std()
    for stage, layer in enumerate(original.quantizer.vq.layers):
        layer._codebook.embed.normal_().mul_(size * 0.9**stage)
        layer._codebook.embed_avg.normal_()
        layer._codebook.cluster_size.uniform_(1, 9)
        layer._codebook.inited.fill_(1)
    return original


def original_lm(codebooks: int, size: int, width: int, layers: int, context: int, heads: int = 8):
    """The `encodec` package's language model with random weights."""
    if import_encodec() is None:
        pytest.skip("the encodec package is not installed")
    torch.manual_seed(codebooks)
    make = import_encodec("encodec.model").LMModel
    lm = make(codebooks, size, width, num_layers=layers, past_context=context, num_heads=heads).eval()
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            elif name.startswith("linears"):
                parameter *= 3  # so that probabilities are far from even
    return lm


def assert_refused(source: Path, target: Path, message: str, error: type = ValueError, **arguments) -> None:
    """The conversion is refused with one line that says `message`, and changes nothing in the target's folder."""
    before = listing(target.parent)
    with pytest.raises(error, match=message) as caught:
        convert_checkpoint(source, target, **arguments)
    assert "\n" not in str(caught.value)
    assert listing(target.parent) == before


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, with sizes and times of change."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if not path.is_symlink()
    }
