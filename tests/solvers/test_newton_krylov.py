"""Inexact Newton."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from equilibria import (
    GMRES,
    Implicit,
    LinearResult,
    LinearSolver,
    Residual,
    Unrolled,
    UserError,
    solve,
)
from equilibria.solvers.newton_krylov import NewtonKrylov, NewtonKrylovState, _forcing

TIGHT: dict[str, Any] = {"termination": Residual(1e-12, 0.0), "on_failure": "raise"}


def test_one_step_solves_a_linear_problem_when_told_to_be_exact():
    """With 12 products the Krylov space is the whole space; the forcing term starts at 0.5 only."""
    matrix = 2.0 * torch.randn(2, 12, 12, dtype=torch.float64)
    z_star = torch.randn(2, 12, dtype=torch.float64)
    with torch.no_grad():
        solution = solve(
            lambda z: z_star + torch.einsum("bij,bj->bi", matrix, z - z_star),
            torch.zeros(2, 12, dtype=torch.float64),
            solver=NewtonKrylov(),
            **TIGHT,
        )
    torch.testing.assert_close(solution.z, z_star, rtol=0.0, atol=1e-9)
    assert int(solution.num_steps.max()) <= 8


def test_convergence_is_faster_than_linear():
    weight = 0.9 * torch.randn(3, 20, 20, dtype=torch.float64) / 20**0.5
    with torch.no_grad():
        solution = solve(
            lambda z: torch.tanh(torch.einsum("bij,bj->bi", weight, z) + 0.5),
            torch.zeros(3, 20, dtype=torch.float64),
            solver=NewtonKrylov(),
            trace=True,
            **TIGHT,
        )
    for row in range(3):
        trace = solution.trace[: int(solution.num_steps[row]) + 1, row].log10()
        assert trace[-2] - trace[-1] > 2.0  # two digits and more in the last step
        assert int(solution.num_steps[row]) < 20


def test_kinds_of_products_agree():
    weight = torch.randn(2, 8, 8, dtype=torch.float64) / 3
    found = []
    for products in ("forward", "double_backward", "difference"):
        with torch.no_grad():
            found.append(
                solve(
                    lambda z: torch.tanh(torch.einsum("bij,bj->bi", weight, z) + 1.0),
                    torch.zeros(2, 8, dtype=torch.float64),
                    solver=NewtonKrylov(products=products),
                    **TIGHT,
                )
            )
    for other in found[1:]:
        torch.testing.assert_close(found[0].z, other.z, rtol=0.0, atol=1e-10)
        assert torch.equal(found[0].num_steps, other.num_steps)
    # Products by backward passes do not call f.
    assert found[1].num_evals < found[0].num_evals


@pytest.mark.parametrize("z0", [torch.zeros(2, 5), torch.zeros(1, 5).expand(2, 5)])
def test_a_constant_map_has_a_jacobian_of_zero(z0):
    for products in ("forward", "double_backward", "difference"):
        with torch.no_grad():
            solver = NewtonKrylov(products=products)
            solution = solve(lambda z: torch.ones(2, 5), z0, solver=solver, on_failure="raise")
        assert torch.equal(solution.z, torch.ones(2, 5))


def test_a_fault_in_the_map_is_not_taken_for_a_missing_derivative():
    calls = []

    def f(z: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("the data loader has died")
        return torch.cos(z)

    with torch.no_grad(), pytest.raises(RuntimeError, match="data loader has died"):
        solve(f, torch.zeros(1, 2), solver=NewtonKrylov())


class NoForwardMode(torch.autograd.Function):
    """tanh without a jvp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return cotangents[0] * (1.0 - y * y)


def test_a_map_without_forward_mode_is_solved_by_another_product():
    def f(z: Tensor) -> Tensor:
        return NoForwardMode.apply(0.9 * z.flip(1) + 0.3)

    z0 = torch.zeros(2, 5, dtype=torch.float64)
    with torch.no_grad():
        solution = solve(f, z0, solver=NewtonKrylov(), **TIGHT)
        torch.testing.assert_close(f(solution.z), solution.z, rtol=0.0, atol=1e-11)
        with pytest.raises(UserError, match='products="forward".*products="difference"'):
            solve(f, z0, solver=NewtonKrylov(products="forward"), **TIGHT)


