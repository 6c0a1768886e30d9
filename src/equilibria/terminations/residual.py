"""Stop when the residual is small."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.core.iterate import Measurement
from equilibria.core.parameters import check_not_negative
from equilibria.core.status import RUNNING, Status
from equilibria.core.termination import Termination


@dataclass(frozen=True)
class Residual(Termination):
    """Accept a sample when its residual is small, absolutely or relative to its image.

        rms(f(z) - z) <= atol + rtol * rms(f(z))

    The default is relative because the scale of a hidden state means nothing: rescaling it must
    not change when a solve stops. `atol` is there for fixed points at zero.

    Args:
        rtol: relative tolerance. 1e-4 is what float32 resolves comfortably and leaves gradients
            about as accurate as the state.
        atol: tolerance per component (root mean square), whatever the size of the state.

    Raises:
        UserError: a negative tolerance, or both zero.
    """

    rtol: float = 1e-4
    atol: float = 1e-6

    def __post_init__(self) -> None:
        check_not_negative("rtol", self.rtol)
        check_not_negative("atol", self.atol)
        if self.rtol == self.atol == 0.0:
            raise UserError(
                "rtol and atol are both 0, which no solve can reach; give one of them, or use "
                "FixedSteps to make a given number of steps"
            )

    def init(self, measurement: Measurement) -> None:
        """Nothing to remember."""

    def check(self, measurement: Measurement, step: int, state: None) -> tuple[Tensor, None]:
        """SUCCESS where the criterion holds."""
        accepted = measurement.residual <= self.atol + self.rtol * measurement.image
        return torch.where(accepted, Status.SUCCESS, RUNNING).to(torch.int8), None
