"""The contract of a solver for the linear backward system."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LinearResult:
    """The solution of u = a(u) + b, packed (B, D), and how the solve went, per sample (B,).

    Args:
        u: the solution, or the best approximation found.
        residual: rms(a(u) + b - u).
        relative_residual: that over rms(b).
        status: `Status` codes, int8.
        num_steps: steps until each sample finished.
        num_evals: number of products with `a` for the whole batch.
        trace: relative residual after every step (num_steps + 1, B), or None.
    """

    u: Tensor
    residual: Tensor
    relative_residual: Tensor
    status: Tensor
    num_steps: Tensor
    num_evals: int
    trace: Tensor | None = None


class LinearSolver(ABC):
    """Solves u = a(u) + b for a linear map `a` on packed states, each sample on its own.

    For the backward pass a(u) = J^T u and b is the incoming cotangent, so u = (I - J^T)^-1 b.
    """

    @abstractmethod
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
        """Solve to rms(a(u) + b - u) <= atol + rtol * rms(b), or `max_steps` steps.

        Relative to b and not to u: on a singular system u grows without bound, and a residual
        relative to it would call that a success. Scaling b scales u and changes nothing else.
        Success is claimed only where the dtype can resolve the tolerance at the size of u.

        `guess` is where to start, if anything is known.
        """
