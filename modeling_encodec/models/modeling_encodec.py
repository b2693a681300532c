# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""EncodecModel: audio to codes and back (arXiv 2210.13438), with the interface of Transformers' model of that name.

Code written for the stock class runs unchanged; outputs carry more (lengths per row, scales, latents). State-dict
names are the stock ones, so a folder saved here loads there and the other way round.

The same audio gives the same codes. A row's padding never enters it: rows are cut at their own end, and on a CPU each
row is computed alone, in blocks of a fixed size from its own beginning, so that its neighbours cannot change even its
rounding. An accelerator computes rows together, each padded at its own end (see `seanet_encodec`); there, codes may
differ from those of the row alone where two codebook entries are equally near within float32 rounding.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedAudioTokenizerBase

from .batching_encodec import (
    accelerator_frames,
    as_audio,
    as_codes,
    as_tensor,
    compute_device,
    group_alike,
    padded,
    refuse_tracing,
    row_lengths,
    silence_left_padding,
    stack_chunks,
    stack_scales,
    to_device,
    whole_numbers,
)
from .chunks_encodec import join_chunks
from .configuration_encodec import EncodecConfig
from .inputs_encodec import are_finite, match_number, shown, whole_number
from .loading_encodec import WholeCheckpoints
from .outputs_encodec import EncodecDecoderOutput, EncodecEncoderOutput, EncodecOutput
from .pickling_encodec import PickledByWeights
from .precision_encodec import exact_float32, has_bfloat16
from .quantization_encodec import EncodecEuclideanCodebook, EncodecResidualVectorQuantizer
from .seanet_encodec import EncodecDecoder, EncodecEncoder, block_frames
from .weight_cache_encodec import unchanged_weights


# Frames of all rows of the 24 kHz model that an accelerator computes together.
ACCELERATOR_BATCH_FRAMES = 65536


