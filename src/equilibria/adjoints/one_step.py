"""The one-step (Jacobian-free) gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.core.adjoint import Adjoint, AttachGraph, Forward
from equilibria.core.loop import LoopResult


@dataclass(frozen=True)
class OneStep(Adjoint):
    """Differentiate one application of f at the fixed point and ignore the rest.

        dL/dtheta ~ g^T df/dtheta,   that is (I - J^T)^-1 replaced by I

    Biased by about the spectral radius of J; a descent direction when J is a strong contraction.
    Cheapest of all: one recorded evaluation and no backward solve.

    References:
        Fung et al., JFB: Jacobian-free backpropagation for implicit networks, arXiv 2103.12803.
    """

    def apply(self, forward: Forward) -> tuple[Tensor, LoopResult]:
        """Solve without a graph and attach one recorded evaluation."""
        with torch.no_grad():
            result = forward.run()
        taped, _ = forward.problem.tape(result.iterate.z)
        return AttachGraph.apply(result.iterate.z, taped.fz, "OneStep"), result
