"""Evaluating f again as it was in the solve, or saying that it has become another function."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from equilibria.core.errors import UserError
from equilibria.core.iterate import rms
from equilibria.core.state import State

NUM_ROUNDINGS, LARGEST_DIFFERENCE = 1e3, 0.05
"""How far two runs of one function may differ, relative to its image, in units of rounding and at
most: sums in another order."""


class ReplayError(UserError):
    """f is not the function any more that was solved."""


class Replay:
    """One evaluation at a point that is known to the caller, to be made again.

    Modules that f closes over directly are given the parameters and buffers they had, because
    `torch.func.functional_call` exchanges them for one call only, and what an evaluation writes
    to their buffers is undone: batch norm must not count it. All else that f may depend on cannot
    be followed, so its image is compared with the one recorded. Without f no parameters are
    given back, which saves looking for them.
    """

    def __init__(self, f: Callable[..., Any] | None, image: Tensor, rounding: float) -> None:
        self._entries: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (entries, dict(entries))
            for module in _modules_at_hand(f)
            for entries in (module._parameters, module._buffers)  # pyright: ignore[reportPrivateUsage]
        ]
        self._image = image.detach()
        self._tolerance = min(NUM_ROUNDINGS * rounding, LARGEST_DIFFERENCE)

    @contextmanager
    def as_then(self) -> Generator[None]:
        """f evaluated in here sees the parameters of then, and leaves buffers as they are."""
        buffers = [
            (buffer, buffer.clone())
            for _, then in self._entries
            for buffer in then.values()
            if isinstance(buffer, Tensor) and not isinstance(buffer, nn.Parameter)
            if not buffer.requires_grad and not buffer.is_inference()
        ]
        with ExitStack() as stack:
            for entries, then in self._entries:
                stack.enter_context(exchanged(entries, then))
            try:
                yield
            finally:
                # Not every operation counts its writes as versions; writing back is not to count.
                for buffer, before in buffers:
                    buffer.data.copy_(before)

    def check(self, image: Tensor) -> None:
        """Raise ReplayError if an image at the same point is another one."""
        image = image.detach()
        difference = torch.where(image.isnan() & self._image.isnan(), 0.0, image - self._image)
        size = rms(self._image)
        _refuse_unless(((rms(difference) <= self._tolerance * size) | ~size.isfinite()).all())


class SameTwice:
    """A function that a checkpoint evaluates again, and that has to give the same both times.

    Only the sums of its image are kept, so that checkpoints stay as small as they are.
    """

    def __init__(self, f: Callable[[State], State], rounding: float) -> None:
        self._f = f
        self._tolerance = min(NUM_ROUNDINGS * rounding, LARGEST_DIFFERENCE)
        self._sums: Tensor | None = None

    def __call__(self, state: State) -> State:
        """Evaluate, and compare with the first time."""
        image = self._f(state)
        with torch.no_grad():
            leaves = [leaf for leaf in pytree.tree_leaves(image) if isinstance(leaf, Tensor)]
            sums = torch.stack(
                [total for leaf in leaves for total in (leaf.sum(), leaf.abs().sum())]
            )
        if self._sums is None:
            self._sums = sums
            return image
        off, size = (sums - self._sums).abs(), self._sums.abs().amax()
        _refuse_unless(((off <= self._tolerance * size) | ~size.isfinite()).all())
        return image


def _refuse_unless(same: Tensor) -> None:
    """One wait for the device. Compiled code cannot look, and is the same both times."""
    if not torch.compiler.is_compiling() and not bool(same):
        raise ReplayError(_CHANGED)


_CHANGED = (
    "f has to be evaluated again, in the backward pass or for a measurement at the solution, and "
    "gives another result than in the solve. Usual causes: a loop variable that f looks up late "
    "(bind it: lambda z, W=W: ...), weights written to or exchanged since (measure before the "
    "optimiser's step, and inside of torch.func.functional_call), another mode (train, eval) or "
    "configuration, randomness that is drawn inside f"
)


def _modules_at_hand(f: object) -> Sequence[nn.Module]:
    """Modules that a function closes over itself; a deeper search would cost every solve."""
    held: list[object] = [f]
    if isinstance(f, MethodType):
        held = [f.__self__]
    elif isinstance(f, FunctionType):
        held = [cell.cell_contents for cell in f.__closure__ or () if _is_bound(cell)]
    return [module for value in held if isinstance(value, nn.Module) for module in value.modules()]


def _is_bound(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


@contextmanager
def exchanged(entries: dict[str, Any], then: dict[str, Any]) -> Generator[None]:
    """Give the parameters or buffers of one module the values they had `then`."""
    now = {name: entries[name] for name in then if entries.get(name) is not then[name]}
    entries.update({name: then[name] for name in now})
    try:
        yield
    finally:
        entries.update(now)
