"""The demo: clips through a model at every bandwidth, and what that costs and gives."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from modeling_encodec.bitstream.compression import compress, decompress
from modeling_encodec.evaluation.metrics import si_snr
from modeling_encodec.evaluation.plots import plot_audio, save_figure
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.processors.audio import read_audio, write_audio
from modeling_encodec.system.atomic import atomic_path


@dataclass(frozen=True)
class DemoRow:
    """One clip at one bandwidth. `kbps` and `ratio` (to 16-bit PCM) come from the bytes of the file."""

    clip: str
    bandwidth: float
    bytes: int
    lm_bytes: int | None
    kbps: float
    ratio: float
    si_snr: float
    encode_seconds: float
    decode_seconds: float


def demo_clips() -> list[Path]:
    """The bundled clips; their README.md says where they come from."""
    return sorted((Path(__file__).parent / "audio").glob("*.flac"), reverse=True)


def run_demo(model: EncodecModel, clips: Sequence[Path], folder: Path, lm: EncodecLM | None = None) -> list[DemoRow]:
    """Code every clip at every bandwidth. Into `folder` go the originals, an `.ecdc` and a wav for each bandwidth, and
    `spectrograms.png`. With a language model there is also what it makes of each file."""
    rate, table, pictures = model.config.sampling_rate, [], {}
    names = [path.stem for path in clips]
    if len(set(names)) < len(names):
        raise ValueError(f"clips are called {', '.join(names)}, allowed: different names")
    originals = [read_audio(path, rate, model.config.audio_channels)[0] for path in clips]
    for name, audio in zip(names, originals):
        write_audio(folder / f"{name}_original.wav", audio, rate)
        pictures[name] = {"original": audio.mean(0)}
        decompress(compress(model, audio[:, :rate]), model)  # the first call of each shape is slower
        for bandwidth in model.config.target_bandwidths:
            row, decoded = _code(model, audio, name, bandwidth, folder, lm)
            table.append(row)
            pictures[name][f"{bandwidth:g} kbps"] = decoded.mean(0)
    save_figure(plot_audio(pictures, rate), folder / "spectrograms.png")
    return table


def _code(model, audio, clip, bandwidth, folder, lm):
    rate, name = model.config.sampling_rate, f"{clip}_{bandwidth:g}kbps"
    start = time.perf_counter()
    data = compress(model, audio, bandwidth)
    middle = time.perf_counter()
    decoded, _ = decompress(data, model)
    stop = time.perf_counter()
    with atomic_path(folder / f"{name}.ecdc") as temporary:
        temporary.write_bytes(data)
    decoded = decoded.float().cpu()
    write_audio(folder / f"{name}.wav", decoded.numpy(), rate, rescale=True)
    row = DemoRow(
        clip=clip,
        bandwidth=bandwidth,
        bytes=len(data),
        lm_bytes=None if lm is None else len(compress(model, audio, bandwidth, lm)),
        kbps=8 * len(data) * rate / audio.shape[1] / 1000,
        ratio=2 * audio.size / len(data),
        si_snr=si_snr(torch.from_numpy(audio), decoded).mean().item(),
        encode_seconds=middle - start,
        decode_seconds=stop - middle,
    )
    return row, decoded.numpy()
