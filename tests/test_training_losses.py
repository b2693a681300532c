"""Discriminator, losses and mel distance, each against the original or a plain second implementation."""

import math

import numpy as np
import pytest
import torch
from conftest import noise
from discriminator_mapping import discriminator_from_original, discriminator_to_original
from hypothesis import given, settings
from hypothesis import strategies as st
from peers import import_encodec, original_discriminator
from torch.nn import functional as F

from modeling_encodec.evaluation.metrics import mel_distance
from modeling_encodec.processors.mel import MelSpectrogram
from modeling_encodec.training.adversary import Adversary
from modeling_encodec.training.configuration import TrainingConfig
from modeling_encodec.training.discriminator import MultiScaleSTFTDiscriminator, windows_for
from modeling_encodec.training.losses import MelLoss, discriminator_loss, feature_loss, generator_loss


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # the original's weight norm

KINDS = ["paper", "audiocraft", "log"]
WEIGHTS = {"waveform": 0.1, "mel": 1.0, "adversarial": 3.0, "feature": 3.0}


def make_discriminator(rate: int = 24000, filters: int = 4, seed: int = 0) -> MultiScaleSTFTDiscriminator:
    torch.manual_seed(seed)
    discriminator = MultiScaleSTFTDiscriminator(windows_for(rate), filters)
    for parameter in discriminator.parameters():  # also those that start at a norm's value
        parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
    return discriminator


# ---- the discriminator -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def msstftd():
    return import_encodec("encodec.msstftd") or pytest.skip("the encodec package is not installed")


@pytest.mark.parametrize(("rate", "channels", "filters", "samples"), [(24000, 1, 32, 6001), (48000, 2, 4, 9999)])
def test_discriminator_equal_to_the_original(rate, channels, filters, samples, msstftd):
    ours = make_discriminator(rate, filters)
    original = original_discriminator(ours)
    sides, gradients = [noise(2, channels, samples).requires_grad_() for _ in range(2)], []
    for discriminator, audio in ((ours, sides[0]), (original, sides[1])):
        rows = audio if discriminator is ours else audio.reshape(-1, 1, samples)  # each channel on its own
        logits, features = discriminator(rows)
        gradients.append((logits, features))
        total = sum((x * torch.cos(torch.arange(float(x[0].numel()))).view(x[0].shape)).mean() for x in logits)
        (total + sum(x.square().mean() for scale in features for x in scale)).backward()
    (our_logits, our_features), (logits, features) = gradients
    assert len(our_logits) == 5 and [len(scale) for scale in our_features] == [5] * 5
    torch.testing.assert_close(our_logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(our_features, features, rtol=1e-4, atol=1e-5)
    expected = {name: parameter.grad for name, parameter in original.named_parameters()}
    expected |= {name: tensor for name, tensor in original.state_dict().items() if name.endswith("window")}
    expected = discriminator_from_original(expected, ours.windows)
    for name, parameter in ours.named_parameters():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4 * scale, msg=name)
    scale = sides[1].grad.abs().max().item()
    torch.testing.assert_close(sides[0].grad, sides[1].grad, rtol=1e-3, atol=1e-4 * scale)


def test_discriminator_sizes():
    """The numbers of facts.md, section 4."""
    discriminator = MultiScaleSTFTDiscriminator()
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 472_330
    with torch.no_grad():
        logits, _ = discriminator(noise(1, 1, 24000))
    assert [tuple(x.shape[2:]) for x in logits] == [(43, 129), (90, 65), (184, 33), (372, 17), (747, 9)]
    assert windows_for(48000) == (4096, 2048, 1024, 512, 256)
    with pytest.raises(ValueError, match="2047 samples, allowed: at least 2048"):
        discriminator(torch.zeros(1, 1, 2047))
    discriminator(torch.zeros(1, 1, 2048))


def test_discriminator_weights_there_and_back(msstftd):
    ours = make_discriminator(48000)
    state = discriminator_to_original(ours.state_dict(), ours.windows)
    assert set(state) == set(original_discriminator(ours).state_dict())
    back = discriminator_from_original(state, ours.windows)
    assert set(back) == set(ours.state_dict())
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items())


