"""Which codebooks, decoder and language model a file was made with, as 16 hexadecimal digits each.

Fingerprints are hashes of the stored tensors, in float32 where those are floats: the same for a checkpoint however it
is loaded, as long as no digit of it changed. They are kept until a tensor changes. Settings that change what the same
weights compute enter too, but only where they differ from the default of the configuration's class: so a setting that
is added later changes the fingerprint of no model made before. Their defaults must never change, therefore.
"""

import hashlib
import json
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.models.weight_cache_encodec import WeightCache, copy_in_pieces


# Every field of the codec's configuration is on one of these two lists.
CHANGES_OUTPUT = (
    *("chunk_length_s", "dilation_growth_rate", "normalize", "overlap", "pad_mode", "sampling_rate"),
    *("trim_right_ratio", "use_causal_conv"),
)
# What the names and shapes of the tensors hold already, and bandwidths, which are names for numbers of codebooks.
IN_TENSORS = (
    *("audio_channels", "codebook_dim", "codebook_size", "compress", "hidden_size", "kernel_size", "last_kernel_size"),
    *("norm_type", "num_filters", "num_lstm_layers", "num_residual_layers", "residual_kernel_size"),
    *("target_bandwidths", "upsampling_ratios", "use_conv_shortcut"),
)
# The same of the language model's: what changes the probabilities of the same tables (of context and frame rate their
# product), and what does not.
LM_CHANGES_OUTPUT = ("context_seconds", "frame_rate", "num_attention_heads", "zero_past_key")
LM_IN_TENSORS = (
    *("codebook_size", "codec_fingerprint", "has_float_form", "has_integer_form", "hidden_size", "intermediate_size"),
    *("max_positions", "num_codebooks", "num_hidden_layers"),
)

_caches: weakref.WeakKeyDictionary[nn.Module, WeightCache] = weakref.WeakKeyDictionary()


def codebook_fingerprint(model: EncodecModel) -> str:
    """Of all codebooks: what codes mean."""
    return _digest(model.quantizer, _codebooks(model))


def model_fingerprint(model: EncodecModel) -> str:
    """Of the codebooks, eight digits, and of the decoder and the settings, eight: what codes sound like."""
    decoder = _state(model.decoder)
    return codebook_fingerprint(model)[:8] + _digest(model.decoder, decoder, _settings(model.config))[:8]


def stream_fingerprint(model: EncodecModel) -> str:
    """Of all weights and settings, and of what else the state of a stream belongs to."""
    digest = _digest(model.encoder, _state(model.encoder)) + model_fingerprint(model)
    return hashlib.sha256(f"{digest} {model.precision}".encode()).hexdigest()[:16]


def lm_fingerprint(lm: EncodecLM) -> str:
    """Of the integer form: what probabilities codes have.

    Raises:
        ValueError: for a language model without integer form.
    """
    if lm.integer is None:
        raise ValueError("the language model is float alone, allowed: with its integer form, by lm.quantize(codes)")
    config = lm.config
    numbers = (config.num_attention_heads, config.context_frames, int(config.zero_past_key))
    tables = _state(lm.integer)
    return _digest(lm.integer, tables, repr(numbers).encode())


def _settings(config: EncodecConfig) -> bytes:
    """Settings that change what the same weights compute, where they are not the default; nothing if all are."""
    fields = type(config).__dataclass_fields__
    given = {name: getattr(config, name) for name in CHANGES_OUTPUT}
    own = [[name, _plain(value)] for name, value in sorted(given.items()) if value != fields[name].default]
    return json.dumps(own).encode() if own else b""


def _plain(value):
    """A value as JSON has it whoever wrote it: 1 is 1.0."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _codebooks(model: EncodecModel) -> list[torch.Tensor]:
    return [layer.codebook() for layer in model.quantizer.layers]


def _state(owner: nn.Module) -> list[torch.Tensor]:
    """All tensors of `owner`, by their names' order; those that are offloaded from where they are kept."""
    return [_kept(owner, name) if tensor.is_meta else tensor for name, tensor in sorted(owner.state_dict().items())]


def _kept(owner: nn.Module, name: str) -> torch.Tensor:
    from accelerate.utils import align_module_device  # there, or nothing would be offloaded

    parent, _, name = name.rpartition(".")
    with align_module_device(owner.get_submodule(parent), "cpu"):
        return owner.get_submodule(parent).state_dict(keep_vars=True)[name].detach()


def _digest(owner: nn.Module, tensors: Sequence[torch.Tensor], start: bytes = b"") -> str:
    """Hash of the tensors; `owner` is what they belong to."""

    def computed() -> str:
        digest = hashlib.sha256(start)
        for tensor in tensors:
            copied = copy_in_pieces(tensor.cpu())
            array = (copied.float() if copied.is_floating_point() else copied).numpy()
            digest.update(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes())
        return digest.hexdigest()[:16]

    return _caches.setdefault(owner, WeightCache()).get(start, tensors, computed)
