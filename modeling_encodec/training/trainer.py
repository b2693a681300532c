"""The training loop: batches in, updates, and all that a run shows and keeps.

    trainer = CodecTrainer(load_config("c16_debian", output="runs/c16"))
    trainer.train()

Runs in one process, or in several started by `accelerate launch` or `torchrun`. A run that was stopped, in whatever
way, goes on from its last checkpoint with `resume=True` as if it had never been (to the bit on a CPU).
"""

import logging
import signal
import time
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
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
from modeling_encodec.training.corpora import open_corpora
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
        # A run that goes on needs nothing but its own folder.
        source = str(self.folder / "model") if config.resume else config.model
        self.model = build_model(source, config.architecture).to(self.accelerator.device).train()
        self.codec = CodecUpdate(self.model, config, self.accelerator)
        if config.model and not config.resume:
            self._take_discriminators(Path(config.model) / "discriminators.safetensors")
        self.average = _copy(self.model) if config.weight_average else None
        self.data = self._open_data(datasets)
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
        with _StopSignals() as signals, self.reporter:
            if self.update == 0:
                self._start_codebooks()
            done = self._loop(signals)
            self._save()
        if done and self.config.push_to and self.accelerator.is_main_process:
            push(self.folder / "model", self.config.push_to)
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
                if self.update % config.save_every == 0:
                    self._save()
        return True

    def _one_update(self, batch: dict) -> dict[str, float]:
        self.reporter.skipped(batch["skipped"])
        audio = batch["audio"].to(self.accelerator.device, non_blocking=True)
        try:
            losses = self.codec.run(audio, self.update)
        except NonFiniteLoss as error:
            path = self.folder / f"nonfinite_{self.update}_{self.accelerator.process_index}.safetensors"
            save_file({"audio": audio.cpu().contiguous()}, path)
            raise NonFiniteLoss(f"update {self.update}: losses are {error}; the batch is in {path}") from None
        if self.average is not None:
            for name, tensor in self.model.state_dict().items():
                self.average[name].lerp_(tensor, 1 - self.config.weight_average)
        return losses

    def _log(self, losses: dict[str, float]) -> None:
        """Add to the means of this interval; write them at its end, with what the guards say of them."""
        self.reporter.add(losses)
        if self.update % self.config.log_every:
            return
        means = self.reporter.means()
        perplexity, use = codebook_usage(self.codec.code_counts)
        shares = self.codec.balancer.shares()
        trained = max(map(self.model.config.num_quantizers_for_bandwidth, self.codec.bandwidths))
        warnings = list(find_warnings(means, use[:trained], shares, self.codec.balancer.weights))
        self.guard.report(warnings, self.update)
        values = {f"train/{name}": value for name, value in means.items()}
        values |= {f"share/{name}": share for name, share in shares.items()}
        values |= {f"perplexity/{stage}": value for stage, value in enumerate(perplexity)}
        values |= {f"use/{stage}": value for stage, value in enumerate(use)}
        self.reporter.write(self.update, values, warnings=dict(warnings))
        if not self.reporter.interactive:  # no progress bar to look at
            losses = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
            logger.info("update %d of %d: %s", self.update, self.config.updates, losses)

    def _show(self) -> None:
        """Validation and listening clips, when they are due and at the end."""
        config, end = self.config, self.update == self.config.updates
        if self.validation and (end or self.update % config.validate_every == 0):
            with self._weights_to_keep():
                results = validate(self.model, self.validation, self.accelerator)
            flat = {f"{name}/{bandwidth:g}": v for bandwidth, row in results.items() for name, v in row.items()}
            self.reporter.write(self.update, flat)
        if not self.accelerator.is_main_process:
            return
        if self.listening and (end or self.update % config.listen_every == 0):
            folder = self.folder / "listening" / f"update_{self.update:07d}"
            with self._weights_to_keep():
                rows = decode_clips(self.model, self.listening, folder)
            self.reporter.show_clips(self.update, rows, self.model.config.sampling_rate, folder / "spectrograms.png")

    def _should_stop(self, signals: "_StopSignals") -> bool:
        """Whether a signal or the clock has stopped any of the processes: all stop at the same update."""
        limit = self.config.max_minutes
        late = limit is not None and time.monotonic() - self.started > 60 * limit
        stop = torch.tensor(float(signals.received or late), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            stop = self.accelerator.reduce(stop, "sum")
        return bool(stop > 0)

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
        first = self.config.restart_codebooks_from
        if first is None and self.config.model:
            return
        batches = [batch["audio"] for batch in islice(self._batches(0, workers=0), self.config.kmeans_batches)]
        self.codec.start_codebooks([audio.to(self.accelerator.device) for audio in batches], first or 0)
        self.average = _copy(self.model) if self.config.weight_average else None

    def _open_data(self, datasets: dict | None) -> TrainingAudio:
        config, settings = self.config, self.model.config
        if not config.corpora:
            raise ValueError("corpora is [], allowed: one or more, in the recipe or with --data")
        with self.accelerator.main_process_first():  # it reads the files, the others find its index
            corpora = open_corpora(config, settings.audio_channels, datasets=datasets)
            data = TrainingAudio(config, corpora, settings.sampling_rate, settings.audio_channels)
        for corpus in corpora:
            self.reporter.skipped(getattr(corpus, "skipped", []))  # a stream's are found as it is read
        return data

    def _clips(self, source: str | None, count: int) -> dict[str, torch.Tensor]:
        return read_clips(source, self.model, count, self.config.validation_seconds) if source else {}

    def _take_discriminators(self, path: Path) -> None:
        """Go on with the discriminators that lie beside the checkpoint, where they fit."""
        if not path.is_file():
            return
        for name, state in load_discriminators(path).items():
            if name in self.codec.adversaries:
                self.codec.adversaries[name].network.load_state_dict(state)

    def _weights_to_keep(self) -> "_Weights":
        return _Weights(self.model, self.average)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write the checkpoint and the model folder."""
        if self.accelerator.is_main_process:
            state = {
                "update": self.update,
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
        self.update = state["update"]
        self.codec.load_state_dict(state["codec"])
        self.reporter.load_state_dict(state["interval"], self.update)
        if self.average is not None:
            for name, tensor in self.average.items():
                tensor.copy_(state["average"][name])


def build_model(source: str | None, architecture: str) -> EncodecModel:
    """The codec that a run starts with, in float32: that of `source`, a folder or Hub id, or a new one.

    Raises:
        OSError: if there is no such checkpoint.
    """
    if source is None:
        return EncodecModel(ARCHITECTURES[architecture]())
    if Path(source).is_absolute() and not Path(source).is_dir():  # the Hub's message would be of repository ids
        raise FileNotFoundError(f"{source}: no such model folder")
    return EncodecModel.from_pretrained(source, dtype=torch.float32)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Devices, processes, number format and trackers of a run.

    Raises:
        ValueError: for a tracker that Accelerate does not know or whose package is missing.
    """
    there = [str(tracker) for tracker in get_available_trackers()]
    for tracker in config.trackers:
        if tracker not in there:
            installed = ", ".join(there) or "none"
            raise ValueError(f"trackers are {config.trackers}, allowed: those installed ({installed})")
    return Accelerator(
        cpu=config.device == "cpu",
        mixed_precision=config.mixed_precision,
        log_with=config.trackers or None,
        project_dir=config.output,
    )


def push(folder: Path, repository: str) -> None:
    """Upload a model folder to a Hub repository, which is made if it is not there."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Trained with modeling-encodec")


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


class _Weights:
    """The model in `eval` mode, with averaged weights if there are any, while the block lasts."""

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
        self.received = False

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
        self.received = True
        logger.warning("%s: stopping after this update", signal.Signals(number).name)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
