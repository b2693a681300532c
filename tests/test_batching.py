"""Which rows an accelerator computes together, in how much memory, and how they are put side by side."""

from types import SimpleNamespace

import pytest
import torch
from conftest import noise
from hypothesis import given
from hypothesis import strategies as st

from modeling_encodec.models import batching_encodec
from modeling_encodec.models.batching_encodec import accelerator_frames, group_alike, padded, stack_chunks
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 300), st.integers(1, 60))
def test_groups_hold_every_row_once_and_no_more_than_fits(lengths, most, longest):
    groups = group_alike(lengths, most, longest)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        found = [lengths[index] for index in group]
        assert found == sorted(found)
        assert len(group) == 1 or len(group) * min(found[-1], longest) <= most


def test_equal_rows_are_not_padded_for_the_sake_of_others():
    lengths = [100] * 10 + [7, 100, 30, 7, 100]
    groups = group_alike(lengths, 10**6, 10**6)
    assert [[lengths[index] for index in group] for group in groups] == [[7, 7, 30], [100] * 12]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), st.booleans())
def test_padded_is_each_piece_and_zeros(lengths, wider):
    pieces = [noise(1, 3, n, seed=n) if n else torch.zeros(1, 3, 0) for n in lengths]
    width = max(lengths) + wider
    rows = padded(pieces, width)
    assert rows.shape == (len(lengths), 3, width)
    for row, piece in zip(rows, pieces):
        assert torch.equal(row[:, : piece.shape[2]], piece[0])
        assert not row[:, piece.shape[2] :].any()


def test_chunks_are_stacked_by_chunk_and_row():
    pieces = [torch.full((1, 2, n), float(n)) for n in (3, 1, 2)]  # a row of two chunks, a row of one
    stacked = stack_chunks(pieces, [2, 1])
    assert stacked.shape == (2, 2, 2, 3)
    assert stacked.is_contiguous()
    assert stacked[:, :, 0].tolist() == [[[3, 3, 3], [2, 2, 0]], [[1, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize(("name", "share"), [("24khz", 1), ("48khz", 1), ("32khz", 1 / 4)])
def test_models_with_wider_layers_get_fewer_frames(name, share, monkeypatch):
    config, card = getattr(EncodecConfig, f"preset_{name}")(), torch.device("cuda")
    assert accelerator_frames(config, torch.device("cpu"), 65536) == 65536 * share
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for memory, part in ((80 << 30, share), (16 << 30, 0.32 * share), (1 << 10, 0)):
        card_of = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card_of=card_of: card_of)
        assert accelerator_frames(config, card, 65536) == pytest.approx(max(1, 65536 * part), rel=0.01)


@torch.no_grad()
@pytest.mark.parametrize("name", ["24khz", "48khz"])
def test_a_group_too_large_for_the_memory_left_is_halved(name, small_models, monkeypatch):
    model = small_models[name]
    audio = noise(5, model.config.audio_channels, 3000)
    expected = [model.encode(row[None]).audio_codes for row in audio]
    monkeypatch.setattr(EncodecModel, "computes_rows_together", True)
    rows, tried = type(model.encoder).rows, []

    def small(net, x, *arguments):
        tried.append(len(x))
        if len(x) > fits:
            raise torch.OutOfMemoryError
        return rows(net, x, *arguments)

    monkeypatch.setattr(type(model.encoder), "rows", small)
    fits = 2
    codes = model.encode(audio).audio_codes
    assert tried == [5, 2, 3, 1, 2]
    assert torch.equal(codes, torch.cat(expected, dim=1))
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        model.encode(audio)


def test_one_wait_for_a_mask(monkeypatch):
    asked = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: asked.append(1) or tolist(tensor))
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1]])
    assert batching_encodec.row_lengths(mask, (3, 1, 3)) == [2, 3, 3]
    assert len(asked) == 1
