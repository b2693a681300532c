"""Which kernels the card likes: layouts of convolutions, windows times a matrix, forms of the LSTM, by precision."""

import torch
from torch.nn import functional as F
from work import allow


# Input and output channels, kernel, stride, and the part of the sampling rate at which the layer computes.
LAYERS = {
    "first, mono": (1, 32, 7, 1, 1),
    "first, stereo": (2, 32, 7, 1, 1),
    "unit 32 to 16": (32, 16, 3, 1, 1),
    "unit 16 to 32": (16, 32, 1, 1, 1),
    "down 32 to 64": (32, 64, 4, 2, 1),
    "unit 64 to 32": (64, 32, 3, 1, 2),
    "down 64 to 128": (64, 128, 8, 4, 2),
    "down 128 to 256": (128, 256, 10, 5, 8),
    "down 256 to 512": (256, 512, 16, 8, 40),
    "last 512 to 128": (512, 128, 7, 1, 320),
    "up 512 to 8 x 256": (512, 2048, 2, 1, 320),
    "up 64 to 2 x 32": (64, 64, 2, 1, 2),
    "out, mono": (32, 1, 7, 1, 1),
    "out, stereo": (32, 2, 7, 1, 1),
}
DTYPES = {"ieee": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def measure(bench) -> None:
    """16 rows of 10 s; LSTMs of 1 to 400 rows; what moves memory alone."""
    bench.measure_limits()
    layers = dict(list(LAYERS.items())[:3]) if bench.rehearse else LAYERS
    for name, layer in layers.items():
        for kind in DTYPES:
            _convolution(bench, name, layer, kind)
    sizes = ((1, 12), (2, 12)) if bench.rehearse else ((1, 750), (16, 750), (64, 750), (176, 150), (400, 150))
    for rows, steps in sizes:
        _lstm(bench, rows, steps)
    frames = 1000 if bench.rehearse else 1_200_000
    x = torch.randn(4, 16, 1, frames, device=bench.device).contiguous(memory_format=torch.channels_last)
    sides = {
        "ELU": lambda: F.elu(x),
        "group norm, channels last": lambda: F.group_norm(x, 1),
        "group norm, channels first": lambda: F.group_norm(x.contiguous(), 1),
        "padding": lambda: torch.cat([x[..., :6], x], 3),
    }
    bench.compare("memory: passes over 4 x 16 channels", sides, count=True)


def _convolution(bench, name: str, layer: tuple, kind: str) -> None:
    label = f"{name}, {kind}"
    if not bench.wanted(label):
        return
    inner, outer, kernel, stride, divisor = layer
    rows, samples = (2, max(64, 2400 // divisor)) if bench.rehearse else (16, 240000 // divisor)
    options = {"device": bench.device, "dtype": DTYPES[kind]}
    x = torch.randn(rows, inner, 1, samples, **options)
    weight, bias = torch.randn(outer, inner, 1, kernel, **options), torch.randn(outer, **options)
    last = torch.channels_last
    x_last, weight_last = (torch.empty_like(one, memory_format=last).copy_(one) for one in (x, weight))

    def windows():
        cut = x_last.permute(0, 2, 3, 1).unfold(2, kernel, stride).transpose(3, 4).flatten(3)
        return F.linear(cut, weight.permute(0, 2, 3, 1).flatten(1), bias)

    sides = {
        "channels first": lambda: F.conv2d(x, weight, bias, stride=(1, stride)),
        "channels last (ours)": lambda: F.conv2d(x_last, weight_last, bias, stride=(1, stride)),
        "windows x matrix": windows,
    }
    allow("ieee" if kind == "ieee" else "tf32")
    try:
        rates = dict.fromkeys(sides, kind.replace("fp16", "bf16"))
        bench.compare(label, sides, kinds=rates, count=True, seconds=rows * 10)
    finally:
        allow("tf32")


def _lstm(bench, rows: int, steps: int) -> None:
    hidden = 16 if bench.rehearse else 512
    sides = {}
    for kind in DTYPES:
        for form in ("flat", "not flat", "layer by layer"):
            sides[f"{kind}, {form}"] = _lstm_call(bench, rows, steps, hidden, kind, form)
    bench.compare(f"LSTM 2 x {hidden}, {rows} rows, {steps} steps", sides, seconds=rows * steps / 75)
    allow("tf32")


def _lstm_call(bench, rows: int, steps: int, hidden: int, kind: str, form: str):
    options = {"device": bench.device, "dtype": DTYPES[kind]}
    weights = [parameter.detach() for parameter in torch.nn.LSTM(hidden, hidden, 2, **options).parameters()]
    weights = [weight.clone() for weight in weights]  # none beside another
    if form == "flat" and bench.on_gpu:
        torch._cudnn_rnn_flatten_weight(weights, 4, hidden, 2, hidden, 0, 2, False, False)
    x, state = torch.randn(steps, rows, hidden, **options), torch.zeros(2, rows, hidden, **options)

    def whole():
        allow("ieee" if kind == "ieee" else "tf32")
        return torch.lstm(x, (state, state), weights, True, 2, 0.0, False, False, False)

    def by_layer():
        allow("ieee" if kind == "ieee" else "tf32")
        y = x
        for layer in range(2):
            states = (state[:1], state[:1])
            y = torch.lstm(y, states, weights[4 * layer : 4 * layer + 4], True, 1, 0.0, False, False, False)[0]
        return y

    return by_layer if form == "layer by layer" else whole
