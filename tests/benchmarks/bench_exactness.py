"""How often codes differ between ways of computing them, and that every difference is a tie.

    python tests/benchmarks/bench_exactness.py [--rows 64] [--clip FILE]

Random pieces of a real clip through the bundled checkpoint at 12 kbps: each alone, then the same rows in other ways.
A tie: the latent lies so near the border between two codebook entries that float32 rounding moves it across.
"""

import argparse
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from modeling_encodec.checkpoints import bundled_checkpoint
from modeling_encodec.demo.table import demo_clips
from modeling_encodec.models import seanet_encodec
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.processors.audio import read_audio


sys.path.insert(0, str(Path(__file__).parents[1]))
from ties import count_ties  # noqa: E402


@contextmanager
def changed(owner, name, value):
    old = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, old)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--clip", type=Path, nargs="+", default=demo_clips())
    options = parser.parse_args()
    torch.manual_seed(0)
    model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
    audio = torch.cat([torch.from_numpy(read_audio(clip, 24000, 1)[0]) for clip in options.clip], dim=1)
    rows = []
    for _ in range(options.rows):
        length = int(torch.randint(1, min(audio.shape[1], 5 * 24000), ()))
        start = int(torch.randint(0, audio.shape[1] - length, ()))
        rows.append(audio[:, start : start + length])
    torch.set_num_threads(1)
    alone = [code(model, row) for row in rows]
    ways = {
        "padded batch, row by row (CPU)": lambda: in_batches(model, rows),
        "padded batch, rows together (accelerator)": lambda: together(model, rows),
        "blocks of 32 frames": lambda: in_blocks(model, rows),
        "two threads": lambda: two_threads(model, rows),
    }
    frames = sum(codes.shape[1] for codes, _ in alone)
    print(f"{len(rows)} rows, {frames} frames of {alone[0][0].shape[0]} codes, torch {torch.__version__}")
    for name, way in ways.items():
        ties = sum(count_ties(model, latents, codes, other) for (codes, latents), other in zip(alone, way()))
        print(f"{name:42} frames that differ, all by a tie: {ties} ({ties / frames:.1e})")


@torch.inference_mode()
def code(model, row):
    """Codes (K, F) and latents (D, F) of one row."""
    output = model.encode(row[None], bandwidth=12.0, return_latents=True)
    return output.audio_codes[0, 0], output.latents[0, 0]


@torch.inference_mode()
def in_batches(model, rows, size: int = 8):
    codes = []
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        width = max(row.shape[1] for row in group)
        mask = torch.stack([torch.arange(width) < row.shape[1] for row in group])
        batch = torch.stack([torch.nn.functional.pad(row, (0, width - row.shape[1])) for row in group])
        output = model.encode(batch, mask, bandwidth=12.0)
        codes += [row[:, :n] for row, n in zip(output.audio_codes[0], output.codes_lengths.tolist())]
    return codes


def together(model, rows):
    with changed(EncodecModel, "computes_rows_together", True):
        return in_batches(model, rows)


def in_blocks(model, rows):
    with changed(seanet_encodec, "CPU_BLOCK_FRAMES", 32), changed(seanet_encodec, "CPU_FINE_FRAMES", 16):
        return [code(model, row)[0] for row in rows]


def two_threads(model, rows):
    torch.set_num_threads(2)
    codes = [code(model, row)[0] for row in rows]
    torch.set_num_threads(1)
    return codes


if __name__ == "__main__":
    main()
