"""`solve`: user state in, `Solution` out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any, Literal, Never

import torch
from torch import Tensor

from equilibria.adjoints.implicit import Implicit
from equilibria.core.adjoint import Adjoint, BackwardReport, Forward
from equilibria.core.clock import clock
from equilibria.core.errors import UserError
from equilibria.core.loop import Keep, LoopResult, check_limits, iterate
from equilibria.core.options import Options, refuse_unknown
from equilibria.core.parameters import as_integer, check_positive_integer
from equilibria.core.problem import Problem, Select
from equilibria.core.pure import is_transformed
from equilibria.core.replay import Replay
from equilibria.core.solution import Solution, Solved
from equilibria.core.solver import Solver
from equilibria.core.state import State, StateError
from equilibria.core.status import OnFailure, check_on_failure, enforce
from equilibria.core.termination import Termination
from equilibria.core.warm_start import SampleIndex, Start, WarmStart, WarmStartMemory
from equilibria.core.waypoints import AtSteps, EvenlySpaced, Waypoints
from equilibria.solvers.anderson import Anderson
from equilibria.terminations.residual import Residual

States = Literal["all"] | int | Sequence[int] | None
"""Which intermediate states to return: all, a number of evenly spaced ones, or given steps."""


@dataclass(frozen=True)
class SolveSettings(Options):
    """Everything about a solve but the problem; see `solve` for the meaning of each.

    Raises:
        UserError: an argument of the wrong kind, max_steps below 1, an unknown policy, a gradient
            through the steps with a warm start that saves them.
    """

    solver: Solver = Anderson()
    termination: Termination = Residual()
    adjoint: Adjoint = Implicit()
    max_steps: int = 50
    keep: Keep = "best"
    on_failure: OnFailure = "warn"
    warm_start: WarmStart | None = None
    compact: bool = True

    def __post_init__(self) -> None:
        check_kind("solver", self.solver, Solver, "Anderson()")
        check_kind("termination", self.termination, Termination, "Residual(rtol=1e-3)")
        check_kind("adjoint", self.adjoint, Adjoint, "Implicit()")
        object.__setattr__(self, "max_steps", as_integer(self.max_steps))
        check_limits(self.max_steps, self.keep)
        self.termination.check_limit(self.max_steps)
        check_on_failure(self.on_failure)
        self.adjoint.check(self.solver)
        if not isinstance(self.compact, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(f"compact={self.compact!r} must be True or False")
        if self.warm_start is not None:
            check_kind("warm_start", self.warm_start, WarmStart, "Previous()")
            _check_steps_remain(self.warm_start, self.termination, self.adjoint)

    def cold(self) -> SolveSettings:
        """The same without warm starts, forward and backward: for whoever compares solves."""
        if self.warm_start is None and self.adjoint.backward_warm_start is None:
            return self
        return replace(self, warm_start=None, adjoint=self.adjoint.without_warm_start())


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
    warm_start: WarmStart | None = None,
    compact: bool = True,
    batch_dims: Literal[0, 1] = 1,
    segments: Tensor | None = None,
    states: States = None,
    inputs: Sequence[Tensor] | None = None,
    select: Select | None = None,
    trace: bool = False,
    memory: WarmStartMemory | None = None,
    sample_index: SampleIndex | None = None,
    **unknown: Never,
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
        warm_start: where to start instead of `z0`, as far as it knows better: `Previous()`,
            `Cached(...)`, `Random(...)`. `z0` then gives the form of the state, and the start of
            unknown samples.
        compact: whether finished samples leave the batch once they are an eighth of it, where
            `select` says how. Not under gradients through the steps, `Shine`, `states` or `trace`.
        batch_dims: 1, or 0 when the whole state is one problem.
        segments: ragged and graph batches: for each row of the state the number of the problem it
            belongs to (N,); norms, convergence and reports are then per problem.
        states: intermediate states to return, for correction losses: "all", a number of them,
            evenly spaced over the steps that turn out to be made, or the steps wanted. Each
            carries a gradient by the same adjoint, as if it were the fixed point; the final state
            is always the last of them.
        inputs: the tensors f depends on besides z. None (default) finds them; only a second
            derivative through a compiled f needs them named.
        select: for batches of uneven difficulty: takes the indices (b,) of some samples, and
            returns the f of these alone, as in
            `lambda rows: lambda z: torch.tanh(z @ w + x[rows])`. What has converged is then
            evaluated no longer.
        trace: record the relative residual of every step, forward and backward.
        memory: what warm starts, forward and backward, remember from call to call.
        sample_index: for `Cached`: which sample of the data set each one is, integers (B,) or B
            other keys; of a ragged batch one per problem.
        **unknown: no other option is taken; a misspelt one is an error that names the nearest.

    Shape:
        `z0` and `Solution.z`: tree of (B, ...); diagnostics: (B,), or (1,) for batch_dims=0.

    Raises:
        UserError: an argument out of range, of the wrong kind or of an unknown name.
        StateError: `z0` or f's image has the wrong tree, shape, dtype or device, or `z0` is not
            finite.
        ConvergenceError: a sample did not converge and on_failure="raise".

    Examples:
        >>> import torch
        >>> solution = solve(torch.cos, torch.ones(1, 1, dtype=torch.float64))
        >>> round(solution.z.item(), 3)
        0.739
    """
    if unknown:
        refuse_unknown("solve", unknown, list(signature(solve).parameters)[:-1])
    settings = SolveSettings(
        solver, termination, adjoint, max_steps, keep, on_failure, warm_start, compact
    )
    return solve_with(
        f,
        z0,
        settings,
        batch_dims=batch_dims,
        segments=segments,
        states=states,
        inputs=inputs,
        select=select,
        trace=trace,
        memory=memory,
        sample_index=sample_index,
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
    select: Select | None = None,
    trace: bool = False,
    memory: WarmStartMemory | None = None,
    sample_index: SampleIndex | None = None,
    z0_is_given: bool = True,
) -> Solution:
    """`solve` with its settings as one object; a z0 that the user has not given is trusted."""
    if torch.compiler.is_compiling() and not _is_traceable(settings):
        from equilibria.core.graph_break import between_graphs

        return between_graphs(
            _solve_with_numbers,
            f,
            z0,
            settings,
            batch_dims=batch_dims,
            segments=segments,
            states=states,
            inputs=inputs,
            select=select,
            trace=trace,
            memory=memory,
            sample_index=sample_index,
            z0_is_given=z0_is_given,
        )
    start = clock()
    problem = Problem(f, z0, batch_dims, segments, inputs)
    if z0_is_given:
        _check_finite(problem, settings, "z0")
    if select is not None:
        _check_select(select, batch_dims, segments)
        problem.select = select if settings.compact and not settings.adjoint.needs_history else None
    transformed = is_transformed()
    warm = backward_warm = warm_started = None
    if not transformed:  # there tensors have no numbers to remember
        warm, backward_warm = _warm_starts(settings, problem, memory, sample_index)
    if warm is not None:
        problem.z0, warm_started = warm.from_cold(problem.z0)
    waypoints = _waypoints(states, settings.max_steps)

    def run(posed: Problem = problem) -> LoopResult:
        return iterate(
            posed,
            settings.solver,
            settings.termination,
            max_steps=settings.max_steps,
            keep=settings.keep,
            trace=trace,
            waypoints=waypoints and waypoints(),
        )

    report = BackwardReport()
    forward = Forward(
        problem,
        run,
        settings.on_failure,
        report,
        trace,
        settings.solver,
        {},
        backward_warm,
        settings.termination.needs_sync,
    )
    if transformed:
        z, result = settings.adjoint.apply_transformed(forward)
        passed = result.states
    elif torch.is_grad_enabled():
        z, result = settings.adjoint.apply(forward)
        # Each intermediate state has a backward solve of its own, of which nothing is known.
        cold = replace(forward, start=None) if backward_warm is not None else forward
        passed = [settings.adjoint.attach(cold, state) for state in result.states]
    else:
        result = run()
        # A copy, because without a step the solution is z0, which is the user's.
        z = result.iterate.z.clone()
        passed = result.states
    if warm is not None:
        warm.remember(result.iterate.z, result.status, result.measurement.relative)
    # under transforms it is done where the numbers can be looked at, in one graph nowhere
    if not transformed and not torch.compiler.is_compiling():
        if not z0_is_given and settings.on_failure != "ignore" and bool(result.status.any()):
            # trusted until now, because to look costs a wait
            _check_finite(problem, settings, "the initial_state of the cell")
        enforce(result.status, settings.on_failure, "the forward solve")
    return Solution(
        z=problem.layout.unpack(z),
        states=tuple(map(problem.layout.unpack, (*passed, z))) if states is not None else (),
        status=result.status,
        residual=result.measurement.residual,
        relative_residual=result.measurement.relative,
        num_steps=result.num_steps,
        num_evals=problem.num_evals,
        seconds=clock() - start,
        backward=forward.report,
        trace=None if result.trace is None else result.trace.relative,
        warm_started=warm_started,
        problem=problem,
        solved=_solved(forward, result),
    )


