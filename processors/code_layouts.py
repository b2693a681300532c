# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""Layouts of codes: what a language model reads instead of codes (K, F), and the way back.

Every layout is a pure function with its inverse, on NumPy arrays and on tensors (of any device) alike, of any integer
dtype. Results are int64, always: uint16, which codes are stored as, has no room for offsets, and no arithmetic in
torch. Codes are (..., K, F), K codebooks and F frames, F from 0 up; a batch (B, K, F) may have `lengths` (B,), the
frames of each row. What lies past a row's length is not looked at, and is `fill` in the result.

    function            codes a0 a1 a2 (codebook a), b0 b1 b2 (codebook b) become                 inverse
    add_offsets         the same, with codebook k's ids beginning at k * codebook_size            remove_offsets
    flatten "frame"     a0 b0 a1 b1 a2 b2                                                         unflatten
    flatten "codebook"  a0 a1 a2 b0 b1 b2                                                         unflatten
    delay               a0 a1 a2 _ over _ b0 b1 b2            MusicGen, arXiv 2306.05284 sec. 2.2 undelay
    split_first         a0 a1 a2 and the other codebooks      VALL-E, arXiv 2301.02111 sec. 4     join_first
    interleave_stereo   left a, right a, left b, right b      MusicGen's stereo models            deinterleave_stereo

`code_vocabulary` joins them: ids of one clip with BOS and EOS, and codes of generated ids, checked. Torch is not
imported, so that corpora can be read without it.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from .inputs_encodec import as_python, shown, whole_number


LAYOUTS = ("frame", "codebook", "delay")


# ---- offsets --------------------------------------------------------------------------------------------------------


def add_offsets(codes, codebook_size: int, *, lengths=None, fill: int | None = None):
    """Codes (..., K, F) with ids of their own for each codebook: those of codebook k begin at k * codebook_size.

    Raises:
        ValueError: for a code outside its codebook, which would be one of the next.

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec.processors.code_layouts import add_offsets, remove_offsets
        >>> ids = add_offsets(np.array([[1, 2], [3, 4]]), 1024)
        >>> ids.tolist(), remove_offsets(ids, 1024).tolist()
        ([[1, 2], [1027, 1028]], [[1, 2], [3, 4]])
    """
    codes, codebook_size = as_ids("codes", codes, 2), check_count("codebook_size", codebook_size)

    def lay(codes):
        check_range("code", codes, 0, codebook_size)
        return codes + offsets_of(codes, codebook_size)

    return _by_rows(lay, codes, lengths, fill, codes.shape)


def remove_offsets(ids, codebook_size: int, *, lengths=None, fill: int = 0):
    """Codes (..., K, F) of what `add_offsets` gave.

    Raises:
        ValueError: for an id that is none of its codebook's.
    """
    ids, codebook_size = as_ids("ids", ids, 2), check_count("codebook_size", codebook_size)

    def lay(ids):
        offsets = offsets_of(ids, codebook_size)
        check_range("id", ids, offsets, codebook_size)
        return ids - offsets

    return _by_rows(lay, ids, lengths, fill, ids.shape)


# ---- flat -----------------------------------------------------------------------------------------------------------


def flatten(codes, order: str = "frame", *, lengths=None, fill: int | None = None):
    """Codes (..., K, F) one after the other, (..., K * F): frame by frame, or codebook by codebook.

    A row of a batch with `lengths` has its K * length codes at the beginning, in both orders.

    Raises:
        ValueError: for another `order`, or lengths without a `fill` or that rows do not have.

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec.processors.code_layouts import flatten, unflatten
        >>> codes = np.array([[1, 2, 3], [4, 5, 6]])
        >>> flatten(codes).tolist(), flatten(codes, "codebook").tolist()
        ([1, 4, 2, 5, 3, 6], [1, 2, 3, 4, 5, 6])
        >>> unflatten(flatten(codes), 2).tolist()
        [[1, 2, 3], [4, 5, 6]]
    """
    codes = as_ids("codes", codes, 2)
    check_choice("order", order, LAYOUTS[:2])

    def lay(codes):
        shape = (*codes.shape[:-2], codes.shape[-2] * codes.shape[-1])
        return (codes.swapaxes(-1, -2) if order == "frame" else codes).reshape(shape)

    return _by_rows(lay, codes, lengths, fill, (*codes.shape[:-2], codes.shape[-2] * codes.shape[-1]))


