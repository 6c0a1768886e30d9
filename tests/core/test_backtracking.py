"""Halving a step until the residual falls, or taking the best of what was tried."""

from __future__ import annotations

import torch
from torch import Tensor

from equilibria.core.backtracking import backtrack
from equilibria.core.iterate import Iterate


def test_if_no_point_will_do_the_best_one_tried_is_taken():
    """The first sample is best half way, the second at once: neither is the last point tried."""
    residuals = ({1.0: 5.0, 0.5: 3.0}, {1.0: 4.0})

    def residual(sample: int, z: float) -> float:
        return 1.0 if z == 0.0 else residuals[sample].get(z, 6.0)

    def evaluate(z: Tensor) -> Iterate:
        r = [residual(sample, float(row)) for sample, row in enumerate(z)]
        return Iterate(z, z + torch.tensor(r).unsqueeze(1))

    found = backtrack(evaluate, evaluate(torch.zeros(2, 1)), torch.ones(2, 1))  # type: ignore[arg-type]
    assert found.z.flatten().tolist() == [0.5, 1.0]
    assert (found.fz - found.z).flatten().tolist() == [3.0, 4.0]


def test_the_first_point_that_falls_is_taken():
    def evaluate(z: Tensor) -> Iterate:
        return Iterate(z, z + (z - 0.25).abs() + 0.1)

    found = backtrack(evaluate, evaluate(torch.zeros(1, 1)), torch.ones(1, 1))  # type: ignore[arg-type]
    assert found.z.item() == 0.25