def test_discriminator_weights_that_do_not_fit_are_refused():
    windows = windows_for(24000)
    ours = make_discriminator().state_dict()
    original = discriminator_to_original(ours)
    for convert, state in ((discriminator_from_original, original), (discriminator_to_original, ours)):
        name = next(name for name in state if "convs.3" in name)
        with pytest.raises(ValueError, match=f"missing: {name}"):
            convert({key: tensor for key, tensor in state.items() if key != name})
        with pytest.raises(ValueError, match="unexpected: extra"):
            convert(state | {"extra": torch.zeros(1)})
        with pytest.raises(ValueError, match=rf"of another shape: {name} \(7,\), allowed: \("):
            convert(state | {name: torch.zeros(7)})
        with pytest.raises(ValueError, match=r"unexpected: discriminators.4.*convs"):
            convert(state, windows[:4])
        with pytest.raises(ValueError, match="missing: discriminators.0"):
            convert({})
    with pytest.raises(ValueError, match=r"window \(2048,\), allowed: \(1024,\)"):
        discriminator_from_original(original, (1024, 2048, *windows[2:]))


def test_discriminator_learns():
    """Tones from noise, within 60 steps."""
    config = TrainingConfig(discriminator_filters=4, discriminator_learning_rate=2e-3)
    torch.manual_seed(0)
    adversary, time = Adversary(config, 24000, torch.device("cpu")), torch.arange(2400) / 24000
    for step in range(60):
        pitch = 100 + 1500 * torch.rand(2, 1, 1, generator=torch.Generator().manual_seed(step))
        verdict = adversary.losses(
            noise(2, 1, 2400, seed=step).requires_grad_(), 0.3 * torch.sin(2 * torch.pi * pitch * time), learn=True
        )
        adversary.optimizer.step()
        adversary.optimizer.zero_grad()
    assert verdict.accuracy > 0.75 and verdict.own_loss < 1.2


# ---- adversarial losses and feature matching ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged():
    """Stereo: (logits, features) of the discriminator for 3 real and 3 decoded examples, by name."""
    discriminator = make_discriminator(filters=3)
    with torch.no_grad():
        return {"real": discriminator(5 * noise(3, 2, 3000, 1)), "fake": discriminator(5 * noise(3, 2, 3000, 2))}


def test_adversarial_losses_by_the_formula(judged):
    real, fake = ([5 * x for x in judged[name][0]] for name in ("real", "fake"))
    hinge = np.mean([np.maximum(0, 1 - x.numpy()).mean() for x in fake])
    assert generator_loss(fake).item() == pytest.approx(hinge, rel=1e-5)
    assert generator_loss(fake, "linear").item() == pytest.approx(np.mean([-x.numpy().mean() for x in fake]), rel=1e-5)
    own = [np.maximum(0, 1 - x.numpy()).mean() + np.maximum(0, 1 + y.numpy()).mean() for x, y in zip(real, fake)]
    assert discriminator_loss(real, fake).item() == pytest.approx(np.mean(own), rel=1e-5)
    assert generator_loss([torch.full((2, 1, 3, 4), 1.5)]) == 0
    assert discriminator_loss([torch.full((2, 1, 3, 4), 1.5)], [torch.full((2, 1, 3, 4), -0.5)]) == 0.5


def test_feature_loss_by_the_formula(judged):
    relative, absolute = [], []
    for scale, other in zip(judged["real"][1], judged["fake"][1]):
        for x, y in zip(scale, other):
            x, y = x.numpy().reshape(3, -1), y.numpy().reshape(3, -1)  # two channels each
            relative += [np.abs(a - b).mean() / np.abs(a).mean() for a, b in zip(x, y)]
            absolute.append(np.abs(x - y).mean())
    real, fake = judged["real"][1], judged["fake"][1]
    assert feature_loss(real, fake, 3).item() == pytest.approx(np.mean(relative), rel=1e-5)
    assert feature_loss(real, fake, 3, "absolute").item() == pytest.approx(np.mean(absolute), rel=1e-5)
    assert feature_loss(real, real, 3) == 0


