"""What the web page does with a file, without a page: `code_clip` and `decode_file`, paths in, dataclasses out."""

import io
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from modeling_encodec.bitstream.compression import (
    compress,
    decode_joined,
    decompress,
    name_of,
    read_any_header,
    read_codes,
    read_joined,
)
from modeling_encodec.bitstream.container import End, Segment, read_segments
from modeling_encodec.bitstream.errors import EcdcError
from modeling_encodec.bitstream.inspection import describe
from modeling_encodec.bitstream.v0.container import EcdcHeader
from modeling_encodec.evaluation.metrics import si_snr
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.processors.audio import AudioReader, join_blocks


@dataclass(frozen=True)
class Limits:
    """What the page takes: so many seconds of audio, in files of so many megabytes (2^20 bytes).

    Raises:
        ValueError: unless both are finite and above 0.
    """

    seconds: float = 60.0
    megabytes: float = 30.0

    def __post_init__(self):
        for name, value in (("seconds", self.seconds), ("megabytes", self.megabytes)):
            if not 0 < value < math.inf:
                raise ValueError(f"most {name} is {value:g}, allowed: a finite number above 0")

    @property
    def bytes(self) -> int:
        """Of a file, at most."""
        return max(1, int(self.megabytes * 2**20))


@dataclass(frozen=True)
class CodedClip:
    """A clip before and after the codec: audio float32 (channels, T), codes int32 (codebooks, frames).

    `data` is the `.ecdc` file, with the language model if one was given; `packed_bytes` and `lm_bytes` are its sizes
    without and with it. `si_snr` is in dB, None where the clip is silent.
    """

    name: str
    bandwidth: float
    sampling_rate: int
    audio: np.ndarray
    decoded: np.ndarray
    codes: np.ndarray
    data: bytes
    packed_bytes: int
    lm_bytes: int | None
    si_snr: float | None

    @property
    def seconds(self) -> float:
        """Duration of the clip."""
        return self.audio.shape[1] / self.sampling_rate

    @property
    def pcm_bytes(self) -> int:
        """What its samples take with 16 bits each."""
        return 2 * self.audio.size

    @property
    def file_name(self) -> str:
        """What the `.ecdc` file is called: clip, bandwidth, language model."""
        return f"{Path(self.name).stem}_{self.bandwidth:g}kbps{'' if self.lm_bytes is None else '_lm'}.ecdc"

    def kbps(self, size: int) -> float:
        """What a file of `size` bytes takes of each second."""
        return 8 * size / self.seconds / 1000


@dataclass(frozen=True)
class DecodedFile:
    """What an `.ecdc` file holds: audio float32 (channels, T), codes int32 (codebooks, frames), -1 where damaged, the
    lines of `inspection.describe`, and the damage found, each range in a line with its time."""

    name: str
    sampling_rate: int
    audio: np.ndarray
    codes: np.ndarray
    description: dict[str, str]
    damages: list[str]


def code_clip(
    model: EncodecModel,
    path: str | os.PathLike,
    bandwidth: float,
    *,
    lm: EncodecLM | None = None,
    limits: Limits | None = None,
) -> CodedClip:
    """An audio file through the codec and back, from the very bytes that `compress` makes of it.

    Args:
        model: the codec.
        path: the file; any rate and channels that `read_audio` takes.
        bandwidth: in kbps, one of the model's.
        lm: also code with this language model.
        limits: of the file; `Limits()` by default.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no audio, empty, not finite, beyond the limits, or for a bandwidth or language model that
            does not fit the model. The message has the file's name, without its folder.
    """
    path = Path(path)
    audio = _read_clip(model, path, limits or Limits())
    packed = compress(model, audio, bandwidth)
    coded = None if lm is None else compress(model, audio, bandwidth, lm)
    decoded = decompress(packed, model)[0].float().cpu()  # of the same codes as with the language model, and sooner
    ratio = si_snr(torch.from_numpy(audio), decoded).mean().item()
    return CodedClip(
        name=path.name,
        bandwidth=bandwidth,
        sampling_rate=model.config.sampling_rate,
        audio=audio,
        decoded=decoded.numpy(),
        codes=read_codes(io.BytesIO(packed), model),
        data=packed if coded is None else coded,
        packed_bytes=len(packed),
        lm_bytes=None if coded is None else len(coded),
        si_snr=None if math.isnan(ratio) else ratio,
    )


