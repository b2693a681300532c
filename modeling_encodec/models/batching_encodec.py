# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""Rows of a batch: their lengths checked on the way in, grouped for computing, their chunks stacked on the way out."""

import itertools
import math
from collections import Counter

import numpy as np
import torch

from .inputs_encodec import audio_array, plain_array, scale_pcm, shown


# What a sample of one of the widest layers takes while it is computed, with its copies, as measured by counting.
BYTES_PER_SAMPLE = 20


def group_by_length(lengths: list[int], most: int, longest: float = math.inf) -> list[list[int]]:
    """Indices of similar `lengths` together, ascending, at most `most` samples a group, padding counted, of which
    `longest` of a row are there at a time."""
    groups = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * min(lengths[index], longest) <= most:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def group_alike(lengths: list[int], most: int, longest: int) -> list[list[int]]:
    """The same for an accelerator. A length that a quarter of the rows have makes groups of its own: equal rows need
    no padding, nor masks."""
    counts, kinds = Counter(lengths), {None: []}
    for index, length in enumerate(lengths):
        common = counts[length] > 1 and 4 * counts[length] >= len(lengths)
        kinds.setdefault(length if common else None, []).append(index)
    return [
        [kind[place] for place in group]
        for kind in kinds.values()
        for group in group_by_length([lengths[index] for index in kind], most, longest)
    ]


