"""What is evaluated and what it is compared with: codecs that take audio and give it back, counting bytes and time.

Anchors are real programs: Opus and MP3 by ffmpeg, or Opus by opus-tools, through their files. Containers count: a file
is what is stored or sent. What a machine has not got is named, never left out silently.
"""

import functools
import io
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile
import torch

from modeling_encodec.bitstream.codes_file import check_lm
from modeling_encodec.bitstream.compression import compress, decompress
from modeling_encodec.checkpoints.released import released_by_name
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import EncodecLM
from modeling_encodec.processors.audio import read_audio, resample


ANCHORS = ("opus@6", "opus@12", "opus@24", "mp3@64")
# Rates that each takes as they are; audio at others is resampled to 48 kHz by us, as everywhere, and not by them.
RATES = {
    "opus": (8_000, 12_000, 16_000, 24_000, 48_000),
    "mp3": (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000),
}
FFMPEG_ENCODERS = {"opus": "libopus", "mp3": "libmp3lame"}


@dataclass(frozen=True)
class Coded:
    """What a system made of a clip: audio (channels, T) of the clip's length, bytes of the file, seconds of work.
    `bytes` is None where nothing is coded, `lm_bytes` where there is no language model."""

    audio: np.ndarray
    bytes: int | None
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    lm_bytes: int | None = None


class System(Protocol):
    """A codec at one bitrate. `kbps` is what it is asked for, None where there is nothing to ask."""

    name: str
    kbps: float | None

    def code(self, audio: np.ndarray) -> Coded:
        """Float32 audio (channels, T) coded and decoded."""


class Identity:
    """Gives back what it gets: the best that each metric can say of anything."""

    name, kbps = "identity", None

    def code(self, audio: np.ndarray) -> Coded:
        """The same audio."""
        return Coded(audio.copy(), None)


class Codec:
    """The model that is evaluated, at one bandwidth, through `.ecdc` bytes; with a language model, counted beside."""

    name = "encodec"

    def __init__(self, model: EncodecModel, kbps: float, lm: EncodecLM | None = None):
        """`kbps`: one of the model's bandwidths. A ValueError for a language model of another codec."""
        if lm is not None:
            check_lm(lm, model)
        self.model, self.kbps, self.lm = model, kbps, lm

    def code(self, audio: np.ndarray) -> Coded:
        """Float32 audio (channels, T) compressed and decompressed."""
        start = time.perf_counter()
        data = compress(self.model, audio, self.kbps)
        middle = time.perf_counter()
        decoded, _ = decompress(data, self.model)
        stop = time.perf_counter()
        lm_bytes = None if self.lm is None else len(compress(self.model, audio, self.kbps, self.lm))
        return Coded(decoded.float().cpu().numpy(), len(data), middle - start, stop - middle, lm_bytes)


class Program:
    """Opus or MP3 by a program on the PATH, through files in a temporary folder."""

    def __init__(self, name: str, kbps: float, sampling_rate: int, channels: int):
        """`sampling_rate` in Hz and `channels`: of the audio that will come.

        Raises:
            ValueError: for a bitrate that the encoder does not take.
        """
        self.name, self.kbps, self.sampling_rate = name, kbps, sampling_rate
        self.rate = sampling_rate if sampling_rate in RATES[name] else 48_000
        if name == "opus":
            low, high = 1, min(510, 256 * channels)
        else:
            low, high = (32, 320) if self.rate >= 32_000 else (8, 160)
        if not low <= kbps <= high:
            raise ValueError(f"{name} at {kbps:g} kbps, allowed: {low} to {high} for this model's audio")

    def code(self, audio: np.ndarray) -> Coded:
        """Float32 audio (channels, T) written as WAV, encoded and decoded by the program, read back at the same rate
        and length.

        Raises:
            RuntimeError: if the program fails, with what it says.
        """
        with tempfile.TemporaryDirectory() as folder:
            wav, coded, back = (Path(folder) / name for name in ("in.wav", f"coded.{self.name}", "back.wav"))
            soundfile.write(wav, resample(audio, self.sampling_rate, self.rate).T, self.rate, subtype="FLOAT")
            encode, decode = self._commands(wav, coded, back)
            start = time.perf_counter()
            _run(encode)
            middle = time.perf_counter()
            _run(decode)
            stop = time.perf_counter()
            decoded, _ = read_audio(back, self.sampling_rate, len(audio))
            size = coded.stat().st_size
        return Coded(_to_length(decoded, audio.shape[1]), size, middle - start, stop - middle)

    def _commands(self, wav: Path, coded: Path, back: Path) -> tuple[list, list]:
        if _ffmpeg_has(FFMPEG_ENCODERS[self.name]):
            start = ["ffmpeg", "-nostdin", "-loglevel", "error", "-i"]
            encoder = ["-c:a", FFMPEG_ENCODERS[self.name], "-b:a", f"{self.kbps:g}k"]
            return [*start, wav, *encoder, coded], [*start, coded, "-c:a", "pcm_f32le", back]
        return (
            ["opusenc", "--quiet", "--bitrate", f"{self.kbps:g}", wav, coded],
            ["opusdec", "--quiet", "--float", coded, back],
        )


