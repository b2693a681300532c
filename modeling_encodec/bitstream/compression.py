"""Audio to `.ecdc` bytes and back with a model: `compress` and `decompress`, and the same on file objects."""

import functools
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import BinaryIO, Literal

import numpy as np
import torch

from modeling_encodec.bitstream.codes_file import (
    MAX_SECONDS,
    SEGMENT_SECONDS,
    EcdcReader,
    EcdcWriter,
    check_lm,
    check_seconds,
)
from modeling_encodec.bitstream.concealment import JoinedCodes, check_way, join_segments, silence
from modeling_encodec.bitstream.container import VERSION, Damage, Header, read_header
from modeling_encodec.bitstream.errors import EcdcError, read_exactly
from modeling_encodec.bitstream.segment_coders import MOST_ROWS
from modeling_encodec.bitstream.v0.container import MAGIC, EcdcHeader
from modeling_encodec.bitstream.v0.container import read_header as read_original_header
from modeling_encodec.bitstream.v0.file import read_original, write_original
from modeling_encodec.bitstream.v0.language_model import check_original_lm
from modeling_encodec.checkpoints import checkpoint_for, lm_checkpoint_for
from modeling_encodec.models.batching_encodec import as_audio
from modeling_encodec.models.inputs_encodec import whole_number
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.streaming.streams import decode_blocks, encode_blocks


logger = logging.getLogger(__name__)


def compress(
    model: EncodecModel,
    audio: torch.Tensor | np.ndarray,
    bandwidth: float | None = None,
    lm: EncodecLM | None = None,
    **options,
) -> bytes:
    """One clip as the bytes of an `.ecdc` file; the same audio gives the same bytes.

    Args:
        model: the codec.
        audio: (channels, T) at the model's rate, in [-1, 1]; integer PCM is scaled to that.
        bandwidth: kbps, one of the model's; its first by default.
        lm: language model, with its integer form, that codes what gets shorter by it (paper 3.3).
        **options (keyword arguments): as of `compress_to_file`: `num_quantizers`, `model_name`, `lm_name`,
            `segment_seconds`, `version`.

    Returns:
        What `compress_to_file` writes.

    Raises:
        ValueError: for audio, bandwidth or language model that do not fit the model.

    Examples:
        >>> import torch
        >>> from modeling_encodec import EncodecLM, EncodecModel, bundled_checkpoint, bundled_lm_checkpoint
        >>> from modeling_encodec import compress, decompress
        >>> model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
        >>> audio = 0.1 * torch.randn(1, 24000)  # a second
        >>> data = compress(model, audio, bandwidth=6.0)
        >>> len(data)  # 750 bytes of codes; a header, checksums and the end
        867
        >>> decoded, rate = decompress(data, model)
        >>> decoded.shape, rate
        (torch.Size([1, 24000]), 24000)
        >>> lm = EncodecLM.from_pretrained(bundled_lm_checkpoint()).eval()
        >>> len(compress(model, torch.zeros(1, 24000), 6.0, lm)) < 500
        True
    """
    file = io.BytesIO()
    compress_to_file(model, audio, file, bandwidth, lm, **options)
    return file.getvalue()


