"""Solver contracts on drawn shapes, batch sizes, dtypes and spectral radii."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equilibria import Anderson, Broyden, Picard, Residual, solve

SOLVERS = st.one_of(
    st.builds(Picard, relaxation=st.floats(0.5, 1.0)),
    st.builds(Anderson, history_size=st.integers(1, 8), relaxation=st.floats(0.7, 1.0)),
    st.builds(
        Broyden,
        history_size=st.one_of(st.none(), st.integers(5, 30)),
        relaxation=st.floats(0.8, 1.0),
    ),
)
SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)


@settings(max_examples=60)
@given(
    solver=SOLVERS,
    batch=st.integers(0, 4),
    shapes=st.lists(SHAPES, min_size=1, max_size=3),
    radius=st.floats(0.0, 0.9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_any_tree_of_any_shapes_is_solved(solver, batch, shapes, radius, dtype, data):
    """f(z) = z* + radius P (z - z*) with P a permutation within each leaf."""
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    z_star = [torch.randn(batch, *shape, dtype=dtype, generator=draw) for shape in shapes]
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    num_calls = 0

    def f(z: list[Tensor]) -> list[Tensor]:
        nonlocal num_calls
        num_calls += 1
        dims = [tuple(range(1, leaf.dim())) for leaf in z]
        return [s + radius * (leaf - s).flip(d) for s, leaf, d in zip(z_star, z, dims, strict=True)]

    with torch.no_grad():
        solution = solve(
            f,
            [torch.zeros_like(s) for s in z_star],
            solver=solver,
            termination=Residual(rtol=rtol, atol=rtol),
            max_steps=400,
            on_failure="raise",
        )
    assert solution.num_evals == num_calls
    assert solution.status.shape == (batch,)
    for found, wanted in zip(solution.z, z_star, strict=True):
        assert found.dtype == dtype
        # rms residual / (1 - radius) bounds the rms error of a sample over all of its leaves
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e3 * rtol)


@settings(max_examples=30)
@given(
    batch=st.integers(1, 4),
    width=st.integers(1, 8),
    radius=st.floats(1.1, 5.0),
    seed=st.integers(0, 99),
)
def test_broyden_needs_at_most_twice_the_width_whatever_the_radius(batch, width, radius, seed):
    """Gay (1979): on a linear problem of width n, Broyden's method ends within 2n steps."""
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(batch, width, width, dtype=torch.float64, generator=draw)
    matrix = (matrix - matrix.mT) * radius + torch.eye(width) * 0.5
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
