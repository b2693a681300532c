"""Audio to `.ecdc` bytes and back with a model: `compress` and `decompress`, and the same on file objects."""

import hashlib
import io
from pathlib import PurePath
from typing import BinaryIO

import numpy as np
import torch

from modeling_encodec.batching_encodec import stack_chunks
from modeling_encodec.bitstream.ecdc import (
    EcdcError,
    EcdcHeader,
    read_end,
    read_header,
    read_segment,
    write_header,
    write_segment,
)
from modeling_encodec.checkpoints import RELEASED, checkpoint_for
from modeling_encodec.modeling_encodec import EncodecModel


def compress(
    model: EncodecModel, audio: torch.Tensor | np.ndarray, bandwidth: float | None = None, **options
) -> bytes:
    """The bytes of `compress_to_file`."""
    file = io.BytesIO()
    compress_to_file(model, audio, file, bandwidth, **options)
    return file.getvalue()


def compress_to_file(
    model: EncodecModel,
    audio: torch.Tensor | np.ndarray,
    file: BinaryIO,
    bandwidth: float | None = None,
    *,
    num_quantizers: int | None = None,
    model_name: str | None = None,
) -> None:
    """Write one clip as `.ecdc` version 0.

    Args:
        model: its name in the file is that of the folder or Hub repository it was loaded from.
        audio: (channels, T) at the model's rate, in [-1, 1].
        file: binary, open for writing.
        bandwidth: kbps, the model's smallest by default; or `num_quantizers`.
        model_name: the name to write instead.
    """
    if not isinstance(audio, (torch.Tensor, np.ndarray)) or audio.ndim != 2:
        given = f"has shape {tuple(audio.shape)}" if hasattr(audio, "shape") else f"is a {type(audio).__name__}"
        raise ValueError(f"audio {given}, allowed: a tensor or an array (channels, samples)")
    audio = torch.as_tensor(audio)
    coded = model.encode(audio[None], bandwidth=bandwidth, num_quantizers=num_quantizers)
    name = model_name or name_of(model)
    codes = coded.audio_codes[:, 0].cpu().numpy()
    header = EcdcHeader(name, audio.shape[1], codes.shape[1], fingerprint=fingerprint_for(model, name))
    write_header(file, header)
    for chunk, scale, (start, stop) in zip(codes, coded.audio_scales, model.config.chunk_spans(audio.shape[1])):
        scale = None if scale is None else scale.item()
        write_segment(file, chunk[:, : model.config.num_frames(stop - start)], model.config.codebook_nbits, scale)


def decompress(data: bytes, model: EncodecModel | None = None) -> tuple[torch.Tensor, int]:
    """Audio (channels, T) and its sampling rate of `.ecdc` bytes; see `decompress_from_file`."""
    return decompress_from_file(io.BytesIO(data), model)


def decompress_from_file(file: BinaryIO, model: EncodecModel | None = None) -> tuple[torch.Tensor, int]:
    """Decode one `.ecdc` file: audio (channels, T) and its sampling rate.

    Args:
        file: binary, open for reading; it need not be seekable.
        model: the model to decode with, whatever it is called in the file; by default the one the file names.

    Raises:
        EcdcError: if the file is damaged or was made with other codebooks.
        ValueError: if the file names an unknown model.
    """
    header = read_header(file)
    if model is None:
        model = EncodecModel.from_pretrained(checkpoint_for(header.model_name)).eval()
    codes, scales = read_codes(file, header, model)
    with torch.no_grad():
        decoded = model.decode(codes, scales, audio_lengths=torch.tensor([header.audio_length]))
    audio = decoded.audio_values[0]
    if not torch.isfinite(audio).all():
        raise EcdcError("the file decodes to samples that are not finite: it is damaged, or made with other weights")
    return audio, model.config.sampling_rate


def read_codes(
    file: BinaryIO, header: EcdcHeader, model: EncodecModel
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """All segments after the header, as `audio_codes` (N, 1, K, F) and `audio_scales` for `model.decode`."""
    config = model.config
    if header.uses_lm:
        raise EcdcError("the file is coded with the language model, which this version cannot read yet")
    if header.num_codebooks > config.num_quantizers:
        raise EcdcError(f"the file has {header.num_codebooks} codebooks, allowed: 1 to {config.num_quantizers}")
    if header.fingerprint not in (None, codebook_fingerprint(model)):
        raise EcdcError(
            f"the file was made with other codebooks than this model's (model {header.model_name[:100]!r})"
        )
    chunks, scales = [], []
    for start, stop in config.chunk_spans(header.audio_length):
        frames = config.num_frames(stop - start)
        codes, scale = read_segment(
            file, header.num_codebooks, frames, config.codebook_nbits, has_scale=config.normalize
        )
        if codes.max() >= config.codebook_size:
            raise EcdcError(f"a code is {codes.max()}, allowed: 0 to {config.codebook_size - 1}")
        chunks.append(torch.from_numpy(codes)[None])
        scales.append(None if scale is None else torch.tensor([[scale]]))
    read_end(file)
    return stack_chunks(chunks, [len(chunks)]), scales


def name_of(model: EncodecModel) -> str:
    """What a model is called in a file: the last part of the folder or Hub id it was loaded from."""
    return PurePath(model.config._name_or_path).name or "unnamed"


def fingerprint_for(model: EncodecModel, name: str) -> str | None:
    """The fingerprint a file of the model called `name` carries: none for the names the original knows."""
    return None if name in RELEASED else codebook_fingerprint(model)


def codebook_fingerprint(model: EncodecModel) -> str:
    """16 hexadecimal digits of the SHA-256 of all codebooks: what its codes mean."""
    digest = hashlib.sha256()
    for layer in model.quantizer.layers:
        digest.update(layer.codebook.embed.float().cpu().numpy().astype("<f4").tobytes())
    return digest.hexdigest()[:16]
