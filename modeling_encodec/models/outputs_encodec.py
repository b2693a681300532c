# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""What EncodecModel's methods return.

As tuples, and by number, outputs are Transformers' own, so that code which unpacks those runs; the rest goes by name.
"""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


class _StockTuple(ModelOutput):
    """An output of which the first fields, so many as stock's, are its tuple."""

    stock_fields: tuple[str, ...] = ()

    def to_tuple(self) -> tuple:
        """What `return_dict=False` gives."""
        return tuple(self[name] for name in self.stock_fields if name in self)


@dataclass
class EncodecEncoderOutput(_StockTuple):
    """What `encode` returns. N chunks (1 for models that code the whole signal), B rows, K codebooks, F frames.

    Args:
        audio_codes (torch.LongTensor of shape (N, B, K, F)): codes; 0 past a row's end (see the lengths).
        audio_scales (list of N torch.Tensor of shape (B, 1)): loudness that each chunk was divided by, float32; 0
            where a row has no such chunk. `[None]` for a model that does not normalise.
        last_frame_pad_length (int): frames by which the longest row's last chunk is shorter than its first.
        codes_lengths (torch.LongTensor of shape (B,)): frames of each row, all its chunks together.
        audio_lengths (torch.LongTensor of shape (B,)): samples of each row.
        latents (torch.Tensor of shape (N, B, D, F), optional): encoder output before quantisation.
    """

    stock_fields = ("audio_codes", "audio_scales", "last_frame_pad_length")

    audio_codes: torch.Tensor | None = None
    audio_scales: list | None = None
    last_frame_pad_length: int | None = None
    codes_lengths: torch.Tensor | None = None
    audio_lengths: torch.Tensor | None = None
    latents: torch.Tensor | None = None


@dataclass
class EncodecDecoderOutput(_StockTuple):
    """What `decode` returns.

    Args:
        audio_values (torch.Tensor of shape (B, channels, T)): audio, zero past each row's end.
        audio_lengths (torch.LongTensor of shape (B,)): samples of each row.
    """

    stock_fields = ("audio_values",)

    audio_values: torch.Tensor | None = None
    audio_lengths: torch.Tensor | None = None

    def rows(self) -> list[torch.Tensor]:
        """The rows as (channels, T) tensors, each at its own length."""
        return [row[:, :length] for row, length in zip(self.audio_values, self.audio_lengths.tolist())]


@dataclass
class EncodecOutput(_StockTuple):
    """What `forward` returns: the fields of `EncodecEncoderOutput`, without latents, and `audio_values`.

    Args:
        audio_codes (torch.LongTensor of shape (N, B, K, F)): as of `encode`.
        audio_values (torch.Tensor of shape (B, channels, T)): the decoded audio, zero past each row's end.
        audio_scales (list of N torch.Tensor of shape (B, 1)): as of `encode`; `None` for a model that does not
            normalise.
        last_frame_pad_length (torch.LongTensor of shape ()): as of `encode`.
        codes_lengths (torch.LongTensor of shape (B,)): frames of each row; `None` where codes were given.
        audio_lengths (torch.LongTensor of shape (B,)): samples of each row; `None` where codes were given.
    """

    stock_fields = ("audio_codes", "audio_values")

    audio_codes: torch.Tensor | None = None
    audio_values: torch.Tensor | None = None
    audio_scales: list | None = None
    last_frame_pad_length: torch.Tensor | None = None
    codes_lengths: torch.Tensor | None = None
    audio_lengths: torch.Tensor | None = None
