"""`precision = "fast"`: bfloat16 where the device has it, near to exact; and exact is exact again afterwards."""

import pytest
import torch
from conftest import noise

from modeling_encodec.models import modeling_encodec
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder


NAMES = ["24khz", "48khz", "32khz"]


@pytest.fixture(autouse=True)
def has_bfloat16(monkeypatch):
    """Also on machines where it is slow."""
    monkeypatch.setattr(modeling_encodec, "has_bfloat16", lambda device: True)


@pytest.fixture
def model(request, small_models):
    model = small_models[request.param]
    yield model
    model.precision = "exact"


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    return ((given - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("model", NAMES, indirect=True)
@torch.no_grad()
def test_fast_is_near_and_exact_comes_back(model):
    audio = noise(2, model.config.audio_channels, model.config.sampling_rate + 700)
    exact = model.encode(audio, return_latents=True)
    sound = model.decode(**exact).audio_values
    model.precision = "fast"
    fast, heard = model.encode(audio, return_latents=True), model.decode(**exact).audio_values
    assert 1e-5 < relative_error(fast.latents, exact.latents) < 0.05  # other than exact, or nothing was tested
    assert 1e-5 < relative_error(heard, sound) < 0.05 and heard.dtype == torch.float32
    assert (fast.audio_codes == exact.audio_codes).float().mean() > 0.7
    model.precision = "exact"
    assert torch.equal(model.encode(audio).audio_codes, exact.audio_codes)
    assert torch.equal(model.decode(**exact).audio_values, sound)


@pytest.mark.parametrize("model", NAMES, indirect=True)
@torch.no_grad()
def test_fast_streams_are_near_fast_files(model):
    model.precision = "fast"
    audio = noise(1, model.config.audio_channels, 3 * model.config.sampling_rate // 2)
    encoder, decoder = StreamingEncoder(model), StreamingDecoder(model)
    heard = []
    for piece in [*audio.split(1000, dim=2), None]:
        codes = encoder.flush() if piece is None else encoder.push(piece)
        heard.append(decoder.push(codes, encoder.scales))
    heard = torch.cat([*heard, decoder.flush()], 2)[..., : audio.shape[2]]
    model.precision = "exact"
    assert relative_error(heard, model.decode(**model.encode(audio)).audio_values) < 0.7  # some codes are others


@pytest.mark.parametrize("model", ["24khz"], indirect=True)
def test_gradients_are_exact(model):
    audio = noise(1, 1, 3200)
    expected = model.encode(audio, return_latents=True).latents
    model.precision = "fast"
    latents = model.encode(audio, return_latents=True).latents
    assert torch.equal(latents, expected) and latents.requires_grad


@pytest.mark.parametrize("model", ["24khz"], indirect=True)
@torch.no_grad()
def test_where_bfloat16_is_slow_fast_is_exact(model, monkeypatch):
    audio = noise(1, 1, 5000)
    expected = model.encode(audio).audio_codes
    monkeypatch.setattr(modeling_encodec, "has_bfloat16", lambda device: False)
    model.precision = "fast"
    assert model.compute_dtype == torch.float32 and torch.equal(model.encode(audio).audio_codes, expected)


@pytest.mark.parametrize("model", ["24khz"], indirect=True)
def test_other_precisions_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="precision is 'bf16', allowed: exact, fast"):
        model.precision = "bf16"
    model.precision = "fast"
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).precision == "exact"  # a setting of the object alone


@pytest.mark.parametrize("model", ["24khz"], indirect=True)
def test_a_streams_state_belongs_to_its_precision(model, tmp_path):
    StreamingEncoder(model).save(tmp_path / "state")
    model.precision = "fast"
    with pytest.raises(ValueError, match="is the state of"):
        StreamingEncoder(model).restore(tmp_path / "state")
