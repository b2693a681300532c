# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""How the audio of chunks that overlap becomes one signal: each faded by a triangle, divided by their sum."""

import torch

from .batching_encodec import padded
from .configuration_encodec import EncodecConfig


def overlap_triangle(length: int, device: torch.device) -> torch.Tensor:
    """What a chunk of `length` samples is faded by: nearly 0 at its ends, 0.5 in the middle, float32."""
    time = torch.linspace(0, 1, length + 2, dtype=torch.float32, device=device)[1:-1]
    return 0.5 - (time - 0.5).abs()


def join_chunks(
    config: EncodecConfig, decoded: list[torch.Tensor], places: list[tuple[int, int]], batch: int
) -> list[torch.Tensor]:
    """Rows (1, channels, T), `batch` of them, of the audio `decoded` of pieces that are chunk n of a row, as `places`
    (n, row) say, row by row. Without chunks pieces are rows.

    In float32: in half precision the triangle's foot is zero, and so would be its sum.
    """
    if config.chunk_length is None:
        return decoded
    chunks, ends = [[None] * batch for _ in range(1 + max(n for n, _ in places))], [0] * batch
    for (n, row), piece in zip(places, decoded):
        chunks[n][row] = piece
        # Rounded up to whole frames, the chunk before the last may end after it.
        ends[row] = max(ends[row], n * config.chunk_stride + piece.shape[2])
    firsts = chunks[0]
    nothing = firsts[0][..., :0]
    triangles = {n: overlap_triangle(n, nothing.device)[None, None] for n in {first.shape[2] for first in firsts}}
    audio = nothing.new_zeros(batch, nothing.shape[1], max(ends), dtype=torch.float32)
    weight = audio.new_zeros(batch, 1, max(ends))
    for n, pieces in enumerate(chunks):
        pieces = [nothing if piece is None else piece for piece in pieces]
        # All chunks are faded by the first one's triangle; only a signal that ends soon has a shorter one.
        fades = [triangles[first.shape[2]][..., : piece.shape[2]] for first, piece in zip(firsts, pieces)]
        piece, fade = padded(pieces), padded(fades[:1] if _are_alike(fades) else fades)
        span = slice(n * config.chunk_stride, n * config.chunk_stride + piece.shape[2])
        audio[..., span] += fade * piece
        weight[..., span] += fade
    audio /= weight
    return [audio[row : row + 1, :, :end] for row, end in enumerate(ends)]


def _are_alike(fades: list[torch.Tensor]) -> bool:
    return len({(fade.data_ptr(), fade.shape) for fade in fades}) == 1
