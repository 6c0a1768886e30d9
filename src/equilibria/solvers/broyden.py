"""Broyden's good and bad method in compact form, with limited or full memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from equilibria.core.backtracking import backtrack
from equilibria.core.errors import UserError, nearest
from equilibria.core.history import Ring, SmallMatrix
from equilibria.core.iterate import Iterate
from equilibria.core.parameters import check_positive_integer, check_relaxation
from equilibria.core.problem import Evaluate
from equilibria.core.solver import Solver

Kind = Literal["good", "bad"]


class BroydenState:
    """Vectors and image differences of the last updates, and their inner products."""

    def __init__(self, iterate: Iterate, size: int) -> None:
        self.vectors = Ring(iterate.z, size)
        """Steps for the good method, residual differences for the bad one."""
        self.image_differences = Ring(iterate.z, size)
        self.squares = SmallMatrix(iterate.z, size)
        self.by_images = SmallMatrix(iterate.z, size)
        self.previous: Iterate | None = None


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's method on g(z) = f(z) - z, started from the Jacobian -I.

    With S, R and F the differences of points, residuals and images over the last `history_size`
    updates, r_k = f(z_k) - z_k, and triu(.) the upper triangle (older row, newer column), the
    secant updates have closed forms,

        good:  z_{k+1} = z_k + r_k + F (triu(S^T S) - S^T F)^-1 S^T r_k
        bad:   z_{k+1} = z_k + r_k - F triu(R^T R)^-1 R^T r_k

    times `relaxation` for the step z_{k+1} - z_k. The good method is the least change of the
    Jacobian that explains each step, the bad one the least change of its inverse. Forgetting the
    oldest pair is dropping a column: what is left is exactly Broyden's method on the remaining
    pairs, where a product of rank-one factors would be corrupted.

    The most robust choice for non-normal maps and spectral radius above 1; on easy contractions
    Anderson does the same work with a shorter history.

    Cost per step: one evaluation; 2 L state copies of memory; three passes over L vectors (bad:
    two). The line search adds one evaluation of the whole batch whenever some sample's step has
    to be halved, at most 5 a step, and waits for the device once an evaluation.

    Args:
        history_size: pairs kept (L); None keeps all. 20 keeps nearly all of the robustness of
            the full method on our problem families.
        relaxation: 1 (default) takes the full quasi-Newton step.
        kind: "good" (default) or "bad". The bad method cannot run into a singular update, but
            forgets more slowly what was wrong; it is ahead only on nearly linear problems.
        line_search: halve the step of a sample, up to 5 times, until

                |r(z + t d)| <= (1 - 1e-4 t) |r(z)|,

            and take the best of the points tried if none will do. No derivative is needed, but
            then descent is not guaranteed either. Off by default: detours often pay.

    Raises:
        UserError: history_size below 1, relaxation not in (0, 2), an unknown kind.

    References:
        Broyden, A class of methods for solving nonlinear simultaneous equations, Math. Comp. 19
        (1965). Byrd, Nocedal and Schnabel, Representations of quasi-Newton matrices and their
        use in limited memory methods, Math. Programming 63 (1994), section 6. For the line
        search: Kelley, Iterative Methods for Linear and Nonlinear Equations (1995), section 8.
    """

    history_size: int | None = 20
    relaxation: float = 1.0
    kind: Kind = "good"
    line_search: bool = False

    def __post_init__(self) -> None:
        if self.history_size is not None:
            check_positive_integer("history_size", self.history_size)
        check_relaxation(self.relaxation)
        if self.kind not in get_args(Kind):
            raise UserError(
                f"kind={self.kind!r} of Broyden is not one of 'good', 'bad'"
                f"{nearest(str(self.kind), get_args(Kind))}"
            )
        if not isinstance(self.line_search, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(f"line_search={self.line_search!r} of Broyden must be True or False")

    @property
    def single_evaluation(self) -> bool:
        """Whether a step is `evaluate(propose(...))` and nothing else."""
        return not self.line_search

    def init(self, iterate: Iterate, max_steps: int) -> BroydenState:
        """Allocate the pairs, no more than the solve can fill."""
        return BroydenState(iterate, min(self.history_size or max_steps, max_steps))

    def step(
        self, evaluate: Evaluate, iterate: Iterate, state: BroydenState
    ) -> tuple[Iterate, BroydenState]:
        """Add the pair of the last step, then take the quasi-Newton step."""
        z, state = self.propose(iterate, state)
        if self.line_search:
            return backtrack(evaluate, iterate, z), state
        return evaluate(z), state

    def propose(self, iterate: Iterate, state: BroydenState) -> tuple[Tensor, BroydenState]:
        """The next point, not yet evaluated."""
        if state.previous is None:
            target = iterate.fz
        else:
            weigh = _weights_good if self.kind == "good" else _weights_bad
            weights = weigh(state, iterate, state.previous)
            target = torch.baddbmm(
                iterate.fz.unsqueeze(1), weights, state.image_differences.vectors
            ).squeeze(1)
        state.previous = iterate
        z = target if self.relaxation == 1.0 else iterate.z.lerp(target, self.relaxation)
        return z, state


def _weights_good(state: BroydenState, iterate: Iterate, previous: Iterate) -> Tensor:
    """Add the last pair and solve (triu(S^T S) - S^T F) w = S^T r; (B, 1, n) weights of F."""
    new_step = state.vectors.push_difference(iterate.z, previous.z)
    new_image = state.image_differences.push_difference(iterate.fz, previous.fz)
    steps, images = state.vectors.vectors, state.image_differences.vectors
    slot, dtype = state.vectors.newest, state.squares.dtype
    residual = iterate.fz - iterate.z
    over_steps = torch.bmm(steps, torch.stack((new_step, new_image, residual), dim=2))
    by_step, by_image, right = over_steps.to(dtype).unbind(2)
    row = torch.bmm(images, new_step.unsqueeze(2)).squeeze(2).to(dtype)
    state.squares.set_column(slot, by_step)
    state.squares.set_row(slot, by_step)
    state.by_images.set_column(slot, by_image)
    state.by_images.set_row(slot, row)
    squares = state.squares.leading(steps.shape[1])
    system = _older_rows(state, squares) - state.by_images.leading(steps.shape[1])
    return _solve(squares, system, right).to(steps.dtype).unsqueeze(1)


def _weights_bad(state: BroydenState, iterate: Iterate, previous: Iterate) -> Tensor:
    """Add the last pair and solve triu(R^T R) w = -R^T r; (B, 1, n) weights of F."""
    residual = iterate.fz - iterate.z
    new = state.vectors.push_difference(residual, previous.fz - previous.z)
    state.image_differences.push_difference(iterate.fz, previous.fz)
    vectors, slot = state.vectors.vectors, state.vectors.newest
    products = torch.bmm(vectors, torch.stack((new, residual), dim=2))
    column, right = products.to(state.squares.dtype).unbind(2)
    state.squares.set_column(slot, column)
    state.squares.set_row(slot, column)
    squares = state.squares.leading(vectors.shape[1])
    return _solve(squares, _older_rows(state, squares), -right).to(vectors.dtype).unsqueeze(1)


def _older_rows(state: BroydenState, squares: Tensor) -> Tensor:
    """The upper triangle by age: row not newer than column."""
    ages = torch.tensor(state.vectors.ages, device=squares.device)
    return torch.where(ages.unsqueeze(1) >= ages.unsqueeze(0), squares, 0.0)


def _solve(squares: Tensor, system: Tensor, right: Tensor) -> Tensor:
    """Solve the small system on vectors scaled to unit length (the update does not change)."""
    lengths = squares.diagonal(dim1=1, dim2=2)
    moved = lengths > 0
    # A step of zero (a sample that no longer moves) gets a unit diagonal and weight 0.
    scale = torch.where(moved, torch.where(moved, lengths, 1.0).rsqrt(), 0.0)
    unit = system * scale.unsqueeze(1) * scale.unsqueeze(2)
    unit = unit + torch.diag_embed((~moved).to(unit.dtype))
    weights = scale * torch.linalg.solve_ex(unit, scale * right)[0]
    # A singular update falls back to the plain step for that sample.
    return torch.where(torch.isfinite(weights).all(1, keepdim=True), weights, 0.0)
