"""The released checkpoints as a table: architecture, checksum, place on the Hub, licence.

Files of the `encodec` package carry the first eight hexadecimal digits of their SHA-256 in their names; those of
audiocraft do not, and are known by their architecture alone. So its entries say whose weights a file may hold and what
licence those have, but nothing about how to run it: that is in the file.

Licences are told as their publishers word them. Whether a licence of code covers the weights beside it has been asked
and not answered (facebookresearch/encodec issues 49 and 69), so the words say what is published and no more.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from modeling_encodec.models.configuration_encodec import EncodecConfig, EncodecLMConfig


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """One released checkpoint.

    Args:
        name: as the original calls the model.
        file: name of the released file.
        sha256_start: first eight hexadecimal digits of the file's SHA-256; `None` where the release does not tell.
        make_config: makes its configuration, anew each time.
        hub_id: where the Hub has the file's model for Transformers, or the file itself; `None` if nowhere.
        licence: SPDX identifier, or words where the publisher gives none for the weights.
        licence_note: where that is said, and what is not.
    """

    name: str
    file: str
    sha256_start: str | None
    make_config: Callable[[], EncodecConfig | EncodecLMConfig]
    hub_id: str | None
    licence: str
    licence_note: str

    @property
    def is_language_model(self) -> bool:
        """Whether it is a language model and no codec."""
        return self.name.startswith("encodec_lm_")

    @property
    def describes_behaviour(self) -> bool:
        """Whether weights of this very architecture may be taken to be run as these are."""
        return self.sha256_start is not None


_ENCODEC = (
    "MIT",
    "the licence of github.com/facebookresearch/encodec since April 2023; of its weights nothing is said",
)
_AUDIOCRAFT = ("CC-BY-NC-4.0", "LICENSE_weights of github.com/facebookresearch/audiocraft")

RELEASED = (
    ReleasedCheckpoint(
        "encodec_24khz",
        "encodec_24khz-d7cc33bc.th",
        "d7cc33bc",
        EncodecConfig.preset_24khz,
        "facebook/encodec_24khz",
        *_ENCODEC,
    ),
    ReleasedCheckpoint(
        "encodec_48khz",
        "encodec_48khz-7e698e3e.th",
        "7e698e3e",
        EncodecConfig.preset_48khz,
        "facebook/encodec_48khz",
        *_ENCODEC,
    ),
    ReleasedCheckpoint(
        "encodec_lm_24khz",
        "encodec_lm_24khz-1608e3c0.th",
        "1608e3c0",
        EncodecLMConfig,
        None,
        *_ENCODEC,
    ),
    ReleasedCheckpoint(
        "encodec_lm_48khz",
        "encodec_lm_48khz-7add9fc3.th",
        "7add9fc3",
        lambda: EncodecLMConfig(num_codebooks=16, frame_rate=150),
        None,
        *_ENCODEC,
    ),
    ReleasedCheckpoint(
        "encodec_32khz",
        "compression_state_dict.bin",
        None,
        EncodecConfig.preset_32khz,
        "facebook/encodec_32khz",
        *_AUDIOCRAFT,
    ),
    ReleasedCheckpoint(
        "encodec_16khz",
        "compression_state_dict.bin",
        None,
        lambda: EncodecConfig.preset_32khz(sampling_rate=16_000, upsampling_ratios=[8, 5, 4, 2]),
        "facebook/audiogen-medium",
        *_AUDIOCRAFT,
    ),
)


def released_by_name(name: str) -> ReleasedCheckpoint:
    """The checkpoint that is called `name`.

    Raises:
        ValueError: for a name that none has.
    """
    found = next((entry for entry in RELEASED if entry.name == name), None)
    if found is None:
        raise ValueError(f"no released checkpoint is {name!r}, allowed: {', '.join(e.name for e in RELEASED)}")
    return found


def released_by_checksum(sha256: str) -> ReleasedCheckpoint | None:
    """The checkpoint whose file has this SHA-256, however the file is called; `None` for no known one's."""
    return next((entry for entry in RELEASED if entry.sha256_start and sha256.startswith(entry.sha256_start)), None)


def checksum_in_name(path: Path) -> str | None:
    """The first digits of the SHA-256 that a name of the form NAME-xxxxxxxx.th promises; `None` for another name."""
    found = re.fullmatch(r".+-([0-9a-f]{8})\.th", path.name)
    return found and found[1]
