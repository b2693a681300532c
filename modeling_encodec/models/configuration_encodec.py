# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""Configurations of the codec and of its language model: fields, derived numbers and their checks.

The codec's field names and defaults are those of Transformers' ``EncodecConfig`` (5.23), so one ``config.json`` serves
both. The checks are stricter: a configuration that cannot work is refused here, with the value and what is allowed,
and nowhere else. Presets are the released models (arXiv 2210.13438, sections 3.1 and 4.1) and MusicGen's codec.
"""

import math
from collections.abc import Iterator

from huggingface_hub.dataclasses import strict

from .checked_config_encodec import CheckedConfig, checked_fields, require
from .inputs_encodec import match_number, real_number, whole_number
from .parameter_counts_encodec import codec_parameters, lm_parameters


NORM_TYPES = ("weight_norm", "time_group_norm")
PAD_MODES = ("reflect", "constant", "replicate")
# Whole numbers, from and to. No real model comes near an upper limit; a file that passes one is damaged or hostile,
# and would take all memory, or for ever, before anything else could be said of it.
CODEC_LIMITS = {
    "sampling_rate": (1, 10_000_000),
    "audio_channels": (1, 256),
    "hidden_size": (1, 1 << 16),
    "num_filters": (1, 1 << 13),
    "kernel_size": (1, 1 << 12),
    "last_kernel_size": (1, 1 << 12),
    "residual_kernel_size": (1, 1 << 12),
    "dilation_growth_rate": (1, 1 << 12),
    "compress": (1, 1 << 13),
    "num_lstm_layers": (1, 32),
    "num_residual_layers": (0, 32),
    "codebook_size": (2, 1 << 24),
}
LM_LIMITS = {
    "num_codebooks": (1, 1024),
    "num_hidden_layers": (1, 512),
    "num_attention_heads": (1, 1024),
    "intermediate_size": (1, 1 << 20),
    "frame_rate": (1, 1_000_000),
    "max_positions": (1, 1 << 24),
}
MAX_LEVELS = 10
MAX_HOP = 1 << 16
MAX_REACH = 1 << 16
MAX_KBPS = 1e9
MAX_CODEBOOKS = 1024
MAX_CHUNK_SECONDS = 3600
MAX_CHUNKS_AT_ONCE = 100
MAX_CONTEXT_FRAMES = 1 << 20


@checked_fields
@strict
class EncodecConfig(CheckedConfig):
    r"""Configuration of `EncodecModel`, given by name. The defaults are the 24 kHz mono model of the paper (3.1).

    Attributes:
        target_bandwidths (list[float]): bandwidths in kbps the model is trained for; the first one is used where none
            is asked for, the last one sets how many codebooks the model has. (Both are Transformers' rules, so put
            the smallest first and the largest last.) One below the price of a codebook means one codebook.
        sampling_rate (int): in Hz.
        audio_channels (int): 1 for mono, 2 for stereo, or more.
        normalize (bool): divide each chunk by its loudness before encoding; the scale travels with the codes.
        chunk_length_s (float, optional): length in seconds of independently coded chunks; `None` codes the whole
            signal at once.
        overlap (float, optional): overlap of consecutive chunks, a fraction of the chunk in [0, 1).
        hidden_size (int): width of the latent between encoder and quantiser.
        num_filters (int): width of the first convolution; doubled by every downsampling.
        num_residual_layers (int): residual units per downsampling.
        upsampling_ratios (list[int]): strides in the decoder's order; the encoder uses them reversed.
        norm_type (str): `"weight_norm"` or `"time_group_norm"` (one group, statistics over channels and time: with it
            a model looks at the whole chunk, causal convolutions or not).
        kernel_size (int): kernel of the first convolution.
        last_kernel_size (int): kernel of the last convolution.
        residual_kernel_size (int): kernel of the residual units.
        dilation_growth_rate (int): dilation of the j-th residual unit is this to the power j.
        use_causal_conv (bool): pad on the left only.
        pad_mode (str): `"reflect"`, `"constant"` (zeros) or `"replicate"`.
        compress (int): residual units narrow to `dim // compress`.
        num_lstm_layers (int): LSTM layers in encoder and in decoder.
        trim_right_ratio (float): share of a causal transposed convolution's excess that is cut on the right.
        codebook_size (int): entries per codebook; need not be a power of two.
        codebook_dim (int, optional): width of the codebook vectors, `hidden_size` by default and in every model.
        use_conv_shortcut (bool): 1x1 convolution instead of the identity round a residual unit.

    Raises:
        ValueError: for any value that cannot make a working model or is of another type, with the value and what is
            allowed.

    Examples:
        >>> from modeling_encodec import EncodecConfig
        >>> config = EncodecConfig(num_filters=16, target_bandwidths=[1.5, 3.0])
        >>> config.hop_length, config.frame_rate, config.num_quantizers
        (320, 75, 4)
        >>> EncodecConfig(audio_channels=0)
        Traceback (most recent call last):
        ...
        ValueError: audio_channels is 0, allowed: a whole number of at least 1
    """

    model_type = "encodec"
    # What `Trainer.predict` leaves out: it joins the rows of batches, and these have no rows first.
    keys_to_ignore_at_inference = ["audio_codes", "audio_scales", "last_frame_pad_length"]

    target_bandwidths: list[int | float] | tuple[int | float, ...] = (1.5, 3.0, 6.0, 12.0, 24.0)
    sampling_rate: int = 24_000
    audio_channels: int = 1
    normalize: bool = False
    chunk_length_s: int | float | None = None
    overlap: int | float | None = None
    hidden_size: int = 128
    num_filters: int = 32
    num_residual_layers: int = 1
    upsampling_ratios: list[int] | tuple[int, ...] = (8, 5, 4, 2)
    norm_type: str = "weight_norm"
    kernel_size: int = 7
    last_kernel_size: int = 7
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    use_causal_conv: bool = True
    pad_mode: str = "reflect"
    compress: int = 2
    num_lstm_layers: int = 2
    trim_right_ratio: int | float = 1.0
    codebook_size: int = 1024
    codebook_dim: int | None = None
    use_conv_shortcut: bool = True

    def __post_init__(self, **kwargs):
        if self.codebook_dim is None:
            self.codebook_dim = self.hidden_size
        self._check_architecture()
        self._check_codebooks()
        self._check_chunks()
        self.check_parameters(codec_parameters(self), (*CODEC_LIMITS, "upsampling_ratios", "target_bandwidths"))
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict:
        """All fields, as they are saved: with floats where Transformers' own class takes nothing else."""
        fields = super().to_dict()
        for name in ("target_bandwidths", "overlap", "trim_right_ratio"):
            value = fields[name]
            if value is not None:
                fields[name] = [float(one) for one in value] if name == "target_bandwidths" else float(value)
        return fields

    # ---- presets -------------------------------------------------------------------------------------------------

    @classmethod
    def preset_24khz(cls, **overrides) -> "EncodecConfig":
        """24 kHz mono, causal, weight norm, 1.5 to 24 kbps (facebook/encodec_24khz). `overrides`: other attributes."""
        return cls(**overrides)

    @classmethod
    def preset_48khz(cls, **overrides) -> "EncodecConfig":
        """48 kHz stereo in 1 s chunks with 10 ms overlap, GroupNorm, 3 to 24 kbps (facebook/encodec_48khz).

        `overrides`: other attributes.
        """
        preset = {
            "target_bandwidths": [3.0, 6.0, 12.0, 24.0],
            "sampling_rate": 48_000,
            "audio_channels": 2,
            "normalize": True,
            "chunk_length_s": 1.0,
            "overlap": 0.01,
            "norm_type": "time_group_norm",
            "use_causal_conv": False,
        }
        return cls(**(preset | overrides))

    @classmethod
    def preset_32khz(cls, **overrides) -> "EncodecConfig":
        """MusicGen's codec: 32 kHz mono, non-causal, 4 codebooks of 2048 at 50 Hz (facebook/encodec_32khz).

        `overrides`: other attributes.
        """
        preset = {
            "target_bandwidths": [2.2],
            "sampling_rate": 32_000,
            "num_filters": 64,
            "upsampling_ratios": [8, 5, 4, 4],
            "codebook_size": 2048,
            "use_causal_conv": False,
            "use_conv_shortcut": False,
        }
        return cls(**(preset | overrides))

    # ---- derived numbers -----------------------------------------------------------------------------------------

    @property
    def chunk_length(self) -> int | None:
        """Samples per chunk, `None` when the whole signal is coded at once."""
        return None if self.chunk_length_s is None else int(self.chunk_length_s * self.sampling_rate)

    @property
    def chunk_stride(self) -> int | None:
        """Samples from one chunk's start to the next one's, `None` without chunks."""
        if self.chunk_length_s is None or self.overlap is None:
            return None
        return max(1, int((1.0 - self.overlap) * self.chunk_length))

    @property
    def needs_whole_signal(self) -> bool:
        """Whether a signal's first frame depends on all of it: on its loudness, or GroupNorm's statistics."""
        return self.chunk_length is None and (self.normalize or self.norm_type == "time_group_norm")

    @property
    def hop_length(self) -> int:
        """Samples per frame of codes."""
        return math.prod(self.upsampling_ratios)

    @property
    def frame_rate(self) -> int:
        """Frames per second, rounded up."""
        return math.ceil(self.sampling_rate / self.hop_length)

    @property
    def codebook_nbits(self) -> int:
        """Bits that one code takes when packed."""
        return math.ceil(math.log2(self.codebook_size))

    @property
    def num_quantizers(self) -> int:
        """Codebooks of the model: as many as the last bandwidth pays for."""
        return int(1000 * self.target_bandwidths[-1] // (self.frame_rate * self.codebook_nbits))

    def num_quantizers_for_bandwidth(self, bandwidth: float) -> int:
        """Codebooks used at `bandwidth` kbps: as many of the model's as it pays for when packed, at least one."""
        kbps = match_number(bandwidth, self.target_bandwidths)
        kbps = real_number("bandwidth", bandwidth, "a number of kbps") if kbps is None else kbps
        paid_for = int(1000 * kbps // (self.frame_rate * self.codebook_nbits))
        return min(max(1, paid_for), self.num_quantizers)

    def num_frames(self, samples: int) -> int:
        """Frames of codes that `samples` samples, or one chunk of them, take."""
        return -(-whole_number("samples", samples) // self.hop_length)

    def chunk_spans(self, samples: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of each chunk of a signal of so many `samples`: one every stride as long as there is audio,
        the last ones cut at its end. Given out one by one: a length read from a damaged file may be anything."""
        samples = whole_number("samples", samples)
        chunk, stride = self.chunk_length or samples, self.chunk_stride or samples
        for start in range(0, samples, stride):
            yield start, min(start + chunk, samples)

    # ---- checks: plain ValueErrors; @strict has seen to the types before -----------------------------------------

    def _check_architecture(self):
        """Sizes that must be positive, names that must be known, ratios that must multiply to a real hop."""
        self.check_limits(CODEC_LIMITS)
        require(self.norm_type in NORM_TYPES, "norm_type", self.norm_type, f"one of {', '.join(NORM_TYPES)}")
        require(self.pad_mode in PAD_MODES, "pad_mode", self.pad_mode, f"one of {', '.join(PAD_MODES)}")
        ratios = list(self.upsampling_ratios)
        require(ratios and min(ratios) >= 1, "upsampling_ratios", ratios, "one or more whole numbers of at least 1")
        require(len(ratios) <= MAX_LEVELS, "upsampling_ratios", ratios, f"at most {MAX_LEVELS} of them")
        require(self.hop_length <= MAX_HOP, "upsampling_ratios", ratios, f"a product of at most {MAX_HOP}")
        reach = (self.residual_kernel_size - 1) * self.dilation_growth_rate ** max(0, self.num_residual_layers - 1)
        require(
            reach <= MAX_REACH,
            "dilation_growth_rate",
            self.dilation_growth_rate,
            f"less, with {self.num_residual_layers} residual layers of kernel size {self.residual_kernel_size}: they "
            f"may reach {MAX_REACH} samples",
        )
        require(
            self.compress <= self.num_filters, "compress", self.compress, f"at most num_filters ({self.num_filters})"
        )
        require(0 <= self.trim_right_ratio <= 1, "trim_right_ratio", self.trim_right_ratio, "a number in [0, 1]")
        require(
            self.use_causal_conv or self.trim_right_ratio == 1,
            "trim_right_ratio",
            self.trim_right_ratio,
            "1 unless use_causal_conv is set",
        )

    def _check_codebooks(self):
        """Codebooks of at least two entries, as wide as the latent, one of them paid for by the last bandwidth."""
        require(
            self.codebook_dim in (None, self.hidden_size),
            "codebook_dim",
            self.codebook_dim,
            f"hidden_size ({self.hidden_size}): there is no projection between latent and codebooks",
        )
        bandwidths = list(self.target_bandwidths)
        require(len(bandwidths) > 0, "target_bandwidths", bandwidths, "one or more bandwidths in kbps")
        require(
            all(0 < bandwidth < math.inf for bandwidth in bandwidths),
            "target_bandwidths",
            bandwidths,
            "finite bandwidths above 0 kbps",
        )
        require(max(bandwidths) <= MAX_KBPS, "target_bandwidths", bandwidths, f"at most {MAX_KBPS:g} kbps")
        one_codebook = self.frame_rate * self.codebook_nbits / 1000
        require(
            self.num_quantizers >= 1,
            "target_bandwidths",
            bandwidths,
            f"at least {one_codebook:g} kbps as the last, the price of one codebook",
        )
        require(
            self.num_quantizers <= MAX_CODEBOOKS,
            "target_bandwidths",
            bandwidths,
            f"as the last less than {(MAX_CODEBOOKS + 1) * one_codebook:g} kbps, which {MAX_CODEBOOKS} codebooks take",
        )

    def _check_chunks(self):
        """Chunks of at least one hop, with an overlap whenever there are chunks."""
        if self.overlap is not None:
            require(0 <= self.overlap < 1, "overlap", self.overlap, "a number in [0, 1)")
        if self.chunk_length_s is None:
            return
        name, seconds = "chunk_length_s", self.chunk_length_s
        require(not seconds > MAX_CHUNK_SECONDS, name, seconds, f"at most {MAX_CHUNK_SECONDS} s")
        hop = self.hop_length / self.sampling_rate
        require(seconds > 0 and self.chunk_length >= self.hop_length, name, seconds, f"at least one hop ({hop:g} s)")
        require(self.overlap is not None, "overlap", self.overlap, "a number in [0, 1) when chunk_length_s is set")
        require(
            self.chunk_length <= MAX_CHUNKS_AT_ONCE * self.chunk_stride,
            "overlap",
            self.overlap,
            f"less: each sample would be in more than {MAX_CHUNKS_AT_ONCE} chunks",
        )


@checked_fields
@strict
class EncodecLMConfig(CheckedConfig):
    r"""Configuration of `EncodecLM`, the Transformer over codes that entropy coding takes its probabilities from
    (paper section 3.3), given by name. The defaults are the released 24 kHz language model.

    Attributes:
        codebook_size (int): entries per codebook of the codec.
        num_codebooks (int): codebooks of a frame, at most; fewer may be coded.
        hidden_size (int): width of the Transformer.
        num_hidden_layers (int): Transformer layers.
        num_attention_heads (int): heads per layer.
        intermediate_size (int): width inside the feed-forward parts.
        context_seconds (float): how far back attention sees.
        frame_rate (int): frames per second of the codec.
        max_positions (int): positions that training draws from; later frames begin again at the first.
        zero_past_key (bool): attend to one all-zero vector before the first frame, as the released models do; new
            models need not.
        codec_fingerprint (str, optional): of the codebooks whose codes the model was trained on.
        has_integer_form (bool): the checkpoint holds the integer form, which alone may feed a range coder.
        has_float_form (bool): the checkpoint holds the float weights, which training and `forward` need.

    Raises:
        ValueError: for any value that cannot make a working model or is of another type, with the value and what is
            allowed.

    Examples:
        >>> from modeling_encodec import EncodecConfig, EncodecLMConfig
        >>> config = EncodecLMConfig.for_codec(EncodecConfig.preset_48khz())
        >>> config.num_codebooks, config.frame_rate, config.context_frames
        (16, 150, 525)
    """

    model_type = "encodec_lm"
    # What `Trainer.predict` leaves out.
    keys_to_ignore_at_inference = ["cache", "codebook_bits"]

    codebook_size: int = 1024
    num_codebooks: int = 32
    hidden_size: int = 200
    num_hidden_layers: int = 5
    num_attention_heads: int = 8
    intermediate_size: int = 800
    context_seconds: int | float = 3.5
    frame_rate: int = 75
    max_positions: int = 2048
    zero_past_key: bool = True
    codec_fingerprint: str | None = None
    has_integer_form: bool = False
    has_float_form: bool = True

    def __post_init__(self, **kwargs):
        self.check_limits(LM_LIMITS)
        require(2 <= self.codebook_size <= 1 << 16, "codebook_size", self.codebook_size, "2 to 65536")
        heads = self.num_attention_heads
        require(
            self.hidden_size >= 4 and self.hidden_size % 2 == 0 and self.hidden_size % heads == 0,
            "hidden_size",
            self.hidden_size,
            f"an even multiple of num_attention_heads ({heads}), at least 4",
        )
        require(self.hidden_size <= 1 << 16, "hidden_size", self.hidden_size, "at most 65536")
        name, seconds, most = "context_seconds", self.context_seconds, MAX_CONTEXT_FRAMES / self.frame_rate
        require(not seconds > most, name, seconds, f"at most {most:g} s")
        one = 1 / self.frame_rate
        require(seconds > 0 and self.context_frames >= 1, name, seconds, f"at least one frame ({one:g} s)")
        require(self.has_integer_form or self.has_float_form, "has_float_form", False, "true without has_integer_form")
        self.check_parameters(lm_parameters(self), ("hidden_size", "codebook_size", *LM_LIMITS))
        super().__post_init__(**kwargs)

    @property
    def context_frames(self) -> int:
        """Frames before its own that a frame's attention sees."""
        return int(self.context_seconds * self.frame_rate + 1e-6)

    @classmethod
    def for_codec(cls, codec: EncodecConfig, **overrides) -> "EncodecLMConfig":
        """The paper's size for the codes of `codec`, without the released models' zero key. `overrides`: others."""
        own = {
            "codebook_size": codec.codebook_size,
            "num_codebooks": codec.num_quantizers,
            "frame_rate": codec.frame_rate,
            "zero_past_key": False,
        }
        return cls(**(own | overrides))


__all__ = ["EncodecConfig", "EncodecLMConfig"]
