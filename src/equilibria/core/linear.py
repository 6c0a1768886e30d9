"""The contract of a solver for the linear backward system."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.core.options import Options


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


class LinearSolver(Options, ABC):
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
        Success is claimed only where the dtype can resolve the tolerance at the size of u. Zero is
        never returned for b != 0, however loose the tolerance: it would pass for a gradient of
        zero. Where no better u was found, it is b, the one-step direction.

        `guess` (B, D) is what u may be like, up to its scale, if anything is known: the solution
        of a similar system. It is taken for what it is worth (see `start_from`): whatever it is,
        the result is as right as without it. NaN says that nothing is known of a sample.
        """


def start_from(a: Callable[[Tensor], Tensor], b: Tensor, guess: Tensor) -> tuple[Tensor, Tensor]:
    """The best multiple of a guess of each sample, and its residual b - (I - A) u; one product.

        u = c guess,   c = <w, b> / <w, w>,   w = (I - A) guess

    So no guess is worse than u = 0 with its residual b, which is what a sample gets whose guess
    is useless or not finite; and the scale of b, that of the loss, need not be the guess's.
    """
    if not b.numel():
        return torch.zeros_like(b), b
    guess = torch.where(torch.isfinite(guess).all(1, keepdim=True), guess, 0.0)
    w = guess - a(guess)
    # The largest number becomes 1, so that no square overflows or vanishes.
    size = w.abs().amax(1, keepdim=True)
    unit = w / size
    share = (unit * b).sum(1, keepdim=True) / unit.square().sum(1, keepdim=True)
    factor = share / size
    u = factor * guess
    useful = torch.isfinite(u).all(1, keepdim=True) & torch.isfinite(share)
    return torch.where(useful, u, 0.0), torch.where(useful, b - share * unit, b)


NUM_ROUNDINGS = 100
"""By how many units of rounding a residual has to fall to count as smaller."""


def gained_nothing(norm: Tensor, before: Tensor) -> Tensor:
    """Mask (B,) of the residuals that are, but for rounding, no smaller than `before`, which is.

    Of u = 0 the residual is b, so a u that leaves as much is worth no more than zero.
    """
    return (norm >= before * (1.0 - NUM_ROUNDINGS * torch.finfo(norm.dtype).eps)) & (before > 0)


def scaled_to_one(b: Tensor) -> tuple[Tensor, Tensor]:
    """b (B, D) with the largest number of every sample between 1/2 and 1, and exponents (B, 1).

        b = 2^exponent * scaled

    Exact, and what makes a linear solve the same for every scale of the loss: sums of squares
    underflow below 1e-22 in float32, and a system without a right side has the solution 0.
    """
    largest = b.abs().amax(1, keepdim=True) if b.shape[1] else b.new_zeros(b.shape[0], 1)
    _, exponent = torch.frexp(largest)
    exponent = torch.where((largest > 0) & torch.isfinite(largest), exponent, 0)
    return times_power_of_two(b, -exponent), exponent


def times_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """x * 2^exponent in two steps, because the power alone may be beyond what the dtype holds."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    return torch.ldexp(torch.ldexp(x, half), exponent - half)
