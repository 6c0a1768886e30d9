"""Running figures of solves."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from equilibria.core.adjoint import BackwardReport
from equilibria.core.linear import LinearResult
from equilibria.core.solution import Solution
from equilibria.tasks.task import StepLoss
from equilibria.train.statistics import (
    Clock,
    Interval,
    SolveRecord,
    SolveStatistics,
    StepRecord,
    summarize_solves,
)


def _solution(steps: list[int], residuals: list[float], backward: list[int] | None) -> Solution:
    residual = torch.tensor(residuals)
    report = BackwardReport(seconds=0.25)
    if backward is not None:
        one = torch.ones(len(backward))
        report.result = LinearResult(
            one, one, one * 0.5, one.to(torch.int8), torch.tensor(backward), 9
        )
    return Solution(
        z=torch.zeros(len(steps), 1),
        status=torch.zeros(len(steps), dtype=torch.int8),
        residual=residual,
        relative_residual=residual,
        num_steps=torch.tensor(steps),
        num_evals=max(steps) + 2,
        seconds=0.5,
        backward=report,
    )


def _step(loss: float, solution: Solution) -> StepRecord:
    value = torch.tensor(loss, requires_grad=True)
    return StepRecord.of(StepLoss(value, 30, solution, "equilibrium"))


@pytest.fixture
def interval() -> Interval:
    interval = Interval()
    interval.add(_step(2.0, _solution([3, 5], [0.1, 0.3], [7, 9])), torch.tensor(4.0), 1.0)
    interval.add(_step(1.0, _solution([6, 8], [0.2, 0.2], None)), torch.tensor(2.0), 2.0)
    return interval


def test_a_record_is_the_mean_of_its_steps(interval: Interval) -> None:
    assert interval.record() == pytest.approx(
        {
            "loss": 1.5,
            "gradient_norm": 3.0,
            "num_evals": 6.5,  # each step evaluates once, and so does the start
            "num_evals_max": 9.0,
            "relative_residual": 0.2,
            "relative_residual_max": 0.3,
            "backward_num_evals": 9.0,
            "backward_relative_residual": 0.5,
            "forward_seconds": 1.0,
            "backward_seconds": 0.5,
            "seconds": 3.0,
            "tokens_per_second": 20.0,
        }
    )


def test_an_explicit_model_has_a_loss_and_no_solves() -> None:
    interval, clock = Interval(), Clock()
    for loss, recall in ((2.0, 0.25), (1.0, 0.75)):
        figures = {"recall": torch.tensor(recall)}
        step = StepRecord.of(StepLoss(torch.tensor(loss), 30, None, "explicit", figures))
        interval.add(step, torch.tensor(4.0), 1.5)
        clock.add(step.solves, 1.5)
    expected = {
        "loss": 1.5,
        "gradient_norm": 4.0,
        "recall": 0.5,
        "seconds": 3.0,
        "tokens_per_second": 20.0,
    }
    assert interval.record() == pytest.approx(expected)
    assert clock.as_dict()["rest_seconds"] == 3.0
    restored = Interval.from_state_dict(interval.state_dict(), torch.device("cpu"))
    assert restored.record() == interval.record()


def test_without_a_backward_solve_there_are_no_figures_of_it() -> None:
    interval = Interval()
    interval.add(_step(1.0, _solution([1], [0.0], None)), torch.tensor(0.0), 0.0)
    record = interval.record()
    assert record["backward_num_evals"] is None
    assert record["backward_relative_residual"] is None


def test_an_interval_survives_its_state(interval: Interval) -> None:
    restored = Interval.from_state_dict(interval.state_dict(), torch.device("cpu"))
    assert restored.record() == interval.record()
    restored.add(_step(9.0, _solution([1], [0.0], None)), torch.tensor(0.0), 1.0)
    assert interval.record()["loss"] == 1.5


def test_an_interval_keeps_no_graph(interval: Interval) -> None:
    assert not any(loss.requires_grad for loss in interval.losses)


def test_the_rest_of_the_time_is_what_is_left() -> None:
    assert Clock(forward=2.0, backward=3.0, total=9.0).as_dict() == {
        "forward_seconds": 2.0,
        "backward_seconds": 3.0,
        "rest_seconds": 4.0,
        "total_seconds": 9.0,
    }


def test_percentiles_over_all_samples() -> None:
    evals = torch.arange(1, 101)
    summary: dict[str, Any] = summarize_solves(evals, evals / 1000)
    assert summary["num_evals"] == {"mean": 50.5, "p95": 95.0}
    assert summary["relative_residual"]["p95"] == pytest.approx(0.095)
    assert summarize_solves(torch.tensor([4]), torch.tensor([0.5]))["num_evals"] == {
        "mean": 4.0,
        "p95": 4.0,
    }


def test_statistics_of_a_run() -> None:
    statistics = SolveStatistics()
    assert statistics.as_dict() is None
    statistics.add([SolveRecord.of(_solution([3, 5], [0.1, 0.3], None))])
    figures = statistics.as_dict()
    assert figures is not None
    assert figures["num_evals"]["mean"] == 5.0
    restored = SolveStatistics()
    restored.load_state_dict(statistics.state_dict())
    assert restored.as_dict() == figures


def test_loading_replaces_what_was_there() -> None:
    statistics, other = SolveStatistics(), SolveStatistics()
    statistics.add([SolveRecord.of(_solution([3], [0.1], None))])
    other.add([SolveRecord.of(_solution([100], [0.9], None))])
    other.load_state_dict(statistics.state_dict())
    assert other.as_dict() == statistics.as_dict()


def test_only_the_latest_steps_count() -> None:
    """Of any number of samples each, before and after a resume."""
    statistics = SolveStatistics()
    for step in range(990):
        statistics.add([SolveRecord.of(_solution([step], [0.1], None))])
    restored = SolveStatistics()
    restored.load_state_dict(statistics.state_dict())
    for each in (statistics, restored):
        for step in range(990, 1010):
            each.add([SolveRecord.of(_solution([step, 5_000], [0.1, 0.2], None))])
        rows = each.state_dict()["num_evals"]
        expected = [[step + 1] for step in range(10, 990)]
        expected += [[step + 1, 5_001] for step in range(990, 1010)]
        assert [row.tolist() for row in rows] == expected
        assert {row.dtype for row in rows} == {torch.int64}
    assert statistics.as_dict() == restored.as_dict()


def test_a_step_leaves_no_tensor_behind() -> None:
    """Small ones between the large ones of a step fragment the heap: 10 MiB a step were seen."""

    def num_tensors() -> int:
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    statistics = SolveStatistics()
    statistics.add([SolveRecord.of(_solution([3], [0.1], None))])
    before = num_tensors()
    for _ in range(50):
        statistics.add([SolveRecord.of(_solution([3], [0.1], None))])
    assert num_tensors() == before
