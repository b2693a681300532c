"""A stream gives the whole file's codes and audio, however it is cut, as soon as it can, and never takes one back."""

import itertools

import pytest
import torch
from conftest import make_model, noise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ties import count_ties

from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder


NAMES = ["24khz", "48khz", "32khz"]
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def pieces_of(x: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """`x` cut along its last axis into pieces of these sizes, and the rest."""
    stops = [min(stop, x.shape[-1]) for stop in itertools.accumulate(sizes)]
    return [x[..., a:b] for a, b in zip([0, *stops], [*stops, x.shape[-1]])]


def encoder_of(model: EncodecModel, batch: int = 1, mode: str = "exact") -> StreamingEncoder:
    return StreamingEncoder(model, batch_size=batch, mode=mode, num_quantizers=model.config.num_quantizers)


def through(stream: StreamingEncoder | StreamingDecoder, pieces: list) -> torch.Tensor:
    """All that a stream gives for these pieces (tuples of arguments), to the end."""
    given = [stream.push(*piece) if isinstance(piece, tuple) else stream.push(piece) for piece in pieces]
    return torch.cat([*given, stream.flush()], dim=2)


@torch.no_grad()
def encode(model: EncodecModel, audio: torch.Tensor):
    return model.encode(audio, num_quantizers=model.config.num_quantizers, return_latents=True)


def joined(model: EncodecModel, stacked: torch.Tensor, samples: int) -> torch.Tensor:
    """(N, B, K, F) of rows of so many samples as (B, K, frames of all chunks)."""
    spans = model.config.chunk_spans(samples)
    return torch.cat([stacked[n, ..., : model.config.num_frames(b - a)] for n, (a, b) in enumerate(spans)], dim=2)


def check_codes(model: EncodecModel, audio: torch.Tensor, codes: torch.Tensor) -> int:
    """Frames in which `codes` are not those of the whole `audio`, each proven a tie."""
    coded = encode(model, audio)
    expected = joined(model, coded.audio_codes, audio.shape[2])
    return count_ties(model, joined(model, coded.latents, audio.shape[2]), expected, codes)


@torch.no_grad()
def check_audio(model: EncodecModel, audio: torch.Tensor, frames: list[int], mode: str = "exact") -> None:
    """The codes of `audio`, pushed so many `frames` at a time, decode to what the whole decodes to."""
    coded, samples = encode(model, audio), audio.shape[2]
    codes, decoder = joined(model, coded.audio_codes, samples), StreamingDecoder(model, len(audio), mode)
    if model.config.chunk_length is None:
        pieces, total = pieces_of(codes, frames), codes.shape[2] * model.config.hop_length
    else:
        pieces, total = chunk_pieces(model, coded, samples, frames)
    given = through(decoder, pieces)
    expected = model.decode(**coded).audio_values
    assert given.shape == (*expected.shape[:2], total)
    torch.testing.assert_close(given[..., :samples], expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


def chunk_pieces(model: EncodecModel, coded, samples: int, counts: list[int]) -> tuple[list, int]:
    """So many chunks at a time with their scales, and the rest; and how long the whole becomes."""
    config = model.config
    spans = list(config.chunk_spans(samples))
    stops = [0, *(min(stop, len(spans)) for stop in itertools.accumulate(counts)), len(spans)]
    pieces = []
    for a, b in zip(stops, stops[1:]):
        codes = [coded.audio_codes[n, ..., : config.num_frames(spans[n][1] - spans[n][0])] for n in range(a, b)]
        empty = coded.audio_codes[0, ..., :0]
        scales = torch.cat([torch.zeros(len(empty), 0), *(coded.audio_scales[n] for n in range(a, b))], dim=1)
        pieces.append((torch.cat([empty, *codes], dim=2), scales))
    return pieces, max(a + config.num_frames(b - a) * config.hop_length for a, b in spans)


def draw_sizes(data, model: EncodecModel) -> list[int]:
    """Sizes of pieces to push, around every boundary there is."""
    config, net = model.config, model.encoder
    edges = [config.hop_length, net.start, 2 * net.hop, net.start + net.hop]
    edges += [config.chunk_length, config.chunk_stride] if config.chunk_length else []
    near = [edge + by for edge in edges for by in (-1, 0, 1)]
    size = st.one_of(st.sampled_from([0, 1, *near]), st.integers(0, 4 * net.hop))
    return data.draw(st.lists(size, min_size=1, max_size=6).filter(any))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(QUICK, max_examples=15)
def test_any_split_gives_the_whole_files_codes(name, batch, data, small_models):
    model = small_models[name]
    sizes = draw_sizes(data, model)
    audio = noise(batch, model.config.audio_channels, sum(sizes), seed=sum(sizes))
    encoder, scales, codes = encoder_of(model, batch), [], []
    for piece in [*pieces_of(audio, sizes), None]:
        codes.append(encoder.flush() if piece is None else encoder.push(piece))
        scales.append(encoder.scales)
    check_codes(model, audio, torch.cat(codes, dim=2))
    if model.config.normalize:
        assert torch.equal(torch.cat(scales, dim=1), torch.cat(encode(model, audio).audio_scales, dim=1))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(QUICK, max_examples=12)
def test_any_split_gives_the_whole_files_audio(name, batch, data, small_models):
    model = small_models[name]
    samples = sum(draw_sizes(data, model))
    frames = data.draw(st.lists(st.integers(0, 12), max_size=6))
    check_audio(model, noise(batch, model.config.audio_channels, samples, seed=samples), frames)


@pytest.mark.parametrize("name", NAMES)
def test_every_length_around_a_boundary(name, small_models):
    model = small_models[name]
    net, config = model.encoder, model.config
    lengths = {1, 2, *(n * net.hop + d for n in (1, 2, 3) for d in (-1, 0, 1)), *(net.start + d for d in (-1, 0, 1))}
    if config.chunk_length:
        lengths |= {edge + d for edge in (config.chunk_length, config.chunk_stride) for d in (-1, 0, 1)}
    for samples in sorted(lengths):
        audio = noise(1, config.audio_channels, samples, seed=samples)
        check_codes(model, audio, through(encoder_of(model), [audio]))
        check_codes(model, audio, encoder_of(model).finish(audio))
        check_audio(model, audio, [1])


def test_one_sample_at_a_time(small_models):
    model = small_models["24khz"]
    audio = noise(1, 1, model.encoder.start + 320 + 7)
    check_codes(model, audio, through(encoder_of(model), list(audio.split(1, dim=2))))
    low, at_once = (encoder_of(model, mode="low_latency") for _ in range(2))
    audio = audio[..., :647]
    assert torch.equal(through(low, list(audio.split(1, dim=2))), through(at_once, [audio]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 3])
def test_nothing_is_nothing(name, batch, small_models):
    model = small_models[name]
    for mode in ("exact", "low_latency") if name == "24khz" else ("exact",):
        encoder, decoder = encoder_of(model, batch, mode), StreamingDecoder(model, batch, mode)
        empty = torch.zeros(batch, model.config.audio_channels, 0)
        codes = torch.cat([encoder.push(empty), encoder.flush(), encoder.flush()], dim=2)
        assert codes.shape == (batch, model.config.num_quantizers, 0) and codes.dtype == torch.int64
        scales = encoder.scales if model.config.normalize else None
        given = torch.cat([decoder.push(codes, scales), decoder.flush()], dim=2)
        assert given.shape == empty.shape and given.dtype == torch.float32


ODD = st.fixed_dictionaries(
    {
        "upsampling_ratios": st.sampled_from([[1], [3], [2, 1, 5], [4, 5], [1, 2], [2, 1], [7]]),
        "kernel_size": st.sampled_from([1, 2, 3, 4, 7]),
        "last_kernel_size": st.sampled_from([1, 2, 3, 6, 7]),
        "residual_kernel_size": st.sampled_from([1, 2, 3, 4]),
        "dilation_growth_rate": st.sampled_from([1, 2, 3]),
        "num_residual_layers": st.integers(0, 3),
        "num_lstm_layers": st.integers(1, 2),
        "pad_mode": st.sampled_from(["reflect", "constant", "replicate"]),
        "use_conv_shortcut": st.booleans(),
        "audio_channels": st.integers(1, 2),
    }
)
CAUSAL = st.sampled_from([(True, 1.0), (True, 0.5), (True, 0.0), (False, 1.0)])


@given(fields=ODD, causal=CAUSAL, data=st.data())
@settings(QUICK, max_examples=60)
def test_any_architecture_streams(fields, causal, data):
    size = {"num_filters": 2, "hidden_size": 8, "codebook_size": 16, "sampling_rate": 300}
    size |= {"upsampling_ratios": [4, 5], "target_bandwidths": [2.4], "compress": 1}
    size |= {"use_causal_conv": causal[0], "trim_right_ratio": causal[1]}
    torch.manual_seed(0)
    model = EncodecModel(EncodecConfig(**(size | fields))).eval()
    hop, start = model.encoder.hop, model.encoder.start
    edges = [0, 1, hop - 1, hop, hop + 1, start - 1, start, start + 1]
    sizes = data.draw(st.lists(st.sampled_from(edges) | st.integers(0, 3 * hop + 20), min_size=1, max_size=5))
    audio = noise(1, model.config.audio_channels, max(1, sum(sizes)), seed=sum(sizes))
    check_codes(model, audio, through(encoder_of(model), pieces_of(audio, sizes)))
    frames = data.draw(st.lists(st.integers(0, model.decoder.start + 1), max_size=5))
    check_audio(model, audio, frames)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("normalize", [True, False])
def test_any_overlap_streams(overlap, normalize):
    size = {"num_filters": 2, "hidden_size": 8, "codebook_size": 16, "num_lstm_layers": 1, "sampling_rate": 2000}
    size |= {"upsampling_ratios": [4, 5], "target_bandwidths": [2.4], "normalize": normalize}
    model = make_model(EncodecConfig(**size, chunk_length_s=0.1003, overlap=overlap))
    for samples in (1, 20, 180, 199, 200, 201, 219, 220, 221, 400, 503):
        audio = noise(2, 1, samples, seed=samples)
        for sizes in ([samples - 1], [7, 100, 0, 93, 1]):
            check_codes(model, audio, through(encoder_of(model, 2), pieces_of(audio, sizes)))
        if normalize and samples in (20, 199, 221, 503):
            for counts in ([], [1] * 20, [2, 0, 5]):
                check_audio(model, audio, counts)


# ---- when what is given out is given out -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_frames_come_as_early_as_latency_says(name, small_models):
    model, encoder = small_models[name], encoder_of(small_models[name])
    config, channels = model.config, model.config.audio_channels
    assert encoder.push(torch.zeros(1, channels, encoder.start_latency - 1)).shape[2] == 0
    first = encoder.push(torch.zeros(1, channels, 1)).shape[2]
    if config.chunk_length is not None:
        assert (first, encoder.latency) == (150, 48000)
        assert encoder.push(torch.zeros(1, 2, config.chunk_stride - 1)).shape[2] == 0
        assert encoder.push(torch.zeros(1, 2, 1)).shape[2] == 150
        return
    assert first == (7 if name == "24khz" else 1)
    for _ in range(20):
        assert encoder.push(torch.zeros(1, channels, config.hop_length - 1)).shape[2] == 0
        assert encoder.push(torch.zeros(1, channels, 1)).shape[2] == 1
    # Frame t needs `latency` samples from its first one on, and no more.
    audio = noise(1, channels, encoder.start_latency + 20 * config.hop_length)
    frame = first + 10
    whole = encode(model, audio).latents[0, 0, :, frame]
    for sample, heard in ((frame * config.hop_length + encoder.latency, False), (encoder.latency - 1, True)):
        changed = audio.clone()
        changed[..., sample if not heard else frame * config.hop_length + sample] += 0.5
        moved = encode(model, changed).latents[0, 0, :, frame]
        assert torch.equal(moved, whole) != heard


@pytest.mark.parametrize("name", NAMES)
def test_audio_comes_as_early_as_latency_says(name, small_models):
    model, decoder = small_models[name], StreamingDecoder(small_models[name])
    config, count = model.config, model.config.num_quantizers
    if config.chunk_length is not None:
        given, scales = 0, torch.ones(1, 1)
        for chunk in range(3):
            given += decoder.push(torch.zeros(1, count, decoder.start_frames, dtype=torch.int64), scales).shape[2]
            assert chunk * config.chunk_stride + config.chunk_length - given == decoder.latency == 480
        return
    assert decoder.start_frames == (7 if name == "24khz" else 4)
    given = 0
    for frames in range(1, 30):
        given += decoder.push(torch.zeros(1, count, 1, dtype=torch.int64)).shape[2]
        if frames < decoder.start_frames:
            assert given == 0
        else:
            assert frames * config.hop_length - given == decoder.latency
    assert decoder.flush().shape[2] == decoder.latency


def test_low_latency_gives_a_frame_after_every_hop(small_models):
    model = small_models["24khz"]
    encoder, decoder = encoder_of(model, 1, "low_latency"), StreamingDecoder(model, 1, "low_latency")
    assert (encoder.latency, encoder.start_latency, decoder.latency, decoder.start_frames) == (320, 320, 0, 1)
    for _ in range(20):
        assert encoder.push(torch.zeros(1, 1, 319)).shape[2] == 0
        codes = encoder.push(torch.zeros(1, 1, 1))
        assert codes.shape[2] == 1 and decoder.push(codes).shape == (1, 1, 320)
    assert encoder.flush().shape[2] == decoder.flush().shape[2] == 0
    # Both are as new.
    assert encoder.push(torch.zeros(1, 1, 320)).shape[2] == 1 and decoder.push(codes).shape[2] == 320


@given(data=st.data())
@settings(QUICK, max_examples=15)
def test_low_latency_is_silence_before_the_signal(data, small_models):
    """The whole file of a model that pads with zeros, but at the very end, where the model's own padding is."""
    model = small_models["24khz"]
    silent = EncodecModel(EncodecConfig(**{**model.config.to_dict(), "pad_mode": "constant"})).eval()
    silent.load_state_dict(model.state_dict())
    sizes = draw_sizes(data, model)
    audio = noise(1, 1, sum(sizes), seed=sum(sizes))
    codes = through(encoder_of(model, 1, "low_latency"), pieces_of(audio, sizes))
    frames = audio.shape[2] // 320
    whole = encode(silent, audio)
    assert codes.shape == whole.audio_codes[0].shape
    if frames:
        expected = whole.audio_codes[0, ..., :frames]
        count_ties(model, whole.latents[0, ..., :frames], expected, codes[..., :frames])
    decoder = StreamingDecoder(model, 1, "low_latency")
    given = through(decoder, pieces_of(codes, data.draw(st.lists(st.integers(0, 9), max_size=5))))
    expected = silent.decoder(model.embed(codes))
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


def test_low_latency_is_for_causal_models(small_models):
    trimmed = EncodecConfig(**{**small_models["24khz"].config.to_dict(), "trim_right_ratio": 0.5})
    for model in (small_models["48khz"], small_models["32khz"], EncodecModel(trimmed)):
        for make in (StreamingEncoder, StreamingDecoder):
            with pytest.raises(ValueError, match="mode is 'low_latency', allowed: 'exact'"):
                make(model, mode="low_latency")


# ---- what is given out stays -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_later_changes_nothing_given_out(name, small_models):
    model = small_models[name]
    start = noise(1, model.config.audio_channels, 60001)
    given = []
    for continuation in (torch.zeros(1, model.config.audio_channels, 9000), 0.9 * torch.ones_like(start[..., :9000])):
        encoder = encoder_of(model)
        codes = encoder.push(start)
        given.append(torch.cat([codes, encoder.push(continuation)], dim=2))
        assert torch.equal(given[-1][..., : codes.shape[2]], codes)
    assert torch.equal(given[0][..., : codes.shape[2]], given[1][..., : codes.shape[2]])


def test_no_frame_of_the_steady_causal_model_depends_on_what_follows_it(small_models):
    model = small_models["24khz"]
    audio = noise(1, 1, 40 * 320).requires_grad_()
    latents = model.encoder(audio)
    for frame in (7, 8, 23):
        (gradient,) = torch.autograd.grad(latents[0, :, frame].square().sum(), audio, retain_graph=True)
        assert not gradient[..., 320 * (frame + 1) :].any() and gradient[..., 320 * (frame + 1) - 1].any()


# ---- the same to the bit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["24khz", "32khz"])
def test_blocks_of_the_whole_files_size_are_the_whole_file_to_the_bit(name, small_models):
    model = small_models[name]
    block = model.block_frames * model.encoder.hop
    for samples in (block, block + 1, 2 * block + 12345, 2 * block):
        audio, encoder = noise(1, 1, samples), encoder_of(model)
        pieces = [*audio.split(block, dim=2)]
        codes = torch.cat([*map(encoder.push, pieces[:-1]), encoder.finish(pieces[-1])], dim=2)
        assert torch.equal(codes, encode(model, audio).audio_codes[0])


@pytest.mark.parametrize("name", NAMES)
def test_finish_is_push_and_flush(name, small_models):
    model = small_models[name]
    audio = noise(2, model.config.audio_channels, 50000)
    encoder = encoder_of(model, 2)
    codes = torch.cat([encoder.push(audio[..., :20011]), encoder.finish(audio[..., 20011:])], dim=2)
    check_codes(model, audio, codes)
    again = torch.cat([encoder.push(audio[..., :20011]), encoder.finish(audio[..., 20011:])], dim=2)
    assert torch.equal(again, codes)


# ---- at full size ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_full_size_models_stream(name, released_models):
    model = released_models[name]
    audio = noise(1, model.config.audio_channels, 49000 if name == "48khz" else 26011)
    generator = torch.Generator().manual_seed(7)
    sizes = torch.randint(1, 9000, (9,), generator=generator).tolist()
    ties = check_codes(model, audio, through(encoder_of(model), pieces_of(audio, sizes)))
    assert ties <= 1
    check_audio(model, audio, torch.randint(0, 20, (9,), generator=generator).tolist())


def test_bundled_model_streams_real_audio(bundled_model, real_clip):
    audio = real_clip(24000)[..., :72000]
    sizes = torch.randint(1, 5000, (40,), generator=torch.Generator().manual_seed(7)).tolist()
    assert check_codes(bundled_model, audio, through(encoder_of(bundled_model), pieces_of(audio, sizes))) == 0
    check_audio(bundled_model, audio, [1, 9, 2, 50, 3])