class Original:
    """The `encodec` package's own model, where its weights are at hand; bytes are those of its own files."""

    name = "original"

    def __init__(self, model, kbps: float):
        """`model`: an `encodec.EncodecModel`."""
        self.model, self.kbps = model, kbps

    @torch.no_grad()
    def code(self, audio: np.ndarray) -> Coded:
        """Float32 audio (channels, T) encoded and decoded by that package."""
        from encodec.compress import compress_to_file

        self.model.set_target_bandwidth(self.kbps)
        batch, file = torch.from_numpy(audio)[None], io.BytesIO()
        start = time.perf_counter()
        frames = self.model.encode(batch)
        middle = time.perf_counter()
        decoded = self.model.decode(frames)[0].numpy()
        stop = time.perf_counter()
        compress_to_file(self.model, batch[0], file, use_lm=False)
        return Coded(_to_length(decoded, audio.shape[1]), file.tell(), middle - start, stop - middle)


def make_systems(
    model: EncodecModel,
    lm: EncodecLM | None = None,
    *,
    bandwidths: list[float] | None = None,
    anchors: tuple[str, ...] | list[str] = ANCHORS,
    original: Path | None = None,
) -> tuple[list[System], dict[str, str]]:
    """What to evaluate beside what, and which anchors are missing, with the reason.

    Args:
        model: the codec that is evaluated.
        lm: language model, whose bytes are counted beside those without.
        bandwidths: kbps of the model, all by default.
        anchors: "opus@KBPS" and "mp3@KBPS".
        original: folder with the released weights of the `encodec` package, by default where it downloads them to.

    Raises:
        ValueError: for a bandwidth that the model has not, or an anchor that nobody knows.
    """
    known = list(model.config.target_bandwidths)
    bandwidths = list(dict.fromkeys(bandwidths or known))
    for bandwidth in bandwidths:
        if bandwidth not in known:
            raise ValueError(f"bandwidth is {bandwidth:g} kbps, allowed: {', '.join(f'{b:g}' for b in known)}")
    systems: list[System] = [Codec(model, kbps, lm) for kbps in bandwidths]
    missing = {}
    package = _original_model(model, original)
    if isinstance(package, str):
        missing["original"] = package
    else:
        systems += [Original(package, kbps) for kbps in bandwidths]
    config = model.config
    for anchor in dict.fromkeys(anchors):
        found = re.fullmatch(r"(opus|mp3)@(\d+(?:\.\d+)?)", anchor, re.ASCII)
        if found is None:
            raise ValueError(f"anchor is {anchor!r}, allowed: opus@KBPS, mp3@KBPS")
        name, kbps = found.groups()
        program = Program(name, float(kbps), config.sampling_rate, config.audio_channels)
        reason = _missing_program(name)
        if reason is None:
            systems.append(program)
        else:
            missing[anchor] = reason
    return [*systems, Identity()], missing


def program_versions() -> dict[str, str]:
    """What ffmpeg and opusenc say of themselves."""
    versions = {}
    for program, option in (("ffmpeg", "-version"), ("opusenc", "--version")):
        if shutil.which(program):
            said = subprocess.run([program, option], capture_output=True, text=True).stdout.split("\n")[0]
            found = re.search(r"(?:version|opus-tools) (\S+)", said)
            versions[program] = found[1] if found else said
    return versions


def _original_model(model: EncodecModel, folder: Path | None):
    """The `encodec` package's model of the same rate and channels with the released weights, or why there is none."""
    config = model.config
    names = {(24_000, 1): "encodec_24khz", (48_000, 2): "encodec_48khz"}
    name = names.get((config.sampling_rate, config.audio_channels))
    if name is None:
        return f"has no model of {config.sampling_rate} Hz and {config.audio_channels} channels"
    folder, file = folder or Path(torch.hub.get_dir()) / "checkpoints", released_by_name(name).file
    if not (folder / file).is_file():
        return f"{file} is not at hand"
    try:
        import encodec
    except ImportError as error:
        return f"the encodec package is not installed ({error})"
    return getattr(encodec.EncodecModel, name.replace("encodec_", "encodec_model_"))(repository=folder)


def _missing_program(name: str) -> str | None:
    """Why there is no `Program` of this name here; None if there is."""
    encoder = FFMPEG_ENCODERS[name]
    if _ffmpeg_has(encoder):
        return None
    if name != "opus":
        return f"ffmpeg with {encoder} is not installed"
    tools = shutil.which("opusenc") and shutil.which("opusdec")
    return None if tools else f"neither ffmpeg with {encoder} nor opusenc and opusdec are installed"


@functools.cache
def _ffmpeg_has(encoder: str) -> bool:
    if not shutil.which("ffmpeg"):
        return False
    listed = subprocess.run(["ffmpeg", "-hide_banner", "-encoders"], capture_output=True, text=True).stdout
    return f" {encoder} " in listed


def _run(command: list) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).split("\n")[-1]
        raise RuntimeError(f"{command[0]} failed ({done.returncode}): {said}")


def _to_length(audio: np.ndarray, length: int) -> np.ndarray:
    return np.pad(audio[:, :length], ((0, 0), (0, max(0, length - audio.shape[1]))))
