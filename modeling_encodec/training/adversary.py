"""A discriminator with its optimiser: what it says of decoded audio, and how it learns."""

from dataclasses import dataclass

import torch

from modeling_encodec.training.configuration import TrainingConfig
from modeling_encodec.training.discriminator import MultiScaleSTFTDiscriminator, windows_for
from modeling_encodec.training.losses import discriminator_loss, feature_loss, generator_loss
from modeling_encodec.training.optimization import adam


@dataclass
class Verdict:
    """What a discriminator says of one batch: the codec's losses, its own, and the part of signals it tells apart."""

    losses: dict[str, torch.Tensor]
    own_loss: torch.Tensor
    accuracy: torch.Tensor


class Adversary:
    """One multi-scale STFT discriminator in training (paper 3.4)."""

    def __init__(self, config: TrainingConfig, sampling_rate: int, device: torch.device):
        self.config = config
        with torch.device("cpu"):  # equal first weights everywhere
            network = MultiScaleSTFTDiscriminator(windows_for(sampling_rate), config.discriminator_filters)
        self.network = network.to(device)
        self.judge = torch.compile(self.network) if config.compile else self.network
        self.optimizer = adam(self.network.parameters(), config.discriminator_learning_rate, config)

    def losses(self, decoded: torch.Tensor, target: torch.Tensor, *, learn: bool, weight: float = 1.0) -> Verdict:
        """Judge `decoded` beside `target`, both (B, channels, T); with `learn` also add to the network's gradients.

        One pass over each signal serves both sides: the codec is judged by the discriminator as it is before this
        update (audiocraft updates it first and passes both signals through it again). `weight` is the part of an
        update's batch that this is.
        """
        with torch.set_grad_enabled(learn):
            real_logits, real_features = self.judge(target)
        fake_logits, fake_features = self.judge(decoded)
        own_loss = discriminator_loss(real_logits, fake_logits)
        if learn:
            (own_loss * weight).backward(inputs=list(self.network.parameters()), retain_graph=True)
        losses = {
            "adversarial": generator_loss(fake_logits, self.config.generator_loss),
            "feature": feature_loss(real_features, fake_features, len(target), self.config.feature_loss),
        }
        right = [((x > 0).float().mean() + (y < 0).float().mean()) / 2 for x, y in zip(real_logits, fake_logits)]
        return Verdict(losses, own_loss.detach(), torch.stack(right).mean().detach())

    def state_dict(self) -> dict:
        """Weights and optimiser."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Take over weights and optimiser of `state_dict`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