def _solved(forward: Forward, result: LoopResult) -> Solved | None:
    """By what f can be recognised later; nothing that holds tensors of a transform."""
    if torch.compiler.is_compiling() or is_transformed():
        return None
    problem, (z, fz) = forward.problem, result.iterate
    # Without a step that is z0, which is the user's to write to.
    z = z.clone() if z is problem.z0 else z
    replay = forward.notes.get("replay") or Replay(None, fz, problem.rounding)
    return Solved(z.detach(), replay, forward.notes.get("tape"))


def _check_finite(problem: Problem, settings: SolveSettings, name: str) -> None:
    """Raise StateError for a state that no solve can start at.

    Not where looking at numbers is impossible (compiled code, transforms) or not wanted (a solve
    of fixed steps, which never waits for the device), nor under on_failure="ignore", which leaves
    it at the status of the sample.
    """
    if torch.compiler.is_compiling() or is_transformed() or not settings.termination.needs_sync:
        return
    if settings.on_failure == "ignore" or bool((finite := problem.z0.isfinite().all(1)).all()):
        return
    first = int((~finite).nonzero()[0])
    raise StateError(
        f"{name} holds NaN or infinity in {int((~finite).sum())} of {len(finite)} samples, the "
        f"first of them sample {first}; start from finite numbers, such as zeros or "
        'torch.nan_to_num(z0), or give on_failure="ignore" to solve the other samples'
    )


