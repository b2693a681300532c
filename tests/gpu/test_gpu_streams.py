"""Streams on a GPU, with CUDA graphs and without, give what they give on the CPU."""

import copy

import pytest
import torch
from conftest import noise
from devices import assert_near, assert_on, assert_same_codes, moved

from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder, decode_blocks, encode_blocks


pytestmark = pytest.mark.usefixtures("device")

# Model, mode, graphs, device.
KINDS = [
    pytest.param("24khz", "exact", False, "cuda", marks=pytest.mark.slow),
    ("24khz", "exact", True, "cuda"),
    pytest.param("24khz", "low_latency", False, "cuda", marks=pytest.mark.slow),
    ("24khz", "low_latency", True, "cuda"),
    pytest.param("24khz", "low_latency", True, "cuda:1"),
    pytest.param("24khz", "exact", True, "cuda:1"),
    ("48khz", "exact", False, "cuda"),
    ("48khz", "exact", False, "cuda:1"),
]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def pieces_of(model) -> list[torch.Tensor]:
    """Of three rows: hops, some larger and smaller; or of chunks."""
    hop = model.config.hop_length
    sizes = [hop] * 9 + [hop + 7, 3 * hop, 11] if model.config.chunk_length is None else [30011] * 3
    return list(noise(3, model.config.audio_channels, sum(sizes)).split(sizes, dim=2))


