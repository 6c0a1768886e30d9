"""Running a part of a compiled function by PyTorch as it is, between two graphs.

Import it where it is needed and only while torch.compile is at work: it loads the compiler, which
`import equilibria` does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


def between_graphs(function: Callable[P, R], /, *arguments: P.args, **settings: P.kwargs) -> R:
    """Call a function out of reach of torch.compile."""
    return _run(function, *arguments, **settings)


def _call(function: Callable[..., Any], /, *arguments: Any, **settings: Any) -> Any:
    return function(*arguments, **settings)


_run = cast("Callable[..., Any]", torch.compiler.disable(_call))
