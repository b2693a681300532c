"""Segments of version 0 files coded with the language model, as the original writes and reads them.

Version 0 feeds float probabilities to its coder. Every share of every code hangs on their last bits, and those on the
order of each addition: the same model run over all frames at once, or with cached keys and values, gives others, and
then everything after the first wrong share is lost. So this module runs the weights of an `EncodecLM` through the very
PyTorch operations, in the order and shapes in which the original runs them: frame by frame, layer inputs cached and
projected again in every step, one matrix product for each codebook, float32 on the CPU, positions that never begin
again. On one machine that is exactly what the original computes, and the only dependable way to its files.

The number of CPU threads is part of it: nineteen distributions in twenty change their shares from one thread to two.
The original leaves it to PyTorch and does not record it; here it is one unless the caller knows better. Nor does
anything in version 0 guard against another machine or version of PyTorch; but the end of a segment betrays all of it
(`ArithmeticDecoder.finish`). Version 1 needs none of this: its frequencies are made of whole numbers
(`EncodecLM.frequencies`), the same everywhere. Write version 0 only for the original to read.
"""

from array import array
from typing import BinaryIO

import numpy as np
import torch
from torch.nn.functional import embedding, gelu, layer_norm, linear, multi_head_attention_forward

from modeling_encodec.bitstream.errors import EcdcError
from modeling_encodec.bitstream.v0.arithmetic_coder import ArithmeticDecoder, ArithmeticEncoder, cumulative_shares
from modeling_encodec.models.batching_encodec import as_tensor
from modeling_encodec.models.modeling_lm_encodec import NO_CODE, EncodecLM, EncodecLMLayer
from modeling_encodec.models.precision_encodec import call_with_threads, exact_float32


# Frames that a segment may have without a bit for them, and for each of its bits. A sure model takes less than a bit
# for a frame of silence, but without a bound a few bytes would keep a reader busy for days.
FREE_FRAMES, MAX_FRAMES_PER_BIT = 45_000, 1000


def encode_segment(lm: EncodecLM, codes: torch.Tensor | np.ndarray, *, threads: int = 1) -> bytes:
    """The bytes of one chunk's `codes` (K, F), of any K up to the model's, for readers with as many CPU threads.

    Raises:
        ValueError: for codes that are none of this model's, or a model that version 0 has no place for.
    """
    codes = as_tensor("codes", codes)
    if codes.dim() != 2 or 0 in codes.shape or codes.is_floating_point() or codes.dtype == torch.bool:
        raise ValueError(
            f"codes are {codes.dtype} of shape {tuple(codes.shape)}, allowed: whole numbers (codebooks, frames), no 0"
        )
    size = lm.config.codebook_size
    if codes.min() < 0 or codes.max() >= size:
        raise ValueError(f"codes range from {codes.min()} to {codes.max()}, allowed: 0 to {size - 1}")
    encoder, steps = ArithmeticEncoder(), OriginalSteps(lm, len(codes))
    frame = [NO_CODE] * len(codes)
    for following in codes.T.tolist():
        for code, cumulative in zip(following, call_with_threads(threads, _shares, steps, frame), strict=True):
            encoder.encode(code, cumulative)
        frame = following
    return encoder.finish()


def decode_segment(lm: EncodecLM, file: BinaryIO, codebooks: int, frames: int, *, threads: int = 1) -> np.ndarray:
    """One chunk's codes (K, F) int32, written with as many CPU threads; the file then stands at the next chunk.

    Raises:
        EcdcError: if the file is damaged, or written with other weights or on a machine that computes differently.
        ValueError: for a model that version 0 has no place for.
    """
    if not 1 <= codebooks <= lm.config.num_codebooks:
        raise EcdcError(f"the file has {codebooks} codebooks, allowed: 1 to {lm.config.num_codebooks}")
    decoder, codes = ArithmeticDecoder(file), array("i")
    steps = OriginalSteps(lm, codebooks)
    frame = [NO_CODE] * codebooks
    for number in range(frames):
        if number > FREE_FRAMES + MAX_FRAMES_PER_BIT * decoder.bits:
            raise EcdcError(
                f"{number} of {frames} frames take {decoder.bits} bits, allowed: {FREE_FRAMES} frames and "
                f"{MAX_FRAMES_PER_BIT} a bit"
            )
        frame = [decoder.decode(cumulative) for cumulative in call_with_threads(threads, _shares, steps, frame)]
        codes.extend(frame)
    decoder.finish()
    return np.frombuffer(codes, np.intc).reshape(frames, codebooks).T


def check_original_lm(lm: EncodecLM) -> None:
    """Refuse a model that version 0 has no place for.

    Raises:
        ValueError: with what it has and version 0 has not.
    """
    if not lm.config.has_float_form:
        raise ValueError("the language model has no float form, allowed: one with float weights, in version 0")
    if not lm.config.zero_past_key:
        raise ValueError("zero_past_key is False, allowed: True in version 0, as the original knows no other")
    if lm.head.weight.dtype != torch.float32:
        raise ValueError(f"the language model is {lm.head.weight.dtype}, allowed: torch.float32 in version 0")


