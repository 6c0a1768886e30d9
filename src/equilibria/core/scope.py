"""What is drawn or computed once per solve: dropout masks, normalised weights.

A mask drawn at every evaluation makes every evaluation another function, which has no fixed point;
a weight normalised at every evaluation is the same each time and paid for each time. A module
therefore asks for such a value by `once`, and gets the same one during the whole solve: in every
evaluation, in the recorded one of the backward pass, and wherever f is evaluated again later
(checkpointed unrolling, second derivatives).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Hashable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch.autograd.graph import saved_tensors_hooks

from equilibria.core.errors import UserError

S = TypeVar("S")
T = TypeVar("T")


class SolveScope:
    """The values of one solve.

    Held by the solve's own graph and by nothing else: modules stay as they are, so that copying,
    saving, moving or averaging them needs no care, and values die with the solution.
    """

    def __init__(self) -> None:
        self._records = torch.is_grad_enabled()
        self._values: dict[Hashable, Any] = {}

    def __len__(self) -> int:
        return len(self._values)

    @contextmanager
    def active(self) -> Generator[None]:
        """Make this the scope that `once` uses, in this thread."""
        outer, _active.scope = _active.scope, self
        try:
            yield
        finally:
            _active.scope = outer

    def calling(self, f: Callable[[S], T], argument: S) -> T:
        """f(argument) with this scope active; what every evaluation goes through."""
        outer, _active.scope = _active.scope, self
        try:
            return f(argument)
        finally:
            _active.scope = outer

    def once(self, key: Hashable, make: Callable[[], T], rows: int | None = None) -> T:
        """The value of `key`, made at the first call.

        Made in the grad mode that the solve began in. A solver evaluates without recording, and a
        weight made there would have no graph: its parameters would silently get no gradient.
        """
        if rows is not None:
            key = (key, rows)
        if key not in self._values:
            with torch.set_grad_enabled(self._records), _outside_of_checkpoints():
                self._values[key] = make()
        return self._values[key]

    def has(self, key: Hashable) -> bool:
        """Whether there is a value of this key already."""
        return key in self._values

    def of_samples(self, samples: torch.Tensor, batch: int) -> SolveScope:
        """The same values for some samples of a batch only, given by their indices (b,)."""
        return _PartOfScope(self, samples, batch)


class _PartOfScope(SolveScope):
    """A scope after some samples have left the batch."""

    def __init__(self, whole: SolveScope, samples: torch.Tensor, batch: int) -> None:
        super().__init__()
        self._whole, self._samples, self._batch = whole, samples, batch

    def once(self, key: Hashable, make: Callable[[], T], rows: int | None = None) -> T:
        """The value of the whole, or the rows of the samples that are still here."""
        if rows is None:
            return self._whole.once(key, make)
        if rows != len(self._samples) or not self._whole.has((key, self._batch)):
            raise UserError(
                f"a value of {rows} rows is shared by a solve whose batch shrinks to "
                f"{len(self._samples)} samples, so that its rows cannot be told apart (are "
                "samples and positions in one dimension?); keep the batch together with "
                "compact=False"
            )
        if key not in self._values:
            whole: Any = self._whole.once(key, make, self._batch)
            self._values[key] = whole[self._samples]
        return self._values[key]


def once(key: Hashable, make: Callable[[], T], rows: int | None = None) -> T:
    """The value of `key` in the solve that is going on; outside of a solve, a new one.

    Use the module and a name as the key: `once((self, "mask"), self._draw)`. For a tensor whose
    first dimension goes by samples `rows` is its size, so that it can follow a batch that shrinks.
    """
    scope = _active.scope
    return make() if scope is None else scope.once(key, make, rows)


@contextmanager
def solve_scope() -> Generator[SolveScope]:
    """All that is done inside belongs to one solve; inside another scope, to that one.

    `solve` and `DEQ` do this by themselves. For models that call `cell.inject` and `deq.solve`
    on their own. A DEQ inside the map of another belongs to the outer solve: with masks of its
    own at each of its solves the outer map would be another one at every evaluation.
    """
    scope = SolveScope() if _active.scope is None else _active.scope
    with scope.active():
        yield scope


class _Active(threading.local):
    """The scope in use in each thread. A ContextVar would do, but torch.compile cannot trace it."""

    def __init__(self) -> None:
        # Of the instance, not of the class: what appears at the first use fails compiled guards.
        self.scope: SolveScope | None = None


_active = _Active()


def _outside_of_checkpoints() -> AbstractContextManager[object]:
    """Hide from a checkpoint around an evaluation, which would expect the value to be made again.

    Function transforms and compiled code refuse such hooks, and checkpoints as well.
    """
    transformed = torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
    if transformed or torch.compiler.is_compiling():
        return nullcontext()
    return saved_tensors_hooks(_same, _same)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
