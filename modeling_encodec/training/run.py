"""What all training runs have in common: processes and devices, the loop, stopping, what is kept and when.

Runs in one process, or in several started by `accelerate launch` or `torchrun`. A run that was stopped, in whatever
way, goes on from its last checkpoint with `resume=True` as if it had never been (to the bit on a CPU).
"""

import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from modeling_encodec.conversion.push_to_hub import make_repository, push_folder
from modeling_encodec.system.atomic import atomic_path, clear_partials
from modeling_encodec.system.run_folder import OwnFolder, Processes
from modeling_encodec.system.stop_signals import SIGNALS
from modeling_encodec.training.checkpoint import CHECKPOINT, load_checkpoint
from modeling_encodec.training.mixing import batch_loader
from modeling_encodec.training.optimization import NonFiniteLoss
from modeling_encodec.training.options import RunConfig
from modeling_encodec.training.reporting import Reporter


logger = logging.getLogger(__name__)


class TrainingRun:
    """A run: options, processes, and the loop. Kinds of runs say what an update is, what is shown and what is kept.

    They set `data`, whose examples are batched, and `progress`, the loss that the progress bar shows; `start`,
    `one_update`, `log`, `show` and `save` are theirs.
    """

    progress = "loss"

    def __init__(self, config: RunConfig):
        """Begin the run of `config`, or take it up again.

        Raises:
            ValueError: for options that do not fit one another, a checkpoint of another run, or another process at
                work in the output folder.
            FileExistsError: if the output folder holds a run that is not to be resumed.
            FileNotFoundError: if there is no checkpoint to resume from.
        """
        self.started, self.slowest_save = time.monotonic(), 0.0
        self.config, self.folder = config, Path(config.output)
        self.accelerator = make_accelerator(config)
        self.own: OwnFolder | None = None  # of the main process
        with self._own_folder(make=False):  # a run that is at work there is better known now
            if not config.resume and (self.folder / CHECKPOINT).exists():
                raise FileExistsError(f"{self.folder} holds a run: --resume goes on with it, or choose another output")
            self.state = load_checkpoint(self.folder, config) if config.resume else None
        self.share = _share_of_batch(config, self.accelerator.num_processes)
        self.reporter = Reporter(self.folder, config, self.accelerator)
        self.update = 0
        torch.manual_seed(config.seed)  # initial weights

    def train(self) -> str:
        """Train until the last update, the time limit or a signal. Returns "finished" or "stopped"; both are saved.

        Raises:
            NonFiniteLoss: with every process's batch saved in the output folder.
            ValueError: if another process works in the output folder, or has done so since this run was begun; with
                `push_to`, as `push_folder`; so are PermissionError, ConnectionError and RuntimeError.
            FileNotFoundError: if the output folder was deleted.
        """
        push_to = self.config.push_to if self.accelerator.is_main_process else None
        if push_to:
            make_repository(push_to)  # a name or token that does not do is better known now
        self.reporter.update = self.update
        with self._own_folder(make=True), StopSignals() as signals, self.reporter:
            if self.update == 0:
                self.start()
                self._save()
            self.saved = time.monotonic()
            done = self._loop(signals)
            self._save()
        if done and push_to:
            push_folder(self.folder / "model", push_to, message="Trained with modeling-encodec")
        return "finished" if done else "stopped"

    @contextmanager
    def _own_folder(self, *, make: bool) -> Iterator[None]:
        """No other run works in the output folder meanwhile; it is made if it is not there and `make`.

        The main process keeps others out; what it cannot do no process does.
        """
        checkpoint, error = self.folder / CHECKPOINT, None
        with ExitStack() as stack:
            if self.accelerator.is_main_process and (make or self.folder.exists()):
                try:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self.own = stack.enter_context(OwnFolder(self.folder))
                    clear_partials(self.folder, below=True)
                    if make and _identity(checkpoint) != self.seen:
                        raise ValueError(f"{self.folder}: another process has trained there meanwhile; begin anew")
                except (OSError, ValueError) as caught:
                    error = caught
            processes = Processes(self.accelerator.process_index, self.accelerator.num_processes)
            error = processes.from_first(error)
            if error is not None:
                raise error
            try:
                yield
            finally:
                self.seen = _identity(checkpoint)

    def start(self) -> None:
        """What comes before the first update of a new run."""

    def _loop(self, signals: "StopSignals") -> bool:
        """Update by update; True when the last one is done, False when stopped before."""
        config, begun = self.config, self.update

        def asked() -> bool:  # by a signal also while the first batch is waited for, by the clock not
            return bool(signals.received) or (self.update > begun and self._late())

        bar = tqdm(
            total=config.updates,
            initial=self.update,
            desc="train",
            unit="update",
            disable=not self.accelerator.is_local_main_process or not self.reporter.interactive,
        )
        with bar, closing(self.batches(self.update, config.workers, asked)) as batches:
            while self.update < config.updates:
                batch = next(batches, None)  # none: asked to stop, perhaps while waiting for it
                stop, save = self._agreed(batch is None, self._save_is_due())
                if save and self.update > begun:
                    self._save()
                if stop:
                    logger.info(
                        "stopping after update %d (%s)", self.update, signals.received or "time, or another process"
                    )
                    return False
                self.reporter.skipped(batch["skipped"])
                losses = self.one_update(batch)
                if self.own is not None:
                    self.own.check()
                self.update += 1
                bar.update()
                bar.set_postfix({self.progress: f"{losses[self.progress]:.3f}"}, refresh=False)
                self.reporter.add(losses)
                if self.update % config.log_every == 0:
                    self.log()
                self.show()
                if self.update % config.save_every == 0 and self.update < config.updates:
                    self._save()
        return True

    def _save(self) -> None:
        """`save`, and note when, and how long it took."""
        begun = time.monotonic()
        self.save()
        self.saved = time.monotonic()
        self.slowest_save = max(self.slowest_save, self.saved - begun)

    def checked(self, learn: Callable, name: str, batch: torch.Tensor) -> dict[str, float]:
        """Losses of `learn(batch, update)`; a batch that makes them other than finite is kept, under `name`.

        Raises:
            NonFiniteLoss: which says where that is.
        """
        try:
            return learn(batch, self.update)
        except NonFiniteLoss as error:
            path = self.folder / f"nonfinite_{self.update}_{self.accelerator.process_index}.safetensors"
            with atomic_path(path) as temporary:
                save_file({name: batch.cpu().contiguous()}, temporary)
            raise NonFiniteLoss(f"update {self.update}: {error}; the batch is in {path}") from None

    def say(self, values: dict[str, float]) -> None:
        """A line of values, where there is no progress bar to look at."""
        if self.accelerator.is_main_process and not self.reporter.interactive:
            text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            logger.info("update %d of %d: %s", self.update, self.config.updates, text)

    def _late(self) -> bool:
        """Whether the time limit leaves no more than what saving takes."""
        limit = self.config.max_minutes
        return limit is not None and time.monotonic() + self.slowest_save - self.started > 60 * limit

    def _save_is_due(self) -> bool:
        minutes = self.config.save_minutes
        return minutes is not None and time.monotonic() - self.saved > 60 * minutes

    def _agreed(self, *asked: bool) -> list[bool]:
        """Of each, whether any of the processes asks for it: all stop, and save, before the same update."""
        if self.accelerator.num_processes == 1:
            return list(asked)
        flags = torch.tensor([float(flag) for flag in asked], dtype=torch.float32, device=self.accelerator.device)
        return [count > 0 for count in self.accelerator.reduce(flags, "sum").tolist()]

    def batches(self, start: int, workers: int, stop: Callable[[], bool] = lambda: False):
        """This process's batches, from number `start` on, until `stop` says so."""
        return batch_loader(
            self.data,
            batch_size=self.share,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            start_batch=start,
            workers=workers,
            stop=stop,
        )

    def check_digests(self, now: dict[str, str], before: dict[str, str]) -> None:
        """A run is resumed on the data it began with; digests by name.

        Raises:
            ValueError: if that changed.
        """
        for name, digest in now.items():
            if before.get(name) != digest:
                raise ValueError(f"corpus {name!r} holds other files now, allowed: those of the run to be resumed")

    def equal_on_all_processes(self, modules: Iterable[nn.Module]) -> None:
        """Everybody starts with the first process's weights: machines of different kinds may draw them differently."""
        if self.accelerator.num_processes > 1:
            for module in modules:
                for tensor in module.state_dict().values():
                    torch.distributed.broadcast(tensor, 0)


