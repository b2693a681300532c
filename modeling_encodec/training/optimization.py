"""What an update does to weights, whatever the losses: gradients over processes, averaged weights."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import nn

from modeling_encodec.training.options import RunConfig


class NonFiniteLoss(ArithmeticError):
    """A loss is NaN or infinite; the weights are still those from before the update."""


def adam(parameters: Iterable[nn.Parameter], rate: float, config: RunConfig) -> torch.optim.Adam:
    """Adam with the decays of `config`; on a CPU in one pass over each parameter, which takes a third of the time."""
    parameters = list(parameters)
    on_cpu = all(parameter.device.type == "cpu" for parameter in parameters)
    return torch.optim.Adam(parameters, rate, (config.beta1, config.beta2), fused=on_cpu or None)


class Averages:
    """Running means of a model's state, which are saved and evaluated in place of it; none with decay 0."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.restart()

    def restart(self) -> None:
        """Begin anew with the state as it is."""
        self.state = _copy(self.model) if self.decay else None

    def update(self) -> None:
        """Take in the state as it is after an update."""
        if self.state is not None:
            torch._foreach_lerp_(list(self.state.values()), list(self.model.state_dict().values()), 1 - self.decay)

    def weights(self) -> dict[str, torch.Tensor]:
        """What is saved."""
        return self.state or self.model.state_dict()

    def load(self, state: dict | None) -> None:
        """Take over `state`."""
        if self.state is not None:
            for name, tensor in self.state.items():
                tensor.copy_(state[name])

    def __enter__(self):
        """The model in `eval` mode, with these weights, for a block."""
        self.model.eval()
        if self.state is not None:
            self.trained = _copy(self.model)
            self.model.load_state_dict(self.state)

    def __exit__(self, *error):
        if self.state is not None:
            self.model.load_state_dict(self.trained)
        self.model.train()


def combine_gradients(
    parameters: list[nn.Parameter], accelerator: Accelerator, max_norm: float | None, reduction: str = "mean"
) -> torch.Tensor:
    """Average (or sum) gradients over processes, in one flat message, and scale them down to `max_norm`.

    Returns their norm before that, a tensor of no dimensions where the gradients are.
    """
    if accelerator.num_processes > 1:
        flat = accelerator.reduce(torch.cat([parameter.grad.flatten() for parameter in parameters]), reduction)
        for parameter, gradient in zip(parameters, flat.split([parameter.numel() for parameter in parameters])):
            parameter.grad.copy_(gradient.view_as(parameter))
    norm = nn.utils.get_total_norm(parameter.grad for parameter in parameters if parameter.grad is not None)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
