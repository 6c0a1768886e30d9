"""Pickling of modules with parametrised weights, which PyTorch refuses."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize


def make_picklable(module: nn.Module) -> None:
    """Let a parametrised module be pickled like any other.

    PyTorch gives each such module a class of its own, made at run time, which a pickle cannot find
    by its name. So the pickle notes the class it had before and the names of the weights, and the
    other class is made again when it is read.
    """
    if parametrize.is_parametrized(module):
        type(module).__reduce_ex__ = _reduced  # pyright: ignore[reportAttributeAccessIssue]


def _reduced(module: nn.Module, _protocol: object) -> tuple[Any, ...]:
    plain = cast("type[nn.Module]", type(module).__mro__[1])
    names = list(module.parametrizations)  # pyright: ignore[reportArgumentType]
    return _without_state, (plain, names), plain.__getstate__(module)


def _without_state(plain: type[nn.Module], names: list[str]) -> nn.Module:
    """A module of the class `plain` whose weights are parametrised; its contents come after."""
    module = plain.__new__(plain)
    nn.Module.__init__(module)
    for name in names:
        module.register_parameter(name, nn.Parameter(torch.empty(0)))
        parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
    make_picklable(module)
    return module
