"""The phantom gradient: a few damped steps recorded at the fixed point."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from equilibria.core.adjoint import Adjoint, AttachGraph, Forward
from equilibria.core.parameters import check_positive_integer, check_relaxation


@dataclass(frozen=True)
class Phantom(Adjoint):
    """Differentiate `num_steps` damped fixed-point steps that start at the solution.

        z_{i+1} = (1 - relaxation) z_i + relaxation f(z_i),   z_0 = z*
        dL/dtheta ~ g^T dz_k/dtheta

    A damped Neumann series of the exact gradient: the bias falls with more steps, the memory
    grows with them (one recorded evaluation each). The returned value stays z*, so the residual
    reported is that of the value.

    Args:
        num_steps: recorded steps (k). 5 as in the reference.
        relaxation: 0.5 as in the reference; 1 gives the plain truncated Neumann series.

    Raises:
        UserError: num_steps below 1, relaxation not in (0, 2).

    References:
        Geng et al., On training implicit models, arXiv 2111.05177, equation 9 (unrolled form).
    """

    num_steps: int = 5
    relaxation: float = 0.5

    def __post_init__(self) -> None:
        check_positive_integer("num_steps", self.num_steps)
        check_relaxation(self.relaxation)

    @property
    def traceable(self) -> bool:
        """Its steps are evaluations like others."""
        return True

    def attach(self, forward: Forward, z: Tensor) -> Tensor:
        """Record the damped steps from z and attach them."""
        path = z.detach()
        for _ in range(self.num_steps):
            path = path.lerp(forward.problem.image(path), self.relaxation)
        return AttachGraph.apply(z, path, "Phantom")