def compress_to_file(
    model: EncodecModel,
    audio: torch.Tensor | np.ndarray,
    file: BinaryIO,
    bandwidth: float | None = None,
    lm: EncodecLM | None = None,
    *,
    num_quantizers: int | None = None,
    model_name: str | None = None,
    lm_name: str | None = None,
    segment_seconds: float = SEGMENT_SECONDS,
    version: int = 1,
) -> None:
    """Write one clip as `.ecdc`. The same audio gives the same bytes.

    Args:
        model: the codec.
        audio: (channels, T) at the model's rate, in [-1, 1]; integer PCM is scaled to that.
        file: binary, open for writing; it need not be seekable.
        bandwidth: kbps, one of the model's; its first by default.
        lm: language model, with its integer form, that codes what gets shorter by it (paper 3.3).
        num_quantizers: codebooks, instead of `bandwidth`.
        model_name: what the file calls the model; by default, the folder or Hub id it was loaded from.
        lm_name: what the file calls the language model, in the same way.
        segment_seconds: each segment is checked and decoded by itself; what damage costs at least. Version 1 only.
        version: 1, or 0 for the file of the `encodec` package (its language model is then used in floats).

    Raises:
        ValueError: for audio, bandwidth or language model that do not fit the model.

    Examples:
        >>> import torch
        >>> from modeling_encodec import EncodecModel, bundled_checkpoint, compress_to_file, decompress_from_file
        >>> model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
        >>> with open("clip.ecdc", "wb") as file:
        ...     compress_to_file(model, torch.zeros(1, 36000), file, num_quantizers=3)
        >>> with open("clip.ecdc", "rb") as file:  # the file names its model
        ...     decompress_from_file(file)[0].shape
        torch.Size([1, 36000])
    """
    if not isinstance(audio, (torch.Tensor, np.ndarray)) or audio.ndim != 2:
        given = f"has shape {tuple(audio.shape)}" if hasattr(audio, "shape") else f"is a {type(audio).__name__}"
        raise ValueError(f"audio {given}, allowed: a tensor or an array (channels, samples)")
    version = whole_number("version", version, 0, 1, allowed="0 or 1")
    if lm is not None:  # before the work of encoding
        check_lm(lm, model) if version == 1 else check_original_lm(lm)
    audio = as_audio("audio", audio)
    if version == 0:
        coded = model.encode(audio[None], bandwidth=bandwidth, num_quantizers=num_quantizers)
        write_original(file, model, coded, model_name or name_of(model), lm)
        return
    compress_blocks(
        model,
        [audio],
        file,
        bandwidth,
        lm,
        num_quantizers=num_quantizers,
        model_name=model_name,
        lm_name=lm_name,
        segment_seconds=segment_seconds,
        audio_length=audio.shape[1],
    )


def compress_blocks(
    model: EncodecModel,
    blocks: Iterable[torch.Tensor | np.ndarray],
    file: BinaryIO,
    bandwidth: float | None = None,
    lm: EncodecLM | None = None,
    *,
    num_quantizers: int | None = None,
    model_name: str | None = None,
    lm_name: str | None = None,
    segment_seconds: float = SEGMENT_SECONDS,
    audio_length: int | None = None,
) -> None:
    """`compress_to_file` of a clip that comes in blocks, in memory that does not grow with it.

    Where the file can be sought in, or `audio_length` is given, the same audio gives the same bytes in any blocks.

    Args:
        model: the codec.
        blocks: audio (channels, T) at the model's rate, piece by piece.
        file: binary, open for writing; it need not be seekable.
        bandwidth: kbps, one of the model's; its first by default.
        lm: as of `compress_to_file`; so are `num_quantizers`, `model_name`, `lm_name` and `segment_seconds`.
        audio_length: samples of the whole clip, if known.

    Raises:
        ValueError: for blocks, bandwidth or language model that do not fit the model.

    Examples:
        >>> import io, torch
        >>> from modeling_encodec import EncodecModel, bundled_checkpoint, compress, compress_blocks
        >>> model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
        >>> audio, file = 0.1 * torch.randn(1, 24000), io.BytesIO()
        >>> compress_blocks(model, audio.split(7000, dim=1), file, 3.0)
        >>> file.getvalue() == compress(model, audio, 3.0)
        True
    """
    num_quantizers = model.resolve_quantizers(bandwidth, num_quantizers)
    writer = EcdcWriter(
        file,
        model,
        num_codebooks=num_quantizers,
        model_name=model_name or name_of(model),
        lm=lm,
        lm_name=None if lm is None else lm_name or name_of(lm),
        segment_seconds=segment_seconds,
        audio_length=audio_length,
    )
    samples = 0

    def counted() -> Iterator[torch.Tensor | np.ndarray]:
        nonlocal samples
        for block in blocks:
            if getattr(block, "ndim", None) != 2 or block.shape[0] != model.config.audio_channels:
                raise ValueError(
                    f"a block has shape {tuple(getattr(block, 'shape', ()))}, allowed: "
                    f"({model.config.audio_channels}, samples)"
                )
            samples += block.shape[1]
            yield block

    for codes, scale in encode_blocks(model, counted(), num_quantizers):
        writer.write(codes.cpu().numpy(), scale)
    writer.close(samples)


