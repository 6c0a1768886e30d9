"""The spectral radius at a fixed point; `tests/diagnostics/test_spectrum.py` has the algorithm."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from equilibria import Residual, UserError, solve
from equilibria.regularizers.spectral_radius import spectral_radius, spectrum
from equilibria.testing import jacobian
from equilibria.testing import spectral_radius as dense_radius
from equilibria.testing.designed import designed_problem


def test_of_a_solution_it_is_that_of_the_solved_map(make_deq, x):
    deq = make_deq()
    solution = deq(x)
    found = spectral_radius(solution)
    wanted = dense_radius(jacobian(solution.function, solution.z.detach()))
    torch.testing.assert_close(found.radius, wanted, rtol=1e-10, atol=0.0)
    assert bool(found.converged.all())
    assert not found.radius.requires_grad


@pytest.mark.parametrize("kind", ["tensor", "tree"])
def test_a_rotation_of_radius_nine_tenths(kind):
    """Where power iteration with a Rayleigh quotient says 0."""

    def turned(z: Tensor) -> Tensor:
        return 0.9 * torch.stack((-z[:, 1], z[:, 0]), 1) + 0.1

    if kind == "tensor":
        solution = solve(turned, torch.zeros(3, 2, dtype=torch.float64))
    else:

        def f(z: dict[str, Tensor]) -> dict[str, Tensor]:
            image = turned(torch.cat((z["a"], z["b"]), 1))
            return {"a": image[:, :1], "b": image[:, 1:]}

        zeros = torch.zeros(3, 1, dtype=torch.float64)
        solution = solve(f, {"a": zeros, "b": zeros})
    found = spectral_radius(solution)
    torch.testing.assert_close(found.radius, torch.full((3,), 0.9, dtype=torch.float64))
    torch.testing.assert_close(found.angle, torch.full((3,), math.pi / 2, dtype=torch.float64))


@pytest.mark.parametrize("non_normality", [0.0, 1.0])
@pytest.mark.parametrize("radius", [0.1, 0.9, 1.5])
def test_where_it_says_converged_it_is_right(radius, non_normality):
    """To the tolerance, on wide states with a Krylov space far smaller."""
    for seed in range(5):
        given = designed_problem(
            shape=(60,),
            spectral_radius=radius,
            non_normality=0.1 * radius * non_normality,
            seed=seed,
        )
        wanted = dense_radius(jacobian(given.f, given.z_star))
        found = spectrum(given.f, given.z_star, num_vectors=20, num_restarts=5, tolerance=1e-3)
        error = (found.radius / wanted - 1.0).abs()
        assert bool((error[found.converged] < 1e-2).all())
        assert bool((error < 0.1).all())


def test_a_sample_does_not_depend_on_its_batch():
    """Nor on whether the others need another restart."""
    given = designed_problem(batch=4, shape=(60,), spectral_radius=0.9, seed=1)
    shift, weight = given.inputs
    easy = torch.cat((weight[:2], 0.5 * torch.eye(60, dtype=torch.float64).expand(2, 60, 60)))

    def f(z: Tensor, rows: slice) -> Tensor:
        return torch.tanh((easy[rows] * z.unsqueeze(1)).sum(2) + shift[rows])

    z = given.z_star
    together = spectrum(lambda z: f(z, slice(0, 4)), z, num_vectors=12)
    for i in range(4):
        rows = slice(i, i + 1)
        alone = spectrum(lambda z, rows=rows: f(z, rows), z[rows], num_vectors=12)
        torch.testing.assert_close(alone.radius, together.radius[rows])
        torch.testing.assert_close(alone.error, together.error[rows], rtol=1e-4, atol=1e-12)


def test_graphs_have_radii_of_their_own():
    index = torch.tensor([0, 1, 1, 0, 1])
    same = (index.unsqueeze(0) == index.unsqueeze(1)).double() * torch.rand(5, 5).double()
    solution = solve(
        lambda z: torch.tanh(0.3 * same @ z + 0.1),
        torch.zeros(5, 1, dtype=torch.float64),
        segments=index,
        termination=Residual(1e-10, 0.0),
    )
    matrix = (1.0 - solution.z.square()) * 0.3 * same
    wanted = [torch.linalg.eigvals(matrix[index == g][:, index == g]).abs().max() for g in (0, 1)]
    torch.testing.assert_close(spectral_radius(solution).radius, torch.stack(wanted))


def test_under_autocast_and_in_half_precision(make_deq, x):
    deq = make_deq(termination=Residual(1e-2)).float()
    wanted = spectral_radius(deq(x.float())).radius
    with torch.autocast("cpu", torch.bfloat16):
        found = spectral_radius(deq(x.float()))
    assert found.radius.dtype == torch.float32
    torch.testing.assert_close(found.radius, wanted, rtol=3e-2, atol=1e-3)


def test_it_says_when_it_does_not_know():
    """Forty eigenvalues on a circle, and a space of four vectors."""
    width = 40
    shift = torch.roll(torch.eye(width, dtype=torch.float64), 1, 0)
    z = torch.zeros(2, width, dtype=torch.float64)
    assert not bool(spectrum(lambda z: z @ shift.T, z, num_vectors=4).converged.any())
    whole = spectrum(lambda z: z @ shift.T, z, num_vectors=width)
    assert bool(whole.converged.all())
    torch.testing.assert_close(whole.radius, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_vectors": 0}, "num_vectors=0"),
        ({"num_restarts": -1}, "num_restarts=-1"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(UserError, match=message):
        spectrum(torch.cos, torch.zeros(2, 3), **options)


def test_inference_mode(make_deq, x):
    with torch.inference_mode(), pytest.raises(UserError, match=r"use torch.no_grad\(\) instead"):
        spectral_radius(make_deq()(x))
