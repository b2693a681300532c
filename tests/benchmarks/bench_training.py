"""Speed of training beside the plainest faithful loop over the `encodec` package's modules, as a ratio within one run.

    python tests/benchmarks/bench_training.py [--batch 16] [--threads 2] [--accumulation 1 4 8] [--precision no bf16]

Standard 24 kHz recipe at full size: 32 filters, 32 codebooks, for each bandwidth a discriminator of 5 scales and 32
filters, 1 s examples. Ours is `CodecUpdate.run`, one line for each number of parts and format. The plain loop goes as
audiocraft's does: forward; where the discriminator learns, its step with two passes of its own over the detached
output; generator losses from the discriminator just updated, which is frozen meanwhile; commitment backward; balancer
with one `autograd.grad` for each loss; Adam. It is float32 and takes its batch in one part. Both use our `MelLoss`.
Ours judges with the discriminator as it was before the update, which is what saves it the two passes.

All sides begin with the same weights and get the same batches, bandwidths and learning updates, by turns. In the
first update nothing learns before the losses are taken, so they must agree. A round is two updates in which the
discriminator learns and one in which it does not (paper 3.4); updates per second are of the medians of both kinds,
mixed 2:1.
`--side` runs one side alone, so that the peak of resident memory is its own.
"""

import argparse
import copy
import itertools
import resource
import statistics
import sys
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.training.codec_update import CodecUpdate, choices_of
from modeling_encodec.training.configuration import TrainingConfig
from modeling_encodec.training.discriminator import MultiScaleSTFTDiscriminator
from modeling_encodec.training.losses import MelLoss


sys.path.insert(0, str(Path(__file__).parents[1]))
from peers import fill_codebooks, level_output, original_discriminator, original_model  # noqa: E402


RATE = 24000
# Losses that both sides take before anything of the first update is learned, and how far they may differ.
COMPARED = ("waveform", "mel", "adversarial", "feature", "commitment")
TOLERANCE = {"no": 1e-3, "bf16": 0.1}


# ---- the plain loop ----------------------------------------------------------------------------------------------