def decompress(
    data: bytes, model: EncodecModel | None = None, lm: EncodecLM | None = None, **options
) -> tuple[torch.Tensor, int]:
    """Audio of the bytes of an `.ecdc` file of either version.

    Args:
        data: the file's bytes.
        model: the codec; by default the one that the file names.
        lm: the language model, if the file is coded with one; by default the one that it names.
        **options (keyword arguments): as of `decompress_blocks`: `strict`, `conceal`, `other_decoder`, `on_damage`,
            `max_seconds`.

    Returns:
        The audio (channels, T), in the model's dtype and on its device, and its sampling rate in Hz.

    Raises:
        EcdcError: a `ValueError`: for damage, or models the file was not made with, as of `decompress_blocks`.
        ValueError: if the file names a model that is not known.

    Examples:
        >>> import torch
        >>> from modeling_encodec import EncodecModel, bundled_checkpoint, compress, decompress
        >>> model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
        >>> audio = 0.1 * torch.randn(1, 24000)
        >>> decoded, rate = decompress(compress(model, audio, 3.0))
        >>> with torch.no_grad():
        ...     torch.equal(decoded, model(audio[None], bandwidth=3.0).audio_values[0])
        True
        >>> decompress(b"no audio")
        Traceback (most recent call last):
        ...
        modeling_encodec.bitstream.errors.EcdcError: ...
    """
    return decompress_from_file(io.BytesIO(data), model, lm, **options)


def decompress_from_file(
    file: BinaryIO,
    model: EncodecModel | None = None,
    lm: EncodecLM | None = None,
    *,
    conceal: Literal["silence", "repeat"] = "silence",
    **options,
) -> tuple[torch.Tensor, int]:
    """Audio of one `.ecdc` file of either version.

    Args:
        file: binary, open for reading; it need not be seekable.
        model: the codec; by default the one that the file names.
        lm: the language model, if the file is coded with one; by default the one that it names.
        conceal: as of `decompress_blocks`.
        **options (keyword arguments): as of `decompress_blocks` too: `strict`, `other_decoder`, `on_damage`,
            `max_seconds`.

    Returns:
        The audio (channels, T), in the model's dtype and on its device, and its sampling rate in Hz.

    Raises:
        EcdcError: a `ValueError`: for damage, or models the file was not made with, as of `decompress_blocks`.
        ValueError: if the file names a model that is not known.

    Examples:
        >>> import io, torch
        >>> from modeling_encodec import EncodecModel, bundled_checkpoint, compress, decompress_from_file
        >>> model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
        >>> file = io.BytesIO(compress(model, torch.zeros(1, 30000)))
        >>> audio, rate = decompress_from_file(file, model, strict=True)
        >>> audio.shape, rate
        (torch.Size([1, 30000]), 24000)
    """
    check_way(conceal)
    model, joined = read_joined(file, model, lm, **options)
    audio, start = None, 0
    for block in decode_joined(model, joined, silent=conceal == "silence"):
        if audio is None:
            audio = block.new_empty(block.shape[0], joined.audio_length)
        audio[:, start : start + block.shape[1]] = block
        start += block.shape[1]
    return audio[:, :start], model.config.sampling_rate


