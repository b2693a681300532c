"""What an `.ecdc` file says of itself, without decoding it."""

from typing import BinaryIO

from modeling_encodec.bitstream.ecdc import read_header
from modeling_encodec.checkpoints import RELEASED, checkpoint_for
from modeling_encodec.configuration_encodec import EncodecConfig


def describe(file: BinaryIO, size: int, model: str | None = None) -> dict[str, str]:
    """The header of an `.ecdc` file of `size` bytes, and what follows from it if the model is known.

    Args:
        file: binary, open for reading.
        size: of the file, in bytes.
        model: folder or Hub id of the model, where its name in the file does not tell.
    """
    header = read_header(file)
    lines = {
        "format": "ecdc, version 0",
        "model": header.model_name[:100],
        "codebooks": str(header.num_codebooks),
        "entropy": "language model" if header.uses_lm else "none (packed codes)",
        "bytes": str(size),
        "samples": str(header.audio_length),
    }
    try:
        config = _config_of(model or header.model_name, named=model is None)
    except ValueError:
        return lines  # an unknown model: nothing more can be said
    seconds = header.audio_length / config.sampling_rate
    pcm = 2 * header.audio_length * config.audio_channels
    return lines | {
        "sampling rate": f"{config.sampling_rate} Hz, {'stereo' if config.audio_channels == 2 else 'mono'}",
        "duration": f"{seconds:.2f} s",
        "bit rate": f"{8 * size / seconds / 1000:.3f} kbps, {pcm / size:.1f} times less than 16-bit PCM",
    }


def _config_of(name: str, named: bool) -> EncodecConfig:
    if not named:
        return EncodecConfig.from_pretrained(name)
    if name in RELEASED:  # known by heart, to work without a network
        return EncodecConfig.preset_48khz() if name == "encodec_48khz" else EncodecConfig.preset_24khz()
    return EncodecConfig.from_pretrained(checkpoint_for(name))