def push_all(model, mode: str, graphs: bool = False) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Codes and audio of three rows, one of which ends in between, and one that begins anew."""
    options = {"mode": mode} | ({"cuda_graphs": True} if graphs else {})
    encoder = StreamingEncoder(model, batch_size=3, num_quantizers=2, **options)
    decoder = StreamingDecoder(model, batch_size=3, **options)
    given, sounds = [], []

    def decode(codes):
        given.append(codes)
        sounds.append(decoder.push(codes, *([encoder.scales] if model.config.normalize else [])))

    for number, piece in enumerate(pieces_of(model)):
        if number == 2:
            decode(encoder.flush([1]))
            sounds.append(decoder.flush([1]))
        if number == 5:
            encoder.reset([0])
            decoder.reset([0])
        decode(encoder.push(piece.to(model.device)))
    decode(encoder.flush())
    sounds.append(decoder.flush())
    return given, sounds


@pytest.mark.parametrize(("name", "mode", "graphs", "where"), KINDS)
def test_rows_are_those_of_the_cpu(small_models, device, name, mode, graphs, where):
    if where == "cuda:1" and device.count < 2:
        pytest.skip("one GPU")
    model = small_models[name]
    there = copy.deepcopy(model).to(where)
    codes, sounds = push_all(there, mode, graphs)
    expected, expected_sounds = push_all(model, mode)
    assert_on(str(there.device), *codes, *sounds)
    for ours, theirs in zip(codes, expected, strict=True):
        assert_same_codes(ours, theirs)
    if all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(codes, expected)):
        for ours, theirs in zip(sounds, expected_sounds, strict=True):
            assert_near(ours, theirs)


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        ("low_latency", "eval"),
        pytest.param("exact", "encode", marks=pytest.mark.slow),
        ("low_latency", "fast and back"),
        pytest.param("exact", "train and eval", marks=pytest.mark.slow),
    ],
)
def test_recorded_graphs_outlive_what_changes_no_weights(small_models, mode, change):
    there = copy.deepcopy(small_models["24khz"]).to("cuda")
    encoder = StreamingEncoder(there, num_quantizers=2, mode=mode, cuda_graphs=True)
    decoder = StreamingDecoder(there, mode=mode, cuda_graphs=True)
    plain, plain_decoder = StreamingEncoder(there, num_quantizers=2, mode=mode), StreamingDecoder(there, mode=mode)
    for number, piece in enumerate(noise(1, 1, 14 * 320).to("cuda").split(320, dim=2)):
        if number == 10:
            if change == "eval":
                there.eval()
            elif change == "train and eval":
                there.train()
                there.eval()
            elif change == "fast and back":
                there.precision = "fast"
                there.encode(piece)
                there.precision = "exact"
            else:
                there.encode(noise(2, 1, 5000))
        codes, expected = encoder.push(piece), plain.push(piece)
        assert_same_codes(codes, expected)
        assert_near(decoder.push(expected), plain_decoder.push(expected))


def test_graphs_of_several_row_counts_and_two_streams(small_models):
    there = copy.deepcopy(small_models["24khz"]).to("cuda")
    audio = noise(3, 1, 12 * 320).to("cuda").split(320, dim=2)
    graphed = [StreamingEncoder(there, 0.9, rows, "low_latency", cuda_graphs=True) for rows in (1, 3)]
    plain = [StreamingEncoder(there, 0.9, rows, "low_latency") for rows in (1, 3)]
    for piece in audio:
        for one, other, rows in zip(graphed, plain, (1, 3)):
            assert_same_codes(one.push(piece[:rows]), other.push(piece[:rows]))


@pytest.mark.parametrize("name", ["24khz", "48khz"])
def test_states_between_devices(small_models, tmp_path, name):
    model = small_models[name]
    there = copy.deepcopy(model).to("cuda")
    first, second = 3000 if name == "24khz" else 50000, 60000
    audio = noise(1, model.config.audio_channels, first + second)
    encoder, here = StreamingEncoder(there, num_quantizers=2), StreamingEncoder(model, num_quantizers=2)
    encoder.push(audio[..., :first].to("cuda"))
    begun = encoder.state
    encoder.save(tmp_path / "state.safetensors")
    rest = audio[..., first:]
    expected = encoder.push(rest.to("cuda")).cpu()
    encoder.state = begun
    assert_same_codes(encoder.push(rest), expected)
    encoder.state = begun.map(lambda tensor: tensor.cpu())
    assert_same_codes(encoder.push(rest), expected)
    encoder.restore(tmp_path / "state.safetensors")
    assert_same_codes(encoder.push(rest), expected)
    here.restore(tmp_path / "state.safetensors")  # goes on elsewhere
    assert_same_codes(here.push(rest), expected)


def test_decoder_takes_codes_of_the_cpu(small_models):
    model = small_models["24khz"]
    there = copy.deepcopy(model).to("cuda")
    codes = torch.randint(64, (2, 4, 30), generator=torch.Generator().manual_seed(0))
    ours, theirs = (StreamingDecoder(one, batch_size=2) for one in (there, model))
    for part in codes.split(7, dim=2):
        assert_near(ours.push(part), theirs.push(part))
    assert_near(ours.flush(), theirs.flush())


@pytest.mark.parametrize("name", ["24khz", "48khz", "32khz"])
def test_whole_signals_in_blocks(small_models, name):
    model = small_models[name]
    there = copy.deepcopy(model).to("cuda")
    blocks = list(noise(1, model.config.audio_channels, 70000)[0].split(30000, dim=1))
    ours, theirs = list(encode_blocks(there, iter(blocks), 2)), list(encode_blocks(model, iter(blocks), 2))
    for (codes, _), (expected, _) in zip(ours, theirs, strict=True):
        assert_same_codes(codes, expected)
    there_again = list(decode_blocks(there, iter(moved(theirs, "cpu"))))
    for sound, expected in zip(there_again, decode_blocks(model, iter(theirs)), strict=True):
        assert_near(sound, expected)


def test_fast_streams_of_very_small_models(small_models):
    """Units of two channels and fewer, which sum their taps by themselves."""
    there = copy.deepcopy(small_models["24khz"]).to("cuda")
    there.precision = "fast"
    for graphs in (False, True):
        encoder = StreamingEncoder(there, 0.9, mode="low_latency", cuda_graphs=graphs)
        decoder = StreamingDecoder(there, mode="low_latency", cuda_graphs=graphs)
        for piece in noise(1, 1, 6 * 320).to("cuda").split(320, dim=2):
            assert decoder.push(encoder.push(piece)).dtype == torch.float32
