"""EncodecLM in whole numbers: what calibration promises of its tables, for all weights, and what they cost."""

import copy
import math

import pytest
import torch
from integer_by_hand import ByHand, adversarial_tables
from lm_models import TOTAL, in_parts, make_codes, make_lm, one_line, shifted

from modeling_encodec.models.integer_lm_encodec import IntegerLM


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