def unflatten(ids, num_quantizers: int, *, order: str = "frame", lengths=None, fill: int = 0):
    """Codes (..., K, F) of what `flatten` gave; `lengths` are frames here too.

    Raises:
        ValueError: if the ids are no whole number of frames.
    """
    ids = as_ids("ids", ids, 1)
    check_choice("order", order, LAYOUTS[:2])
    num_quantizers = check_count("num_quantizers", num_quantizers)
    if ids.shape[-1] % num_quantizers:
        raise ValueError(f"there are {ids.shape[-1]} ids, allowed: a multiple of {num_quantizers} (num_quantizers)")

    def lay(ids):
        lead, frames = ids.shape[:-1], ids.shape[-1] // num_quantizers
        if order == "frame":
            return ids.reshape(*lead, frames, num_quantizers).swapaxes(-1, -2)
        return ids.reshape(*lead, num_quantizers, frames)

    shape = (*ids.shape[:-1], num_quantizers, ids.shape[-1] // num_quantizers)
    return _by_rows(lay, ids, lengths, fill, shape, lambda frames: frames * num_quantizers)


# ---- delayed --------------------------------------------------------------------------------------------------------


def delay(codes, pattern: Sequence[int] | None = None, *, fill: int, lengths=None):
    """Codes (..., K, F) with codebook k delayed by `pattern[k]` steps, (..., K, F + max(pattern)), `fill` around them.

    `pattern` is 0 to K - 1 by default, for stereo codebooks of MusicGen it is 0 0 1 1 2 2 and so on. What MusicGen's
    decoder generates is one column of BOS, which is its `fill` too, and then this; so is the mask of its
    `build_delay_pattern_mask`, with -1 where the codes are.

    Raises:
        ValueError: for a pattern that is not K whole numbers with a 0 among them.

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec.processors.code_layouts import delay, undelay
        >>> ids = delay(np.array([[1, 2, 3], [4, 5, 6]]), fill=0)
        >>> ids.tolist(), undelay(ids).tolist()
        ([[1, 2, 3, 0], [0, 4, 5, 6]], [[1, 2, 3], [4, 5, 6]])
    """
    codes = as_ids("codes", codes, 2)
    pattern = check_pattern(pattern, codes.shape[-2])

    def lay(codes):
        *lead, frames = codes.shape
        ids = full_of(codes, (*lead, frames + max(pattern)), fill)
        for codebook, steps in enumerate(pattern):
            ids[..., codebook, steps : steps + frames] = codes[..., codebook, :]
        return ids

    return _by_rows(lay, codes, lengths, fill, (*codes.shape[:-1], codes.shape[-1] + max(pattern)))


def undelay(ids, pattern: Sequence[int] | None = None, *, lengths=None, fill: int = 0):
    """Codes (..., K, F) of what `delay` gave. Of ids that were cut off, the frames that all codebooks have.

    Raises:
        ValueError: for a pattern as in `delay`, or ids shorter than the longest delay.
    """
    ids = as_ids("ids", ids, 2)
    pattern = check_pattern(pattern, ids.shape[-2])
    longest = max(pattern)
    if ids.shape[-1] < longest:
        raise ValueError(f"delayed ids have {ids.shape[-1]} steps, allowed: at least {longest}, the longest delay")

    def lay(ids):
        *lead, steps = ids.shape
        codes = full_of(ids, (*lead, steps - longest), 0)
        for codebook, start in enumerate(pattern):
            codes[..., codebook, :] = ids[..., codebook, start : start + steps - longest]
        return codes

    shape = (*ids.shape[:-1], ids.shape[-1] - longest)
    return _by_rows(lay, ids, lengths, fill, shape, lambda frames: frames + longest)


# ---- codebooks apart and together -----------------------------------------------------------------------------------


def split_first(codes) -> tuple:
    """The first codebook (..., F), which VALL-E's autoregressive model predicts, and the rest (..., K - 1, F), of
    `codes` (..., K, F).

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec.processors.code_layouts import join_first, split_first
        >>> first, rest = split_first(np.array([[1, 2], [3, 4], [5, 6]]))
        >>> first.tolist(), rest.tolist(), join_first(first, rest).tolist()
        ([1, 2], [[3, 4], [5, 6]], [[1, 2], [3, 4], [5, 6]])
    """
    codes = as_ids("codes", codes, 2)
    return codes[..., 0, :], codes[..., 1:, :]


def join_first(first, rest):
    """Codes (..., K, F) of what `split_first` gave.

    Raises:
        ValueError: if the two are not of the same batch and frames.
    """
    first, rest = as_ids("first", first, 1), as_ids("rest", rest, 2)
    *lead, others, frames = rest.shape
    if tuple(first.shape) != (*lead, frames):
        raise ValueError(f"first has shape {tuple(first.shape)}, allowed: {(*lead, frames)}")
    codes = full_of(rest, (*lead, others + 1, frames), 0)
    codes[..., 0, :], codes[..., 1:, :] = first, rest
    return codes


def interleave_stereo(left, right):
    """Codes (..., K, F) of the left and of the right channel, each coded as mono, as (..., 2 K, F): left codebook 0,
    right codebook 0, left codebook 1, and so on.

    Raises:
        ValueError: if the two are not of one shape.
    """
    left, right = as_ids("left", left, 2), as_ids("right", right, 2)
    if left.shape != right.shape:
        raise ValueError(f"right has shape {tuple(right.shape)}, allowed: that of left, {tuple(left.shape)}")
    *lead, codebooks, frames = left.shape
    codes = full_of(left, (*lead, 2 * codebooks, frames), 0)
    codes[..., ::2, :], codes[..., 1::2, :] = left, right
    return codes


def deinterleave_stereo(codes) -> tuple:
    """Left and right (..., K, F) of what `interleave_stereo` gave.

    Raises:
        ValueError: for an odd number of codebooks.
    """
    codes = as_ids("codes", codes, 2)
    if codes.shape[-2] % 2:
        raise ValueError(f"stereo codes have {codes.shape[-2]} codebooks, allowed: an even number")
    return codes[..., ::2, :], codes[..., 1::2, :]


# ---- batches, BOS and EOS -------------------------------------------------------------------------------------------


def pad_ids(rows: Sequence, pad_id: int, *, side: str = "right") -> tuple:
    """Rows (..., L) of any lengths as one batch: ids (B, ..., longest L), and the attention mask (B, longest L) that
    is 1 on them.

    `side`: of the padding; generating goes on at the end of all rows, and so needs "left".

    Raises:
        ValueError: if there is no row, or rows differ in more than their lengths.

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec.processors.code_layouts import pad_ids, unpad_ids
        >>> ids, mask = pad_ids([np.array([1, 2, 3]), np.array([4])], 0, side="left")
        >>> ids.tolist(), mask.tolist()
        ([[1, 2, 3], [0, 0, 4]], [[1, 1, 1], [0, 0, 1]])
        >>> [row.tolist() for row in unpad_ids(ids, mask)]
        [[1, 2, 3], [4]]
    """
    check_choice("side", side, ("right", "left"))
    rows = [as_ids("ids", row, 1) for row in rows]
    if not rows:
        raise ValueError("there are no rows of ids, allowed: at least one")
    shapes = sorted({tuple(row.shape[:-1]) for row in rows})
    if len(shapes) > 1:
        raise ValueError(f"rows of ids have shapes {shapes} before their length, allowed: one")
    width = max(row.shape[-1] for row in rows)
    ids, mask = full_of(rows[0], (len(rows), *shapes[0], width), pad_id), full_of(rows[0], (len(rows), width), 0)
    for index, row in enumerate(rows):
        start = 0 if side == "right" else width - row.shape[-1]
        ids[index, ..., start : start + row.shape[-1]] = row
        mask[index, start : start + row.shape[-1]] = 1
    return ids, mask


def unpad_ids(ids, attention_mask) -> list:
    """The rows (..., L) of what `pad_ids` gave.

    Raises:
        ValueError: if the mask is none of these ids.
    """
    ids, mask = as_ids("ids", ids, 2), as_ids("attention_mask", attention_mask, 2)
    if tuple(mask.shape) != (ids.shape[0], ids.shape[-1]):
        allowed = (ids.shape[0], ids.shape[-1])
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, allowed: {allowed}")
    return [row[..., kept != 0] for row, kept in zip(ids, mask)]


def add_bos_eos(ids, bos_id: int | None = None, *, eos_id: int | None = None):
    """Ids (..., L) with `bos_id` before and `eos_id` after them, where they are given."""
    ids = as_ids("ids", ids, 1)
    start, stop = int(bos_id is not None), int(eos_id is not None)
    *lead, width = ids.shape
    result = full_of(ids, (*lead, start + width + stop), eos_id if stop else 0)
    if start:
        result[..., 0] = whole_number("bos_id", bos_id)
    result[..., start : start + width] = ids
    return result


def strip_bos_eos(ids, bos_id: int | None = None, *, eos_id: int | None = None, pad_id: int | None = None):
    """A row (L,) or (K, L) without the padding at both of its ends, and then one BOS before and every EOS after what
    is between (models without a padding id are padded with EOS); in (K, L) each is a whole column. Nothing inside is
    touched."""
    start, stop = core_of(ids, bos_id, eos_id=eos_id, pad_id=pad_id)
    return as_ids("ids", ids, 1)[..., start:stop]


def core_of(ids, bos_id: int | None = None, *, eos_id: int | None = None, pad_id: int | None = None):
    """(start, stop) of what `strip_bos_eos` leaves of a row."""
    ids = as_ids("ids", ids, 1)
    columns = as_numpy(ids).reshape(math.prod(ids.shape[:-1]), ids.shape[-1])
    other = np.flatnonzero((columns != pad_id).any(axis=0)) if pad_id is not None else np.arange(ids.shape[-1])
    if not len(other):
        return 0, 0
    start, stop = int(other[0]), int(other[-1]) + 1
    if bos_id is not None and (columns[:, start] == bos_id).all():
        start += 1
    while eos_id is not None and start < stop and (columns[:, stop - 1] == eos_id).all():
        stop -= 1
    return start, stop


# ---- any layout, and time -------------------------------------------------------------------------------------------


def lay_out(codes, layout: str = "frame", *, pattern: Sequence[int] | None = None, fill=None, lengths=None):
    """Codes (..., K, F) in a layout by its name: `flatten` or `delay`, whose ValueErrors these are; a delay needs a
    `fill`."""
    check_choice("layout", layout, LAYOUTS)
    if layout != "delay":
        return flatten(codes, layout, lengths=lengths, fill=fill)
    if fill is None:
        raise ValueError("fill is None, allowed in a delay layout: the id around the codes")
    return delay(codes, pattern, fill=fill, lengths=lengths)


def take_apart(
    ids,
    layout: str = "frame",
    *,
    num_quantizers: int | None = None,
    pattern: Sequence[int] | None = None,
    lengths=None,
):
    """Codes (..., K, F) of what `lay_out` gave: `unflatten`, which needs `num_quantizers`, or `undelay`, whose
    ValueErrors these are."""
    check_choice("layout", layout, LAYOUTS)
    if layout == "delay":
        return undelay(ids, pattern, lengths=lengths)
    return unflatten(ids, num_quantizers, order=layout, lengths=lengths)


def slice_frames(
    ids,
    frames: slice,
    *,
    layout: str = "frame",
    num_quantizers: int | None = None,
    pattern: Sequence[int] | None = None,
    fill: int | None = None,
    lengths=None,
):
    """Ids of some of the frames: what the layout makes of `codes[..., frames]`, of what it made of `codes`.

    In a delay layout these are no columns: the slice's own first and last frames have their `fill` again.

    Args:
        ids (array or tensor): (..., K * F) of a flat layout, (..., K, F + max(pattern)) of "delay"; without BOS and
            EOS.
        frames: such as `slice(10, 20)`, in steps of 1.
        layout: "frame", "codebook" or "delay".
        num_quantizers: codebooks, for the flat layouts.
        pattern: as of `delay`.
        fill: as of `delay`.
        lengths (sequence of int): frames of each row of a batch, for `frames` counted from the start; the result has
            `fill` past the ends of rows.

    Raises:
        ValueError: as of the layouts, or for another step, or frames counted from an end that rows do not share.
    """
    if frames.step not in (None, 1):
        raise ValueError(f"frames have a step of {frames.step}, allowed: 1")
    if lengths is not None and (frames.start or 0) < 0:
        raise ValueError(f"frames start at {frames.start}, allowed with lengths: 0 or more")
    codes = take_apart(ids, layout, num_quantizers=num_quantizers, pattern=pattern, lengths=lengths)[..., frames]
    if lengths is not None:
        lengths = [len(range(length)[frames]) for length in _numbers(lengths)]
    return lay_out(codes, layout, pattern=pattern, fill=fill, lengths=lengths)


# ---- what the functions share ---------------------------------------------------------------------------------------


def as_ids(name: str, array, least_dims: int):
    """A NumPy array or tensor of whole numbers as int64; anything else is a ValueError under its `name`."""
    if isinstance(array, np.ndarray):
        whole = array.dtype.kind in "iu"
    elif hasattr(array, "new_full"):
        whole = str(array.dtype).startswith(("torch.int", "torch.uint"))
    else:
        raise ValueError(f"{name} are a {type(array).__name__}, allowed: a NumPy array or a tensor")
    if not whole or array.ndim < least_dims:
        given = f"{array.dtype} of shape {tuple(array.shape)}"
        raise ValueError(f"{name} are {given}, allowed: whole numbers, at least {least_dims}-dimensional")
    return array.astype(np.int64, copy=False) if isinstance(array, np.ndarray) else array.long()


def full_of(like, shape: tuple, value: int):
    """An int64 array or tensor of this `shape` and `value`, of the kind of `like` and on its device."""
    value = whole_number("fill", value)
    return np.full(shape, value, np.int64) if isinstance(like, np.ndarray) else like.new_full(shape, value)


def as_numpy(array) -> np.ndarray:
    """An array or tensor as an array."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def offsets_of(codes, codebook_size: int):
    """(K, 1): the first id of each codebook of codes (..., K, F)."""
    return full_of(codes, (codes.shape[-2], 1), codebook_size).cumsum(0) - codebook_size


def check_range(name: str, codes, first, size: int, describe: Callable = lambda value: "") -> None:
    """A ValueError, with the place, for what of codes (..., K, F) is not one of the `size` ids from `first`, a number
    or (K, 1), on; `describe` tells what else a value is."""
    bad = (codes < first) | (codes >= first + size)
    if not bad.any():
        return
    *row, frame, codebook = np.argwhere(as_numpy(bad.swapaxes(-1, -2)))[0].tolist()
    value = int(codes[(*row, codebook, frame)])
    lowest = first if isinstance(first, int) else int(first[codebook, 0])
    place = "".join(f"row {index}, " for index in row) + f"frame {frame}, codebook {codebook}"
    raise ValueError(f"{name} {value}{describe(value)} in {place}, allowed there: {lowest} to {lowest + size - 1}")


def check_choice(name: str, value, allowed: Sequence[str]) -> None:
    """A ValueError, under its `name`, for a value that is not one of the `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, allowed: {', '.join(allowed)}")


def check_count(name: str, value) -> int:
    """A positive whole number of any kind as an int; anything else is a ValueError under its `name`."""
    return whole_number(name, value, 1)


def check_pattern(pattern: Sequence[int] | None, codebooks: int) -> tuple[int, ...]:
    """A delay for each codebook, one of them 0: where all wait, nothing tells the delay from padding. Any other
    `pattern` is a ValueError."""
    if pattern is None:
        return tuple(range(codebooks))
    allowed = f"{codebooks} whole numbers from 0 up, one of them 0"
    steps = tuple(whole_number("a step of the pattern", step, 0, allowed=allowed) for step in as_python(pattern))
    if len(steps) != codebooks or min(steps):
        raise ValueError(f"pattern is {shown(list(steps))}, allowed: {allowed}")
    return steps


def _numbers(lengths) -> list[int]:
    return [whole_number("a row's length", length) for length in as_python(lengths)]


def _by_rows(lay: Callable, array, lengths, fill: int | None, shape: tuple, taken: Callable = lambda frames: frames):
    """`lay` of the whole array; with `lengths`, of what each row has `taken`, in an array of `shape`."""
    if lengths is None:
        return lay(array)
    if fill is None:
        raise ValueError("fill is None, allowed with lengths: the id past the ends of rows, such as that of padding")
    lengths, result = _numbers(lengths), full_of(array, shape, fill)
    if len(lengths) != len(array) or not all(n >= 0 and taken(n) <= array.shape[-1] for n in lengths):
        raise ValueError(f"lengths are {lengths}, allowed: {len(array)} of 0 to the frames of a row")
    for index, frames in enumerate(lengths):
        row = lay(array[index, ..., : taken(frames)])
        result[index, ..., : row.shape[-1]] = row
    return result
