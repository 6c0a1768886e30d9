"""A ladder of solvers: a sample that gets stuck with one goes on with the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.core.iterate import Iterate, choose, rms
from equilibria.core.parameters import check_not_negative, check_positive_integer
from equilibria.core.problem import Evaluate
from equilibria.core.solver import Solver


@dataclass(frozen=True, init=False)
class Fallback(Solver):
    """Try several solvers in turn, each sample on its own.

    `Fallback(Anderson(), Picard(relaxation=0.5), Broyden())` starts every sample with Anderson. A
    sample moves on to the next solver, from its best iterate and without history, when

        its best residual has not fallen to `factor` times itself within `num_steps` steps,
        its residual exceeds `growth` times its best, or
        f is not finite at the point that the solver chose.

    The last solver keeps what it gets. Samples that need no help are stepped exactly as without
    the ladder. Where a rule such as Stagnation stops samples as well, give it more steps than
    this has, or it fires first.

    Cost per step: one evaluation, also while samples are with different solvers, as long as these
    choose a point and evaluate it once (Picard, Anderson, Broyden without line search). A solver
    that evaluates more has its steps evaluated separately. 2 state copies of memory for the best
    iterate besides those of the solvers in use, and one wait for the device.

    Args:
        solvers: two or more, in order.
        num_steps: patience, counted per sample.
        factor: improvement asked for within `num_steps` steps.
        growth: how much worse than its best a sample may get. 1000 leaves room for detours.

    Raises:
        UserError: fewer than two solvers, something that is no solver, num_steps below 1, factor
            not in (0, 1], growth below 1.
    """

    solvers: tuple[Solver, ...]
    num_steps: int
    factor: float
    growth: float

    def __init__(
        self, *solvers: Solver, num_steps: int = 10, factor: float = 0.9, growth: float = 1e3
    ) -> None:
        if len(solvers) < 2:
            raise UserError(
                f"Fallback got {len(solvers)} solvers and needs at least 2, for example "
                "Fallback(Anderson(), Broyden())"
            )
        for solver in solvers:
            _check_solver(solver)
        check_positive_integer("num_steps", num_steps)
        if not 0.0 < factor <= 1.0:
            raise UserError(f"factor={factor} of Fallback must lie above 0 and be at most 1")
        check_not_negative("growth", growth)
        if growth < 1.0:
            raise UserError(f"growth={growth} of Fallback must be at least 1")
        for name, value in {
            "solvers": solvers,
            "num_steps": num_steps,
            "factor": factor,
            "growth": growth,
        }.items():
            object.__setattr__(self, name, value)

    @property
    def recordable(self) -> bool:
        """As far as all of its solvers are."""
        return all(solver.recordable for solver in self.solvers)

    def init(self, iterate: Iterate, max_steps: int) -> _Ladder:
        """Start everybody with the first solver."""
        return _Ladder(self, iterate, max_steps)

    def step(self, evaluate: Evaluate, iterate: Iterate, state: _Ladder) -> tuple[Iterate, _Ladder]:
        """Step every sample with its own solver, then move on those that are stuck."""
        return state.move_on(iterate, state.advance(evaluate, iterate)), state


def _check_solver(solver: object) -> None:
    if not isinstance(solver, Solver):
        hint = " (an instance, not the class)" if isinstance(solver, type) else ""
        raise UserError(
            f"Fallback got {solver!r}, which is no Solver{hint}; give for example "
            "Fallback(Anderson(), Broyden())"
        )


@runtime_checkable
class _Proposer(Protocol):
    """A solver whose step may be `evaluate(propose(...))`."""

    @property
    def single_evaluation(self) -> bool: ...

    def propose(self, iterate: Iterate, state: Any) -> tuple[Tensor, Any]: ...


class _Party:
    """Samples that began with the same solver at the same step, and that solver's memory.

    Of the first party nobody is picked out (`rows` is None), so that a ladder that is never
    needed costs no indexing.
    """

    def __init__(self, solver: Solver, iterate: Iterate, rows: Tensor | None, left: int) -> None:
        self._rows = rows
        self._solver = solver
        self._proposer = (
            solver if isinstance(solver, _Proposer) and solver.single_evaluation else None
        )
        self._state = solver.init(_pick(iterate, self._rows), left)

    @property
    def proposes(self) -> bool:
        """Whether its samples can share an evaluation with others."""
        return self._proposer is not None

    def propose(self, iterate: Iterate, points: Tensor) -> Tensor:
        """Write the points that its samples want evaluated into `points` (B, D)."""
        if self._proposer is None:
            raise RuntimeError("this solver has no point to propose")
        z, self._state = self._proposer.propose(_pick(iterate, self._rows), self._state)
        return _put(z, points, self._rows)

    def step(self, evaluate: Evaluate, iterate: Iterate, result: Iterate) -> Iterate:
        """Step its samples with evaluations of their own; the others stay at `result`."""
        part, self._state = self._solver.step(
            _EvaluatePart(evaluate, self._rows, result.z), _pick(iterate, self._rows), self._state
        )
        return Iterate(_put(part.z, result.z, self._rows), _put(part.fz, result.fz, self._rows))


@dataclass(frozen=True)
class _EvaluatePart:
    """Evaluations for the samples of one party, among others that stay at `others`."""

    evaluate: Evaluate
    rows: Tensor | None
    others: Tensor

    def __call__(self, z: Tensor) -> Iterate:
        return _pick(self.evaluate(_put(z, self.others, self.rows)), self.rows)

    def recorded(self, z: Tensor) -> Iterate:
        return _pick(self.evaluate.recorded(_put(z, self.others, self.rows)), self.rows)


def _pick(iterate: Iterate, rows: Tensor | None) -> Iterate:
    return iterate if rows is None else Iterate(iterate.z[rows], iterate.fz[rows])


def _put(part: Tensor, whole: Tensor, rows: Tensor | None) -> Tensor:
    return part if rows is None else whole.index_copy(0, rows, part)


class _Ladder:
    """Where every sample stands: its solver, its best iterate, and its progress."""

    def __init__(self, settings: Fallback, iterate: Iterate, max_steps: int) -> None:
        self._settings = settings
        self._steps_left = max_steps
        self._parties = [_Party(settings.solvers[0], iterate, None, max_steps)]
        self._best = iterate
        self._best_norm = rms((iterate.fz - iterate.z).detach())
        self._mark = self._best_norm
        self._waited = torch.zeros_like(self._mark, dtype=torch.int64)
        self._level = torch.zeros_like(self._waited)
        self._party = torch.zeros_like(self._waited)
        self._moving = torch.ones_like(self._waited, dtype=torch.bool)

    def advance(self, evaluate: Evaluate, iterate: Iterate) -> Iterate:
        """One step of every party; a younger party has the say over its samples."""
        points, asked = iterate.z, False
        for party in self._parties:
            if party.proposes:
                points, asked = party.propose(iterate, points), True
        result = evaluate(points) if asked else iterate
        for number, party in enumerate(self._parties):
            if not party.proposes and bool(((self._party == number) & self._moving).any()):
                stepped = party.step(evaluate, iterate, result)
                result = choose(self._party == number, stepped, result)
        # Who was asked to move and did not is finished, and is held in place by `evaluate`.
        held = (result.z == iterate.z).all(1)
        wanted = (points != iterate.z).any(1) if asked else torch.zeros_like(held)
        self._moving = ~(held & wanted)
        return result

    def move_on(self, iterate: Iterate, result: Iterate) -> Iterate:
        """Take note of progress; samples that are stuck return to their best iterate."""
        self._steps_left -= 1
        norm = rms((result.fz - result.z).detach())
        improved = norm < self._best_norm
        self._best = choose(improved, result, self._best)
        self._best_norm = torch.where(improved, norm, self._best_norm)
        progress = self._best_norm <= self._settings.factor * self._mark
        self._mark = torch.where(progress, self._best_norm, self._mark)
        self._waited = torch.where(progress, 0, self._waited + 1)
        stuck = (self._waited >= self._settings.num_steps) | ~torch.isfinite(norm)
        stuck = stuck | (norm > self._settings.growth * self._best_norm)
        stuck = stuck & self._moving & (self._level < len(self._settings.solvers) - 1)
        if self._steps_left < 1 or not bool(stuck.any()):
            return result
        self._level = torch.where(stuck, self._level + 1, self._level)
        self._mark = torch.where(stuck, self._best_norm, self._mark)
        self._waited = torch.where(stuck, 0, self._waited)
        self._regroup(stuck)
        return choose(stuck, self._best, result)

    def _regroup(self, stuck: Tensor) -> None:
        """Form one new party for every solver that gets new samples; drop empty ones."""
        for level in self._level[stuck].unique().tolist():
            rows = (stuck & (self._level == level)).nonzero().squeeze(1)
            solver = self._settings.solvers[level]
            self._party = self._party.index_fill(0, rows, len(self._parties))
            self._parties.append(_Party(solver, self._best, rows, self._steps_left))
        in_use, self._party = self._party.unique(return_inverse=True)
        self._parties = [self._parties[number] for number in in_use.tolist()]
