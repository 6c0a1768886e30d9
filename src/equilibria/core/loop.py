"""The one loop: every solve, forward or backward, of every solver, runs through `iterate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from equilibria.core.autocast import without_autocast
from equilibria.core.errors import UserError, nearest
from equilibria.core.fused import bookkeeping
from equilibria.core.iterate import Iterate, Measurement, choose
from equilibria.core.problem import Problem
from equilibria.core.solver import Solver
from equilibria.core.status import RUNNING, Status
from equilibria.core.termination import Termination
from equilibria.core.waypoints import AtSteps, Waypoints

Keep = Literal["best", "last"]


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
    finishes is frozen: its result no longer changes and `f` sees the same point from then on.
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
        return _iterate(
            problem, solver, termination, max_steps, keep, trace, waypoints or AtSteps()
        )


def _iterate(
    problem: Problem,
    solver: Solver,
    termination: Termination,
    max_steps: int,
    keep: Keep,
    trace: bool,
    waypoints: Waypoints,
) -> LoopResult:
    taping = torch.is_grad_enabled()
    current = problem.evaluate(problem.z0)
    fused = bookkeeping(current.z, solver.prefers_fused) if termination.needs_sync else None
    measured = problem.measure(current, fused)
    ledger = _Ledger(current, measured, keep) if termination.needs_sync else _Blind(current)
    termination_state = termination.init(measured)
    solver_state = solver.init(current, max_steps)
    measurements: list[Measurement] = []

    step = 0
    for step in range(max_steps + 1):
        codes, termination_state = termination.check(measured, step, termination_state)
        if step == max_steps:
            codes = _closed(codes, measured)
        if trace:
            measurements.append(ledger.shown(measured))
        if ledger.enter(current, measured, codes, step):
            break

        # The image of the last point serves the report only; a solver with evaluations on the
        # way to that point needs those recorded.
        unrecorded = step + 1 == max_steps and solver.single_evaluation
        evaluate = _Evaluator(problem, ledger.frozen, record=taping and not unrecorded)
        current, solver_state = solver.step(evaluate, current, solver_state)
        measured = problem.measure(current, fused)
        waypoints.enter(step + 1, current.z)

    return LoopResult(
        iterate=ledger.kept,
        measurement=ledger.measurement,
        status=ledger.status,
        num_steps=ledger.num_steps,
        trace=_stacked(measurements) if trace else None,
        solver_state=solver_state,
        states=waypoints.chosen(step),
    )


class _Ledger:
    """What is known of every sample: its best iterate, whether and how it finished."""

    def __init__(self, first: Iterate, measurement: Measurement, keep: Keep) -> None:
        batch, device = first.z.shape[0], first.z.device
        self.kept = first
        self.measurement = measurement
        self.status = torch.full((batch,), RUNNING, dtype=torch.int8, device=device)
        self.num_steps = torch.zeros(batch, dtype=torch.int64, device=device)
        self.frozen: tuple[Tensor, Tensor] | None = None
        """Samples that go on (B, 1), and where the others stay; None while all go on."""
        self._keep = keep
        self._active: Tensor | None = None  # (B,); None while all go on

    def enter(
        self, current: Iterate, measured: Measurement, codes: Tensor | None, step: int
    ) -> bool:
        """Take note of an iterate; whether the solve is over."""
        if codes is None and self._active is None:
            if step > 0:
                self._take_all(current, measured)
            return False
        codes = torch.full_like(self.status, RUNNING) if codes is None else codes
        codes = torch.where(torch.isfinite(measured.residual), codes, Status.NONFINITE)
        active = self.status == RUNNING if self._active is None else self._active
        if step > 0:
            worth = self._better(current, measured)
            if self._keep == "best":
                # a runaway point is not worth keeping, however small rounding makes its residual
                worth = (worth & (codes != Status.DIVERGED)) | (codes == Status.SUCCESS)
            self._take(active & worth, current, measured)
        return self._finish(active & (codes != RUNNING), codes, step)

    def shown(self, measured: Measurement) -> Measurement:
        """A measurement for the trace: NaN for samples that have finished."""
        if self._active is None:
            return measured
        return Measurement(torch.where(self._active, measured.residual, torch.nan), measured.image)

    def _better(self, current: Iterate, measured: Measurement) -> Tensor:
        """Mask (B,) of the samples whose new iterate may replace the kept one."""
        if self._keep == "last":
            return torch.isfinite(measured.residual)
        return measured.residual < self.measurement.residual

    def _take_all(self, current: Iterate, measured: Measurement) -> None:
        """`_take` of all samples that are better, which usually is every one."""
        if self._keep == "best" and measured.all_improve_on(self.measurement):
            self.kept, self.measurement = current, measured
        else:
            self._take(self._better(current, measured), current, measured)

    def _take(self, rows: Tensor, current: Iterate, measured: Measurement) -> None:
        if bool(rows.all()):  # by reference: no copy while all improve
            self.kept, self.measurement = current, measured
        elif bool(rows.any()):
            self.kept = choose(rows, current, self.kept)
            self.measurement = Measurement(
                *(
                    torch.where(rows, new, old)
                    for new, old in zip(measured, self.measurement, strict=True)
                )
            )

    def _finish(self, finished: Tensor, codes: Tensor, step: int) -> bool:
        if bool(finished.any()):
            self.status = torch.where(finished, codes, self.status)
            self.num_steps = torch.where(finished, step, self.num_steps)
            self._active = self.status == RUNNING
            if not bool(self._active.any()):
                return True
        elif not self.status.shape[0]:
            return True  # an empty batch
        if self._active is not None:
            self.frozen = self._active.unsqueeze(-1), self.kept.z
        return False


class _Blind:
    """The ledger of a solve that decides nothing by numbers, so that nothing has to wait."""

    frozen = None

    def __init__(self, first: Iterate) -> None:
        self._first = first
        self.kept = first

    def enter(
        self, current: Iterate, measured: Measurement, codes: Tensor | None, step: int
    ) -> bool:
        """Take note of an iterate; whether the solve is over."""
        self.kept, self.measurement = current, measured
        if codes is None:
            return False
        finite = torch.isfinite(measured.residual)
        self.status = torch.where(finite, codes, Status.NONFINITE)
        self.num_steps = torch.full_like(codes, step, dtype=torch.int64)
        self.kept = choose(finite, current, self._first)
        return True

    def shown(self, measured: Measurement) -> Measurement:
        """A measurement for the trace."""
        return measured


def _closed(codes: Tensor | None, measured: Measurement) -> Tensor:
    """The codes after the last step: nobody goes on."""
    if codes is None:
        return torch.full_like(measured.residual, Status.MAX_STEPS, dtype=torch.int8)
    return torch.where(codes == RUNNING, Status.MAX_STEPS, codes)


@dataclass(frozen=True)
class _Evaluator:
    """What a solver sees of the problem during one step; implements `Evaluate`."""

    problem: Problem
    frozen: tuple[Tensor, Tensor] | None
    record: bool

    def __call__(self, z: Tensor) -> Iterate:
        return self.problem.evaluate(self._hold(z), record=self.record)

    def recorded(self, z: Tensor) -> Iterate:
        with torch.enable_grad():
            return self.problem.evaluate(self._hold(z))

    def _hold(self, z: Tensor) -> Tensor:
        """Finished samples stay where they are."""
        return z if self.frozen is None else torch.where(self.frozen[0], z, self.frozen[1])


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
