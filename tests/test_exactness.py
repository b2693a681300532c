"""The same audio gives the same codes: alone, in a batch, in blocks; and every row comes back at its own length."""

import pytest
import torch
from conftest import make_model, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from ties import count_ties

from modeling_encodec.models import seanet_encodec
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel


NAMES = ["24khz", "48khz", "32khz"]
ODD_CONFIGS = {
    "dilated": {"num_residual_layers": 3},
    "zeros": {"pad_mode": "constant"},
    "replicate": {"pad_mode": "replicate"},
    "non-causal replicate": {"pad_mode": "replicate", "use_causal_conv": False},
    "non-causal dilated zeros": {"pad_mode": "constant", "use_causal_conv": False, "num_residual_layers": 2},
    "trimmed both sides": {"trim_right_ratio": 0.5},
    "odd ratios": {"upsampling_ratios": [7, 3], "use_causal_conv": False},
    "one ratio": {"upsampling_ratios": [6], "target_bandwidths": [200.0]},
    "even kernels": {"kernel_size": 4, "last_kernel_size": 6, "residual_kernel_size": 2},
    "pointwise": {"kernel_size": 1, "last_kernel_size": 1, "residual_kernel_size": 1},
    "no residual units": {"num_residual_layers": 0},
    "identity skip": {"use_conv_shortcut": False, "num_lstm_layers": 1, "compress": 4},
    "odd codebook": {"codebook_size": 100, "target_bandwidths": [20.0]},
    "group norm": {"norm_type": "time_group_norm", "use_causal_conv": False},
}


def odd_model(name: str) -> EncodecModel:
    size = {"num_filters": 4, "hidden_size": 16, "upsampling_ratios": [4, 5], "target_bandwidths": [24.0]}
    return make_model(EncodecConfig(**(size | ODD_CONFIGS[name])))


