"""What the bundled models give of two short clips, stored: `golden.safetensors`, some 350 kB.

`remake` makes the file; a test holds it against what they give.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from modeling_encodec.checkpoints import bundled_checkpoint, bundled_lm_checkpoint
from modeling_encodec.models.fingerprints import lm_fingerprint, stream_fingerprint
from modeling_encodec.models.modeling_encodec import EncodecModel
from modeling_encodec.models.modeling_lm_encodec import NO_CODE, EncodecLM


PATH = Path(__file__).parent / "golden.safetensors"
LM_FRAMES = 40


@dataclass(frozen=True)
class Golden:
    """The clips and what they give, rows in a dimension of their own and padded with zeros at the end.

    Args:
        audio: the clips (B, 1, T), float32 that 16 bits hold.
        lengths: samples of each, (B,).
        codes: (B, K, F).
        latents: what the codes are nearest to, (B, D, F).
        decoded: audio of the codes, (B, 1, T).
        frequencies: the first 8 bytes of the SHA-256 of the language model's frequencies (int32, little-endian) for
            each of the first row's first LM_FRAMES frames, (LM_FRAMES,).
        about: what it was made with, fingerprints of the models, and step times in milliseconds.
    """

    audio: torch.Tensor
    lengths: torch.Tensor
    codes: torch.Tensor
    latents: torch.Tensor
    decoded: torch.Tensor
    frequencies: torch.Tensor
    about: dict[str, str]

    def frames(self, row: int) -> int:
        """Frames of that row."""
        return -(-int(self.lengths[row]) * self.codes.shape[2] // self.audio.shape[2])


def load_golden(path: Path = PATH) -> Golden:
    """The stored one.

    Raises:
        OSError: if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: install the package again")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        about = file.metadata()
    tensors["audio"] = tensors["audio"].float() / 32768
    tensors["codes"] = tensors["codes"].long()
    return Golden(**tensors, about=about)


def load_models() -> tuple[EncodecModel, EncodecLM]:
    """The bundled codec and its language model, on the CPU."""
    model = EncodecModel.from_pretrained(bundled_checkpoint()).eval()
    return model, EncodecLM.from_pretrained(bundled_lm_checkpoint()).eval()


def previous_frames(codes: torch.Tensor) -> torch.Tensor:
    """The frame before each of the first LM_FRAMES of `codes` (B, K, F), which is none before the first."""
    codes = codes[:1, :, :LM_FRAMES]
    return torch.cat([torch.full_like(codes[:, :, :1], NO_CODE), codes[:, :, :-1]], dim=2)


def digests(frequencies: torch.Tensor) -> torch.Tensor:
    """Of each frame of frequencies (1, K, F, codebook_size), as (F,) int64."""
    frames = frequencies[0].transpose(0, 1).cpu().numpy().astype("<i4")
    hashes = [hashlib.sha256(np.ascontiguousarray(frame).tobytes()).digest()[:8] for frame in frames]
    numbers = [int.from_bytes(digest, "little", signed=True) for digest in hashes]
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def fingerprints(model: EncodecModel, lm: EncodecLM) -> dict[str, str]:
    """Of all weights and settings of both."""
    return {"codec": stream_fingerprint(model), "language model": lm_fingerprint(lm)}
