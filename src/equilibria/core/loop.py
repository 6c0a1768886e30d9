"""The one loop: every solve, forward or backward, of every solver, runs through `iterate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor

from equilibria.core.autocast import without_autocast
from equilibria.core.errors import UserError, nearest
from equilibria.core.fused import bookkeeping
from equilibria.core.iterate import Iterate, Measurement, choose_rows
from equilibria.core.ledger import BlindLedger, Keep, Ledger
from equilibria.core.problem import Problem
from equilibria.core.solver import Solver
from equilibria.core.status import RUNNING, Status
from equilibria.core.termination import Termination
from equilibria.core.waypoints import AtSteps, Waypoints


@dataclass(frozen=True)
class LoopResult:
    """What a solve ended with; all tensors lead with the batch dimension.

    Args:
        iterate: the accepted point of each sample with its image, packed (B, D).
        measurement: norms of exactly that iterate.
        status: `Status` codes (B,) int8.
        num_steps: steps until each sample finished (B,) int64.
        trace: measurement after every step, norms (num_steps + 1, B), the residual NaN once a
            sample is finished; None unless asked for.
        solver_state: what the solver remembered.
        states: the points on the way that were asked for, packed (B, D) each; without the last
            one, for which the iterate stands.
    """

    iterate: Iterate
    measurement: Measurement
    status: Tensor
    num_steps: Tensor
    trace: Measurement | None
    solver_state: Any
    states: list[Tensor] = field(default_factory=list)


def iterate(
    problem: Problem,
    solver: Solver,
    termination: Termination,
    *,
    max_steps: int,
    keep: Keep = "best",
    trace: bool = False,
    waypoints: Waypoints | None = None,
) -> LoopResult:
    """Step until every sample has finished or `max_steps` steps are made.

    Costs one evaluation for the initial point and those of the solver's steps. A sample that
    finishes is frozen: its result no longer changes and `f` sees the same point from then on, or
    no longer sees it at all where the problem says how to leave samples out (`Problem.select`).
    A sample that meets the tolerance returns that iterate; one that does not returns its best
    (lowest residual) or its last finite iterate, by `keep`.

    Gradients are recorded when grad mode is on, except for measurements and for the evaluation
    after the last step, which serves the report only.

    Under a termination that does not look at numbers (`needs_sync` is False) the loop does not
    either: nothing waits for the device, and torch.compile and torch.export see one graph. All
    samples return their last iterate, those that are not finite their initial one.
    """
    check_limits(max_steps, keep)
    with without_autocast(problem.z0.device):
        return _iterate(problem, solver, termination, max_steps, keep, trace, waypoints)


def _iterate(
    problem: Problem,
    solver: Solver,
    termination: Termination,
    max_steps: int,
    keep: Keep,
    trace: bool,
    waypoints: Waypoints | None,
) -> LoopResult:
    taping = torch.is_grad_enabled()
    current = problem.evaluate(problem.z0)
    fused = bookkeeping(current.z, solver.prefers_fused) if termination.needs_sync else None
    measured = problem.measure(current, fused)
    looks = termination.needs_sync
    if looks:
        measured = problem.measured_wide(current, measured) or measured
    ledger: Ledger | BlindLedger = BlindLedger(current)
    if termination.needs_sync:
        ledger = Ledger(current, measured, keep, fused)
    may_part = problem.select is not None and solver.separable and not (taping or trace)
    may_part = may_part and waypoints is None
    waypoints = waypoints or AtSteps()
    termination_state = termination.init(measured)
    solver_state = solver.init(current, max_steps)
    measurements: list[Measurement] = []
    posed = problem  # to the samples that are still solved

    step = 0
    for step in range(max_steps + 1):
        before = termination_state
        codes, termination_state = termination.check(measured, step, before)
        wide = posed.measured_wide(current, measured) if looks and codes is not None else None
        if wide is not None:
            measured = wide
            codes, termination_state = termination.check(measured, step, before)
        if step == max_steps:
            codes = _closed(codes, measured)
        if trace:
            measurements.append(ledger.shown(measured))
        if ledger.enter(current, measured, codes, step):
            break
        if may_part and isinstance(ledger, Ledger):
            rows = ledger.rows_going_on
            if rows is not None and _parting_pays(len(rows), current.z.shape[0]):
                ledger.part_with_finished(rows)
                is_first = posed is problem
                posed = problem.restricted(ledger.origin, posed.num_evals)
                current = Iterate(*(tensor[rows] for tensor in current))
                if is_first:
                    posed.check_part(current)
                termination_state = termination.select(termination_state, rows)
                solver_state = solver.select(solver_state, rows)

        # The image of the last point serves the report only; a solver with evaluations on the
        # way to that point needs those recorded.
        unrecorded = step + 1 == max_steps and solver.single_evaluation
        evaluate = _Evaluator(posed, ledger.frozen, taping and not unrecorded, fused)
        current, solver_state = solver.step(evaluate, current, solver_state)
        measured = posed.measure(current, fused)
        waypoints.enter(step + 1, current.z)

    ledger.close()
    problem.num_evals = posed.num_evals
    return LoopResult(
        iterate=ledger.kept,
        measurement=ledger.measurement,
        status=ledger.status,
        num_steps=ledger.num_steps,
        trace=_stacked(measurements) if trace else None,
        solver_state=solver_state,
        states=waypoints.chosen(step),
    )


FINISHED_SHARE = 1 / 8
"""Share of a batch that has to have finished before the others go on without it.

To part copies the history once, about the traffic of one step. docs/performance.md has what other
shares cost.
"""


def _parting_pays(going_on: int, batch: int) -> bool:
    return batch - going_on >= FINISHED_SHARE * batch


def _closed(codes: Tensor | None, measured: Measurement) -> Tensor:
    """The codes after the last step: nobody goes on."""
    if codes is None:
        return torch.full_like(measured.residual, Status.MAX_STEPS, dtype=torch.int8)
    return torch.where(codes == RUNNING, Status.MAX_STEPS, codes)


class _Evaluator:
    """What a solver sees of the problem during one step; implements `Evaluate`."""

    def __init__(
        self,
        problem: Problem,
        frozen: tuple[Tensor, Tensor] | None,
        record: bool,
        fused: ModuleType | None,
    ) -> None:
        self.problem = problem
        self.frozen = frozen
        self.record = record
        self.fused = fused

    def __call__(self, z: Tensor) -> Iterate:
        return self.problem.evaluate(self._hold(z), record=self.record)

    def recorded(self, z: Tensor) -> Iterate:
        with torch.enable_grad():
            return self.problem.evaluate(self._hold(z))

    def _hold(self, z: Tensor) -> Tensor:
        """Finished samples stay where they are."""
        if self.frozen is None:
            return z
        return choose_rows(self.frozen[0], z, self.frozen[1], self.fused)


def _stacked(measurements: list[Measurement]) -> Measurement:
    return Measurement(*(torch.stack(norms) for norms in zip(*measurements, strict=True)))


def check_limits(max_steps: int, keep: str) -> None:
    """Raise UserError for a step limit below 1 or an unknown `keep`."""
    if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"max_steps={max_steps!r} allows no step; give an integer of at least 1")
    if keep not in get_args(Keep):
        raise UserError(
            f"keep={keep!r} is not one of {', '.join(map(repr, get_args(Keep)))}"
            f"{nearest(str(keep), get_args(Keep))}"
        )
