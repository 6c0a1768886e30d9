"""Restarted GMRES, every sample of the batch on its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from equilibria.core.fused import kernels
from equilibria.core.history import inner_products
from equilibria.core.iterate import rms
from equilibria.core.linear import (
    NUM_ROUNDINGS,
    LinearResult,
    LinearSolver,
    gained_nothing,
    start_from,
)
from equilibria.core.parameters import check_positive_integer
from equilibria.core.precision import widest
from equilibria.core.status import RUNNING, Status

Product = Callable[[Tensor], Tensor]

FIRST_VECTORS = 20
"""Room made at first; what easy backward systems take."""


@dataclass(frozen=True)
class GMRES(LinearSolver):
    """Minimise the residual of (I - A) u = b over a growing Krylov space.

        u_k = argmin { |b - (I - A) u| : u in span(b, A b, ..., A^(k-1) b) }

    Starts from zero and not from b: the first product then already buys the best multiple of b.
    No method that uses the same products has a smaller residual, so on the linear backward
    system it needs the fewest vector-Jacobian products; a spectral radius above 1 is no obstacle.
    Only for linear systems: forward, use Anderson or Broyden.

    Cost per step: one product; two passes over the k vectors built so far, which are also the
    memory, with room for up to twice as many. One more product per restart.

    Args:
        restart: vectors kept before starting over from the best point. Few backward systems need
            more than 40, and those that do take up to a third more products with 40 than with
            100. Lower it to bound the memory.
        fused: the step compiled into three passes over the vectors: None (default) where that is
            known to be faster, True or an error, False never. The same numbers up to rounding.

    Raises:
        UserError: restart below 1.

    References:
        Saad and Schultz, GMRES, SIAM J. Sci. Stat. Comput. 7 (1986).
    """

    restart: int = 100
    fused: bool | None = None

    def __post_init__(self) -> None:
        check_positive_integer("restart", self.restart)

    def solve(
        self,
        a: Product,
        b: Tensor,
        *,
        rtol: float | Tensor,
        atol: float | Tensor,
        max_steps: int,
        guess: Tensor | None = None,
        trace: bool = False,
    ) -> LinearResult:
        """See `LinearSolver.solve`."""
        run = _Run(a, b, rtol, atol, guess, trace, self.fused)
        while run.num_steps_made < max_steps and bool((run.status == RUNNING).any()):
            size, before = min(self.restart, max_steps - run.num_steps_made), run.residual
            run.cycle(size)
            if size == self.restart:
                run.give_up(before)
        return run.result()


class _Run:
    """One solve: the best point and the residual of every sample, improved cycle by cycle."""

    def __init__(
        self,
        a: Product,
        b: Tensor,
        rtol: float | Tensor,
        atol: float | Tensor,
        guess: Tensor | None,
        trace: bool,
        fused: bool | None,
    ) -> None:
        self._a, self._b = a, b
        # Compiled for the CPU only, where small operations take longest.
        self._kernels = kernels("gmres", b, fused) if b.device.type == "cpu" else None
        self._scale = 1.0 / math.sqrt(max(b.shape[1], 1))
        self.num_evals = 0 if guess is None else 1
        self.num_steps_made = 0
        self.u, self.residual = (
            (torch.zeros_like(b), b) if guess is None else start_from(a, b, guess)
        )
        self._target_norm = rms(b)
        self._tolerance = atol + rtol * self._target_norm
        self.status = torch.full_like(self._target_norm, RUNNING, dtype=torch.int8)
        self.steps = torch.zeros_like(self._target_norm, dtype=torch.int64)
        self._improved = torch.zeros_like(self.status, dtype=torch.bool)
        self._trace: list[Tensor] | None = [] if trace else None
        self._all_run = True  # as far as the host has been told
        self._judge(rms(self.residual))

    def cycle(self, size: int) -> None:
        """Build one Krylov space of at most `size` vectors and move to its best point."""
        make = _Arnoldi if self._kernels is None else self._kernels.Arnoldi
        arnoldi = make(self.u, self.residual, size)
        active, before = self.status == RUNNING, self.num_steps_made
        for _ in range(size):
            norm = arnoldi.extend(self._a)
            self.num_evals += 1
            self.num_steps_made += 1
            if self._judge(norm * self._scale):
                break
        made = torch.where(self.status == RUNNING, self.num_steps_made, self.steps) - before
        u, residual = arnoldi.solution(torch.where(active, made, 0))
        # A sample that broke down to NaN keeps the point it had before this cycle.
        usable = active & torch.isfinite(rms(u)) & torch.isfinite(rms(residual))
        self.u = torch.where(usable.unsqueeze(1), u, self.u)
        self.residual = torch.where(usable.unsqueeze(1), residual, self.residual)
        self._improved |= usable
        if bool((self.status == RUNNING).any()):
            # The recurrence drifts from the truth by rounding; a restart begins with the truth.
            self.residual = self._a(self.u) + self._b - self.u
            self.num_evals += 1

    def give_up(self, before: Tensor) -> None:
        """Stop who gained nothing in a whole cycle, because the next one would be the same."""
        stuck = (self.status == RUNNING) & gained_nothing(rms(self.residual), rms(before))
        self.status = torch.where(stuck, Status.STALLED, self.status).to(torch.int8)
        self.steps = torch.where(stuck, self.num_steps_made, self.steps)

    def result(self) -> LinearResult:
        """Close the books: who still runs has hit the step limit."""
        status = self._without_zeros(
            torch.where(self.status == RUNNING, Status.MAX_STEPS, self.status)
        )
        lost_digits = torch.finfo(self.u.dtype).eps * rms(self.u) > self._tolerance
        # On a singular system the recurrence may announce what the point does not keep.
        lost_digits |= rms(self.residual) > 2.0 * self._tolerance
        status = torch.where((status == Status.SUCCESS) & lost_digits, Status.STALLED, status)
        # Without one finite product the zero start would pass for a gradient of zero; b is the
        # one-step gradient, and its residual is not known.
        lost = (status == Status.NONFINITE) & ~self._improved
        residual = torch.where(lost, torch.nan, rms(self.residual))
        return LinearResult(
            u=torch.where(lost.unsqueeze(1), self._b, self.u),
            residual=residual,
            relative_residual=self._relative(residual),
            status=status,
            num_steps=torch.where(self.status == RUNNING, self.num_steps_made, self.steps),
            num_evals=self.num_evals,
            trace=None if self._trace is None else torch.stack(self._trace),
        )

    def _without_zeros(self, status: Tensor) -> Tensor:
        """Give b to samples that are no better than zero, which would pass for a gradient of zero.

        Costs a product where there are any.
        """
        useless = gained_nothing(rms(self.residual), self._target_norm)
        useless &= status != Status.NONFINITE
        if not bool(useless.any()):
            return status
        rows = useless.unsqueeze(1)
        self.u = torch.where(rows, self._b, self.u)
        self.residual = torch.where(rows, self._a(self.u), self.residual)
        self.num_evals += 1
        reached = rms(self.residual) <= self._tolerance
        return torch.where(useless & reached, Status.SUCCESS, status)

    def _relative(self, norm: Tensor) -> Tensor:
        return norm / self._target_norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def _judge(self, norm: Tensor) -> bool:
        """Note who has arrived or broken down; whether all have."""
        if self._trace is not None:
            running = self.status == RUNNING
            self._trace.append(torch.where(running, self._relative(norm), torch.nan))
        if self._kernels is not None:
            self._all_run = False
            rounding = NUM_ROUNDINGS * torch.finfo(norm.dtype).eps
            limits = self._target_norm, self._tolerance, rounding
            return self._kernels.judge(norm, *limits, self.status, self.steps, self.num_steps_made)
        going = (norm > self._tolerance) & (norm < torch.inf)  # NaN is neither
        if self._all_run and bool(going.all()):
            return not norm.shape[0]
        # Zero is no solution, however loose the tolerance.
        going |= gained_nothing(norm, self._target_norm) & (norm < torch.inf)
        codes = torch.where(torch.isfinite(norm), Status.SUCCESS, Status.NONFINITE)
        done = (self.status == RUNNING) & ~going
        self.status = torch.where(done, codes.to(torch.int8), self.status)
        self.steps = torch.where(done, self.num_steps_made, self.steps)
        self._all_run = False
        return not bool((self.status == RUNNING).any())


class _Arnoldi:
    """Orthonormal basis of the Krylov space, and the projected problem kept triangular.

    A V_k = V_{k+1} H, so (I - A) V_k = V_{k+1} T with T = [I; 0] - H. The rotations Q^T T = R are
    accumulated in `q_transposed`, so each step costs a fixed number of small operations.
    """

    def __init__(self, u: Tensor, residual: Tensor, size: int) -> None:
        double = widest(u.device)
        batch, room = u.shape[0], min(size, FIRST_VECTORS)
        self._u = u
        self._size = size
        self._basis = u.new_zeros(batch, room + 1, u.shape[1])
        self._q_transposed = torch.eye(room + 1, dtype=double, device=u.device).repeat(batch, 1, 1)
        self._r = torch.eye(room, dtype=double, device=u.device).repeat(batch, 1, 1)
        self._right = u.new_zeros(batch, room + 1, dtype=double)
        self._hessenberg: list[Tensor] = []
        norm = torch.linalg.vector_norm(residual, dim=1)
        self._beta = norm.to(double)
        self._right[:, 0] = self._beta
        self._basis[:, 0] = residual * _inverse(norm).unsqueeze(1)
        self._k = 0

    def extend(self, a: Product) -> Tensor:
        """Add one vector and return the Euclidean norm (B,) of the best residual."""
        if self._k + 1 == self._basis.shape[1]:
            self._make_room()
        k, basis = self._k, self._basis
        column, remainder = _orthogonalise(a(basis[:, k]), basis[:, : k + 1])
        length = torch.linalg.vector_norm(remainder, dim=1)
        basis[:, k + 1] = remainder * _inverse(length).unsqueeze(1)
        projected = -torch.cat((column, length.unsqueeze(1)), dim=1).to(self._r.dtype)
        projected[:, k] += 1.0
        self._hessenberg.append(projected)
        self._rotate(projected)
        self._k = k + 1
        return self._right[:, k + 1].abs().to(self._u.dtype)

    def solution(self, own_size: Tensor) -> tuple[Tensor, Tensor]:
        """Point and residual, each sample in the space of its own size (B,)."""
        y = self._coefficients(own_size)
        spent = self._beta.new_zeros(self._beta.shape[0], self._k + 1)
        spent[:, 0] = self._beta
        for k, column in enumerate(self._hessenberg):
            spent[:, : k + 2] -= column * y[:, k : k + 1]
        basis = self._basis[:, : self._k + 1]
        correction = torch.bmm(y.to(basis.dtype).unsqueeze(1), basis[:, :-1]).squeeze(1)
        residual = torch.bmm(spent.unsqueeze(1).to(basis.dtype), basis).squeeze(1)
        return self._u + correction, residual

    def _make_room(self) -> None:
        """Double what is full: most systems are solved long before a restart."""
        more = min(self._basis.shape[1], self._size + 1 - self._basis.shape[1])
        self._basis = pad(self._basis, (0, 0, 0, more))
        self._right = pad(self._right, (0, more))
        self._q_transposed = _bordered(self._q_transposed, more)
        self._r = _bordered(self._r, more)

    def _rotate(self, projected: Tensor) -> None:
        """Make the new column triangular by one more rotation."""
        k = self._k
        column = inner_products(projected, self._q_transposed[:, : k + 2, : k + 2])
        length = torch.linalg.vector_norm(column[:, k:], dim=1)
        # A column of zeros, with the space exhausted, can take nothing off the residual.
        exhausted = length == 0
        length = torch.where(exhausted, 1.0, length)
        cos, sin = (column[:, k:] / length.unsqueeze(1)).unbind(1)
        sin = torch.where(exhausted, 1.0, sin)
        self._r[:, :k, k] = column[:, :k]
        self._r[:, k, k] = length
        rotation = torch.stack((cos, sin, -sin, cos), dim=1).view(-1, 2, 2)
        both = slice(k, k + 2)
        self._q_transposed[:, both] = torch.bmm(rotation, self._q_transposed[:, both])
        self._right[:, both] = rotation[:, :, 0] * self._right[:, k : k + 1]

    def _coefficients(self, own_size: Tensor) -> Tensor:
        """Weights (B, k) of the basis vectors; zero beyond each sample's own size."""
        k = self._k
        inside = torch.arange(k, device=own_size.device) < own_size.unsqueeze(1)
        keep = inside.unsqueeze(1) & inside.unsqueeze(2)
        eye = torch.eye(k, dtype=self._r.dtype, device=self._r.device)
        triangular = torch.where(keep, self._r[:, :k, :k], eye)
        right = torch.where(inside, self._right[:, :k], 0.0).unsqueeze(2)
        return torch.linalg.solve_triangular(triangular, right, upper=True).squeeze(2)


def _orthogonalise(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Gram-Schmidt, twice: once is not enough when the vector nearly lies in the space."""
    column = inner_products(vector, basis)
    vector = _less(vector, column, basis)
    again = inner_products(vector, basis)
    return column + again, _less(vector, again, basis)


def _less(vector: Tensor, column: Tensor, basis: Tensor) -> Tensor:
    """vector - basis^T column, (B, D)."""
    products = torch.baddbmm(vector.unsqueeze(1), column.unsqueeze(1), basis, alpha=-1.0)
    return products.squeeze(1)


def _bordered(matrix: Tensor, more: int) -> Tensor:
    """A matrix (B, n, n) with so many rows and columns of the identity appended."""
    larger = pad(matrix, (0, more, 0, more))
    larger.diagonal(dim1=1, dim2=2)[:, matrix.shape[1] :] = 1.0
    return larger


def _inverse(length: Tensor) -> Tensor:
    """1 / length, and 0 for a length of 0 (the space is exhausted: the solution is exact)."""
    return torch.where(length > 0, 1.0 / length, 0.0)
