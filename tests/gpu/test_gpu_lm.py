"""The language model on a GPU: the float form within rounding, the integer form to the bit."""

import copy

import pytest
import torch
from devices import assert_near, assert_on
from lm_models import in_parts, make_codes, make_integer_lm, make_lm, shifted


pytestmark = pytest.mark.usefixtures("device")
BOTH = pytest.mark.parametrize("where", ["cuda", "cpu"])


@pytest.fixture
def lm():
    return make_lm()


@pytest.fixture
def codes(lm):
    return make_codes(lm, batch=3, frames=30)


@torch.no_grad()
@BOTH
def test_forward_and_its_cache(lm, codes, where):
    there, given = copy.deepcopy(lm).to("cuda"), codes.to(where)
    ours, theirs = there(given, labels=given), lm(codes, labels=codes)
    assert_on("cuda:0", ours.logits, ours.loss)
    assert_near(ours.logits, theirs.logits)
    assert_near(ours.loss, theirs.loss)
    first = there(given[:, :, :17])
    second = there(given[:, :, 17:], cache=first.cache)
    assert_near(torch.cat([first.logits, second.logits], 2), theirs.logits)


@torch.no_grad()
@BOTH
def test_step_by_step(lm, codes, where):
    there, cache, rows = copy.deepcopy(lm).to("cuda"), None, []
    for step in shifted(codes).to(where).split(1, dim=2):
        logits, cache = there.predict(step, cache)
        rows.append(logits)
    assert_near(torch.cat(rows, 2), lm(codes).logits)


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
@BOTH
def test_gradients(lm, codes, where, checkpointing):
    found = []
    for one, given in ((lm, codes), (copy.deepcopy(lm).to("cuda"), codes.to(where))):
        one.train()
        if checkpointing:
            one.activation_checkpointing_enable()
        one(given, given, position_offset=torch.tensor([1, 2, 3]), return_logits=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in one.named_parameters()})
    for name, gradient in found[0].items():
        assert_near(found[1][name], gradient, 1e-3)


def test_autocast_learns(lm, codes):
    there = lm.to("cuda").train()
    with torch.autocast("cuda", torch.bfloat16):
        loss = there(codes.to("cuda"), codes.to("cuda"), return_logits=False).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in there.parameters())


@pytest.fixture(params=["as it is", "in the integer form alone", "quantised there"])
def integer_lm(request):
    lm = make_integer_lm()
    there = copy.deepcopy(lm)
    if request.param == "in the integer form alone":
        there.drop_float_form()
    if request.param == "quantised there":
        there = make_lm().to("cuda").quantize(make_codes(lm, frames=40, seed=100))
        # Its tables are made of floats, which the last bit of a sum may change.
        lm = copy.deepcopy(there).to("cpu")
    return lm, there.to("cuda")


@BOTH
def test_frequencies_to_the_bit(integer_lm, codes, where):
    lm, there = integer_lm
    previous = shifted(codes)
    whole, _ = lm.frequencies(previous)
    given = previous.to(where)
    assert_on("cuda:0", there.frequencies(given)[0])
    assert torch.equal(there.frequencies(given)[0].cpu(), whole)
    assert torch.equal(in_parts(there, given, [1] * 7 + [23]).cpu(), whole)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_frequencies_whatever_the_process_allows(integer_lm, codes, precision):
    lm, there = integer_lm
    whole, _ = lm.frequencies(shifted(codes))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.inference_mode(), torch.autocast("cuda", torch.float16):
            assert torch.equal(there.frequencies(shifted(codes).to("cuda"))[0].cpu(), whole)
    finally:
        torch.set_float32_matmul_precision(before)


def test_frequencies_on_the_second_device(second_device, codes):
    lm = make_integer_lm()
    there = copy.deepcopy(lm).to("cuda:1")
    ours = there.frequencies(shifted(codes))[0]
    assert_on("cuda:1", ours)
    assert torch.equal(ours.cpu(), lm.frequencies(shifted(codes))[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_of_a_model_in_half_precision(codes, dtype):
    lm = make_integer_lm()
    there = copy.deepcopy(lm).to("cuda", dtype)
    assert torch.equal(there.frequencies(shifted(codes))[0].cpu(), lm.frequencies(shifted(codes))[0])
    with torch.no_grad():
        there.predict(shifted(codes).to("cuda"))
