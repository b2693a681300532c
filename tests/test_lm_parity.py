"""The language model against the `encodec` package's `LMModel` of the same weights, and the way between the two."""

import pytest
import torch
from lm_models import make_codes, shifted
from peers import RELEASED_LM, SMALL_LM, lm_pair

from modeling_encodec.conversion.key_mapping import lm_config_from_original, lm_from_original, lm_to_original
from modeling_encodec.models.configuration_encodec import EncodecLMConfig


@pytest.fixture(scope="module")
def small():
    return lm_pair(*SMALL_LM)


@pytest.fixture(scope="module")
def released():
    return lm_pair(*RELEASED_LM)


def assert_same(original, lm, codes):
    """Of all frames at once: probabilities within 1e-6 of the original's."""
    theirs = original(1 + shifted(codes))[0].permute(0, 2, 3, 1)  # (B, K, F, codebook size)
    assert theirs.max() > 20 / lm.config.codebook_size  # far from even, or nothing would be seen
    torch.testing.assert_close(lm(codes).logits.softmax(-1), theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(lm.predict(shifted(codes))[0].softmax(-1), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("codebooks", [1, 3, 4])
@torch.no_grad()
def test_all_frames_at_once_small(small, codebooks):
    original, lm = small
    assert_same(original, lm, make_codes(lm, 2, 70, codebooks))


@pytest.mark.parametrize("codebooks", [2, 32])
@torch.no_grad()
def test_all_frames_at_once_of_the_released_size(released, codebooks):
    original, lm = released
    assert_same(original, lm, make_codes(lm, 1, 290, codebooks))


@pytest.mark.parametrize(("codebooks", "frames"), [(1, 50), (3, 50), (4, 50)])
@torch.no_grad()
def test_step_by_step_small(small, codebooks, frames):
    check_steps(*small, codebooks, frames)


@torch.no_grad()
def test_step_by_step_of_the_released_size(released):
    check_steps(*released, 8, 275)


def check_steps(original, lm, codebooks, frames):
    previous = shifted(make_codes(lm, 1, frames, codebooks))
    states, offset, cache = None, 0, None
    for frame in previous.split(1, dim=2):
        theirs, states, offset = original(1 + frame, states, offset)
        ours, cache = lm.predict(frame, cache)
        torch.testing.assert_close(ours.softmax(-1), theirs.permute(0, 2, 3, 1), rtol=0, atol=1e-6)


# ---- names


def test_mapping_there_and_back(small):
    original, lm = small
    state = original.state_dict()
    back = lm_to_original(lm_from_original(state), lm.config)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    assert len({tensor.untyped_storage().data_ptr() for tensor in back.values()}) == len(back)  # none shares memory
    again = lm_from_original(lm_to_original(lm.state_dict(), lm.config))
    assert again.keys() == lm.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in lm.state_dict().items())


def test_the_integer_form_stays_here(small):
    _, lm = small
    state = lm.state_dict() | {"integer.head": torch.zeros(3)}
    assert lm_to_original(state, lm.config).keys() == lm_to_original(lm.state_dict(), lm.config).keys()


def test_configuration_of_the_released_models(released):
    config = lm_config_from_original(released[0].state_dict(), 75)
    assert config.to_diff_dict() == EncodecLMConfig().to_diff_dict() and config.context_frames == 262
    assert lm_config_from_original(released[0].state_dict(), 150).context_frames == 525
    assert sum(tensor.numel() for tensor in released[1].state_dict().values()) == 15_559_768  # the released one's


def test_weights_of_another_model_are_refused(small):
    original, lm = small
    state = original.state_dict()
    cases = [
        ({}, r"missing: emb.0.weight; .* and \d+ more"),
        ({name: tensor for name, tensor in state.items() if name != "emb.2.weight"}, "missing: emb.2.weight$"),
        ({name: tensor for name, tensor in state.items() if name != "emb.0.weight"}, "missing: emb.0.weight$"),
        (
            {name: tensor for name, tensor in state.items() if "layers.1.norm2" not in name},
            "missing: transformer.layers.1.norm2.bias; transformer.layers.1.norm2.weight$",
        ),
        (state | {"extra": torch.zeros(1)}, "unexpected: extra$"),
        (state | {"emb.999999999.weight": torch.zeros(1)}, "missing: .* unexpected: emb.999999999.weight"),
        (
            state | {"emb.1.weight": torch.zeros(61, 32)},
            r"another shape: emb.1.weight \(61, 32\), allowed: \(62, 32\)",
        ),
        (state | {"linears.0.bias": torch.zeros(())}, "linears.0.bias"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=f"language model weights are .*{message}"):
            lm_from_original(wrong)
    ours = lm.state_dict()
    for wrong, message in [
        ({name: tensor for name, tensor in ours.items() if name != "head.bias"}, "missing: head.bias$"),
        (ours | {"layers.2.o_proj.bias": torch.zeros(32)}, "unexpected: layers.2.o_proj.bias$"),
        (ours | {"head.bias": torch.zeros(3)}, r"head.bias \(3,\), allowed: \(244,\)"),
    ]:
        with pytest.raises(ValueError, match=f"language model weights are .*{message}"):
            lm_to_original(wrong, lm.config)


def test_a_model_without_the_zero_key_has_no_original():
    with pytest.raises(ValueError, match="zero_past_key is False, allowed: True"):
        lm_to_original({}, EncodecLMConfig(zero_past_key=False))
