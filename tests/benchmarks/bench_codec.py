"""Encode and decode speed beside Transformers' EncodecModel and the `encodec` package, as ratios within one run.

    python tests/benchmarks/bench_codec.py [--model both] [--threads 1] [--repeats 5] [--cases 1x10 16x10 1x60 1x600]

Standard sizes, random weights shared by all sides, 6 kbps, real audio. The sides take turns inside every repeat,
after a warm-up each; the median is reported as seconds of audio per second, and as our ratio to the faster peer. Peers
take some 15 MB a second of audio and are left out ('-') of cases with more than `--peer-seconds` of it. First stands
how fast this machine multiplies matrices, and how fast the codec would be if it did nothing but that. After the table,
codes are compared: between exact and the peers a difference must be a tie within float32 rounding.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from modeling_encodec.models import layers_encodec
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.outputs_encodec import EncodecEncoderOutput
from modeling_encodec.processors.audio import read_audio


sys.path.insert(0, str(Path(__file__).parents[1]))
from peers import fill_codebooks, original_model, stock_model  # noqa: E402
from ties import count_ties  # noqa: E402


BANDWIDTH = 6.0
CLIPS = Path(__file__).parents[3] / "shared" / "audio"
PRESETS = {"24khz": EncodecConfig.preset_24khz, "48khz": EncodecConfig.preset_48khz}
OURS = {"exact": torch.float32, "fast": torch.bfloat16}
PEERS = ("transformers", "encodec")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*PRESETS, "both"], default="both")
    parser.add_argument("--threads", type=int, choices=[1, 2], default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=["1x10", "16x10", "1x60"], help="batch x seconds")
    parser.add_argument("--peer-seconds", type=float, default=180, help="of audio in a case, the most for peers")
    parser.add_argument("--audio", type=Path, default=CLIPS, help="folder of test_24k.flac and test_48k.flac")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, threads {torch.get_num_threads()}")
    rates = print_rates("")
    for name in PRESETS if options.model == "both" else [options.model]:
        with torch.inference_mode():
            run_model(name, rates, options)
    print()
    print_rates("at the end, ")


def run_model(name: str, rates: dict[str, float], options) -> None:
    """All cases of one model."""
    torch.manual_seed(0)
    with torch.inference_mode(False):  # weights made within it are folded anew at every call
        sides = Sides(EncodecModel(PRESETS[name]()).eval())
    print(f"\n{name}, {BANDWIDTH:g} kbps, median of {options.repeats}, x real time")
    print_limit(sides.model, rates)
    sides.use("fast")
    if sides.model.compute_dtype != torch.bfloat16:
        print("this device has no bfloat16 worth using: fast is exact")
    clip = read_clip(sides.model.config, options.audio)
    columns = " ".join(f"{side:>12}" for side in (*OURS, *PEERS))
    print(f"{'case':8} {'step':7} {columns} {'exact/peer':>11} {'fast/peer':>10}")
    notes = []
    for case in options.cases:
        batch, seconds = map(int, case.split("x"))
        audio = cut_rows(clip, batch, seconds * sides.model.config.sampling_rate)
        peers = PEERS if batch * seconds <= options.peer_seconds else ()
        coded = sides.encode("exact", audio)
        steps = {"encode": (sides.encode, audio), "decode": (sides.decode, coded)}
        for step, (work, given) in steps.items():
            times = by_turns({side: (work, side, given) for side in (*OURS, *peers)}, options.repeats)
            print(
                f"{case:8} {step:7} {row_of({side: batch * seconds / took for side, took in times.items()})}",
                flush=True,
            )
        notes += [f"{case:8} {note}" for note in compare(sides, audio, peers)]
    print("\n".join(notes), flush=True)


# ---- what is measured --------------------------------------------------------------------------------------------


@dataclass
class Sides:
    """The model and its peers, with the same calls for all."""

    model: EncodecModel

    def __post_init__(self):
        fill_codebooks(self.model)
        self.stock, self.original = stock_model(self.model), original_model(self.model)
        self.original.set_target_bandwidth(BANDWIDTH)

    def use(self, side: str) -> EncodecModel:
        """The model that computes in this way."""
        if side in OURS:
            self.model.precision = side
        return self.model if side in OURS else self.stock

    def encode(self, side: str, audio: torch.Tensor):
        """What the side's own `encode` gives of audio (B, channels, T)."""
        if side == "encodec":
            return self.original.encode(audio)
        return self.use(side).encode(audio, bandwidth=BANDWIDTH)

    def decode(self, side: str, coded: EncodecEncoderOutput) -> torch.Tensor:
        """Audio of codes that we encoded."""
        if side == "encodec":
            return self.original.decode(list(zip(chunks_of(coded), coded.audio_scales)))
        last = coded.last_frame_pad_length
        return self.use(side).decode(coded.audio_codes, coded.audio_scales, last_frame_pad_length=last)[0]


