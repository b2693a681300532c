"""The loss balancer (paper eq. 5): a loss's weight is the share of the gradient it gets, whatever its scale."""

from collections.abc import Callable

import torch


class Balancer:
    """Combines gradients with respect to the decoder's output so that each has its weight's share of their norm.

    g = sum_i R * w_i / sum_j w_j * g_i / mean(|g_i|), where the mean runs over examples and, with decay `decay` and
    corrected for its start, over updates. One example's gradient so has a norm of about R, and a batch's is their sum.

    Args:
        weights: loss name -> weight. A loss without one takes no part.
        decay: of the running means of gradient norms.
        total_norm: R.
        enabled: without, the gradient is that of the weighted sum of the losses.
        reduce: mean of a tensor over processes, such as `accelerator.reduce(..., "mean")`; for more than one process.
    """

    def __init__(
        self,
        weights: dict[str, float],
        decay: float = 0.999,
        *,
        total_norm: float = 1.0,
        enabled: bool = True,
        reduce: Callable[[torch.Tensor], torch.Tensor] = lambda norms: norms,
    ):
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.decay, self.total_norm, self.enabled, self.reduce = decay, total_norm, enabled, reduce
        # Tensors on the losses' device: asking for their values would make a GPU wait.
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, float] = {}
        self.norms: dict[str, torch.Tensor] = {}

    def knows(self, losses) -> bool:
        """Whether each of these losses that takes part has been measured."""
        return all(name in self.sums for name in losses if name in self.weights)

    def measure(self, losses: dict[str, torch.Tensor], output: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gradient of every loss with respect to `output` (B, channels, T); their norms enter the running means.

        Collective: with several processes each calls it, with losses of the same names.
        """
        names = [name for name in losses if name in self.weights]
        gradients = {name: torch.autograd.grad(losses[name], output, retain_graph=True)[0].float() for name in names}
        norms = self.reduce(torch.stack([gradients[name].flatten(1).norm(dim=1).mean() for name in names]))
        norms = norms.to(torch.float32 if norms.device.type == "mps" else torch.float64)  # MPS has no float64
        nothing = norms.new_zeros(())
        before = torch.stack([self.sums.get(name, nothing).to(norms) for name in names])
        self.norms = dict(zip(names, norms))
        self.sums |= zip(names, before * self.decay + norms * (1 - self.decay))
        for name in names:
            self.counts[name] = self.counts.get(name, 0.0) * self.decay + (1 - self.decay)
        return gradients

    def scales(self, names) -> dict[str, float | torch.Tensor]:
        """The factor of each loss's gradient, by the running means as they are."""
        names = [name for name in names if name in self.weights]
        if not self.enabled:
            return {name: self.weights[name] for name in names}
        total = sum(self.weights[name] for name in names)
        scales = {}
        for name in names:
            mean = self.sums[name] / self.counts[name]
            scale = mean.new_full((), self.total_norm * self.weights[name] / total) / mean
            # A loss that never had a gradient has no scale yet: none is better than an endless one.
            scales[name] = torch.where(mean > 1e-12, scale, 0.0)
        return scales

    def gradient(self, losses: dict[str, torch.Tensor], output: torch.Tensor, *, measure: bool = True) -> torch.Tensor:
        """The combined gradient with respect to `output`, for `output.backward(gradient)`.

        Without `measure` the running means stay, and one pass back serves all losses instead of one for each.
        """
        if measure:
            gradients = self.measure(losses, output)
            return sum(scale * gradients[name] for name, scale in self.scales(losses).items())
        total = sum(scale * losses[name] for name, scale in self.scales(losses).items())
        return torch.autograd.grad(total, output, retain_graph=True)[0].float()

    def shares(self) -> dict[str, float]:
        """Part that each loss has of the norms in the gradient last measured (sums to 1)."""
        norms = {name: float(scale * self.norms[name]) for name, scale in self.scales(self.norms).items()}
        total = sum(norms.values()) or 1.0
        return {name: norm / total for name, norm in norms.items()}

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The running means."""
        return {"sums": {name: float(value) for name, value in self.sums.items()}, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, dict[str, float]]) -> None:
        """Take over the running means of `state_dict`."""
        sums = state["sums"].items()
        self.sums = {name: torch.tensor(value, dtype=torch.float64, device="cpu") for name, value in sums}
        self.counts = dict(state["counts"])
