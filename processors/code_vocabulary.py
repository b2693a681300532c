# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""CodeVocabulary: how codes of a clip become ids of a language model, with BOS and EOS, and generated ids codes again.

One row at a time; `code_layouts.pad_ids` makes a batch of rows. A language model may generate anything, so every id is
checked on the way back: specials among the codes, ids of another codebook's turn and frames that are not whole are
errors that name the place, and never audio.
"""

import math
from dataclasses import dataclass

from .code_layouts import (
    LAYOUTS,
    add_bos_eos,
    add_offsets,
    as_ids,
    as_numpy,
    check_choice,
    check_count,
    check_pattern,
    check_range,
    core_of,
    full_of,
    lay_out,
    offsets_of,
    take_apart,
)
from .inputs_encodec import as_python, match_number, real_number, shown, whole_number


MAX_ID = (1 << 31) - 1


@dataclass(frozen=True)
class CodeVocabulary:
    """How codes become the ids of a language model, and which ids there are: first those of the codes, above them the
    specials.

    Args:
        codebook_size: entries of a codebook.
        num_quantizers: codebooks of a frame.
        frame_rate: frames per second of audio.
        layout: "frame" (flat, frame by frame), "codebook" (flat, codebook by codebook), or "delay" (K rows of ids).
        pattern: steps by which a delay layout delays each codebook, by default 0 to K - 1.
        own_ids: whether each codebook has ids of its own (`add_offsets`); by default in flat layouts, where a model
            has one embedding, and not in a delay layout, where it has one for each codebook.
        pad_token_id: by default the first id above the codes.
        bos_token_id: by default the second one; in a delay layout, as in MusicGen, that of padding.
        eos_token_id: by default the third one; in a delay layout none.

    Raises:
        ValueError: for values that cannot be, or specials among the codes.

    Examples:
        >>> import numpy as np
        >>> from modeling_encodec import CodeVocabulary
        >>> vocabulary = CodeVocabulary(codebook_size=1024, num_quantizers=2, frame_rate=75)
        >>> ids = vocabulary.encode(np.array([[5, 6, 7], [8, 9, 0]]))
        >>> ids.tolist(), vocabulary.vocab_size
        ([2049, 5, 1032, 6, 1033, 7, 1024, 2050], 2051)
        >>> vocabulary.decode(ids[:-2], incomplete="drop").tolist()  # cut off within a frame
        [[5, 6], [8, 9]]
        >>> vocabulary.decode(np.array([5, 6]))
        Traceback (most recent call last):
        ...
        ValueError: id 6 in frame 0, codebook 1, allowed there: 1024 to 2047
    """

    codebook_size: int
    num_quantizers: int
    frame_rate: int | float
    layout: str = "frame"
    pattern: tuple[int, ...] | None = None
    own_ids: bool | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self):
        for name in ("codebook_size", "num_quantizers"):
            object.__setattr__(self, name, check_count(name, getattr(self, name)))
            whole_number(name, getattr(self, name), 1, MAX_ID)
        object.__setattr__(self, "frame_rate", real_number("frame_rate", self.frame_rate, "above 0"))
        object.__setattr__(self, "own_ids", as_python(self.own_ids))
        if not (self.frame_rate > 0 and math.isfinite(self.frame_rate)):
            raise ValueError(f"frame_rate is {self.frame_rate}, allowed: above 0")
        check_choice("layout", self.layout, LAYOUTS)
        delayed = self.layout == "delay"
        if delayed:
            object.__setattr__(self, "pattern", check_pattern(self.pattern, self.num_quantizers))
        elif self.pattern is not None:
            raise ValueError(f"pattern is {self.pattern}, allowed with layout {self.layout!r}: none")
        if self.own_ids is None:
            object.__setattr__(self, "own_ids", not delayed)
        first = self.num_code_ids
        defaults = {"pad_token_id": first, "bos_token_id": first if delayed else first + 1}
        for name, default in (defaults | {"eos_token_id": None if delayed else first + 2}).items():
            given = getattr(self, name)
            if given is not None:
                given = whole_number(name, given, first, allowed=f"{first} or more, above the ids of the codes")
                whole_number(name, given, first, MAX_ID)
            object.__setattr__(self, name, default if given is None else given)

    @classmethod
    def for_model(
        cls, config, num_quantizers: int | None = None, *, bandwidth: float | None = None, **settings
    ) -> "CodeVocabulary":
        """For codes of a model, with the other arguments of the class as `settings`.

        Args:
            config (EncodecConfig): of the model.
            num_quantizers: codebooks of a frame.
            bandwidth: kbps, one of the model's, instead of `num_quantizers`.
            **settings (keyword arguments): such as `layout`.

        Raises:
            ValueError: for a bandwidth (kbps) or number of codebooks the model has not, or none of them where it has
                several bandwidths.
        """
        most, bandwidths = config.num_quantizers, list(config.target_bandwidths)
        if num_quantizers is not None and bandwidth is not None:
            raise ValueError(f"bandwidth {bandwidth} and num_quantizers {num_quantizers} given, allowed: one")
        if num_quantizers is None:
            if bandwidth is None and len(bandwidths) == 1:
                bandwidth = bandwidths[0]
            if (kbps := match_number(bandwidth, bandwidths)) is None:
                given = shown(bandwidth)
                raise ValueError(f"bandwidth is {given}, allowed: one of {bandwidths} kbps, or num_quantizers")
            num_quantizers = config.num_quantizers_for_bandwidth(kbps)
        num_quantizers = whole_number("num_quantizers", num_quantizers, 1, most)
        rate = config.sampling_rate / config.hop_length
        if config.chunk_length is not None:  # where chunks overlap, audio is coded twice
            rate = config.num_frames(config.chunk_length) * config.sampling_rate / config.chunk_stride
        rate = int(rate) if rate == int(rate) else rate
        return cls(config.codebook_size, num_quantizers, rate, **settings)

    @property
    def num_code_ids(self) -> int:
        """How many ids stand for codes; these are 0 to one less."""
        return self.codebook_size * (self.num_quantizers if self.own_ids else 1)

    @property
    def vocab_size(self) -> int:
        """All ids are below it."""
        specials = (self.pad_token_id, self.bos_token_id, self.eos_token_id)
        return 1 + max(special for special in specials if special is not None)

    @property
    def tokens_per_second(self) -> int | float:
        """Steps of a language model per second of audio."""
        return self.frame_rate * (1 if self.layout == "delay" else self.num_quantizers)

    def encode(self, codes, *, bos: bool = True, eos: bool = True):
        """Ids of a clip's codes (K, F): (L,), or (K, L) in a delay layout.

        Args:
            codes (array or tensor): of any integer dtype.
            bos: whether BOS comes first.
            eos: whether EOS, if there is one, comes last.

        Raises:
            ValueError: for codes of another number of codebooks, or outside them.
        """
        codes = as_ids("codes", codes, 2)
        if codes.ndim != 2 or codes.shape[0] != self.num_quantizers:
            raise ValueError(f"codes have shape {tuple(codes.shape)}, allowed: ({self.num_quantizers}, frames)")
        check_range("code", codes, 0, self.codebook_size)
        codes = add_offsets(codes, self.codebook_size) if self.own_ids else codes
        ids = lay_out(codes, self.layout, pattern=self.pattern, fill=self.pad_token_id)
        return add_bos_eos(ids, self.bos_token_id if bos else None, eos_id=self.eos_token_id if eos else None)

    def decode(self, ids, *, incomplete: str = "error"):
        """Codes (K, F) of a row of ids, as `encode` or a language model gives it; padding, BOS and EOS around the
        codes are taken off.

        Args:
            ids (array or tensor): (L,), or (K, L) in a delay layout.
            incomplete: "error" or "drop", for frames at the end that not all codebooks have a code of, as where
                generating stopped at a length.

        Raises:
            ValueError: for a special or an unknown id among the codes, an id that is none of the codebook's whose
                turn it is, or an incomplete frame.
        """
        check_choice("incomplete", incomplete, ("error", "drop"))
        ids = as_ids("ids", ids, 1)
        rows = (self.num_quantizers,) if self.layout == "delay" else ()
        if tuple(ids.shape[:-1]) != rows:
            shape = f"({self.num_quantizers}, steps)" if rows else "(ids,)"
            raise ValueError(f"ids have shape {tuple(ids.shape)}, allowed: {shape}")
        specials = {"eos_id": self.eos_token_id, "pad_id": self.pad_token_id}
        start, stop = core_of(ids, self.bos_token_id, **specials)
        if self.layout == "delay":
            codes = self._delayed(ids[:, start:stop], incomplete == "drop")
        else:
            self._check_flat(ids[:stop], start)
            codes = self._flat(ids[start:stop], incomplete == "drop")
        offsets = offsets_of(codes, self.codebook_size) if self.own_ids else 0
        check_range("id", codes, offsets, self.codebook_size, self._name)
        return codes - offsets

    def slice_frames(self, ids, frames: slice):
        """Ids, without BOS and EOS, of some of the `frames` (a slice) of a row of `ids`.

        Raises:
            ValueError: as of `decode`, or for a step other than 1.
        """
        if frames.step not in (None, 1):
            raise ValueError(f"frames have a step of {frames.step}, allowed: 1")
        return self.encode(self.decode(ids)[:, frames], bos=False, eos=False)

    def _name(self, value: int) -> str:
        names = {self.eos_token_id: " (EOS)", self.bos_token_id: " (BOS)", self.pad_token_id: " (padding)"}
        return names.get(value, "")

    def _check_flat(self, ids, start: int) -> None:
        """Refuse what is no code from `start` on, before frames are counted."""
        bad = as_numpy((ids[start:] < 0) | (ids[start:] >= self.num_code_ids)).nonzero()[0]
        if len(bad):
            place = start + int(bad[0])
            value = int(ids[place])
            raise ValueError(
                f"id {value}{self._name(value)} at place {place}, allowed there: 0 to {self.num_code_ids - 1}"
            )

    def _flat(self, ids, drop: bool):
        """Codes of flat ids, with their offsets."""
        count = self.num_quantizers
        if drop and self.layout == "codebook" and self.own_ids:
            # The first codebook tells how many frames there were to be, what is left for the last how many there are.
            planned = int((ids < self.codebook_size).sum())
            if len(ids) <= planned * count:
                offsets = offsets_of(full_of(ids, (count, planned), 0), self.codebook_size)
                codes = (full_of(ids, (count, planned), 0) + offsets).reshape(count * planned)
                codes[: len(ids)] = ids
                codes = codes.reshape(count, planned)
                check_range("id", codes, offsets, self.codebook_size)
                return codes[:, : max(0, len(ids) - planned * (count - 1))]
        extra = len(ids) % count
        if extra and not (drop and self.layout == "frame"):
            other = "" if drop or (self.layout == "codebook" and not self.own_ids) else ', or incomplete="drop"'
            raise ValueError(f"there are {len(ids)} ids of codes, allowed: a multiple of {count}{other}")
        return take_apart(ids[: len(ids) - extra], self.layout, num_quantizers=count)

    def _delayed(self, ids, drop: bool):
        """Codes of delayed ids."""
        steps, longest = ids.shape[-1], max(self.pattern)
        frames = max(0, steps - longest)
        outside = as_numpy(ids) != self.pad_token_id
        for codebook, first in enumerate(self.pattern):
            if outside[codebook, :first].any():
                place = int(outside[codebook, :first].argmax())
                value = int(ids[codebook, place])
                raise ValueError(
                    f"id {value} of codebook {codebook} at step {place}, allowed before its delay of {first}: "
                    f"{self.pad_token_id} (padding)"
                )
            if not drop and outside[codebook, first + frames :].any():
                raise ValueError(
                    f'codebook {codebook} has codes after {frames} whole frames, allowed: none, or incomplete="drop"'
                )
        if steps < longest:
            return full_of(ids, (self.num_quantizers, 0), 0)
        return take_apart(ids, self.layout, pattern=self.pattern)
