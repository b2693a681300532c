"""Models that are loaded onto a GPU, in whatever way and dtype, and what programs set for all of PyTorch."""

import copy

import pytest
import torch
from conftest import make_model, noise
from devices import assert_near, assert_on, assert_same_codes, full_float32, ragged
from lm_models import make_codes, make_integer_lm, make_lm, shifted

from modeling_encodec import EncodecLM, EncodecModel
from modeling_encodec.conversion import verification
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.onnx_export import Decoder, Encoder
from modeling_encodec.processors.audio_tokens import decode_tokens, encode_clips
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder


pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_models):
    place = tmp_path_factory.mktemp("models")
    for name, model in small_models.items():
        model.save_pretrained(place / name)
    make_integer_lm().save_pretrained(place / "lm")
    return place


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["cuda", {"": "cuda:0"}, "auto", {"": 0}])
@pytest.mark.parametrize("name", ["24khz", "48khz"])
def test_device_map(folder, small_models, device, name, device_map):
    model = EncodecModel.from_pretrained(folder / name, device_map=device_map).eval()
    assert_on("cuda:0", *model.state_dict().values())
    audio, mask = ragged([5000, 3000], model.config.audio_channels)
    coded = model.encode(audio, mask)
    assert_same_codes(coded.audio_codes, small_models[name].encode(audio, mask).audio_codes)
    model.decode(**coded)


@torch.no_grad()
def test_device_map_lays_lstm_weights_in_one_piece(folder, device):
    if device.real:
        pytest.skip("noted by the pretended device")
    model = EncodecModel.from_pretrained(folder / "24khz", device_map="cuda").eval()
    model.encode(noise(1, 1, 5000))
    assert not device.counts.notes


@pytest.mark.parametrize("way", ["device_map", "to", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "float16"])
@torch.no_grad()
def test_half_precision(folder, small_models, dtype, way):
    audio = noise(2, 1, 5000)
    options = {"device_map": "cuda"} if way == "device_map" else {}
    model = EncodecModel.from_pretrained(folder / "24khz", dtype=dtype, **options).eval()
    model = model if options else model.cuda() if way == "cuda" else model.to("cuda")
    wanted = torch.float16 if dtype == "float16" else dtype
    assert model.dtype == wanted
    assert model.quantizer.layers[0].codebook.embed.dtype == torch.float32
    coded = model.encode(audio.to("cuda"))
    agreed = (coded.audio_codes.cpu() == small_models["24khz"].encode(audio).audio_codes).float().mean()
    assert agreed > 0.5
    assert model.decode(**coded).audio_values.dtype == wanted


@torch.no_grad()
def test_saved_there_and_loaded_here(folder, small_models, tmp_path):
    model = EncodecModel.from_pretrained(folder / "24khz").eval().to("cuda")
    model.save_pretrained(tmp_path / "there")
    again = EncodecModel.from_pretrained(tmp_path / "there").eval()
    for name, tensor in small_models["24khz"].state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True)
    again.load_state_dict(state)
    model.load_state_dict(small_models["24khz"].state_dict())  # from the CPU, in place
    assert_on("cuda:0", *model.state_dict().values())


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"device_map": "cuda"}, {"dtype": torch.bfloat16}])
def test_language_model(folder, options):
    lm = EncodecLM.from_pretrained(folder / "lm", **options).eval().to("cuda")
    expected = EncodecLM.from_pretrained(folder / "lm").eval()
    previous = shifted(make_codes(expected))
    assert torch.equal(lm.frequencies(previous)[0].cpu(), expected.frequencies(previous)[0])


@pytest.fixture(params=["call", pytest.param("block", marks=pytest.mark.slow)])
def default_device(request, device):
    """`torch.set_default_device("cuda")`, as some programs have it."""
    if request.param == "block":
        with torch.device("cuda"):
            yield
        return
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