class PlainBalancer:
    """The loss balancer as audiocraft has it: a gradient for each loss, its mean norm, their running means."""

    def __init__(self, weights: dict[str, float], decay: float):
        self.weights, self.decay = weights, decay
        self.totals, self.counts = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)

    def gradient(self, losses: dict[str, torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        total = 0
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, [output], retain_graph=True)
            norm = gradient.norm(dim=tuple(range(1, gradient.dim()))).mean()
            self.totals[name] = self.totals[name] * self.decay + norm
            self.counts[name] = self.counts[name] * self.decay + 1
            share = self.weights[name] / sum(self.weights.values())
            total = total + share * gradient / (self.totals[name] / self.counts[name] + 1e-12)
        return total


class PlainUpdate:
    """One update written with the `encodec` package's modules; `run` like `CodecUpdate.run`."""

    def __init__(self, codec: nn.Module, discriminators: dict[float, nn.Module], config: TrainingConfig):
        self.codec, self.discriminators, self.config = codec, discriminators, config
        self.optimizer = self._adam(codec, config.learning_rate)
        self.discriminator_optimizers = {
            bandwidth: self._adam(discriminator, config.discriminator_learning_rate)
            for bandwidth, discriminator in discriminators.items()
        }
        self.mel_loss = MelLoss(RATE, config.mel_loss).to(next(codec.parameters()).device)
        weights = {
            "waveform": config.waveform_weight,
            "mel": config.mel_weight,
            "adversarial": config.adversarial_weight,
            "feature": config.feature_weight,
        }
        self.balancer = PlainBalancer(weights, config.balancer_decay)

    def _adam(self, module: nn.Module, rate: float) -> torch.optim.Adam:
        return torch.optim.Adam(module.parameters(), rate, (self.config.beta1, self.config.beta2))

    def run(self, audio: torch.Tensor, update: int) -> dict[str, float]:
        choices = choices_of(self.config, list(self.discriminators), update)
        discriminator = self.discriminators[choices.bandwidth]
        latents = self.codec.encoder(audio)
        quantized = self.codec.quantizer(latents, self.codec.frame_rate, choices.bandwidth)
        decoded = self.codec.decoder(quantized.quantized)[..., : audio.shape[-1]]
        if choices.discriminator_learns:
            self._train_discriminator(discriminator, choices.bandwidth, audio, decoded.detach())
        losses = {"waveform": F.l1_loss(decoded, audio), "mel": self.mel_loss(decoded, audio)}
        discriminator.requires_grad_(False)
        losses |= generator_losses(discriminator, audio, decoded)
        discriminator.requires_grad_(True)
        (self.config.commitment_weight * quantized.penalty).backward(retain_graph=True)
        decoded.backward(self.balancer.gradient(losses, decoded))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {name: loss.item() for name, loss in losses.items()} | {"commitment": quantized.penalty.item()}

    def _train_discriminator(self, discriminator, bandwidth, audio, decoded) -> None:
        fake, _ = discriminator(decoded)
        real, _ = discriminator(audio)
        loss = sum(F.relu(1 - x).mean() + F.relu(1 + y).mean() for x, y in zip(real, fake)) / len(real)
        optimizer = self.discriminator_optimizers[bandwidth]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def generator_losses(discriminator: nn.Module, audio: torch.Tensor, decoded: torch.Tensor) -> dict[str, torch.Tensor]:
    """Hinge and relative feature losses (paper eq. 2), the latter a mean over examples as ours is."""
    logits, fake_features = discriminator(decoded)
    _, real_features = discriminator(audio)
    adversarial = sum(F.relu(1 - x).mean() for x in logits) / len(logits)
    distances = [
        ((y - x).abs().mean((1, 2, 3)) / x.abs().mean((1, 2, 3))).mean()
        for fake, real in zip(fake_features, real_features)
        for y, x in zip(fake, real)
    ]
    return {"adversarial": adversarial, "feature": sum(distances) / len(distances)}


# ---- both sides ready to run -------------------------------------------------------------------------------------


@dataclass
class Side:
    """One competitor: its update, and the seconds of every timed one by whether the discriminator learned."""

    name: str
    update: CodecUpdate | PlainUpdate
    precision: str = "no"
    seconds: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    peak: int = 0  # bytes on the accelerator

    def run(self, audio: torch.Tensor, number: int) -> tuple[dict[str, float], float]:
        """The update's losses and how long it took."""
        on_gpu = audio.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        losses = self.update.run(audio, number)
        if on_gpu:
            torch.cuda.synchronize()
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        return losses, time.perf_counter() - start

    def rate(self) -> float:
        """Updates per second, two that teach the discriminator to one that does not."""
        learning, other = (statistics.median(self.seconds[learns]) for learns in (True, False))
        return 3 / (2 * learning + other)


def our_side(options, model: EncodecModel, judges: dict, steps: int, precision: str) -> Side:
    """`CodecUpdate` in `steps` parts, with the weights of `model` and of the discriminators `judges`."""
    device = torch.device(options.device)
    config = TrainingConfig(
        batch_size=options.batch, accumulation_steps=steps, mixed_precision=precision, compile=options.compile
    )
    # What it needs of an `Accelerator`, of which a process can have but one format.
    accelerator = types.SimpleNamespace(
        device=device,
        num_processes=1,
        autocast=lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
    )
    update = CodecUpdate(copy.deepcopy(model).to(device).train(), config, accelerator)
    for bandwidth, adversary in update.adversaries.items():
        adversary.network.load_state_dict(judges[float(bandwidth)].state_dict())
    number_format = "bf16" if precision == "bf16" else "fp32"
    return Side(f"ours, {steps} x {options.batch // steps}, {number_format}", update, precision)


def plain_side(options, model: EncodecModel, judges: dict) -> Side:
    """`PlainUpdate` with the weights of `model` and of the discriminators `judges`."""
    codec = original_model(model).to(options.device).train()
    discriminators = {
        bandwidth: original_discriminator(judge).to(options.device) for bandwidth, judge in judges.items()
    }
    return Side(f"encodec, 1 x {options.batch}, fp32", PlainUpdate(codec, discriminators, TrainingConfig()))


def make_sides(options) -> list[Side]:
    """The sides asked for, all with the same weights."""
    torch.manual_seed(0)
    model = EncodecModel(EncodecConfig.preset_24khz())
    fill_codebooks(model)
    level_output(model)
    judges = {bandwidth: MultiScaleSTFTDiscriminator() for bandwidth in model.config.target_bandwidths}
    sides = []
    if options.side != "ours":
        sides.append(plain_side(options, model, judges))
    if options.side != "plain":
        pairs = itertools.product(options.accumulation, options.precision)
        sides += [our_side(options, model, judges, steps, precision) for steps, precision in pairs]
    return sides


# ---- the measurement ---------------------------------------------------------------------------------------------


def plan(rounds: int) -> tuple[list[int], list[int]]:
    """Numbers of the updates to warm up with, one of each kind, and of those to time, two that learn to one."""
    config, bandwidths = TrainingConfig(), EncodecConfig.preset_24khz().target_bandwidths
    numbers = {True: [], False: []}
    for number in range(30 * (rounds + 1)):
        numbers[choices_of(config, bandwidths, number).discriminator_learns].append(number)
    learning, other = iter(numbers[True]), iter(numbers[False])
    warm_up = [next(other), next(learning)]
    return warm_up, [number for _ in range(rounds) for number in (next(learning), next(other), next(learning))]


def make_audio(options) -> torch.Tensor:
    """A batch of noise at different levels."""
    torch.manual_seed(1)
    return (torch.randn(options.batch, 1, RATE) * torch.rand(options.batch, 1, 1) * 0.2).to(options.device)


def check_losses(sides: list[Side], losses: list[dict[str, float]]) -> None:
    """All sides' losses of the first update are the first side's."""
    for side, ours in zip(sides[1:], losses[1:]):
        for name in COMPARED:
            difference = abs(ours[name] - losses[0][name]) / max(abs(losses[0][name]), 1e-8)
            if difference > TOLERANCE[side.precision]:
                raise SystemExit(f"{side.name}: {name} is {ours[name]}, of {sides[0].name} {losses[0][name]}")


def report(sides: list[Side]) -> None:
    """One line a side; the ratio is to the first."""
    print(f"{'':28} {'learning':>9} {'not':>7} {'updates/s':>10} {'ratio':>6}  peak on the accelerator")
    for side in sides:
        learning, other = (statistics.median(side.seconds[learns]) for learns in (True, False))
        peak = f"{side.peak / 2**20:7.0f} MiB" if side.peak else "-"
        ratio = side.rate() / sides[0].rate()
        print(f"{side.name:28} {learning:8.2f}s {other:6.2f}s {side.rate():10.4f} {ratio:6.2f}  {peak}")
    if len(sides) == 1:
        print(f"peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, help="examples of an update (default: 64 on a GPU, 16 on a CPU)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1], help="parts of ours, one side for each")
    parser.add_argument("--precision", nargs="+", choices=["no", "bf16"], default=["no"], help="of ours")
    parser.add_argument("--compile", action="store_true", help="torch.compile ours")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3, help="of three updates each")
    parser.add_argument("--side", choices=["both", "ours", "plain"], default="both")
    options = parser.parse_args()
    options.batch = options.batch or (64 if options.device.startswith("cuda") else 16)
    if any(options.batch % steps for steps in options.accumulation):
        parser.error(f"--accumulation is {options.accumulation}, allowed: divisors of the batch, {options.batch}")
    torch.set_num_threads(options.threads)
    sides, audio = make_sides(options), make_audio(options)
    print(f"torch {torch.__version__}, {options.device}, threads {torch.get_num_threads()}, batch {options.batch}")
    warm_up, timed = plan(options.rounds)
    check_losses(sides, [side.run(audio, warm_up[0])[0] for side in sides])
    for side in sides:
        side.run(audio, warm_up[1])
    bandwidths = EncodecConfig.preset_24khz().target_bandwidths
    for number in timed:
        learns = choices_of(TrainingConfig(), bandwidths, number).discriminator_learns
        for side in sides:
            side.seconds[learns].append(side.run(audio, number)[1])
    report(sides)


if __name__ == "__main__":
    main()
