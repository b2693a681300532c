"""EncodecLM in whole numbers: equal however it is run, saved, copied or continued."""

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
from integer_by_hand import adversarial_tables, norm_program
from lm_models import TOTAL, in_parts, make_codes, make_integer_lm, make_lm, one_line, shifted
from safetensors.torch import load_file

from modeling_encodec.models import integer_lm_encodec
from modeling_encodec.models.configuration_encodec import EncodecLMConfig
from modeling_encodec.models.modeling_lm_encodec import EncodecLM


@pytest.fixture(scope="module")
def lm() -> EncodecLM:
    return make_integer_lm()


def digest(frequencies: torch.Tensor) -> str:
    return hashlib.sha256(frequencies.numpy().tobytes()).hexdigest()


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

    init = integer_lm_encodec._Place.__init__

    def on_tensors(self, device):
        init(self, device)
        self.on_cpu, self.xp, self.float64 = False, torch, torch.float64

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
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
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
