"""A truncated Neumann series: a cheap gradient in constant memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.core.adjoint import Adjoint, AttachGraph, Forward
from equilibria.core.clock import clock
from equilibria.core.closure import is_constant
from equilibria.core.iterate import rms
from equilibria.core.jacobian import transposed_jacobian
from equilibria.core.parameters import check_above_zero, check_positive_integer


@dataclass(frozen=True)
class NeumannSeries(Adjoint):
    """Approximate (I - J^T)^-1 by the first terms of its series.

        u = g + J^T g + ... + (J^T)^k g

    Biased by about (spectral radius)^(k+1). Unlike `Phantom` it records one evaluation, whatever
    k; unlike `Implicit` it does a fixed amount of work and has no solve that could fail.

    Cost: k vector-Jacobian products. Memory: one recorded evaluation.

    Args:
        num_terms: terms after the first (k). 0 would be `OneStep`.
        clip: longest allowed term relative to g, per sample; longer ones are scaled down, so that
            a Jacobian with spectral radius above 1 cannot blow the gradient up. None: no clipping.

    Raises:
        UserError: num_terms below 1, clip not above 0.

    References:
        Geng et al., On training implicit models, arXiv 2111.05177, equation 8 (Neumann form).
    """

    num_terms: int = 5
    clip: float | None = None

    def __post_init__(self) -> None:
        check_positive_integer("num_terms", self.num_terms)
        if self.clip is not None:
            check_above_zero("clip", self.clip, "or None for no clipping")

    def attach(self, forward: Forward, z: Tensor) -> Tensor:
        """Record one evaluation at z and attach the series to it."""
        taped, inputs = forward.problem.tape(z)
        if is_constant(taped.fz, taped.z, inputs):
            return z.clone()
        product = transposed_jacobian(taped)

        def series(g: Tensor) -> Tensor:
            start = clock()
            total = term = g
            for _ in range(self.num_terms):
                term = self._clipped(product(term), g)
                total = total + term
            forward.report.seconds += clock() - start
            return total

        return AttachGraph.apply(z, taped.fz, "NeumannSeries", series)

    def _clipped(self, term: Tensor, g: Tensor) -> Tensor:
        if self.clip is None:
            return term
        longest = self.clip * rms(g)
        length = rms(term)
        factor = torch.where(length > longest, longest / length, 1.0)
        return term * factor.unsqueeze(1)
