"""Broyden's method against the matrix it stands for, written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from equilibria import Broyden, FixedSteps, solve


def reference(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    num_steps: int,
    history_size: int | None,
    relaxation: float,
) -> Tensor:
    """One sample: B starts at -I and takes the retained pairs in order, oldest first."""

    def g(z: Tensor) -> Tensor:
        return f(z) - z

    z, pairs = z0, []
    for _ in range(num_steps):
        b = -torch.eye(len(z), dtype=z.dtype)
        for s, y in pairs[-history_size:] if history_size else pairs:
            b = b + torch.outer(y - b @ s, s) / s.dot(s)
        new = z - relaxation * torch.linalg.solve(b, g(z))
        pairs.append((new - z, g(new) - g(z)))
        z = new
    return z


@pytest.mark.parametrize("relaxation", [1.0, 0.7])
@pytest.mark.parametrize("history_size", [1, 2, 4, 12, None])
def test_equals_dense_updates_with_the_retained_pairs(history_size, relaxation):
    """Windows of 1, 2 and 4 forget pairs within 9 steps; 12 and None keep them all."""
    weight = torch.randn(3, 12, 12, dtype=torch.float64) / 4
    shift = torch.randn(3, 12, dtype=torch.float64)
    z0 = torch.randn(3, 12, dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        return torch.tanh((weight @ z.unsqueeze(2)).squeeze(2) + shift)

    for num_steps in (1, 2, 5, 9):
        with torch.no_grad():
            found = solve(
                f,
                z0,
                solver=Broyden(history_size, relaxation),
                termination=FixedSteps(num_steps),
                max_steps=20,
            ).z
        for row in range(3):
            wanted = reference(
                lambda z, row=row: torch.tanh(weight[row] @ z + shift[row]),
                z0[row],
                num_steps,
                history_size,
                relaxation,
            )
            torch.testing.assert_close(found[row], wanted, rtol=1e-9, atol=1e-10)


def test_a_window_that_fits_changes_nothing():
    solutions = [
        solve(torch.cos, torch.zeros(2, 5), solver=Broyden(size), max_steps=12)
        for size in (12, 40, None)
    ]
    for other in solutions[1:]:
        assert torch.equal(solutions[0].z, other.z)
