# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""Rows of a batch: their lengths checked on the way in, grouped for computing, their chunks stacked on the way out."""

import itertools

import numpy as np
import torch

from .inputs_encodec import audio_array, plain_array, scale_pcm, shown


def group_by_length(lengths: list[int], most: int) -> list[list[int]]:
    """Indices of similar `lengths` together, at most `most` samples a group, padding counted."""
    groups = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[index] <= most:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


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
    """`tensor` there; what comes from the CPU without waiting for what the device still has to do.

    From pinned memory it would be read later, when its owner may have written there.
    """
    return tensor.to(device, non_blocking=tensor.device.type == "cpu" and not tensor.is_pinned())


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
    if not (on_the_right | on_the_left).all():
        raise ValueError("padding_mask has 0 between 1s or 1 between 0s, allowed: padding on the right or on the left")
    if (kept == 0).any():
        raise ValueError(f"padding_mask leaves no sample in row {int(kept.argmin())}, allowed: at least one")
    return torch.where(on_the_right, kept, samples).tolist()


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
    width = max(piece.shape[-1] for piece in pieces)
    stacked = pieces[0].new_zeros(max(shape), len(shape), pieces[0].shape[1], width)
    places = [(chunk, row) for row, chunks in enumerate(shape) for chunk in range(chunks)]
    for (chunk, row), piece in zip(places, pieces):
        stacked[chunk, row, :, : piece.shape[-1]] = piece[0]
    return stacked


def stack_scales(scales: list[torch.Tensor], shape: list[int]) -> list[torch.Tensor]:
    """Scales (1, 1) of the same pieces as N tensors (B, 1), zero where there is nothing."""
    return list(stack_chunks([scale[None] for scale in scales], shape)[..., 0])
