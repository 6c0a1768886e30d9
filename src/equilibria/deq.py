"""`DEQ`: a cell and its solve settings as one layer."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Never

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from equilibria.adjoints.implicit import Implicit
from equilibria.api import SolveSettings, States, check_kind, solve_with
from equilibria.core.adjoint import Adjoint
from equilibria.core.errors import UserError
from equilibria.core.loop import Keep
from equilibria.core.options import refuse_unknown
from equilibria.core.problem import Select
from equilibria.core.scope import solve_scope
from equilibria.core.solution import Solution
from equilibria.core.solver import Solver
from equilibria.core.state import State, StateError
from equilibria.core.status import ConvergenceError, OnFailure
from equilibria.core.termination import Termination
from equilibria.core.warm_start import SampleIndex, WarmStart, WarmStartMemory
from equilibria.solvers.anderson import Anderson
from equilibria.terminations.residual import Residual


class Cell(nn.Module, ABC):
    """The f of z* = f(z*, x), split by how often each part has to run.

    Subclass it and write three methods. Whatever does not depend on z goes to `inject`, runs
    once per solve and is handed to every evaluation: projections of the input, keys and values
    of a memory, normalised weights, dropout masks (a mask drawn inside `forward` would make every
    evaluation another function, which has no fixed point).
    """

    @abstractmethod
    def inject(self, *inputs: Any, **named_inputs: Any) -> Any:
        """Everything that depends on the inputs but not on z; once per solve.

        Name the inputs of your cell in your own signature; this one stands for any.
        """

    @abstractmethod
    def initial_state(self, injection: Any) -> State:
        """Where the solve starts unless told otherwise, commonly zeros (B, ...)."""

    @abstractmethod
    def forward(self, z: State, injection: Any) -> State:
        """One function evaluation; returns a state of exactly the form of z."""

    def select(self, injection: Any, rows: Tensor) -> Any:
        """The injection of some samples only, given by their indices (b,).

        A cell that has this lets samples leave the batch when they have converged: where their
        difficulty differs, f then works on those that still need it. Not for a cell that
        torch.compile has compiled. Write it where samples do not see each other; for an injection
        that is one tensor (B, ...) it is `injection[rows]`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not take its injection apart")


