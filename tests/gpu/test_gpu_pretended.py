"""The pretended device refuses what a GPU refuses, waits where one waits, and leaves nothing behind."""

import copy
import threading

import pytest
import torch
from devices import REAL, full_float32, gpu_or_pretended
from in_a_fork import in_a_fork


pytestmark = pytest.mark.skipif(REAL, reason="there is a real GPU")


@pytest.fixture
def x(device):
    return torch.arange(12.0).reshape(3, 4).to("cuda")


@pytest.mark.parametrize(
    ("call", "reason"),
    {
        "cpu": (lambda x: x + torch.ones(4), "cuda:0 and cpu"),
        "cpu product": (lambda x: x @ torch.ones(4, 2), "cuda:0 and cpu"),
        "cpu number in a list": (lambda x: torch.cat([x, torch.ones(1, 4)]), "cuda:0 and cpu"),
        "into the cpu": (lambda x: torch.ones(3, 4).add_(x), "cuda:0 and cpu"),
        "other device": (lambda x: x + x.to("cuda:1"), "cuda:0 and cuda:1"),
        "cpu gather": (lambda x: x.gather(1, torch.zeros(3, 1, dtype=torch.int64)), "cuda:0 and cpu"),
        "integer product": (lambda x: x.long() @ x.long().T, "not implemented for torch.int64"),
        "generator": (lambda x: torch.rand(2, device="cuda", generator=torch.Generator()), "Expected a 'cuda' device"),
        "convolution": (lambda x: torch.conv1d(x[None], torch.ones(1, 3, 1)), "cuda:0 and cpu"),
        "third device": (lambda x: x.to("cuda:2"), "invalid device ordinal"),
        "numpy": (lambda x: x.numpy(), "can't convert cuda:0"),
    }.values(),
)
def test_refuses(x, call, reason):
    with pytest.raises((RuntimeError, TypeError), match=reason):
        call(x)


def test_takes_numbers_and_indices_from_the_cpu(x):
    assert (x * torch.tensor(2.0)).cpu().tolist() == (torch.arange(12.0).reshape(3, 4) * 2).tolist()
    assert x[torch.tensor([2, 0])].cpu()[:, 0].tolist() == [8.0, 0.0]


@pytest.mark.parametrize(
    ("call", "waits"),
    {
        "item": (lambda x: x.sum().item(), 1),
        "truth": (lambda x: bool((x > 3).all()), 1),
        "list": (lambda x: x.tolist(), 1),
        "to the cpu": (lambda x: x.cpu(), 1),
        "from the cpu": (lambda x: torch.ones(3).to("cuda"), 1),
        "made there": (lambda x: torch.zeros(3, device="cuda"), 0),
        "mask as index": (lambda x: x[x > 3], 1),
        "filled by a mask": (lambda x: x.__setitem__(x > 3, 0.0), 0),
        "index from the cpu": (lambda x: x[torch.tensor([0])], 1),
        "index": (lambda x: x[x[0, :2].long()], 0),
        "nonzero": (lambda x: x.nonzero(), 1),
        "arithmetic": (lambda x: (x * 2 + 1).softmax(1).sum(), 0),
        "pinned": (lambda x: x.copy_(torch.ones(3, 4).pin_memory(), non_blocking=True), 0),
        "not pinned": (lambda x: x.copy_(torch.ones(3, 4), non_blocking=True), 1),
        "synchronize": (lambda x: torch.cuda.synchronize(), 1),
    }.values(),
)
def test_waits(device, x, call, waits):
    device.counts.reset()
    call(x)
    assert device.counts.waits == waits, device.counts.syncs


def test_a_copy_that_nobody_waited_for_is_not_there(x):
    late = x.to("cpu", non_blocking=True)
    assert late.is_pinned() and (late == -77).all()
    event = torch.cuda.Event()
    event.record()
    assert not event.query()
    event.synchronize()
    assert late.tolist() == x.tolist()


def test_products_are_rounded_where_the_process_allows_it(device):
    x = 1 + torch.rand(3, 3)
    there, before = x.to("cuda"), torch.get_float32_matmul_precision()
    assert torch.equal((there @ there).cpu(), x @ x)
    try:
        torch.set_float32_matmul_precision("high")
        apart = ((there @ there).cpu() - x @ x).abs().max()
    finally:
        torch.set_float32_matmul_precision(before)
    assert 1e-5 < apart < 1e-2


def test_memory(device):
    device.counts.reset()
    before = device.counts.live
    held = torch.zeros(1000, device="cuda")
    view = held[:10]
    del held
    assert device.counts.live == before + 4000  # a view holds all of it
    assert torch.cuda.mem_get_info()[0] == device.memory - before - 4000
    del view
    assert device.counts.live == before and device.counts.peak == before + 4000


def test_gradients_and_optimisers_are_the_cpus(device):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3), torch.nn.GroupNorm(1, 4), torch.nn.ELU())
    there, x = copy.deepcopy(module).to("cuda"), torch.randn(2, 2, 9)
    for one, given in ((module, x), (there, x.to("cuda"))):
        optimizer = torch.optim.AdamW(one.parameters(), 0.1, fused=False)
        with full_float32():
            for _ in range(2):
                optimizer.zero_grad()
                one(given).square().mean().backward()
                optimizer.step()
    for name, parameter in module.state_dict().items():
        assert torch.allclose(there.state_dict()[name].cpu(), parameter, atol=1e-6), name


