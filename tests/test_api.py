"""`solve` as a user calls it."""

from __future__ import annotations

import warnings

import pytest
import torch

import equilibria
from equilibria import (
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    Implicit,
    OneStep,
    Picard,
    Residual,
    SolveSettings,
    StateError,
    Status,
    Unrolled,
    UserError,
    solve,
)

HARD = {"solver": Picard(), "max_steps": 5}


def expansive(z: torch.Tensor) -> torch.Tensor:
    return 1.0 - 2.0 * z


def test_every_public_name_exists_and_says_what_it_is():
    for name in equilibria.__all__:
        public = getattr(equilibria, name)
        assert name == "State" or public.__doc__, name


def test_solves_with_the_defaults():
    solution = solve(torch.cos, torch.ones(2, 3))
    assert bool(solution.converged.all())
    assert solution.z[0, 0].item() == pytest.approx(0.739085, abs=1e-4)
    assert bool((solution.relative_residual <= 1.1e-4).all())
    assert solution.seconds > 0
    assert solution.trace is None


def test_a_tree_comes_back_as_the_same_tree():
    z0 = {"a": torch.zeros(2, 3), "b": (torch.zeros(2), [torch.zeros(2, 1, 4).bfloat16()])}

    def f(z):
        a, (b, [c]) = z["a"], z["b"]
        return {"a": 0.5 * a + b[:, None], "b": (0.5 * b + 1.0, [0.5 * c + 1.0])}

    z = solve(f, z0, termination=Residual(1e-2), on_failure="raise").z
    assert z["a"].shape == (2, 3)
    assert z["b"][1][0].dtype == torch.bfloat16
    torch.testing.assert_close(z["a"], torch.full((2, 3), 4.0), rtol=0.05, atol=0.0)


def test_the_trace_shows_every_step():
    solution = solve(
        lambda z: 0.5 * z + torch.tensor([[0.0], [1.0]]),
        torch.zeros(2, 1),
        solver=Picard(),
        trace=True,
    )
    assert solution.num_steps[0] == 0
    assert solution.trace.shape == (int(solution.num_steps.max()) + 1, 2)
    assert solution.trace[0].tolist() == [0.0, 1.0]
    assert bool(solution.trace[1:, 0].isnan().all())
    assert solution.trace[-1, 1] == solution.relative_residual[1]


@pytest.mark.parametrize("with_grad", [False, True])
def test_a_failed_solve_warns_raises_or_is_silent(with_grad):
    z0 = torch.zeros(2, 3)
    with torch.set_grad_enabled(with_grad):
        with pytest.warns(ConvergenceWarning, match="the forward solve.*MAX_STEPS"):
            solve(expansive, z0, **HARD)
        with pytest.raises(ConvergenceError, match="the forward solve: of 2 samples 2 MAX_STEPS"):
            solve(expansive, z0, on_failure="raise", **HARD)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            solution = solve(expansive, z0, on_failure="ignore", **HARD)
    assert solution.status.tolist() == [Status.MAX_STEPS] * 2


def test_a_warning_points_at_the_line_that_called_solve():
    with pytest.warns(ConvergenceWarning) as caught:
        solve(expansive, torch.zeros(2, 3), **HARD)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("keep", "wanted"), [("best", 0.0), ("last", 11.0)])
def test_keep(keep, wanted):
    solution = solve(
        expansive, torch.zeros(1, 1), keep=keep, on_failure="ignore", **HARD
    )  # 0, 1, -1, 3, -5, 11
    assert solution.z.item() == wanted


@pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Unrolled()], ids=repr)
@pytest.mark.parametrize("with_grad", [False, True])
def test_writing_into_the_solution_does_not_reach_z0(with_grad, adjoint):
    """Also when z0 is the solution, so that the loop never leaves it."""
    z0 = torch.zeros(2, 3)
    with torch.set_grad_enabled(with_grad):
        z = solve(lambda z: 0.5 * z, z0, adjoint=adjoint).z
    z.add_(1.0)
    assert not bool(z0.any())


def test_f_is_called_in_autocast_with_the_state_it_was_given():
    """Under autocast a float32 state stays float32, though f computes in half precision."""
    weight = 0.1 * torch.randn(4, 4)
    seen = set()

    def f(z):
        seen.add(z.dtype)
        return z @ weight + 1.0

    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = solve(f, torch.zeros(2, 4), termination=Residual(1e-2), on_failure="raise")
    assert seen == {torch.float32} == {solution.z.dtype}


@pytest.mark.gpu
def test_everything_stays_on_the_device_of_z0():
    shift = torch.randn(2, 3, device="cuda", requires_grad=True)
    for solver in (Picard(), Anderson(), Broyden()):
        solution = solve(
            lambda z: 0.5 * torch.cos(z) + shift,
            torch.zeros(2, 3, device="cuda"),
            solver=solver,
            on_failure="raise",
        )
        solution.z.sum().backward()
        for tensor in (solution.z, solution.status, solution.residual, solution.num_steps):
            assert tensor.is_cuda


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": Anderson}, "solver=.* instance, not the class.*Anderson"),
        ({"solver": "anderson"}, "solver='anderson' is no Solver; .*solver=Anderson"),
        ({"termination": 1e-3}, r"termination=0.001 is no Termination.*Residual\(rtol="),
        ({"adjoint": Implicit}, "adjoint=.* instance, not the class.*Implicit"),
        ({"adjoint": Broyden()}, "is no Adjoint"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"max_steps": 2.5}, "max_steps=2.5"),
        ({"keep": "first"}, "keep='first' is not one of 'best', 'last'"),
        ({"on_failure": "warning"}, "on_failure='warning' .* did you mean 'warn'"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(UserError, match=message):
        solve(torch.cos, torch.ones(1, 1), **arguments)
    with pytest.raises(UserError, match=message):
        SolveSettings(**arguments)


def test_bad_states_and_images():
    with pytest.raises(StateError, match="floating-point"):
        solve(torch.cos, torch.ones(1, 1, dtype=torch.int64))
    with pytest.raises(StateError, match="expected a tensor"):
        solve(torch.cos, 1.0)
    with pytest.raises(StateError, match="batch_dims=0"):
        solve(torch.cos, torch.tensor(1.0))
    with pytest.raises(StateError, match="keep the shape"):
        solve(lambda z: z[:, :1], torch.ones(2, 3))
    with pytest.raises(UserError, match="batch_dims must be"):
        solve(torch.cos, torch.ones(1, 1), batch_dims=2)


def test_an_exception_in_f_is_passed_on():
    def f(z: torch.Tensor) -> torch.Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        solve(f, torch.zeros(1, 1))
