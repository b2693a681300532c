"""What full-size work may cost on a GPU, counted on shapes alone: times the host waits, kernels, bytes moved, memory.

No time is measured here. Where a number falls for good, the table follows.
"""

from typing import NamedTuple

import pytest
import torch
from devices import gpu_or_pretended

from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder


class Budget(NamedTuple):
    """At most; None where it is no matter."""

    syncs: int | None
    launches: int | None
    moved: float | None  # GB
    peak: float | None  # GB


# Model, lengths of the rows in seconds, what is done.
EQUAL, RAGGED = [10.0] * 16, [5 + 10 * row / 15 for row in range(16)]
CODEC = {
    "24 kHz, 1 x 10 s, encode": ("24khz", [10.0], Budget(4, 170, 2.2, 0.6)),
    "24 kHz, 1 x 10 s, decode": ("24khz", [10.0], Budget(4, 190, 2.2, 0.6)),
    "24 kHz, 16 x 10 s, encode": ("24khz", EQUAL, Budget(4, 210, 33, 3)),
    "24 kHz, 16 x 10 s, decode": ("24khz", EQUAL, Budget(4, 170, 33, 3)),
    "24 kHz, 16 x 5-15 s, encode": ("24khz", RAGGED, Budget(9, 450, 60, 4)),
    "24 kHz, 16 x 5-15 s, decode": ("24khz", RAGGED, Budget(6, 360, 60, 5)),
    "48 kHz, 1 x 10 s, encode": ("48khz", [10.0], Budget(4, 600, 8, 1)),
    "48 kHz, 1 x 10 s, decode": ("48khz", [10.0], Budget(6, 600, 9, 1)),
    "48 kHz, 16 x 10 s, encode": ("48khz", EQUAL, Budget(4, 2300, 110, 7)),
    "48 kHz, 16 x 10 s, decode": ("48khz", EQUAL, Budget(6, 2100, 120, 7)),
    "48 kHz, 16 x 5-15 s, encode": ("48khz", RAGGED, Budget(9, 2500, 130, 7)),
    "48 kHz, 16 x 5-15 s, decode": ("48khz", RAGGED, Budget(8, 2300, 140, 7)),
}
MEMORY = {
    "24 kHz, 64 x 13 s, decode": ("24khz", [13.6 - row / 75 for row in range(64)], Budget(None, None, None, 16)),
    "48 kHz, 436 x 1 s, decode": ("48khz", [1 - row / 48000 for row in range(436)], Budget(None, None, None, 20)),
    "32 kHz, 64 x 20 s, decode": ("32khz", [20.48] * 64, Budget(None, None, None, 24)),
}
# Rows and graphs: what one hop of 13 ms may cost.
HOPS = {
    "hop, 1 row, encoder": (1, False, Budget(1, 120, None, None)),
    "hop, 1 row, decoder": (1, False, Budget(3, 110, None, None)),
    "hop, 64 rows, encoder": (64, False, Budget(1, 200, None, None)),
    "hop, 64 rows, decoder": (64, False, Budget(3, 200, None, None)),
    "hop, 64 rows, graphs, encoder": (64, True, Budget(1, 150, None, None)),
    "hop, 64 rows, graphs, decoder": (64, True, Budget(3, 150, None, None)),
}
SLOW = set(MEMORY)


def cases(table: dict) -> list:
    """Rows of a table."""
    given = []
    for name, values in table.items():
        marks = [pytest.mark.slow] * (name in SLOW)
        given.append(pytest.param(name.split(", ")[-1], *values, id=name, marks=marks))
    return given


@pytest.fixture(scope="module")
def device():
    with gpu_or_pretended(shapes=True, detail=True) as found, torch.no_grad():
        yield found


@pytest.fixture(scope="module")
def codecs(device):
    """Full-size models by name, one at a time."""
    made = {}

    def make(name: str) -> EncodecModel:
        if name not in made:
            made.clear()
            made[name] = EncodecModel(getattr(EncodecConfig, f"preset_{name}")()).eval().to("cuda")
            made[name].encode(torch.zeros(1, made[name].config.audio_channels, 9000, device="cuda"))  # folds weights
        return made[name]

    return make


