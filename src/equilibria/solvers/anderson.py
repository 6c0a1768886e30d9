"""Anderson acceleration (type II)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.core.history import Ring, SmallMatrix
from equilibria.core.iterate import Iterate
from equilibria.core.parameters import (
    check_not_negative,
    check_positive_integer,
    check_relaxation,
)
from equilibria.core.problem import Evaluate
from equilibria.core.solver import Solver


class AndersonState:
    """Differences of residuals and of images over the last steps, and their Gram matrix."""

    def __init__(self, iterate: Iterate, size: int) -> None:
        self.residual_differences = Ring(iterate.z, size)
        self.image_differences = Ring(iterate.z, size)
        self.gram = SmallMatrix(iterate.z, size)
        self.previous: Iterate | None = None
        self.previous_residual: Tensor | None = None


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration, type II, in difference form.

    With r_k = f(z_k) - z_k, and the columns of R and F the differences of consecutive residuals
    and images over the last `history_size` steps,

        gamma   = argmin | r_k - R gamma |^2 + ridge |diag(R^T R)^(1/2) gamma|^2
        z_{k+1} = f(z_k) - F gamma - (1 - relaxation) (r_k - R gamma)

    The best default on contractions and near-contractions. For strongly non-normal maps or a
    spectral radius above 1 use Broyden.

    Cost per step: one evaluation; 2 m state copies of memory; about 2 m + 6 words of traffic per
    float of the state, because the Gram matrix gains one row a step and is never rebuilt.

    Args:
        history_size: differences kept (m). 5 is the best all-round value on our problem
            families; a longer window is not always better.
        relaxation: 1 (default) is undamped.
        ridge: regularisation relative to each column's own scale, so that a solve does not
            depend on the units of the state. An absolute one stalls on small vectors, as those
            of the backward system under mean-reduced losses are.

    Raises:
        UserError: history_size below 1, negative ridge, relaxation not in (0, 2).

    References:
        Walker and Ni, Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal.
        49 (2011), section 4.
    """

    history_size: int = 5
    relaxation: float = 1.0
    ridge: float = 1e-8

    def __post_init__(self) -> None:
        check_positive_integer("history_size", self.history_size)
        check_relaxation(self.relaxation)
        check_not_negative("ridge", self.ridge)

    def init(self, iterate: Iterate, max_steps: int) -> AndersonState:
        """Allocate the history, no longer than the solve can fill."""
        return AndersonState(iterate, min(self.history_size, max_steps))

    def step(
        self, evaluate: Evaluate, iterate: Iterate, state: AndersonState
    ) -> tuple[Iterate, AndersonState]:
        """Mix the last images by the weights that minimise the mixed residual."""
        residual = iterate.fz - iterate.z
        if state.previous is None or state.previous_residual is None:
            z = iterate.z + self.relaxation * residual
        else:
            difference = state.residual_differences.push_difference(
                residual, state.previous_residual
            )
            state.image_differences.push_difference(iterate.fz, state.previous.fz)
            gamma = self._weights(state, difference, residual)
            z = torch.baddbmm(
                iterate.fz.unsqueeze(1), gamma, state.image_differences.vectors, alpha=-1.0
            ).squeeze(1)
            if self.relaxation != 1.0:
                mixed = torch.baddbmm(
                    residual.unsqueeze(1), gamma, state.residual_differences.vectors, alpha=-1.0
                ).squeeze(1)
                z = z - (1.0 - self.relaxation) * mixed
        state.previous, state.previous_residual = iterate, residual
        return evaluate(z), state

    def _weights(self, state: AndersonState, difference: Tensor, residual: Tensor) -> Tensor:
        """Solve the small least-squares problem; (B, 1, n) weights."""
        vectors = state.residual_differences.vectors
        n, slot = vectors.shape[1], state.residual_differences.newest
        products = torch.bmm(vectors, torch.stack((difference, residual), dim=2))
        row, right = products.to(state.gram.dtype).unbind(2)
        state.gram.set_column(slot, row)
        state.gram.set_row(slot, row)
        gram = state.gram.leading(n)
        # A column of zeros (a sample that no longer moves) gets scale 0 and so weight 0.
        scale = gram.diagonal(dim1=1, dim2=2).rsqrt()
        scale = torch.where(torch.isfinite(scale), scale, 0.0)
        unit = gram * scale.unsqueeze(1) * scale.unsqueeze(2)
        unit = unit - torch.diag_embed(unit.diagonal(dim1=1, dim2=2) - (1.0 + self.ridge))
        gamma = scale * torch.linalg.solve_ex(unit, scale * right)[0]
        # A system too singular to solve falls back to the plain step for that sample.
        gamma = torch.where(torch.isfinite(gamma).all(1, keepdim=True), gamma, 0.0)
        return gamma.to(vectors.dtype).unsqueeze(1)
