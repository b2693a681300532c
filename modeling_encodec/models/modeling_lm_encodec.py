# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""EncodecLM: a causal Transformer over frames of codes (arXiv 2210.13438, section 3.3).

All codebooks of a frame are predicted at once from the frames before it. The architecture is the original's, down to
the all-zero vector that its attention sees before the first frame (`zero_past_key`); its weights load by
`conversion.key_mapping.lm_from_original`. Caches are values, passed in and returned.

The float model trains and tells bits. A range coder must not be fed with it: floats differ between machines. For that
`quantize` makes the integer form (`integer_lm_encodec`), whose frequencies are the same everywhere.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .batching_encodec import as_codes, compute_device, refuse_tracing
from .calibration_lm_encodec import integer_tables
from .configuration_encodec import EncodecLMConfig
from .integer_lm_encodec import IntegerLM, IntegerLMCache
from .loading_encodec import WholeCheckpoints
from .precision_encodec import exact_unless_training
from .weight_cache_encodec import WeightCache


# Stands for "no frame before" among codes.
NO_CODE = -1
# Labels that do not count, as everywhere in Transformers.
IGNORED = -100


@dataclass
class EncodecLMCache(ModelOutput):
    """What the frames so far leave for the next ones.

    Args:
        keys: of each layer, `(B, heads, S, head_dim)`, of the last `context_frames` frames at most.
        values: of each layer, in the same shape.
        position: of the next frame, `(B, 1)`.
        last_codes: of the last frame, `(B, K)`.
    """

    keys: list[torch.Tensor] | None = None
    values: list[torch.Tensor] | None = None
    position: torch.Tensor | None = None
    last_codes: torch.Tensor | None = None


@dataclass
class EncodecLMOutput(ModelOutput):
    """What `forward` returns.

    Args:
        loss (torch.Tensor of shape ()): mean bits per code of the labels.
        codebook_bits (torch.Tensor of shape (K,)): mean bits per code of each codebook.
        logits (torch.Tensor of shape (B, K, F, codebook_size)): for frame f, from the frames before it.
        cache (EncodecLMCache): to go on after the last frame.
    """

    loss: torch.Tensor | None = None
    codebook_bits: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: EncodecLMCache | None = None


class CodeEmbedding(nn.Embedding):
    """`nn.Embedding` that can sum what it looks up."""

    def forward(self, index, *, summed: bool = False):
        """(..., K) -> (..., K, D), or `summed` over K, without the memory for its parts, (..., D)."""
        if not summed:
            return super().forward(index)
        rows = nn.functional.embedding_bag(index.flatten(0, -2), self.weight, mode="sum")
        return rows.unflatten(0, index.shape[:-1])


