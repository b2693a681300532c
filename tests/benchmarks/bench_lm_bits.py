"""What a language model saves on recordings, and where bits go that it would have saved.

    python tests/benchmarks/bench_lm_bits.py MANIFEST [--lm FOLDER] [--float-lm FOLDER] [--recordings 60]

Recordings are those of the manifest's kinds (its key "kind") that last at least five seconds, spread evenly; of each,
30 s at most. Savings are of whole payloads against packed codes, with a 95 % interval by drawing recordings anew
(bootstrap). Losses are in per cent of the bits that the float model's probabilities would take.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import torch

from modeling_encodec.bitstream.codes_file import EcdcWriter
from modeling_encodec.bitstream.container import Segment, read_header, read_segments
from modeling_encodec.checkpoints import bundled_checkpoint, bundled_lm_checkpoint
from modeling_encodec.models.integer_lm_encodec import OUTPUT_STEP_BITS, TOTAL
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import NO_CODE, EncodecLM
from modeling_encodec.processors.audio import read_audio


SEGMENT_FRAMES = 750


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--lm", default=str(bundled_lm_checkpoint()))
    parser.add_argument("--float-lm", help="The float form, to compare with.")
    parser.add_argument("--recordings", type=int, default=60)
    parser.add_argument("--kinds", nargs="+", default=["speech", "music"])
    options = parser.parse_args()
    model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
    lm = EncodecLM.from_pretrained(options.lm).eval()
    float_lm = EncodecLM.from_pretrained(options.float_lm).eval() if options.float_lm else None
    print(f"{'kind':7} {'kbps':>5} {'coded':>6} {'saving':>24}   " + " ".join(f"{name:>9}" for name in LOSSES))
    for kind in options.kinds:
        recordings = read_recordings(options.manifest, kind, options.recordings, model)
        for bandwidth in model.config.target_bandwidths:
            books = model.config.num_quantizers_for_bandwidth(bandwidth)
            with torch.inference_mode():
                rows = [measure(codes[:books], model, lm, float_lm) for codes in recordings]
            report(kind, bandwidth, rows, sum(codes.shape[1] for codes in recordings) / model.config.frame_rate)


# Each against the one before it; all in per cent of the first.
STAGES = ("float", "integer", "counts", "payload", "file")
LOSSES = ("integer", "counts", "coder", "headers", "restarts")


def measure(codes: np.ndarray, model: EncodecModel, lm: EncodecLM, float_lm: EncodecLM | None) -> dict[str, float]:
    """Bits of one recording's codes (K, F) at every stage, and with one segment instead of several."""
    segments = [codes[:, at : at + SEGMENT_FRAMES] for at in range(0, codes.shape[1], SEGMENT_FRAMES)]
    bits = {name: sum(values) for name, values in zip(("integer", "counts"), zip(*(_ideal(lm, s) for s in segments)))}
    bits["float"] = bits["integer"]
    if float_lm is not None:
        tensors = [torch.from_numpy(segment)[None] for segment in segments]
        bits["float"] = sum(float_lm(t, t, return_logits=False).loss.item() * t.numel() for t in tensors)
    bits["one_segment"] = _ideal(lm, codes)[1]
    file = io.BytesIO()
    writer = EcdcWriter(file, model, num_codebooks=len(codes), model_name="codec", lm=lm, lm_name="lm")
    writer.write(codes)
    writer.close(codes.shape[1] * model.config.hop_length)
    bits["file"] = 8 * file.tell()
    file.seek(0)
    found = [item for item in read_segments(file, read_header(file)) if isinstance(item, Segment)]
    bits["payload"] = 8 * sum(len(segment.payload) for segment in found)
    bits["raw"] = codes.size * model.config.codebook_nbits
    return bits


def _ideal(lm: EncodecLM, codes: np.ndarray) -> tuple[float, float]:
    """Bits of a segment by the integer logits' own softmax, and by the frequencies that are made of them."""
    previous = np.concatenate([np.full_like(codes[:, :1], NO_CODE), codes[:, :-1]], axis=1)
    tables, cache, at, sums = lm.integer, None, 0, np.zeros(2)
    for block in torch.from_numpy(previous)[None].split(128, dim=2):
        wanted = torch.from_numpy(codes[None, :, at : at + block.shape[2], None])
        frequencies, following = tables.frequencies(block, cache)
        program = following.program
        start = cache or type(following)(program, program.first_memories(1))
        hidden, _ = program.hidden(block, start)
        logits = torch.as_tensor(program.logits(hidden, len(codes))).transpose(1, 2)
        nats = (logits * 2.0**-OUTPUT_STEP_BITS).log_softmax(-1)
        sums[0] -= nats.gather(3, wanted).sum().item() / np.log(2)
        sums[1] -= (frequencies.gather(3, wanted).double() / TOTAL).log2().sum().item()
        cache, at = following, at + block.shape[2]
    return tuple(sums)


def report(kind: str, bandwidth: float, rows: list[dict[str, float]], seconds: float) -> None:
    totals = {name: sum(row[name] for row in rows) for name in rows[0]}
    raw, payload = (np.array([row[name] for row in rows]) for name in ("raw", "payload"))
    drawn = np.random.default_rng(0).integers(len(rows), size=(2000, len(rows)))
    savings = 1 - payload[drawn].sum(1) / raw[drawn].sum(1)
    low, high = np.quantile(savings, (0.025, 0.975))
    base = totals["float"]
    losses = [100 * (totals[after] - totals[before]) / base for before, after in zip(STAGES, STAGES[1:])]
    losses.append(100 * (totals["counts"] - totals["one_segment"]) / base)
    saving = f"{1 - totals['payload'] / totals['raw']:.1%} ({low:.1%} to {high:.1%})"
    columns = " ".join(f"{loss:8.3f}%" for loss in losses)
    print(f"{kind:7} {bandwidth:5g} {totals['payload'] / seconds / 1000:6.3f} {saving:>24}   {columns}", flush=True)


def read_recordings(manifest: Path, kind: str, count: int, model: EncodecModel) -> list[np.ndarray]:
    """Codes (K, F) of recordings of one kind."""
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == kind and line["seconds"] >= 5]
    step = max(1, len(lines) / count)
    recordings = []
    for line in [lines[int(number * step)] for number in range(min(count, len(lines)))]:
        audio, rate = read_audio(manifest.parent / line["path"], model.config.sampling_rate, 1)
        coded = model.encode(torch.from_numpy(audio[None, :, : 30 * rate].copy()), bandwidth=12.0)
        recordings.append(coded.audio_codes[0, 0].numpy())
    return recordings


if __name__ == "__main__":
    main()
