"""EncodecLM in whole numbers: equal to an evaluation without floats, and equal however it is run."""

import copy
import hashlib
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_lm import make_codes, make_lm, one_line, shifted

from modeling_encodec import integer_lm_encodec
from modeling_encodec.configuration_encodec import EncodecLMConfig
from modeling_encodec.integer_lm_encodec import IntegerLM
from modeling_encodec.modeling_lm_encodec import EncodecLM


TOTAL = 1 << 24


def make_integer_lm(seed: int = 0, frames: int = 40, **overrides) -> EncodecLM:
    lm = make_lm(seed, **overrides)
    return lm.quantize(make_codes(lm, frames=frames, seed=100))


@pytest.fixture(scope="module")
def lm() -> EncodecLM:
    return make_integer_lm()


def in_parts(lm: EncodecLM, previous: torch.Tensor, sizes: int | list[int], cache=None) -> torch.Tensor:
    parts = []
    for part in previous.split(sizes, dim=2):
        frequencies, cache = lm.frequencies(part, cache)
        parts.append(frequencies)
    return torch.cat(parts, dim=2)


def digest(frequencies: torch.Tensor) -> str:
    return hashlib.sha256(frequencies.numpy().tobytes()).hexdigest()


# ---- an evaluation without floats --------------------------------------------------------------------------------


class ByHand:
    """`IntegerLM.frequencies` in Python's whole numbers, which have no end: one row, one frame, one head at a time.

    All constants are written out again. Products of arrays of `object` are sums of Python's numbers.
    """

    def __init__(self, tables: IntegerLM):
        self.config = tables.config
        self.tables = {name: np.array(buffer.tolist(), dtype=object) for name, buffer in tables.state_dict().items()}

    def frequencies(self, previous: torch.Tensor) -> torch.Tensor:
        return torch.tensor([self.row(row) for row in previous.tolist()], dtype=torch.int32)

    def row(self, previous: list[list[int]]) -> list:
        """(K, F) to (K, F, codebook_size)."""
        config, tables, hidden = self.config, self.tables, []
        for frame, codes in enumerate(zip(*previous)):
            total = 0
            for book, code in enumerate(codes):
                row = tables["embeddings"][book * (config.codebook_size + 1) + code + 1]
                total = total + row * (1 << tables["embedding_exponent"][book])
            x = self.norm("input_norm", total)
            hidden.append(limit(x + tables["positions"][frame % config.max_positions], 32767))
        for number in range(config.num_hidden_layers):
            hidden = self.layer(f"layers.{number}", hidden)
        return [list(frames) for frames in zip(*(self.distributions(x, len(previous)) for x in hidden))]

    def layer(self, name: str, hidden: list[np.ndarray]) -> list[np.ndarray]:
        heads, reach = self.config.num_attention_heads, self.config.context_frames
        inputs = [self.activations(x, f"{name}.input_exponent") for x in hidden]
        if self.config.zero_past_key:
            inputs.insert(0, np.array([0] * self.config.hidden_size, dtype=object))
        qkv = [limit(self.linear(f"{name}.qkv_proj", x), 127).reshape(3, heads, -1) for x in inputs]
        out = []
        for frame, x in enumerate(hidden):
            now = frame + int(self.config.zero_past_key)
            seen = qkv[max(0, now - reach) : now + 1]
            attended = [self.attend(name, head, qkv[now][0, head], seen) for head in range(heads)]
            x = limit(x + self.linear(f"{name}.o_proj", np.concatenate(attended)), 65534)
            x = self.norm(f"{name}.attention_norm", x)
            index = self.linear(f"{name}.up_proj", self.activations(x, f"{name}.middle_exponent"))
            inside = self.tables[f"{name}.gelu"][np.clip(index, 0, 1023).astype(int)]
            x = limit(x + self.linear(f"{name}.down_proj", inside), 65534)
            out.append(self.norm(f"{name}.output_norm", x))
        return out

    def attend(self, name: str, head: int, query: np.ndarray, seen: list[np.ndarray]) -> np.ndarray:
        scores = [query @ one[1, head] for one in seen]
        exponent = self.tables[f"{name}.score_exponent"][head]
        steps = [min(floor_scaled(max(scores) - score, exponent), 1023) for score in scores]
        weights = [self.tables["attention_exp"][step] for step in steps]
        inverse = (2**41 + 1) // (2 * sum(weights))
        total = sum(weight * one[2, head] for weight, one in zip(weights, seen)) * inverse
        exponent = self.tables[f"{name}.attended_exponent"][head] - 40
        return limit(np.array([rounded_scaled(value, exponent) for value in total], dtype=object), 127)

    def distributions(self, x: np.ndarray, books: int) -> list[list[int]]:
        size = self.config.codebook_size
        logits = self.linear("head", self.activations(x, "head_exponent")).reshape(-1, size)[:books]
        out = []
        for row in logits:
            weights = [self.tables["output_exp"][min(max(row) - logit, 2047)] for logit in row]
            inverse = (2**25 * (TOTAL - size) + 1) // (2 * sum(weights))
            shares = [(weight * inverse) >> 24 for weight in weights]
            shares[-1] += TOTAL - size - sum(shares)
            out.append([share + 1 for share in shares])
        return out

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        sums = self.tables[f"{name}.weight"] @ x + self.tables[f"{name}.bias"]
        exponents = self.tables[f"{name}.exponent"]
        return np.array([floor_scaled(value, exponent) for value, exponent in zip(sums, exponents)], dtype=object)

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        x = x - (2 * sum(x) + 1) // (2 * len(x))
        root = max(1, math.isqrt(sum(x * x) + int(self.tables[f"{name}.epsilon"])))
        x = x * ((2**31 + 1) // (2 * root)) * self.tables[f"{name}.gain"] + self.tables[f"{name}.offset"]
        return limit(np.array([value >> 28 for value in x], dtype=object), 32767)

    def activations(self, x: np.ndarray, name: str) -> np.ndarray:
        scaled = [rounded_scaled(value, exponent) for value, exponent in zip(x, self.tables[name])]
        return limit(np.array(scaled, dtype=object), 127)


def floor_scaled(value: int, exponent: int) -> int:
    return value << exponent if exponent >= 0 else value >> -exponent


def rounded_scaled(value: int, exponent: int) -> int:
    """Halves go up."""
    return (floor_scaled(2 * value, exponent) + 1) >> 1


def limit(values: np.ndarray, most: int) -> np.ndarray:
    return np.clip(values, -most, most)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"zero_past_key": False},
        {"num_codebooks": 1, "codebook_size": 2},
        {"num_codebooks": 9, "codebook_size": 37, "num_attention_heads": 4},
        {"hidden_size": 4, "num_attention_heads": 4, "num_hidden_layers": 3, "context_seconds": 0.1},
        {"hidden_size": 22, "num_attention_heads": 1, "max_positions": 7, "context_seconds": 9},
    ],
    ids=str,
)
def test_a_model_equals_the_evaluation_without_floats(overrides):
    lm = make_integer_lm(**overrides)
    for books in {1, lm.config.num_codebooks}:
        previous = shifted(make_codes(lm, frames=17, books=books))
        frequencies, _ = lm.frequencies(previous)
        assert torch.equal(frequencies, ByHand(lm.integer).frequencies(previous))
        assert frequencies.unique().numel() > 20 or lm.config.codebook_size == 2


