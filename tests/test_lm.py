"""EncodecLM in floats: configuration, whole and in steps, reach, positions, bits, wrong input."""

import copy
import math

import numpy as np
import pytest
import torch
from lm_models import SMALL, make_codes, make_lm, one_line, shifted

from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.models.modeling_lm_encodec import EncodecLM


# ---- configuration -----------------------------------------------------------------------------------------------


def test_defaults_are_the_released_language_model():
    config = EncodecLMConfig()
    assert (config.context_frames, config.codebook_size, config.num_codebooks) == (262, 1024, 32)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (200, 5, 8)
    assert config.zero_past_key and config.has_float_form and not config.has_integer_form


def test_a_codec_sets_what_depends_on_it():
    config = EncodecLMConfig.for_codec(EncodecConfig.preset_48khz(), hidden_size=48)
    assert (config.codebook_size, config.num_codebooks, config.frame_rate, config.hidden_size) == (1024, 16, 150, 48)
    assert not config.zero_past_key and config.context_frames == 525


def test_a_saved_config_is_read_unchanged(tmp_path):
    config = EncodecLMConfig(**SMALL, zero_past_key=False, codec_fingerprint="0123abcd")
    config.save_pretrained(tmp_path)
    again = EncodecLMConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() and again.codec_fingerprint == "0123abcd"


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_codebooks", 0, "at least 1"),
        ("num_hidden_layers", 0, "at least 1"),
        ("num_attention_heads", 0, "at least 1"),
        ("num_attention_heads", -8, "at least 1"),
        ("intermediate_size", 0, "at least 1"),
        ("frame_rate", 0, "at least 1"),
        ("max_positions", 0, "at least 1"),
        ("codebook_size", 1, "2 to 65536"),
        ("codebook_size", 65537, "2 to 65536"),
        ("codebook_size", -1, "2 to 65536"),
        ("hidden_size", 0, r"num_attention_heads \(8\), at least 4"),
        ("hidden_size", -200, "at least 4"),
        ("hidden_size", 204, r"num_attention_heads \(8\)"),
        ("hidden_size", 201, "even"),
        ("context_seconds", 0.013, "one frame"),
        ("context_seconds", 0, "one frame"),
        ("context_seconds", -3.5, "one frame"),
        ("context_seconds", float("nan"), "one frame"),
        ("context_seconds", float("inf"), "at most 13981 s"),
        ("has_float_form", False, "has_integer_form"),
    ],
)
def test_refuses_what_cannot_work_with_the_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=allowed) as caught:
        EncodecLMConfig(**{field: value})
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{field} is {value!r}, allowed: ")


@pytest.mark.parametrize(("hidden", "heads"), [(2, 1), (5, 1), (9, 3), (21, 7)])
def test_an_odd_or_tiny_width_is_refused(hidden, heads):
    with pytest.raises(ValueError, match=f"hidden_size is {hidden}, allowed: an even multiple"):
        EncodecLMConfig(hidden_size=hidden, num_attention_heads=heads)


def test_wrong_types_are_refused():
    for field, value in {"num_codebooks": 2.5, "zero_past_key": "yes", "context_seconds": "3"}.items():
        with pytest.raises(Exception, match=field):
            EncodecLMConfig(**{field: value})


