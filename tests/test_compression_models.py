"""`.ecdc` version 1: the models a file needs, changed, wrong, of other types, and by their names."""

import copy
import io
import logging
from dataclasses import replace

import pytest
import torch
from conftest import clip, make_model, noise
from ecdc_files import LM_SIZE, container_items, make_lm, refused, spoil

from modeling_encodec.bitstream import compression
from modeling_encodec.bitstream.codes_file import EcdcReader
from modeling_encodec.bitstream.compression import compress, decompress
from modeling_encodec.bitstream.container import read_header, write_header
from modeling_encodec.checkpoints import BUNDLED_LM
from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.models.fingerprints import codebook_fingerprint, lm_fingerprint, model_fingerprint
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM


def test_wrong_models_are_named_and_refused(small_models, lms, file_24khz):
    model, lm = small_models["24khz"], lms["24khz"]
    other = make_model(model.config, seed=9)
    with refused(match=f"'unnamed' .fingerprint {model_fingerprint(model)}.*{model_fingerprint(other)}"):
        decompress(file_24khz, other, lm)
    with refused(match=f"{model_fingerprint(small_models['32khz'])}"):
        decompress(file_24khz, small_models["32khz"], lm)
    with refused(match="language model 'unnamed', and none is given"):
        list(EcdcReader(io.BytesIO(file_24khz)).read(model))
    sure = make_lm(model, loud=3.0)
    with refused(match=f"language model 'unnamed' .fingerprint {lm_fingerprint(lm)}.*{lm_fingerprint(sure)}"):
        decompress(file_24khz, model, sure)
    with refused(ValueError, match="float alone.*quantize"):
        decompress(file_24khz, model, EncodecLM(EncodecLMConfig.for_codec(model.config, **LM_SIZE)))


def test_a_change_of_the_decoder_alone_is_seen(small_models, lms, file_24khz):
    changed = copy.deepcopy(small_models["24khz"])
    decompress(file_24khz, changed, lms["24khz"], strict=True)
    with torch.no_grad():
        next(changed.decoder.parameters()).view(-1)[0] += 1e-3
    assert codebook_fingerprint(changed) == codebook_fingerprint(small_models["24khz"])
    with refused(match=r"fingerprint .*another decoder or settings \(in torch.float32\); other_decoder"):
        decompress(file_24khz, changed, lms["24khz"])
    audio, _ = decompress(file_24khz, changed, lms["24khz"], other_decoder=True)
    expected, _ = decompress(file_24khz, small_models["24khz"], lms["24khz"])
    assert audio.shape == expected.shape and not torch.equal(audio, expected)
    with refused(match="fingerprint"):  # other codebooks are another matter
        decompress(file_24khz, make_model(changed.config, seed=9), lms["24khz"], other_decoder=True)
    encoder = copy.deepcopy(small_models["24khz"])
    with torch.no_grad():
        next(encoder.encoder.parameters()).view(-1)[0] += 1e-3
    decompress(file_24khz, encoder, lms["24khz"], strict=True)  # decoding needs no encoder


def test_language_models_that_cannot_code_are_refused_before_the_work(small_models, lms, monkeypatch):
    model, audio = small_models["24khz"], noise(1, 1, 5000)[0]
    size = LM_SIZE | {"codec_fingerprint": codebook_fingerprint(model)}

    def quantized(config):
        return EncodecLM(config).quantize(torch.randint(config.codebook_size, (1, config.num_codebooks, 9)))

    few = quantized(EncodecLMConfig.for_codec(model.config, **size, num_codebooks=4))
    with refused(ValueError, match="has 4 codebooks of 64, allowed: at least 8 of 64"):
        compress(model, audio, 3.6, few)
    assert decompress(compress(model, audio, 1.8, few), model, few, strict=True)[0].shape == (1, 5000)
    monkeypatch.setattr(EncodecModel, "encode", lambda *_, **__: pytest.fail("encoded"))
    with refused(ValueError, match="float alone.*quantize"):
        compress(model, audio, 0.9, EncodecLM(EncodecLMConfig.for_codec(model.config, **size)))
    with refused(ValueError, match="codebooks of 32, allowed.*of 64"):
        compress(model, audio, 0.9, quantized(EncodecLMConfig.for_codec(model.config, **size | {"codebook_size": 32})))
    with refused(ValueError, match=f"trained on the codec {codebook_fingerprint(small_models['32khz'])}"):
        compress(model, audio, 0.9, lms["32khz"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"version": 2}, "version is 2, allowed: 0 or 1"), ({"segment_seconds": 0}, "segment_seconds is 0")]
    + [({"segment_seconds": float("nan")}, "segment_seconds is nan"), ({"model_name": "\ud800"}, "model_name")],
)
def test_bad_options(options, message, small_models):
    with refused(ValueError, match=message):
        compress(small_models["24khz"], noise(1, 1, 900)[0], **options)


def test_bad_choice_of_concealment(small_models, file_24khz):
    with refused(ValueError, match="conceal is 'noise', allowed: silence, repeat"):
        decompress(file_24khz, small_models["24khz"], conceal="noise")


def test_weights_replaced_where_others_lay_change_the_fingerprint(small_models):
    """Memory that is given back is given out again, at the same address."""
    model = copy.deepcopy(small_models["24khz"])
    codebook = model.quantizer.layers[0].codebook
    for turn in range(40):
        codebook.embed = torch.full((64, 16), float(turn))
        before = codebook_fingerprint(model)
        address, codebook.embed, others = codebook.embed.data_ptr(), None, []
        while (new := torch.full((64, 16), turn + 0.5)).data_ptr() != address and len(others) < 50:
            others.append(new)
        codebook.embed = new
        assert codebook_fingerprint(model) != before, turn


