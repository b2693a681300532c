# Copyright 2026 The modeling-encodec authors. Licensed under the Apache License, Version 2.0.
"""Modules with weight norm as values: `pickle`, `torch.save`, `copy.deepcopy`, and the way to other processes.

PyTorch pickles no module whose weights are parametrized. Ours are told by what they were made with and by their
tensors, from which an equal module is made.
"""

import copy
import pickle
from collections.abc import Iterator

import torch
from torch import nn


# What every module has, and what each module's own part is made anew of.
MODULE_FIELDS = frozenset(vars(nn.Module()))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class PickledByWeights(nn.Module):
    """A module that is pickled as the arguments it was made with, and its tensors, modes and own attributes."""

    def made_with(self) -> tuple:
        """Arguments that make a module of the same parts."""
        raise NotImplementedError  # each class has its own

    def __reduce__(self):
        with torch.device("meta"):
            parts = [(name, type(part).__qualname__) for name, part in type(self)(*self.made_with()).named_modules()]
        ours = [(name, type(part).__qualname__) for name, part in self.named_modules()]
        if ours != parts:
            other = next(name for name, _ in [*(set(ours) ^ set(parts))])
            raise pickle.PicklingError(
                f"{type(self).__name__} has other parts than it was made with (at {other!r}), allowed: its own; "
                "merge adapters first, or keep its state_dict()"
            )
        for name, part in self.named_modules():
            if any(getattr(part, hooks, None) for hooks in HOOKS):
                raise pickle.PicklingError(f"{type(self).__name__} has hooks (at {name!r}), allowed: none")
        training = [name for name, part in self.named_modules() if part.training]
        own = {name: value for name, value in vars(self).items() if name not in MODULE_FIELDS}
        return _make_again, (type(self), self.made_with(), dict(_tensors(self)), training, own)

    def __deepcopy__(self, memo: dict):
        # As PyTorch does without `__reduce__`: with hooks, adapters and all.
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(vars(self), memo))
        return twin


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name, those too that no state dict has."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _make_again(kind: type, arguments: tuple, tensors: dict[str, torch.Tensor], training: list[str], own: dict):
    with torch.device("meta"):
        module = kind(*arguments)
    for name, tensor in tensors.items():
        place, _, leaf = name.rpartition(".")
        place = module.get_submodule(place)
        (place._parameters if isinstance(tensor, nn.Parameter) else place._buffers)[leaf] = tensor
    modes = set(training)
    for name, part in module.named_modules():
        part.training = name in modes
    module.__dict__.update(own)
    return module
