"""Rows of a stream are each row alone to the bit, whatever others do; and what no stream can take is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import noise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_streaming import NAMES, QUICK, draw_sizes, encoder_of, pieces_of, through
from test_streaming_state import every_direction, every_kind, mistakes, pieces_for, stream_of

from modeling_encodec import EncodecConfig, EncodecModel
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(QUICK, max_examples=5)
def test_rows_side_by_side_are_each_row_alone(name, data, small_models):
    model = small_models[name]
    sizes = draw_sizes(data, model)
    audio = noise(3, model.config.audio_channels, sum(sizes), seed=sum(sizes))
    encoder, alone = encoder_of(model, 3), [encoder_of(model) for _ in range(3)]
    decoder, decoders = StreamingDecoder(model, 3), [StreamingDecoder(model) for _ in range(3)]
    for piece in [*pieces_of(audio, sizes), None]:
        codes = encoder.flush() if piece is None else encoder.push(piece)
        rows = [one.flush() if piece is None else one.push(piece[i : i + 1]) for i, one in enumerate(alone)]
        assert torch.equal(codes, torch.cat(rows))
        scales = [encoder.scales, *(one.scales for one in alone)]
        given = decoder.push(codes, scales[0])
        rows = [one.push(row, scale) for one, row, scale in zip(decoders, rows, scales[1:])]
        assert torch.equal(given, torch.cat(rows))
    assert torch.equal(decoder.flush(), torch.cat([one.flush() for one in decoders]))


@every_direction
@every_kind
def test_a_row_goes_on_alone(name, mode, direction, small_models):
    model = small_models[name]
    stream = stream_of(model, direction, mode, 3)
    *begun, last = pieces_for(model, direction, 3)
    for piece in begun:
        stream.push(*piece)
    before = stream.state
    given = [stream.push(*last), stream.flush()]
    for row in range(3):
        alone = stream_of(model, direction, mode)
        alone.state = before.rows([row])
        assert torch.equal(alone.push(*(part[row : row + 1] for part in last)), given[0][row : row + 1])
        assert torch.equal(alone.flush(), given[1][row : row + 1])
    # And back, into another place.
    stream.state = before.with_rows([0, 2], before.rows([2, 0]))
    again = stream.push(*(part[[2, 1, 0]] for part in last))
    assert torch.equal(again, given[0][[2, 1, 0]])


def test_rows_of_a_full_size_model_are_each_row_alone(tmp_path):
    """Kernels are chosen by the layout of what they are given, and a state comes in the layout that joining rows,
    resetting some and loading left it in."""
    torch.manual_seed(0)
    model, path = EncodecModel(EncodecConfig.preset_24khz()).eval(), tmp_path / "state"
    codes = torch.randint(1024, (2, 2, 8), generator=torch.Generator().manual_seed(1))
    together, alone = (
        StreamingDecoder(model, 2, "low_latency"),
        [StreamingDecoder(model, 1, "low_latency") for _ in "ab"],
    )
    for number, piece in enumerate(codes.split(1, dim=2)):
        if number == 3:
            together.reset([1])
            alone[1].reset()
        if number == 6:
            together.save(path)
            together.restore(path)
        rows = [one.push(piece[row : row + 1]) for row, one in enumerate(alone)]
        assert torch.equal(together.push(piece), torch.cat(rows)), number


def call_all(streams: list, rows: list[int], call) -> list:
    """What `call(stream, row)` gives for these rows of single streams, None for others."""
    return [call(stream, row) if row in rows else None for row, stream in enumerate(streams)]


def check_rows(whole: torch.Tensor, parts: list, fill: float) -> None:
    """Row by row to the bit what single streams gave, filled up."""
    assert whole.shape[-1] == max(part.shape[-1] for part in parts if part is not None)
    for row, part in enumerate(parts):
        width = 0 if part is None else part.shape[-1]
        assert width == 0 or torch.equal(whole[row : row + 1, ..., :width], part)
        assert (whole[row, ..., width:] == fill).all()


ROWS = st.sets(st.integers(0, 2), min_size=1).map(sorted)


@every_kind
@given(data=st.data())
@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.too_slow])
def test_rows_begin_and_end_by_themselves(name, mode, data, small_models):
    model = small_models[name]
    encoder, encoders = encoder_of(model, 3, mode), [encoder_of(model, 1, mode) for _ in range(3)]
    decoder, decoders = StreamingDecoder(model, 3, mode), [StreamingDecoder(model, 1, mode) for _ in range(3)]
    longest = 60000 if model.config.chunk_length else 3000
    everyone, seed = [0, 1, 2], 0
    for _ in range(data.draw(st.integers(1, 6))):
        action, rows = data.draw(st.sampled_from(["push", "push", "flush", "reset"])), data.draw(ROWS)
        if action == "reset":
            for stream in (encoder, decoder):
                stream.reset(rows)
            call_all(encoders, rows, lambda stream, _: stream.reset())
            call_all(decoders, rows, lambda stream, _: stream.reset())
            continue
        if action == "push":
            rows, seed = everyone, seed + 1
            audio = noise(3, model.config.audio_channels, data.draw(st.integers(1, longest)), seed=seed)
            codes = encoder.push(audio)
            parts = [one.push(audio[row : row + 1]) for row, one in enumerate(encoders)]
        else:
            codes, parts = encoder.flush(rows), call_all(encoders, rows, lambda stream, _: stream.flush())
        check_rows(codes, parts, -1)
        scales = [one.scales if part is not None else None for one, part in zip(encoders, parts)]
        if model.config.normalize:
            check_rows(encoder.scales, scales, 0)
        given = decoder.push(codes, encoder.scales)
        parts = call_all(decoders, rows, lambda stream, row: stream.push(parts[row], scales[row]))  # noqa: B023
        check_rows(given, parts, 0)
        assert decoder.lengths.tolist() == [0 if part is None else part.shape[2] for part in parts]
        if action == "flush":
            given, parts = decoder.flush(rows), call_all(decoders, rows, lambda stream, _: stream.flush())
            check_rows(given, parts, 0)
            assert decoder.lengths.tolist() == [0 if part is None else part.shape[2] for part in parts]


@every_direction
@every_kind
def test_a_mistake_at_the_end_changes_nothing(name, mode, direction, small_models):
    model = small_models[name]
    stream = stream_of(model, direction, mode, 2)
    before = stream.state
    of_two = [tuple(torch.as_tensor(part) for part in piece) for piece in pieces_for(model, direction, 2)]
    of_one, of_three = (tuple(part[[0] * rows] for part in of_two[0]) for rows in (1, 3))
    for mistake in (of_one, of_three, *mistakes(model, direction)):
        if not any(isinstance(part, torch.Tensor) and len(part) == 2 for part in mistake):
            with pytest.raises(ValueError):
                stream.finish(*mistake)
            assert stream.state is before


def test_codes_of_no_codebook_and_of_too_many_are_refused(small_models):
    for shape in ((1, 0, 5), (1, 99, 0)):
        with pytest.raises(ValueError, match="codes have shape"):
            StreamingDecoder(small_models["24khz"]).push(torch.zeros(shape, dtype=torch.int64))


def test_a_state_that_no_stream_has_is_refused(small_models):
    encoder = encoder_of(small_models["24khz"])
    for count in (-5, 10**6):
        with pytest.raises(ValueError, match="counts"):
            encoder.state = replace(encoder.state, counts=torch.tensor([count]))


def test_the_state_of_another_encoder_is_refused(small_models, tmp_path):
    """Decoder and codebooks are the same, as where an encoder alone was trained on."""
    encoder = encoder_of(small_models["24khz"])
    encoder.save(tmp_path / "state")
    other = copy.deepcopy(small_models["24khz"])
    with torch.no_grad():
        next(other.encoder.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="is the state of"):
        encoder_of(other).restore(tmp_path / "state")


def test_nothing_follows_a_signals_last_chunk(small_models):
    codes, one = torch.zeros(1, 4, 150, dtype=torch.int64), torch.ones(1, 1)
    for begun in ([], [(codes, one)]):
        decoder = StreamingDecoder(small_models["48khz"])
        for piece in [*begun, (codes[..., :20], one)]:
            decoder.push(*piece)
        with pytest.raises(ValueError, match="allowed: "):
            decoder.push(codes, one)


def test_audio_is_of_the_models_dtype(small_models):
    model = copy.deepcopy(small_models["24khz"]).to(torch.bfloat16)
    decoder = StreamingDecoder(model)
    given = [decoder.push(torch.zeros(1, 2, frames, dtype=torch.int64)) for frames in (0, 9, 1)]
    assert {part.dtype for part in [*given, decoder.flush()]} == {torch.bfloat16}


def test_uint8_codes_are_no_missing_ones(small_models):
    model = small_models["24khz"]
    codes = torch.arange(22).view(1, 2, 11).to(torch.uint8)
    assert torch.equal(through(StreamingDecoder(model), [codes]), through(StreamingDecoder(model), [codes.long()]))
    # In unsigned bytes 255 and -1 are written alike.
    for stream in (StreamingDecoder(model), StreamingDecoder(model, 1, "low_latency")):
        with pytest.raises(ValueError, match="codes range from 255 to 255"):
            stream.push(torch.full((1, 2, 9), 255, dtype=torch.uint8))


def test_graphs_need_a_gpu(small_models):
    for kind in (StreamingEncoder, StreamingDecoder):
        with pytest.raises(ValueError, match="cuda_graphs is True on cpu, allowed: on a CUDA device"):
            kind(small_models["24khz"], cuda_graphs=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_hops_by_a_recorded_graph_are_the_same(batch, small_models):
    model = copy.deepcopy(small_models["24khz"]).cuda()
    audio = noise(batch, 1, 12 * 320).cuda()
    given = {}
    for graphs in (False, True):
        encoder = StreamingEncoder(model, batch_size=batch, cuda_graphs=graphs)
        decoder = StreamingDecoder(model, batch_size=batch, cuda_graphs=graphs)
        codes = [encoder.push(piece) for piece in audio.split(320, dim=2)] + [encoder.flush()]
        given[graphs] = torch.cat(codes, 2), torch.cat([decoder.push(part) for part in codes], 2)
    assert torch.equal(given[True][0], given[False][0])
    torch.testing.assert_close(given[True][1], given[False][1], rtol=0, atol=1e-5)
