"""Encode and decode speed beside Transformers' EncodecModel and the `encodec` package, as ratios within one run.

    python tests/benchmarks/bench_codec.py [--threads 1] [--repeats 5] [--cases 1x10 1x60 16x10]

Standard 24 kHz size, random weights shared by all three, 6 kbps. The sides take turns inside every repeat, after a
warm-up each; the median is reported as seconds of audio per second, and ours over each peer. Codes are compared too: a
difference must be a tie within float32 rounding.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

from modeling_encodec.configuration_encodec import EncodecConfig
from modeling_encodec.modeling_encodec import EncodecModel


sys.path.insert(0, str(Path(__file__).parents[1]))
from peers import fill_codebooks, original_model, stock_model  # noqa: E402
from ties import count_ties  # noqa: E402


BANDWIDTH = 6.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=["1x10", "1x60", "16x10"], help="batch x seconds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = EncodecModel(EncodecConfig.preset_24khz()).eval()
    fill_codebooks(model)
    peers = {"transformers": stock_model(model), "encodec": original_model(model)}
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, threads {torch.get_num_threads()}")
    print(f"{'case':8} {'step':7} {'ours':>8} " + " ".join(f"{name:>13} {'ratio':>6}" for name in peers))
    for case in options.cases:
        batch, seconds = map(int, case.split("x"))
        with torch.inference_mode():
            run_case(model, peers, case, 0.1 * torch.randn(batch, 1, 24000 * seconds), options.repeats)


def run_case(model, peers, case, audio, repeats) -> None:
    duration = audio.shape[0] * audio.shape[2] / 24000
    coded = model.encode(audio, bandwidth=BANDWIDTH, return_latents=True)
    codes = coded.audio_codes
    stock, original = peers["transformers"], peers["encodec"]
    original.set_target_bandwidth(BANDWIDTH)
    steps = {
        "encode": [
            lambda: model.encode(audio, bandwidth=BANDWIDTH).audio_codes[0],
            lambda: stock.encode(audio, bandwidth=BANDWIDTH).audio_codes[0],
            lambda: original.encode(audio)[0][0],
        ],
        "decode": [
            lambda: model.decode(codes)[0],
            lambda: stock.decode(codes, [None])[0],
            lambda: original.decode([(codes[0], None)]),
        ],
    }
    for step, sides in steps.items():
        outputs = [side() for side in sides]
        if step == "encode":
            ties = [count_ties(model, coded.latents[0], codes[0], output) for output in outputs[1:]]
        times = [[] for _ in sides]
        for _ in range(repeats):
            for side, record in zip(sides, times):
                start = time.perf_counter()
                side()
                record.append(time.perf_counter() - start)
        ours, *theirs = (duration / statistics.median(record) for record in times)
        columns = " ".join(f"{their:12.1f}x {ours / their:6.2f}" for their in theirs)
        print(f"{case:8} {step:7} {ours:7.1f}x {columns}", flush=True)
    print(f"         frames that differ, all by a tie: {ties[0]} and {ties[1]} of {codes.shape[1] * codes.shape[3]}")


if __name__ == "__main__":
    main()
