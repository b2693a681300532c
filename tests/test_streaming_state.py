"""What a stream remembers is a value: it can be kept, saved, put into another stream, and taken row by row."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import noise
from test_streaming import check_codes, encode, encoder_of, pieces_of, through

from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.streaming import streams as streaming
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder


NAMES = ["24khz", "48khz", "32khz"]
KINDS = [("24khz", "exact"), ("24khz", "low_latency"), ("48khz", "exact"), ("32khz", "exact")]
every_kind = pytest.mark.parametrize(("name", "mode"), KINDS)
every_direction = pytest.mark.parametrize("direction", ["encoder", "decoder"])


def stream_of(model: EncodecModel, direction: str, mode: str = "exact", batch: int = 1):
    return encoder_of(model, batch, mode) if direction == "encoder" else StreamingDecoder(model, batch, mode)


def pieces_for(model: EncodecModel, direction: str, batch: int = 1) -> list[tuple]:
    """Arguments of three calls of `push`, after the second of which something waits."""
    config = model.config
    if direction == "encoder":
        audio = noise(batch, config.audio_channels, 2 * 48000 + 1000 if config.chunk_length else 12345)
        return [(piece,) for piece in pieces_of(audio, [5001, 50000 if config.chunk_length else 3012])]
    generator, count = torch.Generator().manual_seed(3), config.num_quantizers
    frames = 150 if config.chunk_length else 11
    codes = torch.randint(config.codebook_size, (3, batch, count, frames), generator=generator)
    scales = torch.rand(3, batch, 1, generator=generator) + 0.1
    return [(part, scale) if config.chunk_length else (part,) for part, scale in zip(codes, scales)]


def same_state(a, b) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@every_direction
@every_kind
def test_a_kept_state_goes_on_as_before(name, mode, direction, small_models):
    stream = stream_of(small_models[name], direction, mode)
    *begun, last = pieces_for(small_models[name], direction)
    for piece in begun:
        stream.push(*piece)
    kept = stream.state
    clone = kept.map(torch.clone)
    first = [stream.push(*last), stream.flush()]
    assert same_state(kept, clone), "a state was written to"
    for state in (kept, clone):
        stream.state = state
        again = [stream.push(*last), stream.flush()]
        assert all(map(torch.equal, first, again))
    assert same_state(kept, clone) and any(part.numel() for part in first)
    assert same_state(stream.state, stream_of(small_models[name], direction, mode).state)


@every_direction
@every_kind
def test_nothing_given_or_taken_is_part_of_the_state(name, mode, direction, small_models):
    """Buffers may be used again, as sound cards do, and what came out be written to."""
    model = small_models[name]
    pieces = pieces_for(model, direction)
    stream, careless = (stream_of(model, direction, mode) for _ in range(2))
    for piece in pieces:
        expected, lent = stream.push(*piece), [part.clone() for part in piece]
        got = careless.push(*lent)
        assert torch.equal(got, expected)
        for part in (got, *lent):
            part.fill_(1)
    assert torch.equal(careless.flush(), stream.flush())


@every_direction
@every_kind
def test_a_saved_stream_goes_on_elsewhere(name, mode, direction, small_models, tmp_path):
    stream, path = stream_of(small_models[name], direction, mode, 2), tmp_path / "stream.safetensors"
    for piece in pieces_for(small_models[name], direction, 2):
        stream.save(path)
        other = stream_of(small_models[name], direction, mode, 2)
        other.restore(path)
        assert same_state(other.state, stream.state)
        assert torch.equal(other.push(*piece), stream.push(*piece))
    stream.save(path)
    other.restore(path)
    assert torch.equal(other.flush(), stream.flush())


def test_only_a_streams_own_state_is_restored(small_models, tmp_path):
    path, model = tmp_path / "stream.safetensors", small_models["24khz"]
    encoder = encoder_of(model)
    encoder.push(noise(1, 1, 3000))
    encoder.save(path)
    others = [StreamingDecoder(model), encoder_of(model, 2), encoder_of(model, 1, "low_latency")]
    for other in [*others, encoder_of(small_models["32khz"]), encoder_of(small_models["48khz"])]:
        before = other.state
        with pytest.raises(ValueError) as error:
            other.restore(path)
        assert "\n" not in str(error.value) and same_state(other.state, before)
        with pytest.raises(ValueError, match=r"state\..* is"):
            other.state = encoder.state


def test_a_damaged_file_is_refused(small_models, tmp_path):
    path, encoder = tmp_path / "stream.safetensors", encoder_of(small_models["24khz"])
    encoder.push(noise(1, 1, 3000))
    encoder.save(path)
    whole, tensors = path.read_bytes(), encoder.state.map(torch.Tensor.contiguous).tensors()
    about = {"stream": json.dumps(encoder._about())}
    broken = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "longer": whole + b"\0",
        "text": b"no state at all, " * 9,
        "no facts": safetensors.torch.save(tensors),
        "other facts": safetensors.torch.save(tensors, {"stream": "{}"}),
        "facts of no kind": safetensors.torch.save(tensors, {"stream": "[["}),
        "a tensor less": safetensors.torch.save({k: v for k, v in tensors.items() if k != "layers.3"}, about),
        "no counts": safetensors.torch.save({k: v for k, v in tensors.items() if k != "counts"}, about),
        "a tensor more": safetensors.torch.save(tensors | {"more": torch.zeros(1)}, about),
        "another shape": safetensors.torch.save(tensors | {"waiting": torch.zeros(1, 1, 5)}, about),
        "another dtype": safetensors.torch.save(tensors | {"started": torch.ones(1)}, about),
    }
    before = encoder.state
    for what, data in broken.items():
        path.write_bytes(data)
        with pytest.raises(ValueError) as error:
            encoder.restore(path)
        assert "\n" not in str(error.value), what
        assert encoder.state is before, what
    with pytest.raises(FileNotFoundError):
        encoder.restore(tmp_path / "none")


# ---- rows that begin and end by themselves -----------------------------------------------------------------------


def test_rows_are_the_streams_own(small_models):
    encoder = encoder_of(small_models["24khz"], 3)
    for rows in ([], [3], [-1], [0, 7]):
        for call in (encoder.reset, encoder.flush):
            with pytest.raises(ValueError, match="rows are"):
                call(rows)


def compute_together(monkeypatch) -> None:
    """Rows computed together, as accelerators do."""
    monkeypatch.setattr(EncodecModel, "computes_rows_together", True)
    advance = streaming._Stream._advance
    device = SimpleNamespace(type="accelerator")

    def together(stream, *arguments):
        model = stream.model
        stream.model = SimpleNamespace(device=device, computes_rows_together=True, config=model.config)
        try:
            return advance(stream, *arguments)
        finally:
            stream.model = model

    monkeypatch.setattr(streaming._Stream, "_advance", together)


@every_kind
def test_rows_computed_together_are_alone_but_for_ties(name, mode, small_models, monkeypatch):
    model = small_models[name]
    config = model.config
    audio = noise(3, config.audio_channels, 100000 if config.chunk_length else 20000)
    pieces = pieces_of(audio, [700, 50000 if config.chunk_length else 5000, 3333])

    def run() -> tuple[torch.Tensor, list, list]:
        encoder, decoder = encoder_of(model, 3, mode), StreamingDecoder(model, 3, mode)
        codes, given = [], []
        for number, piece in enumerate(pieces):
            codes.append(encoder.push(piece))
            given.append(decoder.push(codes[-1], encoder.scales))
            if number == 1:  # from here on they stand at two places
                codes.append(encoder.flush([1]))
                given.append(decoder.push(codes[-1], encoder.scales))
                given.append(decoder.flush([1]))
        return torch.cat(codes, dim=2), given, decoder.lengths.tolist()

    alone, audio_alone, lengths = run()
    compute_together(monkeypatch)
    together, audio_together, lengths_together = run()
    assert lengths == lengths_together and alone.shape == together.shape
    differing = (alone != together).any(1).sum().item()
    assert differing <= 1e-2 * alone.shape[0] * alone.shape[2]
    if not differing:
        for ours, theirs in zip(audio_alone, audio_together):
            torch.testing.assert_close(
                ours, theirs, rtol=0, atol=1e-5 * max(1, ours.abs().sum().item() and ours.abs().max().item())
            )


# ---- streams that share a model, and mistakes --------------------------------------------------------------------


@every_direction
@every_kind
def test_streams_of_one_model_do_not_mix(name, mode, direction, small_models):
    model = small_models[name]
    one, two = pieces_for(model, direction), pieces_for(model, direction, 2)
    two = [tuple(part[1:] for part in piece) for piece in two]
    first, second = (stream_of(model, direction, mode) for _ in range(2))
    mixed = [(first.push(*a), second.push(*b)) for a, b in zip(one, two)] + [(first.flush(), second.flush())]
    for pieces, came in zip((one, two), zip(*mixed)):
        assert torch.equal(through(stream_of(model, direction, mode), pieces), torch.cat(came, dim=2))


def mistakes(model: EncodecModel, direction: str) -> list[tuple]:
    channels, count, chunks = model.config.audio_channels, model.config.num_quantizers, model.config.chunk_length
    if direction == "encoder":
        bad = torch.zeros(1, channels, 400)
        bad[..., 7] = torch.nan
        wrong = [bad, bad / 0, torch.zeros(2, channels, 9), torch.zeros(1, 3, 9), torch.zeros(1, 1, 1, 9)]
        return [(samples,) for samples in [*wrong, torch.zeros(1, channels, 9, dtype=torch.bool), "abc", None]]
    codes = torch.zeros(1, count, 150, dtype=torch.int64)
    scales = (torch.ones(1, 1),) if chunks else ()
    wrong = [codes + model.config.codebook_size, codes - 2, codes.float(), codes[0], codes.repeat(2, 1, 1)]
    wrong += [codes.repeat(1, 9, 1)[:, : count + 1], "abc", torch.where(torch.arange(150) == 9, -1, codes)]
    without = [(codes, *(() if scales else (torch.ones(1, 1),)))]
    if chunks:
        without += [
            (codes[..., :-1], torch.ones(1, 2)),
            (codes[..., :-1], torch.ones(1, 3)),
            (codes, scales[0] * torch.nan),
        ]
        without += [(codes, torch.ones(1)), (codes, torch.zeros(1, 0)), (codes[..., :0], torch.ones(1, 1))]
    return [(codes, *scales) for codes in wrong] + without


@every_direction
@every_kind
def test_a_mistake_changes_nothing(name, mode, direction, small_models):
    model = small_models[name]
    stream, pieces = stream_of(model, direction, mode), pieces_for(model, direction)
    expected, given = through(stream_of(model, direction, mode), pieces), []
    for piece in pieces:
        for mistake in mistakes(model, direction):
            before = stream.state
            with pytest.raises(ValueError) as error:
                stream.push(*mistake)
            assert "allowed: " in str(error.value) and stream.state is before
        given.append(stream.push(*piece))
    assert torch.equal(torch.cat([*given, stream.flush()], dim=2), expected)


def test_streams_that_cannot_be_are_refused(small_models):
    for fields in ({"batch_size": 0}, {"batch_size": 1.0}, {"mode": "fast"}, {"num_quantizers": 99}):
        with pytest.raises(ValueError, match="allowed: "):
            StreamingEncoder(small_models["24khz"], **fields)
    with pytest.raises(ValueError, match="bandwidth"):
        StreamingEncoder(small_models["24khz"], bandwidth=7.0)
    assert StreamingEncoder(small_models["24khz"], bandwidth=1.8).num_quantizers == 4
    assert StreamingEncoder(small_models["24khz"]).num_quantizers == 2


# ---- kinds of inputs and models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_any_kind(name, small_models):
    model = small_models[name]
    audio = noise(1, model.config.audio_channels, 49000).half().float()
    expected = through(encoder_of(model), pieces_of(audio, [5000, 1]))
    one = audio[0] if model.config.audio_channels == 2 else audio[0, 0]
    kinds = [audio.double(), audio.half(), audio.numpy(), audio.double().numpy(), one, audio.requires_grad_()]
    for kind in [*kinds, np.asfortranarray(audio.detach().numpy())]:
        assert torch.equal(
            through(encoder_of(model), [kind[..., :5000], kind[..., 5000:5001], kind[..., 5001:]]), expected
        )
    assert torch.equal(through(encoder_of(model), [audio[..., :5000], one[..., :0], one[..., 5000:]]), expected)


@every_direction
@every_kind
def test_gradients_and_inference_mode_change_nothing(name, mode, direction, small_models):
    model = small_models[name]
    pieces = pieces_for(model, direction)
    expected = through(stream_of(model, direction, mode), pieces)
    stream, given = stream_of(model, direction, mode), []
    for piece, context in zip(
        [*pieces, None], [torch.inference_mode, torch.enable_grad, torch.inference_mode, torch.no_grad]
    ):
        with context():
            given.append(stream.flush() if piece is None else stream.push(*piece))
    assert not any(part.requires_grad for part in given)
    assert torch.equal(torch.cat(given, dim=2), expected)


def test_half_precision_models_stream(small_models):
    model = copy.deepcopy(small_models["24khz"]).to(torch.bfloat16)
    audio = noise(1, 1, 9000)
    codes = through(encoder_of(model), pieces_of(audio, [3000, 1, 2000]))
    expected = encode(model, audio).audio_codes[0]
    assert codes.shape == expected.shape and (codes == expected).float().mean() > 0.9
    decoder = StreamingDecoder(model)
    given = through(decoder, list(codes.split(9, dim=2)))
    assert given.shape == (1, 1, 29 * 320)
    whole = model.decode(codes).audio_values.detach()
    torch.testing.assert_close(given.float(), whole.float(), rtol=0, atol=0.05)


def test_the_file_is_a_streams_with_codes_proven(small_models, tmp_path):
    """A stream that lives in files alone: every piece in a new one."""
    model, audio = small_models["24khz"], noise(1, 1, 16000)
    codes = []
    for number, piece in enumerate(audio.split(1234, dim=2)):
        encoder = encoder_of(model)
        if number:
            encoder.restore(tmp_path / "state")
        codes.append(encoder.push(piece))
        encoder.save(tmp_path / "state")
    check_codes(model, audio, torch.cat([*codes, encoder.flush()], dim=2))
