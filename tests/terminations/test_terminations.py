"""When a sample is done."""

from __future__ import annotations

import math

import pytest
import torch

from equilibria import (
    Anderson,
    AnyOf,
    Broyden,
    Divergence,
    FixedSteps,
    Measurement,
    Picard,
    Residual,
    Status,
    ToleranceSchedule,
    UserError,
    solve,
)
from equilibria.core.status import RUNNING

pytestmark = pytest.mark.usefixtures("steps")


def code(rule: Residual, residual: float, image: float) -> int:
    measurement = Measurement(*torch.tensor([[residual], [image]], dtype=torch.float64))
    codes, _ = rule.check(measurement, 1, rule.init(measurement))
    codes = (
        torch.full((len(measurement.residual),), RUNNING, dtype=torch.int8)
        if codes is None
        else codes
    )
    assert codes.dtype == torch.int8
    return int(codes)


@pytest.mark.parametrize(
    ("rule", "image", "limit"),
    [
        (Residual(rtol=0.5, atol=0.25), 2.0, 1.25),
        (Residual(rtol=0.5, atol=0.0), 2.0, 1.0),
        (Residual(rtol=0.0, atol=0.25), 1e9, 0.25),
        (Residual(rtol=0.5, atol=0.0), 0.0, 0.0),
    ],
)
def test_the_residual_criterion_is_exact_at_its_boundary(rule, image, limit):
    assert code(rule, limit, image) == Status.SUCCESS
    assert code(rule, math.nextafter(limit, math.inf), image) == RUNNING


def test_the_residual_criterion_is_per_sample():
    rule = Residual(rtol=0.1, atol=0.0)
    measurement = Measurement(torch.tensor([0.05, 0.2, 0.2]), torch.tensor([1.0, 1.0, 3.0]))
    codes, _ = rule.check(measurement, 1, rule.init(measurement))
    codes = (
        torch.full((len(measurement.residual),), RUNNING, dtype=torch.int8)
        if codes is None
        else codes
    )
    assert codes.tolist() == [Status.SUCCESS, RUNNING, Status.SUCCESS]


@pytest.mark.parametrize("rule", [Residual(), ToleranceSchedule(1e-4, 1e-4, num_steps=1)(0)])
@pytest.mark.parametrize("unit", [1e-7, 1e7])
def test_by_default_the_unit_of_the_state_means_nothing(rule, unit):
    """A tiny state is no solved one: its gradient would be missing without a word."""
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x, z0 = torch.randn(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)

    def solved(unit):
        return solve(lambda z: unit * torch.tanh(a * z / unit + x), z0, termination=rule)

    found, usual = solved(unit), solved(1.0)
    assert torch.equal(found.num_steps, usual.num_steps)
    gradients = [torch.autograd.grad(solution.z.sum(), a)[0] for solution in (found, usual)]
    torch.testing.assert_close(gradients[0] / unit, gradients[1])


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
def test_a_fixed_point_at_zero_is_met_where_the_start_is_zero_or_with_an_atol(solver):
    def solved(z0, termination):
        return solve(lambda z: 0.5 * z.sin(), z0, solver=solver, termination=termination)

    assert solved(torch.zeros(2, 3), Residual()).num_steps.tolist() == [0, 0]
    assert solved(torch.ones(2, 3), Residual(atol=1e-6)).converged.all()


def test_the_norm_is_a_mean_so_that_atol_does_not_depend_on_the_width():
    for width in (1, 100):
        z0 = torch.full((1, width), 0.01)
        settings = {"termination": Residual(rtol=0.0, atol=0.0101), "on_failure": "ignore"}
        assert solve(torch.zeros_like, z0, **settings).num_steps.tolist() == [0]
        settings["termination"] = Residual(rtol=0.0, atol=0.0099)
        assert solve(torch.zeros_like, z0, **settings).num_steps.tolist() == [1]


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
@pytest.mark.parametrize("keep", ["best", "last"])
def test_fixed_steps_makes_exactly_so_many(solver, keep):
    """Even past a residual of exactly zero, and whatever the residual is."""
    for f in (torch.zeros_like, lambda z: 3.0 * z + 1.0):
        solution = solve(
            f, torch.ones(2, 3), solver=solver, termination=FixedSteps(4), keep=keep, max_steps=9
        )
        assert solution.status.tolist() == [Status.SUCCESS] * 2
        assert solution.num_steps.tolist() == [4, 4]


def test_fixed_steps_returns_the_last_point_however_bad():
    solution = solve(
        lambda z: 3.0 * z, torch.ones(1, 1), solver=Picard(), termination=FixedSteps(3)
    )
    assert solution.z.item() == 27.0
    assert solution.residual.item() == 54.0


def test_a_step_limit_below_fixed_steps_is_no_success():
    solution = solve(
        lambda z: 0.5 * z + 1,
        torch.ones(2, 3),
        termination=AnyOf(FixedSteps(6), Divergence()),
        max_steps=5,
        on_failure="ignore",
    )
    assert solution.status.tolist() == [Status.MAX_STEPS] * 2
    assert solution.num_steps.tolist() == [5, 5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Residual(rtol=-1e-3), "rtol=-0.001"),
        (lambda: Residual(atol=-1.0), "atol=-1.0"),
        (lambda: Residual(rtol=float("nan")), "rtol=nan"),
        (lambda: Residual(rtol=float("inf")), "rtol=inf"),
        (lambda: Residual(0.0, 0.0), "both 0.*FixedSteps"),
        (lambda: FixedSteps(0), "num_steps=0"),
        (lambda: FixedSteps(2.5), "num_steps=2.5"),
        (lambda: FixedSteps(True), "num_steps=True"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(UserError, match=message):
        make()
