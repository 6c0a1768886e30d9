"""Anderson acceleration against a dense least-squares reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from equilibria import Anderson, FixedSteps, Picard, Residual, solve

pytestmark = pytest.mark.usefixtures("steps")


def reference(
    f: Callable[[np.ndarray], np.ndarray],
    z0: np.ndarray,
    num_steps: int,
    history_size: int,
    relaxation: float,
) -> np.ndarray:
    """One sample, no batch: minimise |r_k - R gamma| by lstsq over the window, then mix."""
    points, images = [z0], [f(z0)]
    for _ in range(num_steps):
        residuals = [image - point for image, point in zip(images, points, strict=True)]
        z = points[-1] + relaxation * residuals[-1]
        if len(points) > 1:
            window = slice(-history_size - 1, None)
            differences = np.diff(np.stack(residuals[window]), axis=0).T
            steps = np.diff(np.stack(points[window]), axis=0).T
            gamma = scipy.linalg.lstsq(differences, residuals[-1])[0]
            z = z - (steps + relaxation * differences) @ gamma
        points.append(z)
        images.append(f(z))
    return points[-1]


@pytest.mark.parametrize("relaxation", [1.0, 0.6])
@pytest.mark.parametrize("history_size", [1, 3, 5])
def test_equals_least_squares_on_the_same_window(history_size, relaxation):
    weight = torch.randn(3, 12, 12, dtype=torch.float64) / 4
    shift = torch.randn(3, 12, dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        return torch.tanh((weight @ z.unsqueeze(2)).squeeze(2) + shift)

    z0 = torch.randn(3, 12, dtype=torch.float64)
    for num_steps in (1, 2, 4, 8):
        with torch.no_grad():
            found = solve(
                f,
                z0,
                solver=Anderson(history_size, relaxation, ridge=0.0, min_angle=0.0, kind="II"),
                termination=FixedSteps(num_steps),
            ).z
        for row in range(3):
            w, s = weight[row].numpy(), shift[row].numpy()
            wanted = reference(
                lambda z, w=w, s=s: np.tanh(w @ z + s),
                z0[row].numpy(),
                num_steps,
                history_size,
                relaxation,
            )
            np.testing.assert_allclose(found[row].numpy(), wanted, rtol=1e-8, atol=1e-10)


def test_a_long_window_solves_a_linear_problem_in_as_many_steps_as_it_has_dimensions():
    """Anderson with a full window is GMRES on a linear problem (Walker and Ni, theorem 2.2)."""
    matrix = torch.randn(2, 6, 6, dtype=torch.float64)
    z_star = torch.randn(2, 6, dtype=torch.float64)
    solution = solve(
        lambda z: z_star + torch.einsum("bij,bj->bi", matrix, z - z_star),
        torch.zeros(2, 6, dtype=torch.float64),
        solver=Anderson(history_size=7, ridge=0.0, min_angle=0.0),
        termination=Residual(1e-9),
        on_failure="raise",
    )
    assert int(solution.num_steps.max()) <= 7


def test_a_huge_ridge_is_plain_iteration():
    z0 = torch.randn(3, 4, dtype=torch.float64)
    mixed, plain = (
        solve(torch.cos, z0, solver=solver, termination=FixedSteps(5)).z
        for solver in (Anderson(ridge=1e14), Picard())
    )
    torch.testing.assert_close(mixed, plain, rtol=1e-10, atol=1e-10)


def test_needs_fewer_evaluations_than_plain_iteration():
    counts = []
    for solver in (Anderson(), Picard()):
        solution = solve(
            lambda z: torch.cos(z).flip(1),
            torch.zeros(4, 6),
            solver=solver,
            termination=Residual(1e-6),
            on_failure="raise",
        )
        counts.append(solution.num_evals)
    assert counts[0] < counts[1] / 2
