"""A corpus to tokens on a Ray cluster (`pip install "modeling-encodec[ray]"`).

Ray Data hands the numbers of missing shards to actors, each with a model on a CPU core or a part of a GPU; an actor
makes whole shards, as a process of the local run does, and writes them to the folder, which all nodes must see. No
audio and no codes travel through Ray, and the output is that of the local run, byte for byte. An actor or node that
dies is replaced, and its shard made anew.
"""

import logging
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
ACTORS_OF_A_GPU = 4  # while one computes the others decode


class ShardActor:
    """Makes shards. What goes wrong comes back with them: of an actor that fails Ray would not tell what it did."""

    def __init__(self, run: Tokenization, description: dict, device: str, workers: int):
        self.description, self.given, self.maker = description, (run, device, workers), None

    def __call__(self, row: dict) -> dict:
        """Of a shard by its number: samples made, rows skipped, seconds waited for audio, and what is wrong."""
        progress, broken, before = Count(), [], 0.0
        try:
            self.maker = self.maker or self._maker()
            before = self.maker.waited
            broken = self.maker.make([self.maker.run.source.shards[row["item"]]], progress)
        except Exception as error:  # of any kind: the driver is to hear of it, and the other shards go on
            broken = [f"shard {row['item']}: {type(error).__name__}: {' '.join(str(error).split())}"]
        waited = self.maker.waited - before if self.maker else 0.0
        made = {"samples": progress.samples, "skipped": progress.skipped, "waited": waited}
        return made | {"broken": "; ".join(broken)}

    def _maker(self) -> ShardMaker:
        if self.given[0].describe() != self.description:
            raise ValueError("an actor does not see what the driver sees, allowed: equal sources and packages")
        return ShardMaker(*self.given)


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
        device: "cpu" or "cuda", of which Ray gives each actor its own; by default the GPUs, if the cluster has any.
        workers: processes that decode, for each actor; by default none, since they are started anew for each shard.
        actors: how many; by default four for each GPU of the cluster, or one for each CPU core but one.

    Raises:
        ImportError: if Ray is missing.
        FileExistsError: as `tokenize_corpus`.
        ValueError: as `tokenize_corpus`, or for a device or number that does not do.
        RuntimeError: if the cluster fails, or the actors of a shard die every time; the other shards are there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise ImportError('a Ray cluster needs: pip install "modeling-encodec[ray]"') from None
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device is {device!r}, allowed on Ray: cpu, cuda")
    for name, value, least in (("workers", workers, 0), ("actors", actors, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}, allowed: {least} or more")
    run = replace(run, folder=run.folder.resolve())  # actors stand elsewhere
    begun = time.monotonic()
    with begin_output(run, force=force), _cluster(ray):
        missing = missing_shards(run)
        try:
            broken, waited = _make(ray, run, missing, device, workers or 0, actors) if missing else ([], 0.0)
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None
        if broken:
            raise ValueError("; ".join(broken))
        if dead := missing_shards(run):
            raise RuntimeError(f"actors died {ATTEMPTS + 1} times at shards {dead}; the same command goes on")
        return finish_output(run, missing, time.monotonic() - begun, waited)


def _make(ray, run: Tokenization, missing: list[int], device, workers, actors) -> tuple[list[str], float]:
    """What is wrong with shards, and the seconds for which an actor waited in the mean."""
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0)) if device != "cpu" else 0
    device = device or ("cuda" if gpus else "cpu")
    actors = min(len(missing), actors or ACTORS_OF_A_GPU * gpus or max(1, int(there.get("CPU", 1)) - 1))
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a shard that kills its actors does not stop the others
    made = ray.data.from_items(missing, override_num_blocks=len(missing)).map(
        ShardActor,
        fn_constructor_args=(run, run.describe(), device, workers),
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
        num_cpus=1 + workers,
        num_gpus=1 / ACTORS_OF_A_GPU if gpus else 0,
        max_restarts=ATTEMPTS,
        max_task_retries=ATTEMPTS,
    )
    broken, samples, skipped, waited, begun = [], 0, 0, 0.0, time.monotonic()
    with tqdm(total=len(missing), unit="shard") as bar:
        for row in made.iter_rows():
            broken += [row["broken"]] if row["broken"] else []
            samples, skipped, waited = samples + row["samples"], skipped + row["skipped"], waited + row["waited"]
            hours = samples / run.codec.config.sampling_rate / 3600
            speed = hours * 3600 / (time.monotonic() - begun)
            told = f"{hours:.2f} h of audio, {speed:.1f} h/h, {actors} actors, {skipped} skipped"
            bar.set_postfix_str(told, refresh=False)
            bar.update()
    return sorted(broken), waited / actors


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
