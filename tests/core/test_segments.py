"""Ragged batches: every problem is solved as if it were alone."""

import pytest
import torch

from equilibria import Anderson, Broyden, Implicit, Picard, Residual, UserError, solve
from equilibria.core.segments import Segments

SIZES = [3, 1, 0, 5]
INDEX = torch.tensor([3, 0, 3, 1, 0, 3, 3, 0, 3])


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(INDEX.numel(), 2, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def adjacency() -> torch.Tensor:
    """Edges inside problems only, contracting, harder for larger problems."""
    same = INDEX.unsqueeze(0) == INDEX.unsqueeze(1)
    weights = torch.randn(INDEX.numel(), INDEX.numel(), dtype=torch.float64) * same
    return 0.9 * weights / weights.abs().sum(1, keepdim=True)


def propagate(adjacency, x):
    return lambda z: torch.tanh(adjacency @ z + x)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
def test_every_graph_converges_as_if_alone(solver, adjacency, x):
    options = {
        "solver": solver,
        "termination": Residual(1e-9, 0.0),
        "adjoint": Implicit(solver=solver, rtol=1e-9, max_steps=200),
        "max_steps": 200,
    }
    z0 = torch.zeros_like(x)
    together = solve(propagate(adjacency, x), z0, segments=INDEX, **options)
    together.z.square().sum().backward()
    assert together.status.shape == (4,)
    for graph in (0, 1, 3):
        rows = graph == INDEX
        own = x.detach()[rows].requires_grad_()
        alone = solve(propagate(adjacency[rows][:, rows], own), z0[rows], batch_dims=0, **options)
        alone.z.square().sum().backward()
        assert together.num_steps[graph] == alone.num_steps[0]
        torch.testing.assert_close(together.z[rows], alone.z, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(x.grad[rows], own.grad, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(
            together.residual[graph], alone.residual[0], rtol=1e-6, atol=1e-13
        )
        assert together.backward.result.num_steps[graph] == alone.backward.result.num_steps[0]


def test_padding_and_back_keeps_every_row():
    segments = Segments.of(INDEX)
    rows = torch.arange(18.0).reshape(9, 2)
    padded = segments.pad(rows)
    assert padded.shape == (4, 5 * 2)
    assert torch.equal(segments.unpad(padded, 2), rows)
    counted = [int((graph == INDEX).sum()) for graph in range(4)]
    assert counted == SIZES
    norms = padded.square().mean(1).sqrt() * segments.norm_scale
    for graph in (0, 1, 3):
        expected = rows[graph == INDEX].square().mean().sqrt()
        torch.testing.assert_close(norms[graph], expected.double())


def test_a_tree_of_states_shares_the_segments(adjacency, x):
    def f(z):
        return {"a": torch.tanh(adjacency @ z["b"] + x), "b": 0.5 * z["a"]}

    z0 = {"a": torch.zeros_like(x), "b": torch.zeros_like(x)}
    solution = solve(f, z0, segments=INDEX, termination=Residual(1e-10, 0.0), max_steps=200)
    image = f(solution.z)
    torch.testing.assert_close(image["a"], solution.z["a"], rtol=1e-8, atol=1e-9)
    assert bool(solution.converged.all())


@pytest.mark.parametrize(
    ("segments", "words"),
    [
        (torch.zeros(9), "integer"),
        (torch.zeros(3, 3, dtype=torch.long), "integer"),
        (torch.zeros(4, dtype=torch.long), "one entry per row"),
        (-torch.ones(9, dtype=torch.long), "numbered from 0"),
    ],
)
def test_bad_segments(segments, words, adjacency, x):
    with pytest.raises(UserError, match=words):
        solve(propagate(adjacency, x), torch.zeros_like(x), segments=segments)
    with pytest.raises(UserError, match="batch_dims"):
        solve(propagate(adjacency, x), torch.zeros_like(x), segments=INDEX, batch_dims=0)


def test_numbers_far_beyond_the_rows_are_refused_before_they_take_memory():
    index = torch.tensor([0, 10**8, 7])
    with pytest.raises(UserError, match=r"100000001 problems.*3 rows.*return_inverse=True"):
        solve(torch.cos, torch.ones(3, 2), segments=index)
    _, index = torch.unique(index, return_inverse=True)
    assert solve(torch.cos, torch.ones(3, 2), segments=index).status.shape == (3,)
