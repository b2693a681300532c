"""Codes of the CPU and of the card, of real audio: in `exact` equal or ties, in `fast` as many as is published."""

import copy
import functools
import math

import torch
from models import bundled, codec, mask_of, real_clips


def measure(bench) -> None:
    """The bundled 24 kHz codec, and the 48 kHz one with random weights, every clip alone and all of them together."""
    for name in ("bundled 24 kHz", "48 kHz, random weights"):
        model = bundled()[0] if "bundled" in name else codec("48khz", bench.rehearse)
        config = model.config
        clips = real_clips(config.sampling_rate, config.audio_channels)
        if next(iter(clips.values())).shape[0] != config.audio_channels:
            bench.note(name, "not run: soundfile is not installed")
            continue
        most = config.sampling_rate * (1 if bench.rehearse else 20)
        _of_model(bench, name, model, [clip[:, :most] for clip in clips.values()])


def _of_model(bench, name: str, model, rows: list[torch.Tensor]) -> None:
    there = copy.deepcopy(model).to(bench.device)
    for label, batches in {"each clip alone": [[row] for row in rows], "all together": [rows]}.items():
        for precision, find in {"exact": _compare_exact, "fast": _compare_fast}.items():
            there.precision = precision
            bench.try_note(f"{name}, {label}, {precision}", functools.partial(find, model, there, batches))


@torch.no_grad()
def _coded(model, rows: list[torch.Tensor], device):
    lengths = [row.shape[1] for row in rows]
    audio = torch.stack([torch.nn.functional.pad(row, (0, max(lengths) - row.shape[1])) for row in rows])
    mask = mask_of(lengths)
    options = {"num_quantizers": min(8, model.config.num_quantizers), "return_latents": True}
    return model.encode(audio.to(device), mask.to(device), **options)


def _frames(coded, config):
    """(chunk, row) -> frames that count."""
    for row, length in enumerate(coded.audio_lengths.tolist()):
        for chunk, (start, stop) in enumerate(config.chunk_spans(length)):
            yield chunk, row, config.num_frames(stop - start)


def _compare_exact(model, there, batches) -> str:
    """Frames that are equal, ties, and what is neither."""
    from modeling_encodec.models.ties import is_tie

    total = ties = wrong = 0
    worst = 0.0
    for rows in batches:
        ours, theirs = _coded(model, rows, "cpu"), _coded(there, rows, there.device)
        for chunk, row, frames in _frames(ours, model.config):
            mine, other = (one.audio_codes[chunk, row, :, :frames].cpu() for one in (ours, theirs))
            latents, moved = (one.latents[chunk, row, :, :frames].cpu().double() for one in (ours, theirs))
            worst = max(worst, ((latents - moved).norm(dim=0) / latents.norm(dim=0).clamp(min=1e-9)).max().item())
            total += frames
            for frame in (mine != other).any(0).nonzero().flatten().tolist():
                tie = is_tie(model, latents[:, frame], mine[:, frame], other[:, frame])
                ties, wrong = ties + tie, wrong + (not tie)
    said = f"{total - ties - wrong} of {total} frames equal ({(total - ties - wrong) / total:.3%}), {ties} ties"
    return f"{said}, {wrong} WRONG; latents within {worst:.1e}" if wrong else f"{said}; latents within {worst:.1e}"


@torch.no_grad()
def _compare_fast(model, there, batches) -> str:
    """Codes that are equal, and how near audio of the same codes is."""
    equal, signal, noise = [], 0.0, 0.0
    for rows in batches:
        ours, theirs = _coded(model, rows, "cpu"), _coded(there, rows, there.device)
        for chunk, row, frames in _frames(ours, model.config):
            mine, other = (one.audio_codes[chunk, row, :, :frames].cpu() for one in (ours, theirs))
            equal.append(mine == other)
        ours.latents = theirs.latents = None
        mine = model.decode(**ours).audio_values.double()
        other = there.decode(**ours).audio_values.cpu().double()
        signal, noise = signal + mine.square().sum().item(), noise + (mine - other).square().sum().item()
    equal = torch.cat(equal, dim=1).double()
    ratio = 10 * math.log10(signal / noise) if noise else math.inf
    every, first = equal.mean(), equal[0].mean()
    return f"{every:.1%} of codes equal, {first:.1%} of the first codebook's; audio of the same codes {ratio:.0f} dB"
