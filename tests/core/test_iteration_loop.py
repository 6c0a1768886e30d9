"""The loop itself, driven by solvers and stopping rules that follow a script."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from equilibria import (
    Anderson,
    Broyden,
    Iterate,
    Measurement,
    Picard,
    Residual,
    Solver,
    Status,
    Termination,
    UserError,
    solve,
)
from equilibria.core.loop import LoopResult, iterate
from equilibria.core.problem import Problem
from equilibria.core.status import RUNNING

pytestmark = pytest.mark.usefixtures("steps")

NAN = math.nan
R, OK = RUNNING, int(Status.SUCCESS)


@dataclass(frozen=True)
class ScriptedSolver(Solver):
    """Goes to the given points, whatever it is told."""

    points: Tensor  # (steps, B, 1)

    def init(self, iterate: Iterate, max_steps: int) -> int:
        return 0

    def step(self, evaluate: Any, iterate: Iterate, state: int) -> tuple[Iterate, int]:
        return evaluate(self.points[state]), state + 1


@dataclass(frozen=True)
class ScriptedTermination(Termination):
    """Gives the codes (steps + 1, B) of a table; the last row for ever."""

    codes: tuple[tuple[int, ...], ...]

    def init(self, measurement: Measurement) -> list[int]:
        return []

    def check(
        self, measurement: Measurement, step: int, state: list[int]
    ) -> tuple[Tensor, list[int]]:
        assert state == list(range(step)), "asked once per step, in order"
        row = self.codes[min(step, len(self.codes) - 1)]
        return torch.tensor(row, dtype=torch.int8), [*state, step]


class Plateau:
    """f(z) = 1 (NaN where z is), so that the residual of a point 1 - r is |r|."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def __call__(self, z: Tensor) -> Tensor:
        self.seen.append(z.flatten().tolist())
        return torch.where(z.isnan(), z, 1.0)


def run(
    residuals: list[list[float]],
    codes: list[list[int]] | None = None,
    f: Plateau | None = None,
    **settings: Any,
) -> LoopResult:
    """Solve with the residuals (steps + 1, B) given; by default nothing ever succeeds."""
    points = 1.0 - torch.tensor(residuals).unsqueeze(2)
    rules = codes or [[RUNNING] * points.shape[1]]
    settings = {"max_steps": len(residuals) - 1} | settings
    return iterate(
        Problem(f or Plateau(), points[0]),
        ScriptedSolver(points[1:]),
        ScriptedTermination(tuple(map(tuple, rules))),
        **settings,
    )


def returned(result: LoopResult) -> list[float]:
    """The residuals of the returned points."""
    return (1.0 - result.iterate.z).flatten().tolist()


@pytest.mark.parametrize(("keep", "wanted"), [("best", 1.0), ("last", 2.0)])
def test_an_unfinished_sample_returns_its_best_or_its_last_point(keep, wanted):
    result = run([[5.0], [3.0], [1.0], [2.0]], keep=keep)
    assert returned(result) == [wanted]
    assert result.measurement.residual.tolist() == [wanted]
    assert result.status.tolist() == [Status.MAX_STEPS]
    assert result.num_steps.tolist() == [3]


@pytest.mark.parametrize(("keep", "wanted"), [("best", 0.5), ("last", 2.0)])
@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_sample_that_leaves_the_numbers_returns_a_finite_point(bad, keep, wanted):
    result = run([[5.0], [0.5], [2.0], [bad], [0.1]], keep=keep)
    assert returned(result) == [wanted]
    assert result.status.tolist() == [Status.NONFINITE]
    assert result.num_steps.tolist() == [3]


@pytest.mark.parametrize("keep", ["best", "last"])
def test_success_returns_the_accepted_point_even_if_another_was_better(keep):
    result = run([[5.0], [1.0], [2.0], [0.1]], [[R], [R], [OK]], keep=keep)
    assert returned(result) == [2.0]
    assert result.status.tolist() == [Status.SUCCESS]
    assert result.num_steps.tolist() == [2]


def test_a_start_that_is_good_enough_costs_one_evaluation():
    f = Plateau()
    result = run([[0.0], [9.0]], [[OK]], f)
    assert len(f.seen) == 1
    assert result.num_steps.tolist() == [0]


