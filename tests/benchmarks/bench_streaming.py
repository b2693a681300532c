"""Time of a streaming step: 320 samples into a StreamingEncoder, its codes into a StreamingDecoder.

    python tests/benchmarks/bench_streaming.py [--steps 1000] [--batch 1 4] [--threads 1]

Standard 24 kHz size, random weights, 6 kbps; a step is 13.3 ms of audio. Where CUDA is there, also batch 1 and 64 on
it. Beside it stands a limit: the bytes of weights that a step reads (a CPU computes rows one by one), over the rate at
which memory is copied. Weights that stay in a cache may be read faster than that.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.onnx_export import export_onnx
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder


sys.path.insert(0, str(Path(__file__).parents[1]))
from peers import fill_codebooks  # noqa: E402


BANDWIDTH = 6.0
WARM_UP = 50
CUDA_BATCHES = [1, 64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="on the CPU")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = EncodecModel(EncodecConfig.preset_24khz()).eval()
    fill_codebooks(model)
    real_time = 1000 * model.config.hop_length / model.config.sampling_rate
    print(f"torch {torch.__version__}, threads {torch.get_num_threads()}, {options.steps} steps; ms, of which a step")
    print(f"has {real_time:.1f} in real time")
    run_device(model, options.batch, options.steps)
    if torch.cuda.is_available():
        run_device(model.to("cuda"), CUDA_BATCHES, options.steps)


def run_device(model: EncodecModel, batches: list[int], steps: int) -> None:
    """Every batch size, exact and fast, on the model's device."""
    name = torch.cuda.get_device_name() if model.device.type == "cuda" else "CPU"
    rate = copy_rate(model.device)
    print(f"\n{name}, memory copied at {rate / 1e9:.1f} GB/s, read and written")
    print(f"{'':14} {'part':8} {'p50':>7} {'p90':>7} {'p99':>7} {'max':>7} {'limit':>7} {'weights':>9}")
    for batch in batches:
        for precision in ("exact", "fast"):
            model.precision = precision
            if precision == "fast" and model.compute_dtype != torch.bfloat16:
                print("no bfloat16 worth using here: fast is exact")
                continue
            run_case(model, batch, steps, rate)
        model.precision = "exact"
        if model.device.type == "cpu" and importlib.util.find_spec("onnxruntime"):
            with tempfile.TemporaryDirectory() as folder:
                export_onnx(model, folder, model.resolve_quantizers(BANDWIDTH, None))
                run_case(model, batch, steps, rate, Path(folder))


def run_case(model: EncodecModel, batch: int, steps: int, rate: float, onnx: Path | None = None) -> None:
    """One batch size in one precision, or by the ONNX steps in a folder."""
    starts = [first_push(model, batch) for _ in range(4)][1:]  # the first of them also folds the weights
    encoding, decoding = time_steps(model, batch, steps, onnx)
    parts = {"encoder": encoding, "decoder": decoding, "both": [sum(pair) for pair in zip(encoding, decoding)]}
    rows = 1 if model.computes_rows_together else batch
    weights = dict(zip(("encoder", "decoder"), weight_bytes(model)))
    weights["both"] = sum(weights.values())
    label = f"{'onnx' if onnx else model.precision}, batch {batch}"
    for part, record in parts.items():
        cells = " ".join(f"{1000 * quantile(record, share):7.2f}" for share in (0.5, 0.9, 0.99, 1))
        read = rows * weights[part]
        print(f"{label:14} {part:8} {cells} {1000 * read / rate:7.2f} {read / 1e6:6.1f} MB", flush=True)
        label = ""
    encoder, decoder = (1000 * statistics.median(side) for side in zip(*starts))
    print(f"{'':14} first push: encoder {encoder:.2f}, decoder {decoder:.2f}")


def begin(
    model: EncodecModel, batch: int, onnx: Path | None = None
) -> tuple[StreamingEncoder, StreamingDecoder, torch.Tensor]:
    """Streams at their beginning, and the samples that give the first codes."""
    paths = [onnx and onnx / f"{kind}_step.onnx" for kind in ("encoder", "decoder")]
    encoder = StreamingEncoder(model, bandwidth=BANDWIDTH, batch_size=batch, onnx_step=paths[0])
    start = 0.1 * torch.randn(batch, 1, encoder.start_latency, device=model.device)
    return encoder, StreamingDecoder(model, batch_size=batch, onnx_step=paths[1]), start


def first_push(model: EncodecModel, batch: int) -> tuple[float, float]:
    """Seconds of the pushes that start an encoder and a decoder."""
    encoder, decoder, start = begin(model, batch)
    encoding, codes = timed(lambda: encoder.push(start))
    assert codes.shape[2] >= decoder.start_frames, (codes.shape, decoder.start_frames)
    decoding, _ = timed(lambda: decoder.push(codes))
    return encoding, decoding


def time_steps(model: EncodecModel, batch: int, steps: int, onnx: Path | None) -> tuple[list[float], list[float]]:
    """Seconds of each step of an encoder and of a decoder that have begun and are warm."""
    encoder, decoder, start = begin(model, batch, onnx)
    decoder.push(encoder.push(start))
    hop, encoding, decoding = model.config.hop_length, [], []
    audio = 0.1 * torch.randn(batch, 1, hop * (WARM_UP + steps), device=model.device)
    for samples in audio.split(hop, dim=2):
        took, codes = timed(lambda samples=samples: encoder.push(samples))
        encoding.append(took)
        took, decoded = timed(lambda codes=codes: decoder.push(codes))
        decoding.append(took)
        assert codes.shape[2] == 1 and decoded.shape[2] == hop
    return encoding[WARM_UP:], decoding[WARM_UP:]


def timed(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Seconds until the result is there, and the result."""
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - start, result


def wait() -> None:
    """Until nothing is under way."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quantile(record: list[float], share: float) -> float:
    ordered = sorted(record)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def weight_bytes(model: EncodecModel) -> tuple[int, int]:
    """What an encoder's step and a decoder's read: their weights once, and the codebooks that are searched."""
    size = model.compute_dtype.itemsize
    encoder, decoder = (
        size * sum(parameter.numel() for parameter in net.parameters()) for net in (model.encoder, model.decoder)
    )
    quantizers = model.quantizer.layers[: model.resolve_quantizers(BANDWIDTH, None)]
    return encoder + sum(layer.codebook.embed.nbytes for layer in quantizers), decoder


def copy_rate(device: torch.device, size: int = 256 << 20, rounds: int = 8) -> float:
    """Bytes a second, read and written, of copying a tensor of `size` bytes; the best of several."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(timed(lambda: target.copy_(source))[0] for _ in range(rounds + 1))


if __name__ == "__main__":
    main()
