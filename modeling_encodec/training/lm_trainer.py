"""Training a language model on the codes of a frozen codec: `LMTrainer` (paper section 3.3).

Codes come from tokenised datasets, or from audio that the codec encodes on the way. At its end a run makes the
integer form, so that its model folder can be coded with. What runs have in common is in `run`.
"""

import json
import logging
from dataclasses import asdict
from itertools import islice

import torch

from modeling_encodec.checkpoints import bundled_checkpoint
from modeling_encodec.models.calibration_lm_encodec import check_size
from modeling_encodec.models.configuration_encodec import EncodecLMConfig
from modeling_encodec.models.fingerprints import codebook_fingerprint
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import IGNORED, EncodecLM
from modeling_encodec.system.atomic import atomic_folder
from modeling_encodec.training.checkpoint import save_checkpoint
from modeling_encodec.training.code_sequences import CodeSequences, encode_whole
from modeling_encodec.training.corpora import Corpus, open_corpora
from modeling_encodec.training.lm_configuration import LMTrainingConfig
from modeling_encodec.training.lm_update import LMUpdate, rates_of
from modeling_encodec.training.mixing import TrainingAudio
from modeling_encodec.training.optimization import Averages
from modeling_encodec.training.options import require
from modeling_encodec.training.run import TrainingRun, load_model, new_model
from modeling_encodec.training.validation import read_clips


logger = logging.getLogger(__name__)


