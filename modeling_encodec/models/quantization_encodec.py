# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""Residual vector quantisation (paper section 3.2): each codebook codes what the ones before it left over.

Codebooks stay in float32 and so does the nearest-code search, whatever the dtype of the rest of the model: in half
precision most codes of the later stages would be others. Buffer names are those of Transformers' EncodecModel.

Codebooks learn without gradients: `forward` counts which vectors fell to which code, `update_codebooks` moves every
code towards the running mean of its vectors. With several processes the counts are summed over all of them, in
collectives that every process calls every time, so the codebooks stay equal to the bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed, nn
from torch.nn import functional as F
from transformers import initialization as init

from .batching_encodec import as_codes, as_tensor, compute_device, refuse_tracing, to_device
from .configuration_encodec import EncodecConfig
from .inputs_encodec import whole_number
from .weight_cache_encodec import WeightCache


# Added to each code's count before dividing by it, relative to the total, so that no code has none (original's value).
COUNT_EPSILON = 1e-5
# What a code that k-means gave no vectors starts with: enough to stay where it is until it is revived.
LEAST_COUNT = 1e-3


@dataclass
class CodebookStatistics:
    """What a batch tells the codebooks. K stages used, N latent frames of the batch, D their width.

    Args:
        counts (torch.Tensor of shape (K, size)): vectors that fell to each code.
        sums (torch.Tensor of shape (K, size, D)): the sum of those vectors.
        residuals (torch.Tensor of shape (K, N, D)): the vectors each stage met.
    """

    counts: torch.Tensor
    sums: torch.Tensor
    residuals: torch.Tensor


@dataclass
class QuantizerTrainingOutput:
    """What the quantiser's `forward` returns.

    Args:
        latents (torch.Tensor of shape (B, D, F)): quantised latents, with the gradient passed straight through.
        commitment_losses (torch.Tensor of shape (K,)): mean squared distance of each stage to its code.
        codes (torch.LongTensor of shape (K, B, F)): the codes.
        statistics (CodebookStatistics): for `update_codebooks`.
    """

    latents: torch.Tensor
    commitment_losses: torch.Tensor
    codes: torch.Tensor
    statistics: CodebookStatistics


class EncodecEuclideanCodebook(nn.Module):
    """One codebook: vectors `embed` (size, D) and the running sums they are the means of when training."""

    def __init__(self, config: EncodecConfig):
        super().__init__()
        size, dim = config.codebook_size, config.codebook_dim
        self.inited = nn.Buffer(torch.ones(1, dtype=torch.float32))
        self.cluster_size = nn.Buffer(torch.zeros(size, dtype=torch.float32))
        self.embed = nn.Buffer(torch.empty(size, dim, dtype=torch.float32))
        self.embed_avg = nn.Buffer(torch.empty(size, dim, dtype=torch.float32))
        self.cache = WeightCache()
        self.reset_parameters()

    def reset_parameters(self):
        """Random vectors, so that a model without a checkpoint already uses all its codes."""
        init.ones_(self.inited)
        init.ones_(self.cluster_size)
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

    def forward(self) -> torch.Tensor:
        """The vectors (size, D), float32. Called, so that an offloaded codebook is brought back first."""
        return self.embed.float()

    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """Index of the nearest codebook vector for each of (..., D) `vectors`, as (...) int64."""
        codes = self.quantize(vectors.reshape(-1, vectors.shape[-1]))
        return codes.view(vectors.shape[:-1])

    def quantize(self, vectors: torch.Tensor) -> torch.Tensor:
        """The same of (N, D) `vectors`, as (N,) int64."""
        if torch.compiler.is_compiling():
            return _nearest(vectors, *_search_form(self()))
        # Kept until they change: a live stream asks for one frame at a time.
        return _nearest(vectors, *self.cache.get("search", [self.embed], lambda: _search_form(self())))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codebook vectors (..., D) of int64 `codes` (...)."""
        return F.embedding(codes, self())

    def start(self, vectors: torch.Tensor, counts: torch.Tensor) -> None:
        """Take (size, D) `vectors` as codes that have met `counts` (size,) vectors each."""
        counts = counts.clamp(min=LEAST_COUNT)
        self.embed.copy_(vectors)
        self.cluster_size.copy_(counts)
        self.embed_avg.copy_(vectors * counts[:, None])
        self.inited.fill_(1)


class EncodecVectorQuantization(nn.Module):
    """One stage of the residual quantiser."""

    def __init__(self, config: EncodecConfig):
        super().__init__()
        self.codebook = EncodecEuclideanCodebook(config)

    def encode(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Codes (B, F) int64 of latents, or what is left of them, `hidden_states` (B, D, F)."""
        return self.codebook.encode(hidden_states.transpose(1, 2).float())

    def decode(self, embed_ind: torch.Tensor) -> torch.Tensor:
        """Codebook vectors (B, D, F) float32 of codes `embed_ind` (B, F)."""
        return self.codebook.decode(embed_ind).transpose(1, 2)


