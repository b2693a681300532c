"""Coded audio into an `.ecdc` file of version 0 and out of it, as the `encodec` package writes and reads them.

Its codes can be coded with a language model too, in floats, which only the machine and the thread count that wrote
such a file can be relied on to read (`language_model`). Version 1 has neither that fault nor this format's want of
checksums.
"""

import logging
from typing import BinaryIO

import numpy as np

from modeling_encodec.bitstream.errors import EcdcError, check_fingerprint
from modeling_encodec.bitstream.v0.container import (
    EcdcHeader,
    read_end,
    read_scale,
    read_segment,
    write_header,
    write_scale,
    write_segment,
)
from modeling_encodec.bitstream.v0.language_model import decode_segment, encode_segment
from modeling_encodec.models.fingerprints import model_fingerprint
from modeling_encodec.models.modeling_encodec import EncodecEncoderOutput, EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM


logger = logging.getLogger(__name__)
WARNING = (
    "version 0 files with a language model hang on the last bits of float probabilities: read on another machine, "
    "torch version or thread count they come out wrong, often without an error; version 1 files do not"
)


def write_original(
    file: BinaryIO, model: EncodecModel, coded: EncodecEncoderOutput, name: str, lm: EncodecLM | None = None
) -> None:
    """Write one clip, `coded` by `encode` as a batch of one, as version 0, under the model's `name`; its codes with
    `lm`, in floats, if there is one.

    Raises:
        ValueError: for a language model that version 0 has no place for.
    """
    if lm is not None:
        logger.warning(WARNING)
    codes, length = coded.audio_codes[:, 0].cpu(), int(coded.audio_lengths[0])
    # Under any name: a folder may be called as a released model, and hold other weights.
    write_header(file, EcdcHeader(name, length, codes.shape[1], lm is not None, model_fingerprint(model)))
    for chunk, scale, (start, stop) in zip(codes, coded.audio_scales, model.config.chunk_spans(length)):
        chunk = chunk[:, : model.config.num_frames(stop - start)].numpy()
        if scale is not None:
            write_scale(file, scale.item())
        if lm is None:
            write_segment(file, chunk, model.config.codebook_nbits)
        else:
            file.write(encode_segment(lm, chunk))


def read_original(
    file: BinaryIO,
    header: EcdcHeader,
    model: EncodecModel,
    lm: EncodecLM | None = None,
    *,
    other_decoder: bool = False,
) -> list[tuple[np.ndarray, float | None]]:
    """Codes (K, F) and scale, if the model normalises, of all chunks after the header.

    Raises:
        EcdcError: if the file is damaged, was made with another model (but for the decoder, with `other_decoder`), or
            needs a language model.
    """
    config = model.config
    if header.uses_lm and lm is None:
        raise EcdcError("the file is coded with a language model, and none is given")
    if header.num_codebooks > config.num_quantizers:
        raise EcdcError(f"the file has {header.num_codebooks} codebooks, allowed: 1 to {config.num_quantizers}")
    if header.fingerprint is None:
        logger.warning("the file has no fingerprint, as the encodec package writes them: its model is not checked")
    else:
        check_fingerprint(header.model_name[:100], header.fingerprint[:100], model, other_decoder)
    if header.uses_lm:
        logger.warning(WARNING)
    chunks = []
    for start, stop in config.chunk_spans(header.audio_length):
        frames = config.num_frames(stop - start)
        scale = read_scale(file) if config.normalize else None
        if header.uses_lm:
            codes = decode_segment(lm, file, header.num_codebooks, frames)
        else:
            codes = read_segment(file, header.num_codebooks, frames, config.codebook_nbits)
        if codes.max() >= config.codebook_size:
            raise EcdcError(f"a code is {codes.max()}, allowed: 0 to {config.codebook_size - 1}")
        chunks.append((codes, scale))
    read_end(file)
    return chunks
