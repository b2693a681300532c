"""Whatever writes to a weight, the next call computes with it: in every mode, through every way to write."""

import pytest
import torch
from conftest import make_model, noise
from ecdc_files import make_lm

from modeling_encodec.bitstream.compression import compress
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.fingerprints import codebook_fingerprint, lm_fingerprint, model_fingerprint
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.weight_cache_encodec import WeightCache, unchanged_weights
from modeling_encodec.streaming.streams import StreamingDecoder, StreamingEncoder


TINY = {"num_filters": 2, "hidden_size": 16, "codebook_size": 64}
CONFIGS = {
    "24khz": EncodecConfig.preset_24khz(**TINY, target_bandwidths=[1.8]),
    "48khz": EncodecConfig.preset_48khz(**TINY, target_bandwidths=[1.8]),
}


def by_no_grad(tensor, new):
    with torch.no_grad():
        tensor.copy_(new)


def by_data(tensor, new):
    tensor.data.copy_(new)


def by_new_data(tensor, new):
    tensor.data = new.clone()


def by_numpy(tensor, new):
    tensor.detach().numpy()[...] = new.numpy()


def by_detach(tensor, new):
    tensor.detach().copy_(new)


def by_one_element(tensor, new):
    tensor.data.view(-1)[-1:] = new.view(-1)[-1:]


def by_order(tensor, new):
    """The same numbers in another order, which no sum would tell."""
    tensor.data.copy_(tensor.data.flip(0) if tensor.dim() > 1 else tensor.data.roll(2))


WAYS = [by_no_grad, by_data, by_new_data, by_numpy, by_detach, by_one_element, by_order]


def output(model, audio):
    with torch.no_grad():
        coded = model.encode(audio)
        return coded.audio_codes, coded.latents, model.decode(**coded).audio_values


def same(a, b) -> bool:
    return all(x is y or torch.equal(x, y) for x, y in zip(a, b))


def twin_of(model):
    """A model that has the same weights and never computed before."""
    twin = EncodecModel(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.train(model.training)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("training", [False, True])
def test_every_write_is_seen_by_the_next_call(way, name, training):
    model = make_model(CONFIGS[name]).train(training)
    audio = noise(1, model.config.audio_channels, 9000)
    before = output(model, audio)
    for tensor in [*model.parameters(), *(layer.codebook.embed for layer in model.quantizer.layers)]:
        way(tensor, -0.9 * tensor.detach())
    after = output(model, audio)
    assert not same(after, before)
    assert same(after, output(twin_of(model), audio))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_of_any_optimizer_is_seen(fused):
    model = make_model(CONFIGS["24khz"])
    audio = noise(1, 1, 9000)
    before = output(model, audio)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    coded = model.encode(audio, return_latents=True)
    (coded.latents.square().mean() + model.decoder(coded.latents[0]).square().mean()).backward()
    optimizer.step()
    after = output(model, audio)
    assert not same(after, before) and same(after, output(twin_of(model), audio))


def test_streams_see_writes_at_a_signals_beginning_and_within_a_second():
    model = make_model(CONFIGS["24khz"])
    audio = noise(1, 1, 24000)
    encoder, decoder = StreamingEncoder(model, mode="low_latency"), StreamingDecoder(model, mode="low_latency")
    old = [encoder.push(audio), decoder.push(encoder.flush())]
    for parameter in model.parameters():
        parameter.data.mul_(-0.9)
    fresh = StreamingEncoder(twin_of(model), mode="low_latency")
    assert torch.equal(encoder.push(audio), fresh.push(audio)) and not torch.equal(fresh.push(audio), old[0])

    encoder = StreamingEncoder(model, mode="low_latency")
    hops = [*audio.split(320, dim=2)]
    for hop in hops:
        encoder.push(hop)
    for parameter in model.parameters():
        parameter.data.mul_(-1.1)
    fresh = StreamingEncoder(twin_of(model), mode="low_latency")
    fresh.state = encoder.state
    assert torch.equal(encoder.push(hops[0]), fresh.push(hops[0]))


def test_a_language_models_tables_and_all_fingerprints_see_writes(small_models):
    model = twin_of(small_models["24khz"])
    audio = noise(1, 1, 12000)[0]
    lm = make_lm(model, audio)
    prints = lambda: (codebook_fingerprint(model), model_fingerprint(model), lm_fingerprint(lm))  # noqa: E731
    before, file = prints(), compress(model, audio, 3.6, lm)
    lm.integer.head.bias.data.add_(1000 * torch.arange(len(lm.integer.head.bias)) % 7000)
    assert compress(model, audio, 3.6, lm) != file
    model.decoder.layers[0].conv.bias.data.add_(1)
    model.quantizer.layers[0].codebook.embed.data.mul_(2)
    assert all(old != new for old, new in zip(before, prints()))


def test_values_are_kept_while_nothing_changes():
    cache, tensor, made = WeightCache(), torch.arange(10.0), []
    get = lambda: cache.get("sum", [tensor], lambda: made.append(1) or tensor.sum())  # noqa: E731
    assert get() is get() and len(made) == 1
    with unchanged_weights():
        kept = get()
        tensor.numpy()[0] = 5  # within one call of the codec nobody writes; it is compared once
        assert get() is kept
    assert get() == 50 and len(made) == 2
    with unchanged_weights(), unchanged_weights():
        tensor.add_(1)  # what PyTorch counts is always seen
        assert get() == 60


def test_tensors_of_any_size_and_layout_are_compared():
    for tensor in (torch.zeros(()), torch.zeros(3), torch.zeros(7)[1:], torch.zeros(4, 6).t(), torch.zeros(5).half()):
        cache = WeightCache()
        value = cache.get("", [tensor], lambda tensor=tensor: tensor.sum().item())
        tensor.detach().numpy()[...] = 2
        assert value == 0 and cache.get("", [tensor], lambda tensor=tensor: tensor.sum().item()) == 2 * tensor.numel()
