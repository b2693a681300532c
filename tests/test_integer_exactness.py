"""EncodecLM in whole numbers: equal to an evaluation without floats."""

import math

import numpy as np
import pytest
import torch
from integer_by_hand import ByHand, adversarial_tables, norm_program
from lm_models import TOTAL, in_parts, make_codes, make_integer_lm, make_lm, shifted

from modeling_encodec.models import integer_lm_encodec


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
