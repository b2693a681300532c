"""Which codebooks, decoder and language model a file was made with, as 16 hexadecimal digits each.

Fingerprints are hashes of the stored tensors, in float32 where those are floats: the same for a checkpoint however it
is loaded, as long as no digit of it changed. They are kept until a tensor changes.
"""

import hashlib
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from modeling_encodec.modeling_encodec import EncodecModel
from modeling_encodec.modeling_lm_encodec import EncodecLM
from modeling_encodec.weight_cache_encodec import WeightCache, copy_in_pieces


_caches: weakref.WeakKeyDictionary[nn.Module, WeightCache] = weakref.WeakKeyDictionary()


def codebook_fingerprint(model: EncodecModel) -> str:
    """Of all codebooks: what codes mean."""
    return _digest(model.quantizer, _codebooks(model))


def model_fingerprint(model: EncodecModel) -> str:
    """Of the codebooks, eight digits, and of the decoder, eight: what codes sound like."""
    decoder = _state(model.decoder)
    return codebook_fingerprint(model)[:8] + _digest(model.decoder, decoder)[:8]


def stream_fingerprint(model: EncodecModel) -> str:
    """Of all weights, and of what else the state of a stream belongs to."""
    encoder = _state(model.encoder)
    config = model.config
    settings = (config.pad_mode, config.trim_right_ratio, config.chunk_length_s, config.overlap, config.normalize)
    digest = _digest(model.encoder, encoder) + model_fingerprint(model)
    return hashlib.sha256(f"{digest} {settings} {model.precision}".encode()).hexdigest()[:16]


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