def test_models_made_in_inference_mode(small_models, lms):
    audio = noise(1, 1, 3000)[0]
    with torch.inference_mode():
        model, lm = copy.deepcopy(small_models["24khz"]), copy.deepcopy(lms["24khz"])
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        data = compress(model, audio, 0.9, lm)
    assert data == compress(small_models["24khz"], audio, 0.9, lms["24khz"])


@torch.no_grad()
def test_half_precision(small_models, lms, file_24khz, tmp_path):
    """Its codes come back to it. Rounding makes another decoder, which is seen; codebooks stay as they are."""
    audio = clip(small_models["24khz"], 1.0)
    small_models["24khz"].save_pretrained(tmp_path)
    loaded = EncodecModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    moved = copy.deepcopy(small_models["24khz"]).to(torch.bfloat16)
    lm = copy.deepcopy(lms["24khz"]).to(torch.bfloat16)
    assert lm_fingerprint(lm) == lm_fingerprint(lms["24khz"]) and model_fingerprint(loaded) == model_fingerprint(moved)
    assert codebook_fingerprint(moved) == codebook_fingerprint(small_models["24khz"])
    data = compress(moved, audio, 3.6, lm, segment_seconds=0.3)
    decoded, _ = decompress(data, loaded, lms["24khz"], strict=True)
    assert torch.equal(decoded, moved.decode(**moved.encode(audio[None], bandwidth=3.6)).audio_values[0].to(decoded))
    for conceal in ("silence", "repeat"):
        assert decompress(spoil(data, 1), moved, lm, conceal=conceal)[0].isfinite().all()
    for file, model in ((file_24khz, moved), (data, small_models["24khz"])):
        with refused(match="fingerprint"):
            decompress(file, model, lm)


def test_models_by_their_names(bundled_model, monkeypatch, tmp_path):
    audio = noise(1, 1, 12000)[0]
    lm = make_lm(bundled_model, audio)
    data = compress(bundled_model, audio, 6.0, lm, lm_name=BUNDLED_LM)
    header, items = container_items(data)
    assert (header.model_name, header.lm_name) == ("encodec_24khz_c16", BUNDLED_LM) and items[0].coded_with_lm
    lm.save_pretrained(tmp_path / BUNDLED_LM)
    monkeypatch.setattr(compression, "lm_checkpoint_for", lambda name: str(tmp_path / name))
    assert torch.equal(decompress(data)[0], decompress(data, bundled_model, lm)[0])
    assert compress(bundled_model, audio, 6.0, EncodecLM.from_pretrained(tmp_path / BUNDLED_LM)) == data
    monkeypatch.undo()
    other = compress(bundled_model, audio, 6.0, lm, lm_name="somebody's")
    with refused(ValueError, match=f"somebody's.*known: {BUNDLED_LM}"):
        decompress(other)
    with refused(ValueError, match="'somebody's', known: encodec_24khz_c16|known: encodec_24khz_c16"):
        decompress(compress(bundled_model, audio, 6.0, model_name="somebody's"))
    assert torch.equal(decompress(other, lm=lm)[0], decompress(data, bundled_model, lm)[0])


def test_version_0_with_a_language_model(small_models, caplog):
    model, audio = small_models["24khz"], clip(small_models["24khz"], 0.5)
    lm = make_lm(model, audio, zero_past_key=True)
    data = compress(model, audio, 0.9, lm, version=0)
    assert data[4] == 0 and "version 1 files do not" in caplog.records[-1].getMessage()
    caplog.clear()
    assert torch.equal(decompress(data, model, lm)[0], decompress(compress(model, audio, 0.9), model)[0])
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    with refused(match="none is given"):
        decompress(data, model)


def test_another_version_of_the_integer_form_is_refused(small_models, lms, file_24khz):
    later = copy.deepcopy(lms["24khz"])
    later.integer.form.fill_(2)
    assert lm_fingerprint(later) != lm_fingerprint(lms["24khz"])
    with refused(ValueError, match="integer form is version 2, allowed: 1"):
        compress(small_models["24khz"], noise(1, 1, 5000)[0], 3.6, later)


@torch.no_grad()
def test_a_model_that_normalises_whole_signals():
    """It has one scale, which every segment carries."""
    size = {"num_filters": 2, "hidden_size": 16, "num_lstm_layers": 1, "codebook_size": 16}
    model = make_model(EncodecConfig.preset_24khz(**size, target_bandwidths=[0.6], normalize=True))
    audio = noise(1, 1, 60_000)[0]
    data = compress(model, audio, segment_seconds=1.0)
    coded = model.encode(audio[None])
    assert torch.equal(decompress(data, model, strict=True)[0], model.decode(**coded).audio_values[0])
    found = []
    decompress(spoil(data, 0), model, on_damage=found.append)
    assert len(found) == 1


def test_a_default_device_changes_nothing(lms):
    previous = torch.full((1, 4, 3), -1)
    expected, _ = lms["24khz"].frequencies(previous)
    fresh = copy.deepcopy(lms["24khz"])
    with torch.device("meta"):
        found, _ = fresh.frequencies(previous)
    assert torch.equal(found, expected)


def test_a_length_that_few_segments_claim(small_models):
    """A file may say what it likes: what is made up for what it lacks is bounded by what it has."""
    model = small_models["24khz"]
    data = compress(model, noise(1, 1, 5000)[0], 3.6, segment_seconds=0.05)
    header = read_header(io.BytesIO(data))
    longer = io.BytesIO()
    write_header(longer, replace(header, audio_length=2**30))
    longer.write(data[data.index(b"\xec\x5e") :])
    with refused(match="44739.* s of audio are missing and only 0.2[0-9] s could be read, allowed"):
        decompress(longer.getvalue(), model, on_damage=lambda damage: None)
