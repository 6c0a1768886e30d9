"""BiCGStab, every sample of the batch on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.core.iterate import rms
from equilibria.core.linear import LinearResult, LinearSolver, gained_nothing, start_from
from equilibria.core.status import RUNNING, Status


@dataclass(frozen=True)
class BiCGStab(LinearSolver):
    """Stabilised bi-conjugate gradients on (I - A) u = b.

    Short recurrences: seven state copies of memory whatever the number of steps, where GMRES
    keeps all its vectors. Costs two products per step and converges less smoothly, so use it when
    the memory of GMRES is the problem. The residual is not monotone; the best point of each
    sample is returned.

    References:
        van der Vorst, Bi-CGSTAB, SIAM J. Sci. Stat. Comput. 13 (1992).
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
        """See `LinearSolver.solve`; `max_steps` counts products, so half as many iterations."""
        u, r = (torch.zeros_like(b), b) if guess is None else start_from(a, b, guess)
        num_evals = 0 if guess is None else 1
        book = _Book(b, atol + rtol * rms(b))
        book.enter(u, r, 0)
        shadow, p = r, r
        rho = _dot(shadow, r)
        fresh = torch.ones_like(rho, dtype=torch.bool)  # p is r, as at the start
        for step in range(2, max_steps + 1, 2):
            if not bool(book.running.any()):
                break
            v = p - a(p)
            alpha = _ratio(rho, _dot(shadow, v))
            s = r - alpha * v
            t = s - a(s)
            num_evals += 2
            omega = _ratio(_dot(t, s), _dot(t, t))
            active = book.running.unsqueeze(1)
            u = torch.where(active, u + alpha * p + omega * s, u)
            r = torch.where(active, s - omega * t, r)
            previous, rho = rho, _dot(shadow, r)
            beta = _ratio(rho, previous) * _ratio(alpha, omega)
            p = torch.where(active, r + beta * (p - omega * v), p)
            moved = (alpha != 0) | (omega != 0)
            book.enter(u, r, step, stuck=(fresh & ~moved).squeeze(1))
            fresh = ~moved
        # The recurrence drifts from the truth by rounding: report the residual of what is returned.
        true_norm = rms(a(book.best) + b - book.best)
        return book.result(true_norm, num_evals + 1, trace)


class _Book:
    """Best point, status and steps of every sample."""

    def __init__(self, b: Tensor, tolerance: Tensor) -> None:
        self._tolerance = tolerance
        self._b_norm = rms(b)
        self._scale = self._b_norm.clamp_min(torch.finfo(b.dtype).tiny)
        self.best = b  # the one-step gradient, should nothing finite be found
        self._norm = torch.full_like(tolerance, torch.inf)
        self._status = torch.full_like(tolerance, RUNNING, dtype=torch.int8)
        self._steps = torch.zeros_like(tolerance, dtype=torch.int64)
        self._last = 0
        self._trace: list[Tensor] = []

    @property
    def running(self) -> Tensor:
        """Mask (B,) of the samples that are not done."""
        return self._status == RUNNING

    def enter(self, u: Tensor, r: Tensor, step: int, stuck: Tensor | None = None) -> None:
        """Take in the point of a step, and judge it; `stuck` (B,): the next would be the same."""
        norm, running = rms(r), self.running
        self._trace.append(torch.where(running, norm / self._scale, torch.nan))
        # What is no better than zero is no candidate: it would pass for a gradient of zero.
        candidate = running & ~gained_nothing(norm, self._b_norm)
        better = candidate & (norm < self._norm)
        self.best = torch.where(better.unsqueeze(1), u, self.best)
        self._norm = torch.where(better, norm, self._norm)
        codes = torch.where(candidate & (norm <= self._tolerance), Status.SUCCESS, RUNNING)
        if stuck is not None:
            codes = torch.where(stuck & (codes == RUNNING), Status.STALLED, codes)
        codes = torch.where(torch.isfinite(norm), codes, Status.NONFINITE).to(torch.int8)
        done = running & (codes != RUNNING)
        self._status = torch.where(done, codes, self._status)
        self._last = step
        self._steps = torch.where(done, step, self._steps)

    def result(self, norm: Tensor, num_evals: int, trace: bool) -> LinearResult:
        """Close the books by the true residual of the returned point."""
        status, running = self._status, self.running
        status = torch.where(running, Status.MAX_STEPS, status)
        limit = torch.finfo(norm.dtype).eps * rms(self.best)
        # 10: the recurrence may be slightly optimistic at the very tolerance
        unreached = (norm > 10.0 * self._tolerance) | (limit > self._tolerance)
        status = torch.where((status == Status.SUCCESS) & unreached, Status.STALLED, status)
        # The residual of b, where nothing better was found, is known only now.
        lucky = (self._norm == torch.inf) & (norm <= self._tolerance)
        status = torch.where(lucky & (status != Status.NONFINITE), Status.SUCCESS, status)
        return LinearResult(
            u=self.best,
            residual=norm,
            relative_residual=norm / self._scale,
            status=status,
            num_steps=torch.where(running, self._last, self._steps),
            num_evals=num_evals,
            trace=torch.stack(self._trace) if trace else None,
        )


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=1, keepdim=True)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where the method breaks down or a sample is solved exactly."""
    nonzero = denominator != 0
    return torch.where(nonzero, numerator / torch.where(nonzero, denominator, 1.0), 0.0)
