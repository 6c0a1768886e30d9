"""The Neumann series."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.core.iterate import rms
from equilibria.core.linear import LinearResult, LinearSolver, start_from
from equilibria.core.status import RUNNING, Status


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """Sum the series u = b + A b + A^2 b + ... until the next term is small.

    Converges only for a spectral radius below 1, by that factor per product, and needs more
    products than GMRES then. Here as the plainest reference, and for its memory: no history.

    References:
        Lorraine, Vicol and Duvenaud, Optimizing millions of hyperparameters by implicit
        differentiation, arXiv 1911.02590, section 4.
    """

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
        """See `LinearSolver.solve`. The next term of the series is the residual."""
        u, term = (torch.zeros_like(b), b) if guess is None else start_from(a, b, guess)
        u, term = u + term, a(term)  # without a guess b + A b, the series itself
        reference = rms(b)
        tolerance = atol + rtol * reference
        status = torch.full_like(reference, RUNNING, dtype=torch.int8)
        num_steps = torch.zeros_like(reference, dtype=torch.int64)
        residual = torch.full_like(reference, torch.inf)
        best = u  # a divergent series returns its best partial sum, not its last
        scale = reference.clamp_min(torch.finfo(reference.dtype).tiny)
        residuals: list[Tensor] = []
        for step in range(max_steps + 1):
            norm, running = rms(term), status == RUNNING
            residuals.append(torch.where(running, norm / scale, torch.nan))
            better = running & (norm < residual)
            residual = torch.where(better, norm, residual)
            best = torch.where(better.unsqueeze(1), u, best)
            resolved = torch.finfo(b.dtype).eps * rms(u) <= tolerance
            codes = torch.where(resolved & (norm <= tolerance), Status.SUCCESS, RUNNING)
            codes = torch.where(torch.isfinite(norm), codes, Status.NONFINITE)
            if step == max_steps:
                codes = torch.where(codes == RUNNING, Status.MAX_STEPS, codes)
            done = running & (codes != RUNNING)
            status = torch.where(done, codes.to(torch.int8), status)
            num_steps = torch.where(done, step, num_steps)
            active = (status == RUNNING).unsqueeze(1)
            if not bool(active.any()):
                break
            u = torch.where(active, u + term, u)
            term = a(term)
        return LinearResult(
            u=best,
            residual=residual,
            relative_residual=residual / scale,
            status=status,
            num_steps=num_steps,
            num_evals=len(residuals) + (guess is not None),
            trace=torch.stack(residuals) if trace else None,
        )