@pytest.mark.parametrize(
    "extreme",
    [
        {"codebook_size": 2},
        {"codebook_size": 65536, "num_codebooks": 1},
        {"num_codebooks": 1},
        {"hidden_size": 4, "num_attention_heads": 4},
        {"hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 1},
        {"context_seconds": 0.1},
        {"max_positions": 1},
    ],
    ids=str,
)
@torch.no_grad()
def test_extreme_configurations_work(extreme):
    lm = make_lm(**extreme)
    codes = make_codes(lm, frames=9)
    assert lm.config.context_frames == (1 if "context_seconds" in extreme else 5)
    output = lm(codes, codes)
    torch.testing.assert_close(output.logits, by_hand(lm, shifted(codes)), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(output.loss)
    assert lm.train()(codes).logits.shape == (*codes.shape, lm.config.codebook_size)


# ---- the architecture, by hand -----------------------------------------------------------------------------------


def by_hand(lm: EncodecLM, previous: torch.Tensor, offsets=0) -> torch.Tensor:
    """Logits frame by frame, with no cache and no mask: each layer looks at the frames it may see and no others."""
    config, state = lm.config, {name: tensor.double() for name, tensor in lm.state_dict().items()}
    width, heads, reach = config.hidden_size, config.num_attention_heads, config.context_frames
    offsets = [offsets] * len(previous) if isinstance(offsets, int) else offsets

    def linear(name, x):
        return state[f"{name}.weight"] @ x + state[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def position(number):
        half = width // 2
        phases = [(number % config.max_positions) / 10000 ** (n / (half - 1)) for n in range(half)]
        return torch.tensor([math.cos(p) for p in phases] + [math.sin(p) for p in phases]).double()

    tables = state["embeddings.weight"].view(config.num_codebooks, config.codebook_size + 1, width)
    rows = []
    for row, offset in zip(previous.tolist(), offsets):
        hidden = []
        for frame in range(previous.shape[2]):
            embedded = sum(tables[book, codes[frame] + 1] for book, codes in enumerate(row))
            hidden.append(norm("input_norm", embedded) + position(offset + frame))
        for number in range(config.num_hidden_layers):
            place = f"layers.{number}"
            qkv = [linear(f"{place}.qkv_proj", x) for x in hidden]
            if config.zero_past_key:
                qkv.insert(0, linear(f"{place}.qkv_proj", torch.zeros(width).double()))
            zeros, out = int(config.zero_past_key), []
            for frame, x in enumerate(hidden):
                now = frame + zeros
                query, share = qkv[now][:width].view(heads, -1), width // heads
                keys = torch.stack(
                    [qkv[n][width : 2 * width].view(heads, -1) for n in range(max(0, now - reach), now + 1)]
                )
                values = torch.stack(
                    [qkv[n][2 * width :].view(heads, -1) for n in range(max(0, now - reach), now + 1)]
                )
                weights = (torch.einsum("hd,shd->sh", query, keys) / math.sqrt(share)).softmax(0)
                attended = torch.einsum("sh,shd->hd", weights, values).flatten()
                x = norm(f"{place}.attention_norm", x + linear(f"{place}.o_proj", attended))
                inside = linear(f"{place}.up_proj", x)
                inside = 0.5 * inside * (1 + torch.erf(inside / math.sqrt(2)))
                out.append(norm(f"{place}.output_norm", x + linear(f"{place}.down_proj", inside)))
            hidden = out
        logits = torch.stack([linear("head", x).view(config.num_codebooks, -1) for x in hidden], dim=1)
        rows.append(logits[: previous.shape[1]])
    return torch.stack(rows).float()


@pytest.mark.parametrize("books", [4, 3, 1])
@pytest.mark.parametrize("zero_past_key", [True, False])
@torch.no_grad()
def test_logits_are_those_computed_by_hand(zero_past_key, books):
    lm = make_lm(zero_past_key=zero_past_key)
    codes = make_codes(lm, books=books)
    expected = by_hand(lm, shifted(codes))
    torch.testing.assert_close(lm(codes).logits, expected, rtol=0, atol=1e-4)
    lm.config.zero_past_key = not zero_past_key
    difference = (lm(codes).logits - expected).abs().amax((0, 1, 3))
    assert difference[:5].min() > 1e-2  # the zero key is in reach of the first frames


@torch.no_grad()
def test_fewer_codebooks_use_the_first_tables():
    lm, fewer = make_lm(), make_lm(seed=5, num_codebooks=2)
    state = lm.state_dict()
    state["embeddings.weight"] = state["embeddings.weight"][: 2 * 17]
    state["head.weight"], state["head.bias"] = state["head.weight"][: 2 * 16], state["head.bias"][: 2 * 16]
    fewer.load_state_dict(state)
    codes = make_codes(lm)
    torch.testing.assert_close(lm(codes[:, :2]).logits, fewer(codes[:, :2]).logits, rtol=0, atol=1e-5)
    assert (lm(codes).logits[:, :2] - fewer(codes[:, :2]).logits).abs().max() > 0.1


# ---- whole, in steps, in halves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_past_key", [True, False])
@pytest.mark.parametrize("context", [0.1, 0.5, 9.0])
@torch.no_grad()
def test_whole_is_step_by_step_is_in_parts(context, zero_past_key):
    lm = make_lm(context_seconds=context, zero_past_key=zero_past_key, max_positions=16)
    codes = make_codes(lm, frames=29)
    whole = lm(codes).logits
    cache, steps, previous = None, [], shifted(codes)
    for frame in range(29):
        logits, cache = lm.predict(previous[:, :, frame : frame + 1], cache)
        steps.append(logits)
        assert cache.keys[0].shape[2] <= lm.config.context_frames and (cache.position == frame + 1).all()
    torch.testing.assert_close(torch.cat(steps, dim=2), whole, rtol=0, atol=2e-5)
    for sizes in ([14, 15], [1, 28], [28, 1], [4, 1, 6, 7, 11]):
        cache, parts = None, []
        for part in codes.split(sizes, dim=2):
            output = lm(part, cache=cache)
            cache = output.cache
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_cache_is_a_value():
    lm = make_lm()
    codes, others = make_codes(lm), make_codes(lm, seed=2)
    cache = lm(codes[:, :, :8]).cache
    before = copy.deepcopy(cache)
    first = lm(codes[:, :, 8:], cache=cache).logits
    assert not torch.equal(lm(others[:, :, 8:], cache=cache).logits, first)
    assert torch.equal(lm(codes[:, :, 8:], cache=cache).logits, first)
    _, stepped = lm.predict(codes[:, :, 7:8], cache)
    assert stepped is not cache
    assert all(torch.equal(a, b) for a, b in zip(cache.keys + cache.values, before.keys + before.values))
    assert torch.equal(cache.position, before.position) and torch.equal(cache.last_codes, before.last_codes)


@torch.no_grad()
def test_no_frame_knows_itself_or_what_follows():
    lm = make_lm()
    codes = make_codes(lm)
    logits = lm(codes).logits
    for frame in (0, 1, 6, 21, 22):
        changed = codes.clone()
        changed[:, :, frame] = (changed[:, :, frame] + 3) % 16
        difference = (lm(changed).logits - logits).abs().amax((0, 1, 3))
        assert (difference[: frame + 1] == 0).all()
        assert (difference[frame + 1 : frame + 6] > 1e-3).all()


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("context", [1, 5])
@torch.no_grad()
def test_each_layer_reaches_exactly_the_context(context, layers):
    lm = make_lm(num_hidden_layers=layers, context_seconds=context / 10)
    codes = make_codes(lm, frames=28)
    logits, _ = lm.predict(codes)
    changed = codes.clone()
    changed[:, :, 6] = (changed[:, :, 6] + 3) % 16
    difference = (lm.predict(changed)[0] - logits).abs().amax((0, 1, 3))
    assert (difference > 0).nonzero().flatten().tolist() == list(range(6, 6 + context * layers + 1))


@torch.no_grad()
def test_rows_of_a_batch_do_not_meet():
    lm = make_lm()
    codes = make_codes(lm, batch=5)
    alone = torch.cat([lm(row[None]).logits for row in codes])
    torch.testing.assert_close(lm(codes).logits, alone, rtol=0, atol=1e-5)


# ---- positions ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_given_offset_shifts_the_positions():
    lm = make_lm()
    codes = make_codes(lm, frames=12)
    for mode in (True, False):
        lm.train(mode)
        for offset in (0, 7, 60, 64 + 7):  # 60 runs over the last position
            expected = by_hand(lm, shifted(codes), offset)
            torch.testing.assert_close(lm(codes, position_offset=offset).logits, expected, rtol=0, atol=1e-4)
        rows = torch.tensor([3, 40])
        expected = by_hand(lm, shifted(codes), [3, 40])
        torch.testing.assert_close(lm(codes, position_offset=rows).logits, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(lm(codes, position_offset=7).logits, lm(codes).logits, atol=1e-2)


@torch.no_grad()
def test_offsets_are_random_for_each_row_in_training_alone():
    lm = make_lm()
    codes = make_codes(lm, batch=1, frames=12).expand(400, -1, -1)
    assert torch.equal(lm(codes).cache.position, torch.full((400, 1), 12))
    lm.train()
    torch.manual_seed(3)
    output = lm(codes)
    offsets = output.cache.position[:, 0] - 12
    assert set(offsets.tolist()) == set(range(64 - 12))  # no row runs over the last position
    torch.manual_seed(3)
    assert torch.equal(lm(codes).logits, output.logits)
    assert not torch.equal(lm(codes).logits, output.logits)
    given = lm(codes[:5], position_offset=offsets[:5])
    torch.testing.assert_close(given.logits, output.logits[:5], rtol=0, atol=1e-5)
    # What is longer than the positions begins at the first.
    assert (lm(make_codes(lm, frames=80)).cache.position == 80).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_positions_are_computed_in_float32(dtype):
    lm = make_lm(max_positions=2048)
    expected = lm.position_table()
    try:
        torch.set_default_dtype(dtype)
        table = lm.position_table()
    finally:
        torch.set_default_dtype(torch.float32)
    assert table.dtype == torch.float32 and (table - expected).abs().max() < 1e-3


# ---- bits --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_loss_is_the_bits_of_the_labels():
    lm = make_lm()
    codes = make_codes(lm)
    labels = make_codes(lm, seed=9)
    labels[0, :, 15:] = -100
    labels[1, 2, :4] = -100
    output = lm(codes, labels)
    logits = output.logits.double().numpy()
    bits = (np.log(np.exp(logits).sum(-1, keepdims=True)) - logits) / np.log(2)
    counted = labels.numpy() != -100
    bits = np.take_along_axis(bits, labels.clamp(min=0).numpy()[..., None], axis=-1)[..., 0] * counted
    np.testing.assert_allclose(output.loss.item(), bits.sum() / counted.sum(), rtol=1e-5)
    np.testing.assert_allclose(output.codebook_bits.numpy(), bits.sum((0, 2)) / counted.sum((0, 2)), rtol=1e-5)


def test_loss_without_logits_is_the_same():
    lm = make_lm()
    codes = make_codes(lm)
    with_logits, without = lm(codes, codes), lm(codes, codes, return_logits=False)
    assert without.logits is None and with_logits.logits is not None
    torch.testing.assert_close(without.loss, with_logits.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(without.codebook_bits, with_logits.codebook_bits, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(output.loss, list(lm.parameters())) for output in (with_logits, without)]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert a.abs().max() > 0
    assert lm(codes).loss is None and lm(codes).codebook_bits is None


def test_training_lowers_the_bits():
    lm = make_lm().train()
    codes = (torch.arange(40)[None, None] + torch.arange(4)[None, :, None]).expand(8, -1, -1) % 16
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = lm(codes, codes, return_logits=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4 and losses[-1] < 1.5


def test_trains_under_autocast():
    lm = make_lm().train()
    codes = make_codes(lm)
    expected = lm(codes, codes, position_offset=0).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = lm(codes, codes, position_offset=0).loss
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss.item() - expected.item()) < 0.05
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in lm.parameters())


def test_gradient_checkpointing_changes_nothing_but_memory():
    plain, saving = make_lm().train(), make_lm().train()
    saving.activation_checkpointing_enable()
    assert saving.is_activation_checkpointing
    codes, calls = make_codes(plain), []
    for lm in (plain, saving):
        for layer in lm.layers:
            layer.up_proj.register_forward_hook(lambda module, inputs, output, lm=lm: calls.append(lm))
        torch.manual_seed(0)
        loss = lm(codes, codes).loss
        loss.backward()
        calls.append(loss.item())
    losses = [call for call in calls if isinstance(call, float)]
    assert losses[0] == losses[1]
    assert (calls.count(plain), calls.count(saving)) == (2, 4)  # layers run again in the backward pass
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        assert torch.equal(a.grad, b.grad), name
    saving.activation_checkpointing_disable()
    assert not saving.is_activation_checkpointing


# ---- wrong input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 4, 3), "codes are torch.float32"),
        (torch.zeros(1, 4, 3, dtype=torch.bool), "codes are torch.bool"),
        ([[[1.0, 2.0]]], "codes are torch.float64"),
        (np.zeros((1, 4, 3)), "codes are torch.float64"),
        ("codes", "codes are a str"),
        (torch.zeros(4, 3, dtype=torch.long), r"codes have shape \(4, 3\)"),
        (torch.zeros(1, 5, 3, dtype=torch.long), r"codes have shape \(1, 5, 3\).*at most 4 codebooks"),
        (torch.zeros(0, 4, 3, dtype=torch.long), r"codes have shape \(0, 4, 3\)"),
        (torch.zeros(1, 0, 3, dtype=torch.long), r"codes have shape \(1, 0, 3\)"),
        (torch.zeros(1, 4, 0, dtype=torch.long), r"codes have shape \(1, 4, 0\)"),
        (torch.full((1, 4, 3), 16), "codes range from 16 to 16, allowed: 0 to 15"),
        (torch.full((1, 4, 3), -1), "codes range from -1 to -1, allowed: 0 to 15"),
    ],
)
def test_codes_of_another_kind_are_refused_in_one_line(codes, message):
    lm = make_lm()
    with pytest.raises(ValueError, match=message) as caught:
        lm(codes)
    one_line(caught)
    if "-1" not in message:
        with pytest.raises(ValueError, match=message.replace("codes", "previous", 1).replace("0 to 15", "-1 to 15")):
            lm.predict(codes)
    with pytest.raises(ValueError, match=message):
        lm.quantize(codes if not isinstance(codes, list) else [codes])


def test_labels_of_another_kind_are_refused_in_one_line():
    lm = make_lm()
    codes = make_codes(lm)
    for labels, message in (
        (codes.float(), "labels are torch.float32"),
        (codes[:, :2], r"labels have shape \(2, 2, 23\)"),
        (codes[:, :, 1:], r"labels have shape \(2, 4, 22\)"),
        (codes + 1, "labels range from 1 to 16, allowed: -100 to 15"),
        (codes - 101, "labels range from -101 to"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            lm(codes, labels)
        one_line(caught)
    with pytest.raises(ValueError, match="previous range from -2 to 14, allowed: -1 to 15") as caught:
        lm.predict(codes - 2 * (codes == codes.min()).long() - (codes == 15).long())
    one_line(caught)


def test_any_whole_numbers_will_do():
    lm = make_lm()
    codes = make_codes(lm)
    for dtype in (torch.int32, torch.uint8, torch.int16):
        assert torch.equal(lm(codes.to(dtype), codes.to(dtype)).loss, lm(codes, codes).loss)


@pytest.mark.parametrize("kind", ["of predict", "of integers", "of other rows", "of other codebooks"])
@torch.no_grad()
def test_a_cache_of_another_kind_is_refused_in_one_line(kind):
    lm = make_lm()
    codes = make_codes(lm)
    if kind == "of predict":
        cache = lm.predict(codes)[1]  # does not tell the last frame, which forward needs
    elif kind == "of integers":
        cache = lm.quantize(codes).frequencies(codes)[1]
    elif kind == "of other rows":
        cache = lm(codes[:1]).cache
    else:
        cache = lm(codes[:, :2]).cache
    with pytest.raises(ValueError, match="cache") as caught:
        lm(codes, cache=cache)
    one_line(caught)
