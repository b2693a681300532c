"""The bundled checkpoint, and which checkpoint a model's name in an `.ecdc` file stands for."""

from pathlib import Path


BUNDLED = "encodec_24khz_c16"
# The only names the original package knows; it decodes no others.
RELEASED = {"encodec_24khz": "facebook/encodec_24khz", "encodec_48khz": "facebook/encodec_48khz"}


def bundled_checkpoint() -> Path:
    """Folder of the checkpoint that comes with the package: 24 kHz mono, 16 filters, 1.5 to 12 kbps.

    Its README.md says how it was made, its licence and its limits.
    """
    return Path(__file__).parent / BUNDLED


def checkpoint_for(name: str) -> str:
    """Folder or Hub id of the model that is called `name` in `.ecdc` files.

    Raises:
        ValueError: for a name that no known checkpoint has.
    """
    if name == BUNDLED:
        return str(bundled_checkpoint())
    if name in RELEASED:
        return RELEASED[name]
    known = ", ".join([BUNDLED, *RELEASED])
    raise ValueError(f"the file was made with the model {name[:100]!r}, known: {known}; give the model's folder or id")