def adversarial_tables(seed: int, **overrides) -> EncodecLM:
    """Tables drawn from all that calibration may put out, with no thought for what they mean.

    Most channels are such that something comes through; some are at the ends of what is allowed.
    """
    generator = np.random.default_rng(seed)
    lm = make_lm(**overrides)
    lm.integer = tables = IntegerLM(lm.config)
    lm.config.has_integer_form = True
    share = (0.0, 0.03, 0.1)[seed % 3]

    def fill(buffer, low, high, lowest=None, highest=None):
        """Between low and high, seldom between lowest and highest, or at one of these."""
        values = generator.integers(low, high, buffer.shape, endpoint=True)
        if lowest is not None:
            wild = generator.integers(lowest, highest, buffer.shape, endpoint=True)
            wild = np.where(generator.random(buffer.shape) < 0.5, wild, generator.choice([lowest, highest]))
            values = np.where(generator.random(buffer.shape) < share, wild, values)
        buffer.copy_(torch.from_numpy(np.asarray(values)))

    # Exponents by which sums of `width` products of full size land where they should.
    def landing(width, bits):
        return bits - round(math.log2(127 * 127 * math.sqrt(width) / 2))

    for name, module in tables.named_modules():
        kind, place = type(module).__name__, name.split(".")[-1]
        if kind == "IntegerLinear":
            fill(module.weight, -127, 127)
            if seed % 2:  # all at their ends
                module.weight.copy_(torch.where(module.weight < 0, -127, 127))
            room = 2**24 - 1 - 127 * module.weight.long().abs().sum(1).numpy()
            assert (room >= 0).all()
            exponent = landing(module.weight.shape[1], {"qkv_proj": 6, "up_proj": 8, "head": 7}.get(place, 12))
            ends = {"up_proj": (-24, 3), "head": (exponent, exponent)}.get(place, (-24, 20))
            fill(module.exponent, exponent - 2, exponent + (place != "head"), *ends)
            bias = generator.integers(-2000, 2000, len(room))
            if place == "up_proj":
                bias = bias + (512 * 2.0 ** -module.exponent.numpy().astype(float)).clip(0, 2**22).astype(int)
            wild = generator.random(len(room)) < (0 if place == "head" else share)
            bias = np.where(wild, generator.choice([-1, 1], len(room)) * (2**24), bias)
            module.bias.copy_(torch.from_numpy(bias.clip(-room, room)))
        elif kind == "IntegerNorm":
            fill(module.gain, -(2**13), 2**13, -(2**20), 2**20)
            fill(module.offset, -(2**40), 2**40, -(2**51), 2**51)
            module.epsilon.fill_(int(generator.choice([0, 1, 1000, 2**20, 2**30])))
        elif kind == "IntegerLMLayer":
            fill(module.input_exponent, -7, -4, -30, 10)
            fill(module.middle_exponent, -7, -4, -30, 10)
            fill(module.score_exponent, -5, -3, -12, 20)
            fill(module.attended_exponent, -1, 2, -30, 30)
            fill(module.gelu, -127, 127)
    fill(tables.embeddings, -127, 127)
    fill(tables.embedding_exponent, 0, (65534 // (127 * lm.config.num_codebooks)).bit_length() - 1)
    fill(tables.positions, -1024, 1024, -32767, 32767)
    fill(tables.head_exponent, -7, -4, -30, -3)
    for table, one, scale in ((tables.attention_exp, 1 << 16, 200), (tables.output_exp, 1 << 20, 400)):
        fill(table, 0, one)
        table.copy_((table * torch.exp(-torch.arange(len(table)) / scale)).long())
        table[0], table[-1] = one, 0
    return lm


@pytest.mark.parametrize("seed", range(24))
def test_adversarial_tables_equal_the_evaluation_without_floats(seed):
    sizes = [
        {},
        {"hidden_size": 6, "num_attention_heads": 3, "zero_past_key": False, "codebook_size": 5},
        {"num_codebooks": 1, "codebook_size": 300, "context_seconds": 0.2},
        {"hidden_size": 30, "num_attention_heads": 1, "intermediate_size": 7, "max_positions": 5},
    ]
    lm = adversarial_tables(seed, **sizes[seed // 2 % 4])
    previous = shifted(make_codes(lm, batch=3, frames=13, seed=seed))
    expected = ByHand(lm.integer).frequencies(previous)
    assert (expected[0] != expected[1]).any(-1).float().mean() > 0.5  # what goes in counts
    assert torch.equal(lm.frequencies(previous)[0], expected)
    assert torch.equal(in_parts(lm, previous, 1), expected)
    assert torch.equal(in_parts(lm, previous, [5, 3, 5]), expected)


def test_the_widest_sums_equal_the_evaluation_without_floats():
    """A head of 1040 and linear layers whose sums reach 2**24 - 1, all weights at their ends."""
    lm = adversarial_tables(
        1, hidden_size=1040, num_attention_heads=1, intermediate_size=1040, num_hidden_layers=1, num_codebooks=1
    )
    layer = lm.integer.layers[0]
    with torch.no_grad():
        layer.input_exponent.fill_(3)
        layer.score_exponent.fill_(-12)
        for linear in (layer.qkv_proj, layer.o_proj, layer.up_proj, layer.down_proj):
            linear.weight.copy_(torch.where(linear.weight < 0, -127, 127))
            linear.weight[::3] = 127
            linear.bias.copy_(torch.where(linear.bias < 0, -1, 1) * (2**24 - 1 - 1040 * 127 * 127))
        layer.qkv_proj.exponent.fill_(0)
        # Query and key of all 127, but for a few: scores as great as they get, and odd.
        layer.qkv_proj.weight[:2080] = 127
        layer.qkv_proj.bias[:2080] = 441
        layer.qkv_proj.exponent[:2080] = -3
        layer.qkv_proj.exponent[::7] = -12
        lm.integer.embeddings[:, :520] = 100
        lm.integer.input_norm.gain.fill_(2**20)
    previous = shifted(make_codes(lm, batch=1, frames=4))
    exact = ByHand(lm.integer)
    assert torch.equal(lm.frequencies(previous)[0], exact.frequencies(previous))


@pytest.mark.parametrize("width", [4, 6, 10, 98, 200, 1040, 4096])  # 98 * (1 / 98) is less than 1 in floats
def test_norms_equal_whole_numbers(width):
    """Rows of all kinds: constant, all but constant, at the ends, with every root from 1 to tens of thousands."""
    lm = make_lm()
    generator = np.random.default_rng(width)
    rows = [np.full(width, value) for value in (0, 1, -1, 17, 65534, -65534)]
    rows += [np.where(np.arange(width) < n, 65534, -65534) for n in (1, width // 2, width - 1)]
    rows += [np.where(np.arange(width) == 0, value, 0) for value in (1, -1, 2, width, -width, 65534, -65534)]
    rows += [
        generator.integers(-scale, scale + 1, width) for scale in (1, 2, 30, 1000, 32767, 65534) for _ in range(9)
    ]
    # Sums that are a whole number of means, or one off: where the mean's floor would slip.
    for row in [generator.integers(-65000, 65000, width) for _ in range(20)]:
        row[0] -= row.sum() % width - generator.integers(-1, 2)
        rows.append(np.clip(row, -65534, 65534))
    if width == 4:
        rows += [np.array([value, -value, 0, 0]) for value in range(20000)]
    x = np.array(rows).astype(np.int64)
    norm = lm.quantize(make_codes(lm)).integer.input_norm
    for epsilon in (0, 1, 12345, 2**43):
        gain, offset = generator.integers(-(2**20), 2**20, width), generator.integers(-(2**51), 2**51, width)
        if epsilon < 2:
            gain, offset = np.full(width, 2**8), np.full(width, 2**27)
        norm.gain, norm.offset = torch.from_numpy(gain).int(), torch.from_numpy(offset)
        norm.epsilon = torch.tensor(epsilon)
        evaluated = norm_program(norm)(torch.from_numpy(x).double())
        centred = x - ((2 * x.sum(1, keepdims=True) + 1) // (2 * width))
        squares = (centred**2).sum(1) + epsilon
        roots = np.array([max(1, math.isqrt(int(square))) for square in squares])[:, None]
        expected = (centred * ((2**31 + 1) // (2 * roots)) * gain + offset) >> 28  # within int64
        assert np.array_equal(evaluated.numpy(), np.clip(expected, -32767, 32767))


def norm_program(norm):
    program = integer_lm_encodec._Norm(norm, integer_lm_encodec._Place(torch.device("cpu")))
    return lambda rows: torch.from_numpy(program(rows.numpy().copy()))


@pytest.mark.parametrize("size", [2, 3, 1000, 1024, 65536])
def test_shares_equal_whole_numbers(size):
    """The last quotient, for logits of all kinds and tables whose sums divide badly."""
    lm = make_lm(codebook_size=size, num_codebooks=1, hidden_size=4, num_attention_heads=1)
    lm.quantize(make_codes(lm))
    tables, generator = lm.integer, np.random.default_rng(size)
    hidden = torch.from_numpy(generator.integers(-3000, 3000, (1, 24, 4))).float()
    for round_ in range(3):
        if round_:
            table = generator.integers(0, 2**20, 2048, endpoint=True) >> generator.integers(0, 21, 2048)
            table[0], table[-1] = 2**20, 0
            tables.output_exp.copy_(torch.from_numpy(table))
        if round_ == 2:
            tables.head.weight.zero_()  # all logits equal or far apart
            tables.head.bias.copy_(torch.from_numpy(generator.integers(0, 2, size) * (2**24 - 1)))
        table = tables.output_exp.numpy().astype(np.int64)
        exponent = tables.head_exponent.numpy().astype(np.int64)
        x = np.floor_divide(2 * hidden[0].numpy().astype(np.int64) + (1 << -exponent), 2 << -exponent)
        logits = np.clip(x, -127, 127) @ tables.head.weight.numpy().astype(np.int64).T + tables.head.bias.numpy()
        shift = tables.head.exponent.numpy().astype(np.int64)
        logits = np.where(shift < 0, logits >> -np.minimum(shift, 0), logits << np.maximum(shift, 0))
        weights = table[np.minimum(logits.max(1, keepdims=True) - logits, 2047)]
        shares = (weights * ((2**25 * (TOTAL - size) + 1) // (2 * weights.sum(1, keepdims=True)))) >> 24
        shares[:, -1] += TOTAL - size - shares.sum(1)
        assert np.array_equal(tables._current_program().shares(hidden.double().numpy(), 1)[0, :, 0], shares)


# ---- what calibration promises -----------------------------------------------------------------------------------


def assert_exact(tables: IntegerLM) -> None:
    """The bounds on which exactness rests."""
    config, state = tables.config, tables.state_dict()
    assert not any(tensor.is_floating_point() for tensor in state.values())
    for name, tensor in state.items():
        if name.endswith(".weight"):
            sums = 127 * tensor.long().abs().sum(1) + state[name.replace("weight", "bias")].long().abs()
            assert tensor.dtype == torch.int8 and tensor.min() >= -127 and sums.max() < 2**24, name
        if name.endswith("exponent"):
            assert tensor.min() >= -64 and tensor.max() <= 63, name
        if name.endswith("gain"):
            assert tensor.long().abs().max() <= 2**20, name
        if name.endswith("offset"):
            assert tensor.abs().max() <= 2**51, name
        if name.endswith("epsilon"):
            assert 0 <= tensor <= 2**43, name
        if name.endswith("score_exponent"):
            assert tensor.min() >= -12, name
        if name.endswith("gelu"):
            assert tensor.min() >= -127, name
    greatest = state["embeddings"].long().abs().view(config.num_codebooks, -1, config.hidden_size).amax(1)
    assert (greatest << state["embedding_exponent"].long()[:, None]).sum(0).max() <= 65534
    assert state["embedding_exponent"].min() >= 0 and state["positions"].abs().max() <= 1024
    for name, one in (("attention_exp", 1 << 16), ("output_exp", 1 << 20)):
        table = state[name]
        assert table[0] == one and table[-1] == 0 and (table.diff() <= 0).all(), name


# No attention, no feed-forward, no head, no embeddings; huge and tiny ones; one row of each; huge biases.
@pytest.mark.parametrize("factor", [0.0, 1e-38, 1e-20, 1e-6, 1e4, 1e9])
@pytest.mark.parametrize("which", ["qkv_proj", "o_proj", "up_proj", "down_proj", "head", "norm", "embeddings", "bias"])
@torch.no_grad()
def test_no_weights_lead_out_of_the_exact_range(which, factor):
    lm = make_lm()
    if which == "bias":
        for name, parameter in lm.named_parameters():
            if name.endswith("bias"):
                parameter *= min(factor, 1e6)
    for name, parameter in lm.named_parameters():
        if which in name and (name.endswith("weight") or 0 < factor < 1e-30):
            parameter[:: 1 if factor < 1e-30 else 2] *= factor
    codes = make_codes(lm, frames=12)
    lm.quantize(codes)
    assert_exact(lm.integer)
    whole, _ = lm.frequencies(shifted(codes))
    assert (whole.sum(-1) == TOTAL).all() and whole.min() >= 1
    assert torch.equal(in_parts(lm, shifted(codes), 1), whole)
    row = shifted(codes)[:1, :, :7]
    assert torch.equal(whole[:1, :, :7], ByHand(lm.integer).frequencies(row))


# beyond float32 in "cannot convert float NaN to integer". Wanted: saturated tables, or one line that names weights.
@pytest.mark.parametrize(
    ("name", "factor"), [("layers.0.qkv_proj.weight", 1e15), ("head.weight", 1e30), ("head.weight", 1e38)]
)
@torch.no_grad()
def test_absurd_weights_saturate_or_are_refused(name, factor):
    lm = make_lm()
    lm.get_parameter(name).mul_(factor)
    codes = make_codes(lm, frames=12)
    try:
        lm.quantize(codes)
    except ValueError as error:
        assert "allowed" in str(error)
        return
    assert_exact(lm.integer)
    row = shifted(codes)[:1, :, :7]
    assert torch.equal(lm.frequencies(row)[0], ByHand(lm.integer).frequencies(row))


@torch.no_grad()
def test_a_last_norm_of_absurd_size_saturates():
    lm = make_lm()
    lm.layers[-1].output_norm.weight.mul_(1e20)
    try:
        lm.quantize(make_codes(lm))
    except ValueError as error:
        assert "allowed" in str(error)
        return
    assert_exact(lm.integer)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@torch.no_grad()
def test_weights_that_are_not_finite_are_refused(value):
    for name in ("embeddings.weight", "layers.1.o_proj.bias", "head.weight", "input_norm.weight"):
        lm = make_lm()
        lm.get_parameter(name).view(-1)[-1] = value
        with pytest.raises(ValueError, match=f"{name} holds NaN or infinity, allowed: finite") as caught:
            lm.quantize(make_codes(lm))
        one_line(caught)
        assert lm.integer is None and not lm.config.has_integer_form


def test_scores_of_the_widest_heads_are_exact():
    """One head of 1300, whose scores pass 2**24: float32 would round them."""
    lm = adversarial_tables(
        0, hidden_size=1300, num_attention_heads=1, intermediate_size=4, num_hidden_layers=1, num_codebooks=1
    )
    layer, width = lm.integer.layers[0], 1300
    layer.input_exponent.fill_(-4)
    layer.score_exponent.fill_(0)
    constant = torch.arange(2 * width) % 50 > 0  # all other queries and keys are 127
    layer.qkv_proj.weight[: 2 * width][constant] = 0
    layer.qkv_proj.bias[: 2 * width][constant] = 1 << 20
    layer.qkv_proj.exponent[: 2 * width] = torch.where(constant, 0, layer.qkv_proj.exponent[: 2 * width] - 4)
    previous = shifted(make_codes(lm, batch=1, frames=5))
    assert torch.equal(lm.frequencies(previous)[0], ByHand(lm.integer).frequencies(previous))


@pytest.mark.timeout(30)
def test_the_sum_of_too_many_embeddings_is_refused():
    sizes = {"hidden_size": 4, "num_attention_heads": 1, "codebook_size": 2, "num_hidden_layers": 1}
    lm = make_lm(num_codebooks=516, **sizes)
    assert_exact(lm.quantize(make_codes(lm, frames=3)).integer)
    lm = make_lm(num_codebooks=517, **sizes)
    with pytest.raises(ValueError, match="num_codebooks is 517, allowed.*516") as caught:
        lm.quantize(make_codes(lm, frames=3))
    one_line(caught)


def test_a_model_too_wide_is_refused():
    lm = make_lm(hidden_size=4098, intermediate_size=1, num_hidden_layers=1, num_codebooks=1)
    with pytest.raises(ValueError, match="^hidden_size is 4098, allowed for the integer form: up to 4096$"):
        lm.quantize(make_codes(lm))


def test_no_codes_to_calibrate_on_are_refused():
    with pytest.raises(ValueError, match="codes.*allowed: ") as caught:
        make_lm().quantize([])
    one_line(caught)


def test_calibration_takes_batches_of_all_shapes_and_leaves_the_model_alone():
    lm = make_lm().train()
    before = copy.deepcopy(lm.state_dict())
    state = torch.get_rng_state()
    lm.quantize([make_codes(lm, 3, 17), make_codes(lm, 1, 1), make_codes(lm, 2, 9, books=2)])
    assert_exact(lm.integer)
    assert lm.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(lm.state_dict()[name], tensor) for name, tensor in before.items())
    assert not lm.head._forward_hooks and lm.config.has_integer_form


@pytest.mark.parametrize(
    ("books", "size", "bits"), [(1, 1024, 0.001), (4, 16, 0.005), (16, 64, 0.001), (32, 256, 0.0002)]
)
@torch.no_grad()
def test_the_cost_is_small(books, size, bits):
    """Bits per code that coding by whole numbers takes more than coding by the float model's own distribution."""
    lm = make_lm(num_codebooks=books, codebook_size=size, hidden_size=48, intermediate_size=96, context_seconds=3)
    lm.quantize(make_codes(lm, batch=4, frames=60, seed=50))
    codes = make_codes(lm, batch=4, frames=60, seed=60)
    for count in {1, (books + 1) // 2, books}:
        logits = lm(codes[:, :count]).logits.double()
        frequencies, _ = lm.frequencies(shifted(codes[:, :count]))
        wanted = logits.log_softmax(-1)
        given = (frequencies.double() / TOTAL).log()
        cost = (wanted.exp() * (wanted - given)).sum(-1).mean() / math.log(2)
        entropy = -(wanted.exp() * wanted).sum(-1).mean() / math.log(2)
        assert entropy < math.log2(size) - 0.05  # the distributions are not flat
        assert -1e-9 < cost < bits, cost


# ---- the same however it is run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def previous(lm) -> torch.Tensor:
    return shifted(make_codes(lm, batch=8, frames=75))


@pytest.fixture(scope="module")
def expected(lm, previous) -> torch.Tensor:
    frequencies, _ = lm.frequencies(previous)
    return frequencies


def test_frequencies_are_whole_positive_and_sum_to_the_total(lm, previous, expected):
    assert expected.dtype == torch.int32 and expected.shape == (8, 4, 75, 16) and not expected.requires_grad
    assert expected.min() >= 1 and (expected.sum(-1, dtype=torch.int64) == TOTAL).all()
    assert expected.unique().numel() > 1000
    assert torch.equal(expected, lm.frequencies(previous)[0])
    fewer, _ = lm.frequencies(previous[:, :2])
    assert fewer.shape == (8, 2, 75, 16) and not torch.equal(fewer, expected[:, :2])
    for dtype in (torch.int32, torch.int16, torch.int8):
        assert torch.equal(lm.frequencies(previous.to(dtype))[0], expected)


def test_no_frame_knows_itself_or_what_follows(lm, previous, expected):
    changed = previous.clone()
    changed[:, :, 31] = (changed[:, :, 31] + 3) % 16
    differ = (lm.frequencies(changed)[0] != expected).any(3).any(1)
    assert differ[:, 31].all() and not differ[:, :31].any() and not differ[:, 31 + 11 :].any()  # 2 layers of 5 frames


@pytest.mark.parametrize(
    "sizes", [1, 2, 3, 5, 6, 7, 11, 13, 37, 74, [37, 38], [1, 73, 1], [20, 1, 1, 1, 40, 12]], ids=str
)
def test_whole_is_step_by_step_is_in_parts(lm, previous, expected, sizes):
    assert torch.equal(in_parts(lm, previous, sizes), expected)


@pytest.mark.parametrize("zero_past_key", [True, False])
@pytest.mark.parametrize("context", [0.1, 0.2, 12.7, 12.8, 14.0, 40.0])
def test_long_segments_and_any_context(context, zero_past_key):
    """Longer than a block of frames, than all positions, and than the memory before it is copied."""
    lm = make_integer_lm(context_seconds=context, zero_past_key=zero_past_key, num_hidden_layers=1, num_codebooks=2)
    previous = shifted(make_codes(lm, frames=300))
    whole, cache = lm.frequencies(previous)
    assert cache.frames == 300 > lm.config.max_positions
    assert torch.equal(in_parts(lm, previous, [127, 1, 128, 44]), whole)
    assert torch.equal(in_parts(lm, previous, 129), whole)
    assert torch.equal(in_parts(lm, previous[:1], 1), whole[:1])


def test_positions_begin_again_after_the_last():
    lm = make_integer_lm(max_positions=7, context_seconds=0.1, num_hidden_layers=1, zero_past_key=False)
    codes = make_codes(lm, frames=40)
    codes[:, :, 21:] = codes[:, :, :19]  # the same in the same place of the positions, 21 = 3 * 7
    frequencies, _ = lm.frequencies(codes)
    assert torch.equal(frequencies[:, :, 23:], frequencies[:, :, 2:19])
    assert not torch.equal(frequencies[:, :, 22:39], frequencies[:, :, 2:19])
    assert torch.equal(in_parts(lm, codes, [6, 1, 7, 13, 13]), frequencies)


def test_alone_is_in_a_batch_with_others(lm, previous, expected):
    for row in range(8):
        assert torch.equal(lm.frequencies(previous[row : row + 1])[0], expected[row : row + 1])
    assert torch.equal(lm.frequencies(previous.flip(0))[0], expected.flip(0))
    assert torch.equal(lm.frequencies(previous[2:5])[0], expected[2:5])
    assert torch.equal(lm.frequencies(previous.transpose(0, 2).contiguous().transpose(0, 2))[0], expected)


def test_rows_that_are_alike_stay_alike(lm, previous):
    frequencies, _ = lm.frequencies(previous[:1].expand(5, -1, -1))
    assert torch.equal(frequencies, frequencies[:1].expand_as(frequencies))


def test_more_threads_change_nothing():
    """With matrices large enough to be shared among threads."""
    lm = make_integer_lm(hidden_size=120, intermediate_size=480, codebook_size=256, num_codebooks=8)
    previous = shifted(make_codes(lm, batch=4, frames=50))
    expected, _ = lm.frequencies(previous)
    try:
        for threads in (2, 3, 4):
            torch.set_num_threads(threads)
            assert torch.equal(lm.frequencies(previous)[0], expected)
            assert torch.equal(in_parts(lm, previous[:1], 1), expected[:1])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precision_of_products_changes_nothing(precision, onednn):
    """`medium` multiplies in bfloat16, where the processor can."""
    lm = make_integer_lm(hidden_size=120, intermediate_size=480, codebook_size=256, num_codebooks=8)
    previous = shifted(make_codes(lm, batch=4, frames=50))
    expected, _ = lm.frequencies(previous)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.backends.mkldnn.flags(enabled=onednn):
            assert torch.equal(lm.frequencies(previous)[0], expected)
            assert torch.equal(in_parts(lm, previous[:1], 1), expected[:1])
    finally:
        torch.set_float32_matmul_precision(before)


def test_modes_of_torch_change_nothing(lm, previous, expected):
    fresh = copy.deepcopy(lm)  # makes its program within the mode
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            frequencies, _ = fresh.frequencies(previous)
            parts = in_parts(lm, previous, 25)
        assert torch.equal(frequencies, expected) and torch.equal(parts, expected)
        assert not frequencies.requires_grad
        fresh = copy.deepcopy(lm)
    assert torch.equal(fresh.train().frequencies(previous)[0], expected)


@pytest.mark.parametrize("ulps", [-2, -1, 1, 2])
def test_careless_quotients_and_roots_change_nothing(ulps, lm, previous, expected, monkeypatch):
    """Other machines may be off by a place or two where this one rounds correctly."""
    models = [(lm, previous[:4], expected[:4])]
    for seed in range(4):
        model = adversarial_tables(seed, hidden_size=(16, 98)[seed % 2])
        # Sums and sizes that divide without a rest: quotients that are, but for the added half, whole.
        for table in (model.integer.attention_exp, model.integer.output_exp):
            table.copy_(table[0] >> torch.arange(len(table)).clamp(max=18) // 3)
            table[-1] = 0
        if seed > 1:
            for layer in model.integer.layers:  # means of a few values, halves among them
                layer.qkv_proj.weight[: model.config.hidden_size] = 0
                layer.qkv_proj.bias[: model.config.hidden_size] = 0
                layer.attended_exponent.zero_()
            model.integer.head.weight[: 2 * 16] = 0  # equal shares
            model.integer.head.bias[: 2 * 16] = 0
        codes = shifted(make_codes(model, batch=4, frames=40))
        models.append((model, codes, model.frequencies(codes)[0]))
    square = copy.deepcopy(lm).integer.input_norm  # roots of squares, and quotients of powers of two
    square.epsilon.zero_()
    square.gain.fill_(2**12)
    square.offset.zero_()
    rows = torch.tensor([[value, -value, value, -value] + 12 * [0] for value in range(1, 9000)]).double()
    normed = norm_program(square)(rows)
    calls = []

    def off(result):
        for _ in range(abs(ulps)):
            result = np.nextafter(result, math.copysign(math.inf, ulps))
        calls.append(result.shape)
        return result

    place = integer_lm_encodec._Place
    monkeypatch.setattr(place, "quotient", lambda self, one, x: self.floor(off(one / x)))
    monkeypatch.setattr(place, "root", lambda self, x: self.floor(off(np.sqrt(x))))
    for model, codes, frequencies in models:
        assert torch.equal(model.frequencies(codes)[0], frequencies)
    assert torch.equal(norm_program(square)(rows), normed)
    assert len(calls) > 50


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_tensors_give_what_arrays_give(seed, lm, previous, expected, monkeypatch):
    """The way of accelerators, on a CPU."""
    if seed is not None:
        lm = adversarial_tables(seed)
        previous = shifted(make_codes(lm, batch=3, frames=40))
        expected = lm.frequencies(previous)[0]

    def on_tensors(self, device):
        self.device, self.on_cpu, self.xp, self.float64 = device, False, torch, torch.float64

    monkeypatch.setattr(integer_lm_encodec._Place, "__init__", on_tensors)
    fresh = copy.deepcopy(lm)
    assert torch.equal(fresh.frequencies(previous)[0], expected)
    assert torch.equal(in_parts(fresh, previous, 1), expected) and torch.equal(in_parts(fresh, previous, 7), expected)
    assert isinstance(fresh.integer.shares(previous)[0], torch.Tensor)


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_float_products_give_what_int8_ones_give(seed, lm, previous, expected, monkeypatch):
    """The way of CPUs whose int8 products saturate."""
    if seed is not None:
        lm = adversarial_tables(seed)
        previous = shifted(make_codes(lm, batch=3, frames=40))
        expected = lm.frequencies(previous)[0]
    monkeypatch.setattr(integer_lm_encodec, "int8_products_are_exact", lambda *sizes: False)
    fresh = copy.deepcopy(lm)
    assert torch.equal(fresh.frequencies(previous)[0], expected)
    assert torch.equal(in_parts(fresh, previous, 1), expected)


def test_the_probe_finds_products_that_saturate(monkeypatch):
    def saturating(a, b):
        pairs = a.int().unflatten(1, (-1, 2)).unsqueeze(3) * b.int().unflatten(0, (-1, 2)).unsqueeze(0)
        return pairs.sum(2).clamp(-(2**15), 2**15 - 1).sum(1)

    probe = integer_lm_encodec.int8_products_are_exact.__wrapped__
    assert probe(16, 8)
    exact = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: exact(a, b).clamp(max=2**17))
    assert not probe(16, 8)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: saturating(a + 0, b) if len(a) > 1 else exact(a, b) + 1)
    assert not probe(16, 8)
    monkeypatch.delattr(torch, "_int_mm")
    assert not probe(16, 8)


def test_a_cache_of_inference_mode_serves_outside_it(lm, previous, expected):
    with torch.inference_mode():
        frequencies, cache = lm.frequencies(previous[:, :, :30])
    assert torch.equal(in_parts(lm, previous[:, :, 30:], 9, cache), expected[:, :, 30:])
    with torch.inference_mode():
        assert torch.equal(in_parts(lm, previous[:, :, 30:], 9, cache), expected[:, :, 30:])


def test_quantised_in_inference_mode(lm, previous, expected):
    with torch.inference_mode():
        other = make_integer_lm()
        assert torch.equal(other.frequencies(previous)[0], expected)
    assert torch.equal(other.frequencies(previous)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_type_changes_nothing(dtype, lm, previous, expected):
    fresh = copy.deepcopy(lm)
    try:
        torch.set_default_dtype(dtype)
        assert torch.equal(fresh.frequencies(previous)[0], expected)
        assert torch.equal(in_parts(lm, previous, 30), expected)
    finally:
        torch.set_default_dtype(torch.float32)


FRESH = """
import sys, torch
torch.set_num_threads(int(sys.argv[3]))
torch.set_float32_matmul_precision(sys.argv[4])
from modeling_encodec.modeling_lm_encodec import EncodecLM
import hashlib
lm = EncodecLM.from_pretrained(sys.argv[1])
previous = torch.load(sys.argv[2])
whole, _ = lm.frequencies(previous)
cache, steps = None, []
for frame in previous.split(1, dim=2):
    frequencies, cache = lm.frequencies(frame, cache)
    steps.append(frequencies)
assert torch.equal(torch.cat(steps, dim=2), whole)
print(hashlib.sha256(whole.numpy().tobytes()).hexdigest())
"""


@pytest.mark.parametrize(
    ("threads", "precision", "environment"),
    [("2", "medium", {}), ("1", "high", {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"})],
    ids=["two threads, bfloat16", "no vector instructions"],
)
def test_another_process_tells_the_same(threads, precision, environment, lm, previous, expected, tmp_path):
    lm.save_pretrained(tmp_path)
    torch.save(previous, tmp_path / "previous.pt")
    command = [sys.executable, "-c", FRESH, tmp_path, tmp_path / "previous.pt", threads, precision]
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_CBWR": "COMPATIBLE"} | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_a_gpu_tells_the_same(precision, lm, previous, expected):
    large = make_integer_lm(hidden_size=200, num_attention_heads=8, intermediate_size=800, codebook_size=1024)
    wild = adversarial_tables(3)
    before = torch.get_float32_matmul_precision()
    for model in (lm, large, wild):
        codes = shifted(make_codes(model, batch=4, frames=75))
        whole, _ = model.frequencies(codes)
        moved = copy.deepcopy(model).cuda()
        try:
            torch.set_float32_matmul_precision(precision)
            assert torch.equal(moved.frequencies(codes)[0].cpu(), whole)
            assert torch.equal(in_parts(moved, codes[:1], 1).cpu(), whole[:1])
            with torch.autocast("cuda", torch.float16):
                assert torch.equal(moved.frequencies(codes.cuda())[0].cpu(), whole)
        finally:
            torch.set_float32_matmul_precision(before)


@pytest.mark.slow
def test_compiled_tells_the_same(lm, previous, expected):
    compiled = torch.compile(copy.deepcopy(lm).integer.frequencies, dynamic=False)
    whole, cache = compiled(previous)
    assert torch.equal(whole, expected)
    parts, cache = [], None
    for part in previous[:, :, :30].split([10, 1, 1, 1, 17], dim=2):
        frequencies, cache = compiled(part, cache)
        parts.append(frequencies)
    assert torch.equal(torch.cat(parts, dim=2), expected[:, :, :30])


# ---- the tables and the model round them -------------------------------------------------------------------------


def test_casting_the_model_leaves_the_tables_alone(lm, previous, expected):
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.float()):
        model = cast(copy.deepcopy(lm))
        assert torch.equal(model.frequencies(previous)[0], expected)
        assert [t.dtype for t in model.integer.state_dict().values()] == [
            t.dtype for t in lm.integer.state_dict().values()
        ]
        assert not any(buffer.is_floating_point() for buffer in model.integer.buffers())


def test_copies_and_pickles(lm, previous, expected):
    for copied in (copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):
        assert torch.equal(copied.frequencies(previous)[0], expected)
        copied.integer.head.bias += 1000 * torch.arange(64, dtype=torch.int32)
        assert not torch.equal(copied.frequencies(previous)[0], expected)  # what has changed counts
        assert torch.equal(lm.frequencies(previous)[0], expected)
        copied.integer.load_state_dict(lm.integer.state_dict())
        assert torch.equal(copied.frequencies(previous)[0], expected)


def test_quantising_again_takes_the_new_weights(lm, previous, expected):
    model = copy.deepcopy(lm)
    _, cache = model.frequencies(previous[:, :, :9])
    with torch.no_grad():
        model.head.weight *= 0.5
    assert torch.equal(model.frequencies(previous)[0], expected)  # until then, the old
    model.quantize(make_codes(model))
    assert not torch.equal(model.frequencies(previous)[0], expected)
    assert torch.equal(model.frequencies(previous[:, :, 9:], cache)[0], expected[:, :, 9:])  # begun with the old


@pytest.mark.parametrize(
    "arguments", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": "auto"}], ids=str
)
def test_saved_and_loaded_is_the_same(arguments, lm, previous, expected, tmp_path):
    lm.save_pretrained(tmp_path)
    again, info = EncodecLM.from_pretrained(tmp_path, output_loading_info=True, **arguments)
    assert not any(info.values()) and again.config.has_integer_form and again.config.has_float_form
    for name, tensor in lm.integer.state_dict().items():
        loaded = again.integer.state_dict()[name]
        assert torch.equal(loaded, tensor) and loaded.dtype == tensor.dtype, name
    assert torch.equal(again.frequencies(previous)[0], expected)
    assert torch.isfinite(again(previous.clamp(min=0)).logits).all()


@pytest.mark.parametrize(
    "arguments", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": "auto"}], ids=str
)
def test_the_integer_form_alone_is_saved_and_loaded(arguments, lm, previous, expected, tmp_path):
    alone = copy.deepcopy(lm).drop_float_form()
    assert torch.equal(alone.frequencies(previous)[0], expected)
    assert alone.device == torch.device("cpu") and alone.dtype.is_floating_point
    alone.save_pretrained(tmp_path)
    again, info = EncodecLM.from_pretrained(tmp_path, output_loading_info=True, **arguments)
    assert not any(info.values()) and not again.config.has_float_form and again.config.has_integer_form
    assert not list(again.parameters()) and not hasattr(again, "embeddings")
    assert torch.equal(again.frequencies(previous)[0], expected)
    assert set(load_file(tmp_path / "model.safetensors")) == set(lm.state_dict()) - {
        name for name, _ in lm.named_parameters()
    }
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(EncodecLM.from_pretrained(tmp_path / "again").frequencies(previous)[0], expected)


def test_the_integer_form_is_a_quarter_of_the_size():
    lm = EncodecLM(EncodecLMConfig(num_hidden_layers=2, num_codebooks=4, has_integer_form=True))
    floats = sum(parameter.numel() * 4 for parameter in lm.parameters())
    integers = sum(buffer.numel() * buffer.element_size() for buffer in lm.buffers())
    positions = lm.config.max_positions * lm.config.hidden_size * 2  # which the float form computes
    assert 0.24 < (integers - positions) / floats < 0.27


def test_a_form_that_is_not_there_is_refused_in_one_line(lm, previous):
    alone, plain, codes = copy.deepcopy(lm).drop_float_form(), make_lm(), previous.clamp(min=0)
    for call in (lambda: alone(codes), lambda: alone.predict(codes), lambda: alone.quantize(codes)):
        with pytest.raises(ValueError, match="integer form alone, allowed: ") as caught:
            call()
        one_line(caught)
    for call in (lambda: plain.frequencies(codes), lambda: plain.drop_float_form()):
        with pytest.raises(ValueError, match=r"allowed: .*lm\.quantize\(codes\)") as caught:
            call()
        one_line(caught)
    for wrong, message in ((codes + 1, "previous range from 1 to 16, allowed: -1 to 15"), (codes[0], "previous have")):
        with pytest.raises(ValueError, match=message) as caught:
            lm.frequencies(wrong)
        one_line(caught)


# ---- caches are values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [1, 3, 5, 6, 12, 30])
def test_two_continuations_of_one_cache_do_not_meet(begin, lm):
    """In turns and one after the other, long enough for either to be copied."""
    start = shifted(make_codes(lm, frames=begin, seed=7))
    _, cache = lm.frequencies(start)
    first, second = make_codes(lm, frames=60, seed=8), make_codes(lm, frames=60, seed=9)
    expected = [lm.frequencies(torch.cat([start, tail], dim=2))[0][:, :, begin:] for tail in (first, second)]
    assert not torch.equal(expected[0], expected[1])
    for sizes in (1, 7, 60):
        assert torch.equal(in_parts(lm, first, sizes, cache), expected[0])
        assert torch.equal(in_parts(lm, second, sizes, cache), expected[1])
        assert torch.equal(in_parts(lm, first, sizes, cache), expected[0])
    caches, parts = [cache, cache], [[], []]
    for frame in range(60):
        for way, tail in enumerate((first, second) if frame % 2 else (second, first)):
            way = way if frame % 2 else 1 - way
            frequencies, caches[way] = lm.frequencies(tail[:, :, frame : frame + 1], caches[way])
            parts[way].append(frequencies)
    assert all(torch.equal(torch.cat(part, dim=2), whole) for part, whole in zip(parts, expected))


def test_every_cache_on_the_way_can_be_continued_later(lm, previous, expected):
    caches, cache = [], None
    for frame in previous.split(1, dim=2):
        caches.append(cache)
        _, cache = lm.frequencies(frame, cache)
    for order in (range(74, -1, -9), range(0, 75, 7), (10, 70, 11, 69, 10)):
        for frame in order:
            rest = in_parts(lm, previous[:, :, frame:], [1, 74 - frame] if frame < 74 else 1, caches[frame])
            assert torch.equal(rest, expected[:, :, frame:])


def test_branches_of_branches(lm):
    """A tree: two tails at each of five places, each known to a cache, visited in no order."""
    generator = torch.Generator().manual_seed(0)
    tree = [(torch.empty(1, 4, 0, dtype=torch.long), None)]
    for step in range(60):
        codes, cache = tree[torch.randint(len(tree), (), generator=generator)]
        frames = int(torch.randint(1, 9, (), generator=generator))
        tail = torch.randint(16, (1, 4, frames), generator=generator)
        frequencies, after = lm.frequencies(tail, cache)
        codes = torch.cat([codes, tail], dim=2)
        assert torch.equal(frequencies, lm.frequencies(codes)[0][:, :, -frames:]), step
        tree.append((codes, after))


@pytest.mark.parametrize(("rows", "others"), [(1, 8), (8, 1), (2, 3)])
@pytest.mark.parametrize("frames", [1, 40])
def test_a_cache_of_other_rows_is_refused_in_one_line(rows, others, frames, lm, previous):
    _, cache = lm.frequencies(previous[:rows, :, :frames])
    with pytest.raises(ValueError, match="cache.*allowed: ") as caught:
        lm.frequencies(previous[:others, :, :1], cache)
    one_line(caught)


def test_a_cache_of_the_float_form_is_refused_in_one_line(lm, previous):
    cache = lm(previous.clamp(min=0)).cache
    with pytest.raises(ValueError, match="cache.*allowed: ") as caught:
        lm.frequencies(previous, cache)
    one_line(caught)


def test_the_memory_of_a_cache_stays_small(lm):
    cache = None
    for frame in make_codes(lm, batch=1, frames=200).split(1, dim=2):
        _, cache = lm.frequencies(frame, cache)
    held = [memory.pairs for memory in cache.memories]
    assert held and all(max(tensor.shape) <= 16 for tensor in held)  # 2 * 5 frames and a few