class OriginalSteps:
    """The original's probabilities, one frame after the other. Each call is a step; a new object begins anew.

    Weights are copied: a matrix product may round otherwise where its operands lie otherwise in memory.
    """

    def __init__(self, lm: EncodecLM, codebooks: int):
        config = lm.config
        check_original_lm(lm)
        if codebooks > config.num_codebooks:
            raise ValueError(f"codes have {codebooks} codebooks, allowed: up to {config.num_codebooks}")
        weights = lm.head.weight
        self._reach, self._size = config.context_frames, config.codebook_size
        table = lm.embeddings.weight.detach().unflatten(0, (config.num_codebooks, -1))
        self._embeddings = _copies(table[:codebooks])
        heads = (config.num_codebooks, -1)
        self._head_weights = _copies(weights.detach().unflatten(0, heads)[:codebooks])
        self._head_biases = _copies(lm.head.bias.detach().unflatten(0, heads)[:codebooks])
        self._input_norm = _pair(lm.input_norm)
        self._layers = [_OriginalLayer(layer) for layer in lm.layers]
        # What attention sees before all frames.
        nothing = torch.zeros(1, 1, config.hidden_size, dtype=torch.float32, device="cpu")
        self._pasts = [nothing] * len(self._layers)
        self._position = 0
        # Whole exponents over half - 1, not a power for each step of a fraction: the roundings are the original's.
        half = config.hidden_size // 2
        self._rates = 10000 ** (torch.arange(half, dtype=torch.float32, device="cpu").view(1, 1, -1) / (half - 1))

    @torch.no_grad()
    def __call__(self, frame: list[int]) -> torch.Tensor:
        """Probabilities (K, codebook_size) of the codes after `frame`, which is all -1 where there is none."""
        rows = torch.tensor(frame, dtype=torch.int64, device="cpu").view(-1, 1, 1) + 1
        hidden = sum(embedding(row, table) for row, table in zip(rows, self._embeddings, strict=True))
        phase = torch.tensor(self._position, dtype=torch.int64, device="cpu").view(1, 1, 1) / self._rates
        hidden = _norm(hidden, self._input_norm) + torch.cat([phase.cos(), phase.sin()], dim=-1)
        for number, layer in enumerate(self._layers):
            keys = torch.cat([self._pasts[number], hidden], dim=1)
            self._pasts[number] = keys[:, -self._reach :]
            hidden = layer(hidden, keys)
        self._position += 1
        logits = [linear(hidden, weight, bias) for weight, bias in zip(self._head_weights, self._head_biases)]
        # (1, codebook_size, K, 1), and the softmax over the second: over the last its sums would run otherwise.
        return torch.stack(logits, dim=1).permute(0, 3, 1, 2).softmax(dim=1)[0, :, :, 0].T


class _OriginalLayer:
    """One layer on one frame; `keys` are this frame's and earlier frames' inputs, not projected yet."""

    def __init__(self, layer: EncodecLMLayer):
        self._heads = layer.num_heads
        self._input_projection, self._output_projection = _pair(layer.qkv_proj), _pair(layer.o_proj)
        self._up, self._down = _pair(layer.up_proj), _pair(layer.down_proj)
        self._attention_norm, self._output_norm = _pair(layer.attention_norm), _pair(layer.output_norm)

    def __call__(self, hidden: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        hidden = _norm(hidden + self._attend(hidden, keys), self._attention_norm)
        return _norm(hidden + linear(gelu(linear(hidden, *self._up)), *self._down), self._output_norm)

    def _attend(self, hidden: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        width, keys = hidden.shape[2], keys.transpose(0, 1)
        # It hides nothing, but without a mask other kernels may be chosen.
        mask = torch.zeros(1, len(keys), dtype=torch.bool, device="cpu")
        attended, _ = multi_head_attention_forward(
            *(hidden.transpose(0, 1), keys, keys, width, self._heads),
            *(*self._input_projection, None, None, False, 0.0, *self._output_projection),
            training=False,
            need_weights=False,
            attn_mask=mask,
        )
        return attended.transpose(0, 1)


def _copies(tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.cpu().clone() for tensor in tensors]


def _pair(module: torch.nn.Linear | torch.nn.LayerNorm) -> list[torch.Tensor]:
    return _copies([module.weight.detach(), module.bias.detach()])


def _norm(hidden: torch.Tensor, pair: list[torch.Tensor]) -> torch.Tensor:
    return layer_norm(hidden, hidden.shape[-1:], *pair)


def _shares(steps: OriginalSteps, frame: list[int]) -> np.ndarray:
    """The next step, in full precision: what the caller has set must not change a bit."""
    with exact_float32():
        return cumulative_shares(steps(frame))
