"""States along the way, for correction losses."""

import pytest
import torch

from equilibria import (
    FixedSteps,
    Implicit,
    OneStep,
    Picard,
    Residual,
    Unrolled,
    UserError,
    solve,
)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4, dtype=torch.float64, requires_grad=True)


def run(x, states, adjoint, max_steps=6):
    return solve(
        lambda z: 0.5 * torch.sin(z) + x,
        torch.zeros_like(x),
        solver=Picard(),
        termination=FixedSteps(max_steps),
        adjoint=adjoint,
        max_steps=max_steps,
        states=states,
    )


def by_hand(x, num_steps):
    z, path = torch.zeros_like(x), []
    for _ in range(num_steps):
        z = 0.5 * torch.sin(z) + x
        path.append(z)
    return path


@pytest.mark.parametrize(
    ("states", "steps"),
    [("all", [1, 2, 3, 4, 5, 6]), (1, [6]), (3, [2, 4, 6]), ([1, 5], [1, 5, 6]), ([6], [6])],
)
@pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Unrolled()], ids=repr)
def test_states_are_those_of_the_steps_and_the_final_one_is_last(x, states, steps, adjoint):
    solution = run(x, states, adjoint)
    path = by_hand(x, 6)
    assert len(solution.states) == len(steps)
    for state, step in zip(solution.states, steps, strict=True):
        torch.testing.assert_close(state, path[step - 1])
    assert torch.equal(solution.states[-1], solution.z)
    with torch.no_grad():
        assert all(
            torch.equal(a, b)
            for a, b in zip(run(x, states, adjoint).states, solution.states, strict=True)
        )


def test_each_state_carries_a_gradient(x):
    path = by_hand(x, 6)
    unrolled, one_step = run(x, "all", Unrolled()), run(x, "all", OneStep())
    for state, expected in zip(unrolled.states, path, strict=True):
        got = torch.autograd.grad(state.sum(), x, retain_graph=True)
        torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), x, retain_graph=True))
    for state in one_step.states:
        torch.testing.assert_close(torch.autograd.grad(state.sum(), x)[0], torch.ones_like(x))
    implicit = run(x, 2, Implicit(rtol=1e-12))
    for state in implicit.states:  # (I - J(z_k))^-1 with J = 0.5 cos z_k on the diagonal
        got = torch.autograd.grad(state.sum(), x)[0]
        torch.testing.assert_close(got, 1 / (1 - 0.5 * torch.cos(state.detach())))


def test_a_solve_that_ends_early_returns_what_there_was(x):
    solution = solve(
        lambda z: 0.1 * z + x,
        torch.zeros_like(x),
        termination=Residual(1e-6),
        states="all",
        max_steps=50,
    )
    assert len(solution.states) == int(solution.num_steps.max())
    assert torch.equal(solution.states[-1], solution.z)
    assert run(x, None, Implicit()).states == ()


@pytest.mark.parametrize("num_steps", [1, 2, 5, 12, 13, 30, 200])
@pytest.mark.parametrize("num", [1, 2, 3, 7])
def test_a_number_of_states_is_spaced_over_the_steps_made(num, num_steps):
    """Not over the steps allowed; each within a quarter of a spacing of its place."""
    solution = solve(
        lambda z: z + 1.0,  # the state is the number of steps
        torch.zeros(1, 1, dtype=torch.float64),
        solver=Picard(),
        termination=FixedSteps(num_steps),
        adjoint=OneStep(),
        max_steps=500,
        states=num,
    )
    steps = [int(state) for state in solution.states]
    assert steps[-1] == num_steps
    assert len(set(steps)) == len(steps) == min(num, num_steps)
    for i, step in enumerate(steps[:-1], start=1):
        if num_steps >= num:
            exact = num_steps <= 4 * num
            assert abs(step - i * num_steps / num) <= (0.5 if exact else num_steps / num / 4)


@pytest.mark.parametrize("states", [0, -1, "some", [0], [7], [1.5]])
def test_bad_choices(x, states):
    with pytest.raises(UserError, match="states"):
        run(x, states, Implicit())
