"""Give up on a sample that no longer improves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.core.iterate import Measurement
from equilibria.core.parameters import check_positive_integer
from equilibria.core.status import RUNNING, Status
from equilibria.core.termination import Termination


@dataclass(frozen=True)
class Stagnation(Termination):
    """Call a sample STALLED when its best residual has stopped falling.

        best(k) > factor * best(k - num_steps)

    where best(k) is the lowest residual up to step k. Saves the evaluations that a batch would
    spend on samples that do not get any better; it never accepts anything, so combine it:
    `AnyOf(Residual(), Stagnation())`.

    Args:
        num_steps: how many steps a sample gets to improve. Quasi-Newton methods have dry spells;
            below about 5 their normal behaviour is taken for a stall.
        factor: the improvement asked for. 0.95 in 10 steps is slower than a contraction by 0.995
            a step.

    Raises:
        UserError: num_steps below 1, factor not in (0, 1].
    """

    num_steps: int = 10
    factor: float = 0.95

    def __post_init__(self) -> None:
        check_positive_integer("num_steps", self.num_steps)
        if not 0.0 < self.factor <= 1.0:
            raise UserError(
                f"factor={self.factor} of Stagnation must lie above 0 and be at most 1 (the "
                "residual has to fall to that share of what it was)"
            )

    def init(self, measurement: Measurement) -> Tensor:
        """The best residuals after each of the last `num_steps` steps, (num_steps, B)."""
        unknown = torch.full_like(measurement.residual, torch.inf)
        return unknown.expand(self.num_steps, -1)

    def check(self, measurement: Measurement, step: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """STALLED where nothing improved over the window."""
        best = torch.fmin(state[-1], measurement.residual)
        stalled = best > self.factor * state[0]
        codes = torch.where(stalled, Status.STALLED, RUNNING).to(torch.int8)
        return codes, torch.cat((state[1:], best.unsqueeze(0)))