def test_feature_loss_pulls_on_the_decoded_side_alone_and_silence_does_no_harm():
    real = [[torch.zeros(2, 3, 4, 5), torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))]]
    real[0][1].requires_grad_()
    fake = [[x.detach().clone().requires_grad_() for x in real[0]]]
    loss = feature_loss(real, fake, 2)
    loss.backward()
    assert loss == 0 and real[0][1].grad is None and all(torch.isfinite(x.grad).all() for x in fake[0])


# ---- mel ---------------------------------------------------------------------------------------------------------


def plain_mel(audio: np.ndarray, rate: int, window: int, lowest: float, bands: int = 64) -> np.ndarray:
    """(T,) to (frames, bands), from the definitions."""
    hop, side = window // 4, (window - window // 4) // 2
    audio = np.pad(audio.astype(np.float64), (0, max(0, side + 1 - len(audio))))
    audio = np.concatenate([audio[side:0:-1], audio, audio[-2 : -side - 2 : -1]])
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    hann /= np.sqrt((hann**2).sum())
    frames = []
    for start in range(0, max(1, math.ceil((len(audio) - window) / hop) + 1) * hop, hop):
        piece = audio[start : start + window]
        frames.append(np.abs(np.fft.rfft(np.pad(piece, (0, window - len(piece))) * hann)) ** 2)
    frequencies = np.arange(window // 2 + 1) * rate / window
    low, high = (2595 * np.log10(1 + f / 700) for f in (lowest, rate / 2))
    corners = 700 * (10 ** (np.linspace(low, high, bands + 2) / 2595) - 1)
    filters = []
    for left, centre, right in zip(corners, corners[1:], corners[2:]):
        triangle = np.minimum((frequencies - left) / (centre - left), (right - frequencies) / (right - centre))
        filters.append(np.maximum(0, triangle))
    return np.array(frames) @ np.array(filters).T


def plain_mel_loss(decoded: np.ndarray, target: np.ndarray, rate: int, kind: str) -> float:
    exponents = {"paper": range(5, 12), "audiocraft": range(6, 11), "log": range(6, 12)}[kind]
    terms = []
    for exponent in exponents:
        settings = 2**exponent, 64 if kind == "audiocraft" else 0, 5 * 2 ** (exponent - 6) if kind == "log" else 64
        pairs = []
        for example in zip(decoded, target):
            pairs.append([np.stack([plain_mel(channel, rate, *settings) for channel in x]) for x in example])
        if kind == "log":
            terms.append(np.mean([np.abs(np.log10(a + 1e-8) - np.log10(b + 1e-8)).mean() for a, b in pairs]))
            continue
        terms.append(np.mean([np.abs(a - b).mean() for a, b in pairs]))
        if kind == "audiocraft":
            terms.append(np.mean([((np.log10(a + 1e-5) - np.log10(b + 1e-5)) ** 2).mean() for a, b in pairs]))
        else:
            terms.append(np.mean([np.sqrt(((a - b) ** 2).mean()) for a, b in pairs]))
    return float(np.mean(terms))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rate", "channels"), [(24000, 1), (48000, 2)])
@pytest.mark.parametrize("samples", [1, 100, 769, 4801])
def test_mel_loss_by_the_definition(kind, rate, channels, samples):
    decoded, target = noise(2, channels, samples, 1), noise(2, channels, samples, 2)
    expected = plain_mel_loss(decoded.numpy(), target.numpy(), rate, kind)
    assert MelLoss(rate, kind)(decoded, target).item() == pytest.approx(expected, rel=1e-4)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(samples=st.integers(1, 5000), exponent=st.integers(5, 11))
def test_mel_spectrogram_of_any_length(samples, exponent):
    audio = noise(1, 1, samples, samples)
    mel = MelSpectrogram(24000, 2**exponent)(audio)
    expected = plain_mel(audio[0, 0].numpy(), 24000, 2**exponent, 0)
    np.testing.assert_allclose(mel[0, 0].numpy(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["equal", "silence", "near"])
def test_mel_gradients_are_finite(kind, case):
    target = torch.zeros(2, 1, 3000) if case == "silence" else noise(2, 1, 3000)
    decoded = (target + (1e-12 if case == "near" else 0)).requires_grad_()
    loss = MelLoss(24000, kind)
    assert kind == "log" or (loss.scales[0].filters == 0).all(0).any()  # bands without a bin
    loss(decoded, target).backward()
    assert torch.isfinite(decoded.grad).all()
    assert decoded.grad.abs().max() < 1e-3  # nothing to pull at


@pytest.mark.parametrize("kind", KINDS)
def test_mel_loss_is_float32_under_autocast(kind):
    decoded, target, loss = noise(1, 1, 3000, 1), noise(1, 1, 3000, 2), MelLoss(24000, kind)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(decoded, target)
    assert value.dtype == torch.float32 and torch.equal(value, loss(decoded, target))


# ---- a batch is the mean of its examples -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KINDS, "hinge", "linear", "discriminator", "relative", "absolute", "waveform"])
def test_a_batchs_loss_and_gradient_are_the_means_of_its_examples(name):
    discriminator = make_discriminator(filters=3)
    loudness = torch.tensor([0.1, 1.0, 5.0]).view(-1, 1, 1)
    decoded, target = loudness * noise(3, 2, 2500, 1), loudness * noise(3, 2, 2500, 2)

    def loss(decoded, target):
        if name in KINDS:
            return MelLoss(24000, name)(decoded, target)
        if name == "waveform":
            return F.l1_loss(decoded, target)
        (logits, features), (real_logits, real_features) = discriminator(decoded), discriminator(target)
        if name == "discriminator":
            return discriminator_loss(real_logits, logits)
        if name in ("hinge", "linear"):
            return generator_loss(logits, name)
        return feature_loss(real_features, features, len(target), name)

    leaf = decoded.clone().requires_grad_()
    whole = loss(leaf, target)
    whole.backward()
    single = decoded.clone().requires_grad_()
    parts = torch.stack([loss(single[i : i + 1], target[i : i + 1]) for i in range(3)]).mean()
    parts.backward()
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=0)
    torch.testing.assert_close(leaf.grad, single.grad, rtol=1e-3, atol=1e-5 * leaf.grad.abs().max().item())


# ---- mel distance ------------------------------------------------------------------------------------------------


def test_mel_distance():
    signal, other = noise(2, 1, 9000, 1), noise(2, 1, 9000, 2)
    assert (mel_distance(signal, signal, 24000) == 0).all()
    there, back = mel_distance(signal, other, 24000), mel_distance(other, signal, 24000)
    assert there.shape == (2, 1) and torch.equal(there, back) and (there > 0).all()
    far = [mel_distance(signal, signal + level * other, 24000).mean().item() for level in (1e-3, 1e-2, 0.1, 1)]
    assert far == sorted(far) and far[0] > 0
    powers = [np.log10(np.maximum(plain_mel(x[0, 0].numpy(), 24000, 2**i, 0), 1e-5)) for i in range(5, 12)
              for x in (signal, other)]  # fmt: skip
    expected = np.mean([np.abs(a - b).mean() for a, b in zip(powers[::2], powers[1::2])])
    assert there[0, 0].item() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match=r"\(2, 1, 9000\) and \(2, 1, 8999\)"):
        mel_distance(signal, signal[..., 1:], 24000)


def test_other_numbers_of_scales_or_maps_are_refused():
    maps = [[torch.randn(2, 3, 4, 5, requires_grad=True) for _ in range(5)] for _ in range(3)]
    assert feature_loss(maps, maps, 2) == 0
    for fake in (maps[:2], [*maps, maps[0]], [maps[0][:4], *maps[1:]], []):
        with pytest.raises(ValueError, match=r"fake has .* feature maps, .* allowed: as many as real, \[5, 5, 5\]"):
            feature_loss(maps, fake, 2)
    logits = [torch.randn(2, 1, 3, 3) for _ in range(3)]
    for fake in (logits[:2], []):
        with pytest.raises(ValueError, match=f"fake has {len(fake)} scales, allowed: as many as real, 3"):
            discriminator_loss(logits, fake)
    with pytest.raises(ValueError, match="fake has 0 scales, allowed: as many as real, 0, not 0"):
        discriminator_loss([], [])
