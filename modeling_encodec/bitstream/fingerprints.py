"""Which codebooks, decoder and language model a file was made with, as 16 hexadecimal digits each.

Fingerprints are hashes of the stored tensors, in float32 where those are floats: the same for a checkpoint however it
is loaded, as long as no digit of it changed. They are kept until a tensor is written to.
"""

import hashlib
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from modeling_encodec.modeling_encodec import EncodecModel
from modeling_encodec.modeling_lm_encodec import EncodecLM


_kept: weakref.WeakKeyDictionary[nn.Module, tuple[list, str]] = weakref.WeakKeyDictionary()


def codebook_fingerprint(model: EncodecModel) -> str:
    """Of all codebooks: what codes mean."""
    return _digest(model.quantizer, _codebooks(model))


def model_fingerprint(model: EncodecModel) -> str:
    """Of the codebooks, eight digits, and of the decoder, eight: what codes sound like."""
    decoder = [tensor for _, tensor in sorted(model.decoder.state_dict().items())]
    return codebook_fingerprint(model)[:8] + _digest(model.decoder, decoder)[:8]


def stream_fingerprint(model: EncodecModel) -> str:
    """Of all weights, and of what else the state of a stream belongs to."""
    encoder = [tensor for _, tensor in sorted(model.encoder.state_dict().items())]
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
    tables = [tensor for _, tensor in sorted(lm.integer.state_dict().items())]
    return _digest(lm.integer, tables, repr(numbers).encode())


def _codebooks(model: EncodecModel) -> list[torch.Tensor]:
    return [layer.codebook.embed for layer in model.quantizer.layers]


def _digest(owner: nn.Module, tensors: Sequence[torch.Tensor], start: bytes = b"") -> str:
    """Hash of the tensors; `owner` is what they belong to."""
    known = not any(tensor.is_inference() for tensor in tensors)  # those do not tell whether they were written to
    state = [(tensor.data_ptr(), tensor._version) for tensor in tensors] if known else None
    if known and owner in _kept and _kept[owner][0] == state:
        return _kept[owner][1]
    digest = hashlib.sha256(start)
    for tensor in tensors:
        array = (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().numpy()
        digest.update(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes())
    # With the tensors, so that nothing else comes to lie where they do.
    _kept[owner] = (state, digest.hexdigest()[:16], tensors)
    return _kept[owner][1]