class EncodecPreTrainedModel(WholeCheckpoints, PickledByWeights, PreTrainedAudioTokenizerBase):
    """Loading, saving and initial weights."""

    config: EncodecConfig
    config_class = EncodecConfig
    base_model_prefix = "encodec"
    main_input_name = "input_values"
    input_modalities = "audio"
    _no_split_modules = ["EncodecEncoder", "EncodecDecoder", "EncodecResidualVectorQuantizer"]
    _keep_in_fp32_modules_strict = ["quantizer"]

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return compute_device(self)

    def made_with(self) -> tuple[EncodecConfig]:
        """The configuration."""
        return (self.config,)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            if parametrize.is_parametrized(module, "weight"):
                # `module.weight` is computed: writing to it would be lost, and the parameters left uninitialised.
                weights = module.parametrizations.weight
                init.kaiming_normal_(weights.original1)
                init.copy_(weights.original0, torch.norm_except_dim(weights.original1, 2, 0))
            else:
                init.kaiming_normal_(module.weight)
            bound = 1 / math.sqrt(module.in_channels * module.kernel_size[0])
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.RNNBase):
            for parameter in module.parameters():
                init.uniform_(parameter, -1 / math.sqrt(module.hidden_size), 1 / math.sqrt(module.hidden_size))
        elif isinstance(module, EncodecEuclideanCodebook):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class EncodecModel(EncodecPreTrainedModel):
    """The EnCodec neural audio codec (paper 3.1, 3.2) of a `config`: `encode`, `decode`, `forward` (both), `embed`.

    Examples:
        >>> import torch
        >>> from modeling_encodec import EncodecModel, bundled_checkpoint
        >>> model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
        >>> coded = model.encode(0.1 * torch.randn(2, 1, 24000), bandwidth=3.0)
        >>> tuple(coded.audio_codes.shape), tuple(model.decode(**coded).audio_values.shape)
        ((1, 2, 4, 75), (2, 1, 24000))
    """

    def __init__(self, config: EncodecConfig):
        super().__init__(config)
        self._precision = "exact"
        self.encoder = EncodecEncoder(config)
        self.decoder = EncodecDecoder(config)
        self.quantizer = EncodecResidualVectorQuantizer(config)
        self.bits_per_codebook = config.codebook_nbits
        self.post_init()

    # ---- audio to codes ------------------------------------------------------------------------------------------

    def encode(
        self,
        input_values: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        bandwidth: float | None = None,
        return_dict: bool | None = None,
        *,
        num_quantizers: int | None = None,
        return_latents: bool = False,
    ) -> EncodecEncoderOutput | tuple:
        """Codes of a batch of audio, as an `EncodecEncoderOutput`.

        Args:
            input_values (torch.Tensor of shape (B, channels, T)): audio in [-1, 1] at the model's sampling rate, a
                tensor or array of any floating dtype, or of integer PCM, which is scaled to that. `(T,)` is one mono
                clip; `(B, T)` mono clips, `(2, T)` one stereo clip.
            padding_mask (torch.Tensor of shape (B, T) or (B, channels, T), optional): 1 on each row's samples,
                then 0 to its end. A row may have its zeros first instead: it is coded as silence, then audio.
            bandwidth (float, optional): kbps, one of `config.target_bandwidths`; the first if nothing is said.
            num_quantizers (int, optional): codebooks to use, instead of `bandwidth`.
            return_latents (bool): also return the encoder's output, with its gradient if gradients are on.
            return_dict (bool, optional): `False` for a tuple `(audio_codes, audio_scales, last_frame_pad_length)`.

        Raises:
            ValueError: for a bandwidth or count the model does not have, or audio it cannot take.
        """
        refuse_tracing("EncodecModel.encode")
        quantizers, return_latents = self.resolve_quantizers(bandwidth, num_quantizers), bool(return_latents)
        audio = self.check_audio(input_values)
        lengths = row_lengths(padding_mask, audio.shape)
        audio = silence_left_padding(audio, padding_mask)
        spans = [list(self.config.chunk_spans(length)) for length in lengths]
        with torch.set_grad_enabled(torch.is_grad_enabled() and return_latents), exact_float32():
            pieces = [audio[r : r + 1, :, slice(*span)] for r, row in enumerate(spans) for span in row]
            codes, scales, latents = self._encode_pieces(pieces, quantizers)
        shape = [len(row) for row in spans]
        longest = lengths.index(max(lengths))
        frames = [[self.config.num_frames(stop - start) for start, stop in row] for row in spans]
        counts = torch.tensor([[sum(row) for row in frames], lengths], dtype=torch.int64, device=audio.device)
        output = EncodecEncoderOutput(
            audio_codes=stack_chunks(codes, shape),
            audio_scales=stack_scales(scales, shape) if self.config.normalize else [None] * max(shape),
            last_frame_pad_length=frames[longest][0] - frames[longest][-1],
            codes_lengths=counts[0],
            audio_lengths=counts[1],
            latents=stack_chunks(latents, shape) if return_latents else None,
        )
        if not self._wants_dict(return_dict):
            return output.audio_codes, output.audio_scales, output.last_frame_pad_length
        return output

    def encode_pieces(self, pieces: list[torch.Tensor], num_quantizers: int) -> tuple[list, list]:
        """Codes (1, K, F), K `num_quantizers`, and scales (1, 1), if the model normalises, of `pieces` of audio
        (1, channels, T) known to be right: whole signals, or chunks."""
        return self._encode_pieces(pieces, num_quantizers)[:2]

    def _encode_pieces(self, pieces: list[torch.Tensor], num_quantizers: int) -> tuple[list, list, list]:
        """The same, and latents (1, D, F)."""
        codes, scales, latents = {}, {}, {}

        def compute(group: list[int], x: torch.Tensor, lengths: list[int]) -> None:
            x, scale = self._normalise(x, lengths)
            y = self._run(self.encoder, x, lengths)
            coded = self.quantize(y, num_quantizers, self.encoder.block_outputs(x, False, y.shape[2]))
            for row, (index, frames) in enumerate(zip(group, self.encoder.row_outputs(y, lengths))):
                codes[index], latents[index] = (part[row : row + 1, :, :frames] for part in (coded, y))
                if scale is not None:
                    scales[index] = scale[row : row + 1]

        self._by_groups(self.encoder, pieces, compute)
        return tuple([found[index] for index in sorted(found)] for found in (codes, scales, latents))

    def quantize(self, latents: torch.Tensor, num_quantizers: int, blocks: list[int] | None = None) -> torch.Tensor:
        """Codes (B, K, F), K `num_quantizers`, of the encoder's `latents` (B, D, F); searched for in `blocks` of so
        many frames, since a product's rounding may depend on its size."""
        parts = latents.split(blocks or latents.shape[2], dim=2)
        codes = [self.quantizer.encode(part, num_quantizers=num_quantizers).transpose(0, 1) for part in parts]
        return codes[0] if len(codes) == 1 else torch.cat(codes, dim=2)

    def resolve_quantizers(self, bandwidth: float | None, num_quantizers: int | None) -> int:
        """Codebooks that `bandwidth` (kbps) or `num_quantizers` asks for; neither: what the first bandwidth takes.
        A ValueError for both, or for what the model does not have."""
        if num_quantizers is not None:
            if bandwidth is not None:
                raise ValueError(f"bandwidth {bandwidth} and num_quantizers {num_quantizers} given, allowed: one")
            most = self.config.num_quantizers
            return whole_number("num_quantizers", num_quantizers, 1, most)
        allowed = self.config.target_bandwidths
        if bandwidth is None:
            bandwidth = allowed[0]
        if (kbps := match_number(bandwidth, allowed)) is None:
            raise ValueError(
                f"This model doesn't support the bandwidth {shown(bandwidth)}. Select one of {list(allowed)} kbps."
            )
        return self.config.num_quantizers_for_bandwidth(kbps)

    def check_audio(self, audio: torch.Tensor) -> torch.Tensor:
        """`audio` as (B, channels, T) on the model's device, or a ValueError that says what is wrong with it."""
        audio, channels = as_audio("input_values", audio), self.config.audio_channels
        shape = tuple(audio.shape)
        if audio.dim() == 1:
            audio = audio[None, None]
        elif audio.dim() == 2:
            audio = audio[:, None] if channels == 1 else audio[None]
        if audio.dim() != 3 or audio.shape[1] != channels or 0 in audio.shape:
            raise ValueError(f"input_values have shape {shape}, allowed: (batch, {channels}, samples), none of them 0")
        if not are_finite(*torch.stack(torch.aminmax(audio)).tolist()):
            raise ValueError("input_values hold NaN or infinity, allowed: finite samples")
        return audio.to(self.device)

    def _normalise(self, x: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Divide each row of `x` (B, channels, T), zero after its own end, by the root mean square of its mono mix
        (paper section 3.1): the rows, and what they were divided by, (B, 1)."""
        if not self.config.normalize:
            return x, None
        x, count = x.float(), lengths[0]
        if lengths[0] != lengths[-1]:
            count = to_device(torch.tensor(lengths, dtype=torch.float32, device="cpu"), x.device).view(-1, 1, 1)
        scale = 1e-8 + (x.mean(1, keepdim=True).square().sum(2, keepdim=True) / count).sqrt()
        return x / scale, scale[:, 0]

    # ---- codes to audio ------------------------------------------------------------------------------------------

    def decode(
        self,
        audio_codes: torch.Tensor,
        audio_scales: list | None = None,
        padding_mask: torch.Tensor | None = None,
        return_dict: bool | None = None,
        last_frame_pad_length: int | None = 0,
        *,
        codes_lengths: torch.Tensor | None = None,
        audio_lengths: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
    ) -> EncodecDecoderOutput | tuple:
        """Audio of codes, an `EncodecDecoderOutput`. `decode(**encode(audio))` gives every row at its own length.

        Gradients, and the graph of the whole signal that they need, there are only where the model trains: in
        `train()` mode, with gradients on, and a decoder (or scales) that takes them. In any mode they come by way of
        `model.decoder(model.embed(codes))`.

        Args:
            audio_codes (torch.LongTensor of shape (N, B, K, F)): as from `encode`, for any K up to the model's;
                `(B, K, F)` for models without chunks.
            audio_scales (list of N torch.Tensor of shape (B, 1)): as from `encode`, if the model normalises.
            padding_mask (torch.Tensor, optional): the mask `encode` was given; rows are cut at their lengths, and
                the result is as wide as the mask.
            last_frame_pad_length (int): frames at the end of the last chunk that are padding in every row.
            codes_lengths (torch.LongTensor of shape (B,), optional): as from `encode`.
            audio_lengths (torch.LongTensor of shape (B,), optional): as from `encode`.
            latents: ignored; there for `decode(**encode(..., return_latents=True))`.
            return_dict (bool, optional): `False` for the tuple `(audio_values,)`.

        Raises:
            ValueError: for codes outside the codebooks, missing scales, or lengths that do not fit the codes.
        """
        refuse_tracing("EncodecModel.decode")
        codes = self._check_chunks(audio_codes)
        scales = self._check_scales(audio_scales, len(codes), codes.shape[1])
        padding_mask = None if padding_mask is None else as_tensor("padding_mask", padding_mask)
        width = None if padding_mask is None else padding_mask.shape[-1]
        lengths = None if padding_mask is None else row_lengths(padding_mask, (codes.shape[1], 1, width))
        if audio_lengths is not None:
            lengths = whole_numbers("audio_lengths", audio_lengths)
        frames = self._valid_frames(codes, lengths, audio_lengths is not None, codes_lengths, last_frame_pad_length)
        with torch.set_grad_enabled(self._learns_to_decode(scales)), exact_float32():
            pieces = [(n, r) for r in range(codes.shape[1]) for n in range(len(codes)) if frames[n][r] > 0]
            factors = None if scales is None else [scales[n][r] for n, r in pieces]
            decoded = self.decode_pieces([codes[n, r : r + 1, :, : frames[n][r]] for n, r in pieces], factors)
            rows = [row.to(self.dtype) for row in join_chunks(self.config, decoded, pieces, codes.shape[1])]
        if lengths is not None:
            rows = [row[..., :length] for row, length in zip(rows, lengths)]
        lengths = [row.shape[2] for row in rows]
        audio_values = padded(rows, width)  # one row alone is not copied: it may be hours
        if not self._wants_dict(return_dict):
            return (audio_values,)
        lengths = torch.tensor(lengths, dtype=torch.int64, device=audio_values.device)
        return EncodecDecoderOutput(audio_values, lengths)

    def _learns_to_decode(self, scales: list[torch.Tensor] | None) -> bool:
        takers = [*self.decoder.parameters(), *(scales or [])]
        return self.training and torch.is_grad_enabled() and any(taker.requires_grad for taker in takers)

    def decode_pieces(self, pieces: list[torch.Tensor], scales: Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
        """Audio (1, channels, T) of `pieces` (1, K, F) of right codes, whole signals or chunks, and their `scales`."""
        decoded = [None] * len(pieces)

        def compute(group: list[int], codes: torch.Tensor, lengths: list[int]) -> None:
            y = self._run(self.decoder, self.embed_checked(codes), lengths)
            if scales is not None:
                y = y.float() * torch.stack([scales[index] for index in group]).view(-1, 1, 1)
            for row, (index, samples) in enumerate(zip(group, self.decoder.row_outputs(y, lengths))):
                decoded[index] = y[row : row + 1, :, :samples]

        self._by_groups(self.decoder, pieces, compute)
        return decoded

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Sum of the codebook vectors of `codes` (..., K, F) as (..., D, F) float32: what the decoder decodes. Codes
        outside the codebooks are a ValueError."""
        codes = as_tensor("codes", codes)
        if codes.dim() < 2:
            raise ValueError(f"codes have shape {tuple(codes.shape)}, allowed: (..., codebooks, frames)")
        codes = self.check_codes(codes)
        latents = self.embed_checked(codes.reshape(-1, *codes.shape[-2:]))
        return latents.view(*codes.shape[:-2], *latents.shape[-2:])

    def embed_checked(self, codes: torch.Tensor) -> torch.Tensor:
        """Latents (B, D, F) of `codes` (B, K, F) known to be within the codebooks."""
        return self.quantizer.decode(codes.transpose(0, 1))

    def _check_chunks(self, codes: torch.Tensor) -> torch.Tensor:
        codes = as_tensor("audio_codes", codes)
        shape = tuple(codes.shape)
        if codes.dim() == 3:
            codes = codes[None]
        if codes.dim() != 4:
            raise ValueError(f"audio_codes have shape {shape}, allowed: (chunks, batch, codebooks, frames)")
        if self.config.chunk_length is None and len(codes) != 1:
            raise ValueError(f"audio_codes have {len(codes)} chunks, allowed: 1 (this model codes the whole signal)")
        return self.check_codes(codes)

    def check_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """`codes` (..., K, F) as int64, or a ValueError if not every one stands for a codebook vector."""
        if 0 in codes.shape or codes.shape[-2] > self.config.num_quantizers:
            most = self.config.num_quantizers
            raise ValueError(f"codes have shape {tuple(codes.shape)}, allowed: no 0, and at most {most} codebooks")
        codes = as_codes("audio_codes", codes)
        low, high = torch.stack(torch.aminmax(codes)).tolist()
        if low < 0 or high >= self.config.codebook_size:
            raise ValueError(f"audio_codes range from {low} to {high}, allowed: 0 to {self.config.codebook_size - 1}")
        return codes

    def _check_scales(self, scales, chunks: int, batch: int) -> list[torch.Tensor] | None:
        if scales is None or all(scale is None for scale in scales):
            if self.config.normalize:
                raise ValueError("audio_scales are missing: this model needs the scales that encode returned")
            return None
        scales = [None if scale is None else as_tensor("audio_scales", scale).float() for scale in scales]
        if len(scales) != chunks or any(scale is None or scale.numel() != batch for scale in scales):
            given = [None if scale is None else tuple(scale.shape) for scale in scales]
            raise ValueError(f"audio_scales are {given}, allowed: {chunks} of shape ({batch}, 1), one a chunk")
        scales = torch.stack([scale.reshape(batch) for scale in scales])
        if not torch.isfinite(scales).all():
            raise ValueError("audio_scales hold NaN or infinity, allowed: finite scales")
        return list(scales.to(self.device))

    def _valid_frames(self, codes, lengths, lengths_are_exact, codes_lengths, last_frame_pad) -> list[list[int]]:
        """Frames of chunk n, row r that are audio, as [n][r]."""
        chunks, batch, _, width = codes.shape
        if lengths is not None:
            if len(lengths) != batch or min(lengths) < 1:
                raise ValueError(f"audio lengths are {lengths}, allowed: {batch} of at least 1 sample")
            rows = [
                [self.config.num_frames(stop - start) for start, stop in self.config.chunk_spans(n)] for n in lengths
            ]
            if max(map(len, rows)) == chunks and max(map(max, rows)) <= width:
                return [[row[n] if n < len(row) else 0 for row in rows] for n in range(chunks)]
            if lengths_are_exact:
                raise ValueError(f"audio_lengths are {lengths}, which {chunks} chunks of {width} frames do not hold")
            # Else: codes of a stock model, which also codes the padding the mask hides.
        if codes_lengths is not None and chunks == 1:
            rows = whole_numbers("codes_lengths", codes_lengths)
            if len(rows) != batch or not all(1 <= n <= width for n in rows):
                raise ValueError(f"codes_lengths are {rows}, allowed: {batch} of 1 to {width} frames")
            return [rows]
        last_frame_pad = 0 if last_frame_pad is None else last_frame_pad
        last = width - whole_number("last_frame_pad_length", last_frame_pad, 0, width - 1)
        return [[width] * batch] * (chunks - 1) + [[last] * batch]

    # ---- both ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_values: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        bandwidth: float | None = None,
        audio_codes: torch.Tensor | None = None,
        audio_scales: list | None = None,
        return_dict: bool | None = None,
        last_frame_pad_length: int | None = 0,
        *,
        num_quantizers: int | None = None,
    ) -> EncodecOutput | tuple:
        """Encode `input_values` and decode again, or decode `audio_codes`: an `EncodecOutput`.

        `padding_mask`, `bandwidth`, `num_quantizers` are those of `encode`, `audio_scales`, `last_frame_pad_length`
        those of `decode`; so is every ValueError. `return_dict=False` gives the tuple `(audio_codes, audio_values)`.
        """
        refuse_tracing("EncodecModel.forward")
        if padding_mask is None and input_values is not None:
            padding_mask = torch.ones_like(self.check_audio(input_values)[:, 0], dtype=torch.bool)
            if audio_codes is not None and len(padding_mask) != (rows := self._check_chunks(audio_codes).shape[1]):
                raise ValueError(
                    f"input_values have {len(padding_mask)} rows and audio_codes {rows}, allowed: as many"
                )
        if audio_codes is None:
            if audio_scales is not None:
                raise ValueError("You specified `audio_scales` but did not specify the `audio_codes`")
            if input_values is None:
                raise ValueError("input_values and audio_codes are both None, allowed: one of them given")
            coded = self.encode(input_values, padding_mask, bandwidth, True, num_quantizers=num_quantizers)
        else:
            coded = EncodecEncoderOutput(audio_codes, audio_scales, last_frame_pad_length)
        decoded = self.decode(**coded, padding_mask=padding_mask, return_dict=True)
        if not self._wants_dict(return_dict):
            return coded.audio_codes, decoded.audio_values
        rest = dict(coded)
        if self.config.normalize is False:
            rest.pop("audio_scales", None)
        if coded.last_frame_pad_length is not None:  # a tensor, as all that is gathered from several devices must be
            length = coded.last_frame_pad_length
            rest["last_frame_pad_length"] = torch.tensor(length, dtype=torch.int64, device=decoded.audio_values.device)
        return EncodecOutput(**rest, audio_values=decoded.audio_values)

    @property
    def block_frames(self) -> int:
        """Frames that are computed at a time."""
        return block_frames(self.device)

    @property
    def precision(self) -> str:
        """`exact` computes in the parameters' own dtype, float32. `fast` computes encoder and decoder, not the code
        search, in bfloat16 where the device has it: some codes become others (docs/speed.md). A setting of this
        object alone, not saved. Others are a ValueError."""
        return self._precision

    @precision.setter
    def precision(self, precision: str) -> None:
        if precision not in ("exact", "fast"):
            raise ValueError(f"precision is {precision!r}, allowed: exact, fast")
        self._precision = precision

    @property
    def compute_dtype(self) -> torch.dtype:
        """What encoder and decoder compute in where no gradient is wanted."""
        fast = self.precision == "fast" and has_bfloat16(self.device)
        return torch.bfloat16 if fast else self.dtype

    @property
    def computes_rows_together(self) -> bool:
        """Whether rows of a batch are computed at once: on accelerators."""
        return self.device.type != "cpu"

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return self.config.return_dict if return_dict is None else return_dict

    def _run(self, net: EncodecEncoder | EncodecDecoder, x: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """`net` on rows (B, C, T) of these `lengths`, each as if alone."""
        fast = not torch.is_grad_enabled() and self.compute_dtype != self.dtype
        return net.rows(x, lengths, self.compute_dtype if fast else None)

    def _by_groups(self, net: nn.Module, pieces: list[torch.Tensor], compute: Callable) -> None:
        """`compute(indices, padded pieces, their lengths)` for the groups of `pieces` that `net` computes together."""
        lengths = [piece.shape[2] for piece in pieces]
        groups = [[index] for index in range(len(pieces))]
        if self.computes_rows_together and net.foreign() is None:
            most = accelerator_frames(self.config, self.device, ACCELERATOR_BATCH_FRAMES)
            groups = group_alike(lengths, most * net.hop, min(most, block_frames(self.device)) * net.hop)
        with unchanged_weights():
            while groups:
                group, too_large = groups.pop(0), False
                try:
                    compute(group, padded([pieces[index] for index in group]), [lengths[index] for index in group])
                except torch.OutOfMemoryError:
                    if len(group) == 1:
                        raise
                    too_large = True
                if too_large:  # others use the device too; what was computed is let go of by now
                    groups[:0] = [group[: len(group) // 2], group[len(group) // 2 :]]


# What `save_pretrained` writes carries this code along, for `trust_remote_code` on a machine without this package.
EncodecConfig.register_for_auto_class()
EncodecModel.register_for_auto_class("AutoModel")

__all__ = ["EncodecModel", "EncodecPreTrainedModel"]