class EncodecResidualVectorQuantizer(nn.Module):
    """The stages in order. Using only the first of them is how one model serves several bandwidths.

    Codebooks come first in its tensors, (K, B, F), as in stock: Bark and others call it directly.
    """

    def __init__(self, config: EncodecConfig):
        super().__init__()
        self.config = config
        self.codebook_size, self.frame_rate = config.codebook_size, config.frame_rate
        self.num_quantizers = config.num_quantizers
        self.layers = nn.ModuleList([EncodecVectorQuantization(config) for _ in range(config.num_quantizers)])

    @property
    def device(self) -> torch.device:
        """Where the codebooks are; latents and codes are brought there."""
        return compute_device(self.layers[0].codebook)

    def get_num_quantizers_for_bandwidth(self, bandwidth: float | None = None) -> int:
        """Codebooks used at `bandwidth` kbps, at least one, and all of them without one."""
        return self.config.num_quantizers_for_bandwidth(bandwidth) if bandwidth else len(self.layers)

    @torch.no_grad()
    def encode(
        self, embeddings: torch.Tensor, bandwidth: float | None = None, *, num_quantizers: int | None = None
    ) -> torch.Tensor:
        """Codes (K, B, F) int64 of latents `embeddings` (B, D, F), with as many codebooks as `bandwidth` or
        `num_quantizers` says."""
        refuse_tracing("the quantizer")
        if num_quantizers is None:
            count = self.get_num_quantizers_for_bandwidth(bandwidth)
        else:
            count = whole_number("num_quantizers", num_quantizers, 1, len(self.layers))
        embeddings = as_tensor("embeddings", embeddings)
        batch, _, frames = embeddings.shape
        residual = embeddings.to(self.device, torch.float32).transpose(1, 2).flatten(0, 1)  # (B * F, D)
        codes = []
        for stage in range(count):
            if stage > 0:
                residual = residual - self.layers[stage - 1].codebook.decode(codes[-1])
            codes.append(self.layers[stage].codebook.quantize(residual))
        return torch.stack(codes).view(count, batch, frames)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Latents (B, D, F) float32 of `codes` (K, B, F): the sum over the codebooks used."""
        refuse_tracing("the quantizer")
        codes = as_codes("codes", codes).to(self.device)
        total = self.layers[0].codebook.decode(codes[0])
        for stage in range(1, len(codes)):
            total = total + self.layers[stage].codebook.decode(codes[stage])
        return total.transpose(1, 2)

    # ---- training ------------------------------------------------------------------------------------------------

    def forward(
        self, embeddings: torch.Tensor, num_quantizers: int | None = None, *, upstream: bool = False
    ) -> QuantizerTrainingOutput:
        """Quantise latents `embeddings` (B, D, F) for training, with the first `num_quantizers` codebooks.

        What a stage passes on is detached from its codes, so that each stage's commitment reaches the encoder (paper
        eq. 3). In the `encodec` package it is not, and the gradients of all stages but the first cancel; `upstream`
        does the same, by stopping them.
        """
        refuse_tracing("the quantizer")
        batch, dim, frames = embeddings.shape
        with torch.autocast(embeddings.device.type, enabled=False):
            vectors = embeddings.float().transpose(1, 2).reshape(-1, dim)  # (N, D)
            residual, codes, losses, residuals = vectors, [], [], []
            embeds = [layer.codebook() for layer in self.layers[:num_quantizers]]
            for embed, *form in zip(embeds, *_search_form(torch.stack(embeds))):
                codes.append(_nearest(residual.detach(), *form))
                residuals.append(residual.detach())
                quantized = F.embedding(codes[-1], embed)
                losses.append(F.mse_loss(residual, quantized))
                residual = residual - quantized
                if upstream:
                    residual = residual.detach()
            # The gradient skips the rounding: it goes to the sum of the stages as to the latents themselves.
            straight = vectors + (-residual).detach()
        return QuantizerTrainingOutput(
            straight.view(batch, frames, dim).transpose(1, 2),
            torch.stack(losses),
            torch.stack(codes).view(-1, batch, frames),
            self._statistics(torch.stack(codes), torch.stack(residuals)),
        )

    @torch.no_grad()
    def _statistics(self, codes: torch.Tensor, residuals: torch.Tensor) -> CodebookStatistics:
        """Counts and sums per code of the vectors (K, N, D) with their `codes` (K, N)."""
        stages, size = len(codes), self.config.codebook_size
        index = (codes + size * torch.arange(stages, device=codes.device)[:, None]).flatten()
        counts = residuals.new_zeros(stages * size).index_add_(0, index, residuals.new_ones(len(index)))
        sums = residuals.new_zeros(stages * size, residuals.shape[2]).index_add_(0, index, residuals.flatten(0, 1))
        return CodebookStatistics(counts.view(stages, size), sums.view(stages, size, -1), residuals)

    @torch.no_grad()
    def update_codebooks(
        self,
        statistics: Sequence[CodebookStatistics],
        *,
        decay: float = 0.99,
        dead_code_threshold: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """One step of the codebooks, from the statistics of the batches of one update on every process.

        Collective: every process calls it with the same number of stages. Codes used less than `dead_code_threshold`
        times the mean come back as vectors of the batch, at most an eighth of a codebook at once; 0 leaves them.
        Returns the counts (K, size) of all processes, which tell how codebooks are used (`codebook_usage`); the
        running counts do not, for those of revived codes are given and not earned.
        """
        counts = sum(item.counts for item in statistics)
        sums = sum(item.sums for item in statistics)
        candidates = _draw(torch.cat([item.residuals for item in statistics], dim=1), counts.shape[1], generator)
        _sum_over_processes(counts, sums, candidates)
        # All stages at once: a GPU would wait for the thousand small operations of one after the other.
        codebooks = [layer.codebook for layer in self.layers[: len(counts)]]
        sizes = torch.stack([codebook.cluster_size for codebook in codebooks]).lerp_(counts, 1 - decay)
        averages = torch.stack([codebook.embed_avg for codebook in codebooks]).lerp_(sums, 1 - decay)
        vectors = _means(sizes, averages)
        if dead_code_threshold > 0:
            _revive(sizes, averages, vectors, candidates, dead_code_threshold)
        for name, stacked in ("cluster_size", sizes), ("embed_avg", averages), ("embed", vectors):
            torch._foreach_copy_([getattr(codebook, name) for codebook in codebooks], list(stacked.unbind()))
        return counts

    @torch.no_grad()
    def start_codebooks(
        self,
        embeddings: torch.Tensor,
        *,
        first: int = 0,
        iterations: int = 50,
        batches: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        """Start the codebooks from `first` on by k-means over latents `embeddings` (B, D, F) of every process.

        Collective: every process calls it, with the same shape. `batches` is how many training batches the latents
        are of, to bring the counts to one batch.
        """
        vectors = _gather(embeddings.to(self.device, torch.float32).transpose(1, 2).reshape(-1, embeddings.shape[1]))
        for stage, layer in enumerate(self.layers):
            codebook = layer.codebook
            if stage >= first:
                centroids, counts = kmeans(vectors, self.config.codebook_size, iterations, generator)
                _broadcast(centroids, counts)  # machines of different kinds round differently
                codebook.start(centroids, counts / batches)
            vectors = vectors - codebook.decode(codebook.quantize(vectors))


def codebook_usage(counts: torch.Tensor, threshold: float = 0.1) -> tuple[list[float], list[float]]:
    """Perplexity of each codebook, and the part of its codes used at least `threshold` times as much as the mean, for
    `counts` (K, size) of how often codes were used; both 0 for a codebook that was not."""
    counts = counts.cpu().double()
    share = counts / counts.sum(1, keepdim=True).clamp(min=1e-12)
    perplexity = torch.special.entr(share).sum(1).exp() * (counts.sum(1) > 0)
    return perplexity.tolist(), (share * share.shape[1] >= threshold).double().mean(1).tolist()


def _means(sizes: torch.Tensor, averages: torch.Tensor) -> torch.Tensor:
    """Codes (K, size, D) by their running counts (K, size) and sums (K, size, D) (paper section 3.2)."""
    total = sizes.sum(1, keepdim=True)
    smoothed = (sizes + COUNT_EPSILON) * total / (total + sizes.shape[1] * COUNT_EPSILON)
    return averages / smoothed[..., None]


def _revive(
    sizes: torch.Tensor, averages: torch.Tensor, vectors: torch.Tensor, candidates: torch.Tensor, threshold: float
) -> None:
    """Put `candidates` (K, R, D), vectors of the batch, in place of each codebook's R least used codes, where used
    less than `threshold` times the mean; running counts, sums and codes as of `_means`, which are changed.

    The running count and sum start anew too, with the mean's weight. The original replaces the vector alone, and
    before the update, which overwrites it from the old count and sum: there a dead code stays dead.
    """
    mean = sizes.mean(1, keepdim=True)
    least = sizes.argsort(dim=1, stable=True)[:, : candidates.shape[1]]
    used = sizes.gather(1, least)
    dead = used < threshold * mean
    sizes.scatter_(1, least, torch.where(dead, mean, used))
    places = least[..., None].expand_as(candidates)
    for kept, new in (averages, candidates * mean[..., None]), (vectors, candidates):
        kept.scatter_(1, places, torch.where(dead[..., None], new, kept.gather(1, places)))


def kmeans(
    vectors: torch.Tensor, size: int, iterations: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`size` centroids (size, D) of (N, D) `vectors` and their counts (size,); one that has no vectors stays put.

    Starts from vectors drawn without replacement, as far as there are enough.
    """
    count = len(vectors)
    rounds = [torch.randperm(count, generator=generator, device="cpu") for _ in range(-(-size // count))]
    order = torch.cat(rounds)
    centroids = vectors[order[:size].to(vectors.device)].clone()
    for _ in range(iterations):
        codes = _nearest(vectors, *_search_form(centroids))
        counts = torch.bincount(codes, minlength=size).to(vectors.dtype)
        sums = torch.zeros_like(centroids).index_add_(0, codes, vectors)
        centroids = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids)
    return centroids, counts


def _search_form(embed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """|e|^2 (..., size) and e (..., D, size) of the vectors `embed` (..., size, D); on a CPU times -2, in the order it
    is read."""
    if embed.device.type == "cpu":
        return embed.square().sum(-1), (-2 * embed).mT.contiguous()
    return torch.einsum("...d,...d->...", embed, embed), embed.mT


def _nearest(vectors: torch.Tensor, squares: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Index (N,) of the code that is nearest to each of (N, D) `vectors`, of codes in their search form.

    |x - e|^2 = |x|^2 - 2 x.e + |e|^2; the first term is the same for every code and is left out, which also spares its
    rounding. Equal distances give the lower index.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        distances = torch.addmm(squares, vectors, directions, alpha=1 if vectors.device.type == "cpu" else -2)
    if distances.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(distances.numpy().argmin(1))  # a tenth of PyTorch's time
    return distances.argmin(dim=1)


def _draw(residuals: torch.Tensor, size: int, generator: torch.Generator | None) -> torch.Tensor:
    """Vectors (K, R, D) drawn over all processes, R an eighth of the codebook: this process's, and 0 for the others'.

    The positions, spread evenly over the processes' frames in their order, are the first process's draw.
    """
    stages, frames, dim = residuals.shape
    count = max(1, size // 8)
    offset = torch.rand(stages, count, generator=generator, dtype=torch.float32, device="cpu")
    offset = to_device(offset, residuals.device)
    _broadcast(offset)
    world, rank = (distributed.get_world_size(), distributed.get_rank()) if _is_distributed() else (1, 0)
    offset = offset.clamp(max=0.999)  # so that the last place does not round up to nobody's
    place = (torch.arange(count, device=offset.device) + offset) / count * world - rank
    index = (place * frames).long().clamp(0, frames - 1)
    drawn = residuals.gather(1, index[..., None].expand(-1, -1, dim))
    return drawn * ((place >= 0) & (place < 1))[..., None]


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _sum_over_processes(*tensors: torch.Tensor) -> None:
    if _is_distributed():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, piece in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(piece.view_as(tensor))


def _broadcast(*tensors: torch.Tensor) -> None:
    if _is_distributed():
        for tensor in tensors:
            distributed.broadcast(tensor, 0)


def _gather(vectors: torch.Tensor) -> torch.Tensor:
    """The (N, D) vectors of all processes, in their order."""
    if not _is_distributed():
        return vectors
    pieces = [torch.empty_like(vectors) for _ in range(distributed.get_world_size())]
    distributed.all_gather(pieces, vectors.contiguous())
    return torch.cat(pieces)