def decompress_blocks(
    file: BinaryIO,
    model: EncodecModel | None = None,
    lm: EncodecLM | None = None,
    *,
    strict: bool = False,
    conceal: Literal["silence", "repeat"] = "silence",
    other_decoder: bool = False,
    on_damage: Callable[[Damage], None] | None = None,
    max_seconds: float | None = MAX_SECONDS,
) -> tuple[Iterator[torch.Tensor], int]:
    """Decode one `.ecdc` file of either version block by block.

    The file is read, and its damage told, before the first block; of its signal only the codes that the file holds are
    then in memory, in 2 bytes each.

    Args:
        file: binary, open for reading; it need not be seekable.
        model: what to decode with, whatever it is called in the file; by default the one that the file names.
        lm: the language model, in the same way.
        strict: damage is an error. Otherwise undamaged segments are decoded and the others concealed. Files of
            version 0 have no checksums: what is seen of their damage is always an error.
        conceal: damaged segments become silence, or the segment before them again.
        other_decoder: take a model with the file's codebooks and another decoder: trained on, or in half precision.
        on_damage: gets each damaged range; by default a line of the log says it.
        max_seconds: audio that the file may hold, by default a day; None is any. Of what is damaged no more than a
            minute and 100 times what could be read is concealed in any case.

    Returns:
        Blocks of audio (channels, T), and their sampling rate in Hz.

    Raises:
        EcdcError: if the header is damaged, nothing or too little can be read, or anything is damaged and `strict` is
            set; if the file holds more audio than `max_seconds`; if model or language model are others than the file
            was made with. It is a `ValueError`.
        ValueError: if the file names a model that is not known, or for another `conceal`.

    Examples:
        >>> import io, torch
        >>> from modeling_encodec import EncodecModel, bundled_checkpoint, compress, decompress_blocks
        >>> model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
        >>> data = bytearray(compress(model, torch.zeros(1, 48000), 6.0, segment_seconds=1.0))
        >>> data[-100] ^= 255  # in the second segment
        >>> damages = []
        >>> blocks, rate = decompress_blocks(io.BytesIO(data), model, on_damage=damages.append)
        >>> sum(block.shape[1] for block in blocks), rate
        (48000, 24000)
        >>> damages[0].describe(rate)
        'segment 1 (1.00 s to 2.00 s): ...'
    """
    check_way(conceal)
    options = {"strict": strict, "other_decoder": other_decoder, "on_damage": on_damage, "max_seconds": max_seconds}
    model, joined = read_joined(file, model, lm, **options)
    return decode_joined(model, joined, silent=conceal == "silence"), model.config.sampling_rate


def read_codes(
    file: BinaryIO,
    model: EncodecModel | None = None,
    lm: EncodecLM | None = None,
    *,
    strict: bool = False,
    other_decoder: bool = False,
    on_damage: Callable[[Damage], None] | None = None,
    max_seconds: float | None = MAX_SECONDS,
) -> np.ndarray:
    """The codes of one `.ecdc` file of either version; chunks of a 48 kHz model follow one another.

    Args:
        file: binary, open for reading; it need not be seekable.
        model: as of `decompress_blocks`; so are `lm`, `strict`, `other_decoder`, `on_damage` and `max_seconds`.

    Returns:
        int32 (codebooks, frames), -1 where the file is damaged.

    Raises:
        EcdcError: as of `decompress_blocks`.
        ValueError: if the file names a model that is not known.

    Examples:
        >>> import io, torch
        >>> from modeling_encodec import EncodecModel, bundled_checkpoint, compress, read_codes
        >>> model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
        >>> audio = 0.1 * torch.randn(1, 24000)
        >>> codes = read_codes(io.BytesIO(compress(model, audio, 1.5)))
        >>> codes.shape
        (2, 75)
        >>> bool((codes == model.encode(audio[None], bandwidth=1.5).audio_codes[0, 0].numpy()).all())
        True
    """
    options = {"strict": strict, "other_decoder": other_decoder, "on_damage": on_damage, "max_seconds": max_seconds}
    _, joined = read_joined(file, model, lm, **options)
    return joined.codes()


