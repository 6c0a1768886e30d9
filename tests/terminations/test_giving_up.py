"""Stagnation, divergence, combinations, and a tolerance that changes over training."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from equilibria import (
    Anderson,
    Broyden,
    FixedSteps,
    Measurement,
    Picard,
    Residual,
    Status,
    Termination,
    UserError,
    solve,
)
from equilibria.core.status import RUNNING
from equilibria.terminations.any_of import AnyOf
from equilibria.terminations.divergence import Divergence
from equilibria.terminations.residual import ToleranceSchedule
from equilibria.terminations.stagnation import Stagnation

pytestmark = pytest.mark.usefixtures("steps")


def stops(rule: Termination, residuals: list[float], images: list[float] | None = None) -> int:
    """The step at which one sample that shows these norms gets its first code; -1 for never."""
    images = images or [1.0] * len(residuals)
    state = None
    for step, norms in enumerate(zip(residuals, images, strict=True)):
        measurement = Measurement(*torch.tensor(norms, dtype=torch.float64).unsqueeze(1))
        state = rule.init(measurement) if step == 0 else state
        codes, state = rule.check(measurement, step, state)
        if codes is None:
            continue
        assert codes.shape == (1,)
        assert codes.dtype == torch.int8
        if int(codes) != RUNNING:
            return step
    return -1


# --- Stagnation ----------------------------------------------------------------------------------


def test_a_constant_residual_stalls_after_exactly_so_many_steps():
    for num_steps in (1, 3, 10):
        assert stops(Stagnation(num_steps), [1.0] * 20) == num_steps


@pytest.mark.parametrize(("decay", "stalls"), [(0.9948, False), (0.9950, True), (1.01, True)])
def test_slow_progress_counts_by_its_factor(decay, stalls):
    """0.9948 ** 10 is just below 0.95 and 0.9950 ** 10 just above."""
    found = stops(Stagnation(10, 0.95), [decay**k for k in range(40)])
    assert found == (10 if stalls else -1)


def test_a_dry_spell_shorter_than_the_window_is_forgiven():
    assert stops(Stagnation(4), [1.0, 5.0, 5.0, 5.0, 0.5, 5.0, 5.0, 5.0, 0.2, 1.0, 1.0]) == -1


def test_it_is_the_best_residual_that_counts():
    """Falling back from a peak is no improvement."""
    assert stops(Stagnation(4), [1.0, 8.0, 4.0, 2.0, 1.5]) == 4


def test_stagnation_saves_the_evaluations_of_hopeless_samples_only():
    factor = torch.tensor([[0.5], [1.0]])  # the second sample adds 1 for ever
    plain, watched = (
        solve(
            lambda z: factor * z + 1.0,
            torch.zeros(2, 3),
            solver=Picard(),
            termination=termination,
            on_failure="ignore",
        )
        for termination in (Residual(), AnyOf(Residual(), Stagnation(5)))
    )
    assert plain.status.tolist() == [Status.SUCCESS, Status.MAX_STEPS]
    assert watched.status.tolist() == [Status.SUCCESS, Status.STALLED]
    assert watched.num_steps.tolist() == [int(plain.num_steps[0]), 5]
    assert torch.equal(watched.z[0], plain.z[0])
    assert watched.num_evals < plain.num_evals


# --- Divergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("residuals", "images", "step"),
    [
        ([1.0, 10.0, 11.0], [1.0, 1.0, 1.0], 2),
        ([1.0, 1.0, 1.0], [1.0, 100.0, 101.0], 2),
        ([1e-8, 9.0, 11.0], [1.0, 1.0, 1.0], 2),  # a warm start may make detours
        ([1.0, 9.0, 11.0], [1e-8, 1.0, 1.0], 2),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], -1),
    ],
)
def test_divergence_compares_with_the_size_of_the_start(residuals, images, step):
    assert stops(Divergence(10.0, 100.0), residuals, images) == step


def test_divergence_stops_before_overflow_and_spares_the_others():
    factor = torch.tensor([[0.5], [3.0]])
    for z0 in (torch.zeros(2, 3), torch.ones(2, 3)):
        solution = solve(
            lambda z: factor * z + 1.0,
            z0,
            solver=Picard(),
            termination=AnyOf(Residual(), Divergence()),
            max_steps=200,
            on_failure="ignore",
        )
        assert solution.status.tolist() == [Status.SUCCESS, Status.DIVERGED]
        assert bool(torch.isfinite(solution.z).all())


def test_divergence_does_not_disturb_a_solver_that_gets_there():
    """Non-normal: eigenvalues 0.5, norm about 5; the residual grows before it falls."""
    torch.manual_seed(3)
    matrix = 2 * torch.triu(torch.randn(8, 8, dtype=torch.float64), 1) + 0.5 * torch.eye(8)
    for solver in (Anderson(history_size=10), Broyden(), Picard()):
        solution = solve(
            lambda z: z @ matrix + 1.0,
            torch.zeros(2, 8, dtype=torch.float64),
            solver=solver,
            termination=AnyOf(Residual(1e-8), Divergence(1e6, 1e9)),
            max_steps=200,
            on_failure="ignore",
        )
        assert solution.status.tolist() == [Status.SUCCESS] * 2


# --- Any of --------------------------------------------------------------------------------------


class Always(Termination):
    def __init__(self, code: int) -> None:
        self.code = code

    def init(self, measurement: Measurement) -> None:
        pass

    def check(self, measurement, step, state):
        return torch.full_like(measurement.residual, self.code, dtype=torch.int8), None


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([RUNNING, RUNNING], RUNNING),
        ([RUNNING, Status.STALLED], Status.STALLED),
        ([Status.STALLED, Status.DIVERGED], Status.STALLED),
        ([Status.DIVERGED, Status.STALLED], Status.DIVERGED),
        ([Status.DIVERGED, Status.SUCCESS], Status.SUCCESS),
        ([Status.SUCCESS, Status.DIVERGED, RUNNING], Status.SUCCESS),
    ],
)
def test_success_wins_then_order(codes, expected):
    rule = AnyOf(*(Always(code) for code in codes))
    measurement = Measurement(torch.ones(2), torch.ones(2))
    found, _ = rule.check(measurement, 1, rule.init(measurement))
    assert found.tolist() == [expected] * 2
    assert found.dtype == torch.int8


def test_any_of_nests_and_keeps_each_memory_apart():
    rule = AnyOf(Stagnation(7), AnyOf(Stagnation(3), Divergence()))
    assert stops(rule, [1.0] * 10) == 3


def test_any_of_is_a_value():
    rule = AnyOf(Residual(), Stagnation(4))
    assert rule == AnyOf(Residual(), Stagnation(4))
    assert hash(rule) == hash(copy.deepcopy(rule))
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert "Stagnation(num_steps=4" in repr(rule)


@pytest.mark.parametrize("rule", [Stagnation(3), Divergence(), AnyOf(Residual(), Stagnation(3))])
def test_an_empty_batch_and_a_nan_are_no_problem(rule):
    empty = Measurement(torch.zeros(0), torch.zeros(0))
    codes, _ = rule.check(empty, 0, rule.init(empty))
    assert codes is None or codes.shape == (0,)
    solution = solve(
        lambda z: torch.where(torch.tensor([[True], [False]]), torch.nan, 0.5 * z + 1),
        torch.zeros(2, 3),
        termination=AnyOf(Residual(), rule),
        on_failure="ignore",
    )
    assert solution.status.tolist() == [Status.NONFINITE, Status.SUCCESS]


# --- Schedule ------------------------------------------------------------------------------------


def test_a_schedule_meets_its_ends_and_stays_there():
    for shape in ("log", "linear"):
        schedule = ToleranceSchedule(1e-1, 1e-4, num_steps=100, shape=shape, atol=1e-7)
        assert schedule(0) == Residual(1e-1, 1e-7)
        assert math.isclose(schedule(100).rtol, 1e-4)
        assert schedule(100) == schedule(10**9)
        values = [schedule(step).rtol for step in range(101)]
        assert values == sorted(values, reverse=True)


def test_the_two_shapes_in_the_middle():
    assert math.isclose(ToleranceSchedule(1e-1, 1e-3, 10)(5).rtol, 1e-2)
    assert math.isclose(ToleranceSchedule(1e-1, 1e-3, 10, "linear")(5).rtol, 0.0505)


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stagnation(0), "num_steps=0"),
        (lambda: Stagnation(factor=0.0), "factor=0.0"),
        (lambda: Stagnation(factor=1.5), "factor=1.5"),
        (lambda: Stagnation(factor=math.nan), "factor=nan"),
        (lambda: Divergence(residual_factor=1.0), "residual_factor=1.0.*greater than 1"),
        (lambda: Divergence(image_factor=-2.0), "image_factor=-2.0"),
        (lambda: Divergence(image_factor=math.inf), "image_factor=inf"),
        (lambda: AnyOf(), "at least one rule"),
        (lambda: AnyOf(Residual), "an instance, not the class"),
        (lambda: AnyOf(Residual(), 3), "AnyOf got 3"),
        (lambda: AnyOf([Residual()]), "no Termination"),
        (lambda: AnyOf(FixedSteps(3), None), "AnyOf got None"),
        (lambda: ToleranceSchedule(0.0, 1e-3, 10), "start_rtol of a ToleranceSchedule is 0"),
        (lambda: ToleranceSchedule(1e-1, -1e-3, 10), "end_rtol=-0.001"),
        (lambda: ToleranceSchedule(1e-1, 1e-3, -5), "num_steps=-5"),
        (lambda: ToleranceSchedule(1e-1, 1e-3, 10, "logg"), "did you mean 'log'"),
        (lambda: ToleranceSchedule(1e-1, 1e-3, 10)(-1), "-1 is negative"),
        (lambda: Residual(max_growth=0.5), "max_growth=0.5 is below 1"),
        (lambda: Residual(max_growth=math.inf), "max_growth=inf"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(UserError, match=message):
        make()
