"""A hop of 13.3 ms through a stream's encoder and decoder: 1, 16 and 64 rows, with and without CUDA graphs."""

import torch
from models import bandwidth_of, codec


def measure(bench) -> None:
    """Milliseconds a push; a side is a precision, with graphs or without."""
    model = codec("24khz", bench.rehearse).to(bench.device)
    for rows in (1, 2) if bench.rehearse else (1, 16, 64):
        hop = 0.1 * torch.randn(rows, 1, model.config.hop_length, device=bench.device)
        sides = {"encoder": {}, "decoder": {}, "both": {}}
        for precision in ("exact", "fast"):
            for graphs in (False, True) if bench.on_gpu else (False,):
                for name, call in _streams(model, precision, graphs, hop).items():
                    sides[name][f"{precision}{', graphs' if graphs else ''}"] = call
        for name, calls in sides.items():
            bench.compare(f"hop of {rows} rows, {name}", calls, seconds=rows * 320 / 24000, repeats=60)


def _streams(model, precision: str, graphs: bool, hop: torch.Tensor) -> dict:
    """What pushes a hop through each direction, and both."""
    from modeling_encodec import StreamingDecoder, StreamingEncoder

    made = {}

    def streams():
        model.precision = precision
        if not made:  # here, so that what cannot be made is this side's error
            options = {"batch_size": len(hop), "mode": "low_latency", "cuda_graphs": graphs}
            made["encoder"] = StreamingEncoder(model, bandwidth_of(model.config), **options)
            made["decoder"] = StreamingDecoder(model, **options)
            made["codes"] = made["encoder"].push(hop)
        return made

    return {
        "encoder": lambda: streams()["encoder"].push(hop),
        "decoder": lambda: streams()["decoder"].push(made["codes"]),
        "both": lambda: streams()["decoder"].push(made["encoder"].push(hop)),
    }
