"""Theorems that hold for the methods as such, whatever the problem."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equilibria import (
    GMRES,
    Anderson,
    BiCGStab,
    Broyden,
    FixedPoint,
    LinearSolver,
    Neumann,
    Picard,
    Residual,
    solve,
)
from equilibria.testing import Recorder
from equilibria.testing.linear_solver_contract import SYSTEMS, system


@settings(max_examples=20)
@given(
    batch=st.integers(1, 4),
    width=st.integers(1, 8),
    radius=st.floats(1.1, 5.0),
    seed=st.integers(0, 99),
)
def test_broyden_needs_at_most_twice_the_width_whatever_the_radius(
    batch: int, width: int, radius: float, seed: int
) -> None:
    """Gay (1979): on a linear problem of width n, Broyden's method ends within 2n steps."""
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(batch, width, width, dtype=torch.float64, generator=draw)
    matrix = (matrix - matrix.mT) * radius + 0.5 * torch.eye(width)
    z_star = torch.randn(batch, width, dtype=torch.float64, generator=draw)
    with torch.no_grad():
        solution = solve(
            lambda z: z_star + torch.einsum("bij,bj->bi", matrix, z - z_star),
            torch.zeros_like(z_star),
            solver=Broyden(history_size=None),
            termination=Residual(rtol=1e-7, atol=1e-7),
            max_steps=2 * width + 2,
            on_failure="raise",
        )
    torch.testing.assert_close(solution.z, z_star, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("name", SYSTEMS)
def test_no_method_needs_fewer_products_than_gmres(name: str) -> None:
    """Of all methods that use the same products, GMRES has the smallest residual."""
    given_system = system(name)

    def num_products(solver: LinearSolver) -> int:
        a = Recorder(given_system.a)
        with torch.no_grad():
            solver.solve(a, given_system.b, rtol=1e-8, atol=0.0, max_steps=200)
        return a.num_calls

    others = [GMRES(restart=4), BiCGStab(), Neumann()]
    others += [FixedPoint(solver) for solver in (Picard(), Anderson(), Broyden())]
    fewest = num_products(GMRES())
    assert fewest <= min(map(num_products, others))
    assert fewest <= given_system.b.shape[1] + 1
