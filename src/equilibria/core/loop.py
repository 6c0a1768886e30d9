"""The one loop: every solve, forward or backward, of every solver, runs through `iterate`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from equilibria.core.errors import UserError, nearest
from equilibria.core.iterate import Iterate, Measurement, choose
from equilibria.core.problem import Problem
from equilibria.core.solver import Solver
from equilibria.core.status import RUNNING, Status
from equilibria.core.termination import Termination

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
        states: the points at the steps asked for, packed (B, D) each.
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
    record: Collection[int] = (),
) -> LoopResult:
    """Step until every sample has finished or `max_steps` steps are made.

    Costs one evaluation for the initial point and those of the solver's steps. A sample that
    finishes is frozen: its result no longer changes and `f` sees the same point from then on.
    A sample that meets the tolerance returns that iterate; one that does not returns its best
    (lowest residual) or its last finite iterate, by `keep`.

    Gradients are recorded when grad mode is on, except for measurements and for the evaluation
    after the last step, which serves the report only.
    """
    check_limits(max_steps, keep)
    taping = torch.is_grad_enabled()
    current = problem.evaluate(problem.z0)
    measured = problem.measure(current)
    batch = measured.residual.shape[0]
    kept, kept_measured = current, measured
    status = torch.full((batch,), RUNNING, dtype=torch.int8, device=problem.z0.device)
    num_steps = torch.zeros(batch, dtype=torch.int64, device=problem.z0.device)
    active = status == RUNNING
    num_active = batch
    termination_state = termination.init(measured)
    solver_state = solver.init(current, max_steps)
    measurements: list[Measurement] = []
    states: dict[int, Tensor] = {}

    step = 0
    for step in range(max_steps + 1):
        codes, termination_state = termination.check(measured, step, termination_state)
        codes = torch.where(torch.isfinite(measured.residual), codes, Status.NONFINITE)
        if step == max_steps:
            codes = torch.where(codes == RUNNING, Status.MAX_STEPS, codes)
        if trace:
            shown = torch.where(active, measured.residual, torch.nan)
            measurements.append(Measurement(shown, measured.image))

        update = active & _worth_keeping(measured, kept_measured, codes, keep)
        if step > 0:
            if bool(update.all()):
                kept, kept_measured = current, measured  # by reference: no copy while improving
            elif bool(update.any()):
                kept = choose(update, current, kept)
                kept_measured = Measurement(
                    *(
                        torch.where(update, a, b)
                        for a, b in zip(measured, kept_measured, strict=True)
                    )
                )

        finished = active & (codes != RUNNING)
        if bool(finished.any()):
            status = torch.where(finished, codes, status)
            num_steps = torch.where(finished, step, num_steps)
            active = status == RUNNING
            num_active = int(active.sum())
        if num_active == 0:
            break

        frozen = None if num_active == batch else (active.unsqueeze(-1), kept.z)

        # The image of the last point serves the report only; a solver with evaluations on the
        # way to that point needs those recorded.
        unrecorded = step + 1 == max_steps and solver.single_evaluation
        evaluate = _Evaluator(problem, frozen, record=taping and not unrecorded)
        current, solver_state = solver.step(evaluate, current, solver_state)
        measured = problem.measure(current)
        if step + 1 in record:
            states[step + 1] = current.z

    return LoopResult(
        iterate=kept,
        measurement=kept_measured,
        status=status,
        num_steps=num_steps,
        trace=_stacked(measurements) if trace else None,
        solver_state=solver_state,
        # the last step's own point is what the iterate stands for
        states=[z for made, z in states.items() if made < step],
    )


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


def _worth_keeping(new: Measurement, kept: Measurement, codes: Tensor, keep: Keep) -> Tensor:
    """Mask (B,) of the samples whose new iterate replaces the kept one."""
    if keep == "last":
        return torch.isfinite(new.residual)
    # a runaway point is not worth keeping, however small rounding makes its residual
    better = (new.residual < kept.residual) & (codes != Status.DIVERGED)
    return better | (codes == Status.SUCCESS)


def check_limits(max_steps: int, keep: str) -> None:
    """Raise UserError for a step limit below 1 or an unknown `keep`."""
    if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"max_steps={max_steps!r} allows no step; give an integer of at least 1")
    if keep not in get_args(Keep):
        raise UserError(
            f"keep={keep!r} is not one of {', '.join(map(repr, get_args(Keep)))}"
            f"{nearest(str(keep), get_args(Keep))}"
        )
