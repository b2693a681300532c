"""Training a codec: `CodecTrainer`.

What runs have in common, resuming and stopping included, is in `run`; what an update does in `codec_update`.
"""

import logging
from itertools import islice
from pathlib import Path

import torch

from modeling_encodec.models.batching_encodec import to_device
from modeling_encodec.models.configuration_encodec import EncodecConfig
from modeling_encodec.models.json_files_encodec import one_line_errors
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.quantization_encodec import codebook_usage
from modeling_encodec.training.checkpoint import load_discriminators, save_checkpoint, save_model
from modeling_encodec.training.codec_update import CodecUpdate
from modeling_encodec.training.configuration import TrainingConfig
from modeling_encodec.training.corpora import Corpus, open_corpora
from modeling_encodec.training.guards import Guard, find_warnings
from modeling_encodec.training.mixing import TrainingAudio
from modeling_encodec.training.optimization import Averages
from modeling_encodec.training.run import TrainingRun, load_model, new_model
from modeling_encodec.training.validation import decode_clips, read_clips, validate


logger = logging.getLogger(__name__)

ARCHITECTURES = {
    "24khz": EncodecConfig.preset_24khz,
    "48khz": EncodecConfig.preset_48khz,
    "32khz": EncodecConfig.preset_32khz,
    "c16": lambda: EncodecConfig.preset_24khz(num_filters=16, target_bandwidths=[1.5, 3.0, 6.0, 12.0]),
}


class CodecTrainer(TrainingRun):
    """A run: model, data, and what has been done so far; `train` does the rest of it (paper 3.2, 3.4 and 4.4).

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec import CodecTrainer, EncodecConfig, EncodecModel, TrainingConfig, write_audio
        >>> size = {"num_filters": 4, "hidden_size": 16, "num_lstm_layers": 1, "codebook_size": 64}
        >>> EncodecModel(EncodecConfig(**size, target_bandwidths=[0.9])).save_pretrained("start")
        >>> _ = write_audio("audio/clip.wav", 0.1 * np.random.default_rng(0).standard_normal((1, 24000)), 24000)
        >>> config = TrainingConfig(
        ...     model="start", corpora=[{"name": "clips", "source": "audio"}], output="run", epochs=1,
        ...     updates_per_epoch=2, batch_size=2, segment_seconds=0.1, discriminator_filters=2, workers=0,
        ...     trackers=[], device="cpu",
        ... )
        >>> CodecTrainer(config).train()
        'finished'
        >>> EncodecModel.from_pretrained("run/model").config.num_quantizers
        2
    """

    progress = "mel"

    def __init__(self, config: TrainingConfig, *, datasets: dict | None = None):
        """Build everything.

        Args:
            config: the run's options.
            datasets: `datasets` objects by corpus name, used instead of the corpus's source.

        Raises:
            ValueError: for options that do not fit one another, corpora without audio, a checkpoint of another run.
            FileExistsError: if the output folder holds a run that is not to be resumed.
            FileNotFoundError: for a checkpoint, model, or clips to validate on or listen to that are not there.
        """
        super().__init__(config)
        state = self.state
        # A run that goes on needs nothing but its checkpoint.
        if state is None:
            model = build_model(config)
        else:
            model = new_model(EncodecModel, EncodecConfig.from_dict(state["architecture"]))
        self.model = model.to(self.accelerator.device).train()
        first, count = config.restart_codebooks_from, model.config.num_quantizers
        if first is not None and first >= count:
            raise ValueError(f"restart_codebooks_from is {first}, allowed: less than the model's {count} codebooks")
        self.codec = CodecUpdate(self.model, config, self.accelerator)
        if config.model and state is None:
            path = Path(config.model) / "discriminators.safetensors"
            with one_line_errors(str(path)):
                self._take_discriminators(path)
        networks = [adversary.network for adversary in self.codec.adversaries.values()]
        self.equal_on_all_processes([self.model, *networks])
        self.averages = Averages(self.model, config.weight_average)
        self.data, self.digests = self._open_data(datasets)
        self.guard = Guard()
        if state is not None:
            self._load_state(state)
        self.validation = self._clips(config.validation, config.validation_clips)
        self.listening = self._clips(config.listening, config.listening_clips)

    # ---- the loop ------------------------------------------------------------------------------------------------

    def one_update(self, batch: dict) -> dict[str, float]:
        """One update by this process's share of its `batch`, whose "audio" is (B, channels, T); its losses by name."""
        losses = self.checked(self.codec.run, "audio", to_device(batch["audio"], self.accelerator.device))
        self.averages.update()
        return losses

    def log(self) -> None:
        """Write this interval's means, with what the guards say of them."""
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
        self.say(means)

    def show(self) -> None:
        """Validation and listening clips, when they are due and at the end."""
        config, end = self.config, self.update == self.config.updates
        if self.validation and (end or self.update % config.validate_every == 0):
            with self.averages:
                results = validate(self.model, self.validation, self.accelerator)
            flat = {f"{name}/{bandwidth:g}": v for bandwidth, row in results.items() for name, v in row.items()}
            self.reporter.write(self.update, flat)
        if not self.accelerator.is_main_process:
            return
        if self.listening and (end or self.update % config.listen_every == 0):
            folder = self.folder / "listening" / f"update_{self.update:07d}"
            with self.averages:
                rows = decode_clips(self.model, self.listening, folder)
            self.reporter.show_clips(self.update, rows, self.model.config.sampling_rate, folder / "spectrograms.png")

    # ---- pieces --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """k-means for a new model, and for codebooks that are to be started anew."""
        first = self.config.restart_codebooks_from if self.config.model else 0
        if first is None:
            return
        batches = [batch["audio"] for batch in islice(self.batches(0, workers=0), self.config.kmeans_batches)]
        self.codec.start_codebooks([audio.to(self.accelerator.device) for audio in batches], first)
        self.averages.restart()

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

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint and the model folder."""
        if self.accelerator.is_main_process:
            state = {
                "update": self.update,
                "architecture": self.model.config.to_dict(),
                "corpora": self.digests,
                "codec": self.codec.state_dict(),
                "average": self.averages.state,
                "interval": self.reporter.state_dict(),
            }
            save_checkpoint(self.folder, state, self.config)
            discriminators = {name: one.network.state_dict() for name, one in self.codec.adversaries.items()}
            save_model(self.folder, self.model, self.averages.weights(), discriminators, self.config)
        self.accelerator.wait_for_everyone()

    def _load_state(self, state: dict) -> None:
        self.check_digests(self.digests, state["corpora"])
        self.update = state["update"]
        self.codec.load_state_dict(state["codec"])
        self.reporter.load_state_dict(state["interval"])
        self.averages.load(state["average"])


def build_model(config: TrainingConfig) -> EncodecModel:
    """The codec that a run of this `config` starts with, in float32.

    Raises:
        OSError: if there is no such checkpoint.
    """
    source = config.model
    if source is None:
        return new_model(EncodecModel, ARCHITECTURES[config.architecture]())
    return load_model(EncodecModel, source)
