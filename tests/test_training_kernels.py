"""What is passed back through by hand, against autograd."""

import itertools

import pytest
import torch
from conftest import noise

from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.layers_encodec import EncodecResnetBlock
from modeling_encodec.models.training_kernels_encodec import residual_unit
from modeling_encodec.processors.mel import power_spectrum, rfft
from modeling_encodec.training.losses import feature_loss


def unit(**options) -> EncodecResnetBlock:
    torch.manual_seed(0)
    block = EncodecResnetBlock(EncodecConfig.preset_24khz(num_filters=4, **options), 8, 2)
    for parameter in block.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return block.train()


def passed_back(block: torch.nn.Module, x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of `block` for the loss (block(x) * weight).sum()."""
    x = x.clone().requires_grad_()
    y = block(x)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *block.parameters()])]


def nodes(y: torch.Tensor) -> set[str]:
    """Names of the nodes of the graph behind `y`."""
    found, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return {node.name() for node in found}


@pytest.mark.parametrize("samples", [5, 50])
@pytest.mark.parametrize(("causal", "shortcut"), [*itertools.product([True, False], repeat=2)])
def test_residual_unit_by_hand_is_autograds(causal, shortcut, samples):
    block = unit(use_causal_conv=causal, use_conv_shortcut=shortcut).double()
    x, weight = noise(3, 8, samples, 1).double(), noise(3, 8, samples, 2).double()
    assert "_ResidualUnitBackward" in nodes(block(x))
    by_hand = passed_back(block, x, weight)
    block.eval()
    assert "_ResidualUnitBackward" not in nodes(block(x))
    torch.testing.assert_close(by_hand, passed_back(block, x, weight), rtol=1e-12, atol=1e-12)


def test_residual_unit_in_bfloat16_is_near():
    block = unit()
    x, weight = noise(3, 8, 2000, 1), noise(3, 8, 2000, 2)
    exact = passed_back(block, x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        near = passed_back(block, x, weight)
    assert near[0].dtype == torch.bfloat16 and {tensor.dtype for tensor in near[1:]} == {torch.float32}
    for ours, other in zip(near, exact):
        assert (ours - other).norm() < 0.02 * other.norm()


def test_residual_unit_passes_gradcheck():
    def made(*shape):
        return noise(1, 1, torch.Size(shape).numel(), sum(shape)).double().view(shape).requires_grad_()

    narrow, widen, skip = (made(2, 4, 1, 3), made(2)), (made(4, 2, 1, 1), made(4)), (made(4, 4, 1, 1), made(4))
    x = made(2, 1, 9, 4)

    def call(x, *parts):
        return residual_unit(x.permute(0, 3, 1, 2), parts[:2], parts[2:4], parts[4:], 3, 2)

    assert torch.autograd.gradcheck(call, (x, *narrow, *widen, *skip))


@pytest.mark.parametrize("watched", ["block.1.conv", "block.2", "shortcut"])
def test_who_looks_into_a_residual_unit_sees_its_layers(watched):
    block, seen = unit(), []
    handle = block.get_submodule(watched).register_forward_hook(lambda module, given, made: seen.append(made.shape))
    assert "_ResidualUnitBackward" not in nodes(block(noise(1, 8, 20))) and len(seen) == 1
    handle.remove()
    assert "_ResidualUnitBackward" in nodes(block(noise(1, 8, 20)))


def test_a_signal_too_short_to_be_mirrored_goes_the_other_way():
    block = unit()
    assert "_ResidualUnitBackward" not in nodes(block(noise(1, 8, 4)))  # padded by 4


@pytest.mark.parametrize("samples", [2, 64, 63])
def test_gradient_of_a_power_spectrum_is_pytorchs(samples):
    frames, weight = noise(3, 2, samples).double().requires_grad_(), noise(3, 2, samples // 2 + 1, 1).double()
    ours, right = power_spectrum(frames), torch.fft.rfft(frames).abs().square()
    torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours, frames, weight), torch.autograd.grad(right, frames, weight), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("samples", [2, 64, 63])
def test_gradient_of_rfft_is_pytorchs(samples):
    frames = noise(3, 2, samples).double().requires_grad_()
    weight = torch.complex(noise(3, 2, samples // 2 + 1, 1), noise(3, 2, samples // 2 + 1, 2)).to(torch.complex128)
    ours, right = rfft(frames), torch.fft.rfft(frames)
    assert torch.equal(ours, right)
    torch.testing.assert_close(
        torch.autograd.grad(ours, frames, weight), torch.autograd.grad(right, frames, weight), rtol=1e-12, atol=1e-12
    )


def test_relative_features_of_bfloat16_are_those_of_float32():
    real, fake = ([[noise(2, 3, 40, seed).view(2, 3, 8, 5).bfloat16()]] for seed in (1, 2))
    fake[0][0].requires_grad_()
    wide = fake[0][0].detach().float().requires_grad_()
    loss = feature_loss(real, fake, 2)
    exact = feature_loss([[real[0][0].float()]], [[wide]], 2)
    plain = ((wide - real[0][0].float()).abs().mean((1, 2, 3)) / real[0][0].float().abs().mean((1, 2, 3))).mean()
    torch.testing.assert_close(exact, plain)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=2e-3)
    torch.testing.assert_close(
        torch.autograd.grad(loss, fake[0][0])[0].float(), torch.autograd.grad(exact, wide)[0], rtol=1e-2, atol=0
    )
