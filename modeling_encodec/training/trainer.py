"""The training loop: batches in, updates, and all that a run shows and keeps.

    trainer = CodecTrainer(load_config("c16_debian", output="runs/c16"))
    trainer.train()

Runs in one process, or in several started by `accelerate launch` or `torchrun`. A run that was stopped, in whatever
way, goes on from its last checkpoint with `resume=True` as if it had never been (to the bit on a CPU).
"""

import logging
import signal
import time
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs
from safetensors.torch import save_file
from tqdm import tqdm

from modeling_encodec.configuration_encodec import EncodecConfig
from modeling_encodec.modeling_encodec import EncodecModel
from modeling_encodec.quantization_encodec import codebook_usage
from modeling_encodec.training.checkpoint import (
    CHECKPOINT,
    load_checkpoint,
    load_discriminators,
    save_checkpoint,
    save_model,
)
from modeling_encodec.training.codec_update import CodecUpdate, NonFiniteLoss
from modeling_encodec.training.configuration import TrainingConfig
from modeling_encodec.training.corpora import Corpus, open_corpora
from modeling_encodec.training.guards import Guard, find_warnings
from modeling_encodec.training.mixing import TrainingAudio, batch_loader
from modeling_encodec.training.reporting import Reporter
from modeling_encodec.training.validation import decode_clips, read_clips, validate


logger = logging.getLogger(__name__)

ARCHITECTURES = {
    "24khz": EncodecConfig.preset_24khz,
    "48khz": EncodecConfig.preset_48khz,
    "32khz": EncodecConfig.preset_32khz,
    "c16": lambda: EncodecConfig.preset_24khz(num_filters=16, target_bandwidths=[1.5, 3.0, 6.0, 12.0]),
}


