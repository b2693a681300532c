"""Compiled, exported and ONNX forms of the codec give what it gives."""

import importlib.util

import pytest
import torch
from conftest import noise
from torch._dynamo.testing import CompileCounterWithBackend

from modeling_encodec.models.onnx_export import Decoder, Encoder, export_onnx
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder


needs_onnx = pytest.mark.skipif(not importlib.util.find_spec("onnxruntime"), reason="onnxruntime is not at hand")
PRESETS = ["24khz", "48khz", "32khz"]


def slow_but(*quick: str) -> list:
    """The presets; all but these are left to `make test-all`, for an export takes most of a minute."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]


def coders(model):
    count = model.config.num_quantizers
    return Encoder(model, count).eval(), Decoder(model).eval()


def make_codes(model, batch: int, frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    shape = batch, model.config.num_quantizers, frames
    return torch.randint(0, model.config.codebook_size, shape, generator=generator)


def make_audio(model, batch: int, samples: int) -> torch.Tensor:
    return noise(batch, model.config.audio_channels, samples, seed=samples)


@pytest.mark.parametrize("name", slow_but("24khz", "48khz"))
@torch.no_grad()
def test_one_graph_serves_all_lengths(small_models, name):
    model = small_models[name]
    hop = model.config.hop_length
    lengths = [*range(3 * hop + 5, 40 * hop, 797)][:44] + [hop, hop - 1, hop + 1, 2 * hop, 2, 1]
    frames = [*range(1, 51)][::-1]
    for coder, inputs in zip(
        coders(model),
        ([make_audio(model, 1, n) for n in lengths], [make_codes(model, 1, n) for n in frames]),
    ):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(coder, fullgraph=True, dynamic=True, backend=counter)
        for given in inputs:
            torch.testing.assert_close(compiled(given)[0], coder(given)[0], atol=1e-5, rtol=0)
        assert counter.frame_count <= 3


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_exported_program(small_models, name):
    model = small_models[name]
    hop, any_size = model.config.hop_length, torch.export.Dim.DYNAMIC
    encoder, decoder = coders(model)
    for coder, make, lengths in (
        (encoder, make_audio, (10 * hop + 7, 2 * hop, hop + 1, 5 * hop - 3)),
        (decoder, make_codes, (11, 2, 30)),
    ):
        shapes = ({0: any_size, 2: any_size},)
        program = torch.export.export(coder, (make(model, 2, lengths[0]),), dynamic_shapes=shapes).module()
        for batch, length in zip((1, 2, 3, 1), lengths):
            given = make(model, batch, length)
            torch.testing.assert_close(program(given)[0], coder(given)[0], atol=1e-5, rtol=0)


@needs_onnx
@pytest.mark.parametrize("name", slow_but("24khz"))
@torch.no_grad()
def test_onnx(small_models, tmp_path, name):
    import onnxruntime

    model = small_models[name]
    hop = model.config.hop_length
    sessions = {path.stem: onnxruntime.InferenceSession(path) for path in export_onnx(model, tmp_path)}
    encoder, decoder = coders(model)
    for batch, length in ((1, 1), (2, 3 * hop), (1, 5 * hop + 7)):
        audio = make_audio(model, batch, length)
        codes = torch.from_numpy(sessions["encoder"].run(None, {"audio": audio.numpy()})[0])
        assert torch.equal(codes, encoder(audio)[0])
    for batch, frames in ((1, 1), (2, 3), (1, 17)):
        codes = make_codes(model, batch, frames)
        audio = torch.from_numpy(sessions["decoder"].run(None, {"codes": codes.numpy()})[0])
        torch.testing.assert_close(audio, decoder(codes)[0], atol=1e-4, rtol=0)
    assert ("encoder_step" in sessions) == (model.config.norm_type != "time_group_norm")
    if "encoder_step" not in sessions:
        return
    for coder, kind, make in ((encoder, "encoder", make_audio), (decoder, "decoder", make_codes)):
        net, session = coder.net, sessions[f"{kind}_step"]
        signal = make(model, 3, net.start + 5 * net.hop)
        first = signal[..., : net.start]
        _, state = net.step(first if kind == "encoder" else model.quantizer.decode(first.transpose(0, 1)), end=False)
        given = [part.numpy() for part in state]
        for piece in signal[..., net.start :].split(net.hop, dim=2):
            expected, *state = coder(piece, *state)
            names = [slot.name for slot in session.get_inputs()]
            output, *given = session.run(None, dict(zip(names, [piece.numpy(), *given])))
            torch.testing.assert_close(torch.from_numpy(output), expected, atol=1e-4, rtol=0)


@needs_onnx
@torch.no_grad()
def test_codebooks_that_are_not_there_are_refused_before_anything_is_written(small_models, tmp_path):
    pytest.importorskip("onnxscript")
    for count in (0, 99):
        with pytest.raises(ValueError, match=f"num_quantizers is {count}, allowed: 1 to 8"):
            export_onnx(small_models["24khz"], tmp_path / "onnx", count)
    assert not (tmp_path / "onnx").exists()


def test_streams_by_onnx_steps_are_the_same(small_models, tmp_path):
    model, other = small_models["24khz"], small_models["32khz"]
    export_onnx(model, tmp_path, 4)
    audio = make_audio(model, 3, 20 * 320 + 50)
    whole = model.encode(audio, num_quantizers=4)
    paths = {kind: tmp_path / f"{kind}_step.onnx" for kind in ("encoder", "decoder")}
    for mode in ("exact", "low_latency"):
        given = {}
        for by_onnx in (False, True):
            steps = {kind: {"onnx_step": path if by_onnx else None} for kind, path in paths.items()}
            encoder = StreamingEncoder(model, batch_size=3, mode=mode, num_quantizers=4, **steps["encoder"])
            decoder = StreamingDecoder(model, 3, mode, **steps["decoder"])
            codes = [encoder.push(piece) for piece in audio.split(320, dim=2)] + [encoder.flush()]
            heard = [decoder.push(part[..., at : at + 1]) for part in codes for at in range(part.shape[2])]
            given[by_onnx] = torch.cat(codes, 2), torch.cat([*heard, decoder.flush()], 2)
        assert torch.equal(given[True][0], given[False][0])
        torch.testing.assert_close(given[True][1], given[False][1], rtol=0, atol=1e-5)
        if mode == "exact":
            assert torch.equal(given[True][0], whole.audio_codes[0])
    with pytest.raises(ValueError, match="is a step of"):
        StreamingEncoder(model, num_quantizers=3, onnx_step=paths["encoder"])
    with pytest.raises(ValueError, match="is a step of"):
        StreamingDecoder(other, onnx_step=paths["decoder"])
    with pytest.raises(ValueError, match="is a step of"):
        StreamingDecoder(model, onnx_step=paths["encoder"])


@torch.no_grad()
def test_tracing_is_refused_by_name(small_models, lms, tmp_path):
    """It would give the example's codes for every clip, and fail for other lengths."""
    model, lm = small_models["24khz"], lms["24khz"]
    audio, codes = make_audio(model, 1, 5000), make_codes(model, 1, 9)
    encoder, decoder = coders(model)
    for traced, given in (
        (encoder, audio),
        (decoder, codes),
        (model, audio),
        (lambda x: model.encode(x).audio_codes, audio),
        (lambda x: model.decode(x[None]).audio_values, codes),
        (lambda x: model.quantize(x, 2), model.encoder(audio)),
        (lambda x: model.quantizer(x, 2).latents, model.encoder(audio)),
        (model.encoder, audio),
        (model.decoder, model.embed(codes)),
        (lambda x: lm(x).logits, codes),
        (lambda x: lm.frequencies(x)[0], codes),
    ):
        with pytest.raises(RuntimeError, match=r"^torch.jit.trace of .* allowed: torch.export.export"):
            torch.jit.trace(traced, given, check_trace=False)
    with pytest.raises(RuntimeError, match=r"^torch.jit.trace of .* dynamo=True"):
        torch.onnx.export(encoder, (audio,), tmp_path / "encoder.onnx", dynamo=False)
    assert encoder(audio)[0].shape == (1, model.config.num_quantizers, 16)
