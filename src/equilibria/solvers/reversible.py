"""Reversible two-state relaxation: steps that can be undone without having stored them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.core.iterate import Iterate
from equilibria.core.parameters import check_not_negative
from equilibria.core.problem import Evaluate
from equilibria.core.solver import Solver


@dataclass(frozen=True)
class ReversibleState:
    """The second of the two states, packed (B, D), not rounded to what f sees."""

    y: Tensor


@dataclass(frozen=True)
class Reversible(Solver):
    """Two coupled relaxed iterations, each of which can be solved for its past.

        y_{k+1} = (1 - b) y_k + b f(z_k)          y_k = (y_{k+1} - b f(z_k)) / (1 - b)
        z_{k+1} = (1 - b) z_k + b f(y_{k+1})      z_k = (z_{k+1} - b f(y_{k+1})) / (1 - b)

    with b the `relaxation` and y_0 = z_0. Gradients through all steps then need no stored steps.
    Without that wish there is no reason to use it: Anderson needs fewer evaluations.

    Going back divides by 1 - b in every half step, and rounding errors with it. After k steps
    they are about eps (1 - b)^(-2 k), so a solve is refused whose `max_steps` would make that
    exceed `reconstruction_tolerance`. At b = 0.5 and the default tolerance float32 allows 8
    steps, float64 22; at b = 0.3, 15 and 44.

    Cost per step: two evaluations, 1 state copy of memory.

    Args:
        relaxation: b, below 1. 0.5 trades speed for the number of steps that can be undone.
        reconstruction_tolerance: relative error to which the start must be recoverable. None
            switches the guard off, for a solve that is never run backwards.

    Raises:
        UserError: relaxation not in (0, 1), a negative tolerance; at the start of a solve,
            max_steps beyond what can be undone in its dtype.

    References:
        McCallum and Foster, Efficient, accurate and stable gradients for neural ODEs, arXiv
        2410.11648, for the two-state coupling; Reversible Deep Equilibrium Models, arXiv
        2509.12917.
    """

    relaxation: float = 0.5
    reconstruction_tolerance: float | None = 1e-2

    def __post_init__(self) -> None:
        if not 0.0 < self.relaxation < 1.0:
            raise UserError(
                f"relaxation={self.relaxation} of Reversible must lie between 0 and 1: a step is "
                "undone by dividing by 1 - relaxation"
            )
        if self.reconstruction_tolerance is not None:
            check_not_negative("reconstruction_tolerance", self.reconstruction_tolerance)

    def max_reversible_steps(self, dtype: torch.dtype) -> int:
        """Steps after which going back still recovers the start to the tolerance."""
        if self.reconstruction_tolerance is None:
            raise UserError(
                "Reversible(reconstruction_tolerance=None) has no limit; give a tolerance"
            )
        room = self.reconstruction_tolerance / torch.finfo(dtype).eps
        return max(0, int(math.log(max(room, 1.0)) / (-2.0 * math.log1p(-self.relaxation))))

    def init(self, iterate: Iterate, max_steps: int) -> ReversibleState:
        """Start both states at the same point, if their steps can be undone."""
        if self.reconstruction_tolerance is not None:
            dtype = iterate.z.dtype
            limit = self.max_reversible_steps(dtype)
            if max_steps > limit:
                wider = ", start from a float64 z0" if dtype != torch.float64 else ""
                raise UserError(
                    f"Reversible(relaxation={self.relaxation}) cannot undo max_steps={max_steps} "
                    f"steps in {dtype} to a relative {self.reconstruction_tolerance}; give "
                    f"max_steps of at most {limit}{wider}, lower relaxation, or set "
                    "reconstruction_tolerance=None for a solve that is not run backwards"
                )
        return ReversibleState(iterate.z)

    def step(
        self, evaluate: Evaluate, iterate: Iterate, state: ReversibleState
    ) -> tuple[Iterate, ReversibleState]:
        """Move the second state by the image of the first, then the first by that of the second."""
        y = state.y.lerp(iterate.fz, self.relaxation)
        z = iterate.z.lerp(evaluate(y).fz, self.relaxation)
        return evaluate(z), ReversibleState(y)
