"""Recorded graphs follow the weights, states stay values, and what streams, tokens and coders ask a GPU is counted."""

import copy

import numpy as np
import pytest
import torch
from conftest import noise
from lm_models import make_codes, make_integer_lm

from modeling_encodec import EncodecConfig, EncodecModel
from modeling_encodec.bitstream.segment_coders import LMCoder
from modeling_encodec.processors.audio_tokens import begin_clips, encode_clips
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder


pytest.importorskip("pretended")  # the pretended GPU
pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def streams_of(model: EncodecModel, rows: int, graphs: bool) -> tuple[StreamingEncoder, StreamingDecoder]:
    options = {"batch_size": rows, "mode": "low_latency", "cuda_graphs": graphs}
    return StreamingEncoder(model, num_quantizers=2, **options), StreamingDecoder(model, **options)


def scale(model: EncodecModel) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.05)


def scale_unnoticed(model: EncodecModel) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.05)


def load(model: EncodecModel) -> None:
    model.load_state_dict({name: 1.02 * value for name, value in model.state_dict().items()})


def load_others(model: EncodecModel) -> None:
    model.load_state_dict({name: 1.02 * value for name, value in model.state_dict().items()}, assign=True)


def learn(model: EncodecModel) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def move_codebooks(model: EncodecModel) -> None:
    for layer in model.quantizer.layers:
        layer.codebook.embed.mul_(1.1)


def empty_caches(model: EncodecModel) -> None:
    model.eval()
    for module in model.modules():
        if "cache" in vars(module):
            module.cache._kept.clear()


CHANGES = (scale, scale_unnoticed, load, load_others, learn, move_codebooks, empty_caches)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_recorded_graphs_follow_the_weights(change, small_models):
    """Also what PyTorch does not count, after a second, as streams without graphs do."""
    hops = 9 + (small_models["24khz"].config.frame_rate if change is scale_unnoticed else 0)
    pieces = noise(2, 1, hops * 320).cuda().split(320, dim=2)
    given = {}
    for graphs in (False, True):
        model = copy.deepcopy(small_models["24khz"]).cuda()
        encoder, decoder = streams_of(model, 2, graphs)
        pushed = []
        for number, piece in enumerate(pieces):
            if number == 4:
                change(model)
            codes = encoder.push(piece)
            pushed.append((codes.cpu(), decoder.push(codes).cpu()))
        given[graphs] = [torch.cat(parts, dim=2) for parts in zip(*pushed)]
    assert torch.equal(given[True][0], given[False][0])
    torch.testing.assert_close(given[True][1], given[False][1], rtol=0, atol=1e-5)


def test_states_of_streams_with_graphs_are_never_written_to(small_models):
    model = copy.deepcopy(small_models["24khz"]).cuda()
    pieces = noise(2, 1, 12 * 320).cuda().split(320, dim=2)
    for stream, inputs in zip(streams_of(model, 2, True), (pieces, torch.randint(16, (2, 2, 12)).cuda().split(1, 2))):
        for piece in inputs[:4]:
            stream.push(piece)
        kept, twin = stream.state, copy.copy(stream)
        values = kept.map(lambda tensor: tensor.cpu().clone())
        first = [stream.push(piece).cpu() for piece in inputs[4:8]]
        assert all(torch.equal(kept.tensors()[name].cpu(), value) for name, value in values.tensors().items())
        assert all(map(torch.equal, first, [twin.push(piece).cpu() for piece in inputs[4:8]]))
        stream.state = kept
        assert all(map(torch.equal, first, [stream.push(piece).cpu() for piece in inputs[4:8]]))


@pytest.mark.parametrize("rows", [1, 16])
def test_a_hop_by_a_graph_is_a_few_launches(rows, device):
    if device.real:
        pytest.skip("counted on the pretended device")
    model = EncodecModel(EncodecConfig.preset_24khz(num_filters=4)).eval().cuda()
    encoder, decoder = streams_of(model, rows, True)
    hop, codes = torch.zeros(rows, 1, 320).cuda(), torch.zeros(rows, 2, 1, dtype=torch.int64)
    for stream, piece, waits, launches in (
        (encoder, hop, 1, 6),
        (decoder, codes.cuda(), 1, 4),
        (decoder, codes, 0, 4),  # of codes on the CPU nothing is asked
    ):
        for _ in range(2):
            stream.push(piece)
        device.counts.reset()
        stream.push(piece)
        assert device.counts.waits == waits and device.counts.launches <= launches


def test_fast_streams_of_very_small_models(device):
    model = EncodecModel(EncodecConfig.preset_24khz(num_filters=4)).eval().cuda()
    model.precision = "fast"
    for graphs in (False, True):
        encoder, decoder = streams_of(model, 2, graphs)
        for piece in noise(2, 1, 5 * 320).cuda().split(320, dim=2):
            decoder.push(encoder.push(piece))


@pytest.mark.parametrize("name", ["24khz", "48khz"])
def test_tokens_of_a_batch_come_by_one_wait_for_codes_and_one_for_scales(name, device, small_models):
    model = small_models[name]
    moved = copy.deepcopy(model).cuda()
    lengths = [int(seconds * model.config.sampling_rate) for seconds in (0.3, 1.4, 0.3, 0.5)]
    clips = [noise(1, model.config.audio_channels, length, seed=length)[0].numpy() for length in lengths]
    expected = encode_clips(model, clips, 2)
    finish = [begin_clips(moved, clips, 2) for _ in range(2)]
    if not device.real:
        device.counts.reset()
    for one in finish:
        for ours, theirs in zip(one(), expected):
            assert (ours.codes != theirs.codes).mean() < (0.02 if device.real else 0.002)
            if model.config.normalize:
                np.testing.assert_allclose(ours.scales, theirs.scales, rtol=1e-5)
    if not device.real:
        assert device.counts.waits == (4 if model.config.normalize else 2)


def test_beginning_a_batch_waits_for_nothing(device, small_models):
    if device.real:
        pytest.skip("counted on the pretended device")
    for name in ("24khz", "48khz"):
        model = copy.deepcopy(small_models[name]).cuda()
        clips = [noise(1, model.config.audio_channels, length)[0].numpy() for length in (9000, 30000, 70000)]
        begin_clips(model, clips, 2)()  # weights are put in order
        device.counts.reset()
        begin_clips(model, clips, 2)
        assert device.counts.waits == 0, device.counts.syncs


def test_coders_compute_on_the_cpu(device):
    lm = make_integer_lm()
    codes = make_codes(lm, batch=1, frames=150)[0].numpy()
    payload = LMCoder(lm).encode(codes)
    coder = LMCoder(copy.deepcopy(lm).cuda())
    assert coder.encode(codes) == payload
    if not device.real:
        device.counts.reset()
    assert np.array_equal(coder.decode([payload], len(codes), [150])[0], codes)
    if not device.real:
        assert device.counts.launches == 0
