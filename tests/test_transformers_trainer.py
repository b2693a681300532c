"""Transformers' own Trainer, and gathers from several devices, take our outputs; and what its model tests ask for."""

import copy

import pytest
import torch
import transformers
from conftest import make_model, noise
from torch.nn.parallel import scatter_gather
from transformers import Trainer, TrainingArguments

from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM


SIZE = {"num_filters": 2, "hidden_size": 16, "codebook_size": 64, "num_lstm_layers": 1}
CODECS = {
    "whole signal": EncodecConfig(**SIZE),
    "chunks": EncodecConfig.preset_48khz(**SIZE, chunk_length_s=0.02, overlap=0.1),
}
# Of the kind that Transformers tests its own class with.
TESTED = EncodecConfig(**SIZE, audio_channels=2, upsampling_ratios=[8, 4])


def arguments(folder, **options) -> TrainingArguments:
    return TrainingArguments(
        folder, per_device_eval_batch_size=2, per_device_train_batch_size=2, use_cpu=True, report_to=[], **options
    )


@pytest.mark.parametrize("name", CODECS)
def test_trainer_predicts_and_evaluates_with_the_codec(name, tmp_path):
    model = make_model(CODECS[name])
    audio = noise(5, model.config.audio_channels, 2400)
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=[{"input_values": row} for row in audio])
    predicted = trainer.predict(trainer.eval_dataset).predictions
    with torch.no_grad():
        wanted = model(audio).audio_values.numpy()
    assert (predicted[0] == wanted).all() and predicted[2].tolist() == [2400] * 5
    assert trainer.evaluate()["eval_runtime"] > 0


