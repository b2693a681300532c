"""Hours of audio an hour: arrays in memory, there and back, and the command `tokenize` on FLAC files."""

import functools
import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from models import bandwidth_of, codec, mask_of, noise, real_clips, stock


def measure(bench) -> None:
    """Ours in both precisions beside Transformers' model, which pads."""
    model = codec("24khz", bench.rehearse)
    seconds = np.random.default_rng(0).uniform(1, 3 if bench.rehearse else 20, 4 if bench.rehearse else 64).tolist()
    lengths = [int(one * 24000) for one in seconds]
    audio, mask, bandwidth = noise(lengths, 1), mask_of(lengths), bandwidth_of(model.config)
    ours, peer = model.to(bench.device), stock(model).to(bench.device)

    def tokens(precision: str):
        ours.precision = precision
        return ours.encode(audio.to(bench.device), mask.to(bench.device), bandwidth).audio_codes.cpu()

    def stock_tokens():
        return peer.encode(audio.to(bench.device), mask.to(bench.device), bandwidth=bandwidth).audio_codes.cpu()

    sides = {kind: lambda kind=kind: tokens(kind) for kind in ("exact", "fast")} | {"transformers tf32": stock_tokens}
    with torch.no_grad():
        bench.compare(f"arrays, {len(lengths)} clips of 1 to 20 s", sides, seconds=sum(seconds), repeats=3)
    ours.precision = "exact"
    for precision in ("exact", "fast"):
        label = f"tokenize --precision {precision}, FLAC files"
        bench.try_note(label, functools.partial(_command, bench, ours, precision))


def _command(bench, model, precision: str) -> str:
    for name in ("soundfile", "soxr", "datasets", "pyarrow", "accelerate", "typer"):
        if importlib.util.find_spec(name) is None:
            return f"not run: {name} is not installed"
    import soundfile

    rng = np.random.default_rng(0)
    clip = max(real_clips(24000, 1).values(), key=lambda clip: clip.shape[1])[0].numpy()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "clips").mkdir()
        model.save_pretrained(place / "model")
        for number in range(3 if bench.rehearse else 1500):
            start, length = rng.integers(len(clip)), int(rng.uniform(1, 2 if bench.rehearse else 20) * 24000)
            soundfile.write(place / "clips" / f"{number}.flac", np.resize(np.roll(clip, -start), length), 24000)
        words = ["tokenize", place / "clips", place / "out", "-m", place / "model", "-b", bandwidth_of(model.config)]
        words += ["--device", bench.device, "--precision", precision]
        run = subprocess.run(
            [sys.executable, "-m", "modeling_encodec", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=180,
        )
    told = re.search(r"([\d.,]+) hours of audio an hour", run.stdout + run.stderr)
    if run.returncode or told is None:
        raise RuntimeError((run.stderr or run.stdout)[-300:])
    waited = re.search(r"waited for audio [\d.]+ ?%", run.stdout + run.stderr)
    return f"{told[0]}{f', {waited[0]}' if waited else ''}"
