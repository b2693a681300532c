# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""EncodecProcessor: audio, or codes already computed, to what `Trainer` and a causal language model take, and
generated ids back to codes and audio.

A processor is a feature extractor, a vocabulary (`CodeVocabulary`: layout, codebooks, specials) and a codec, which is
the `audio_tokenizer` of Transformers' processors. Saved are the first two, and of the codec its name if it is on the
Hub: a processor beside a codec, in one folder or repository, belongs to that. The codec's key in the JSON is not
Transformers' own, under which its loader would take the stock model class for ours.

A model with chunks has their codes one after the other, and their loudness (48 kHz) in no id: audio of it needs the
`audio_scales` that `return_audio_info` gives, or one number for all.
"""

import importlib
import os
from dataclasses import asdict

import numpy as np
import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import AutoModel, BatchFeature, ProcessorMixin
from transformers.utils import CONFIG_NAME

from .code_layouts import pad_ids
from .code_vocabulary import CodeVocabulary
from .feature_extraction_encodec import SETTINGS_FILES, EncodecFeatureExtractor
from .inputs_encodec import as_python, plain_array, real_number, whole_number
from .json_files_encodec import read_json, read_with_care
from .upstream_encodec import find_file


CODEC_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "device_map", "dtype")
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


class EncodecProcessor(ProcessorMixin):
    """Audio to `input_ids`, `attention_mask` and `labels`; ids to codes and audio.

    `modeling_encodec.examples.audio_lm` trains a model on what it gives; `NextCodebook` there keeps sampling to the
    codebook whose turn it is. A processor is pickled with its codec's weights: for data sets in several processes
    `CodecTokenizer`, and here its codes, is the lighter way.

    Args:
        feature_extractor (EncodecFeatureExtractor): of the codec.
        audio_tokenizer (EncodecModel, optional): the codec, this project's; without one only codes come and go.
        vocabulary (CodeVocabulary or its fields as a dict): how codes become ids.

    Raises:
        ValueError: if there is no vocabulary, or the three do not belong together.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from modeling_encodec import EncodecModel, EncodecProcessor, bundled_checkpoint
        >>> model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
        >>> processor = EncodecProcessor.for_model(model, bandwidth=1.5)
        >>> batch = processor([0.1 * torch.randn(24000)], 24000)
        >>> batch["input_ids"].shape, processor.vocab_size  # BOS, 75 frames of 2 codes, EOS
        (torch.Size([1, 152]), 2051)
        >>> size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> lm = LlamaForCausalLM(LlamaConfig(vocab_size=processor.vocab_size, **size))
        >>> lm(**batch).loss.isfinite()
        tensor(True)
        >>> processor.decode(batch["input_ids"])[0].shape
        torch.Size([1, 24000])
    """

    def __init__(self, feature_extractor, audio_tokenizer=None, vocabulary=None):
        super().__init__(feature_extractor)
        if isinstance(vocabulary, dict):
            vocabulary = CodeVocabulary(**vocabulary)
        if vocabulary is None:
            raise ValueError("vocabulary is None, allowed: a CodeVocabulary (EncodecProcessor.for_model makes one)")
        self.vocabulary = vocabulary
        if audio_tokenizer is not None:
            self.audio_tokenizer = audio_tokenizer  # the base class takes three classes by name, ours not among them
            self._codec()

    @classmethod
    def for_model(
        cls, model, bandwidth: float | None = None, *, num_quantizers: int | None = None, **settings
    ) -> "EncodecProcessor":
        """The processor of an `EncodecModel`, the `model`, at a `bandwidth` (kbps) or `num_quantizers` codebooks;
        `settings` are those of `CodeVocabulary`, such as its layout.

        Raises:
            ValueError: as `CodeVocabulary.for_model`, so where the model has several bandwidths and none is given.
        """
        vocabulary = CodeVocabulary.for_model(model.config, num_quantizers, bandwidth=bandwidth, **settings)
        return cls(EncodecFeatureExtractor.for_model(model.config), model, vocabulary)

    # ---- what a language model's configuration takes -------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """All ids are below it."""
        return self.vocabulary.vocab_size

    @property
    def pad_token_id(self) -> int:
        """Padding."""
        return self.vocabulary.pad_token_id

    @property
    def bos_token_id(self) -> int:
        """What every row begins with."""
        return self.vocabulary.bos_token_id

    @property
    def eos_token_id(self) -> int | None:
        """What every row ends with; in a delay layout, as in MusicGen, nothing by default."""
        return self.vocabulary.eos_token_id

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` returns."""
        return ["input_ids", "attention_mask", "labels"]

    # ---- to ids --------------------------------------------------------------------------------------------------

    def __call__(
        self,
        audio=None,
        sampling_rate: int | None = None,
        *,
        codes=None,
        lengths=None,
        add_bos: bool = True,
        add_eos: bool = True,
        padding_side: str = "right",
        return_labels: bool = True,
        return_audio_info: bool = False,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """A batch of clips for a language model, on the CPU.

        Args:
            audio (array, tensor or list): a clip or several, as `EncodecFeatureExtractor` takes them.
            sampling_rate: of the audio, in Hz.
            codes (array, tensor or list): instead of audio: codes (K, F) of a clip, or of several, (B, K, F) or a
                list, such as rows of a tokenised data set.
            lengths (sequence of int): frames of each row of codes.
            add_bos: whether rows begin with BOS.
            add_eos: whether rows end with EOS; a prompt has none.
            padding_side: "right", or "left" for prompts of a batch.
            return_labels: whether there are labels.
            return_audio_info: also return `audio_lengths` (B,) in samples and, of a model that normalises,
                `audio_scales` (B, chunks), 0 where a row has no such chunk. They are for `decode`, not for a model.
            return_tensors: "pt" or "np".

        Returns:
            `BatchFeature` of `input_ids` and `attention_mask` (B, L), and `labels` (B, L): the ids, -100 for padding.
            In a delay layout ids are (B, K, L) and labels (B, L, K), as MusicGen's decoder takes them. It shifts
            nothing where it is given both: labels are a step ahead, and ids end a step early, if there are labels.

        Raises:
            ValueError: for audio or codes that cannot be, both or neither, or audio without a codec.
        """
        if return_tensors not in ("pt", "np"):
            raise ValueError(f"return_tensors is {return_tensors!r}, allowed: 'pt', 'np'")
        if codes is not None and return_audio_info:
            raise ValueError("return_audio_info is True, allowed with codes: False (they come without)")
        rows, info = self._rows(audio, sampling_rate, codes, lengths)
        rows = [self._ids(row, index, add_bos, add_eos) for index, row in enumerate(rows)]
        batch = self._batch(*pad_ids(rows, self.pad_token_id, side=padding_side), return_labels, add_bos)
        return BatchFeature(batch | (info if return_audio_info else {}), tensor_type=return_tensors)

    def _rows(self, audio, sampling_rate: int | None, codes, lengths) -> tuple[list[np.ndarray], dict]:
        """Codes (K, F) of clips, and what else is known of audio."""
        if (audio is None) == (codes is None):
            raise ValueError(f"{'neither' if codes is None else 'both'} of audio and codes given, allowed: one")
        if codes is not None:
            return _code_rows(codes, lengths), {}
        if lengths is not None:
            raise ValueError("lengths are given, allowed with audio: none (its own are known)")
        return self._encode(audio, sampling_rate)

    def _ids(self, codes: np.ndarray, index: int, bos: bool, eos: bool) -> np.ndarray:
        try:
            return self.vocabulary.encode(codes, bos=bos, eos=eos)
        except ValueError as error:
            raise ValueError(f"clip {index}: {error}") from None

    def _batch(self, ids: np.ndarray, mask: np.ndarray, with_labels: bool, has_bos: bool) -> dict:
        """What a model takes, of padded ids; delayed ones with labels: after each step the next one."""
        if not with_labels:
            return {"input_ids": ids, "attention_mask": mask}
        if self.vocabulary.layout != "delay":
            return {"input_ids": ids, "attention_mask": mask, "labels": np.where(mask == 1, ids, -100)}
        if not has_bos:
            raise ValueError("add_bos is False, allowed in a delay layout: True, or return_labels=False")
        labels = ids[..., 1:].swapaxes(1, 2)
        labels = np.where(labels == self.pad_token_id, -100, labels)
        # A step counts where there is something before and after it, on whichever side the padding is.
        return {"input_ids": ids[..., :-1], "attention_mask": mask[..., :-1] * mask[..., 1:], "labels": labels}

    def _encode(self, audio, sampling_rate: int | None) -> tuple[list[np.ndarray], dict]:
        """Codes (K, F) of audio, and what else is needed to decode them."""
        codec = self._codec()
        inputs = self.feature_extractor(audio, sampling_rate=sampling_rate, return_tensors="pt")
        with torch.no_grad():
            coded = codec.encode(**inputs, num_quantizers=self.vocabulary.num_quantizers, return_dict=True)
        codes, samples = coded.audio_codes.cpu().numpy(), coded.audio_lengths.cpu().numpy()
        rows = [
            np.concatenate([codes[n, r, :, :frames] for n, frames in enumerate(self._frames(length))], axis=1)
            for r, length in enumerate(samples.tolist())
        ]
        info = {"audio_lengths": samples}
        if codec.config.normalize:
            info["audio_scales"] = torch.cat(coded.audio_scales, dim=1).cpu().numpy()
        return rows, info

    # ---- from ids ------------------------------------------------------------------------------------------------

    def decode_codes(self, ids, *, incomplete: str = "error") -> list:
        """Codes (K, F) of each row of ids; padding, BOS and EOS around them are taken off.

        Args:
            ids (array, tensor or list): a row, a batch, or a list of rows, as `__call__` or a language model gives
                them; of a delay layout also (B * K, L), as MusicGen's decoder takes them. (Its `generate` gives codes:
                the delay is off.)
            incomplete: "error" or "drop", for frames at the end that are not whole.

        Raises:
            ValueError: for ids that are no codes, with the row and the place.
        """
        rows = []
        for index, row in enumerate(self._id_rows(ids)):
            try:
                rows.append(self.vocabulary.decode(row, incomplete=incomplete))
            except ValueError as error:
                raise ValueError(f"row {index}: {error}") from None
        return rows

    def decode(self, ids, *, incomplete: str = "error", audio_scales=None, audio_lengths=None) -> list[torch.Tensor]:
        """Audio (channels, T) of each row of ids, float32 on the CPU.

        Args:
            ids (array, tensor or list): as of `decode_codes`.
            incomplete: as of `decode_codes`.
            audio_scales (array, tensor, list or float): of a model that normalises: (B, chunks), a list of rows of
                them, or a number for all.
            audio_lengths (sequence of int): samples of each row; without them audio is whole frames long.

        Raises:
            ValueError: as `decode_codes`, for scales or lengths that do not fit, or if there is no codec.
        """
        codec, rows = self._codec(), self.decode_codes(ids, incomplete=incomplete)
        rows = [torch.as_tensor(row, device=codec.device) for row in rows]
        if audio_lengths is not None:
            audio_lengths = [whole_number("an audio length", length, 0) for length in as_python(audio_lengths)]
        if audio_scales is None or isinstance(audio_scales, (int, float)) or getattr(audio_scales, "ndim", 1) == 0:
            audio_scales = [audio_scales] * len(rows)
        for name, value in (("audio_lengths", audio_lengths), ("audio_scales", audio_scales)):
            if value is not None and len(value) != len(rows):
                raise ValueError(f"{name} are {len(value)}, allowed: {len(rows)}, one a row of ids")
        audio = []
        with torch.no_grad():
            for index, row in enumerate(rows):
                length = None if audio_lengths is None else audio_lengths[index]
                try:
                    audio.append(self._audio(codec, row, length, audio_scales[index]))
                except ValueError as error:
                    raise ValueError(f"row {index}: {error}") from None
        return audio

    def batch_decode(self, *args, **kwargs) -> list[torch.Tensor]:
        """The same as `decode`, which takes a row or several."""
        return self.decode(*args, **kwargs)

    def _audio(self, codec, codes: torch.Tensor, length: int | None, scales) -> torch.Tensor:
        """Audio (channels, T) of codes (K, F) of one clip."""
        config, total = codec.config, codes.shape[1]
        if length is None:
            most = total if config.chunk_length is None else config.num_frames(config.chunk_length)
            frames = [min(most, total - start) for start in range(0, total, most or 1)]
        else:
            frames = self._frames(length)
        if sum(frames) != total:
            raise ValueError(f"there are {total} frames for {length} samples, allowed: {sum(frames)}")
        if not frames:
            return torch.zeros(config.audio_channels, 0, dtype=torch.float32, device="cpu")
        chunks = codes.new_zeros(len(frames), 1, len(codes), max(frames))
        for chunk, piece in zip(chunks, codes.split(frames, dim=1)):
            chunk[0, :, : piece.shape[1]] = piece
        if config.normalize:
            scales = _chunk_scales(scales, len(frames))
        decoded = codec.decode(
            chunks,
            scales if config.normalize else None,
            last_frame_pad_length=frames[0] - frames[-1],
            audio_lengths=None if length is None else torch.tensor([length], dtype=torch.int64, device="cpu"),
            return_dict=True,
        )
        return decoded.audio_values[0].float().cpu()

    def _id_rows(self, ids) -> list:
        """Rows (L,) or (K, L) of a row, a batch or a list."""
        delayed = self.vocabulary.layout == "delay"
        if isinstance(ids, (list, tuple)):
            dims = np.ndim(ids[0]) if len(ids) else 0
            if dims and not (delayed and dims == 1):
                return [row if hasattr(row, "dtype") else _array(row) for row in ids]
            ids = _array(ids)
        if delayed and ids.ndim == 2 and len(ids) % self.vocabulary.num_quantizers == 0:
            ids = ids.reshape(len(ids) // self.vocabulary.num_quantizers, -1, ids.shape[1])
        return list(ids) if ids.ndim > 1 else [ids]

    # ---- the codec -----------------------------------------------------------------------------------------------

    def _codec(self):
        """The codec, once it is certain that it is the vocabulary's and the feature extractor's."""
        codec = getattr(self, "audio_tokenizer", None)
        if codec is None:
            raise ValueError("there is no audio_tokenizer, allowed for audio: an EncodecModel")
        if not hasattr(codec, "encode_pieces"):
            kind = f"{type(codec).__module__}.{type(codec).__name__}"
            raise ValueError(f"audio_tokenizer is a {kind}, allowed: an EncodecModel of modeling_encodec")
        config = codec.config
        for name, given, wanted in (
            ("codebook_size", self.vocabulary.codebook_size, config.codebook_size),
            ("sampling_rate", self.feature_extractor.sampling_rate, config.sampling_rate),
            ("feature_size", self.feature_extractor.feature_size, config.audio_channels),
        ):
            if given != wanted:
                raise ValueError(f"{name} is {given}, allowed: {wanted}, as of the audio_tokenizer")
        if self.vocabulary.num_quantizers > config.num_quantizers:
            count = self.vocabulary.num_quantizers
            raise ValueError(f"num_quantizers is {count}, allowed: up to {config.num_quantizers}")
        return codec

    def _frames(self, samples: int) -> list[int]:
        """Frames of each chunk of a clip."""
        config = self.audio_tokenizer.config
        return [config.num_frames(stop - start) for start, stop in config.chunk_spans(samples)]

    # ---- saving and loading --------------------------------------------------------------------------------------

    def to_dict(self) -> dict:
        """What is saved: no weights, and no path of this machine."""
        settings = {
            "processor_class": type(self).__name__,
            "feature_extractor": self.feature_extractor.to_dict(),
            "vocabulary": asdict(self.vocabulary),
        }
        if hasattr(self, "auto_map"):
            settings["auto_map"] = self.auto_map
        name = getattr(getattr(self, "audio_tokenizer", None), "name_or_path", None)
        if name and _is_hub_id(name):
            settings["codec"] = name
        return settings

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """The settings saved at `pretrained_model_name_or_path`, and the codec if it is found and no `audio_tokenizer`
        is given (None for none). What holds no processor is a ValueError."""
        settings, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "vocabulary" not in settings:
            raise ValueError(
                f"{pretrained_model_name_or_path}: no EncodecProcessor, allowed: what its save_pretrained wrote; "
                "for a codec alone, EncodecProcessor.for_model(model, bandwidth)"
            )
        if not isinstance(settings["vocabulary"], dict) or not isinstance(settings.get("feature_extractor"), dict):
            raise ValueError(f"{pretrained_model_name_or_path}: vocabulary or feature_extractor is no JSON object")
        codec = settings.pop("codec", None)
        if codec is not None and not (isinstance(codec, str) and _is_hub_id(codec)):
            raise ValueError(f"{pretrained_model_name_or_path}: codec is {codec!r:.100}, allowed: a repository's id")
        if "audio_tokenizer" not in kwargs:
            rest["audio_tokenizer"] = _load_codec(pretrained_model_name_or_path, codec, kwargs)
        return settings, rest

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """The processor saved at `pretrained_model_name_or_path`, a folder or Hub id; `kwargs` as of Transformers'
        method, and `audio_tokenizer`.

        Raises:
            OSError: if there is none.
            ValueError: for a damaged file, values that cannot be, or a codec that is not whole.
        """
        with read_with_care(pretrained_model_name_or_path, SETTINGS_FILES, kwargs.get("subfolder")):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs) -> list:
        # Not by AutoFeatureExtractor, which would take the stock class of the same name.
        return [EncodecFeatureExtractor.from_dict(processor_dict["feature_extractor"])]


def _load_codec(folder, named: str | None, options: dict):
    """The codec that a processor lies beside, or that it names; None if there is neither."""
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    config = find_file(folder, CONFIG_NAME, **hub)
    is_beside = False
    if config is not None:
        is_beside = read_json(config).get("model_type") == "encodec"
    if not is_beside and named is None:
        return None
    placing = {name: options[name] for name in CODEC_OPTIONS if name in options}
    source, settings = (folder, hub | placing) if is_beside else (named, placing)
    package, _, _ = __name__.rpartition(".processors.")
    if package:  # by name: this file also travels to the Hub, where there is no such module
        module = importlib.import_module(f"{package}.models.modeling_encodec")
        return module.EncodecModel.from_pretrained(source, **settings)
    return AutoModel.from_pretrained(source, trust_remote_code=True, **settings)


def _is_hub_id(name: str) -> bool:
    """Whether a model's name is that of a repository, and not of a folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not os.path.exists(name)


def _code_rows(codes, lengths) -> list[np.ndarray]:
    """Codes as arrays (K, F), clip by clip."""
    if not hasattr(codes, "ndim") or codes.dtype == object:
        codes = [_array(row) for row in codes]
        codes = [np.stack(codes)] if codes and codes[0].ndim == 1 else codes
    else:
        codes = _array(codes)
        codes = [codes] if codes.ndim == 2 else list(codes)
    if not codes:
        raise ValueError("there are no codes, allowed: those of at least one clip")
    if lengths is None:
        return codes
    lengths = [whole_number("a row's length", length) for length in as_python(lengths)]
    if len(lengths) != len(codes) or not all(0 <= n <= row.shape[-1] for n, row in zip(lengths, codes)):
        raise ValueError(f"lengths are {lengths}, allowed: {len(codes)} of 0 to the frames of a row")
    return [row[..., :length] for row, length in zip(codes, lengths)]


def _array(codes) -> np.ndarray:
    """Codes of a clip as a whole array; those of no frame as whole numbers."""
    codes = plain_array("codes", codes)
    if codes.dtype == object:  # an array of arrays, as `datasets` gives lists of lists
        codes = np.stack([np.asarray(row) for row in codes])
    return codes if codes.size else codes.astype(np.int64)


def _chunk_scales(scales, chunks: int) -> list[torch.Tensor]:
    """Scales (1, 1) of a clip's chunks."""
    if scales is None:
        raise ValueError("audio_scales are missing, allowed: those of return_audio_info, or a number for all chunks")
    if np.ndim(scales) == 0:
        scales = np.full(chunks, real_number("audio_scales", scales))
    else:
        scales = plain_array("audio_scales", scales).astype(np.float32)
    scales = scales[: len(scales) if scales[chunks:].any() else chunks]  # a batch has 0 past a row's end
    if scales.shape != (chunks,):
        raise ValueError(f"audio_scales are {scales.shape[0]}, allowed: {chunks}, one a chunk")
    return [torch.tensor([[scale]], dtype=torch.float32, device="cpu") for scale in scales.tolist()]


EncodecProcessor.register_for_auto_class()

__all__ = ["EncodecProcessor"]
