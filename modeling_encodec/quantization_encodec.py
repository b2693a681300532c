# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""Residual vector quantisation (paper section 3.2): each codebook codes what the ones before it left over.

Codebooks stay in float32 and so does the nearest-code search, whatever the dtype of the rest of the model: in half
precision most codes of the later stages would be others. Buffer names are those of Transformers' EncodecModel.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_encodec import EncodecConfig


class EncodecEuclideanCodebook(nn.Module):
    """One codebook: vectors `embed` (size, D) and the running sums they are the means of when training."""

    def __init__(self, config: EncodecConfig):
        super().__init__()
        size, dim = config.codebook_size, config.codebook_dim
        self.inited = nn.Buffer(torch.ones(1))
        self.cluster_size = nn.Buffer(torch.zeros(size))
        self.embed = nn.Buffer(torch.empty(size, dim))
        self.embed_avg = nn.Buffer(torch.empty(size, dim))
        self.reset_parameters()

    def reset_parameters(self):
        """Random vectors, so that a model without a checkpoint already uses all its codes."""
        init.ones_(self.inited)
        init.zeros_(self.cluster_size)
        init.normal_(self.embed)
        init.copy_(self.embed_avg, self.embed)

    def _apply(self, fn, recurse=True):
        # `.half()` and `.to(torch.bfloat16)` move a codebook but never round it: codes would change.
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            if self._buffers[name].dtype != buffer.dtype and buffer.dtype == torch.float32:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """Index of the nearest codebook vector for each of (N, D) `vectors`, as (N,) int64.

        |x - e|^2 = |x|^2 - 2 x.e + |e|^2; the first term is the same for every entry and is left out, which also
        spares its rounding. Equal distances give the lower index.
        """
        embed = self.embed.float()
        with torch.autocast(embed.device.type, enabled=False):
            return torch.addmm(embed.square().sum(1), vectors, embed.t(), alpha=-2).argmin(dim=1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codebook vectors (..., D) of int64 `codes` (...)."""
        return F.embedding(codes, self.embed.float())


class EncodecVectorQuantization(nn.Module):
    """One stage of the residual quantiser (a level kept for the names in checkpoints)."""

    def __init__(self, config: EncodecConfig):
        super().__init__()
        self.codebook = EncodecEuclideanCodebook(config)


class EncodecResidualVectorQuantizer(nn.Module):
    """The stages in order. Using only the first of them is how one model serves several bandwidths.

    Codebooks come first in its tensors, (K, B, F), as in stock: Bark and others call it directly.
    """

    def __init__(self, config: EncodecConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([EncodecVectorQuantization(config) for _ in range(config.num_quantizers)])

    @property
    def device(self) -> torch.device:
        """Where the codebooks are; latents and codes are brought there."""
        return self.layers[0].codebook.embed.device

    def get_num_quantizers_for_bandwidth(self, bandwidth: float | None = None) -> int:
        """Codebooks used at `bandwidth` kbps, all of them without one."""
        return self.config.num_quantizers_for_bandwidth(bandwidth) if bandwidth else len(self.layers)

    @torch.no_grad()
    def encode(
        self, embeddings: torch.Tensor, bandwidth: float | None = None, *, num_quantizers: int | None = None
    ) -> torch.Tensor:
        """Codes (K, B, F) int64 of latents `embeddings` (B, D, F), with as many codebooks as `bandwidth` or
        `num_quantizers` says."""
        count = num_quantizers or self.get_num_quantizers_for_bandwidth(bandwidth)
        batch, _, frames = embeddings.shape
        residual = embeddings.to(self.device, torch.float32).transpose(1, 2).flatten(0, 1)  # (B * F, D)
        codes = []
        for layer in self.layers[:count]:
            codes.append(layer.codebook.encode(residual))
            residual = residual - layer.codebook.decode(codes[-1])
        return torch.stack(codes).view(count, batch, frames)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Latents (B, D, F) float32 of `codes` (K, B, F): the sum over the codebooks used."""
        codes = codes.to(self.device)
        total = self.layers[0].codebook.decode(codes[0])
        for stage in range(1, len(codes)):
            total = total + self.layers[stage].codebook.decode(codes[stage])
        return total.transpose(1, 2)