def test_trainer_trains_predicts_and_evaluates_the_language_model(tmp_path):
    config = EncodecLMConfig(codebook_size=64, num_codebooks=2, hidden_size=16, num_hidden_layers=1)
    lm, codes = EncodecLM(config), torch.randint(64, (5, 2, 20), generator=torch.Generator().manual_seed(0))
    rows = [{"codes": row, "labels": row} for row in codes]
    trainer = Trainer(lm, arguments(tmp_path, max_steps=2, save_steps=2), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    predicted = trainer.predict(rows)
    with torch.no_grad():
        wanted = lm.eval()(codes, labels=codes)
    assert torch.allclose(torch.from_numpy(predicted.predictions), wanted.logits, atol=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted.loss.item(), rel=0.02)


def gathered(outputs: list, monkeypatch):
    """As `nn.DataParallel` joins what its replicas return; without GPUs, by `cat` on the CPU."""

    def cat(device, dim, *tensors):
        return torch.cat([tensor[None] if tensor.dim() == 0 else tensor for tensor in tensors], dim)

    monkeypatch.setattr(scatter_gather.Gather, "apply", cat)
    return scatter_gather.gather(outputs, 0)


@pytest.mark.parametrize("name", CODECS)
@torch.no_grad()
def test_outputs_of_several_devices_are_gathered(name, monkeypatch):
    model = make_model(CODECS[name])
    audio = noise(4, model.config.audio_channels, 2400)
    whole = model(audio)
    joined = gathered([model(audio[:2]), model(audio[2:])], monkeypatch)
    assert type(joined) is type(whole) and joined.keys() == whole.keys()
    assert torch.equal(joined.audio_values, whole.audio_values)
    assert torch.equal(joined.audio_lengths, whole.audio_lengths)
    if model.config.normalize:
        assert all(map(torch.equal, joined.audio_scales, whole.audio_scales))
    for value in whole.values():
        assert isinstance(value, torch.Tensor) or all(isinstance(one, torch.Tensor) for one in value)


@torch.no_grad()
def test_language_model_outputs_of_several_devices_are_gathered(monkeypatch):
    config = EncodecLMConfig(codebook_size=64, num_codebooks=2, hidden_size=16, num_hidden_layers=2)
    lm, codes = EncodecLM(config).eval(), torch.randint(64, (4, 2, 9))
    whole = lm(codes, labels=codes)
    joined = gathered([lm(codes[:2], labels=codes[:2]), lm(codes[2:], labels=codes[2:])], monkeypatch)
    assert torch.allclose(joined.logits, whole.logits, atol=1e-5) and joined.loss.shape == (2,)
    after = lm(codes, cache=joined.cache).logits  # a cache of all rows
    assert torch.allclose(after, lm(codes, cache=whole.cache).logits, atol=1e-5)


# ---- what Transformers' tests of its own class want, in our words ------------------------------------------------


@torch.no_grad()
def test_tuples_are_those_of_stock_and_the_same_as_the_outputs():
    model, stock = make_model(TESTED), transformers.EncodecModel(transformers.EncodecConfig(**TESTED.to_dict())).eval()
    audio = noise(3, 2, 40)
    for method, given in (("encode", (audio,)), ("forward", (audio,)), ("decode", (model.encode(audio)[0], [None]))):
        output = getattr(model, method)(*given)
        plain = getattr(model, method)(*given, return_dict=False)
        theirs = getattr(stock, method)(*given)
        assert len(plain) == len(output.to_tuple()) == len(theirs.to_tuple())
        for ours, named in zip(plain, output.to_tuple(), strict=True):
            assert torch.equal(ours, named) if isinstance(ours, torch.Tensor) else ours == named
        assert output[-1] is output.to_tuple()[-1] and output[0] is output.to_tuple()[0]
    coded = model(audio, return_dict=True)
    assert torch.equal(coded[-1], coded.audio_values)


@torch.no_grad()
def test_a_row_alone_is_what_it_is_in_a_batch_with_codes_given_too():
    model = make_model(TESTED)
    audio, codes = noise(12, 2, 40), torch.randint(64, (1, 12, 1, 2), dtype=torch.int32)
    together = model(audio, audio_codes=codes, audio_scales=[None]).audio_values
    for row in range(12):
        alone = model(audio[row : row + 1], audio_codes=codes[:, row : row + 1], audio_scales=[None]).audio_values
        assert torch.equal(alone[0], together[row])
    message = "input_values have 1 rows and audio_codes 12, allowed: as many"
    with pytest.raises(ValueError, match=f"^{message}$"):
        model(audio[:1], audio_codes=codes, audio_scales=[None])


def test_every_buffer_is_set_by_init_weights():
    """Of a model made without memory: codebooks that differ from one another, and counts that belong to them. Stock's
    codebooks are all zeros, so that each code of a new model is 0."""
    with torch.device("meta"):
        model = EncodecModel(TESTED)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(float("nan"))
    model.init_weights()
    for layer in model.quantizer.layers:
        book = layer.codebook
        assert book.embed.unique(dim=0).shape == book.embed.shape and 0.8 < book.embed.std() < 1.2
        assert torch.equal(book.embed_avg, book.embed) and (book.cluster_size == 1).all() and (book.inited == 1).all()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_chunks_without_overlap_are_signals_of_their_own():
    config = copy.deepcopy(TESTED)
    whole = make_model(config)
    config.chunk_length_s, config.overlap = 64 / config.sampling_rate, 0.0
    chunked = EncodecModel(config).eval()
    chunked.load_state_dict(whole.state_dict())
    audio = noise(2, 2, 400)
    coded = chunked.encode(audio)
    for number, piece in enumerate(audio.split(64, dim=2)):
        codes = whole.encode(piece).audio_codes[0]
        assert torch.equal(coded.audio_codes[number, ..., : codes.shape[2]], codes)
    decoded = chunked.decode(**coded).audio_values
    pieces = [whole.decode(**whole.encode(piece)).audio_values for piece in audio.split(64, dim=2)]
    assert torch.allclose(decoded, torch.cat(pieces, dim=2), atol=1e-6)