@pytest.mark.parametrize("code", [Status.STALLED, Status.DIVERGED])
def test_a_rule_may_give_up_on_a_sample(code):
    result = run([[5.0], [1.0], [2.0], [0.5]], [[R], [R], [int(code)]])
    assert result.status.tolist() == [code]
    assert returned(result) == [1.0]


def test_samples_finish_one_by_one_and_stay_where_they_are():
    f = Plateau()
    residuals = [
        [4.0, 4.0, 4.0, 4.0],
        [3.0, 0.2, NAN, 5.0],
        [2.0, 9.0, NAN, 6.0],  # what the solver wants of a finished sample does not matter
        [1.0, NAN, NAN, 7.0],
    ]
    codes = [[R] * 4, [R, OK, R, R], [R, R, R, int(Status.DIVERGED)], [OK, R, R, R]]
    result = run(residuals, codes, f, max_steps=9, trace=True)

    assert result.status.tolist() == [
        Status.SUCCESS,
        Status.SUCCESS,
        Status.NONFINITE,
        Status.DIVERGED,
    ]
    assert result.num_steps.tolist() == [3, 1, 1, 2]
    assert returned(result) == pytest.approx([1.0, 0.2, 4.0, 4.0])
    assert result.measurement.residual.tolist() == pytest.approx([1.0, 0.2, 4.0, 4.0])
    # what f sees of the finished ones is the returned point; the loop ends with the last sample
    assert len(f.seen) == 4
    assert f.seen[2] == pytest.approx([-1.0, 0.8, -3.0, -5.0])
    assert f.seen[3] == pytest.approx([0.0, 0.8, -3.0, -3.0])


def test_the_trace_ends_where_its_sample_does():
    residuals = [[4.0, 4.0], [3.0, 0.5], [2.0, 9.0]]
    result = run(residuals, [[R, R], [R, OK], [R, R]], trace=True)
    wanted = torch.tensor([[4.0, 4.0], [3.0, 0.5], [2.0, NAN]])
    torch.testing.assert_close(result.trace.relative, wanted, equal_nan=True)
    assert run(residuals).trace is None


def test_a_sample_that_never_moves_to_a_number_keeps_z0():
    result = run([[NAN], [0.1]])
    assert result.status.tolist() == [Status.NONFINITE]
    assert result.num_steps.tolist() == [0]


def test_every_evaluation_of_a_step_is_counted():
    class TwoEvaluations(Picard):
        def step(self, evaluate: Any, iterate: Iterate, state: None) -> tuple[Iterate, None]:
            return evaluate(evaluate(iterate.fz).fz), None

    problem = Problem(lambda z: 0.5 * z + 1, torch.zeros(3, 2))
    result = iterate(problem, TwoEvaluations(), Residual(1e-4), max_steps=50)
    assert problem.num_evals == 1 + 2 * int(result.num_steps.max())


def test_a_solver_is_told_the_step_limit_and_keeps_its_own_state():
    told: list[int] = []

    class Told(Picard):
        def init(self, iterate: Iterate, max_steps: int) -> str:
            told.append(max_steps)
            return "memory"

        def step(self, evaluate: Any, iterate: Iterate, state: str) -> tuple[Iterate, str]:
            return evaluate(iterate.fz), state + "!"

    result = iterate(Problem(torch.cos, torch.ones(1, 1)), Told(), Residual(1e-9), max_steps=7)
    assert told == [7]
    assert result.solver_state == "memory" + 7 * "!"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, "max_steps=0 .*at least 1"),
        ({"max_steps": -3}, "max_steps=-3"),
        ({"keep": "bets"}, "keep='bets' .* did you mean 'best'"),
    ],
)
def test_bad_limits(settings, message):
    with pytest.raises(UserError, match=message):
        run([[1.0], [1.0]], **settings)


@pytest.mark.parametrize("solver", [Picard(), Anderson(3), Broyden(3)], ids=repr)
@pytest.mark.parametrize("size", [1e-30, 1e-25, 1.0, 1e20, 1e25])
def test_the_unit_of_the_state_means_nothing(solver: Any, size: float) -> None:
    """Also where squares of it vanish in single precision, or overflow."""
    solution = solve(lambda z: size * torch.cos(z / size), torch.zeros(2, 3), solver=solver)
    assert solution.converged.all()
    assert solution.num_steps.min() > 3
    torch.testing.assert_close(solution.z / size, torch.full((2, 3), 0.739085), rtol=1e-3, atol=0)
