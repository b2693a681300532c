"""Operations on shapes alone, so that full-size work can be counted on a small machine.

Whole numbers and truth values stay real, for programs go by them: lengths, masks, codes. Of what they would be made of
numbers that nobody knows, codes are 0 and truth values true (as in "all are finite").
"""

import torch

from . import operations as ops


LARGE = 1 << 14  # numbers from which a tensor is a shape alone


class Shapes:
    """Computes with what is known."""

    def compute(self, func, name: str, args: tuple, kwargs: dict):
        """The result, and the arguments that it was made of."""
        given = ops.tensors_in(args, kwargs)
        unknown = any(map(self._is_unknown, given)) if given else self._makes_large(func, args, kwargs)
        if not unknown:
            return self._known(func, args, kwargs)
        if name == "_local_scalar_dense":
            return 1.0, (args, kwargs)
        args, kwargs = self._without_masks(func, args), dict(kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
        kwargs.pop("generator", None)
        args, kwargs = ops.changed(as_shape, (args, kwargs))
        out = func(*args, **kwargs)
        if func._schema.is_mutable or ops.is_view(func):
            return out, (args, kwargs)
        return ops.changed(_with_known, out), (args, kwargs)

    def _known(self, func, args: tuple, kwargs: dict):
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        out = func(*args, **kwargs)
        if not func._schema.is_mutable and not ops.is_view(func):
            out = ops.changed(lambda t: as_shape(t) if self._is_unknown(t) else t, out)
        return out, (args, kwargs)

    @staticmethod
    def _is_unknown(t: torch.Tensor) -> bool:
        numbers = t.is_floating_point() or t.is_complex()
        return t.device.type == "meta" or (numbers and t.numel() > LARGE)

    def _makes_large(self, func, args: tuple, kwargs: dict) -> bool:
        """Of an operation that makes a tensor out of none."""
        if kwargs.get("device") is None:
            return False
        shaped = func(*args, **{k: v for k, v in kwargs.items() if k != "generator"} | {"device": "meta"})
        return (shaped.is_floating_point() or shaped.is_complex()) and shaped.numel() > LARGE

    @staticmethod
    def _without_masks(func, args: tuple) -> tuple:
        """A mask as an index, by the places of its ones: of shapes alone they could not be counted."""
        if ops.name_of(func) not in ops.INDEXED:
            return args
        places = []
        for index in args[1]:
            is_mask = index is not None and index.dtype == torch.bool and index.device.type != "meta"
            places += index.nonzero(as_tuple=True) if is_mask else [index]
        return (args[0], places, *args[2:])


def as_shape(t: torch.Tensor) -> torch.Tensor:
    """The shape of `t` alone."""
    if t.device.type == "meta":
        return t
    return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta")


def _with_known(t: torch.Tensor) -> torch.Tensor:
    if t.is_floating_point() or t.is_complex():
        return t
    known = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="cpu")
    return known.fill_(1 if t.dtype == torch.bool else 0)