class CodeHead(nn.Linear):
    """`nn.Linear` that can compute some of its outputs alone."""

    def forward(self, hidden, *, rows: slice = slice(None), part: tuple[torch.Tensor, torch.Tensor] | None = None):
        """(..., D) -> (..., outputs) of these `rows` of the weight, or of a `part`, weight and bias, of `parts`."""
        return nn.functional.linear(hidden, *(part or (self.weight[rows], self.bias[rows])))

    def parts(self, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Weight and bias of every `size` outputs. Their gradients are put together once; that of each slice would be
        as large as the whole."""
        weights, biases = (whole.unflatten(0, (-1, size)).unbind() for whole in (self.weight, self.bias))
        return list(zip(weights, biases))


class EncodecLMLayer(GradientCheckpointingLayer):
    """Attention to the frames in reach, then two linear layers; each added to its input and normalised after."""

    def __init__(self, config: EncodecLMConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.o_proj = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, width)
        self.output_norm = nn.LayerNorm(width)

    def forward(self, hidden, past_keys, past_values, visible):
        """`hidden` (B, F, D) with keys and values of earlier frames; returns it, and all keys and values."""
        query, key, value = self.split_heads(self.qkv_proj(hidden))
        keys, values = torch.cat([past_keys, key], dim=2), torch.cat([past_values, value], dim=2)
        attended = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=visible)
        hidden = self.attention_norm(hidden + self.o_proj(attended.transpose(1, 2).flatten(2)))
        hidden = self.output_norm(hidden + self.down_proj(nn.functional.gelu(self.up_proj(hidden))))
        return hidden, keys, values

    def split_heads(self, qkv: torch.Tensor) -> torch.Tensor:
        """(B, F, 3 D) as queries, keys and values (3, B, heads, F, head_dim)."""
        return qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)


class EncodecLMPreTrainedModel(WholeCheckpoints, PreTrainedModel):
    """Loading, saving and initial weights."""

    config: EncodecLMConfig
    config_class = EncodecLMConfig
    base_model_prefix = "encodec_lm"
    main_input_name = "codes"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["EncodecLMLayer"]

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, IntegerLM):
            for buffer in module.buffers():
                init.zeros_(buffer)


class EncodecLM(EncodecLMPreTrainedModel):
    """The language model (paper 3.3): `forward` for training and bits, `predict` for stepping, `frequencies` for a
    coder.

    Args:
        config (EncodecLMConfig): the model's size, and which of its two forms there are.

    Examples:
        >>> import torch
        >>> from modeling_encodec import EncodecLM, EncodecLMConfig
        >>> lm = EncodecLM(EncodecLMConfig(codebook_size=64, num_codebooks=4, hidden_size=16, num_hidden_layers=1))
        >>> codes = torch.randint(64, (1, 4, 75))
        >>> output = lm.eval()(codes, labels=codes)
        >>> output.logits.shape, 4 < output.loss < 9  # bits per code; 6 would be no prediction
        (torch.Size([1, 4, 75, 64]), tensor(True))
        >>> counts, _ = lm.quantize(codes).frequencies(codes[:, :, :1])
        >>> counts.shape, counts.sum(dim=-1).unique().item() == 2**24
        (torch.Size([1, 4, 1, 64]), True)
    """

    def __init__(self, config: EncodecLMConfig):
        super().__init__(config)
        self.integer = IntegerLM(config) if config.has_integer_form else None
        if config.has_float_form:
            rows = config.num_codebooks * (config.codebook_size + 1)
            self.embeddings = CodeEmbedding(rows, config.hidden_size)
            self.input_norm = nn.LayerNorm(config.hidden_size)
            self.layers = nn.ModuleList(EncodecLMLayer(config) for _ in range(config.num_hidden_layers))
            self.head = CodeHead(config.hidden_size, config.num_codebooks * config.codebook_size)
        self.gradient_checkpointing = False
        self._constants = WeightCache()
        self.post_init()

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return compute_device(self)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; the integer form alone has none."""
        return next((parameter.dtype for parameter in self.parameters()), torch.float32)

    # ---- the float form ------------------------------------------------------------------------------------------

    def forward(
        self,
        codes: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        cache: EncodecLMCache | None = None,
        position_offset: int | torch.Tensor | None = None,
        return_logits: bool = True,
    ) -> EncodecLMOutput:
        """Logits of every frame of `codes` given the frames before it, and bits of the labels, in an
        `EncodecLMOutput`.

        Args:
            codes (torch.LongTensor of shape (B, K, F)): for any K up to the model's.
            labels (torch.LongTensor of shape (B, K, F), optional): codes again, -100 where they do not count.
            cache (EncodecLMCache, optional): of the frames before these.
            position_offset (int or torch.LongTensor of shape (B,), optional): position of the first frame; 0
                by default, and in training mode random for each row.
            return_logits (bool): `False` saves their memory where only the loss is wanted.

        Raises:
            ValueError: for codes or labels that are none of this model's, or without the float form.
        """
        codes = self._check_codes("codes", codes, 0)
        first = _no_frame(codes)
        if cache is not None:
            last = getattr(cache, "last_codes", None)
            if not isinstance(last, torch.Tensor) or last.shape != codes.shape[:2]:
                raise ValueError(
                    f"cache is of other rows or codebooks, allowed: forward's, of codes {tuple(codes.shape[:2])}"
                )
            first = last[:, :, None]
        if labels is not None:
            labels = self._check_codes("labels", labels, IGNORED)
            if labels.shape != codes.shape:
                raise ValueError(f"labels have shape {tuple(labels.shape)}, allowed: that of codes")
        return self._forward(codes, labels, first, cache, position_offset, return_logits)

    def training_bits(
        self, codes: torch.Tensor, labels: torch.Tensor, position_offset: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The `loss` and `codebook_bits` of `forward`, for training: nothing is checked, so a GPU is not waited for.

        Args:
            codes (torch.LongTensor of shape (B, K, F)): this model's, on its device.
            labels (torch.LongTensor of shape (B, K, F)): codes again, -100 where they do not count.
            position_offset (torch.LongTensor of shape (B,)): position of each row's first frame.
        """
        output = self._forward(codes, labels, _no_frame(codes), None, position_offset, False)
        return output.loss, output.codebook_bits

    def _forward(self, codes, labels, first, cache, position_offset, return_logits) -> EncodecLMOutput:
        with exact_unless_training(self):
            hidden, cache = self._run(torch.cat([first, codes[:, :, :-1]], dim=2), cache, position_offset)
            cache.last_codes = codes[:, :, -1]
            output = EncodecLMOutput(cache=cache)
            if return_logits:
                output.logits = self._logits(hidden, codes.shape[1])
            if labels is not None:
                output.loss, output.codebook_bits = self._bits(hidden, labels, output.logits)
        return output

    def predict(
        self, previous: torch.Tensor, cache: EncodecLMCache | None = None
    ) -> tuple[torch.Tensor, EncodecLMCache]:
        """Logits (B, K, F, codebook_size) of the frames that follow each of `previous` (B, K, F), and the cache.

        `previous` is -1 where there is no frame before; `cache` is what the call for the frames before returned.

        Raises:
            ValueError: for codes that are none of this model's, or without the float form.
        """
        previous = self._check_codes("previous", previous, NO_CODE)
        with exact_unless_training(self):
            hidden, cache = self._run(previous, cache, 0)
            return self._logits(hidden, previous.shape[1]), cache

    def _run(self, previous, cache, position_offset) -> tuple[torch.Tensor, EncodecLMCache]:
        """Last layer's output (B, F, D) for frames whose predecessors are `previous`."""
        if not self.config.has_float_form:
            raise ValueError("this checkpoint holds the integer form alone, allowed: frequencies()")
        refuse_tracing("EncodecLM")
        previous = previous.to(self.device)
        if cache is None:
            cache = self._first_cache(previous, position_offset)
        frames = previous.shape[2]
        hidden = self.input_norm(self._embed(previous))
        positions = cache.position
        if frames > 1:
            positions = positions + torch.arange(frames, device=hidden.device)
        table = self._kept("positions", self.position_table)
        hidden = hidden + table[positions % len(table)].to(hidden)
        visible = attention_mask(frames, cache.keys[0].shape[2], self.config.context_frames, hidden.device)
        keys, values, reach = [], [], self.config.context_frames
        for layer, past_keys, past_values in zip(self.layers, cache.keys, cache.values):
            hidden, key, value = layer(hidden, past_keys, past_values, visible)
            keys.append(key[:, :, -reach:])
            values.append(value[:, :, -reach:])
        return hidden, EncodecLMCache(keys, values, cache.position + frames)

    def hidden(self, codes: torch.Tensor) -> torch.Tensor:
        """What the heads see, (B, F, D), for frames after each of `codes` (B, K, F)."""
        with exact_unless_training(self):
            return self._run(codes, None, 0)[0]

    def _kept(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What depends on the configuration alone, made once on each device."""
        if torch.compiler.is_compiling():
            return make()
        return self._constants.get((name, self.device), [], make, trained=False)

    def position_table(self) -> torch.Tensor:
        """Cosines, then sines, of every position at hidden_size / 2 rates: (max_positions, D)."""
        half, device = self.config.hidden_size // 2, self.device
        rates = 10000 ** (torch.arange(half, dtype=torch.float32, device=device) / (half - 1))
        phase = torch.arange(self.config.max_positions, device=device)[:, None] / rates
        return torch.cat([phase.cos(), phase.sin()], dim=-1)

    def _embed(self, previous: torch.Tensor) -> torch.Tensor:
        """Sum of the embeddings of the codes (B, K, F) of each frame, as (B, F, D)."""
        index = previous.transpose(1, 2) + self._kept("starts", self._embedding_starts)[: previous.shape[1]]
        if isinstance(self.embeddings, CodeEmbedding):
            return self.embeddings(index, summed=True)
        return self.embeddings(index).sum(2)  # what somebody put in its place

    def _embedding_starts(self) -> torch.Tensor:
        """Row of each codebook's first code among the embeddings; the one before it is for "no frame before"."""
        rows = self.config.codebook_size + 1
        return rows * torch.arange(self.config.num_codebooks, device=self.device) + 1

    def _first_cache(self, previous: torch.Tensor, position_offset) -> EncodecLMCache:
        batch, width = len(previous), self.config.hidden_size
        if position_offset is None:
            position_offset = 0
            if self.training:
                last = max(1, self.config.max_positions - previous.shape[2])
                position_offset = torch.randint(last, (batch,), device="cpu")
        position = as_codes("position_offset", position_offset).to(previous.device).expand(batch)[:, None]
        keys, values = [], []
        for layer in self.layers:
            shape = batch, int(self.config.zero_past_key), width
            zeros = torch.zeros(shape, dtype=self.dtype, device=previous.device)
            _, key, value = layer.split_heads(layer.qkv_proj(zeros))
            keys.append(key)
            values.append(value)
        return EncodecLMCache(keys, values, position)

    def _logits(self, hidden: torch.Tensor, count: int) -> torch.Tensor:
        logits = self._head(hidden, slice(count * self.config.codebook_size))
        return logits.unflatten(2, (count, -1)).transpose(1, 2)

    def _head(self, hidden: torch.Tensor, rows: slice) -> torch.Tensor:
        """These `rows` of the head's outputs."""
        if isinstance(self.head, CodeHead):
            return self.head(hidden, rows=rows)
        return self.head(hidden)[..., rows]  # what somebody put in its place

    def _logits_by_codebook(self, hidden: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """Logits (B, F, codebook_size) of each of the first `count` codebooks, one after the other, for memory."""
        size = self.config.codebook_size
        if torch.is_grad_enabled() and isinstance(self.head, CodeHead):
            yield from (self.head(hidden, part=part) for part in self.head.parts(size)[:count])
        else:
            yield from (self._head(hidden, slice(at * size, (at + 1) * size)) for at in range(count))

    def _bits(self, hidden, labels, logits) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean bits per code, of all labels and of each codebook's."""
        sums, counts = [], []
        by_codebook = self._logits_by_codebook(hidden, labels.shape[1]) if logits is None else logits.unbind(1)
        for row_logits, wanted in zip(by_codebook, labels.to(hidden.device).unbind(1)):
            nats = nn.functional.cross_entropy(
                row_logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            sums.append(nats / math.log(2))
            counts.append((wanted != IGNORED).sum())
        sums, counts = torch.stack(sums), torch.stack(counts)
        return sums.sum() / counts.sum(), sums / counts

    def _check_codes(self, name: str, codes: torch.Tensor, lowest: int) -> torch.Tensor:
        most, size = self.config.num_codebooks, self.config.codebook_size
        codes = as_codes(name, codes)
        if codes.dim() != 3 or 0 in codes.shape or codes.shape[1] > most:
            raise ValueError(
                f"{name} have shape {tuple(codes.shape)}, allowed: (batch, codebooks, frames), no 0, "
                f"and at most {most} codebooks"
            )
        least, greatest = torch.stack(torch.aminmax(codes)).tolist()  # one wait for a device
        if least < lowest or greatest >= size:
            raise ValueError(f"{name} range from {least} to {greatest}, allowed: {lowest} to {size - 1}")
        return codes

    # ---- the integer form ----------------------------------------------------------------------------------------

    def quantize(self, codes: torch.Tensor | list[torch.Tensor]) -> "EncodecLM":
        """Make the integer form and attach it; `save_pretrained` then writes both. Returns the model.

        Args:
            codes (torch.LongTensor of shape (B, K, F), or a list of such): real codes, by which the ranges of
                activations are found; a minute of each kind of audio serves.

        Raises:
            ValueError: for codes that are none of this model's, a model without float form, or weights that are not
                finite.
        """
        if not self.config.has_float_form:
            raise ValueError("this checkpoint holds the integer form alone, allowed: one with float weights")
        batches = [
            self._check_codes("codes", batch, 0) for batch in (codes if isinstance(codes, (list, tuple)) else [codes])
        ]
        with torch.device("cpu"):
            integer = IntegerLM(self.config)
        integer.load_state_dict(integer_tables(self, batches))
        self.integer = integer.to(self.device)
        self.config.has_integer_form = True
        return self

    def drop_float_form(self) -> "EncodecLM":
        """Keep the integer form alone: a quarter of the size, for coding but not for training. Returns the model.

        Raises:
            ValueError: without the integer form.
        """
        if self.integer is None:
            raise ValueError("the language model has no integer form, allowed: after lm.quantize(codes)")
        for name in ("embeddings", "input_norm", "layers", "head"):
            delattr(self, name)
        self.config.has_float_form = False
        return self

    def drop_integer_form(self) -> "EncodecLM":
        """Keep the float form alone, for training on: the integer form is of the weights it was made from. Returns
        the model.

        Raises:
            ValueError: without the float form.
        """
        if not self.config.has_float_form:
            raise ValueError("this checkpoint holds the integer form alone, allowed: one with float weights")
        self.integer, self.config.has_integer_form = None, False
        return self

    @torch.no_grad()
    def frequencies(
        self, previous: torch.Tensor, cache: IntegerLMCache | None = None
    ) -> tuple[torch.Tensor, IntegerLMCache]:
        """Whole numbers (B, K, F, codebook_size) that a coder's intervals are made of, and the cache.

        As `predict`, of `previous` and `cache`, but in integers that are the same on every machine, in every batch,
        for one frame at a time or many. Each is at least 1 and those of a code sum to 2**24.

        Raises:
            ValueError: for codes that are none of this model's, or without the integer form.
        """
        if self.integer is None:
            raise ValueError("the language model is float alone, allowed: with integer form, by lm.quantize(codes)")
        return self.integer.frequencies(self._check_codes("previous", previous, NO_CODE), cache)


def _no_frame(codes: torch.Tensor) -> torch.Tensor:
    """What stands (B, K, 1) before the first frame of `codes` (B, K, F)."""
    return torch.full_like(codes[:, :, :1], NO_CODE)


def attention_mask(frames: int, past: int, reach: int, device) -> torch.Tensor | None:
    """True where a frame sees a key, (frames, past + frames): its own and `reach` before. None if all see all."""
    if frames == 1 and past <= reach:
        return None
    distance = torch.arange(past, past + frames, device=device)[:, None] - torch.arange(past + frames, device=device)
    return (distance >= 0) & (distance <= reach)


# What `save_pretrained` writes carries this code along, for `trust_remote_code` on a machine without this package.
EncodecLMConfig.register_for_auto_class()
EncodecLM.register_for_auto_class("AutoModel")

__all__ = ["EncodecLM", "EncodecLMPreTrainedModel"]
