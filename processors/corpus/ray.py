"""A corpus to tokens on a Ray cluster (`pip install "modeling-encodec[ray]"`).

Ray Data hands the numbers of missing shards to actors, each with the model on a GPU or CPU core of its own; an actor
makes whole shards, as a process of the local run does, and writes them to the folder, which all nodes must see. No
audio and no codes travel through Ray, and the output is that of the local run, byte for byte. An actor or node that
dies is replaced, and its shard made anew.
"""

import os
import time
from contextlib import contextmanager
from dataclasses import replace

from tqdm import tqdm

from modeling_encodec.processors.corpus.tokenization import (
    Count,
    ShardMaker,
    Tokenization,
    TokenizationReport,
    begin_output,
    finish_output,
    missing_shards,
)


ATTEMPTS = 3  # at a shard whose actor dies


class ShardActor:
    """Makes shards; Ray Data makes one for each GPU or CPU core."""

    def __init__(self, run: Tokenization, device: str | None, workers: int):
        import torch

        # Ray shows an actor the GPU that it has, and no other.
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.maker = ShardMaker(run, device, workers)

    def __call__(self, row: dict) -> dict:
        """The row, with hours made and what is wrong with the shard, if anything is."""
        progress = Count()
        shard = self.maker.run.source.shards[row["item"]]
        broken = self.maker.make([shard], progress)
        return {"shard": row["item"], "samples": progress.samples, "broken": "; ".join(broken)}


def tokenize_on_ray(
    run: Tokenization,
    *,
    device: str | None = None,
    workers: int | None = None,
    actors: int | None = None,
    force: bool = False,
) -> TokenizationReport:
    """Make every shard that is missing, all of them with `force`, on the cluster that RAY_ADDRESS names or this
    process has joined, or else on this machine.

    Args:
        device: of each actor; by default its GPU, or the CPU.
        workers: processes that decode, for each actor; by default none on a CPU, 4 beside a GPU.
        actors: how many; by default one for each GPU of the cluster, or for each CPU core but one.

    Raises:
        ImportError: if Ray is missing.
        FileExistsError, ValueError: as `tokenize_corpus`.
        RuntimeError: if the cluster fails, or a shard's actor dies every time.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ImportError('a Ray cluster needs: pip install "modeling-encodec[ray]"') from None
    run = replace(run, folder=run.folder.resolve())  # actors stand elsewhere
    begun = time.monotonic()
    with begin_output(run, force=force), _cluster(ray):
        missing = missing_shards(run)
        try:
            broken = _make(ray, run, missing, device, workers, actors) if missing else []
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"{type(error).__name__}: {error}; the same command goes on") from None
        if broken:
            raise ValueError("; ".join(broken))
        return finish_output(run, missing, time.monotonic() - begun, 0.0)


def _make(ray, run: Tokenization, missing: list[int], device, workers, actors) -> list[str]:
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0)) if device is None or device.startswith("cuda") else 0
    workers = (4 if gpus else 0) if workers is None else workers
    actors = min(len(missing), actors or gpus or max(1, int(there.get("CPU", 1)) - 1))
    ray.data.DataContext.get_current().enable_progress_bars = False
    made = ray.data.from_items(missing, override_num_blocks=len(missing)).map(
        ShardActor,
        fn_constructor_args=(run, device, workers),
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
        num_cpus=1 + workers,
        num_gpus=1 if gpus else 0,
        max_restarts=ATTEMPTS,
        max_task_retries=ATTEMPTS,
    )
    broken, samples, begun = [], 0, time.monotonic()
    with tqdm(total=len(missing), unit="shard") as bar:
        for row in made.iter_rows():
            broken += [row["broken"]] if row["broken"] else []
            samples += row["samples"]
            hours = samples / run.codec.config.sampling_rate / 3600
            speed = hours * 3600 / (time.monotonic() - begun)
            bar.set_postfix_str(f"{hours:.2f} h of audio, {speed:.1f} h/h, {actors} actors", refresh=False)
            bar.update()
    return sorted(broken)


@contextmanager
def _cluster(ray):
    """Join a cluster, or begin one on this machine and end it."""
    if ray.is_initialized():
        yield
        return
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()
