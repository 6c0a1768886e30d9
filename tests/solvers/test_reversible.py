"""Steps that can be undone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from equilibria import FixedSteps, UserError, solve
from equilibria.core.iterate import Iterate
from equilibria.solvers.reversible import Reversible


def make_map(dtype: torch.dtype):
    weight = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0].to(dtype)
    shift = torch.randn(3, 8, dtype=torch.float64).to(dtype)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight + shift)

    return f


def there_and_back(f, z0: Tensor, relaxation: float, num_steps: int) -> float:
    """Largest relative error of the start after so many steps and their undoing."""
    solver = Reversible(relaxation, reconstruction_tolerance=None)
    iterate = Iterate(z0, f(z0))
    state = solver.init(iterate, num_steps)
    for _ in range(num_steps):
        iterate, state = solver.step(lambda z: Iterate(z, f(z)), iterate, state)
    y, z = state.y, iterate.z
    for _ in range(num_steps):
        z = (z - relaxation * f(y)) / (1 - relaxation)
        y = (y - relaxation * f(z)) / (1 - relaxation)
    return float(((z - z0).norm(dim=1) / z0.norm(dim=1)).max())


@pytest.mark.parametrize("relaxation", [0.2, 0.5, 0.8])
def test_makes_the_coupled_steps(relaxation):
    f = make_map(torch.float64)
    z0 = torch.randn(3, 8, dtype=torch.float64)
    y = z = z0
    for _ in range(5):
        y = (1 - relaxation) * y + relaxation * f(z)
        z = (1 - relaxation) * z + relaxation * f(y)
    solver = Reversible(relaxation, reconstruction_tolerance=None)
    with torch.no_grad():
        found = solve(f, z0, solver=solver, termination=FixedSteps(5))
    torch.testing.assert_close(found.z, z, rtol=1e-13, atol=1e-13)
    assert found.num_evals == 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("relaxation", [0.3, 0.5, 0.8])
def test_within_the_limit_the_start_comes_back(dtype, relaxation):
    limit = Reversible(relaxation).max_reversible_steps(dtype)
    z0 = torch.randn(3, 8, dtype=torch.float64).to(dtype)
    assert there_and_back(make_map(dtype), z0, relaxation, limit) < 1e-2


def test_the_limit_is_not_idle_caution():
    """Three times as many steps and the start is lost."""
    f, z0 = make_map(torch.float32), torch.randn(3, 8)
    limit = Reversible(0.5).max_reversible_steps(torch.float32)
    assert there_and_back(f, z0, 0.5, 3 * limit) > 1e-2


def test_the_limits_that_the_docs_name():
    assert Reversible(0.5).max_reversible_steps(torch.float32) == 8
    assert Reversible(0.5).max_reversible_steps(torch.float64) == 22
    assert Reversible(0.3).max_reversible_steps(torch.float32) == 15
    assert Reversible(0.3).max_reversible_steps(torch.float64) == 44


def test_a_solve_that_cannot_be_undone_is_refused():
    z0 = torch.zeros(2, 3)
    settings = {"termination": FixedSteps(3), "on_failure": "ignore"}
    solve(torch.cos, z0, solver=Reversible(), max_steps=8, **settings)
    with pytest.raises(UserError, match="max_steps=9 steps in torch.float32.*at most 8.*float64"):
        solve(torch.cos, z0, solver=Reversible(), max_steps=9, **settings)
    solve(torch.cos, z0.double(), solver=Reversible(), max_steps=22, **settings)
    with pytest.raises(UserError, match="at most 22"):
        solve(torch.cos, z0.double(), solver=Reversible(), max_steps=23, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reversible(1.0), "relaxation=1.0 of Reversible must lie between 0 and 1"),
        (lambda: Reversible(0.0), "relaxation=0.0"),
        (lambda: Reversible(math.nan), "relaxation=nan"),
        (lambda: Reversible(reconstruction_tolerance=-1.0), "reconstruction_tolerance=-1.0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(UserError, match=message):
        make()