def batch_of(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (1, channels, T) padded with a loud tone, which must not be heard, and their mask."""
    width = max(row.shape[2] for row in rows)
    audio = torch.sin(torch.arange(width)).expand(len(rows), rows[0].shape[1], width).clone()
    mask = torch.zeros(len(rows), width, dtype=torch.int32)
    for index, row in enumerate(rows):
        audio[index, :, : row.shape[2]] = row
        mask[index, : row.shape[2]] = 1
    return audio, mask


@torch.no_grad()
def encode(model, audio, mask=None):
    return model.encode(audio, mask, num_quantizers=model.config.num_quantizers, return_latents=True)


def frames_of(model, output, row: int, samples: int) -> list[torch.Tensor]:
    """The valid codes of each chunk of a row."""
    spans = model.config.chunk_spans(samples)
    return [output.audio_codes[n, row, :, : model.config.num_frames(b - a)] for n, (a, b) in enumerate(spans)]


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_batch_is_alone_to_the_bit(name, data, small_models):
    model = small_models[name]
    longest = int(2.2 * model.config.sampling_rate)
    lengths = data.draw(st.lists(st.integers(1, longest), min_size=2, max_size=7))
    rows = [noise(1, model.config.audio_channels, n, seed=n) for n in lengths]
    together = encode(model, *batch_of(rows))
    decoded = model.decode(**together)
    assert together.audio_lengths.tolist() == decoded.audio_lengths.tolist() == lengths
    for index, (row, samples) in enumerate(zip(rows, lengths)):
        alone = encode(model, row)
        expected = frames_of(model, alone, 0, samples)
        got = frames_of(model, together, index, samples)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert together.codes_lengths[index] == sum(codes.shape[1] for codes in expected)
        for n, scale in enumerate(alone.audio_scales):
            assert scale is None or torch.equal(scale[0], together.audio_scales[n][index])
        assert torch.equal(model.decode(**alone)[0][0], decoded.rows()[index])
        assert not decoded.audio_values[index, :, samples:].any()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_batch_is_alone_on_real_size(name, released_models):
    model = released_models[name]
    lengths = [1, 319, 4000, 24001, 50000]
    rows = [noise(1, model.config.audio_channels, n, seed=n) for n in lengths]
    together = encode(model, *batch_of(rows[::-1]))
    for index, (row, samples) in enumerate(zip(rows[::-1], lengths[::-1])):
        expected = frames_of(model, encode(model, row), 0, samples)
        assert all(torch.equal(a, b) for a, b in zip(frames_of(model, together, index, samples), expected))


@pytest.mark.parametrize("block", [600, 16])
@pytest.mark.parametrize("name", [*NAMES, *ODD_CONFIGS])
@torch.no_grad()
def test_rows_computed_together_are_alone_but_for_ties(name, block, small_models, monkeypatch):
    """What accelerators do: one ragged batch, each row padded at its own end; long ones in joint blocks of time."""
    model = small_models.get(name) or odd_model(name)
    rate = model.config.sampling_rate
    lengths = [1, 2, 5, 319, 320, 321, 641, 1500, 5000, rate // 3, int(1.3 * rate), int(1.3 * rate)]
    rows = [noise(1, model.config.audio_channels, n, seed=i) for i, n in enumerate(lengths)]
    alone = [encode(model, row) for row in rows]
    monkeypatch.setattr(EncodecModel, "computes_rows_together", True)
    monkeypatch.setattr(seanet_encodec, "CPU_BLOCK_FRAMES", block)
    together = encode(model, *batch_of(rows))
    ties = 0
    for index, (single, samples) in enumerate(zip(alone, lengths)):
        pairs = zip(frames_of(model, single, 0, samples), frames_of(model, together, index, samples), strict=True)
        for n, (expected, got) in enumerate(pairs):
            latents = single.latents[n, 0, :, : expected.shape[1]]
            same = together.latents[n, index, :, : expected.shape[1]]
            torch.testing.assert_close(same, latents, rtol=0, atol=2e-5 * latents.abs().max().item())
            ties += count_ties(model, latents, expected, got)
    assert ties <= 1e-2 * sum(single.codes_lengths.item() for single in alone)
    audio = model.decode(**together).rows()
    monkeypatch.undo()
    for index, samples in enumerate(lengths):
        chunks = [n for n in range(len(together.audio_codes)) if n < len(list(model.config.chunk_spans(samples)))]
        width = max(frames.shape[1] for frames in frames_of(model, together, index, samples))
        codes = together.audio_codes[: len(chunks), index : index + 1, :, :width]
        scales = [None if s is None else s[index : index + 1] for s in together.audio_scales[: len(chunks)]]
        single = model.decode(codes, scales, audio_lengths=torch.tensor([samples]))[0][0]
        torch.testing.assert_close(audio[index], single, rtol=0, atol=1e-5 * max(1, single.abs().max().item()))


def whole_signal(net, x):
    """What `net` gives in one piece, as it computes where gradients are on."""
    with torch.enable_grad():
        return net(x).detach()


@pytest.mark.parametrize("name", ["24khz", "32khz", *ODD_CONFIGS])
@pytest.mark.parametrize(("block", "fine"), [(16, 8), (40, 9), (64, 16)])
@torch.no_grad()
def test_blocks_are_the_whole(name, block, fine, small_models, monkeypatch):
    """State carries everything from block to block: any block size gives what one step over the whole gives."""
    model = small_models.get(name) or odd_model(name)
    hop = model.config.hop_length
    for samples in (block * hop, 2 * block * hop - 1, 2 * block * hop, 2 * block * hop + 1, 5 * block * hop + 77):
        audio = noise(1, 1, samples, seed=samples)
        whole = whole_signal(model.encoder, audio)
        monkeypatch.setattr(seanet_encodec, "CPU_BLOCK_FRAMES", block)
        monkeypatch.setattr(seanet_encodec, "CPU_FINE_FRAMES", fine)
        coded = encode(model, audio)
        torch.testing.assert_close(coded.latents[0], whole, rtol=0, atol=1e-5 * whole.abs().max().item())
        decoded = model.decode(**coded)[0]
        expected = whole_signal(model.decoder, model.embed(coded.audio_codes[0]))[..., :samples]
        torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


@torch.no_grad()
def test_later_audio_never_changes_earlier_codes(small_models):
    """Causality of the 24 kHz model: from frame 7 on a frame depends on nothing after its own samples."""
    model, audio = small_models["24khz"], noise(1, 1, 24000)
    codes = encode(model, audio).audio_codes
    for frame in (7, 20, 60):
        changed = audio.clone()
        changed[..., 320 * (frame + 1) :] = 0.5
        assert torch.equal(encode(model, changed).audio_codes[..., : frame + 1], codes[..., : frame + 1])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_length_comes_back(name, small_models):
    model = small_models[name]
    hop, stride = model.config.hop_length, model.config.chunk_stride or 0
    lengths = [*range(1, 4), *(n * hop + d for n in (1, 2, 3) for d in (-1, 0, 1))]
    lengths += [stride + d for d in (0, 1, 479, 480, 481)] if stride else []
    for samples in lengths:
        audio = noise(1, model.config.audio_channels, samples, seed=samples)
        assert model.decode(**encode(model, audio)).audio_values.shape == audio.shape
        assert model(audio).audio_values.shape == audio.shape


@torch.no_grad()
def test_a_chunk_that_ends_after_the_last_one_decodes(small_models):
    """Rounded up to whole frames the chunk before the last can be the longer one; stock and original fail there."""
    model = small_models["48khz"]
    lengths = [95201, 95340, 95360, 142800, 95361, 95200]
    rows = [noise(1, 2, samples, seed=samples) for samples in lengths]
    for row in rows:
        output = model.decode(**encode(model, row))
        assert output.audio_values.shape == row.shape and torch.isfinite(output.audio_values).all()
    assert model.decode(**encode(model, *batch_of(rows))).audio_lengths.tolist() == lengths
    model = make_model(
        EncodecConfig.preset_48khz(num_filters=2, hidden_size=8, num_lstm_layers=1, chunk_length_s=0.1, overlap=0.9)
    )
    for samples in range(20000, 22000, 97):
        row = noise(1, 2, samples)
        assert model.decode(**encode(model, row)).audio_values.shape == row.shape


@pytest.mark.parametrize(
    "fields",
    [
        {"kernel_size": 301},
        {"last_kernel_size": 301},
        {"num_residual_layers": 3, "dilation_growth_rate": 12, "upsampling_ratios": [2, 2]},
        {"residual_kernel_size": 199, "use_causal_conv": False, "upsampling_ratios": [2, 3]},
    ],
)
@torch.no_grad()
def test_blocks_are_never_shorter_than_a_kernel_reaches(fields, monkeypatch):
    size = {"num_filters": 2, "hidden_size": 8, "num_lstm_layers": 1, "target_bandwidths": [200.0]}
    model = make_model(EncodecConfig(**(size | {"upsampling_ratios": [4]} | fields)))
    monkeypatch.setattr(seanet_encodec, "CPU_BLOCK_FRAMES", 8)
    monkeypatch.setattr(seanet_encodec, "CPU_FINE_FRAMES", 4)
    hop = model.config.hop_length
    for frames in (700, 2000, 5000):
        audio = noise(1, 1, frames * hop - 1)
        coded = encode(model, audio)
        whole = whole_signal(model.encoder, audio)
        torch.testing.assert_close(coded.latents[0], whole, rtol=0, atol=1e-5 * whole.abs().max().item())
        expected = whole_signal(model.decoder, model.embed(coded.audio_codes[0]))[..., : audio.shape[2]]
        got = model.decode(**coded)[0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


@torch.no_grad()
def test_stereo_chunks_are_those_of_the_original(small_models):
    """No phantom chunk: one starts every 47,520 samples as long as there is audio, and the last ones are short."""
    model = small_models["48khz"]
    for samples, frames in {
        47520: [149],
        47521: [149, 1],
        48000: [150, 2],
        48001: [150, 2],
        95040: [150, 149],
        95041: [150, 149, 1],
        480000: [150] * 10 + [15],
    }.items():
        output = encode(model, noise(1, 2, samples))
        assert [codes.shape[1] for codes in frames_of(model, output, 0, samples)] == frames
        assert output.codes_lengths.item() == sum(frames) and len(output.audio_scales) == len(frames)
        assert output.last_frame_pad_length == frames[0] - frames[-1]


@torch.no_grad()
def test_thread_count_changes_no_code(bundled_model, real_clip):
    audio = real_clip(24000)[..., :72000]
    one = encode(bundled_model, audio)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = encode(bundled_model, audio)
    finally:
        torch.set_num_threads(threads)
    assert count_ties(bundled_model, one.latents, one.audio_codes, two.audio_codes) <= 1
