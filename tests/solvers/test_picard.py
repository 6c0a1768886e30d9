"""Picard iteration."""

from __future__ import annotations

import pytest
import torch

from equilibria import Anderson, Broyden, FixedSteps, Picard, UserError, solve


@pytest.mark.parametrize("relaxation", [1.0, 0.5, 1.5])
def test_makes_relaxed_steps(relaxation):
    z = z0 = torch.randn(3, 4, dtype=torch.float64)
    for _ in range(6):
        z = z + relaxation * (torch.cos(z) - z)
    found = solve(torch.cos, z0, solver=Picard(relaxation), termination=FixedSteps(6)).z
    torch.testing.assert_close(found, z, rtol=1e-14, atol=1e-14)


def test_damping_converges_where_the_plain_iteration_oscillates():
    settings = {"z0": torch.zeros(2, 3), "on_failure": "ignore"}
    plain = solve(lambda z: 1.0 - 1.5 * z, solver=Picard(), **settings)
    damped = solve(lambda z: 1.0 - 1.5 * z, solver=Picard(relaxation=0.5), **settings)
    assert not bool(plain.converged.any())
    assert bool(damped.converged.all())


@pytest.mark.parametrize("kind", [Picard, Anderson, Broyden])
@pytest.mark.parametrize("relaxation", [0.0, 2.0, -0.5, float("nan")])
def test_relaxation_lies_between_zero_and_two(kind, relaxation):
    with pytest.raises(UserError, match=r"relaxation=.* between 0 and 2"):
        kind(relaxation=relaxation)


@pytest.mark.parametrize("kind", [Anderson, Broyden])
@pytest.mark.parametrize("history_size", [0, -1, 2.0, True])
def test_a_history_is_a_positive_whole_number(kind, history_size):
    with pytest.raises(UserError, match=r"history_size=.* integer of at least 1"):
        kind(history_size=history_size)


def test_a_ridge_is_not_negative():
    with pytest.raises(UserError, match="ridge=-1e-08"):
        Anderson(ridge=-1e-8)
