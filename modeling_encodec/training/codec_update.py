"""One update of codec, codebooks and discriminator from one batch: the paper's training step.

Every random choice of an update follows from the seed and its number, so a run can be taken up anywhere. Processes
exchange four things, each in a call that all of them make every time: gradient norms (balancer), losses, gradients,
codebook statistics. Gradients are averaged here, in one flat message, and not by DistributedDataParallel: codec and
discriminator learn from one graph that is passed back several times, which its hooks do not follow.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.quantization_encodec import CodebookStatistics
from modeling_encodec.training.adversary import Adversary
from modeling_encodec.training.balancer import Balancer
from modeling_encodec.training.configuration import TrainingConfig
from modeling_encodec.training.discriminator import windows_for
from modeling_encodec.training.losses import MelLoss
from modeling_encodec.training.optimization import NonFiniteLoss, adam, combine_gradients


@dataclass(frozen=True)
class Choices:
    """What chance decides in one update: bandwidth in kbps, whether the discriminator learns, revival's seed, and how
    far into the examples the stretch begins that is judged, from 0 to 1."""

    bandwidth: float
    discriminator_learns: bool
    codebook_seed: int
    judged_from: float


def choices_of(config: TrainingConfig, bandwidths: list[float], update: int) -> Choices:
    """The choices of update number `update`, equal on every process and in every run with this seed."""
    rng = np.random.default_rng([config.seed, 1, update])
    bandwidth = bandwidths[rng.integers(len(bandwidths))]
    learns = rng.random() < config.discriminator_chance
    return Choices(bandwidth, bool(learns), int(rng.integers(2**63 - 1)), rng.random())


class CodecUpdate:
    """The codec and all that trains it (paper 3.2 and 3.4). `run` does one update and returns its losses, means over
    all processes."""

    def __init__(self, model: EncodecModel, config: TrainingConfig, accelerator: Accelerator):
        self.model, self.config, self.accelerator = model, config, accelerator
        model.encoder.requires_grad_(config.freeze != "encoder")
        model.decoder.requires_grad_(config.freeze != "decoder")
        self.encoder = torch.compile(model.encoder) if config.compile else model.encoder
        self.decoder = torch.compile(model.decoder) if config.compile else model.decoder
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = adam(self.parameters, config.learning_rate, config)
        self.mel_loss = MelLoss(model.config.sampling_rate, config.mel_loss).to(accelerator.device)
        weights = {
            "waveform": config.waveform_weight,
            "mel": config.mel_weight,
            "adversarial": config.adversarial_weight,
            "feature": config.feature_weight,
        }
        self.balancer = Balancer(weights, config.balancer_decay, enabled=config.balancer, reduce=self._mean)
        self.bandwidths = [float(bandwidth) for bandwidth in config.bandwidths or model.config.target_bandwidths]
        unknown = sorted(set(self.bandwidths) - set(map(float, model.config.target_bandwidths)))
        if unknown:
            raise ValueError(f"bandwidths are {self.bandwidths}, allowed: {model.config.target_bandwidths}")
        # How often codes were really used, as a running mean: for the log and the guards.
        shape = model.config.num_quantizers, model.config.codebook_size
        self.code_counts = torch.zeros(shape, dtype=torch.float32, device=accelerator.device)
        names = self.bandwidths if config.discriminators == "per_bandwidth" else ["all"]
        rate = model.config.sampling_rate
        self.adversaries = {}
        if config.adversarial_weight or config.feature_weight:
            self.adversaries = {str(name): Adversary(config, rate, accelerator.device) for name in names}
            shortest = max(windows_for(rate)) / rate
            name = "segment_seconds" if config.discriminator_seconds is None else "discriminator_seconds"
            if getattr(config, name) < shortest:
                raise ValueError(
                    f"{name} is {getattr(config, name)}, allowed: at least {shortest:.3f}, "
                    "the discriminators' longest window"
                )

    # ---- one update ----------------------------------------------------------------------------------------------

    def run(self, audio: torch.Tensor, update: int) -> dict[str, float]:
        """Update number `update` (from 0) with this process's share of its batch, (B, channels, T).

        Raises:
            NonFiniteLoss: on every process, before weights and codebooks change.
        """
        choices = choices_of(self.config, self.bandwidths, update)
        adversary = self._adversary(choices.bandwidth, update)
        learns = adversary is not None and choices.discriminator_learns
        self.optimizer.zero_grad()
        parts = audio.chunk(self.config.accumulation_steps)
        results = []
        for number, part in enumerate(parts):
            results.append(self._part(part, choices, adversary, learns, number, update))
        steps = [(self.optimizer, self.parameters, self.config.max_gradient_norm)]
        if learns:
            steps.append((adversary.optimizer, list(adversary.network.parameters()), None))
        norms = [combine_gradients(parameters, self.accelerator, limit) for _, parameters, limit in steps]
        losses, norms = self._values([losses for losses, _ in results], norms)
        self._set_rates(update)
        for optimizer, _, _ in steps:
            optimizer.step()
            optimizer.zero_grad()
        self._update_codebooks([statistics for _, statistics in results], choices)
        return losses | {"gradient_norm": norms[0], "bandwidth": choices.bandwidth}

    def _values(self, parts: list[dict], norms: list[torch.Tensor]) -> tuple[dict[str, float], list[float]]:
        """Means of the parts' losses over all processes, and the norms of gradients, as numbers, if all are finite.

        They are asked for together: it is the one time in an update that a GPU has to be waited for.
        """
        names = list(parts[0])
        means = self._mean(torch.stack([torch.stack([losses[name] for name in names]) for losses in parts]).mean(0))
        values = torch.cat([means, torch.stack(norms)]).tolist()
        means, norms = values[: len(names)], values[len(names) :]
        if not all(map(math.isfinite, means)):
            raise NonFiniteLoss("losses are " + ", ".join(f"{name} {mean:g}" for name, mean in zip(names, means)))
        if not all(map(math.isfinite, norms)):
            raise NonFiniteLoss(f"losses are finite, but norms of gradients {norms}")
        return dict(zip(names, means)), norms

    def _part(self, audio, choices, adversary, learns, number, update):
        """Forward and backward for one of the parts that a batch is accumulated from."""
        weight = 1 / self.config.accumulation_steps
        with self.accelerator.autocast():
            decoded, commitment, statistics = self.code(audio, choices.bandwidth)
        # Losses look at the audio as a leaf: the balancer asks for gradients there, and the codec is passed back once.
        leaf = decoded.detach().requires_grad_()
        losses = {"waveform": F.l1_loss(leaf, audio), "mel": self.mel_loss(leaf, audio)}
        logged = dict(losses)
        if adversary is not None:
            with self.accelerator.autocast():
                judged = self._judged(audio.shape[2], choices)
                verdict = adversary.losses(leaf[..., judged], audio[..., judged], learn=learns, weight=weight)
            if update >= self.config.adversarial_start:
                losses |= verdict.losses
            logged |= verdict.losses | {"discriminator": verdict.own_loss, "discriminator_accuracy": verdict.accuracy}
        # The running means learn from the first part; what follows then takes one pass back instead of four.
        due = update % self.config.balancer_every == 0 or not self.balancer.knows(losses)
        gradient = self.balancer.gradient(losses, leaf, measure=number == 0 and due)
        # A balanced batch's gradient is the sum of its examples' and no mean: undo the processes' averaging.
        factor = self.accelerator.num_processes if self.balancer.enabled else weight
        outputs, gradients = [decoded], [gradient * factor]
        if commitment.requires_grad:
            outputs.append(commitment.mean() * (self.config.commitment_weight * weight))
            gradients.append(None)
        torch.autograd.backward(outputs, gradients)
        logged |= {"commitment": commitment.mean(), "level": _level(leaf, audio)}
        return {name: value.detach().float() for name, value in logged.items()}, statistics

    def code(self, audio: torch.Tensor, bandwidth: float) -> tuple[torch.Tensor, torch.Tensor, CodebookStatistics]:
        """Audio (B, channels, T) through the codec as it trains: decoded audio, commitment losses (K,), statistics.

        A training example is one chunk, divided by its loudness if the model normalises (paper 3.1).
        """
        with torch.set_grad_enabled(self.config.freeze != "encoder"):
            latents, scale = self._latents(audio)
        quantized = self.model.quantizer(
            latents,
            self.model.config.num_quantizers_for_bandwidth(bandwidth),
            upstream=self.config.upstream_quantizer,
        )
        decoded = self.decoder(quantized.latents)[..., : audio.shape[2]].float()
        decoded = decoded if scale is None else decoded * scale
        return decoded, quantized.commitment_losses, quantized.statistics

    def _latents(self, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Latents (B, D, F) of audio and the loudness (B, 1, 1) it was divided by, if the model normalises."""
        # Without gradients weights are folded and kept, which a compiler would trace again and again.
        encoder = self.encoder if torch.is_grad_enabled() else self.model.encoder
        if not self.model.config.normalize:
            return encoder(audio), None
        scale = 1e-8 + audio.mean(1, keepdim=True).square().mean(2, keepdim=True).sqrt()
        return encoder(audio / scale), scale

    def start_codebooks(self, batches: list[torch.Tensor], first: int = 0) -> None:
        """Start codebooks from `first` on by k-means over the latents of `batches` of every process."""
        self.model.eval()
        parts = [part for audio in batches for part in audio.chunk(self.config.accumulation_steps)]
        with torch.no_grad():
            latents = [self._latents(part)[0] for part in parts]
        self.model.train()
        self.model.quantizer.start_codebooks(
            torch.cat(latents),
            first=first,
            iterations=self.config.kmeans_iterations,
            batches=len(batches),
            generator=torch.Generator("cpu").manual_seed(self.config.seed),
        )

    def _judged(self, samples: int, choices: Choices) -> slice:
        """The stretch of each example that the discriminator sees."""
        seconds = self.config.discriminator_seconds
        length = samples if seconds is None else min(samples, round(seconds * self.model.config.sampling_rate))
        start = int(choices.judged_from * (samples - length + 1))
        return slice(start, start + length)

    def _adversary(self, bandwidth: float, update: int) -> Adversary | None:
        """The discriminator that judges this update, if they are in play yet."""
        if update < self.config.adversarial_start - self.config.discriminator_warmup:
            return None
        return self.adversaries.get("all") or self.adversaries.get(str(bandwidth))

    def _update_codebooks(self, statistics: list[CodebookStatistics], choices: Choices) -> None:
        if self.config.freeze != "none":  # codes keep their meaning for the part that is kept
            counts = self._mean(sum(item.counts for item in statistics))
        else:
            counts = self.model.quantizer.update_codebooks(
                statistics,
                decay=self.config.codebook_decay,
                dead_code_threshold=0 if self.config.upstream_quantizer else self.config.dead_code_threshold,
                generator=torch.Generator("cpu").manual_seed(choices.codebook_seed),
            )
        self.code_counts[: len(counts)].lerp_(counts, 1 - self.config.codebook_decay)

    def _set_rates(self, update: int) -> None:
        """Learning rates of this update: a rise over the warm-up, then a cosine down to `decay_to`."""
        config, factor = self.config, self.config.rate_factor(update)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        for adversary in self.adversaries.values():
            for group in adversary.optimizer.param_groups:
                group["lr"] = config.discriminator_learning_rate * factor

    def _mean(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, "mean") if self.accelerator.num_processes > 1 else values

    # ---- what a checkpoint keeps ---------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Everything that the next update depends on, besides its number and the configuration."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "balancer": self.balancer.state_dict(),
            "code_counts": self.code_counts,
            "adversaries": {name: adversary.state_dict() for name, adversary in self.adversaries.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over the state of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.balancer.load_state_dict(state["balancer"])
        self.code_counts.copy_(state["code_counts"])
        for name, adversary in self.adversaries.items():
            adversary.load_state_dict(state["adversaries"][name])


def _level(decoded: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
    """Mean over the examples of the decoded signal's level relative to the original's, each counted as 10 at most."""
    ours, theirs = (x.flatten(1).norm(dim=1) for x in (decoded, audio))
    return (ours / theirs.clamp(min=1e-8)).clamp(max=10).mean()