class LMTrainer(TrainingRun):
    """A run: language model, codec, data, and what has been done so far; `train` does the rest of it (paper 3.3).

    Examples:
        >>> import datasets, torch
        >>> from modeling_encodec import EncodecConfig, EncodecLM, EncodecModel, LMTrainer, LMTrainingConfig
        >>> size = {"num_filters": 4, "hidden_size": 16, "num_lstm_layers": 1, "codebook_size": 64}
        >>> EncodecModel(EncodecConfig(**size, target_bandwidths=[0.9])).save_pretrained("codec")
        >>> datasets.disable_progress_bars()
        >>> rows = [torch.randint(64, (2, 40)).tolist() for _ in range(4)]
        >>> datasets.Dataset.from_dict({"codes": rows}).save_to_disk("tokens")
        >>> config = LMTrainingConfig(
        ...     codec="codec", codes=["tokens"], output="run", hidden_size=16, num_hidden_layers=1,
        ...     segment_seconds=0.2, epochs=1, updates_per_epoch=2, batch_size=2, workers=0, trackers=[], device="cpu",
        ... )
        >>> LMTrainer(config).train()
        'finished'
        >>> EncodecLM.from_pretrained("run/model").config.has_integer_form
        True
    """

    def __init__(self, config: LMTrainingConfig, *, datasets: dict | None = None):
        """Build everything.

        Args:
            config: the run's options.
            datasets: `datasets` objects by corpus name, used instead of the corpus's source.

        Raises:
            ValueError: for options that do not fit one another, data without codes, a checkpoint of another run.
            FileExistsError: if the output folder holds a run that is not to be resumed.
            FileNotFoundError: for codes, a codec, model, checkpoint or clips to validate on that are not there.
        """
        super().__init__(config)
        state, device = self.state, self.accelerator.device
        codec = load_model(EncodecModel, config.codec or bundled_checkpoint())
        self.codec = codec.eval().requires_grad_(False).to(device)
        self.fingerprint = codebook_fingerprint(codec)
        if state is None:
            lm = self._new_model()
        else:
            lm = new_model(EncodecLM, EncodecLMConfig.from_dict(state["architecture"]))
        if state is not None and lm.config.codec_fingerprint != self.fingerprint:
            raise ValueError(
                f"the codec's codebooks are {self.fingerprint}, allowed: {lm.config.codec_fingerprint}, as in the run "
                "to be resumed"
            )
        check_size(lm.config)  # better known now than when the run is over
        self.lm = lm.to(device).train()
        self.learner = LMUpdate(self.lm, codec.config, config, self.accelerator)
        self.equal_on_all_processes([self.lm])
        self.averages = Averages(self.lm, config.weight_average)
        self.data, self.digests = self._open_data(datasets)
        if state is not None:
            self.check_digests(self.digests, state["corpora"])
            self.update = state["update"]
            self.learner.load_state_dict(state["learner"])
            self.averages.load(state["average"])
            self.reporter.load_state_dict(state["interval"])
        self.held_out = self._held_out_codes()

    # ---- the loop ------------------------------------------------------------------------------------------------

    def one_update(self, batch: dict) -> dict[str, float]:
        """One update by this process's share of its `batch`, "codes" (B, K, F) or "audio" (B, channels, T); its loss
        and rates by name."""
        losses = self.checked(self.learner.run, "codes", self._codes(batch))
        self.averages.update()
        return losses

    def log(self) -> None:
        """Write this interval's means."""
        means = self.reporter.means()
        self.reporter.write(self.update, {f"train/{name}": value for name, value in means.items()})
        self.say({name: value for name, value in means.items() if not name.startswith("codebook/")})

    def show(self) -> None:
        """Bits of the held-out codes, when they are due and at the end."""
        end = self.update == self.config.updates
        if self.held_out and (end or self.update % self.config.validate_every == 0):
            with self.averages:
                results = self._validate()
            self.reporter.write(self.update, results)
            self.say(results)

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Bits per second and saving at every bandwidth, over all held-out codes."""
        results = {}
        for bandwidth in self.codec.config.target_bandwidths:
            books = self.codec.config.num_quantizers_for_bandwidth(bandwidth)
            bits = count = 0
            for codes in self.held_out:
                codes = codes[None, :books].to(self.lm.device)
                bits += self.lm(codes, codes, return_logits=False).loss.item() * codes.numel()
                count += codes.numel()
            results |= rates_of(bits / count, bandwidth, self.codec.config)
        return results

    # ---- pieces --------------------------------------------------------------------------------------------------

    def _new_model(self) -> EncodecLM:
        """The language model that a run starts with, in float32."""
        config, codec = self.config, self.codec.config
        if config.model is None:
            names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
            own = {name: getattr(config, name) for name in (*names, "context_seconds", "max_positions")}
            return new_model(EncodecLM, EncodecLMConfig.for_codec(codec, codec_fingerprint=self.fingerprint, **own))
        lm = load_model(EncodecLM, config.model)
        if (lm.config.num_codebooks, lm.config.codebook_size) != (codec.num_quantizers, codec.codebook_size):
            raise ValueError(
                f"the language model has {lm.config.num_codebooks} codebooks of {lm.config.codebook_size}, allowed: "
                f"{codec.num_quantizers} of {codec.codebook_size}, as the codec has"
            )
        lm.drop_integer_form()  # that of the weights before this training
        lm.config.codec_fingerprint = self.fingerprint
        return lm

    def _open_data(self, datasets: dict | None):
        """The examples, and a digest of each source that can be known beforehand."""
        config, codec = self.config, self.codec.config
        if bool(config.codes) == bool(config.corpora):
            raise ValueError(
                f"codes is {config.codes}, corpora has {len(config.corpora)} entries, allowed: one of the two"
            )
        frames = codec.num_frames(round(config.segment_seconds * codec.sampling_rate))
        if config.codes:
            if datasets:
                raise ValueError(f"datasets are given for {', '.join(datasets)}, allowed: none with codes")
            data = self._open_codes(config.codes, frames)
            return data, {"codes": data.digest}
        if codec.chunk_length is not None and config.segment_seconds > codec.chunk_length_s:
            raise ValueError(
                f"segment_seconds is {config.segment_seconds}, allowed with audio: up to {codec.chunk_length_s}, "
                "this codec's chunk; tokenised datasets can be longer"
            )
        with self.accelerator.main_process_first():  # it reads the files, the others find its index
            corpora = open_corpora(config, codec.audio_channels, datasets=datasets)
            data = TrainingAudio(config, corpora, codec.sampling_rate, codec.audio_channels)
        stored = [corpus for corpus in corpora if isinstance(corpus, Corpus)]
        if self.accelerator.is_main_process:
            for source in stored:
                self.reporter.skipped(source.skipped)
        return data, {corpus.name: corpus.digest for corpus in stored}

    def _open_codes(self, places: list[str], frames: int) -> CodeSequences:
        codec = self.codec.config
        return CodeSequences(
            places,
            self.config.codes_column,
            codebooks=codec.num_quantizers,
            size=codec.codebook_size,
            frames=frames,
            seed=self.config.seed,
        )

    def _held_out_codes(self) -> list[torch.Tensor]:
        """Codes (K, F) of what is held out, spread evenly over its recordings."""
        config, codec = self.config, self.codec.config
        most = codec.num_frames(round(config.validation_seconds * codec.sampling_rate))
        if config.validation_codes:
            source = self._open_codes([config.validation_codes], most)
            rows = [row for row in range(len(source)) if source.lengths[row] > 0]
            step = max(1, len(rows) / config.validation_clips)
            held_out = []
            for row in [rows[int(n * step)] for n in range(min(config.validation_clips, len(rows)))]:
                try:
                    held_out.append(source.recording(row)[:, :most])
                except ValueError as error:
                    logger.warning("not validated on: %s row %d: %s", config.validation_codes, row, error)
            require(held_out, "validation_codes", config.validation_codes, "a dataset with usable codes")
            return held_out
        if not config.validation:
            return []
        clips = read_clips(config.validation, self.codec, config.validation_clips, config.validation_seconds)
        return [encode_whole(self.codec, audio)[0] for audio in clips.values()]

    def _codes(self, batch: dict) -> torch.Tensor:
        """(B, K, F), -100 for padding, of a batch of codes or of audio."""
        if "codes" in batch:
            return batch["codes"]
        return encode_whole(self.codec, batch["audio"])

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint and the model folder; with the integer form when all updates are done."""
        if self.accelerator.is_main_process:
            state = {
                "update": self.update,
                "architecture": self.lm.config.to_dict(),
                "corpora": self.digests,
                "learner": self.learner.state_dict(),
                "average": self.averages.state,
                "interval": self.reporter.state_dict(),
            }
            save_checkpoint(self.folder, state, self.config)
            lm = new_model(EncodecLM, EncodecLMConfig.from_dict(self.lm.config.to_dict()))
            lm.load_state_dict({name: tensor.cpu() for name, tensor in self.averages.weights().items()})
            if self.update == self.config.updates:
                lm.quantize(self._calibration_codes())
            with atomic_folder(self.folder / "model", durable=True) as new:
                lm.save_pretrained(new)
                (new / "training_config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        self.accelerator.wait_for_everyone()

    def _calibration_codes(self) -> list[torch.Tensor]:
        """The first training sequences, each as long as it is."""
        sequences = []
        batches = -(-self.config.calibration_sequences // self.share)
        for batch in islice(self.batches(0, workers=0), batches):
            for codes in self._codes(batch).cpu():
                sequences.append(codes[None, :, : int((codes[0] != IGNORED).sum())])
        return sequences[: self.config.calibration_sequences]