def accelerator_frames(config, device: torch.device, most: int) -> int:
    """Frames of all rows computed together there: what takes as much memory as `most` frames of the 24 kHz model do,
    and a quarter of the device's at most."""
    samples = most * 320 * 32  # of the widest layers
    if device.type == "cuda" and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(device).total_memory
        samples = min(samples, memory // 4 // BYTES_PER_SAMPLE)
    return max(1, samples // (config.hop_length * config.num_filters))


def padded(pieces: list[torch.Tensor], width: int | None = None) -> torch.Tensor:
    """Pieces (1, C, T), of any T, as (N, C, `width`), by default the longest's, with zeros after each."""
    lengths = [piece.shape[2] for piece in pieces]
    width = max(lengths) if width is None else width
    if min(lengths) == width:
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    nothing = pieces[0].new_zeros(1, pieces[0].shape[1], width - min(lengths))
    # One after the other in time, in one copy.
    joined = torch.cat([part for piece in pieces for part in (piece, nothing[..., : width - piece.shape[2]])], dim=2)
    return joined.view(-1, len(pieces), width).transpose(0, 1)


def compute_device(module: torch.nn.Module) -> torch.device:
    """Where `module` computes: where its tensors are, or, while they are offloaded, where Accelerate brings them."""
    tensor = next(itertools.chain(module.parameters(), module.buffers()))
    if tensor.device.type != "meta":
        return tensor.device
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks if hook is not None)
    device = next((device for device in devices if device is not None), tensor.device)
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` there; a GPU fetches what is on the CPU by itself, and nobody waits for what it still has to do."""
    # That takes pinned memory, and a copy: the owner may write to what was given.
    alone = device.type == "cuda" and tensor.device.type == "cpu" and torch.cuda.is_available()
    if alone and not tensor.is_pinned():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def as_tensor(name: str, value) -> torch.Tensor:
    """`value`, a tensor, array or list of numbers, as a tensor; anything else is a ValueError under its `name`."""
    if isinstance(value, torch.Tensor):
        return value
    array = plain_array(name, value)
    if array.dtype.kind not in "biufc":
        raise ValueError(f"{name} are {array.dtype}, allowed: a tensor or an array of numbers")
    return _from_numpy(array)


def as_codes(name: str, value) -> torch.Tensor:
    """`as_tensor` of whole numbers, as int64; anything else is a ValueError under its `name`."""
    codes = as_tensor(name, value)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"{name} are {codes.dtype}, allowed: whole numbers")
    return codes.long()


def as_audio(name: str, value) -> torch.Tensor:
    """Audio as a tensor: tensors of floating point as they are, all else as float32, integer PCM in [-1, 1)."""
    if isinstance(value, torch.Tensor):
        return value if value.is_floating_point() else scale_pcm(name, value)
    return _from_numpy(audio_array(name, value))


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())  # a tensor may be written to


def refuse_tracing(what: str) -> None:
    """Raise a RuntimeError where `torch.jit.trace` looks on at `what`: it would write the example's length into all
    that follows, and its codes for every input's."""
    if torch.jit.is_tracing():
        raise RuntimeError(
            f"torch.jit.trace of {what} would keep its example's length, allowed: torch.export.export, torch.compile, "
            "or export_onnx (torch.onnx.export with dynamo=True)"
        )


def whole_numbers(name: str, value) -> list[int]:
    """`value`, one whole number a row, as a list; anything else is a ValueError under its `name`."""
    numbers = as_tensor(name, value)
    if numbers.dim() != 1 or numbers.dtype == torch.bool or numbers.is_floating_point() or numbers.is_complex():
        raise ValueError(f"{name} are {shown(value)}, allowed: one whole number a row")
    return numbers.tolist()


def row_lengths(mask: torch.Tensor | None, shape: tuple) -> list[int]:
    """Samples of each row of audio of `shape` (B, channels, T) under its padding `mask`, (B, T) or (B, channels, T);
    all T where it is padded on the left, with silence that the row begins with (see `silence_left_padding`).

    Raises:
        ValueError: for a mask of another shape, with zeros on both sides or between ones, or of nothing but zeros.
    """
    batch, _, samples = shape
    if mask is None:
        return [samples] * batch
    mask = _mask_of_rows(mask, shape)
    kept, places = mask.sum(dim=1), torch.arange(samples, device=mask.device)
    on_the_right = (mask == (places < kept[:, None])).all(dim=1)
    on_the_left = (mask == (places >= samples - kept[:, None])).all(dim=1)
    kept, on_the_right, on_the_left = torch.stack([kept, on_the_right, on_the_left]).tolist()  # one wait for a device
    if not all(right or left for right, left in zip(on_the_right, on_the_left)):
        raise ValueError("padding_mask has 0 between 1s or 1 between 0s, allowed: padding on the right or on the left")
    if 0 in kept:
        raise ValueError(f"padding_mask leaves no sample in row {kept.index(0)}, allowed: at least one")
    return [count if right else samples for count, right in zip(kept, on_the_right)]


def silence_left_padding(audio: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`audio` (B, channels, T) with zeros where its rows are padded on the left.

    Prompts of a batch that a language model goes on from must end together, so MusicGen's processor pads them so. What
    comes first is then part of the row, as in Transformers' EncodecModel: the codec has no frames to leave out there.
    """
    if mask is None:
        return audio
    mask = _mask_of_rows(mask, audio.shape)
    return audio if mask[:, 0].all() else audio.masked_fill(~mask[:, None].to(audio.device), 0)


def _mask_of_rows(mask: torch.Tensor, shape: tuple) -> torch.Tensor:
    """A padding mask as (B, T) bool."""
    batch, _, samples = shape
    mask = as_tensor("padding_mask", mask)
    given = tuple(mask.shape)
    if mask.dim() == 1:
        mask = mask[None]
    if mask.dim() not in (2, 3) or mask.shape[0] != batch or mask.shape[-1] != samples or 0 in given:
        raise ValueError(f"padding_mask has shape {given}, allowed: ({batch}, {samples}) or ({batch}, 1, {samples})")
    return mask.reshape(batch, -1, samples)[:, 0].bool()


def stack_chunks(pieces: list[torch.Tensor], shape: list[int]) -> torch.Tensor:
    """Pieces (1, K, F) of rows with `shape` chunks each, row by row, as (N, B, K, F), zero where there is nothing."""
    width, firsts = max(piece.shape[2] for piece in pieces), [*itertools.accumulate(shape, initial=0)]
    nothing = pieces[0][..., :0]
    ordered = [
        pieces[first + chunk] if chunk < chunks else nothing
        for chunk in range(max(shape))
        for first, chunks in zip(firsts, shape)
    ]
    return padded(ordered, width).unflatten(0, (max(shape), len(shape))).contiguous()


def stack_scales(scales: list[torch.Tensor], shape: list[int]) -> list[torch.Tensor]:
    """Scales (1, 1) of the same pieces as N tensors (B, 1), zero where there is nothing."""
    return list(stack_chunks([scale[None] for scale in scales], shape)[..., 0])
