"""One update of the language model from one batch of codes.

Every random choice of an update follows from the seed and its number. The loss is the mean over all labels of the
whole batch, whatever processes and parts it is divided among.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from modeling_encodec.models.batching_encodec import to_device
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_lm_encodec import IGNORED, EncodecLM
from modeling_encodec.training.lm_configuration import LMTrainingConfig
from modeling_encodec.training.optimization import NonFiniteLoss, combine_gradients


@dataclass(frozen=True)
class Choices:
    """What chance decides in one update: bandwidth in kbps, and the position of each sequence's first frame."""

    bandwidth: float
    positions: np.ndarray


def choices_of(config: LMTrainingConfig, bandwidths: list[float], last_position: int, update: int) -> Choices:
    """The choices of update number `update` for the whole batch, equal on every process and in every run."""
    rng = np.random.default_rng([config.seed, 1, update])
    bandwidth = bandwidths[rng.integers(len(bandwidths))]
    return Choices(bandwidth, rng.integers(last_position + 1, size=config.batch_size))


class LMUpdate:
    """The language model and its optimiser. `run` does one update and returns its bits, over all processes."""

    def __init__(self, lm: EncodecLM, codec: EncodecConfig, config: LMTrainingConfig, accelerator: Accelerator):
        self.lm, self.codec, self.config, self.accelerator = lm, codec, config, accelerator
        self.parameters = list(lm.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.learning_rate, (config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        self.bandwidths = [float(bandwidth) for bandwidth in config.bandwidths or codec.target_bandwidths]
        unknown = sorted(set(self.bandwidths) - set(map(float, codec.target_bandwidths)))
        if unknown:
            raise ValueError(f"bandwidths are {self.bandwidths}, allowed: {codec.target_bandwidths}")

    def run(self, codes: torch.Tensor, update: int) -> dict[str, float]:
        """Update number `update` (from 0) with this process's share of its batch, (B, K, F) with -100 for padding, on
        the CPU if a GPU is not to be waited for.

        Raises:
            NonFiniteLoss: on every process, before weights change.
        """
        last = max(0, self.lm.config.max_positions - codes.shape[2])
        choices = choices_of(self.config, self.bandwidths, last, update)
        rank, share, device = self.accelerator.process_index, len(codes), self.accelerator.device
        positions = torch.from_numpy(choices.positions[rank * share : (rank + 1) * share])
        codes = codes[:, : self.codec.num_quantizers_for_bandwidth(choices.bandwidth)]
        parts = list(codes.chunk(self.config.accumulation_steps))
        counts = [(part != IGNORED).sum().item() for part in parts]
        total = self._sum(torch.full((), sum(counts), dtype=torch.float32, device=device))
        self.optimizer.zero_grad()
        bits = torch.zeros(codes.shape[1], dtype=torch.float32, device=device)
        for part, offset, count in zip(parts, positions.chunk(self.config.accumulation_steps), counts):
            if count:
                bits += self._part(to_device(part, device), to_device(offset, device), total)
        bits, labels = self._sum(bits), total / codes.shape[1]
        norm = combine_gradients(self.parameters, self.accelerator, self.config.max_gradient_norm, "sum")
        # Asked for together: it is the one time in an update that a GPU has to be waited for.
        loss, norm, *codebooks = torch.cat([torch.stack([bits.sum() / total, norm]), bits / labels]).tolist()
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"loss {loss:g}")
        if not math.isfinite(norm):
            raise NonFiniteLoss(f"loss {loss:g}, but the gradients' norm is {norm:g}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.config.rate_factor(update)
        self.optimizer.step()
        return {
            "loss": loss,
            **rates_of(loss, choices.bandwidth, self.codec),
            **{f"codebook/{number}": value for number, value in enumerate(codebooks)},
            "gradient_norm": norm,
        }

    def _part(self, codes: torch.Tensor, offset: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Forward and backward of a part; its bits by codebook."""
        counts = (codes != IGNORED).sum((0, 2))
        with self.accelerator.autocast():
            loss, codebook_bits = self.lm.training_bits(codes.clamp(min=0), codes, offset)
        (loss * (counts.sum() / total)).backward()
        return codebook_bits.detach().float() * counts

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, "sum") if self.accelerator.num_processes > 1 else values

    def state_dict(self) -> dict:
        """Everything that the next update depends on, besides its number and the configuration."""
        return {"model": self.lm.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Take over the state of `state_dict`."""
        self.lm.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def rates_of(bits_per_code: float, bandwidth: float, codec: EncodecConfig) -> dict[str, float]:
    """Bits per second at `bandwidth` kbps, and the part that is saved of what packed codes take."""
    codes = codec.num_quantizers_for_bandwidth(bandwidth) * codec.frame_rate
    return {
        f"bits_per_second/{bandwidth:g}": bits_per_code * codes,
        f"saving/{bandwidth:g}": 1 - bits_per_code / codec.codebook_nbits,
    }
