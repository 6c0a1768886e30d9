"""What a solve returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from equilibria.core.adjoint import BackwardReport
from equilibria.core.errors import UserError
from equilibria.core.problem import Problem
from equilibria.core.state import State
from equilibria.core.status import Status


@dataclass(frozen=True)
class Solution:
    """A fixed point and the evidence for it; per-sample tensors are (B,).

    Args:
        z: the state, in the form of `z0`, carrying the gradient.
        status: `Status` codes, int8.
        residual: rms(f(z) - z) of exactly the returned z, undamped.
        relative_residual: that over rms(f(z)).
        num_steps: solver steps until each sample finished.
        num_evals: calls of f in the forward pass for the whole batch (NFE), the recorded ones
            included.
        seconds: wall time of the forward pass as seen by the host.
        backward: filled in by the backward pass.
        states: the intermediate states asked for, then the final one; empty if none were.
        trace: relative residual after every step (num_steps + 1, B), NaN once a sample is
            finished; None unless asked for.
        warm_started: mask (B,) of the samples that a warm start let begin elsewhere than at the
            initial state; None without one.
        problem: what was solved, with the masks and normalised weights of that solve, for
            regularisers and measurements at z. Keeps f and what it closes over alive as long as
            the solution; where many solutions are collected, keep their z.

    While z carries a graph a solution cannot be pickled or deep-copied, as PyTorch refuses both
    for tensors that are no leaves; store `solution.z.detach()` and the per-sample tensors.
    """

    z: State
    status: Tensor
    residual: Tensor
    relative_residual: Tensor
    num_steps: Tensor
    num_evals: int
    seconds: float
    backward: BackwardReport
    states: tuple[State, ...] = ()
    trace: Tensor | None = None
    warm_started: Tensor | None = None
    problem: Problem | None = field(default=None, repr=False, compare=False)

    @property
    def converged(self) -> Tensor:
        """Mask (B,) of the samples that met the tolerance."""
        return self.status == Status.SUCCESS

    @property
    def function(self) -> Callable[[State], State]:
        """The very f that was solved: same injection, masks, normalised weights and autocast.

        Raises:
            UserError: the solution was put together by hand and belongs to no problem.
        """
        problem = solved_problem(self)
        return lambda z: problem.layout.unpack(problem.image(problem.layout.pack(z)))


def solved_problem(solution: Solution) -> Problem:
    """The problem of a solution.

    Raises:
        UserError: it has none.
    """
    if not isinstance(solution, Solution):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(
            f"expected the Solution that solve(...) or deq(...) returned, got a "
            f"{type(solution).__name__}; give the solution itself and not its z"
        )
    if solution.problem is None:
        raise UserError(
            "this Solution does not know what it solves, because it was put together by hand; "
            "give problem=... when making it, or use one that solve(...) or deq(...) returned"
        )
    return solution.problem
