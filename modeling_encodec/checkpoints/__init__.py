"""The bundled checkpoints, and which checkpoint a model's name in an `.ecdc` file stands for."""

from pathlib import Path


BUNDLED = "encodec_24khz_c16"
BUNDLED_LM = "encodec_lm_24khz_c16"
# The only names the original package knows; it decodes no others.
RELEASED = {"encodec_24khz": "facebook/encodec_24khz", "encodec_48khz": "facebook/encodec_48khz"}


def bundled_checkpoint() -> Path:
    """Folder of the checkpoint that comes with the package: 24 kHz mono, 16 filters, 1.5 to 12 kbps.

    Its README.md says how it was made, its licence and its limits.

    Examples:
        >>> from modeling_encodec import EncodecConfig, bundled_checkpoint
        >>> EncodecConfig.from_pretrained(bundled_checkpoint()).target_bandwidths
        [1.5, 3.0, 6.0, 12.0]
    """
    return Path(__file__).parent / BUNDLED


def bundled_lm_checkpoint() -> Path:
    """Folder of the language model for the bundled codec, in its integer form.

    Examples:
        >>> from modeling_encodec import EncodecLMConfig, bundled_lm_checkpoint
        >>> config = EncodecLMConfig.from_pretrained(bundled_lm_checkpoint())
        >>> config.num_codebooks, config.has_integer_form, config.has_float_form
        (16, True, False)
    """
    return Path(__file__).parent / BUNDLED_LM


def lm_checkpoint_for(name: str) -> str:
    """Folder of the language model that is called `name` in `.ecdc` files.

    Raises:
        ValueError: for a name that no known language model has.
    """
    if name == BUNDLED_LM:
        return str(bundled_lm_checkpoint())
    raise ValueError(
        f"the file is coded with the language model {name[:100]!r}, known: {BUNDLED_LM}; give the model's folder or id"
    )


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