class CodecTrainer:
    """A run: model, data, and what has been done so far."""

    def __init__(self, config: TrainingConfig, *, datasets: dict | None = None):
        """Build everything; `datasets` are `datasets` objects by corpus name, used instead of the corpus's source.

        Raises:
            ValueError: for options that do not fit one another, corpora without audio, a checkpoint of another run.
            FileNotFoundError: for corpora or a checkpoint that are not there.
        """
        self.config, self.folder = config, Path(config.output)
        if not config.resume and (self.folder / CHECKPOINT).exists():
            raise FileExistsError(f"{self.folder} holds a run: --resume goes on with it, or choose another output")
        state = load_checkpoint(self.folder, config) if config.resume else None
        self.accelerator = make_accelerator(config)
        self.share = _share_of_batch(config, self.accelerator.num_processes)
        self.reporter = Reporter(self.folder, config, self.accelerator)
        torch.manual_seed(config.seed)  # initial weights
        # A run that goes on needs nothing but its checkpoint.
        model = build_model(config) if state is None else EncodecModel(EncodecConfig.from_dict(state["architecture"]))
        self.model = model.to(self.accelerator.device).train()
        first, count = config.restart_codebooks_from, model.config.num_quantizers
        if first is not None and first >= count:
            raise ValueError(f"restart_codebooks_from is {first}, allowed: less than the model's {count} codebooks")
        self.codec = CodecUpdate(self.model, config, self.accelerator)
        if config.model and state is None:
            self._take_discriminators(Path(config.model) / "discriminators.safetensors")
        self._equal_on_all_processes()
        self.average = _copy(self.model) if config.weight_average else None
        self.data, self.digests = self._open_data(datasets)
        self.guard = Guard()
        self.update = 0
        if state is not None:
            self._load_state(state)
        self.validation = self._clips(config.validation, config.validation_clips)
        self.listening = self._clips(config.listening, config.listening_clips)

    def train(self) -> str:
        """Train until the last update, the time limit or a signal. Returns "finished" or "stopped"; both are saved.

        Raises:
            NonFiniteLoss: with every process's batch saved in the output folder.
        """
        self.started = time.monotonic()
        push_to = self.config.push_to if self.accelerator.is_main_process else None
        if push_to:
            make_repository(push_to)  # a name or token that does not do is better known now
        with _StopSignals() as signals, self.reporter:
            if self.update == 0:
                self._start_codebooks()
                self._save()
            done = self._loop(signals)
            self._save()
        if done and push_to:
            push(self.folder / "model", push_to)
        return "finished" if done else "stopped"

    # ---- the loop ------------------------------------------------------------------------------------------------

    def _loop(self, signals: "_StopSignals") -> bool:
        """Update by update; True when the last one is done, False when stopped before."""
        config = self.config
        loader = self._batches(self.update, self.config.workers)
        bar = tqdm(
            total=config.updates,
            initial=self.update,
            desc="train",
            unit="update",
            disable=not self.accelerator.is_local_main_process or not self.reporter.interactive,
        )
        with bar:
            for batch in islice(loader, config.updates - self.update):
                losses = self._one_update(batch)
                self.update += 1
                bar.update()
                bar.set_postfix(mel=f"{losses['mel']:.3f}", refresh=False)
                self._log(losses)
                self._show()
                if self._should_stop(signals):
                    return self.update == config.updates
                if self.update % config.save_every == 0 and self.update < config.updates:
                    self._save()
        return True

    def _one_update(self, batch: dict) -> dict[str, float]:
        self.reporter.skipped(batch["skipped"])
        audio = batch["audio"].to(self.accelerator.device)
        try:
            losses = self.codec.run(audio, self.update)
        except NonFiniteLoss as error:
            path = self.folder / f"nonfinite_{self.update}_{self.accelerator.process_index}.safetensors"
            save_file({"audio": audio.cpu().contiguous()}, path)
            raise NonFiniteLoss(f"update {self.update}: losses are {error}; the batch is in {path}") from None
        if self.average is not None:
            averages, now = list(self.average.values()), list(self.model.state_dict().values())
            torch._foreach_lerp_(averages, now, 1 - self.config.weight_average)
        return losses

    def _log(self, losses: dict[str, float]) -> None:
        """Add to the means of this interval; write them at its end, with what the guards say of them."""
        self.reporter.add(losses)
        if self.update % self.config.log_every:
            return
        means = self.reporter.means()
        perplexity, use = codebook_usage(self.codec.code_counts)
        shares = self.codec.balancer.shares() if self.config.balancer else {}
        trained = max(map(self.model.config.num_quantizers_for_bandwidth, self.codec.bandwidths))
        warnings = list(find_warnings(means, use[:trained], shares, self.codec.balancer.weights))
        if self.accelerator.is_main_process:
            self.guard.report(warnings, self.update)
        values = {f"train/{name}": value for name, value in means.items()}
        values |= {f"share/{name}": share for name, share in shares.items()}
        values |= {f"perplexity/{stage}": value for stage, value in enumerate(perplexity)}
        values |= {f"use/{stage}": value for stage, value in enumerate(use)}
        self.reporter.write(self.update, values, warnings=dict(warnings))
        if self.accelerator.is_main_process and not self.reporter.interactive:  # no progress bar to look at
            losses = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
            logger.info("update %d of %d: %s", self.update, self.config.updates, losses)

    def _show(self) -> None:
        """Validation and listening clips, when they are due and at the end."""
        config, end = self.config, self.update == self.config.updates
        if self.validation and (end or self.update % config.validate_every == 0):
            with self._evaluating():
                results = validate(self.model, self.validation, self.accelerator)
            flat = {f"{name}/{bandwidth:g}": v for bandwidth, row in results.items() for name, v in row.items()}
            self.reporter.write(self.update, flat)
        if not self.accelerator.is_main_process:
            return
        if self.listening and (end or self.update % config.listen_every == 0):
            folder = self.folder / "listening" / f"update_{self.update:07d}"
            with self._evaluating():
                rows = decode_clips(self.model, self.listening, folder)
            self.reporter.show_clips(self.update, rows, self.model.config.sampling_rate, folder / "spectrograms.png")

    def _should_stop(self, signals: "_StopSignals") -> bool:
        """Whether a signal or the clock has stopped any of the processes: all stop at the same update."""
        limit = self.config.max_minutes
        late = limit is not None and time.monotonic() - self.started > 60 * limit
        stop = bool(signals.received or late)
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(stop), device=self.accelerator.device)
            stop = bool(self.accelerator.reduce(flag, "sum") > 0)
        if stop:
            logger.info("stopping after update %d (%s)", self.update, signals.received or "time, or another process")
        return stop

    # ---- pieces --------------------------------------------------------------------------------------------------

    def _batches(self, start: int, workers: int):
        return batch_loader(
            self.data,
            batch_size=self.share,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            start_batch=start,
            workers=workers,
        )

    def _start_codebooks(self) -> None:
        """k-means for a new model, and for codebooks that are to be started anew."""
        first = self.config.restart_codebooks_from if self.config.model else 0
        if first is None:
            return
        batches = [batch["audio"] for batch in islice(self._batches(0, workers=0), self.config.kmeans_batches)]
        self.codec.start_codebooks([audio.to(self.accelerator.device) for audio in batches], first)
        self.average = _copy(self.model) if self.config.weight_average else None

    def _open_data(self, datasets: dict | None) -> tuple[TrainingAudio, dict[str, str]]:
        """The examples, and a digest of each corpus that can be known beforehand."""
        config, settings = self.config, self.model.config
        if not config.corpora:
            raise ValueError("corpora is [], allowed: one or more, in the recipe or with --data")
        with self.accelerator.main_process_first():  # it reads the files, the others find its index
            corpora = open_corpora(config, settings.audio_channels, datasets=datasets)
            data = TrainingAudio(config, corpora, settings.sampling_rate, settings.audio_channels)
        stored = [corpus for corpus in corpora if isinstance(corpus, Corpus)]  # a stream's faults are found on the way
        if self.accelerator.is_main_process:
            for source in [*stored, *([data.impulses] if data.impulses else [])]:
                self.reporter.skipped(source.skipped)
        return data, {corpus.name: corpus.digest for corpus in stored}

    def _clips(self, source: str | None, count: int) -> dict[str, torch.Tensor]:
        return read_clips(source, self.model, count, self.config.validation_seconds) if source else {}

    def _take_discriminators(self, path: Path) -> None:
        """Go on with the discriminators that lie beside the checkpoint."""
        states = load_discriminators(path) if path.is_file() else {}
        for name, adversary in self.codec.adversaries.items():
            if name not in states:
                logger.info("the discriminator for %s is new: none lies beside the model", name)
                continue
            filters = len(states[name]["discriminators.0.convs.0.bias"])
            if filters != self.config.discriminator_filters:
                raise ValueError(
                    f"discriminator_filters is {self.config.discriminator_filters}, allowed: {filters}, as in {path}"
                )
            adversary.network.load_state_dict(states[name])

    def _equal_on_all_processes(self) -> None:
        """Everybody starts with the first process's weights: machines of different kinds may draw them differently."""
        if self.accelerator.num_processes > 1:
            for module in [self.model, *(adversary.network for adversary in self.codec.adversaries.values())]:
                for tensor in module.state_dict().values():
                    torch.distributed.broadcast(tensor, 0)

    def _evaluating(self) -> "_Evaluating":
        return _Evaluating(self.model, self.average)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write the checkpoint and the model folder."""
        if self.accelerator.is_main_process:
            state = {
                "update": self.update,
                "architecture": self.model.config.to_dict(),
                "corpora": self.digests,
                "codec": self.codec.state_dict(),
                "average": self.average,
                "interval": self.reporter.state_dict(),
            }
            save_checkpoint(self.folder, state, self.config)
            discriminators = {name: one.network.state_dict() for name, one in self.codec.adversaries.items()}
            weights = self.average or self.model.state_dict()
            save_model(self.folder, self.model, weights, discriminators, self.config)
        self.accelerator.wait_for_everyone()

    def _load_state(self, state: dict) -> None:
        for name, digest in self.digests.items():
            if state["corpora"].get(name) != digest:
                raise ValueError(f"corpus {name!r} holds other files now, allowed: those of the run to be resumed")
        self.update = state["update"]
        self.codec.load_state_dict(state["codec"])
        self.reporter.load_state_dict(state["interval"], self.update)
        if self.average is not None:
            for name, tensor in self.average.items():
                tensor.copy_(state["average"][name])


def build_model(config: TrainingConfig) -> EncodecModel:
    """The codec that a run starts with, in float32.

    Raises:
        OSError: if there is no such checkpoint.
    """
    source = config.model
    if source is None:
        return EncodecModel(ARCHITECTURES[config.architecture]())
    if Path(source).is_absolute() and not Path(source).is_dir():  # the Hub's message would be of repository ids
        raise FileNotFoundError(f"{source}: no such model folder")
    return EncodecModel.from_pretrained(source, dtype=torch.float32)


def make_accelerator(config: TrainingConfig) -> Accelerator:
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


def make_repository(repository: str) -> None:
    """Make a Hub repository, if it is not there."""
    from huggingface_hub import HfApi

    HfApi().create_repo(repository, exist_ok=True)


def push(folder: Path, repository: str) -> None:
    """Upload a model folder to a Hub repository."""
    from huggingface_hub import HfApi

    HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message="Trained with modeling-encodec")


def _share_of_batch(config: TrainingConfig, processes: int) -> int:
    """Examples of an update that one process computes."""
    parts = processes * config.accumulation_steps
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size is {config.batch_size}, allowed: a multiple of {parts} "
            f"({processes} processes times {config.accumulation_steps} accumulation steps)"
        )
    return config.batch_size // processes


def _copy(model: EncodecModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class _Evaluating:
    """The model in `eval` mode with the weights that are saved, averaged if there are averages, for a block."""

    def __init__(self, model: EncodecModel, average: dict | None):
        self.model, self.average = model, average

    def __enter__(self):
        self.model.eval()
        if self.average is not None:
            self.trained = _copy(self.model)
            self.model.load_state_dict(self.average)

    def __exit__(self, *error):
        if self.average is not None:
            self.model.load_state_dict(self.trained)
        self.model.train()


class _StopSignals:
    """Notes SIGTERM and SIGINT while the block lasts, so that the update in hand is completed and saved."""

    def __init__(self):
        self.received = ""

    def __enter__(self):
        self.before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
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
