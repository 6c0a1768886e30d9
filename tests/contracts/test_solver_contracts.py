"""What every solver must do on every problem with a known fixed point."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equilibria import Residual, Solution, Solver, Status, solve

SETTINGS: dict[str, Any] = {
    "termination": Residual(rtol=1e-10, atol=1e-10),
    "max_steps": 150,
    "on_failure": "ignore",
}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def rms(x: Tensor) -> Tensor:
    return x.double().square().flatten(1).mean(1).sqrt()


def same(a: Solution, b: Solution) -> bool:
    """Whether two solutions agree to the last bit."""
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("z", "status", "residual", "num_steps")
    )


def test_finds_the_known_fixed_point_or_says_it_did_not(problem, solver, solvable):
    solution = solve(problem.f, problem.z0, solver=solver, **SETTINGS)
    error = (solution.z - problem.z_star).abs().amax(1)
    assert bool((error < problem.accuracy)[solution.converged].all())
    assert bool(solution.converged.all()) or not solvable, solution.status


def test_reports_the_residual_of_the_returned_state(problem, solver):
    solution = solve(problem.f, problem.z0, solver=solver, **SETTINGS)
    image = problem.f(solution.z)
    torch.testing.assert_close(solution.residual, rms(image - solution.z), rtol=1e-10, atol=1e-15)
    expected = solution.residual / rms(image).clamp_min(torch.finfo(torch.float64).tiny)
    torch.testing.assert_close(solution.relative_residual, expected, rtol=1e-10, atol=0.0)


def test_counts_every_call(problem, solver, record):
    f = record(problem.f)
    solution = solve(f, problem.z0, solver=solver, **SETTINGS)
    assert solution.num_evals == len(f.seen)
    assert solution.num_evals == 1 + int(solution.num_steps.max())


def test_finished_samples_do_not_move(problem, solver, record):
    f = record(problem.f)
    solution = solve(f, problem.z0, solver=solver, **SETTINGS)
    for row, num_steps in enumerate(solution.num_steps.tolist()):
        for seen in f.seen[num_steps + 1 :]:
            assert torch.equal(seen[row], solution.z[row])


def test_a_sample_does_not_depend_on_its_batch(problem, solver, solvable):
    # Rounding grows without bound where the solver does not converge.
    settings = SETTINGS | {"max_steps": 150 if solvable else 5}
    together = solve(problem.f, problem.z0, solver=solver, **settings)
    for row in range(len(problem.z0)):
        part = problem.rows(slice(row, row + 1))
        alone = solve(part.f, part.z0, solver=solver, **settings)
        assert torch.equal(alone.status, together.status[row : row + 1])
        assert torch.equal(alone.num_steps, together.num_steps[row : row + 1])
        torch.testing.assert_close(alone.z, together.z[row : row + 1], rtol=1e-12, atol=1e-12)


def test_a_nan_stays_in_its_sample(problem, solver, record):
    clean = record(problem.f)
    expected = solve(clean, problem.z0, solver=solver, **SETTINGS)
    bad, call = 2, min(3, int(expected.num_steps[2]))
    spoilt = record(problem.f, spoil=bad, from_call=call)
    solution = solve(spoilt, problem.z0, solver=solver, **SETTINGS)

    assert solution.status[bad] == Status.NONFINITE
    assert solution.num_steps[bad] == call
    candidates = torch.stack([z[bad] for z in clean.seen[:call]])
    residuals = torch.stack([rms(problem.f(z) - z)[bad] for z in clean.seen[:call]])
    assert torch.equal(solution.z[bad], candidates[residuals.argmin()])
    assert bool(torch.isfinite(solution.residual).all())
    assert all(bool(torch.isfinite(z).all()) for z in spoilt.seen)

    others = [row for row in range(len(problem.z0)) if row != bad]
    assert torch.equal(solution.z[others], expected.z[others])
    assert torch.equal(solution.status[others], expected.status[others])
    assert torch.equal(solution.num_steps[others], expected.num_steps[others])


def test_a_nan_at_the_start_returns_z0(easy_problem, solver, record):
    spoilt = record(easy_problem.f, spoil=1)
    solution = solve(spoilt, easy_problem.z0, solver=solver, **SETTINGS)
    assert solution.status.tolist() == [0, Status.NONFINITE, 0, 0]
    assert solution.num_steps[1] == 0
    assert torch.equal(solution.z[1], easy_problem.z0[1])


def test_same_call_same_bits_and_z0_untouched(problem, solver):
    z0 = problem.z0.clone()
    first = solve(problem.f, z0, solver=solver, **SETTINGS)
    second = solve(problem.f, z0, solver=solver, **SETTINGS)
    assert same(first, second)
    assert torch.equal(z0, problem.z0)


@pytest.mark.parametrize(
    ("dtype", "rtol", "accuracy"),
    [
        (torch.float64, 1e-10, 1e-8),
        (torch.float32, 1e-5, 1e-4),
        (torch.float16, 3e-3, 0.05),
        (torch.bfloat16, 2e-2, 0.2),
    ],
    ids=str,
)
def test_keeps_the_dtype_and_works_in_at_least_float32(easy_problem, solver, dtype, rtol, accuracy):
    dtypes_seen = set()

    def f(z: Tensor) -> Tensor:
        dtypes_seen.add(z.dtype)
        return easy_problem.f(z.double()).to(dtype)

    solution = solve(
        f,
        easy_problem.z0.to(dtype),
        solver=solver,
        termination=Residual(rtol=rtol, atol=0.0),
        max_steps=200,
        on_failure="raise",
    )
    assert dtypes_seen == {dtype}
    assert solution.z.dtype == dtype
    assert solution.residual.dtype == torch.promote_types(dtype, torch.float32)
    measured = rms(f(solution.z).double() - solution.z.double())
    torch.testing.assert_close(solution.residual.double(), measured, rtol=1e-5, atol=1e-15)
    assert bool(((solution.z - easy_problem.z_star).abs() < accuracy).all())


def test_the_scale_of_the_state_changes_nothing(easy_problem, solver):
    """A power of two only shifts exponents, so the whole solve must agree to the last bit."""
    scale = 2.0**-40
    settings = SETTINGS | {"termination": Residual(rtol=1e-8, atol=0.0)}
    plain = solve(easy_problem.f, easy_problem.z0, solver=solver, **settings)
    scaled = solve(
        lambda z: easy_problem.f(z / scale) * scale, easy_problem.z0, solver=solver, **settings
    )
    assert torch.equal(scaled.z, plain.z * scale)
    assert torch.equal(scaled.num_steps, plain.num_steps)


def test_an_empty_batch_is_no_failure(easy_problem, solver):
    part = easy_problem.rows(slice(0, 0))
    solution = solve(part.f, part.z0, solver=solver, **(SETTINGS | {"on_failure": "raise"}))
    assert solution.z.shape == (0, 6)
    assert solution.status.shape == solution.residual.shape == solution.num_steps.shape == (0,)


def test_one_step_at_most(easy_problem, solver, record):
    f = record(easy_problem.f)
    solution = solve(f, easy_problem.z0, solver=solver, **(SETTINGS | {"max_steps": 1}))
    assert solution.num_evals == len(f.seen) == 2
    assert solution.status.tolist() == [Status.MAX_STEPS] * 4
    assert solution.num_steps.tolist() == [1] * 4


def test_the_whole_state_as_one_problem(easy_problem, solver):
    solution = solve(easy_problem.f, easy_problem.z0, solver=solver, batch_dims=0, **SETTINGS)
    assert solution.status.tolist() == [Status.SUCCESS]
    assert solution.residual.shape == (1,)
    assert bool(((solution.z - easy_problem.z_star).abs() < 1e-8).all())


def test_a_scalar_as_one_problem(solver):
    solution = solve(
        torch.cos, torch.tensor(1.0, dtype=torch.float64), solver=solver, batch_dims=0, **SETTINGS
    )
    assert solution.z.shape == ()
    assert solution.z.item() == pytest.approx(0.7390851332151607, abs=1e-9)


@pytest.mark.parametrize("layout", ["strided", "expanded", "channels_last", "channels_last_3d"])
def test_memory_layouts_of_z0(solver: Solver, layout: str):
    shape = (2, 3, 4, 5, 6) if layout == "channels_last_3d" else (2, 3, 4, 5)
    z_star = torch.randn(shape, dtype=torch.float64)
    z0 = {
        "strided": lambda: torch.zeros(2, 5, 4, 3, dtype=torch.float64).permute(0, 3, 2, 1),
        "expanded": lambda: torch.zeros((), dtype=torch.float64).expand(shape),
        "channels_last": lambda: torch.zeros_like(z_star, memory_format=torch.channels_last),
        "channels_last_3d": lambda: torch.zeros_like(z_star, memory_format=torch.channels_last_3d),
    }[layout]()
    strides_seen = []

    def f(z: Tensor) -> Tensor:
        strides_seen.append(z.stride())
        return z_star + 0.5 * (z - z_star).flip(1)

    solution = solve(f, z0, solver=solver, **SETTINGS)
    torch.testing.assert_close(solution.z, z_star, rtol=0.0, atol=1e-8)
    wanted = z0.stride() if layout.startswith("channels_last") else z_star.stride()
    assert set(strides_seen[1:]) == {wanted}  # the first call may see z0 as it is
    assert solution.z.stride() == wanted
