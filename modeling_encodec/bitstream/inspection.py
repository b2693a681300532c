"""What an `.ecdc` file says of itself, without decoding it."""

from typing import BinaryIO

from modeling_encodec.bitstream.compression import read_any_header
from modeling_encodec.bitstream.container import Damage, Header, Segment, read_segments
from modeling_encodec.bitstream.v0.container import EcdcHeader
from modeling_encodec.checkpoints import RELEASED, checkpoint_for
from modeling_encodec.models.configuration_encodec import EncodecConfig


# Damaged ranges that are listed.
MAX_DAMAGES = 100


def describe(file: BinaryIO, size: int, model: str | None = None) -> dict[str, str]:
    """The header of an `.ecdc` file of `size` bytes, its segments, and what follows from them.

    Args:
        file: binary, open for reading.
        size: of the file, in bytes.
        model: folder or Hub id of the model, where a version 0 file's name for it does not tell.

    Returns:
        What to show, by name: format, model, codebooks, language model, segments, bytes, saving, samples, sampling
        rate, duration, bit rate and damage, as far as the file tells.

    Raises:
        EcdcError: if it is no `.ecdc` file, or its header is damaged.

    Examples:
        >>> import io, torch
        >>> from modeling_encodec import EncodecModel, bundled_checkpoint, compress
        >>> from modeling_encodec.bitstream.inspection import describe
        >>> model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
        >>> data = compress(model, torch.zeros(1, 48000), 6.0)
        >>> lines = describe(io.BytesIO(data), len(data))
        >>> lines["codebooks"], lines["duration"], lines["bit rate"]
        ('8', '2.00 s', '6.468 kbps, 59.4 times less than 16-bit PCM')
    """
    header, file = read_any_header(file)
    if isinstance(header, EcdcHeader):
        return _describe_original(header, size, model)
    return _describe_segments(file, header, size)


def _describe_segments(file: BinaryIO, header: Header, size: int) -> dict[str, str]:
    raw = coded = frames = payload = segments = 0
    damages, length = [], header.audio_length
    for item in read_segments(file, header):
        if isinstance(item, Damage):
            damages.append(item.describe(header.sampling_rate))
        elif isinstance(item, Segment):
            segments, frames = segments + 1, frames + item.frames
            coded += item.coded_with_lm
            raw, payload = raw + header.raw_size(item.frames), payload + len(item.payload)
        else:
            length = item.audio_length
    lines = {
        "format": "ecdc, version 1",
        "model": f"{header.model_name} ({header.model_fingerprint})",
        "codebooks": str(header.codebooks),
        "language model": "none" if header.lm_name is None else f"{header.lm_name} ({header.lm_fingerprint})",
        "segments": f"{segments}, {coded} of them coded with the language model",
        "bytes": f"{size}: {payload} of codes, {size - payload} of headers, checksums and scales",
    }
    if coded:
        lines["saving"] = f"{1 - payload / raw:.1%} of {raw} bytes of packed codes"
    if length is None:
        lines["samples"] = "not known, the end is missing"
    else:
        lines |= {"samples": str(length), **_rates(length, header.sampling_rate, header.channels, size)}
    if damages:
        more = [f"and {len(damages) - MAX_DAMAGES} more"] if len(damages) > MAX_DAMAGES else []
        lines["damage"] = "; ".join(damages[:MAX_DAMAGES] + more)
    return lines


def _describe_original(header: EcdcHeader, size: int, model: str | None) -> dict[str, str]:
    lines = {
        "format": "ecdc, version 0",
        "model": header.model_name[:100] + (f" ({header.fingerprint[:100]})" if header.fingerprint else ""),
        "codebooks": str(header.num_codebooks),
        "language model": "yes, in floats" if header.uses_lm else "none",
        "bytes": str(size),
        "samples": str(header.audio_length),
    }
    try:
        config = _config_of(model or header.model_name, named=model is None)
    except ValueError:
        return lines  # an unknown model: nothing more can be said
    return lines | _rates(header.audio_length, config.sampling_rate, config.audio_channels, size)


def _rates(samples: int, sampling_rate: int, channels: int, size: int) -> dict[str, str]:
    seconds, pcm = samples / sampling_rate, 2 * samples * channels
    lines = {
        "sampling rate": f"{sampling_rate} Hz, {'stereo' if channels == 2 else 'mono'}",
        "duration": f"{seconds:.2f} s",
    }
    if samples:
        lines["bit rate"] = f"{8 * size / seconds / 1000:.3f} kbps, {pcm / size:.1f} times less than 16-bit PCM"
    return lines


def _config_of(name: str, named: bool) -> EncodecConfig:
    if not named:
        return EncodecConfig.from_pretrained(name)
    if name in RELEASED:  # known by heart, to work without a network
        return EncodecConfig.preset_48khz() if name == "encodec_48khz" else EncodecConfig.preset_24khz()
    return EncodecConfig.from_pretrained(checkpoint_for(name))
