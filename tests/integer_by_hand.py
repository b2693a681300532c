"""The language model's integer form evaluated without floats, and tables to try it on."""

import math

import numpy as np
import torch
from lm_models import TOTAL, make_lm

from modeling_encodec.models import integer_lm_encodec
from modeling_encodec.models.integer_lm_encodec import FORM, IntegerLM
from modeling_encodec.models.modeling_lm_encodec import EncodecLM


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


def adversarial_tables(seed: int, **overrides) -> EncodecLM:
    """Tables drawn from all that calibration may put out, with no thought for what they mean.

    Most channels are such that something comes through; some are at the ends of what is allowed.
    """
    generator = np.random.default_rng(seed)
    lm = make_lm(**overrides)
    lm.integer = tables = IntegerLM(lm.config)
    tables.form.fill_(FORM)
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


def norm_program(norm):
    program = integer_lm_encodec._Norm(norm, integer_lm_encodec._Place(torch.device("cpu")))
    return lambda rows: torch.from_numpy(program(rows.numpy().copy()))