class TestDefaultDevice:
    @torch.no_grad()
    @pytest.mark.parametrize("name", ["24khz", "48khz", "32khz"])
    @pytest.mark.parametrize("where", ["cuda", "cpu"])
    def test_codec(self, small_models, default_device, name, where):
        with torch.device("cpu"):
            audio, mask = ragged([60000, 3000], small_models[name].config.audio_channels)
            expected = small_models[name].encode(audio, mask)
        model = copy.deepcopy(small_models[name]).to(where)
        coded = model.encode(audio.to(where), mask.to(where))
        assert_same_codes(coded.audio_codes, expected.audio_codes)
        model.decode(**coded)
        model(audio[:1])

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["24khz", "48khz"])
    @pytest.mark.parametrize("where", ["cuda", "cpu"])
    def test_streams(self, small_models, default_device, name, where):
        model = copy.deepcopy(small_models[name]).to(where)
        with torch.device("cpu"):
            audio = noise(2, model.config.audio_channels, 70000)
        encoder, decoder = StreamingEncoder(model, batch_size=2), StreamingDecoder(model, batch_size=2)
        for piece in audio.to(where).split(30000, dim=2):
            decoder.push(encoder.push(piece), *([encoder.scales] if model.config.normalize else []))
        decoder.push(encoder.flush(), *([encoder.scales] if model.config.normalize else []))
        decoder.flush([1])

    @pytest.mark.parametrize("where", ["cuda", "cpu"])
    def test_language_model(self, default_device, where):
        with torch.device("cpu"):
            lm = make_integer_lm()
            codes = make_codes(lm)
            whole = lm.frequencies(shifted(codes))[0]
        there = copy.deepcopy(lm).to(where)
        there(codes, codes).loss.backward()
        assert torch.equal(there.frequencies(shifted(codes))[0].cpu(), whole)
        there.quantize(codes)

    @pytest.mark.parametrize("name", ["24khz", "48khz"])
    @pytest.mark.parametrize("where", ["cuda", "cpu"])
    def test_tokens(self, small_models, default_device, name, where):
        model = copy.deepcopy(small_models[name]).to(where)
        with torch.device("cpu"):
            clips = [noise(1, model.config.audio_channels, 60000)[0].numpy()]
            expected = encode_clips(small_models[name], clips, 2)
        ours = encode_clips(model, clips, 2)
        assert_same_codes(ours[0].codes, expected[0].codes)
        decode_tokens(model, ours)

    def test_loading_and_files(self, folder, default_device, run, tmp_path):
        model = EncodecModel.from_pretrained(folder / "24khz")
        model.save_pretrained(tmp_path / "again")
        EncodecLM.from_pretrained(folder / "lm")

    @torch.no_grad()
    def test_conversion_is_verified(self, default_device):
        with torch.device("cpu"):
            model = make_model(EncodecConfig.preset_24khz(num_filters=4, hidden_size=16, codebook_size=64))
        assert "codes equal" in str(verification.compare_with_transformers(model))


@torch.no_grad()
def test_conversion_is_verified_there(small_models):
    for name in ("24khz", "48khz"):
        found = verification.compare_with_transformers(copy.deepcopy(small_models[name]).to("cuda"))
        assert "codes equal" in str(found)


@torch.no_grad()
@pytest.mark.parametrize("default", ["cpu", "cuda"])
def test_conversion_of_language_models_is_verified_there(default):
    lm = make_lm(zero_past_key=True)
    with torch.device(default):
        assert "probabilities" in str(verification.compare_with_original_steps(lm))
        assert "probabilities" in str(verification.compare_with_original_steps(lm.to("cuda")))


@torch.no_grad()
def test_modules_for_export(small_models):
    model = small_models["24khz"]
    there = copy.deepcopy(model).to("cuda")
    audio = noise(2, 1, 4000)
    with full_float32():  # one graph sets nothing for itself
        codes, expected = (Encoder(one, 2).eval()(audio.to(one.device)) for one in (there, model))
        assert_same_codes(codes[0], expected[0])
        sound, expected_sound = (Decoder(one).eval()(expected[0].to(one.device)) for one in (there, model))
    assert_near(sound[0], expected_sound[0])