def check(device, budget: Budget | None, call):
    """What `call` gives, which costs no more than the budget; the lines that cost most, if it does."""
    device.counts.reset()
    result = call()
    counts = device.counts
    spent = Budget(counts.waits, counts.launches, counts.moved / 1e9, counts.peak / 1e9)
    if budget is not None:
        over = [name for name, most in budget._asdict().items() if most is not None and getattr(spent, name) > most]
        most_of = {
            "syncs": counts.syncs.most_common(12),
            "launches": counts.launches_by_line.most_common(12),
            "moved": counts.moved_by_line.most_common(12),
            "peak": (),
        }
        detail = "\n".join(f"{line}: {value}" for name in over for line, value in most_of[name])
        assert not over, f"{', '.join(over)}: {spent}, allowed: {budget}\n{detail}"
    return result


def run_codec(device, codec, direction: str, seconds: list[float], budget: Budget) -> None:
    config = codec.config
    lengths = [round(length * config.sampling_rate) for length in seconds]
    audio = torch.zeros(len(lengths), config.audio_channels, max(lengths), device="cuda")
    mask = None
    if min(lengths) < max(lengths):
        mask = torch.arange(max(lengths), device="cuda") < torch.tensor(lengths, device="cuda")[:, None]
    bandwidth = 2.2 if config.sampling_rate == 32000 else 6.0
    encoding, decoding = (budget, None) if direction == "encode" else (None, budget)
    coded = check(device, encoding, lambda: codec.encode(audio, mask, bandwidth))
    if decoding is not None:
        check(device, decoding, lambda: codec.decode(**coded))


@pytest.mark.parametrize(("direction", "name", "seconds", "budget"), cases(CODEC))
def test_codec(device, codecs, direction, name, seconds, budget):
    run_codec(device, codecs(name), direction, seconds, budget)


@pytest.mark.parametrize(("direction", "name", "seconds", "budget"), cases(MEMORY))
def test_memory(device, codecs, direction, name, seconds, budget):
    run_codec(device, codecs(name), direction, seconds, budget)


@pytest.mark.slow
def test_long_rows_go_together(device, codecs):
    """16 rows of ten minutes: as many time steps of the LSTMs as one row, not as all of them."""
    codec = codecs("24khz")
    audio = torch.zeros(16, 1, 600 * 24000, device="cuda")
    device.counts.reset()
    coded = codec.encode(audio, bandwidth=6.0)
    assert device.counts.lstm_steps <= 2 * 1.1 * 600 * 75
    device.counts.reset()
    codec.decode(**coded)
    assert device.counts.lstm_steps <= 2 * 1.1 * 600 * 75


@pytest.mark.parametrize(("direction", "rows", "graphs", "budget"), cases(HOPS))
def test_hops(device, codecs, direction, rows, graphs, budget):
    codec = codecs("24khz")
    if direction == "encoder":
        stream = StreamingEncoder(codec, 6.0, rows, "low_latency", cuda_graphs=graphs)
        given = torch.zeros(rows, 1, 320, device="cuda")
    else:
        stream = StreamingDecoder(codec, rows, "low_latency", cuda_graphs=graphs)
        given = torch.zeros(rows, 8, 1, dtype=torch.int64, device="cuda")
    stream.push(given)
    check(device, budget, lambda: stream.push(given))


@pytest.fixture(scope="module")
def lm(device):
    lm = EncodecLM(EncodecLMConfig()).eval()
    # Of numbers that are known its integers are made, on the CPU, before it is moved.
    return lm.quantize(torch.randint(1024, (1, 32, 20), device="cpu")).to("cuda")


# What one frame of 8 codebooks may cost: floats, then integers.
@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 16])
def test_frames_of_the_language_model(device, lm, rows):
    frame = torch.zeros(rows, 8, 1, dtype=torch.int64, device="cuda")
    _, cache = lm.predict(frame)
    check(device, Budget(2, 110, None, None), lambda: lm.predict(frame, cache))
    _, cache = lm.frequencies(frame)
    check(device, Budget(2, 570, None, None), lambda: lm.frequencies(frame, cache))
