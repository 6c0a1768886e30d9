"""What the solvers with several evaluations a step, masks or memory of their own must keep.

The contracts of tests/contracts count one evaluation a step; these hold for any number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from equilibria import (
    Anderson,
    Broyden,
    FixedSteps,
    Picard,
    Residual,
    Solution,
    Solver,
    Status,
    Unrolled,
    solve,
)
from equilibria.solvers.fallback import Fallback
from equilibria.solvers.newton_krylov import NewtonKrylov
from equilibria.solvers.reversible import Reversible

pytestmark = pytest.mark.usefixtures("steps")

SOLVERS: dict[str, Solver] = {
    "anderson-I": Anderson(kind="I"),
    "anderson-I-damped": Anderson(kind="I", relaxation=0.8),
    "anderson-restart": Anderson(restart=4),
    "anderson-guarded": Anderson(safeguard=1.0),
    "anderson-I-guarded": Anderson(kind="I", relaxation=0.9, safeguard=2.0),
    "broyden-bad": Broyden(kind="bad"),
    "broyden-bad-4": Broyden(4, kind="bad"),
    "broyden-search": Broyden(line_search=True),
    "newton": NewtonKrylov(),
    "newton-plain": NewtonKrylov(line_search=False, products="forward"),
    "newton-backward": NewtonKrylov(products="double_backward"),
    "newton-difference": NewtonKrylov(products="difference"),
    "fallback": Fallback(Picard(), Anderson(), Broyden(), num_steps=3),
    "fallback-steps": Fallback(Picard(), NewtonKrylov(), Broyden(line_search=True), num_steps=2),
    "reversible": Reversible(reconstruction_tolerance=None),
}
SETTINGS: dict[str, Any] = {
    "termination": Residual(1e-9, 1e-12),
    "max_steps": 200,
    "on_failure": "ignore",
}

RADII = torch.tensor([0.0, 0.5, 0.9, 1.4], dtype=torch.float64).view(4, 1, 1)


def make_map(rows: slice = slice(None), spoil: int | None = None) -> Callable[[Tensor], Tensor]:
    """tanh maps of growing gain, so that every sample goes its own way; one may be spoilt."""
    draw = torch.Generator().manual_seed(5)
    weight = torch.randn(4, 6, 6, dtype=torch.float64, generator=draw)
    weight = RADII * weight / torch.linalg.matrix_norm(weight, 2).view(4, 1, 1)
    shift = torch.randn(4, 6, dtype=torch.float64, generator=draw)
    weight, shift = weight[rows], shift[rows]
    num_calls = 0

    def f(z: Tensor) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        image = torch.tanh((weight * z.double().unsqueeze(1)).sum(2) + shift).to(z.dtype)
        if spoil is None or num_calls < 3:
            return image
        bad = torch.arange(len(image)).unsqueeze(1) == spoil
        return torch.where(bad, torch.nan, image)

    return f


def run(f: Callable[[Tensor], Tensor], solver: Solver, batch: int = 4, **changes: Any) -> Solution:
    z0 = torch.zeros(batch, 6, dtype=changes.pop("dtype", torch.float64))
    with torch.no_grad():
        return solve(f, z0, solver=solver, **(SETTINGS | changes))


@pytest.fixture(params=SOLVERS)
def solver(request: pytest.FixtureRequest) -> Solver:
    return SOLVERS[request.param]


def test_solves_and_reports_honestly(solver):
    f, calls = make_map(), []

    def counted(z: Tensor) -> Tensor:
        calls.append(1)
        return f(z)

    solution = run(counted, solver)
    assert bool(solution.converged.all()), solution.status
    assert solution.num_evals == len(calls)
    residual = (f(solution.z) - solution.z).square().mean(1).sqrt()
    torch.testing.assert_close(solution.residual, residual, rtol=1e-10, atol=1e-16)


def test_a_sample_does_not_depend_on_its_batch(solver):
    together = run(make_map(), solver)
    for row in range(4):
        alone = run(make_map(slice(row, row + 1)), solver, batch=1)
        assert torch.equal(alone.status, together.status[row : row + 1])
        assert torch.equal(alone.num_steps, together.num_steps[row : row + 1])
        torch.testing.assert_close(alone.z[0], together.z[row], rtol=1e-8, atol=1e-10)


def test_a_nan_stays_in_its_sample(solver):
    clean, spoilt = run(make_map(), solver), run(make_map(spoil=2), solver)
    others = [0, 1, 3]
    assert spoilt.status[2] == Status.NONFINITE
    assert bool(torch.isfinite(spoilt.z).all())
    assert bool(torch.isfinite(spoilt.residual).all())
    assert torch.equal(spoilt.status[others], clean.status[others])
    assert torch.equal(spoilt.num_steps[others], clean.num_steps[others])
    torch.testing.assert_close(spoilt.z[others], clean.z[others], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrow_states(solver, dtype, rtol):
    rows = slice(0, 3)
    exact = run(make_map(rows), solver, batch=3).z
    found = run(make_map(rows), solver, batch=3, dtype=dtype, termination=Residual(rtol))
    assert found.z.dtype == dtype
    assert found.residual.dtype == torch.float32
    assert bool(found.converged.all())
    torch.testing.assert_close(found.z.double(), exact, rtol=0.0, atol=20 * rtol)


def test_same_call_same_bits(solver):
    first, second = run(make_map(), solver), run(make_map(), solver)
    assert torch.equal(first.z, second.z)
    assert first.num_evals == second.num_evals


def test_an_empty_batch(solver):
    assert run(make_map(slice(0, 0)), solver, batch=0).z.shape == (0, 6)


UNROLLABLE = [
    name for name in SOLVERS if not name.startswith("newton") and name != "fallback-steps"
]


@pytest.mark.parametrize("max_steps", [4, 5])
@pytest.mark.parametrize("name", UNROLLABLE)
def test_unrolled_gradients_meet_finite_differences(name, max_steps):
    """Also where the last step is the last that is allowed."""
    draw = torch.Generator().manual_seed(2)
    weight = torch.randn(3, 3, dtype=torch.float64, generator=draw) / 3
    shift = torch.randn(2, 3, dtype=torch.float64, generator=draw)

    def unrolled(weight: Tensor, shift: Tensor) -> Tensor:
        return solve(
            lambda z: torch.tanh(z @ weight + shift),
            torch.zeros(2, 3, dtype=torch.float64),
            solver=SOLVERS[name],
            adjoint=Unrolled(),
            termination=FixedSteps(4),
            max_steps=max_steps,
            keep="last",
        ).z

    inputs = (weight.requires_grad_(), shift.requires_grad_())
    # The masks of a guard and the choices of a line search are piecewise constant.
    assert torch.autograd.gradcheck(unrolled, inputs, eps=1e-7, atol=1e-5)