def make_accelerator(config: RunConfig) -> Accelerator:
    """Devices, processes, number format and trackers of a run.

    Raises:
        ValueError: for a tracker that Accelerate does not know or whose package is missing, or Accelerate's own
            configuration asking for a number format that is not supported.
    """
    there = [str(tracker) for tracker in get_available_trackers()]
    for tracker in config.trackers:
        if tracker not in there:
            installed = ", ".join(there) or "none"
            raise ValueError(f"trackers are {config.trackers}, allowed: those installed ({installed})")
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision=None if config.mixed_precision == "auto" else config.mixed_precision,
        log_with=config.trackers or None,
        project_dir=config.output,
        # The others wait while the first process reads every file for its index, or decodes the listening clips.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"Accelerate's mixed precision is {accelerator.mixed_precision}, allowed: no, bf16")
    return accelerator


def new_model(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of this `kind` and `config`, float32 on the CPU: equal first weights whatever PyTorch's defaults are."""
    with torch.device("cpu"):
        return kind._from_config(config, dtype=torch.float32)


def load_model(kind: type[PreTrainedModel], source: str | Path) -> PreTrainedModel:
    """The model of this `kind` at `source`, a folder or a Hub id, float32 on the CPU.

    Raises:
        OSError: if there is no such model.
        ValueError: if it is damaged or not whole.
    """
    with torch.device("cpu"):
        return kind.from_pretrained(source, dtype=torch.float32)


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from others that have had its name; None if it is not there."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _share_of_batch(config: RunConfig, processes: int) -> int:
    """Examples of an update that one process computes."""
    parts = processes * config.accumulation_steps
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size is {config.batch_size}, allowed: a multiple of {parts} "
            f"({processes} processes times {config.accumulation_steps} accumulation steps)"
        )
    return config.batch_size // processes


class StopSignals:
    """Notes SIGTERM, SIGHUP and SIGINT while the block lasts, so that the update in hand is completed and saved."""

    def __init__(self):
        self.received = ""

    def __enter__(self):
        self.before = {}
        for number in SIGNALS:
            if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN:  # as SIGHUP is under nohup
                continue
            try:
                self.before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: somebody else's to handle
                break
        return self

    def _note(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice
        self.received = signal.Signals(number).name

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