class DEQ(nn.Module):
    """A layer whose output is the fixed point of its cell, z* = f(z*, x).

    Works like any other layer: gradients, `state_dict`, `deepcopy`, several uses in one graph.
    It registers no hooks, and keeps nothing between calls but what warm starts ask for: a cache,
    which copies, pickles and state dicts do not have, one for training and one for evaluation.

    Args:
        cell: the map.
        solver: forward solver, as in `solve`.
        termination: when a sample is done.
        adjoint: how gradients pass through.
        max_steps: solver steps at most.
        keep: what a sample that misses the tolerance returns.
        on_failure: "warn", "raise" or "ignore".
        compact: whether finished samples leave the batch, if the cell has `select`.
        warm_start: where training starts instead of at the cell's initial state, such as
            `Cached(50_000)`; a `z0` given at the call comes before it.
        eval_solver: used instead in eval mode; None means the same as in training.
        eval_termination: likewise.
        eval_max_steps: likewise.
        eval_warm_start: likewise, but None means a cold start, forward and backward: evaluation
            should not depend on what was evaluated before unless that is wanted.

    Shape:
        Inputs are whatever `cell.inject` takes; the output is a `Solution` whose `z` has the form
        of `cell.initial_state`.

    Raises:
        UserError: a cell of the wrong kind, or with an input that has the name of an argument of
            `forward`; an unknown option; settings as in `solve`.
    """

    def __init__(
        self,
        cell: Cell,
        *,
        solver: Solver = Anderson(),
        termination: Termination = Residual(),
        adjoint: Adjoint = Implicit(),
        max_steps: int = 50,
        keep: Keep = "best",
        on_failure: OnFailure = "warn",
        warm_start: WarmStart | None = None,
        compact: bool = True,
        eval_solver: Solver | None = None,
        eval_termination: Termination | None = None,
        eval_max_steps: int | None = None,
        eval_warm_start: WarmStart | None = None,
        **unknown: Never,
    ) -> None:
        super().__init__()
        if unknown:
            refuse_unknown("DEQ", unknown, list(inspect.signature(DEQ).parameters)[1:-1])
        if not isinstance(getattr(cell, "_orig_mod", cell), Cell):  # what torch.compile has wrapped
            raise UserError(
                f"DEQ got a {type(cell).__name__} as its cell; subclass equilibria.Cell (inject, "
                "initial_state, forward), or call equilibria.solve(f, z0) on a plain function"
            )
        _check_names(cell)
        self.cell = cell
        self.train_memory = WarmStartMemory()
        self.eval_memory = WarmStartMemory()
        self.train_settings = SolveSettings(
            solver, termination, adjoint, max_steps, keep, on_failure, warm_start, compact
        )
        self.eval_settings = replace(
            self.train_settings if eval_warm_start else self.train_settings.cold(),
            solver=eval_solver or solver,
            termination=eval_termination or termination,
            max_steps=max_steps if eval_max_steps is None else eval_max_steps,
            warm_start=eval_warm_start,
        )

    @property
    def settings(self) -> SolveSettings:
        """The settings of the current mode, training or evaluation."""
        return self.train_settings if self.training else self.eval_settings

    @property
    def memory(self) -> WarmStartMemory:
        """What warm starts of the current mode remember; `deq.memory.clear()` forgets it."""
        return self.train_memory if self.training else self.eval_memory

    def forward(
        self,
        *inputs: Any,
        z0: State | None = None,
        settings: SolveSettings | None = None,
        batch_dims: Literal[0, 1] = 1,
        segments: Tensor | None = None,
        states: States = None,
        trace: bool = False,
        sample_index: SampleIndex | None = None,
        **named_inputs: Any,
    ) -> Solution:
        """Inject the inputs and solve for the fixed point.

        Args:
            *inputs: handed to `cell.inject`.
            **named_inputs: likewise; it refuses names that it does not know.
            z0: initial state; by default the cell's own, or what the warm start says. A call with
                a z0 is left out of the warm start: neither used nor remembered.
            settings: for this call only, instead of the layer's.
            batch_dims: 1, or 0 when the whole state is one problem, as in `solve`.
            segments: ragged batches, as in `solve`.
            states: intermediate states, as in `solve`.
            trace: record the residual of every step, forward and backward.
            sample_index: which sample of the data set each one is, for `Cached`; may be given
                always, as it is ignored where nothing asks for it.
        """
        if named_inputs:
            _refuse_settings(self.cell, named_inputs)
        with solve_scope():  # inject may draw masks, too
            return self.solve(
                self.cell.inject(*inputs, **named_inputs),
                z0=z0,
                settings=settings,
                batch_dims=batch_dims,
                segments=segments,
                states=states,
                trace=trace,
                sample_index=sample_index,
            )

    def solve(
        self,
        injection: Any,
        *,
        z0: State | None = None,
        settings: SolveSettings | None = None,
        batch_dims: Literal[0, 1] = 1,
        segments: Tensor | None = None,
        states: States = None,
        trace: bool = False,
        sample_index: SampleIndex | None = None,
    ) -> Solution:
        """Solve for an injection made before, for models that need it afterwards too.

        Where cells draw masks or normalise weights both in `inject` and in `forward`, put both
        calls inside `with solve_scope():`.
        """
        if settings is None:
            settings = self.settings
        else:
            check_kind("settings", settings, SolveSettings, "replace(deq.settings, max_steps=100)")
        start = z0
        if start is None:
            start = self.cell.initial_state(injection)
        elif settings.warm_start is not None:
            settings = replace(settings, warm_start=None)
        run = partial(
            solve_with,
            lambda z: self.cell(z, injection),
            start,
            settings,
            batch_dims=batch_dims,
            segments=segments,
            states=states,
            select=self._selector(injection) if batch_dims and segments is None else None,
            trace=trace,
            memory=self.memory,
            sample_index=sample_index,
            z0_is_given=z0 is not None,
        )
        if z0 is None or torch.compiler.is_compiling():
            return run()
        try:
            return run()
        except ConvergenceError:
            raise
        except Exception as error:
            _explain_start(z0, self.cell, injection, error)
            raise

    def _selector(self, injection: Any) -> Select | None:
        """f of some samples only, if the cell can tell their injections apart."""
        cell = self.cell
        # A compiled cell would be compiled again for every size that its batch shrinks to.
        compiled = hasattr(cell, "_orig_mod") or cell._compiled_call_impl is not None  # pyright: ignore[reportPrivateUsage]
        if compiled or type(cell).select is Cell.select:
            return None

        def select(rows: Tensor) -> Callable[[State], State]:
            part = cell.select(injection, rows)
            return lambda z: self.cell(z, part)

        return select