def _check_select(select: object, batch_dims: int, segments: Tensor | None) -> None:
    """Raise UserError for a problem whose samples cannot be told apart by an index."""
    if not callable(select):
        raise UserError(
            f"select is a {type(select).__name__}, expected a function of indices (b,) that "
            "returns the f of these samples"
        )
    if not batch_dims or segments is not None:
        other = "segments" if segments is not None else "batch_dims=0"
        raise UserError(
            f"select takes samples out of a batch, and under {other} the rows of the state are no "
            "samples; leave out select"
        )


def _warm_starts(
    settings: SolveSettings,
    problem: Problem,
    memory: WarmStartMemory | None,
    index: SampleIndex | None,
) -> tuple[Start | None, Start | None]:
    """Those of the forward and of the backward solve."""
    warm = backward = None
    if settings.warm_start is not None:
        warm = Start.of("forward", settings.warm_start, memory, problem.layout, problem.z0, index)
    wanted = settings.adjoint.backward_warm_start if torch.is_grad_enabled() else None
    if wanted is not None:
        backward = Start.of("backward", wanted, memory, problem.layout, problem.z0, index)
    return warm, backward


def _is_traceable(settings: SolveSettings) -> bool:
    """Whether torch.compile can make one graph of the solve, because nothing asks for numbers."""
    # what is exported keeps no autograd.Function: gradients would be lost without a word
    differentiable = settings.adjoint.traceable and not _is_exporting()
    return (
        (differentiable or not torch.is_grad_enabled())
        and not settings.termination.needs_sync
        and settings.solver.single_evaluation  # others look at numbers between evaluations
        and settings.on_failure != "raise"
        and not (settings.warm_start is not None and settings.warm_start.needs_memory)
    )


def _is_exporting() -> bool:
    known_since_2_7 = getattr(torch.compiler, "is_exporting", None)
    if known_since_2_7 is not None:
        return known_since_2_7()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def _solve_with_numbers(*arguments: Any, **settings: Any) -> Solution:
    """`solve_with` between two graphs, by PyTorch as it is.

    Raises:
        UserError: torch.export, which knows one graph only, got here.
    """
    if torch.compiler.is_compiling():
        raise UserError(_NOT_EXPORTED)
    return solve_with(*arguments, **settings)


_NOT_EXPORTED = (
    "torch.export needs a solve that asks for no numbers; under torch.no_grad(), give "
    "termination=FixedSteps(...), solver=Anderson(), Broyden() or Picard(), and on_failure='warn' "
    "or 'ignore', and no warm start that remembers (for a DEQ in eval mode: eval_termination, "
    "eval_solver and eval_warm_start)"
)


def _waypoints(states: States, max_steps: int) -> Callable[[], Waypoints] | None:
    """Makes what keeps the states wanted besides the final one, for every run of the solve."""
    if states is None:
        return None
    if isinstance(states, str) and states == "all":
        return partial(AtSteps, range(1, max_steps + 1))
    given: Any = as_integer(states)
    if isinstance(given, int):
        check_positive_integer("states", given)
        return partial(EvenlySpaced, given)
    are_steps = isinstance(given, Iterable) and not isinstance(given, str)
    steps: list[Any] = [as_integer(step) for step in given] if are_steps else [None]
    if not all(isinstance(step, int) for step in steps):
        raise UserError(
            f"states={states!r} is no choice; give 'all', a number of evenly spaced states, or "
            "the steps whose states you want"
        )
    if any(not 1 <= step <= max_steps for step in steps):
        raise UserError(
            f"states={states!r} asks for steps outside 1 to max_steps={max_steps}; there are none"
        )
    return partial(AtSteps, set(steps))


def _check_steps_remain(warm: WarmStart, termination: Termination, adjoint: Adjoint) -> None:
    """Refuse a gradient through steps that nobody has to make any more."""
    if warm.recalls and adjoint.through_steps and termination.needs_sync:
        name = type(adjoint).__name__
        raise UserError(
            f"{name} differentiates the steps of the solver, and {warm!r} leaves few or none to "
            "differentiate, so most of the gradient would be missing; use adjoint=Implicit(), or "
            "termination=FixedSteps(k) for a gradient through the last k steps"
        )


def check_kind(name: str, given: object, expected: type, example: str) -> None:
    """Raise UserError for an argument that is no instance of what was expected."""
    if not isinstance(given, expected):
        hint = " (an instance, not the class)" if isinstance(given, type) else ""
        raise UserError(
            f"{name}={given!r} is no {expected.__name__}{hint}; give for example {name}={example}"
        )
