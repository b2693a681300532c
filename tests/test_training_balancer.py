"""The loss balancer against a plain second implementation, under DDP and mixed precision too; the guards."""

import copy
import logging
import math

import numpy as np
import pytest
import torch
from conftest import noise
from peers import in_processes
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from modeling_encodec.training.balancer import Balancer
from modeling_encodec.training.discriminator import MultiScaleSTFTDiscriminator, windows_for
from modeling_encodec.training.guards import Guard, find_warnings
from modeling_encodec.training.losses import MelLoss, feature_loss, generator_loss


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # the original's weight norm

KINDS = ["paper", "audiocraft"]
WEIGHTS = {"waveform": 0.1, "mel": 1.0, "adversarial": 3.0, "feature": 3.0}


def small_discriminator() -> MultiScaleSTFTDiscriminator:
    torch.manual_seed(0)
    return MultiScaleSTFTDiscriminator(windows_for(24000), 3)


# ---- balancer ----------------------------------------------------------------------------------------------------


class PlainBalancer:
    """Paper eq. 5 from the whole history of norms."""

    def __init__(self, weights, decay):
        self.weights, self.decay, self.history = weights, decay, {}

    def gradient(self, losses, output):
        gradients = {}
        for name in losses:
            (gradients[name],) = torch.autograd.grad(losses[name], output, retain_graph=True)
            norm = np.mean([math.sqrt((item.numpy().astype(np.float64) ** 2).sum()) for item in gradients[name]])
            self.history.setdefault(name, []).append(norm)
        total, combined = sum(self.weights[name] for name in losses), 0
        for name, gradient in gradients.items():
            norms = self.history[name]
            powers = self.decay ** np.arange(len(norms))[::-1]
            mean = (powers * norms).sum() / powers.sum()
            combined = combined + self.weights[name] / total / mean * gradient.numpy().astype(np.float64)
        return combined


