"""Stop after a given number of steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.core.iterate import Measurement
from equilibria.core.parameters import check_positive_integer
from equilibria.core.status import Status
from equilibria.core.termination import Termination


@dataclass(frozen=True)
class FixedSteps(Termination):
    """Make exactly `num_steps` steps and call the result a success, whatever the residual.

    For weight-tied networks of a given depth (unrolled pre-training) and for comparisons at
    equal work. The residual is still measured and reported.

    Args:
        num_steps: steps to make; the solve's `max_steps` must be at least as large.

    Raises:
        UserError: num_steps below 1.
    """

    num_steps: int

    def __post_init__(self) -> None:
        check_positive_integer("num_steps", self.num_steps)

    def check_limit(self, max_steps: int) -> None:
        """All steps have to be allowed."""
        if self.num_steps > max_steps:
            raise UserError(
                f"FixedSteps({self.num_steps}) cannot be made within max_steps={max_steps}; give "
                f"max_steps={self.num_steps} as well"
            )

    def init(self, measurement: Measurement) -> None:
        """Nothing to remember."""

    @property
    def needs_sync(self) -> bool:
        """The number of steps is all that counts."""
        return False

    def check(self, measurement: Measurement, step: int, state: None) -> tuple[Tensor | None, None]:
        """SUCCESS for every sample at step `num_steps`."""
        if step < self.num_steps:
            return None, None
        return torch.full_like(measurement.residual, Status.SUCCESS, dtype=torch.int8), None
