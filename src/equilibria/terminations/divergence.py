"""Give up on a sample that runs away."""

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
class Divergence(Termination):
    """Call a sample DIVERGED when its residual or its image has grown out of proportion.

        rms(f(z) - z) > residual_factor * s    or    rms(f(z)) > image_factor * s,
        s = max(rms(f(z0) - z0), rms(f(z0)))

    The size s of the problem is taken from the residual and the image of the start together. The
    residual alone would call a good warm start diverged at its first detour; the norm of z0 would
    be zero for the usual start.

    Stops samples before they overflow to infinity; combine it: `AnyOf(Residual(), Divergence())`.

    Args:
        residual_factor: 1000 leaves room for the detours of quasi-Newton methods on non-normal
            problems, whose residual grows before it falls.
        image_factor: 1e6 leaves room for solutions far from the start: a contraction factor of
            1 - 1e-6 has one that is 1e6 times its first image.

    Raises:
        UserError: a factor of at most 1.
    """

    residual_factor: float = 1e3
    image_factor: float = 1e6

    def __post_init__(self) -> None:
        for name in ("residual_factor", "image_factor"):
            value = getattr(self, name)
            check_not_negative(name, value)
            if value <= 1.0:
                raise UserError(f"{name}={value} of Divergence must be greater than 1")

    def init(self, measurement: Measurement) -> Tensor:
        """Remember the size (B,) of the problem at its start."""
        return torch.maximum(measurement.residual, measurement.image)

    def check(self, measurement: Measurement, step: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """DIVERGED where either norm is out of proportion."""
        diverged = (measurement.residual > self.residual_factor * state) | (
            measurement.image > self.image_factor * state
        )
        return torch.where(diverged, Status.DIVERGED, RUNNING).to(torch.int8), state
