"""Held-out clips through the codec: SI-SNR and mel distance per bandwidth, and clips to listen to."""

import logging
import math
import os
from pathlib import Path
from statistics import fmean

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from modeling_encodec.evaluation.metrics import mel_distance, si_snr
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.processors.audio import read_audio, write_audio
from modeling_encodec.processors.corpus.clips import resolve
from modeling_encodec.processors.corpus.reading import list_recordings


logger = logging.getLogger(__name__)


def read_clips(source: str | os.PathLike, model: EncodecModel, count: int, seconds: float) -> dict[str, torch.Tensor]:
    """`count` clips of a folder or manifest, spread evenly over its files, as name -> (1, channels, T), at most
    `seconds` long. Files that cannot be read are passed over with a line in the log.

    Raises:
        FileNotFoundError: if there is no such folder or manifest.
        ValueError: if not one can be read.
    """
    files, config = list_recordings(source), model.config
    step = max(1, len(files) / count)
    clips = {}
    for name, location in [files[int(number * step)] for number in range(min(count, len(files)))]:
        path, part = resolve(location)
        try:
            audio, _ = read_audio(path, config.sampling_rate, config.audio_channels, **part)
        except (OSError, ValueError) as error:
            logger.warning("not validated on: %s", error)
            continue
        clips[name] = torch.from_numpy(audio[None, :, : int(seconds * config.sampling_rate)])
    if not clips:
        raise ValueError(f"{source}: none of {len(files)} files could be read")
    return clips


@torch.no_grad()
def validate(
    model: EncodecModel, clips: dict[str, torch.Tensor], accelerator: Accelerator | None = None
) -> dict[float, dict[str, float]]:
    """Mean SI-SNR (dB) and mel distance over `clips` for each bandwidth of `model`; processes share the clips.

    SI-SNR of silence is undefined: such clips count in the mel distance alone.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    rows = []
    for audio in list(clips.values())[rank::world]:
        for bandwidth in model.config.target_bandwidths:
            decoded = model(audio.to(model.device), bandwidth=bandwidth).audio_values.float().cpu()
            distance = mel_distance(audio, decoded, model.config.sampling_rate).mean().item()
            rows.append((bandwidth, si_snr(audio, decoded).mean().item(), distance))
    if world > 1:
        rows = gather_object(rows)
    results = {}
    for bandwidth in model.config.target_bandwidths:
        ratios = [ratio for b, ratio, _ in rows if b == bandwidth and math.isfinite(ratio)]
        distances = [distance for b, _, distance in rows if b == bandwidth]
        results[bandwidth] = {"si_snr": fmean(ratios) if ratios else math.nan, "mel_distance": fmean(distances)}
    return results


@torch.no_grad()
def decode_clips(model: EncodecModel, clips: dict[str, torch.Tensor], folder: Path) -> dict[str, dict]:
    """Every clip at every bandwidth as WAV files in `folder`, and spectrograms.png if Matplotlib is there.

    Returns clip -> version -> audio (channels, T) as numpy arrays, the original among them.
    """
    rate = model.config.sampling_rate
    rows = {}
    for number, audio in enumerate(clips.values()):
        versions = {"original": audio}
        for bandwidth in model.config.target_bandwidths:
            versions[f"{bandwidth:g} kbps"] = model(audio.to(model.device), bandwidth=bandwidth).audio_values
        rows[f"clip {number}"] = {name: version[0].float().cpu().numpy() for name, version in versions.items()}
    for clip, versions in rows.items():
        for name, version in versions.items():
            write_audio(folder / f"{clip} {name}.wav".replace(" ", "_"), version, rate)
    try:
        from modeling_encodec.evaluation.plots import plot_audio, save_figure

        save_figure(plot_audio(rows, rate), folder / "spectrograms.png")
    except ImportError as error:
        logger.warning("no spectrograms: %s", error)
    return rows