def read_joined(
    file: BinaryIO,
    model: EncodecModel | None = None,
    lm: EncodecLM | None = None,
    *,
    strict: bool = False,
    other_decoder: bool = False,
    on_damage: Callable[[Damage], None] | None = None,
    max_seconds: float | None = MAX_SECONDS,
) -> tuple[EncodecModel, JoinedCodes]:
    """A file's model and its codes, for `decode_joined` and `JoinedCodes.codes`: read once for audio and codes.

    Arguments and errors are those of `decompress_blocks`.
    """
    header, file = read_any_header(file)
    if model is None:
        model = EncodecModel.from_pretrained(checkpoint_for(header.model_name)).eval()
    if isinstance(header, EcdcHeader):
        check_seconds(header.audio_length, model.config.sampling_rate, max_seconds)
        pieces = read_original(file, header, model, lm, other_decoder=other_decoder)
        return model, JoinedCodes(lambda: ((*piece, False) for piece in pieces), [], header.audio_length)
    if lm is None and header.lm_name is not None:
        lm = EncodecLM.from_pretrained(lm_checkpoint_for(header.lm_name)).eval()
    options = {"together": MOST_ROWS, "other_decoder": other_decoder, "max_seconds": max_seconds}
    items = EcdcReader(file, header).read(model, lm, **options)
    report = on_damage or functools.partial(_log_damage, sampling_rate=header.sampling_rate)
    joined = join_segments(items, header, model.config, strict=strict, on_damage=report)
    check_seconds(joined.audio_length, header.sampling_rate, max_seconds)  # the end may be missing
    return model, joined


def read_any_header(file: BinaryIO) -> tuple[EcdcHeader | Header, BinaryIO]:
    """The header of either version, and the file, standing after it.

    Raises:
        EcdcError: if it is no `.ecdc` file, of another version, or the header is damaged.
    """
    start = read_exactly(file, len(MAGIC) + 1, "header")
    again = _Prepended(start, file)
    return (read_header if start[-1] == VERSION else read_original_header)(again), again


def name_of(model: EncodecModel | EncodecLM) -> str:
    """What a model is called in a file: the last telling part of the folder or Hub id it was loaded from."""
    parts = PurePath(model.config.name_or_path).parts
    if parts[-1:] == ("model",):  # in the output folder of a training run
        parts = parts[:-1]
    return parts[-1] if parts else "unnamed"


def decode_joined(model: EncodecModel, joined: JoinedCodes, *, silent: bool = True) -> Iterator[torch.Tensor]:
    """Blocks of audio (channels, T) of what `read_joined` read; `silent`: damaged segments become silence.

    Raises:
        EcdcError: if samples are not finite.
    """
    start = 0
    for block in decode_blocks(model, joined.pieces):
        block = block[:, : joined.audio_length - start]
        if not torch.isfinite(block).all():
            raise EcdcError(
                "the file decodes to samples that are not finite: it is damaged, or made with other weights"
            )
        if silent:
            block = silence(block, start, joined.concealed, model.config.sampling_rate)
        if block.shape[1]:
            yield block
        start += block.shape[1]


def _log_damage(damage: Damage, sampling_rate: int) -> None:
    logger.warning("concealed: %s", damage.describe(sampling_rate))


class _Prepended:
    """A file whose first bytes were read already; for readers that do not seek."""

    def __init__(self, start: bytes, file: BinaryIO):
        self.start, self.file = start, file

    def read(self, size: int) -> bytes:
        """The bytes that were read, then the file's."""
        if not self.start:
            return self.file.read(size)
        piece, self.start = self.start[:size], self.start[size:]
        return piece
