"""A state that runs away is no solution, however small its residual becomes by rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from equilibria import Anderson, Broyden, Measurement, Picard, Residual, Status, solve
from equilibria.core.status import RUNNING

DTYPES = [torch.float32, torch.float64]
SOLVERS = [Anderson(), Anderson(history_size=10, ridge=0.0), Broyden(), Broyden(None), Picard()]


def codes_along(rule: Residual, residuals: list[float], images: list[float]) -> list[int]:
    """Codes of one sample (float64) that shows these norms one after the other."""
    codes, state = [], None
    for step, norms in enumerate(zip(residuals, images, strict=True)):
        measurement = Measurement(*torch.tensor(norms, dtype=torch.float64).unsqueeze(1))
        state = rule.init(measurement) if step == 0 else state
        code, state = rule.check(measurement, step, state)
        codes.append(RUNNING if code is None else int(code))
    return codes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("z0", [0.0, 1.0])
def test_a_map_without_fixed_point_has_none(solver, dtype, rtol, z0):
    """Also with a slope that rounding turns into 1, and with a curve that never bends back."""
    almost = 1.0 + torch.finfo(dtype).eps * torch.tensor([-8.0, -1.0, 1.0, 8.0], dtype=dtype)
    for f in (
        lambda z: z + 1.0,
        lambda z: almost.unsqueeze(1) * z + 1.0,
        lambda z: z + 1.0 + 0.1 * torch.sin(z),
    ):
        with torch.no_grad():
            solution = solve(
                f,
                torch.full((4, 3), z0, dtype=dtype),
                solver=solver,
                termination=Residual(rtol),
                max_steps=80,
                on_failure="ignore",
            )
        assert not bool(solution.converged.any()), (solution.status, solution.z[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS[:4], ids=repr)
def test_a_clearly_inconsistent_singular_system_has_no_solution(solver, dtype):
    """One eigenvalue is 1 and half of the constant lies along it; without the guard nearly all
    of these runs end as a success at |z| from 1e5 to 1e17."""
    batch, width = 100, 8
    rotation = torch.linalg.qr(torch.randn(batch, width, width, dtype=torch.float64))[0]
    eigenvalues = torch.rand(batch, width, dtype=torch.float64) * 1.8 - 0.9
    eigenvalues[:, 0] = 1.0
    matrix = (rotation @ torch.diag_embed(eigenvalues) @ rotation.mT).to(dtype)
    constant = torch.randn(batch, width, dtype=torch.float64) / width**0.5 + rotation[:, :, 0]

    def f(z: Tensor) -> Tensor:
        return torch.einsum("bij,bj->bi", matrix, z) + constant.to(dtype)

    def num_accepted(max_growth: float | None) -> int:
        with torch.no_grad():
            solution = solve(
                f,
                torch.zeros(batch, width, dtype=dtype),
                solver=solver,
                termination=Residual(1e-4, max_growth=max_growth),
                on_failure="ignore",
            )
        return int(solution.converged.sum())

    assert num_accepted(None) > batch // 2
    assert num_accepted(100.0) <= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS[:4], ids=repr)
def test_a_far_solution_is_still_found(solver, dtype):
    """z* is 100 or 1000 times the first image: the guard asks for more, and gets it."""
    factor = torch.tensor([[0.99], [0.999]], dtype=dtype)
    solution = solve(
        lambda z: factor * z + 1.0,
        torch.zeros(2, 3, dtype=dtype),
        solver=solver,
        termination=Residual(1e-3),
        on_failure="raise",
    )
    torch.testing.assert_close(solution.z, (1.0 / (1.0 - factor)).expand(2, 3), rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
def test_growth_out_of_a_tiny_start_is_no_runaway(solver):
    """f(0) = 1e-9, but the solution that attracts is of size one."""
    solution = solve(
        lambda z: torch.tanh(3.0 * z) + 1e-9,
        torch.zeros(2, 4),
        solver=solver,
        termination=Residual(1e-4, atol=0.0),
        on_failure="raise",
    )
    assert bool(solution.converged.all())


def test_the_tolerance_shrinks_with_the_square_of_the_growth():
    rule = Residual(rtol=1e-4, atol=0.0, max_growth=100.0)
    assert codes_along(rule, [1.0, 0.99e-2], [1.0, 100.0])[1] == Status.SUCCESS
    assert codes_along(rule, [1.0, 0.99e-3], [1.0, 1000.0])[1] == Status.SUCCESS
    assert codes_along(rule, [1.0, 1.01e-3], [1.0, 1000.0])[1] == RUNNING


def test_a_residual_of_zero_far_away_is_not_believed():
    rule = Residual(rtol=1e-4, atol=1e-6)
    assert codes_along(rule, [1.0, 0.0], [1.0, 1e12])[1] == RUNNING
    assert codes_along(rule, [1.0, 0.0], [1.0, 1e16])[1] == Status.DIVERGED
    assert codes_along(Residual(max_growth=None), [1.0, 0.0], [1.0, 1e16])[1] == Status.SUCCESS


def test_a_far_residual_does_not_move_the_scale():
    rule = Residual(rtol=1e-4, atol=0.0)
    assert codes_along(rule, [1.0, 1e10, 0.3], [1.0, 1e12, 1e12])[2] == RUNNING


def test_a_warm_start_is_judged_by_its_image():
    rule = Residual(rtol=1e-4, atol=0.0)
    assert codes_along(rule, [2e-2, 0.9e-2], [100.0, 100.0]) == [RUNNING, Status.SUCCESS]