def test_finished_samples_ask_for_no_products():
    """The easy sample is done after a step; the batch costs what the hard one costs alone."""

    def cost(gains: list[float]) -> int:
        gain = torch.tensor(gains, dtype=torch.float64).unsqueeze(1)
        with torch.no_grad():
            return solve(
                lambda z: torch.tanh(gain * (z.flip(1) - 0.5 * z.roll(1, 1)) + 0.1),
                torch.zeros(len(gains), 10, dtype=torch.float64),
                solver=NewtonKrylov(),
                termination=Residual(1e-8),
                on_failure="raise",
            ).num_evals

    assert cost([0.8, 0.0]) == cost([0.8])


ASKED: list[Tensor] = []


@dataclass(frozen=True)
class Watched(LinearSolver):
    """Notes what it is asked for."""

    def solve(self, a: Any, b: Tensor, **options: Any) -> LinearResult:
        ASKED.append(b)
        return GMRES().solve(a, b, **options)


def test_a_finished_sample_asks_for_nothing():
    ASKED.clear()
    gain = torch.tensor([[0.01], [0.9]], dtype=torch.float64)
    with torch.no_grad():
        solution = solve(
            lambda z: torch.tanh(gain * z.flip(1) + 0.1), torch.zeros(2, 4, dtype=torch.float64),
            solver=NewtonKrylov(linear=Watched()), termination=Residual(1e-3), on_failure="raise",
        )  # fmt: skip
    easy, hard = solution.num_steps.tolist()
    assert easy + 1 < hard
    assert all(bool((b[0] == 0).all()) for b in ASKED[easy + 1 :])
    assert all(bool((b[1] != 0).all()) for b in ASKED)


def test_gradients_come_from_the_implicit_function_theorem():
    weight = torch.randn(4, 4, dtype=torch.float64) / 4
    shift = torch.randn(2, 4, dtype=torch.float64)

    def solved(weight: Tensor, shift: Tensor) -> Tensor:
        return solve(
            lambda z: torch.tanh(z @ weight + shift),
            torch.zeros_like(shift),
            solver=NewtonKrylov(),
            adjoint=Implicit(rtol=1e-12),
            **TIGHT,
        ).z

    inputs = (weight.requires_grad_(), shift.requires_grad_())
    assert torch.autograd.gradcheck(solved, inputs)


def test_it_refuses_to_be_unrolled():
    with pytest.raises(UserError, match="cannot be unrolled.*Implicit"):
        solve(torch.cos, torch.zeros(1, 2), solver=NewtonKrylov(), adjoint=Unrolled())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NewtonKrylov(linear=GMRES), "no linear solver"),
        (lambda: NewtonKrylov(max_products=0), "max_products=0"),
        (lambda: NewtonKrylov(products="foward"), "did you mean 'forward'"),
        (lambda: NewtonKrylov(line_search="yes"), "line_search='yes'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(UserError, match=message):
        make()


@dataclass(frozen=True)
class BreaksDown(LinearSolver):
    """Loses the first sample."""

    def solve(self, a: Any, b: Tensor, **options: Any) -> LinearResult:
        result = GMRES().solve(a, b, **options)
        return replace(result, u=torch.cat((result.u[:1] * torch.nan, result.u[1:])))


def test_a_linear_solve_that_breaks_down_leaves_the_plain_step():
    def f(z: Tensor) -> Tensor:
        return 0.5 * torch.cos(z)

    solver = NewtonKrylov(linear=BreaksDown(), line_search=False)
    z0 = torch.ones(2, 3, dtype=torch.float64)
    solution = solve(f, z0, solver=solver, max_steps=1, keep="last", on_failure="ignore")
    torch.testing.assert_close(solution.z[0], f(z0)[0])
    assert not torch.allclose(solution.z[1], f(z0)[1])


def test_the_forcing_term_is_the_second_choice_of_eisenstat_and_walker():
    def forcing(norm: float, before: float, last: float) -> float:
        state = NewtonKrylovState("auto", torch.tensor([last]), torch.tensor([before]))
        return float(_forcing(torch.tensor([norm]), state))

    assert forcing(0.5, 1.0, 0.1) == pytest.approx(0.9 * 0.25)
    assert forcing(0.5, 1.0, 0.8) == pytest.approx(0.9 * 0.64)  # the safeguard
    assert forcing(0.001, 1.0, 0.1) == pytest.approx(1e-3)
    assert forcing(3.0, 1.0, 0.1) == pytest.approx(0.9)
