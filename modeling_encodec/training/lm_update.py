"""One update of the language model from one batch of codes.

Every random choice of an update follows from the seed and its number. The loss is the mean over all labels of the
whole batch, whatever processes and parts it is divided among.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from modeling_encodec.configuration_encodec import EncodecConfig
from modeling_encodec.modeling_lm_encodec import IGNORED, EncodecLM
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
        """Update number `update` (from 0) with this process's share of its batch, (B, K, F) with -100 for padding.

        Raises:
            NonFiniteLoss: on every process, before weights change.
        """
        last = max(0, self.lm.config.max_positions - codes.shape[2])
        choices = choices_of(self.config, self.bandwidths, last, update)
        rank, share = self.accelerator.process_index, len(codes)
        positions = torch.from_numpy(choices.positions[rank * share : (rank + 1) * share]).to(codes.device)
        codes = codes[:, : self.codec.num_quantizers_for_bandwidth(choices.bandwidth)]
        total = self._sum((codes != IGNORED).sum().float())
        self.optimizer.zero_grad()
        bits = torch.zeros(codes.shape[1], dtype=torch.float32, device=codes.device)
        parts = self.config.accumulation_steps
        for part, offset in zip(codes.chunk(parts), positions.chunk(parts)):
            bits += self._part(part, offset, total)
        bits, labels = self._sum(bits), total / codes.shape[1]
        loss = (bits.sum() / total).item()
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"loss {loss:g}")
        norm = combine_gradients(self.parameters, self.accelerator, self.config.max_gradient_norm, "sum")
        if not math.isfinite(norm):
            raise NonFiniteLoss(f"loss {loss:g}, but the gradients' norm is {norm:g}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.config.rate_factor(update)
        self.optimizer.step()
        codebooks = {f"codebook/{number}": value for number, value in enumerate((bits / labels).tolist())}
        return {
            "loss": loss,
            **rates_of(loss, choices.bandwidth, self.codec),
            **codebooks,
            "gradient_norm": norm,
        }

    def _part(self, codes: torch.Tensor, offset: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Forward and backward of a part; its bits by codebook."""
        counts = (codes != IGNORED).sum((0, 2))
        if not counts.any():
            return counts.float()
        with self.accelerator.autocast():
            output = self.lm(codes.clamp(min=0), codes, position_offset=offset, return_logits=False)
        (output.loss * (counts.sum() / total)).backward()
        return output.codebook_bits.detach().float() * counts

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
