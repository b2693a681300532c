# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""EncodecFeatureExtractor: audio arrays to the model's `input_values` and `padding_mask`.

The signature and the saved JSON are those of Transformers' class of that name. Two differences, both so that the model
sees what was given: integer samples are scaled to [-1, 1), and padding goes to the longest row and no further (the
stock class pads 48 kHz audio up to a full last chunk, which costs a phantom chunk and changes the last codes).
"""

from collections.abc import Sequence

import numpy as np
from transformers import BatchFeature
from transformers.utils import PaddingStrategy, logging

from .inputs_encodec import array_is_finite, audio_array, check_rate, real_number, whole_number
from .json_files_encodec import read_with_care
from .upstream_encodec import extractor_base


logger = logging.get_logger(__name__)
# As of the model's configuration.
MAX_CHANNELS, MAX_RATE, MAX_CHUNK_SECONDS = 256, 10_000_000, 3600
SETTINGS_FILES = ("processor_config.json", "preprocessor_config.json")


class EncodecFeatureExtractor(extractor_base()):
    """Checks, scales and pads audio: clips to the model's `input_values` and `padding_mask`.

    Attributes:
        feature_size (int): channels.
        sampling_rate (int): of the model, in Hz.
        padding_value (float): what rows are padded with.
        padding_side (str): "right"; or "left", where padding becomes silence that a row begins with, and codes are
            those of that. MusicGen's prompts are padded so, for a language model goes on from their ends.
        chunk_length_s (float, optional): of the model, in seconds; kept for the stock class, which reads the same
            JSON.
        overlap (float, optional): of the chunks, a fraction; kept for the same reason.

    Raises:
        ValueError: for a channel count, sampling rate, padding side or chunks that cannot be.

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec import EncodecFeatureExtractor, bundled_checkpoint
        >>> extractor = EncodecFeatureExtractor.from_pretrained(bundled_checkpoint())
        >>> clips = [np.zeros(3000, np.float32), np.full(2000, 16384, np.int16)]
        >>> inputs = extractor(clips, sampling_rate=24000, return_tensors="np")
        >>> inputs["input_values"].shape, inputs["padding_mask"].sum(axis=1).tolist()
        ((2, 1, 3000), [3000, 2000])
        >>> float(inputs["input_values"][1, 0, 0])
        0.5
    """

    model_input_names = ["input_values", "padding_mask"]

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 24000,
        padding_value: float = 0.0,
        chunk_length_s: float | None = None,
        overlap: float | None = None,
        **kwargs,
    ):
        for name in kwargs:
            if callable(getattr(type(self), name, None)):
                raise ValueError(f"{name} is no setting of a {type(self).__name__}, allowed: its arguments")
        super().__init__(
            feature_size=whole_number("feature_size", feature_size, 1, MAX_CHANNELS),
            sampling_rate=whole_number("sampling_rate", sampling_rate, 1, MAX_RATE, floats=True, unit=" Hz"),
            padding_value=float(real_number("padding_value", padding_value)),
            **kwargs,
        )
        # Said here too, for a base class may come that does not keep them.
        self.feature_size, self.sampling_rate = int(feature_size), int(sampling_rate)
        if self.padding_side not in ("right", "left"):
            raise ValueError(f"padding_side is {self.padding_side!r}, allowed: right, left")
        self.chunk_length_s, self.overlap = chunk_length_s, overlap
        if chunk_length_s is not None:
            self.chunk_length_s = real_number("chunk_length_s", chunk_length_s)
            if not 0 < self.chunk_length_s <= MAX_CHUNK_SECONDS:
                raise ValueError(f"chunk_length_s is {chunk_length_s}, allowed: above 0, to {MAX_CHUNK_SECONDS} s")
        if overlap is not None:
            self.overlap = real_number("overlap", overlap)
            if not 0 <= self.overlap < 1:
                raise ValueError(f"overlap is {overlap}, allowed: a number in [0, 1)")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """The one saved at `pretrained_model_name_or_path`, a folder or Hub id; `kwargs` as of Transformers' method.

        Raises:
            OSError: if there is none.
            ValueError: for a damaged file, or values that cannot be.
        """
        with read_with_care(pretrained_model_name_or_path, SETTINGS_FILES, kwargs.get("subfolder")):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def for_model(cls, config) -> "EncodecFeatureExtractor":
        """The one that a model of this `config`, an `EncodecConfig`, wants."""
        return cls(
            feature_size=config.audio_channels,
            sampling_rate=config.sampling_rate,
            chunk_length_s=config.chunk_length_s,
            overlap=config.overlap,
        )

    @property
    def chunk_length(self) -> int | None:
        """Samples per chunk, `None` without chunks."""
        return None if self.chunk_length_s is None else int(self.chunk_length_s * self.sampling_rate)

    @property
    def chunk_stride(self) -> int | None:
        """Samples from one chunk's start to the next one's, `None` without chunks."""
        if self.chunk_length_s is None or self.overlap is None:
            return None
        return max(1, int((1.0 - self.overlap) * self.chunk_length))

    def __call__(
        self,
        raw_audio,
        padding: bool | str | PaddingStrategy | None = None,
        truncation: bool | None = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        sampling_rate: int | None = None,
    ) -> BatchFeature:
        """Batch of one or several clips.

        Args:
            raw_audio (array, tensor or list): a clip, `(T,)` or `(channels, T)`; or several, a list of clips or an
                array `(B, channels, T)`. Clips are NumPy arrays, tensors or lists of numbers; integers are taken as
                PCM of their width. Floating point on the scale of integers is taken as it is, with a warning.
            padding: `True` or `"longest"` (default), `"max_length"`, or `False` for rows as they are and no mask.
            truncation: cut rows at `max_length`, or at the shortest row without one.
            max_length: in samples.
            return_tensors: `"pt"`, `"np"` or `None` for a list of arrays.
            sampling_rate: of `raw_audio`; another rate than the model's is refused.

        Returns:
            `BatchFeature` with `input_values` (B, channels, T) float32 and `padding_mask` (B, T), 1 on audio.

        Raises:
            ValueError: for a wrong rate, channel count or shape, an empty clip, or samples that are not finite.
        """
        if sampling_rate is None:
            logger.warning_once(f"No sampling_rate given: taking the audio to be at {self.sampling_rate} Hz.")
        elif check_rate("sampling_rate", sampling_rate) != self.sampling_rate:
            raise ValueError(
                f"The audio is at {sampling_rate} Hz and the model at {self.sampling_rate} Hz: resample it first "
                "(modeling_encodec.processors.audio.resample)."
            )
        if padding and truncation:
            raise ValueError("Both padding and truncation were set. Make sure you only set one.")
        rows = [self._check_clip(clip, index) for index, clip in enumerate(_split_clips(raw_audio))]
        if max_length is not None:
            max_length = whole_number("max_length", max_length, 1)
        if truncation:
            stop = min(row.shape[1] for row in rows) if max_length is None else max_length
            rows = [row[:, :stop] for row in rows]
        if padding is False or padding in ("do_not_pad", PaddingStrategy.DO_NOT_PAD):
            return BatchFeature({"input_values": rows}, tensor_type=return_tensors)
        width = self._padded_width(rows, padding, max_length)
        lengths = np.array([row.shape[1] for row in rows])
        values = np.full((len(rows), self.feature_size, width), self.padding_value, dtype=np.float32)
        starts = width - lengths if self.padding_side == "left" else np.zeros_like(lengths)
        for row, start, clip in zip(values, starts, rows):
            row[:, start : start + clip.shape[1]] = clip
        places = np.arange(width) - starts[:, None]
        mask = ((places >= 0) & (places < lengths[:, None])).astype(np.int32)
        if return_tensors is None:
            return BatchFeature({"input_values": list(values), "padding_mask": list(mask)})
        return BatchFeature({"input_values": values, "padding_mask": mask}, tensor_type=return_tensors)

    def _padded_width(self, rows, padding, max_length) -> int:
        longest = max(row.shape[1] for row in rows)
        if padding in (None, True, "longest", PaddingStrategy.LONGEST):
            return longest
        if padding not in ("max_length", PaddingStrategy.MAX_LENGTH):
            raise ValueError(f"padding is {padding!r}, allowed: True, False, 'longest', 'max_length', 'do_not_pad'")
        return longest if max_length is None else max(longest, max_length)

    def _check_clip(self, clip, index: int) -> np.ndarray:
        """A clip as float32 (channels, T)."""
        samples = audio_array(f"Clip {index}", clip)
        if samples.ndim == 1 and self.feature_size == 1:
            samples = samples[None]
        if samples.ndim != 2 or samples.shape[0] != self.feature_size:
            shape = f"({self.feature_size}, samples)" + (" or (samples,)" if self.feature_size == 1 else "")
            hint = "; it looks transposed" if samples.ndim == 2 and samples.shape[1] == self.feature_size else ""
            raise ValueError(f"Clip {index} has shape {samples.shape}, allowed: {shape}{hint}.")
        if samples.shape[1] == 0:
            raise ValueError(f"Clip {index} is empty, allowed: at least one sample.")
        if not array_is_finite(samples):
            raise ValueError(f"Clip {index} holds NaN or infinity, allowed: finite samples.")
        return samples


def _split_clips(raw_audio) -> Sequence:
    """The clips of one call: a list of clips or a 3-D array is a batch, anything else one clip."""
    if isinstance(raw_audio, (list, tuple)):
        if len(raw_audio) == 0:
            raise ValueError("There is no audio in the list, allowed: at least one clip.")
        return [raw_audio] if np.isscalar(raw_audio[0]) or getattr(raw_audio[0], "ndim", 1) == 0 else raw_audio
    return raw_audio if getattr(raw_audio, "ndim", 1) == 3 else [raw_audio]


EncodecFeatureExtractor.register_for_auto_class()

__all__ = ["EncodecFeatureExtractor"]
