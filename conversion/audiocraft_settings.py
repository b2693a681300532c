"""The configuration of an audiocraft codec from `xp.cfg`, the configuration of its training.

Keys and their defaults are in audiocraft's `config/model/encodec/default.yaml`. What an EnCodec model here has no
field for must have the one value that it is built with here, or the checkpoint is refused.
"""

import re
from dataclasses import dataclass


# Keys of `seanet`, and our fields.
SEANET = {
    "channels": "audio_channels",
    "dimension": "hidden_size",
    "n_filters": "num_filters",
    "n_residual_layers": "num_residual_layers",
    "ratios": "upsampling_ratios",
    "norm": "norm_type",
    "kernel_size": "kernel_size",
    "last_kernel_size": "last_kernel_size",
    "residual_kernel_size": "residual_kernel_size",
    "dilation_base": "dilation_growth_rate",
    "causal": "use_causal_conv",
    "pad_mode": "pad_mode",
    "compress": "compress",
    "lstm": "num_lstm_layers",
}
# Keys that there is no field for, and what they may be.
FIXED = {
    "activation": ("ELU",),
    "activation_params": ({"alpha": 1.0}, {}, None),
    "norm_params": ({}, None),
    "disable_norm_outer_blocks": (0,),
    "final_activation": (None,),
}
ENCODEC = {"sample_rate": "sampling_rate", "channels": "audio_channels", "renormalize": "normalize"}


@dataclass(frozen=True)
class AudiocraftCodec:
    """What `xp.cfg` tells.

    Args:
        fields: of `EncodecConfig`.
        codebooks: how many; `None` where it is not told.
        trained_for_fewer: whether the model is trained to use some of them, too.
    """

    fields: dict[str, object]
    codebooks: int | None
    trained_for_fewer: bool


def audiocraft_codec(settings: dict) -> AudiocraftCodec:
    """What the `xp.cfg` of a codec tells, read as it is: with `${a.b}` for what is the value of another key.

    Raises:
        ValueError: for a model that there is no `EncodecConfig` for.
    """
    encodec, seanet, rvq = (_resolved(_section(settings, name), settings) for name in ("encodec", "seanet", "rvq"))
    for name, value, allowed in (
        ("encodec.autoencoder", encodec.get("autoencoder", "seanet"), "seanet"),
        ("encodec.quantizer", encodec.get("quantizer", "rvq"), "rvq"),
    ):
        if value != allowed:
            raise ValueError(f"xp.cfg: {name} is {value!r}, allowed: {allowed!r}")
    encoder = seanet | _section(seanet, "encoder", "seanet.encoder")
    decoder = seanet | _section(seanet, "decoder", "seanet.decoder")
    for side in (encoder, decoder):
        for key, allowed in FIXED.items():
            if side.get(key, allowed[0]) not in allowed:
                raise ValueError(f"xp.cfg: seanet.{key} is {side[key]!r}, allowed: {allowed[0]!r}")
    different = [key for key in (*SEANET, "true_skip") if encoder.get(key) != decoder.get(key)]
    if different:
        key = different[0]
        raise ValueError(
            f"xp.cfg: seanet.{key} is {encoder.get(key)!r} in the encoder and {decoder.get(key)!r} in the decoder, "
            "allowed: the same"
        )
    fields = {field: encoder[key] for key, field in SEANET.items() if key in encoder}
    fields |= {field: encodec[key] for key, field in ENCODEC.items() if key in encodec}
    if "true_skip" in encoder:
        fields["use_conv_shortcut"] = not encoder["true_skip"]
    if "trim_right_ratio" in decoder:
        fields["trim_right_ratio"] = decoder["trim_right_ratio"]
    if "bins" in rvq:
        fields["codebook_size"] = rvq["bins"]
    if encodec.get("causal", fields.get("use_causal_conv")) != fields.get("use_causal_conv"):
        raise ValueError(f"xp.cfg: encodec.causal is {encodec['causal']}, allowed: {encoder['causal']}, as in seanet")
    fields |= {"chunk_length_s": None, "overlap": None}  # audiocraft codes the whole signal
    return AudiocraftCodec(fields, rvq.get("n_q"), bool(rvq.get("q_dropout", False)))


def _section(settings: dict, name: str, told: str | None = None) -> dict:
    section = settings.get(name)
    if section is None:
        section = {}
    if not isinstance(section, dict):
        raise ValueError(f"xp.cfg: {told or name} is {section!r}, allowed: keys and values")
    return section


def _resolved(value, settings: dict, depth: int = 0):
    """`value` with every `${a.b}` in it replaced by what it stands for."""
    if depth > 20:
        raise ValueError("xp.cfg: values stand for each other in a circle")
    if isinstance(value, dict):
        return {key: _resolved(item, settings, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, settings, depth + 1) for item in value]
    name = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    if name is None:
        return value
    found = settings
    for part in name[1].split("."):
        if not isinstance(found, dict) or part not in found:
            raise ValueError(f"xp.cfg: {value} stands for nothing that is there")
        found = found[part]
    return _resolved(found, settings, depth + 1)
