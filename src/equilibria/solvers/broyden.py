"""Broyden's good method in compact form, with limited or full memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.core.history import Ring, SmallMatrix
from equilibria.core.iterate import Iterate
from equilibria.core.parameters import check_positive_integer, check_relaxation
from equilibria.core.problem import Evaluate
from equilibria.core.solver import Solver


class BroydenState:
    """Steps and image differences of the last updates, and their inner products."""

    def __init__(self, iterate: Iterate, size: int) -> None:
        self.steps = Ring(iterate.z, size)
        self.image_differences = Ring(iterate.z, size)
        self.steps_by_steps = SmallMatrix(iterate.z, size)
        self.steps_by_images = SmallMatrix(iterate.z, size)
        self.previous: Iterate | None = None


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's good method on g(z) = f(z) - z, started from the Jacobian -I.

    With S the steps z_{j+1} - z_j and F the differences of images over the last `history_size`
    updates, and N the upper triangle of S^T S (older row, newer column), the secant updates have
    the closed form B = -I + F N^-1 S^T, hence

        z_{k+1} = z_k + relaxation * (r_k + F (N - S^T F)^-1 S^T r_k),   r_k = f(z_k) - z_k

    Forgetting the oldest pair is dropping a column: what is left is exactly Broyden's method on
    the remaining pairs, where a product of rank-one factors would be corrupted.

    The most robust choice for non-normal maps and spectral radius above 1; on easy contractions
    Anderson does the same work with a shorter history.

    Cost per step: one evaluation; 2 L state copies of memory; three passes over L vectors.

    Args:
        history_size: pairs kept (L); None keeps all. 20 keeps nearly all of the robustness of
            the full method on our problem families.
        relaxation: 1 (default) takes the full quasi-Newton step.

    Raises:
        UserError: history_size below 1, relaxation not in (0, 2).

    References:
        Broyden, A class of methods for solving nonlinear simultaneous equations, Math. Comp. 19
        (1965). Byrd, Nocedal and Schnabel, Representations of quasi-Newton matrices and their
        use in limited memory methods, Math. Programming 63 (1994), section 6.
    """

    history_size: int | None = 20
    relaxation: float = 1.0

    def __post_init__(self) -> None:
        if self.history_size is not None:
            check_positive_integer("history_size", self.history_size)
        check_relaxation(self.relaxation)

    def init(self, iterate: Iterate, max_steps: int) -> BroydenState:
        """Allocate the pairs, no more than the solve can fill."""
        return BroydenState(iterate, min(self.history_size or max_steps, max_steps))

    def step(
        self, evaluate: Evaluate, iterate: Iterate, state: BroydenState
    ) -> tuple[Iterate, BroydenState]:
        """Add the pair of the last step, then take the quasi-Newton step."""
        residual = iterate.fz - iterate.z
        if state.previous is None:
            target = iterate.fz
        else:
            weights = self._weights(state, iterate, residual)
            target = torch.baddbmm(
                iterate.fz.unsqueeze(1), weights, state.image_differences.vectors
            ).squeeze(1)
        z = target if self.relaxation == 1.0 else iterate.z.lerp(target, self.relaxation)
        state.previous = iterate
        return evaluate(z), state

    def _weights(self, state: BroydenState, iterate: Iterate, residual: Tensor) -> Tensor:
        """Solve (N - S^T F) w = S^T r; (B, 1, n) weights of the columns of F."""
        if state.previous is None:
            raise RuntimeError("weights are asked for before the first step")
        new_step = state.steps.push_difference(iterate.z, state.previous.z)
        new_image = state.image_differences.push_difference(iterate.fz, state.previous.fz)
        steps, images = state.steps.vectors, state.image_differences.vectors
        slot, dtype = state.steps.newest, state.steps_by_steps.dtype
        over_steps = torch.bmm(steps, torch.stack((new_step, new_image, residual), dim=2))
        by_step, by_image, right = over_steps.to(dtype).unbind(2)
        row = torch.bmm(images, new_step.unsqueeze(2)).squeeze(2).to(dtype)
        state.steps_by_steps.set_column(slot, by_step)
        state.steps_by_steps.set_row(slot, by_step)
        state.steps_by_images.set_column(slot, by_image)
        state.steps_by_images.set_row(slot, row)
        return _solve(state, right).to(steps.dtype).unsqueeze(1)


def _solve(state: BroydenState, right: Tensor) -> Tensor:
    """Solve the small system on steps scaled to unit length (the update does not change)."""
    n = right.shape[1]
    squares = state.steps_by_steps.leading(n)
    scale = squares.diagonal(dim1=1, dim2=2).rsqrt()
    moved = torch.isfinite(scale)
    # A step of zero (a sample that no longer moves) gets a unit diagonal and weight 0.
    scale = torch.where(moved, scale, 0.0)
    ages = torch.tensor(state.steps.ages, device=right.device)
    older_row = ages.unsqueeze(1) >= ages.unsqueeze(0)
    difference = torch.where(older_row, squares, 0.0) - state.steps_by_images.leading(n)
    unit = difference * scale.unsqueeze(1) * scale.unsqueeze(2)
    unit = unit + torch.diag_embed((~moved).to(unit.dtype))
    weights = scale * torch.linalg.solve_ex(unit, scale * right)[0]
    # A singular update falls back to the plain step for that sample.
    return torch.where(torch.isfinite(weights).all(1, keepdim=True), weights, 0.0)
