# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""What the configurations of codec and language model share: files are read with care, fields are of their type,
numbers have limits, and errors are one line."""

import inspect

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers.configuration_utils import PreTrainedConfig

from .inputs_encodec import as_python, shown, whole_number
from .json_files_encodec import line_of, one_line_errors, read_json


MAX_ENTRIES = 1024  # of a list
MAX_LABELS = 1 << 16
MAX_PARAMETERS = 1 << 31


def checked_fields(cls):
    """A strict configuration whose fields take numbers and arrays of NumPy and PyTorch too, which become Python's;
    what is of another type is a ValueError of one line."""
    set_checked = cls.__setattr__

    def __setattr__(self, name, value):
        if isinstance(value, (list, tuple)) and len(value) > MAX_ENTRIES:
            raise ValueError(f"{name} has {len(value)} entries, allowed: at most {MAX_ENTRIES}")
        try:
            set_checked(self, name, as_python(value))
        except StrictDataclassFieldValidationError:
            kind = type(self).__dataclass_fields__[name].type
            raise ValueError(f"{name} is {shown(value)}, allowed: {getattr(kind, '__name__', kind)}") from None

    cls.__setattr__ = __setattr__
    return cls


class CheckedConfig(PreTrainedConfig):
    """A configuration that is read with care."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """The configuration saved at `pretrained_model_name_or_path`, a folder, file or Hub id; `kwargs` as of
        Transformers' method.

        Raises:
            OSError: if there is none.
            ValueError: for a damaged file, that of another kind of model, or values that cannot be.
        """
        with one_line_errors(str(pretrained_model_name_or_path)):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """The settings at `pretrained_model_name_or_path` as they are, and what is left of `kwargs`. A file of another
        kind of model is a ValueError."""
        settings, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not settings:
            raise FileNotFoundError(f"{pretrained_model_name_or_path}: no config.json in it, or an empty one")
        # A model that has ours as a part, such as MusicGen, keeps its configuration in its own.
        kinds = [one.get("model_type") for one in [settings, *settings.values()] if isinstance(one, dict)]
        if cls.model_type not in kinds:
            given = shown(kinds[0])
            raise ValueError(f"{pretrained_model_name_or_path}: model_type is {given}, allowed: {cls.model_type!r}")
        return settings, kwargs

    @classmethod
    def _dict_from_json_file(cls, json_file) -> dict:
        return cls._decode_special_floats(read_json(json_file))

    def __post_init__(self, **kwargs):
        for name in kwargs:
            ours = inspect.getattr_static(type(self), name, None)
            if callable(ours) or isinstance(ours, classmethod) or (isinstance(ours, property) and ours.fset is None):
                raise ValueError(f"{name} is no setting of a {type(self).__name__}, allowed: its fields")
        if (labels := kwargs.get("num_labels")) is not None:  # a name is made for each of them
            whole_number("num_labels", labels, 0, MAX_LABELS)
        try:
            super().__post_init__(**kwargs)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"a setting of Transformers' own cannot be ({line_of(error)})") from error

    def check_limits(self, limits: dict[str, tuple[int, int]]) -> None:
        """Refuse a field that is not within its `limits`, from and to."""
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            require(value >= least, name, value, f"a whole number of at least {least}")
            require(value <= most, name, value, f"at most {most}")

    def check_parameters(self, total: int, sizes: tuple[str, ...]) -> None:
        """Refuse more weights than any real model has; the `sizes` are the fields that they come of."""
        if total > MAX_PARAMETERS:
            fields = type(self).__dataclass_fields__
            large = [name for name in sizes if not same_value(getattr(self, name), fields[name].default)]
            given = ", ".join(f"{name} {shown(getattr(self, name))}" for name in large)
            raise ValueError(f"{given} together make {total:,} weights, allowed: at most {MAX_PARAMETERS:,}")


def same_value(one, other) -> bool:
    """Whether two values of a field are the same, lists and tuples alike."""
    return (list(one) if isinstance(one, tuple) else one) == (list(other) if isinstance(other, tuple) else other)


def require(condition, name: str, value, allowed: str) -> None:
    """A ValueError that says what is `allowed`, unless the `condition` holds."""
    if not condition:
        raise ValueError(f"{name} is {shown(value)}, allowed: {allowed}")
