"""Entropy coding beside the `encodec` package's, as ratios within one run; and memory.

    python tests/benchmarks/bench_lm.py [--threads 1] [--repeats 3] [--seconds 10 60]

The released size of language model with the same random weights on both sides, 6 kbps at 24 kHz, the same codes: 10 s
drawn from the language model itself, again and again. The original's side is its own `compress` and `decompress`, with
a codec that gives and takes the codes and does nothing else; ours writes and reads a whole version 1 file too. The
sides take turns inside every repeat, after a warm-up; medians.
"""

import argparse
import importlib
import io
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from modeling_encodec.bitstream.codes_file import EcdcReader, EcdcWriter
from modeling_encodec.bitstream.container import End
from modeling_encodec.bitstream.segment_coders import MOST_ROWS
from modeling_encodec.conversion.key_mapping import lm_to_original
from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.models.integer_lm_encodec import TOTAL
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import NO_CODE, EncodecLM


sys.path.insert(0, str(Path(__file__).parents[1]))
from peers import import_encodec  # noqa: E402


CODEBOOKS = 8
FRAME_RATE = 75


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=int, nargs="+", default=[10, 60])
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, lm = make_models()
    if options.memory_of:
        print(peak_of(model, lm, options.memory_of))
        return
    print(f"torch {torch.__version__}, threads {options.threads}, median of {options.repeats}")
    print(f"{'case':6} {'step':7} {'ours':>10} {'encodec':>10} {'ratio':>6}")
    for seconds in options.seconds:
        run_case(model, lm, seconds, options.repeats)
    peaks = {seconds: measure_memory(seconds) for seconds in (10, 60, 600)}
    print("peak memory, encode and decode of", ", ".join(f"{s} s: {peak:.0f} MB" for s, peak in peaks.items()))


def make_models() -> tuple[EncodecModel, EncodecLM]:
    """A codec, of which only the configuration and a fingerprint matter, and a language model of the released size."""
    torch.manual_seed(0)
    lm = EncodecLM(EncodecLMConfig()).eval()
    with torch.no_grad():
        lm.head.weight.mul_(4)
    lm.quantize(torch.randint(1024, (1, 32, 400)))
    return EncodecModel(EncodecConfig.preset_24khz()).eval(), lm


def draw_codes(lm: EncodecLM, seconds: int) -> np.ndarray:
    """Codes (K, F) as likely as the language model says; every 10 s the same, for every segment begins anew."""
    rng, drawn, cache = np.random.default_rng(0), [], None
    previous = torch.full((1, CODEBOOKS, 1), NO_CODE)
    for _ in range(10 * FRAME_RATE):
        shares, cache = lm.integer.shares(previous, cache)
        ends = (shares[0, 0] + 1).cumsum(-1)
        drawn.append([int(np.searchsorted(row, rng.integers(TOTAL), side="right")) for row in ends])
        previous = torch.tensor(drawn[-1])[None, :, None]
    return np.tile(np.array(drawn).T, seconds // 10)


def write(model: EncodecModel, lm: EncodecLM, codes: np.ndarray) -> bytes:
    file = io.BytesIO()
    writer = EcdcWriter(file, model, num_codebooks=len(codes), model_name="codec", lm=lm, lm_name="lm")
    writer.write(codes)
    writer.close(codes.shape[1] * model.config.hop_length)
    return file.getvalue()


def read(model: EncodecModel, lm: EncodecLM, data: bytes) -> np.ndarray:
    items = EcdcReader(io.BytesIO(data)).read(model, lm, together=MOST_ROWS)
    return np.concatenate([item.codes for item in items if not isinstance(item, End)], axis=1)


def run_case(model: EncodecModel, lm: EncodecLM, seconds: int, repeats: int) -> None:
    codes = draw_codes(lm, seconds)
    theirs = Original(lm, codes)
    data, their_data = write(model, lm, codes), theirs.compress()
    sides = {
        "encode": [lambda: write(model, lm, codes), theirs.compress],
        "decode": [lambda: read(model, lm, data), lambda: theirs.decompress(their_data)],
    }
    assert np.array_equal(read(model, lm, data), codes) and np.array_equal(theirs.decompress(their_data), codes)
    for step, both in sides.items():
        times = [[], []]
        for _ in range(repeats):
            for side, record in zip(both, times):
                start = time.perf_counter()
                side()
                record.append(time.perf_counter() - start)
        ours, original = map(statistics.median, times)
        print(f"{seconds:4} s {step:7} {ours:9.3f}s {original:9.3f}s {original / ours:6.1f}", flush=True)


class Original:
    """The `encodec` package's functions round a codec that is only its codes."""

    def __init__(self, lm: EncodecLM, codes: np.ndarray):
        import_encodec()
        self.module = importlib.import_module("encodec.compress")
        self.codes = torch.from_numpy(codes)[None]
        original = import_encodec("encodec.model").LMModel(32, 1024, 200, past_context=lm.config.context_frames)
        original.load_state_dict(lm_to_original(lm.state_dict(), lm.config))
        codec = SimpleNamespace(
            name="encodec_24khz",
            get_lm_model=lambda: original.eval(),
            encode=lambda audio: [(self.codes, None)],
            decode=self._decode,
            bits_per_codebook=10,
            segment_length=None,
            segment_stride=None,
            normalize=False,
            sample_rate=24000,
            frame_rate=FRAME_RATE,
        )
        codec.to = lambda device: codec
        self.module.MODELS["encodec_24khz"] = lambda: codec
        self.codec, self.audio = codec, torch.zeros(1, codes.shape[1] * 320)

    def compress(self) -> bytes:
        return self.module.compress(self.codec, self.audio, use_lm=True)

    def decompress(self, data: bytes) -> np.ndarray:
        self.module.decompress(data)
        return self.decoded

    def _decode(self, frames) -> torch.Tensor:
        self.decoded = frames[0][0][0].numpy()
        return self.audio[None]


def measure_memory(seconds: int) -> float:
    """Peak in MB of a process that codes so many seconds and reads them again."""
    command = [sys.executable, __file__, "--memory-of", str(seconds)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak_of(model: EncodecModel, lm: EncodecLM, seconds: int) -> float:
    codes = draw_codes(lm, seconds)
    read(model, lm, write(model, lm, codes))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
