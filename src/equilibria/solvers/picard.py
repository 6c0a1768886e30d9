"""Picard iteration: apply f again and again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from equilibria.core.iterate import Iterate
from equilibria.core.parameters import check_relaxation
from equilibria.core.problem import Evaluate
from equilibria.core.solver import Solver


@dataclass(frozen=True)
class Picard(Solver):
    """Plain (or relaxed) fixed-point iteration.

        z_{k+1} = z_k + relaxation * (f(z_k) - z_k)

    Converges when the spectral radius of (1 - relaxation) I + relaxation J is below 1, by that
    factor per step. Use it for strong contractions, for shallow unrolled pre-training and as a
    reference; Anderson needs fewer evaluations almost everywhere else.

    Cost per step: one evaluation, no history.

    Args:
        relaxation: 1 (default) is undamped; values below 1 help maps whose Jacobian has
            eigenvalues below -1.

    Raises:
        UserError: relaxation is not in (0, 2).
    """

    relaxation: float = 1.0

    def __post_init__(self) -> None:
        check_relaxation(self.relaxation)

    @property
    def single_evaluation(self) -> bool:
        """Whether a step is `evaluate(propose(...))` and nothing else."""
        return True

    @property
    def separable(self) -> bool:
        """Whether finished samples can leave the batch."""
        return True

    def select(self, state: None, rows: Tensor) -> None:
        """Nothing is remembered."""

    def init(self, iterate: Iterate, max_steps: int) -> None:
        """Nothing to remember."""

    def step(self, evaluate: Evaluate, iterate: Iterate, state: None) -> tuple[Iterate, None]:
        """Move by `relaxation` of the way to the image."""
        return evaluate(self.propose(iterate, state)[0]), None

    def propose(self, iterate: Iterate, state: None) -> tuple[Tensor, None]:
        """The next point, not yet evaluated."""
        if self.relaxation == 1.0:
            return iterate.fz, None
        return iterate.z.lerp(iterate.fz, self.relaxation), None
