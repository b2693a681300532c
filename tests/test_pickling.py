"""Models, processors and streams as values: pickled, copied, saved by `torch.save`, sent to another process."""

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from conftest import clip, noise
from torch import nn
from torch.utils.data import DataLoader

from modeling_encodec import EncodecProcessor
from modeling_encodec.models.fingerprints import lm_fingerprint, stream_fingerprint
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.processors.code_vocabulary import CodeVocabulary
from modeling_encodec.processors.dataset_tokenization import CodecDetokenizer, CodecTokenizer
from modeling_encodec.processors.feature_extraction_encodec import EncodecFeatureExtractor
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder
from modeling_encodec.training.discriminator import MultiScaleSTFTDiscriminator


def through_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


def through_torch_save(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"pickle": through_pickle, "torch.save": through_torch_save, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["24khz", "48khz", "32khz"])
@torch.no_grad()
def test_a_model_comes_back_as_it_was(small_models, name, way):
    audio = clip(small_models[name], 0.3)[None]
    for used in (False, True):
        model = copy.deepcopy(small_models[name])
        model.encoder.requires_grad_(False)
        model.decoder.train()
        model.precision = "fast"
        model.config.note = "kept"
        model.mine = {"a": 1}
        if used:
            model.encode(audio)
        again = WAYS[way](model)
        model.precision = again.precision
        assert again.precision == "fast" and again.mine == {"a": 1} and again.config.note == "kept"
        assert stream_fingerprint(again) == stream_fingerprint(model)
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
        assert [part.training for part in again.modules()] == [part.training for part in model.modules()]
        assert not {id(p) for p in again.parameters()} & {id(p) for p in model.parameters()}
        assert torch.equal(again.encode(audio).audio_codes, model.encode(audio).audio_codes)
        optimizer = torch.optim.SGD(again.train().decoder.parameters(), 0.1)
        with torch.enable_grad():
            again.decode(**again.encode(audio)).audio_values.square().sum().backward()
        optimizer.step()
        assert stream_fingerprint(again) != stream_fingerprint(model)


def test_a_model_in_another_dtype_or_under_other_defaults(small_models):
    half = copy.deepcopy(small_models["24khz"]).to(torch.bfloat16)
    sent = pickle.dumps(half)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        again = pickle.loads(sent)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    state, ours = again.state_dict(), half.state_dict()
    assert state.keys() == ours.keys()
    for name, tensor in ours.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor)


def test_what_a_configuration_does_not_make_is_refused_by_name(small_models):
    model = copy.deepcopy(small_models["24khz"])
    model.decoder.layers[0].conv = nn.Sequential(model.decoder.layers[0].conv)  # as an adapter wraps a layer
    with pytest.raises(pickle.PicklingError, match=r"other parts than it was made with \(at 'decoder.layers.0.conv"):
        pickle.dumps(model)
    hooked = copy.deepcopy(small_models["24khz"])
    hooked.encoder.register_forward_hook(print)
    with pytest.raises(pickle.PicklingError, match=r"has hooks \(at 'encoder'\)"):
        pickle.dumps(hooked)
    assert copy.deepcopy(hooked).encoder._forward_hooks  # copies keep them


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_stream_goes_on_where_it_was(small_models, way):
    for name, mode in (("24khz", "exact"), ("24khz", "low_latency"), ("48khz", "exact"), ("32khz", "exact")):
        model = small_models[name]
        audio = torch.cat([clip(model, 1.4, seed)[None] for seed in (1, 2)])
        encoder, decoder = StreamingEncoder(model, batch_size=2, mode=mode), StreamingDecoder(model, 2, mode)
        decoder.push(encoder.push(audio[..., :50000]), encoder.scales)
        others = WAYS[way](encoder), WAYS[way](decoder)
        for ours, theirs in zip((encoder, decoder), others):
            assert all(map(torch.equal, ours.state.tensors().values(), theirs.state.tensors().values()))
        assert torch.equal(others[1].lengths, decoder.lengths)
        codes = encoder.finish(audio[..., 50000:])
        assert torch.equal(others[0].finish(audio[..., 50000:]), codes)
        assert torch.equal(others[1].finish(codes, others[0].scales), decoder.finish(codes, encoder.scales))


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_everything_else_comes_back(small_models, lms, way):
    model, lm, send = small_models["24khz"], lms["24khz"], WAYS[way]
    audio = clip(model, 0.3)
    processor = EncodecProcessor.for_model(model, bandwidth=1.8)
    ids = processor(audio, 24000)["input_ids"]
    assert torch.equal(send(processor)(audio, 24000)["input_ids"], ids)
    assert torch.equal(send(processor).decode(ids)[0], processor.decode(ids)[0])
    for thing in (EncodecFeatureExtractor.for_model(model.config), CodeVocabulary.for_model(model.config, 2)):
        assert str(send(thing)) == str(thing)
    assert send(model.config).to_dict() == model.config.to_dict()
    assert lm_fingerprint(send(lm)) == lm_fingerprint(lm)
    codes = model.encode(audio[None]).audio_codes[0]
    lm.frequencies(codes)  # used
    assert torch.equal(send(lm).frequencies(codes)[0], lm.frequencies(codes)[0])
    row = {"audio": [{"array": audio[0].numpy(), "sampling_rate": 24000}]}
    tokens = CodecTokenizer(model, 1.8)(row)
    assert (send(CodecTokenizer(model, 1.8))(row)["codes"][0] == tokens["codes"][0]).all()
    assert send(CodecDetokenizer(model, form="array"))(tokens)["audio"][0]["array"].shape == audio.shape
    judge = MultiScaleSTFTDiscriminator((256, 128), filters=2, slope=0.3)
    for one in (judge, judge.discriminators[0]):
        theirs, ours = send(one)(audio[None])[0], one(audio[None])[0]
        assert all(map(torch.equal, theirs, ours))
    for output in (model.encode(audio[None]), model(audio[None]), lm(codes)):
        assert send(output).keys() == output.keys()


def bits_of(thing) -> str:
    """Run in a spawned process."""
    if isinstance(thing, EncodecModel):
        return stream_fingerprint(thing)
    return stream_fingerprint(thing.model)


@pytest.mark.slow
def test_models_processors_and_streams_go_to_a_spawned_process(small_models):
    model = small_models["24khz"]
    things = [model, StreamingEncoder(model)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.map(bits_of, things) == [stream_fingerprint(model)] * 2
    processor = EncodecProcessor.for_model(model, bandwidth=1.8)
    rows = [noise(1, 1, 2400)[0, 0]] * 2
    loader = DataLoader(rows, batch_size=2, num_workers=1, multiprocessing_context=context, collate_fn=processor)
    (batch,) = loader
    assert torch.equal(batch["input_ids"], processor(rows)["input_ids"])
