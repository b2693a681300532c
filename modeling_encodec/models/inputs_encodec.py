# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""Numbers, arrays and audio as callers have them, made the plain ones that the code works with.

Numbers may be Python's, NumPy's, or arrays and tensors of no dimension; truth values and text are none. Arrays may be
strided in any way, of either byte order and read-only; tensors may be anywhere and have a gradient.

Audio is floating point in [-1, 1], or integer PCM: signed of 8, 16 or 32 bits is divided by 2^(bits - 1), unsigned has
half its range taken off first, everywhere alike. No PCM has 64 bits, so int64 passes only within -1 to 1, such as a
list of whole zeros. Floating point on the scale of integers cannot be told from very loud audio for certain: it is
taken as it is, with a warning beyond 100 (40 dB over full scale). Mixes that exceed 1 stay far below that, and PCM far
above it, unless a clip of 16 bits peaks under -50 dB. The text is always the same, so that Python shows it once.

This file lies in `modeling_encodec` and in `processors` alike, for models and processors travel to the Hub each with
the files beside them; where the package is installed only the first is loaded.
"""

import math
import operator
import warnings
from numbers import Real

import numpy as np


MOST_HONEST_PEAK = 100.0
PCM_WARNING = (
    "audio has samples beyond +-100, as PCM on the scale of integers has (+-32768), allowed: floating point in "
    "[-1, 1]; divide it by 32768, or give the integers as int16. What is coded now is mostly noise."
)
PCM_BITS = {"int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int32": 32, "uint32": 32}


# ---- numbers --------------------------------------------------------------------------------------------------------


def as_python(value):
    """A number of NumPy, or an array or tensor of no dimension, as Python's; an array or tensor as a list. Lists have
    their items made so; anything else stays as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(as_python, value)) if type(value) in (list, tuple) else value
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "dtype") else value


def whole_number(
    name: str,
    value,
    least: int | None = None,
    most: int | None = None,
    *,
    allowed: str | None = None,
    floats: bool = False,
    unit: str = "",
    error: type[ValueError] = ValueError,
) -> int:
    """A whole number of any kind as an int; `floats`: also 24000.0.

    Raises:
        ValueError: or `error`, under its `name` and with its `unit`: for what is none, or not from `least` to `most`;
            says what is `allowed`.
    """
    number = _whole(value, floats)
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        if allowed is None:
            bounds = [] if least is None else [f"at least {least}" if most is None else f"{least} to {most}"]
            allowed = ", ".join(bounds + (["a whole number"] if number is None else []))
        raise error(f"{name} is {shown(value)}{unit}, allowed: {allowed}")
    return number


def check_rate(name: str, value) -> int:
    """A sampling rate as an int in Hz, also of 24000.0; anything else is a ValueError under its `name`."""
    return whole_number(name, value, 1, floats=True, unit=" Hz")


def real_number(name: str, value, allowed: str = "a number") -> int | float:
    """A number of any kind, not NaN, as an int or float; anything else is a ValueError under its `name`."""
    number = _scalar(value)
    if isinstance(number, (bool, np.bool_)) or not isinstance(number, Real) or math.isnan(number):
        raise ValueError(f"{name} is {shown(value)}, allowed: {allowed}")
    return number if isinstance(number, int) else float(number)


def match_number(value, allowed) -> float | None:
    """The one of the `allowed` numbers that `value` is, within the rounding of its own or of single precision: 2.2 of
    float32 is not Python's. None if there is none."""
    try:
        number = real_number("value", value)
    except ValueError:
        return None
    for one in allowed:
        if bool(value == one) or math.isclose(number, one, rel_tol=1e-7):
            return one
    return None


def shown(value) -> str:
    """A value in a message, in one line that is not long."""
    text = " ".join(repr(_scalar(value)).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def _scalar(value):
    """What an array or tensor of no dimension, or a NumPy number, holds; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _whole(value, floats: bool) -> int | None:
    value = _scalar(value)
    if isinstance(value, (bool, np.bool_)) or getattr(value, "ndim", 0):
        return None
    if floats and isinstance(value, Real) and float(value).is_integer():
        return int(value)
    try:
        return operator.index(value)
    except TypeError:
        return None


# ---- arrays ---------------------------------------------------------------------------------------------------------


def plain_array(name: str, value) -> np.ndarray:
    """An array, tensor or list as an array in this machine's byte order, without gaps; nothing is copied that is so
    already. Longer floats than float64, and those that NumPy has not, become float64 and float32.

    Raises:
        ValueError: under its `name`, for what makes no array, such as lists of unequal lengths.
    """
    try:
        if isinstance(value, (list, tuple)) and any(hasattr(item, "detach") for item in value):
            value = [plain_array(name, item) for item in value]
        if hasattr(value, "detach"):
            value = value.detach().cpu().resolve_conj().resolve_neg()
            has_numpy_kind = not value.is_floating_point() or str(value.dtype)[6:] in ("float16", "float32", "float64")
            value = (value if has_numpy_kind else value.float()).numpy()
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} are a {type(value).__name__}, allowed: a tensor or an array of numbers") from None
    dtype = array.dtype
    if dtype.kind not in "biufc" and not hasattr(value, "dtype"):
        raise ValueError(f"{name} are a {type(value).__name__}, allowed: a tensor or an array of numbers")
    if dtype.kind in "biufc":
        dtype = np.dtype(np.float64) if dtype.kind == "f" and dtype.itemsize > 8 else dtype.newbyteorder("=")
        array = array.astype(dtype, order="C", copy=False)
        if any(stride < 0 for stride in array.strides):  # of an axis of one, which NumPy does not count
            array = array.copy()
    return array


def audio_array(name: str, value) -> np.ndarray:
    """Audio, an array, tensor or list of any shape, as float32 without gaps; integer PCM is scaled to [-1, 1).

    Raises:
        ValueError: under its `name`, for what is neither floating point nor PCM: complex, truth values, text, objects.
    """
    array = plain_array(name, value)
    if array.dtype.kind != "f":
        return scale_pcm(name, array)
    with np.errstate(over="ignore"):  # what has no room becomes infinite, and is refused as that
        return array.astype(np.float32, copy=False)


def scale_pcm(name: str, samples):
    """Integer PCM, an array or tensor, as float32 in [-1, 1), and int64 within -1 to 1 as it is. Anything else is a
    ValueError under its `name`."""
    kind = getattr(samples.dtype, "name", str(samples.dtype).removeprefix("torch."))
    is_array, bits = isinstance(samples, np.ndarray), PCM_BITS.get(kind)
    if bits is None and not (kind == "int64" and (0 in samples.shape or abs(samples).max() <= 1)):
        raise ValueError(f"{name} has dtype {kind}, allowed: floating point, or PCM as int16, int32, uint8 or alike")
    half = 1 if bits is None else 1 << (bits - 1)
    if kind.startswith("uint"):
        samples = (samples.astype(np.int64) if is_array else samples.long()) - half
    return (samples.astype(np.float32) if is_array else samples.float()) / half


def are_finite(low: float, high: float) -> bool:
    """Whether samples from `low` to `high` are finite. Warns if they are on the scale of integers."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return False
    if max(-low, high) > MOST_HONEST_PEAK:
        warnings.warn(PCM_WARNING, stacklevel=1)
    return True


def array_is_finite(samples: np.ndarray) -> bool:
    """`are_finite` of an array, which may be empty."""
    return not samples.size or are_finite(float(samples.min()), float(samples.max()))