def chunks_of(coded) -> list[torch.Tensor]:
    """Codes (B, K, F) of each chunk, without the padding of the last, of whichever side coded them."""
    if isinstance(coded, list):
        return [codes for codes, _ in coded]
    *chunks, last = coded.audio_codes
    return [*chunks, last[..., : last.shape[2] - coded.last_frame_pad_length]]


def read_clip(config: EncodecConfig, folder: Path) -> torch.Tensor:
    """Real audio (channels, T), or noise."""
    path = folder / f"test_{config.sampling_rate // 1000}k.flac"
    if path.is_file():
        return torch.from_numpy(read_audio(path, config.sampling_rate, config.audio_channels)[0])
    print(f"{path.name} is not there: noise instead of real audio")
    return 0.1 * torch.randn(config.audio_channels, 20 * config.sampling_rate)


def cut_rows(clip: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """Rows (B, channels, T) of a clip said again and again; each begins at another place of it."""
    shift = clip.shape[1] // batch
    rows = [torch.roll(clip, -row * shift, 1).repeat(1, -(-length // clip.shape[1])) for row in range(batch)]
    return torch.stack([row[:, :length] for row in rows])


def by_turns(sides: dict[str, tuple], repeats: int) -> dict[str, float]:
    """Median seconds of each side's (function, arguments...), all in turn inside every repeat."""
    times = {side: [] for side in sides}
    for repeat in range(repeats + 1):
        for side, (work, *given) in sides.items():
            start = time.perf_counter()
            work(*given)
            if repeat:
                times[side].append(time.perf_counter() - start)
    return {side: statistics.median(record) for side, record in times.items()}


def row_of(speeds: dict[str, float]) -> str:
    """The sides' speeds, and ours over the faster peer's."""
    cells = [f"{speeds[side]:11.1f}x" if side in speeds else f"{'-':>12}" for side in (*OURS, *PEERS)]
    best = max((speeds[side] for side in PEERS if side in speeds), default=math.inf)
    ratios = [f"{speeds[side] / best:.2f}" if best < math.inf else "-" for side in OURS]
    return f"{' '.join(cells)} {ratios[0]:>11} {ratios[1]:>10}"


# ---- agreement ---------------------------------------------------------------------------------------------------


def compare(sides: Sides, audio: torch.Tensor, peers: Iterable[str]) -> Iterable[str]:
    """What differs between exact and the peers, and between fast and exact, in words."""
    model = sides.use("exact")
    coded = model.encode(audio, bandwidth=BANDWIDTH, return_latents=True)
    chunks = chunks_of(coded)
    frames = sum(chunk.shape[0] * chunk.shape[2] for chunk in chunks)
    for peer in peers:
        theirs = chunks_of(sides.encode(peer, audio))
        try:
            ties = sum(
                count_ties(model, latents[..., : codes.shape[2]], codes, other)
                for latents, codes, other in zip(coded.latents, chunks, theirs, strict=True)
            )
            yield f"exact and {peer}: {ties} of {frames} frames differ, all by a tie"
        except AssertionError as error:
            yield f"exact and {peer}: NOT ALL BY A TIE: {error}"
    fast = chunks_of(sides.encode("fast", audio))
    equal = sum(int((a == b).sum()) for a, b in zip(chunks, fast)) / sum(chunk.numel() for chunk in chunks)
    first = sum(int((a[:, 0] == b[:, 0]).sum()) for a, b in zip(chunks, fast)) / frames
    exact_audio = sides.decode("exact", coded)
    noise = (sides.decode("fast", coded) - exact_audio).double().square().sum()
    snr = 10 * math.log10(exact_audio.double().square().sum() / noise) if noise else math.inf
    yield f"fast and exact: {equal:.2%} of codes equal ({first:.2%} of the first codebook's), same codes {snr:.1f} dB"


# ---- the limit ---------------------------------------------------------------------------------------------------


def matrix_rate(dtype: torch.dtype, size: int = 1024, rounds: int = 100) -> float:
    """FLOP/s of the best of several products of square matrices."""
    a, b = torch.randn(2, size, size).to(dtype)
    best = min(seconds_of(lambda: torch.mm(a, b)) for _ in range(rounds))
    return 2 * size**3 / best


def print_rates(when: str) -> dict[str, float]:
    """What this machine multiplies in float32 and bfloat16; less than at another time if others use it."""
    rates = {side: matrix_rate(dtype) for side, dtype in OURS.items()}
    names = zip((str(dtype).removeprefix("torch.") for dtype in OURS.values()), rates.values())
    print(f"{when}matrix rate: " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in names), flush=True)
    return rates


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def print_limit(model: EncodecModel, rates: dict[str, float]) -> None:
    """What a second of audio costs, and how many of them the matrix rate allows in a second."""
    config = model.config
    search = 2 * config.codebook_size * config.codebook_dim * model.resolve_quantizers(BANDWIDTH, None)
    search *= config.frame_rate * overlapping(config)
    audio = torch.randn(1, config.audio_channels, 10 * config.sampling_rate)
    latents = torch.randn(1, config.hidden_size, 10 * config.frame_rate)
    nets = {"encode": (model.encoder, audio, search), "decode": (model.decoder, latents, 0)}
    for step, (net, given, more) in nets.items():
        layers, lstm = (flops * overlapping(config) for flops in count_flops(net, given, config))
        parts = f"convolutions {layers / 1e9:.2f}, LSTM {lstm / 1e9:.2f}" + (
            f", search {more / 1e9:.2f}" if more else ""
        )
        limits = {side: 1 / ((layers + lstm) / rate + more / rates["exact"]) for side, rate in rates.items()}
        print(
            f"{step}: {(layers + lstm + more) / 1e9:.2f} GFLOP a second of audio ({parts}); limit by arithmetic "
            + ", ".join(f"{side} {limit:.0f}x" for side, limit in limits.items())
        )


def overlapping(config: EncodecConfig) -> float:
    """How often a sample is coded: chunks overlap."""
    return config.chunk_length / config.chunk_stride if config.chunk_length else 1.0


def count_flops(net: torch.nn.Module, given: torch.Tensor, config: EncodecConfig) -> tuple[float, float]:
    """FLOP for a second of the 10 in `given`: convolutions as counted, and the LSTM's, by formula since the counter
    does not see those that run as one operator: two products of (C, 4C) a layer and frame."""
    net(given)
    without_lstm = mock.patch.object(layers_encodec, "_lstm", lambda x, hidden, cell, weights: (x, hidden, cell))
    with without_lstm, FlopCounterMode(display=False) as counter:
        net(given)
    width = config.num_filters * 2 ** len(config.upsampling_ratios)
    return counter.get_total_flops() / 10, 2 * 4 * 2 * width**2 * config.num_lstm_layers * config.frame_rate


if __name__ == "__main__":
    main()
