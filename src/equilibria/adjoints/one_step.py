"""The one-step (Jacobian-free) gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from equilibria.core.adjoint import Adjoint, AttachGraph, Forward


@dataclass(frozen=True)
class OneStep(Adjoint):
    """Differentiate one application of f at the fixed point and ignore the rest.

        dL/dtheta ~ g^T df/dtheta,   that is (I - J^T)^-1 replaced by I

    Biased by about the spectral radius of J; a descent direction when J is a strong contraction.
    Cheapest of all: one recorded evaluation and no backward solve.

    References:
        Fung et al., JFB: Jacobian-free backpropagation for implicit networks, arXiv 2103.12803.
    """

    @property
    def traceable(self) -> bool:
        """One more evaluation is all there is to it."""
        return True

    def attach(self, forward: Forward, z: Tensor) -> Tensor:
        """Record one evaluation at z and attach it."""
        return AttachGraph.apply(z, forward.problem.image(z.detach()), "OneStep")
