"""The original's `.ecdc` file, version 0: header and segments of packed codes, byte for byte but for one key.

    bytes      content
    4          "ECDC"
    1          version, 0
    4          N, big-endian length of the header text
    N          JSON: {"m": model name, "al": samples, "nc": codebooks, "lm": coded with the language model?}
    then for each chunk of the signal (one, for a model that codes the whole signal):
    4          big-endian float32 scale, if the model normalises
    ...        codes, frame by frame and in each frame codebook by codebook, ceil(log2(codebook size)) bits each,
               least significant bit first; zero bits up to a whole byte

Chunks carry no lengths: frames follow from "al". The format names a model but cannot tell its weights; files written
here therefore carry one more key, "fp", the model's fingerprint as in version 1, which the original passes over. With
"lm" the codes are written as in `language_model` instead.
"""

import json
import math
import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from modeling_encodec.bitstream.bit_packing import pack, packed_size, unpack
from modeling_encodec.bitstream.errors import EcdcError, read_exactly


MAGIC = b"ECDC"
VERSION = 0
PREFIX = struct.Struct("!4sBI")
SCALE = struct.Struct("!f")
# Real headers have under 100 bytes; a longer one is damage, and is not read.
MOST_HEADER_BYTES = 4096
# Frames that are unpacked at a time, a multiple of 8.
BLOCK_FRAMES = 1 << 12
# The greatest length that other programs' numbers hold.
MAX_SAMPLES = 2**63 - 1


@dataclass(frozen=True)
class EcdcHeader:
    """The JSON of an `.ecdc` file: `audio_length` in samples at the model's rate."""

    model_name: str
    audio_length: int
    num_codebooks: int
    uses_lm: bool = False
    fingerprint: str | None = None


def write_header(file: BinaryIO, header: EcdcHeader) -> None:
    """Write magic, version and JSON of `header`, spelt as the original spells them."""
    fields = {
        "m": header.model_name,
        "al": header.audio_length,
        "nc": header.num_codebooks,
        "lm": header.uses_lm,
    }
    if header.fingerprint is not None:
        fields["fp"] = header.fingerprint
    text = json.dumps(fields).encode()
    file.write(PREFIX.pack(MAGIC, VERSION, len(text)) + text)


def read_header(file: BinaryIO) -> EcdcHeader:
    """The header, checked; the file stands at the first segment after it.

    Raises:
        EcdcError: for anything but a version 0 header with sensible values.
    """
    magic, version, size = PREFIX.unpack(read_exactly(file, PREFIX.size, "header"))
    if magic != MAGIC:
        raise EcdcError(f"not an .ecdc file: it starts with {magic!r}, allowed: {MAGIC!r}")
    if version != VERSION:
        raise EcdcError(f".ecdc version is {version}, allowed: {VERSION} or 1")
    if size > MOST_HEADER_BYTES:
        raise EcdcError(f"header length is {size} bytes, allowed: up to {MOST_HEADER_BYTES}")
    text = read_exactly(file, size, "header")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EcdcError(f"header is no JSON ({type(error).__name__})") from None
    kinds = {"m": str, "al": int, "nc": int, "lm": bool}
    if not isinstance(fields, dict) or any(type(fields.get(key)) is not kind for key, kind in kinds.items()):
        raise EcdcError(
            f"header is {str(fields)[:100]}, allowed: m (text), al and nc (whole numbers), lm (true/false)"
        )
    if not (1 <= fields["al"] <= MAX_SAMPLES and 1 <= fields["nc"] <= MAX_SAMPLES):
        numbers = f"{str(fields['al'])[:40]} and nc {str(fields['nc'])[:40]}"
        raise EcdcError(f"header has al {numbers}, allowed: 1 to {MAX_SAMPLES} each")
    if not isinstance(fields.get("fp"), (str, type(None))):
        raise EcdcError(f"header has fp {str(fields['fp'])[:100]}, allowed: text")
    return EcdcHeader(fields["m"], fields["al"], fields["nc"], fields["lm"], fields.get("fp"))


def write_segment(file: BinaryIO, codes: np.ndarray, bits: int) -> None:
    """Write one chunk's `codes` (K, F) of `bits` bits each."""
    file.write(pack(codes.T.reshape(-1), bits))


def read_segment(file: BinaryIO, codebooks: int, frames: int, bits: int) -> np.ndarray:
    """One chunk's codes (K, F), uint16 if they fit. Memory grows with what the file really holds.

    Raises:
        EcdcError: if the file ends early.
    """
    dtype = np.uint16 if bits <= 16 else np.int64
    data = bytearray()
    for start in range(0, frames, BLOCK_FRAMES):  # whole bytes each, for unpacking takes ten times the memory
        count = codebooks * min(BLOCK_FRAMES, frames - start)
        packed = read_exactly(file, packed_size(count, bits), "codes")
        data += unpack(packed, count, bits).astype(dtype).tobytes()
    return np.frombuffer(data, dtype).reshape(frames, codebooks).T


def write_scale(file: BinaryIO, scale: float) -> None:
    """Write the loudness that the next chunk was divided by."""
    file.write(SCALE.pack(scale))


def read_scale(file: BinaryIO) -> float:
    """The next chunk's scale.

    Raises:
        EcdcError: if it is not a finite positive number.
    """
    (scale,) = SCALE.unpack(read_exactly(file, SCALE.size, "scale"))
    if not (math.isfinite(scale) and scale > 0):
        raise EcdcError(f"scale is {scale}, allowed: finite and above 0")
    return scale


def read_end(file: BinaryIO) -> None:
    """Make sure that nothing follows.

    Raises:
        EcdcError: if something does.
    """
    if file.read(1):
        raise EcdcError("bytes follow the last segment, allowed: none")
