"""Any fixed-point solver as a solver of the linear backward system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.core.iterate import Measurement, rms
from equilibria.core.linear import LinearResult, LinearSolver, start_from
from equilibria.core.loop import iterate
from equilibria.core.problem import Problem
from equilibria.core.solver import Solver
from equilibria.core.status import RUNNING, Status
from equilibria.core.termination import Termination


@dataclass(frozen=True)
class FixedPoint(LinearSolver):
    """Solve u = a(u) + b by running a fixed-point solver on the map u -> a(u) + b.

    Starts from u = b, the one-step gradient, unless a guess is of use, and keeps the best iterate
    of each sample. Anderson on this affine map is closely related to GMRES, Picard is the Neumann
    series.

    Args:
        solver: any fixed-point solver.
    """

    solver: Solver

    def solve(
        self,
        a: Callable[[Tensor], Tensor],
        b: Tensor,
        *,
        rtol: float | Tensor,
        atol: float | Tensor,
        max_steps: int,
        guess: Tensor | None = None,
        trace: bool = False,
    ) -> LinearResult:
        """See `LinearSolver.solve`."""
        start = b
        if guess is not None:
            u, _ = start_from(a, b, guess)
            start = torch.where((u != 0).any(1, keepdim=True), u, b)
        problem = Problem(lambda u: a(u) + b, start)
        reference = rms(b)
        result = iterate(
            problem,
            self.solver,
            _RelativeTo(reference, rtol, atol),
            max_steps=max_steps,
            trace=trace,
        )
        scale = reference.clamp_min(torch.finfo(reference.dtype).tiny)
        return LinearResult(
            u=result.iterate.z,
            residual=result.measurement.residual,
            relative_residual=result.measurement.residual / scale,
            status=result.status,
            num_steps=result.num_steps,
            num_evals=problem.num_evals + (guess is not None),
            trace=None if result.trace is None else result.trace.residual / scale,
        )


@dataclass(frozen=True)
class _RelativeTo(Termination):
    """Accept when rms(residual) <= atol + rtol * reference, a fixed norm (B,) per sample."""

    reference: Tensor
    rtol: float | Tensor
    atol: float | Tensor

    def init(self, measurement: Measurement) -> None:
        """Nothing to remember."""

    def check(self, measurement: Measurement, step: int, state: None) -> tuple[Tensor, None]:
        """SUCCESS where the criterion holds."""
        tolerance = self.atol + self.rtol * self.reference
        resolved = torch.finfo(tolerance.dtype).eps * measurement.image <= tolerance
        accepted = resolved & (measurement.residual <= tolerance)
        return torch.where(accepted, Status.SUCCESS, RUNNING).to(torch.int8), None