def record(make, *inputs):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = make(*inputs)
    return graph, out


def test_graph_computes_at_its_replay(x):
    total = torch.zeros(4, device="cuda")
    graph, out = record(lambda given: (total.add_(given.sum(0)), given * 2)[1], x)
    assert out.isnan().all().item() and total.tolist() == [0.0] * 4  # nothing was computed yet
    graph.replay()
    x.fill_(1.0)
    graph.replay()
    assert out.cpu().tolist() == [[2.0] * 4] * 3
    assert total.tolist() == [15.0, 18.0, 21.0, 24.0]


@pytest.mark.parametrize("call", [lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: torch.ones(2).to("cuda")])
def test_graph_refuses_to_wait(x, call):
    with pytest.raises(RuntimeError, match="while a graph is being captured"):
        record(call, x)


def test_graph_of_another_device(x):
    with pytest.raises(RuntimeError, match="captured on cuda:0, and work is on cuda:1"):
        record(lambda given: given + 1, x.to("cuda:1"))
    there = x.to("cuda:1")
    with torch.cuda.device(1):
        graph, out = record(lambda given: given + 1, there)
    graph.replay()
    assert out.cpu().tolist() == (x.cpu() + 1).tolist()


def test_graph_on_freed_memory(x):
    weights = [x.clone()]
    graph, _ = record(lambda given: given * weights[0], x)
    graph.replay()
    weights.clear()
    with pytest.raises(RuntimeError, match="freed"):
        graph.replay()


class TestLSTM:
    @pytest.fixture
    def lstm(self, device):
        torch.manual_seed(0)
        return torch.nn.LSTM(4, 4, 2).to("cuda")

    def test_one_call(self, device, lstm):
        with torch.no_grad():
            expected = copy.deepcopy(lstm).to("cpu")(torch.ones(5, 2, 4))[0]
            device.counts.reset()
            assert torch.allclose(lstm(torch.ones(5, 2, 4, device="cuda"))[0].cpu(), expected, atol=1e-6)
        assert device.counts.lstm_steps == 10 and not device.counts.notes

    def test_weights_in_pieces_are_noted(self, device, lstm):
        weights = [weight.detach().clone() for weight in lstm.parameters()]
        x, state = torch.ones(5, 2, 4, device="cuda"), torch.zeros(2, 2, 4, device="cuda")
        call = (x, (state, state), weights, True, 2, 0.0, False, False, False)
        first = torch.lstm(*call)[0]
        assert "not part of single contiguous chunk" in str(device.counts.notes)
        device.counts.reset()
        torch._cudnn_rnn_flatten_weight(weights, 4, 4, 2, 4, 0, 2, False, False)
        assert torch.equal(torch.lstm(*call)[0].cpu(), first.cpu()) and not device.counts.notes

    def test_states_must_be_contiguous(self, device, lstm):
        state = torch.zeros(2, 4, 2, device="cuda").transpose(1, 2)
        with pytest.raises(RuntimeError, match="not contiguous"):
            lstm(torch.ones(5, 2, 4, device="cuda"), (state, state))

    def test_no_gradient_in_eval(self, lstm):
        lstm.eval()
        with pytest.raises(RuntimeError, match="in training mode"):
            lstm(torch.ones(5, 2, 4, device="cuda"))[0].sum().backward()

    def test_autocast_is_float16(self, device, lstm):
        with torch.autocast("cuda", torch.bfloat16):
            assert lstm(torch.ones(5, 2, 4, device="cuda"))[0].dtype == torch.float16
        assert "in float16" in str(device.counts.notes)


def test_threads_know_it(x):
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.ones(3).to("cuda").device))
    thread.start()
    thread.join()
    assert found == [x.device]


def test_forked_children_may_not(x):
    def child():
        with pytest.raises(RuntimeError, match="Cannot re-initialize CUDA in forked subprocess"):
            torch.ones(3).to("cuda")
        return True

    assert in_a_fork(child)


def test_shapes_alone():
    with gpu_or_pretended(shapes=True) as device:
        x = torch.zeros(1000, 1000, 100, device="cuda")
        device.counts.reset()
        mask = torch.arange(1000, device="cuda") < 7
        out = x[mask]
        assert tuple(out.shape) == (7, 1000, 100)
        assert mask.sum().item() == 7  # whole numbers are real
        assert (out @ torch.zeros(100, 3, device="cuda")).argmax(2).max().item() == 0
        assert 400_000_000 <= device.counts.peak < 410_000_000


def test_nothing_is_left_behind():
    before = torch.lstm, torch.cuda.Stream, threading.Thread._bootstrap_inner
    with gpu_or_pretended():
        assert torch.cuda.is_available()
        torch.zeros(3, device="cuda")
    assert not torch.cuda.is_available()
    assert before == (torch.lstm, torch.cuda.Stream, threading.Thread._bootstrap_inner)
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(3, device="cuda")
