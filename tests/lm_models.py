"""Small language models, codes for them, and tables that stand in for them."""

import numpy as np
import torch

from modeling_encodec.models.configuration_encodec import EncodecLMConfig
from modeling_encodec.models.modeling_lm_encodec import EncodecLM


TOTAL = 1 << 24


class Table:
    """A language model and its integer form: one of some distributions (N, V), by place and the codes before."""

    def __init__(self, distributions: list[list[int]]):
        self.distributions = np.array(distributions)
        assert (self.distributions >= 1).all() and (self.distributions.sum(1) == TOTAL).all()
        self.integer, self.less_1 = self, self.distributions - 1.0

    def frequencies(self, previous: torch.Tensor, cache: int | None = None) -> tuple[torch.Tensor, int]:
        shares, cache = self.shares(previous, cache)
        return torch.from_numpy(shares + 1).int().transpose(1, 2), cache

    def shares(self, previous: torch.Tensor, cache: int | None = None, *, device=None) -> tuple[np.ndarray, int]:
        previous, start = previous.numpy().transpose(0, 2, 1), cache or 0
        _, frames, books = previous.shape
        place = np.arange(start, start + frames)[:, None] * 3 + np.arange(books) * 5
        index = place + 7 * (previous + 1).sum(2, keepdims=True) + previous
        return self.less_1[index % len(self.less_1)], start + frames


def spread(weights: list[int]) -> list[int]:
    """A distribution of these proportions."""
    sizes = [1 + weight * (TOTAL - len(weights)) // max(1, sum(weights)) for weight in weights]
    sizes[weights.index(max(weights))] += TOTAL - sum(sizes)
    return sizes


# 5 frames of context.
SMALL = {
    **{"codebook_size": 16, "num_codebooks": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"intermediate_size": 24, "context_seconds": 0.5, "frame_rate": 10, "max_positions": 64},
}


def make_lm(seed: int = 0, **overrides) -> EncodecLM:
    """A small model, all of whose weights matter."""
    torch.manual_seed(seed)
    lm = EncodecLM(EncodecLMConfig(**(SMALL | overrides))).eval()
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape)
            elif name != "embeddings.weight":
                parameter *= 1.7
    return lm


def make_codes(lm: EncodecLM, batch: int = 2, frames: int = 23, books: int | None = None, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, books or lm.config.num_codebooks, frames)
    return torch.randint(lm.config.codebook_size, shape, generator=generator)


def shifted(codes: torch.Tensor) -> torch.Tensor:
    """What comes before each frame: -1 before the first."""
    return torch.cat([torch.full_like(codes[:, :, :1], -1), codes[:, :, :-1]], dim=2)


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message and "allowed" in message
    return message


def make_integer_lm(seed: int = 0, frames: int = 40, **overrides) -> EncodecLM:
    lm = make_lm(seed, **overrides)
    return lm.quantize(make_codes(lm, frames=frames, seed=100))


def in_parts(lm: EncodecLM, previous: torch.Tensor, sizes: int | list[int], cache=None) -> torch.Tensor:
    parts = []
    for part in previous.split(sizes, dim=2):
        frequencies, cache = lm.frequencies(part, cache)
        parts.append(frequencies)
    return torch.cat(parts, dim=2)
