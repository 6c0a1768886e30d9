from __future__ import annotations

import math

import pytest
import torch

from equilibria.diagnostics.spectrum import Spectrum, spectrum
from equilibria.testing import PROBLEMS, FixedPointProblem, problem

KNOWN = [name for name in PROBLEMS if name != "no_fixed_point"]


@pytest.mark.parametrize("name", KNOWN)
def test_the_radius_is_that_of_the_dense_jacobian(name: str) -> None:
    given: FixedPointProblem = problem(name)
    found = spectrum(given.f, given.z_star)
    torch.testing.assert_close(found.radius, given.spectral_radius, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 2, 2.0, math.pi])
def test_complex_pairs_are_seen_with_their_angle(angle: float) -> None:
    """A rotation by 90 degrees has Rayleigh quotient 0, where power iteration reports 0."""
    turn = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    ).double()
    found = spectrum(lambda z: 0.9 * z @ turn.T, torch.zeros(3, 2, dtype=torch.float64))
    torch.testing.assert_close(found.radius, torch.full((3,), 0.9).double())
    torch.testing.assert_close(found.angle, torch.full((3,), angle).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "random", "non-normal"])
def test_large_states_with_few_products(kind: str, dtype: torch.dtype) -> None:
    width = 300
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(2, width, width, generator=draw, dtype=torch.float64) / math.sqrt(width)
    if kind == "normal":
        basis = torch.linalg.qr(matrix)[0]
        matrix = basis @ torch.diag(torch.linspace(-1.2, 0.9, width).double()) @ basis.mT
    if kind == "non-normal":
        matrix = 0.5 * matrix + torch.triu(matrix, 1)
    wanted = torch.linalg.eigvals(matrix).abs().amax(1)
    given = matrix.to(dtype)
    found = spectrum(
        lambda z: torch.einsum("bij,bj->bi", given, z), torch.zeros(2, width, dtype=dtype)
    )
    assert found.num_products <= 72
    # Many eigenvalues of nearly the same modulus: a tenth is what the doctor needs.
    torch.testing.assert_close(found.radius.double(), wanted, rtol=0.1, atol=0.0)


def test_a_map_without_z_or_without_samples() -> None:
    assert spectrum(lambda z: torch.ones_like(z), torch.zeros(2, 3)).radius.tolist() == [0.0, 0.0]
    assert spectrum(lambda z: 0.5 * z, torch.zeros(0, 3)).radius.shape == (0,)


def test_a_tree() -> None:
    found = spectrum(lambda z: (0.5 * z[1], 2.0 * z[0]), (torch.zeros(2, 3), torch.zeros(2, 3)))
    torch.testing.assert_close(found.radius, torch.ones(2))


def test_nan_is_reported_as_nan() -> None:
    found = spectrum(lambda z: z.sqrt() * 0.0, torch.zeros(1, 3))
    assert bool(found.radius.isnan().all())


def test_what_is_reported_per_sample() -> None:
    """Outermost first, with the angle of the first; a NaN stays with its sample."""
    slopes = torch.tensor([[0.2, -0.9, 0.5], [0.0, 0.0, 0.0], [0.1, torch.nan, 0.3]]).double()
    found = spectrum(lambda z: slopes * z, torch.zeros_like(slopes))
    assert isinstance(found, Spectrum)
    torch.testing.assert_close(found.radius[:2], torch.tensor([0.9, 0.0]).double())
    assert found.radius[2].isnan()
    assert found.angle[0].item() == pytest.approx(math.pi)
    assert found.converged.tolist() == [True, True, False]
    torch.testing.assert_close(
        found.eigenvalues[0].real.sort().values, slopes[0].sort().values, rtol=1e-9, atol=1e-12
    )
    sizes = found.eigenvalues[0].abs()
    assert bool((sizes[:-1] >= sizes[1:] - 1e-12).all())
    assert bool((found.error[:2] < 1e-6).all())
    assert found.num_products >= 3
