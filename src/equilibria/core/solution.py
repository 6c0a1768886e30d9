"""What a solve returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equilibria.core.adjoint import BackwardReport
from equilibria.core.errors import UserError
from equilibria.core.iterate import Iterate
from equilibria.core.problem import Problem
from equilibria.core.pure import is_transformed
from equilibria.core.replay import Replay
from equilibria.core.state import State
from equilibria.core.status import Status


@dataclass(frozen=True)
class Solved:
    """The point that a solve returned, packed (B, D), and how to recognise f there later.

    `tape` is the evaluation there that the gradient passes through, of adjoints that have one.
    """

    z: Tensor
    replay: Replay
    tape: Iterate | None = None


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
        solved: what tells whether f is still the function that was solved; None where that is not
            known, as under transforms and in compiled code.

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
    solved: Solved | None = field(default=None, repr=False, compare=False)

    @property
    def converged(self) -> Tensor:
        """Mask (B,) of the samples that met the tolerance."""
        return self.status == Status.SUCCESS

    @property
    def function(self) -> Callable[[State], State]:
        """The very f that was solved: same injection, masks, normalised weights and autocast.

        At its first call it makes sure of that, by one more evaluation unless it is called at z.

        Raises:
            UserError: the solution was put together by hand and belongs to no problem.
            ReplayError: at the first call, f has become another function since.
        """
        problem, first = solved_problem(self), True

        def function(z: State) -> State:
            nonlocal first
            packed = problem.layout.pack(z)
            image = image_again(self, packed) if first else problem.image(packed)
            first = False
            return problem.layout.unpack(image)

        return function


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


def image_again(solution: Solution, z: Tensor) -> Tensor:
    """f(z) on packed states (B, D), of the function that was solved.

    Costs another evaluation where z is not the solution, whose image tells.

    Raises:
        UserError: the solution has no problem.
        ReplayError: f gives another image at the solution than it did in the solve.
    """
    problem, solved = solved_problem(solution), solution.solved
    if solved is None or torch.compiler.is_compiling() or is_transformed():
        return problem.image(z)
    with solved.replay.as_then():
        image = problem.image(z)
        known = image
        if not torch.equal(z.detach(), solved.z):
            with torch.no_grad():
                known = problem.image(solved.z)
    solved.replay.check(known)
    return image
