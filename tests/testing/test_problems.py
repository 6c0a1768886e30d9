"""The problems are what they say, and the references agree with independent formulas."""

from __future__ import annotations

import pytest
import torch

from equilibria import UserError
from equilibria.testing import PROBLEMS, implicit_gradients, jacobian, newton, problem
from equilibria.testing.dense import full_jacobian


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_fixed_point_is_one(name: str, dtype: torch.dtype) -> None:
    given = problem(name, batch=3, dtype=dtype, seed=2)
    assert given.name == name
    assert {t.dtype for t in (given.z0, *given.sources)} == {dtype}
    assert given.f(given.z0).shape == given.z0.shape
    if given.z_star is None:
        assert given.tags == {"no_solution"}
        return
    exact = given.to(torch.float64)
    torch.testing.assert_close(exact.f(given.z_star), given.z_star, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_tags_are_true(name: str) -> None:
    given = problem(name)
    radius = given.spectral_radius
    if "contraction" in given.tags:
        assert bool((radius < 0.95).all())
    if "expansive" in given.tags:
        assert bool((radius > 1).all())
    if "singular" in given.tags:
        assert bool(given.conditioning.isinf().all())
    if "linear" in given.tags:
        here, there = given.jacobian(given.z0), given.jacobian(torch.randn_like(given.z0))
        torch.testing.assert_close(here, there)


@pytest.mark.parametrize("name", PROBLEMS)
def test_samples_are_independent_and_seeds_count(name: str) -> None:
    given, again = problem(name, seed=1), problem(name, seed=1)
    assert torch.equal(given.f(given.z0), again.f(again.z0))
    part = given.rows(slice(1, 2))
    torch.testing.assert_close(part.f(part.z0), given.f(given.z0)[1:2])


def test_half_precision_is_exact() -> None:
    given = problem("half_precision", dtype=torch.bfloat16)
    assert torch.equal(given.f(given.z_star.bfloat16()).double(), given.z_star)


def test_dense_references_against_formulas() -> None:
    """f(z) = w A z + c has J = w A and dz*/dw = (I - w A)^-1 A z*."""
    matrix = 0.3 * torch.randn(5, 5, dtype=torch.float64)
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    c = torch.randn(2, 5, dtype=torch.float64)
    z_star = torch.linalg.solve(torch.eye(5) - 0.7 * matrix, c.T).T
    torch.testing.assert_close(newton(lambda z: w * z @ matrix.T + c, torch.zeros_like(c)), z_star)
    found = jacobian(lambda z: w * z @ matrix.T + c, z_star)
    torch.testing.assert_close(found, (0.7 * matrix).expand(2, 5, 5))
    whole = full_jacobian(lambda z: z + z.mean(0), c)
    assert bool((whole[0, 5] - 0.5).abs() < 1e-12)
    g = torch.randn_like(c)
    (gradient,) = implicit_gradients(lambda z: w * z @ matrix.T + c, z_star, g, [w])
    sensitivity = torch.linalg.solve(torch.eye(5) - 0.7 * matrix, (z_star @ matrix.T).T).T
    torch.testing.assert_close(gradient, (g * sensitivity).sum())


def test_errors_say_what_to_do() -> None:
    with pytest.raises(UserError, match="did you mean 'rotation'"):
        problem("rotaton")
    with pytest.raises(UserError, match="found no fixed point"):
        newton(lambda z: z + 1.0, torch.zeros(1, 2), max_steps=3)
