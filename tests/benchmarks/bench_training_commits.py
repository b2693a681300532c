"""Training the small codec: this checkout beside another, by turns in one run, in seconds of audio a second.

    git worktree add /tmp/before COMMIT
    python tests/benchmarks/bench_training_commits.py /tmp/before [--batch 16] [--rounds 7] [--precision bf16]

The bundled codec is trained on noise, without and with one discriminator of 8 filters that learns in every update.
Sides: the other checkout and this one, each with one process on all cores; this one with a process a core, as by
`torchrun`; and, with the discriminator, by a CPU's means: gradient norms measured in every fifth update, half a second
of each example judged. All sides begin with the same weights and batches. In the first update the losses are taken
before anything is learned, so they must agree among the sides that judge the same audio.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path


HERE = Path(__file__).parents[2]
LOSSES = {"waveform_weight": 0.5, "mel_weight": 2.0, "mel_loss": "audiocraft", "bandwidths": [6.0]}
ADVERSARY = {"discriminators": "single", "discriminator_filters": 8, "discriminator_chance": 1.0}
WITHOUT = {"adversarial_weight": 0.0, "feature_weight": 0.0}
MEANS = {"balancer_every": 5, "discriminator_seconds": 0.5}


def serve() -> None:
    """One process of a side: for each number that it is sent it does that update, and says how long it took."""
    import torch
    from accelerate import Accelerator

    from modeling_encodec import EncodecModel, TrainingConfig
    from modeling_encodec.checkpoints import bundled_checkpoint
    from modeling_encodec.training.codec_update import CodecUpdate

    options = json.loads(sys.stdin.readline())
    precision = options.pop("precision")
    config = TrainingConfig(mixed_precision=precision, **options)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    model = EncodecModel.from_pretrained(bundled_checkpoint()).train()
    update = CodecUpdate(model, config, accelerator)
    torch.manual_seed(0)
    audio = torch.randn(config.batch_size, 1, 24000) * 0.1
    share = audio.chunk(accelerator.num_processes)[accelerator.process_index]
    for line in sys.stdin:
        start = time.perf_counter()
        losses = update.run(share, int(line))
        print(json.dumps({"seconds": time.perf_counter() - start, "losses": losses}), flush=True)


class Side:
    """The processes of one side, which wait for updates to do."""

    def __init__(self, name: str, checkout: Path, options: dict, processes: int, cores: int):
        self.name, self.batch, self.seconds = name, options["batch_size"], []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = os.environ | {
            "PYTHONPATH": str(checkout),
            "OMP_NUM_THREADS": str(cores // processes),
            "TQDM_DISABLE": "1",
        }
        if processes > 1:
            common |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.processes = []
        for rank in range(processes):
            environment = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
            command = [sys.executable, __file__, "--serve"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))
        self._send(json.dumps(options))

    def _send(self, line: str) -> None:
        for process in self.processes:
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def run(self, number: int) -> dict[str, float]:
        """Update `number`; its losses. The slowest process counts."""
        self._send(str(number))
        replies = [json.loads(process.stdout.readline()) for process in self.processes]
        self.seconds.append(max(reply["seconds"] for reply in replies))
        return replies[0]["losses"]

    def rate(self) -> float:
        """Seconds of audio a second, by the median."""
        return self.batch / statistics.median(self.seconds)

    def close(self) -> None:
        for process in self.processes:
            process.stdin.close()
            process.wait()


def compare(sides: list[Side], rounds: int, warm_up: int = 2) -> None:
    """Run all by turns and print a line for each; the ratio is to the first."""
    first = None
    for number in range(warm_up + rounds):
        for side in sides:
            losses = side.run(number)
            first = first or losses
            if number == 0 and "stretch" not in side.name:
                for name in ("waveform", "mel", "commitment", *(["feature"] if "feature" in losses else [])):
                    if abs(losses[name] / first[name] - 1) > 0.02:
                        raise SystemExit(f"{side.name}: {name} is {losses[name]}, of {sides[0].name} {first[name]}")
    for side in sides:
        side.seconds = side.seconds[warm_up:]
        print(f"{side.name:58} {side.rate():6.1f} {side.rate() / sides[0].rate():6.2f}")
        side.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="checkout of another commit")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--precision", choices=["no", "bf16"], default="bf16")
    asked = parser.parse_args()
    base = {"batch_size": asked.batch, "precision": asked.precision, **LOSSES}
    print(f"{'':58} audio s/s  ratio")
    for adversary in (False, True):
        options = base | (ADVERSARY if adversary else WITHOUT)
        end = ", discriminator" if adversary else ""
        plan = [("before" + end, asked.other, options, 1), ("now" + end, HERE, options, 1)]
        plan.append((f"now, {asked.cores} processes{end}", HERE, options, asked.cores))
        if adversary:
            plan.append((f"now, {asked.cores} processes, a stretch judged{end}", HERE, options | MEANS, asked.cores))
        compare([Side(name, place, given, count, asked.cores) for name, place, given, count in plan], asked.rounds)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
