"""`solve`: user state in, `Solution` out."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from equilibria.adjoints.implicit import Implicit
from equilibria.core.adjoint import Adjoint, Forward
from equilibria.core.errors import UserError
from equilibria.core.loop import Keep, LoopResult, check_limits, iterate
from equilibria.core.parameters import check_positive_integer
from equilibria.core.problem import Problem
from equilibria.core.pure import is_transformed
from equilibria.core.solution import Solution
from equilibria.core.solver import Solver
from equilibria.core.state import State
from equilibria.core.status import OnFailure, check_on_failure, enforce
from equilibria.core.termination import Termination
from equilibria.solvers.anderson import Anderson
from equilibria.terminations.residual import Residual

States = Literal["all"] | int | Sequence[int] | None
"""Which intermediate states to return: all, a number of evenly spaced ones, or given steps."""


@dataclass(frozen=True)
class SolveSettings:
    """Everything about a solve but the problem; see `solve` for the meaning of each.

    Raises:
        UserError: an argument of the wrong kind, max_steps below 1, an unknown policy.
    """

    solver: Solver = Anderson()
    termination: Termination = Residual()
    adjoint: Adjoint = Implicit()
    max_steps: int = 50
    keep: Keep = "best"
    on_failure: OnFailure = "warn"

    def __post_init__(self) -> None:
        _check_kind("solver", self.solver, Solver, "Anderson()")
        _check_kind("termination", self.termination, Termination, "Residual(rtol=1e-3)")
        _check_kind("adjoint", self.adjoint, Adjoint, "Implicit()")
        check_limits(self.max_steps, self.keep)
        check_on_failure(self.on_failure)


def solve(
    f: Callable[[State], State],
    z0: State,
    *,
    solver: Solver = Anderson(),
    termination: Termination = Residual(),
    adjoint: Adjoint = Implicit(),
    max_steps: int = 50,
    keep: Keep = "best",
    on_failure: OnFailure = "warn",
    batch_dims: Literal[0, 1] = 1,
    segments: Tensor | None = None,
    states: States = None,
    inputs: Sequence[Tensor] | None = None,
    trace: bool = False,
) -> Solution:
    """Find the fixed point z* = f(z*) of every sample, differentiably.

    Gradients reach whatever `f` depends on, parameters and closed-over tensors alike. Without
    grad mode nothing is recorded and the adjoint is not used.

    Args:
        f: the map; takes and returns a state of the form of `z0`, each sample on its own.
        z0: initial state, any tree of (B, ...) floating-point tensors.
        solver: how to step; `Anderson()` for contractions, `Broyden()` for hard problems.
        termination: when a sample is done; relative residual 1e-4 by default.
        adjoint: how gradients pass through; `Implicit()` is exact in constant memory.
        max_steps: solver steps at most (the initial evaluation is not one).
        keep: what a sample that misses the tolerance returns, its "best" or "last" iterate.
        on_failure: "warn", "raise" or "ignore" when a sample, forward or backward, is no success.
        batch_dims: 1, or 0 when the whole state is one problem.
        segments: ragged and graph batches: for each row of the state the number of the problem it
            belongs to (N,); norms, convergence and reports are then per problem.
        states: intermediate states to return, for correction losses: "all", a number of evenly
            spaced ones, or the steps wanted. Each carries a gradient by the same adjoint, as if it
            were the fixed point; the final state is always the last of them.
        inputs: the tensors f depends on besides z. None (default) finds them; only a second
            derivative through a compiled f needs them named.
        trace: record the relative residual of every step, forward and backward.

    Shape:
        `z0` and `Solution.z`: tree of (B, ...); diagnostics: (B,), or (1,) for batch_dims=0.

    Raises:
        UserError: an argument out of range or of the wrong kind.
        StateError: `z0` or f's image has the wrong tree, shape, dtype or device.
        ConvergenceError: a sample did not converge and on_failure="raise".

    Example:
        >>> import torch
        >>> solution = solve(torch.cos, torch.ones(1, 1, dtype=torch.float64))
        >>> round(solution.z.item(), 3)
        0.739
    """
    settings = SolveSettings(solver, termination, adjoint, max_steps, keep, on_failure)
    return solve_with(
        f,
        z0,
        settings,
        batch_dims=batch_dims,
        segments=segments,
        states=states,
        inputs=inputs,
        trace=trace,
    )


def solve_with(
    f: Callable[[State], State],
    z0: State,
    settings: SolveSettings,
    *,
    batch_dims: Literal[0, 1] = 1,
    segments: Tensor | None = None,
    states: States = None,
    inputs: Sequence[Tensor] | None = None,
    trace: bool = False,
) -> Solution:
    """`solve` with its settings as one object."""
    start = time.perf_counter()
    problem = Problem(f, z0, batch_dims, segments, inputs)
    record = _steps_to_record(states, settings.max_steps)

    def run(posed: Problem = problem) -> LoopResult:
        return iterate(
            posed,
            settings.solver,
            settings.termination,
            max_steps=settings.max_steps,
            keep=settings.keep,
            trace=trace,
            record=record,
        )

    forward = Forward(problem, run, settings.on_failure, trace=trace)
    transformed = is_transformed()
    if transformed:
        z, result = settings.adjoint.apply_transformed(forward)
        passed = result.states
    elif torch.is_grad_enabled():
        z, result = settings.adjoint.apply(forward)
        passed = [settings.adjoint.attach(forward, state) for state in result.states]
    else:
        result = run()
        # A copy, because without a step the solution is z0, which is the user's.
        z = result.iterate.z.clone()
        passed = result.states
    if not transformed:  # there it is done where the numbers can be looked at
        enforce(result.status, settings.on_failure, "the forward solve")
    return Solution(
        z=problem.layout.unpack(z),
        states=tuple(map(problem.layout.unpack, (*passed, z))) if states is not None else (),
        status=result.status,
        residual=result.measurement.residual,
        relative_residual=result.measurement.relative,
        num_steps=result.num_steps,
        num_evals=problem.num_evals,
        seconds=time.perf_counter() - start,
        backward=forward.report,
        trace=None if result.trace is None else result.trace.relative,
        problem=problem,
    )


def _steps_to_record(states: States, max_steps: int) -> Collection[int]:
    """Steps whose point is returned besides the final one."""
    if states is None:
        return ()
    if states == "all":
        return range(1, max_steps + 1)
    if isinstance(states, int):
        check_positive_integer("states", states)
        return {round(i * max_steps / states) for i in range(1, states)}
    if isinstance(states, str) or not all(isinstance(step, int) for step in states):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(
            f"states={states!r} is no choice; give 'all', a number of evenly spaced states, or "
            "the steps whose states you want"
        )
    if any(not 1 <= step <= max_steps for step in states):
        raise UserError(
            f"states={states!r} asks for steps outside 1 to max_steps={max_steps}; there are none"
        )
    return set(states)


def _check_kind(name: str, given: object, expected: type, example: str) -> None:
    if not isinstance(given, expected):
        hint = " (an instance, not the class)" if isinstance(given, type) else ""
        raise UserError(
            f"{name}={given!r} is no {expected.__name__}{hint}; give for example {name}={example}"
        )