def _check_names(cell: Cell) -> None:
    """Refuse a cell that waits for an input which the DEQ would keep for itself."""
    own = inspect.signature(DEQ.forward).parameters.values()
    kept = {p.name for p in own if p.kind is p.KEYWORD_ONLY}
    for p in inspect.signature(cell.inject).parameters.values():
        if p.name in kept and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            raise UserError(
                f"{type(cell).__name__}.inject has an input called {p.name}, which DEQ takes for "
                "itself when it is called and does not pass on; give that input of inject another "
                "name"
            )


def _explain_start(z0: State, cell: Cell, injection: Any, error: Exception) -> None:
    """Raise StateError where a solve failed that began at a state of another form than usual.

    Only then: a cell may well take states that it does not start from itself.
    """
    difference = _difference(z0, cell.initial_state(injection))
    if difference is not None:
        given, usual = difference
        name = type(getattr(cell, "_orig_mod", cell)).__name__
        raise StateError(
            f"{given}, but for these inputs {name} starts from {usual} (its initial_state); give "
            f"a z0 of that form. The solve failed with: {error}"
        ) from error


def _difference(z0: State, usual: State) -> tuple[str, str] | None:
    """The first difference in form, in words for either side."""
    given, tree = pytree.tree_flatten_with_path(z0)
    expected, usual_tree = pytree.tree_flatten_with_path(usual)
    if tree != usual_tree:
        return f"z0 is {_tree(tree)}", _tree(usual_tree)
    for (path, leaf), (_, other) in zip(given, expected, strict=True):
        name = f"z0{pytree.keystr(path)}"
        if not isinstance(leaf, Tensor):
            return None  # the error says so already
        if leaf.shape != other.shape:
            return f"{name} has shape {tuple(leaf.shape)}", str(tuple(other.shape))
        if leaf.dtype != other.dtype:
            return f"{name} is {leaf.dtype}", str(other.dtype)
    return None


def _tree(tree: pytree.TreeSpec) -> str:
    """A tree on one line."""
    return "a tensor" if tree.is_leaf() else f"the tree {' '.join(str(tree).split())}"


def _refuse_settings(cell: Cell, inputs: dict[str, Any]) -> None:
    """Say where settings go that were given to a call, unless they are inputs of the cell."""
    settings = sorted(inputs.keys() & inspect.signature(SolveSettings).parameters.keys())
    known = inspect.signature(cell.inject).parameters if settings else {}
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    for name in settings:
        if name not in known:
            raise UserError(
                f"{name} is a setting of the layer and no input of {type(cell).__name__}; give it "
                f"to DEQ(...), or for one call settings=dataclasses.replace(deq.settings, "
                f"{name}=...)"
            )