def linear_losses(output: torch.Tensor, scales: dict[str, float], seed: int) -> dict[str, torch.Tensor]:
    """Losses whose gradients are noise of these scales."""
    return {
        name: (output * scale * noise(*output.shape, seed=1000 * seed + i)).sum()
        for i, (name, scale) in enumerate(scales.items())
    }


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_balancer_equal_to_the_plain_one(decay):
    ours, plain = Balancer(WEIGHTS, decay), PlainBalancer(WEIGHTS, decay)
    for step in range(20):
        output = noise(3, 2, 100, step).requires_grad_()
        scales = {name: 10.0 ** (i * math.sin(step)) for i, name in enumerate(WEIGHTS)}
        losses = linear_losses(output, scales, step)
        losses["mel"] = losses["mel"] + output.square().mean()
        expected = plain.gradient(losses, output)
        np.testing.assert_allclose(ours.gradient(losses, output), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_shares_are_the_weights_when_nothing_changes(autocast):
    """Real losses of the same batch again and again; also measured on the combined gradient's parts."""
    discriminator, mel = small_discriminator(), MelLoss(24000)
    balancer = Balancer(WEIGHTS)
    for _ in range(3):
        output, target = noise(2, 1, 2500, 1).requires_grad_(), noise(2, 1, 2500, 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            (logits, fake), (_, real) = discriminator(output), discriminator(target)
            losses = {"waveform": F.l1_loss(output, target), "mel": mel(output, target)}
            losses |= {"adversarial": generator_loss(logits), "feature": feature_loss(real, fake, 2)}
        assert (logits[0].dtype == torch.bfloat16) == autocast
        gradient = balancer.gradient(losses, output)
        assert gradient.dtype == torch.float32
    total = sum(WEIGHTS.values())
    assert balancer.shares() == {name: pytest.approx(weight / total, abs=1e-6) for name, weight in WEIGHTS.items()}
    for name, scale in balancer.scales(losses).items():
        norms = torch.autograd.grad(losses[name] * scale, output, retain_graph=True)[0].flatten(1).norm(dim=1)
        assert norms.mean().item() == pytest.approx(WEIGHTS[name] / total, rel=2e-2 if autocast else 1e-5)


def test_shares_are_about_the_weights_when_gradients_are_random():
    balancer, shares = Balancer(WEIGHTS, 0.99), []
    generator = np.random.default_rng(0)
    for step in range(300):
        output = torch.zeros(4, 1, 300, requires_grad=True)
        directions = {name: torch.from_numpy(generator.normal(size=(4, 1, 300))).float() for name in WEIGHTS}
        balancer.gradient({name: 7 * (output * x).sum() for name, x in directions.items()}, output)
        if step >= 200:
            shares.append(balancer.shares())
    for name, weight in WEIGHTS.items():
        assert np.mean([share[name] for share in shares]) == pytest.approx(weight / sum(WEIGHTS.values()), rel=0.05)


def test_without_measuring_the_standing_means_count():
    balancer = Balancer(WEIGHTS)
    for step in range(3):
        output = noise(2, 1, 50, step).requires_grad_()
        balancer.gradient(linear_losses(output, dict.fromkeys(WEIGHTS, step + 1.0), step), output)
    before = copy.deepcopy(balancer.state_dict())
    losses = linear_losses(output, dict.fromkeys(WEIGHTS, 9.0), 9)
    gradient = balancer.gradient(losses, output, measure=False)
    expected = 0
    for name, weight in WEIGHTS.items():
        mean = before["sums"][name] / before["counts"][name]
        (own,) = torch.autograd.grad(losses[name], output, retain_graph=True)
        expected = expected + weight / sum(WEIGHTS.values()) / mean * own
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    assert balancer.state_dict() == before


@pytest.mark.parametrize("measure", [True, False])
def test_disabled_it_is_the_weighted_sum(measure):
    balancer, output = Balancer(WEIGHTS, enabled=False), noise(2, 1, 50).requires_grad_()
    losses = linear_losses(output, {"waveform": 1e-3, "mel": 10.0, "adversarial": 1.0, "feature": 3.0}, 0)
    (expected,) = torch.autograd.grad(sum(WEIGHTS[name] * losses[name] for name in losses), output, retain_graph=True)
    torch.testing.assert_close(balancer.gradient(losses, output, measure=measure), expected, rtol=1e-5, atol=1e-6)


def test_total_norm_and_losses_without_a_weight():
    balancer = Balancer({"mel": 1.0, "feature": 0.0}, total_norm=5.0)
    output = noise(3, 1, 50).requires_grad_()
    losses = linear_losses(output, {"mel": 1.0, "feature": 1.0, "other": 1.0}, 0)
    gradient = balancer.gradient(losses, output)
    assert gradient.flatten(1).norm(dim=1).mean().item() == pytest.approx(5, rel=1e-5)
    assert balancer.shares() == {"mel": 1.0}


def test_a_loss_without_gradient_takes_nothing_from_the_others():
    balancer, output = Balancer(WEIGHTS), noise(2, 1, 50).requires_grad_()
    losses = linear_losses(output, dict.fromkeys(WEIGHTS, 1.0), 0) | {"adversarial": F.relu(-output.square()).sum()}
    gradient = balancer.gradient(losses, output)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    shares = balancer.shares()
    assert shares["adversarial"] == 0 and sum(shares.values()) == pytest.approx(1)
    assert shares["feature"] == pytest.approx(3 / 4.1, rel=1e-5)


def test_a_loss_that_comes_later_has_its_share_at_once():
    balancer = Balancer(WEIGHTS)
    early = {"waveform": 1.0, "mel": 100.0}
    for _ in range(30):
        output = torch.zeros(2, 1, 50, requires_grad=True)
        balancer.gradient(linear_losses(output, early, 0), output)
    assert balancer.shares() == {"waveform": pytest.approx(0.1 / 1.1), "mel": pytest.approx(1 / 1.1)}
    late = early | {"adversarial": 1e-4, "feature": 1e3}
    balancer.gradient(linear_losses(output, late, 0), output)
    total = sum(WEIGHTS.values())
    assert balancer.shares() == {name: pytest.approx(weight / total, rel=1e-4) for name, weight in WEIGHTS.items()}


def test_balancer_goes_on_from_its_state():
    balancer, output = Balancer(WEIGHTS), noise(2, 1, 50).requires_grad_()
    for step in range(3):
        balancer.gradient(linear_losses(output, dict.fromkeys(WEIGHTS, step + 1.0), step), output)
    other = Balancer(WEIGHTS)
    other.load_state_dict(copy.deepcopy(balancer.state_dict()))
    losses = linear_losses(output, dict.fromkeys(WEIGHTS, 0.3), 7)
    assert torch.equal(balancer.gradient(losses, output), other.gradient(losses, output))
    assert other.state_dict() == balancer.state_dict()
    assert not torch.equal(Balancer(WEIGHTS).gradient(losses, output), other.gradient(losses, output))


def balanced_steps(rank: int, world: int) -> dict:
    """Three steps on a process's share of the batches; the gradients that DDP leaves, and the balancer's norms."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(1, 8, 9, padding=4), nn.ELU(), nn.Conv1d(8, 1, 9, padding=4))
    reduce = (lambda norms: norms) if world == 1 else average
    wrapped = network if world == 1 else DistributedDataParallel(network)
    discriminator, mel = small_discriminator(), MelLoss(24000)
    balancer, gradients = Balancer(WEIGHTS, 0.9, reduce=reduce), []
    for step in range(3):
        batch = (step + 1) * noise(4, 1, 2500, step)
        target = batch[rank * 4 // world : (rank + 1) * 4 // world]
        network.zero_grad()
        output = wrapped(target)
        (logits, fake), (_, real) = discriminator(output), discriminator(target)
        losses = {"waveform": F.l1_loss(output, target), "mel": mel(output, target)}
        losses |= {"adversarial": generator_loss(logits), "feature": feature_loss(real, fake, len(target))}
        output.backward(balancer.gradient(losses, output) * world)  # a sum over examples, which DDP averages
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    return {"gradients": gradients, "shares": balancer.shares()}


def average(norms: torch.Tensor) -> torch.Tensor:
    distributed.all_reduce(norms)
    return norms / distributed.get_world_size()


def balanced_steps_of_two(rank: int) -> dict:
    return balanced_steps(rank, 2)


def test_two_processes_give_the_gradient_of_one(tmp_path):
    alone, both = balanced_steps(0, 1), in_processes(balanced_steps_of_two, tmp_path)
    for result in both:
        assert result["shares"] == {name: pytest.approx(share, rel=1e-4) for name, share in alone["shares"].items()}
        for ours, expected in zip(result["gradients"], alone["gradients"]):
            for one, other in zip(ours, expected):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


# ---- guards ------------------------------------------------------------------------------------------------------

HEALTHY = {
    "means": {"discriminator_accuracy": 0.8, "level": 0.9},
    "use": [0.9, 0.5, 0.0],
    "shares": {"mel": 0.15, "adversarial": 0.35, "feature": 0.5},
    "weights": WEIGHTS,
}
FAULTS = {
    "codebook_collapse": {"use": [0.9, 0.09]},
    "discriminator_wins": {"means": {"discriminator_accuracy": 0.98, "level": 0.9}},
    "discriminator_blind": {"means": {"discriminator_accuracy": 0.505, "level": 0.9}},
    "silent_output": {"means": {"level": 0.009}},
    "shares_off": {"shares": {"mel": 0.9, "adversarial": 0.05, "feature": 0.05}},
}


def test_healthy_values_give_no_warning():
    assert list(find_warnings(**HEALTHY)) == []
    assert list(find_warnings(**HEALTHY | {"means": {"level": 1.0}, "shares": {}, "use": []})) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_gives_its_warning(name):
    assert {found for found, _ in find_warnings(**HEALTHY | FAULTS[name])} == {name}


def test_a_share_that_is_no_number_is_off():
    shares = {"mel": math.nan, "adversarial": math.nan, "feature": math.nan}
    assert [name for name, _ in find_warnings(**HEALTHY | {"shares": shares})] == ["shares_off"]


def test_a_warning_comes_again_only_after_it_went(caplog):
    caplog.set_level(logging.WARNING, "modeling_encodec.training.guards")
    guard, silent, collapsed = Guard(), ("silent_output", "a"), ("codebook_collapse", "b")
    logged = []
    for update, warnings in enumerate([[silent], [silent], [silent, collapsed], [collapsed], [silent], []]):
        caplog.clear()
        guard.report(warnings, update)
        logged.append([record.getMessage() for record in caplog.records])
    assert logged == [
        ["update 0: silent_output: a"], [], ["update 2: codebook_collapse: b"], [], ["update 4: silent_output: a"], [],
    ]  # fmt: skip