def decode_file(
    model: EncodecModel, path: str | os.PathLike, *, lm: EncodecLM | None = None, limits: Limits | None = None
) -> DecodedFile:
    """An `.ecdc` file of either version decoded; what is damaged becomes silence and is named.

    Args:
        model: the codec that the file must have been made with.
        path: the file.
        lm: the language model that the file must have been made with, if with one.
        limits: of the file and its audio; `Limits()` by default.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no `.ecdc` file, beyond the limits, made with another model or language model, or nothing
            of it can be read.
    """
    path, limits = Path(path), limits or Limits()
    _check_size(path, limits)
    data = path.read_bytes()
    try:
        _check_head(data, model, lm, path.name, limits)
        return _decode(model, data, path.name, lm)
    except ValueError as error:
        if path.name in str(error):
            raise
        raise ValueError(f"{path.name}: {error}") from None


def _read_clip(model: EncodecModel, path: Path, limits: Limits) -> np.ndarray:
    """The clip as the model takes it, (channels, T); no more of it is read than is allowed."""
    rate, blocks, samples = model.config.sampling_rate, [], 0
    _check_size(path, limits)
    try:
        with AudioReader(path, rate, model.config.audio_channels) as reader:
            _check_seconds(reader.seconds, path.name, limits)
            # Of a file at 1 Hz one usual block would be days of audio.
            reader.block_length = min(reader.block_length, math.ceil(limits.seconds * reader.rate) + 1)
            for block in reader:
                blocks.append(block)
                samples += block.shape[1]
                _check_seconds(samples / rate, path.name, limits)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), path.name)) from None
    return join_blocks(blocks)


def _check_size(path: Path, limits: Limits) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path.name}: no such file")
    size = path.stat().st_size
    if not size:
        raise ValueError(f"{path.name} is empty")
    if size > limits.bytes:
        raise ValueError(f"{path.name} has {size / 2**20:.1f} MB, allowed: up to {limits.megabytes:g} MB")


def _check_seconds(seconds: float | None, name: str, limits: Limits) -> None:
    if seconds is not None and seconds > limits.seconds:
        raise ValueError(f"{name} is {seconds:.1f} s long, allowed: up to {limits.seconds:g} s")


def _check_head(data: bytes, model: EncodecModel, lm: EncodecLM | None, name: str, limits: Limits) -> None:
    """Refuse a file of more audio than allowed, before anything of it is decoded: a few bytes can be hours. And one
    whose language model is not at hand: it would be fetched by its name."""
    header, file = read_any_header(io.BytesIO(data))
    if isinstance(header, EcdcHeader):
        ours = name_of(model)
        if header.fingerprint is None and header.model_name != ours:  # nothing else would tell
            raise EcdcError(f"{name} was made with {header.model_name[:100]!r}, allowed: {ours!r}, this page's model")
        _check_seconds(header.audio_length / model.config.sampling_rate, name, limits)
        return
    if header.lm_name is not None and lm is None:
        raise EcdcError(f"the file is coded with the language model {header.lm_name[:100]!r}, and none is given")
    samples, frames = header.audio_length or 0, 0
    for item in read_segments(file, header):
        if isinstance(item, End):
            samples = max(samples, item.audio_length)
        elif isinstance(item, Segment):
            # The last one's length alone may be unknown; it is one of its frames at most.
            frames = max(frames, item.index * header.samples_per_segment + 1)
    _check_seconds(max(samples, frames) / header.sampling_rate, name, limits)


def _decode(model: EncodecModel, data: bytes, name: str, lm: EncodecLM | None) -> DecodedFile:
    damages, rate = [], model.config.sampling_rate
    _, joined = read_joined(io.BytesIO(data), model, lm, on_damage=damages.append)
    return DecodedFile(
        name=name,
        sampling_rate=rate,
        audio=torch.cat(list(decode_joined(model, joined)), dim=1).float().cpu().numpy(),
        codes=joined.codes(),
        description=describe(io.BytesIO(data), len(data)),  # with the model's name it might ask the Hub
        damages=[damage.describe(rate) for damage in damages],
    )
