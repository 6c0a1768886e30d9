from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from equilibria import DEQ, Anderson, Cell, Picard, Residual, SolveSettings
from equilibria.diagnostics.path_independence import (
    Arrival,
    PathIndependence,
    path_independence,
    path_independence_of_solve,
)

TIGHT = SolveSettings(solver=Picard(), termination=Residual(1e-6), max_steps=200)


class Tanh(Cell):
    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain, self.input = gain, nn.Linear(3, 6)

    def inject(self, x: Tensor) -> Tensor:
        return self.input(x)

    def initial_state(self, injection: Tensor) -> Tensor:
        return 0.1 * torch.ones_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(self.gain * z + 0.01 * injection)


def test_a_contraction_is_path_independent() -> None:
    report = path_independence(DEQ(Tanh(0.5), solver=Anderson()), torch.randn(4, 3), tolerance=2e-2)
    assert [a.start for a in report.arrivals] == ["zeros", "noise", "large noise", "other samples"]
    assert report.score == 1.0
    assert report.different == 0.0
    assert report.alignment > 0.999
    assert "100% (same fixed point)" in str(report)


def test_several_fixed_points_are_noticed() -> None:
    report = path_independence(DEQ(Tanh(2.0)), torch.randn(4, 3), settings=TIGHT)
    assert report.different > 0.3
    assert report.score < 0.7
    assert report.alignment < 0.9
    noise = next(a for a in report.arrivals if a.start == "noise")
    assert bool(noise.converged.all())
    assert bool((noise.distance > 0.5).any())


def test_a_solve_that_fails_is_neither_same_nor_different() -> None:
    report = path_independence_of_solve(
        lambda z: z + 1.0, torch.zeros(3, 2), settings=SolveSettings(max_steps=5)
    )
    assert report.score == report.different == 0.0


def test_trees_and_single_samples() -> None:
    report = path_independence_of_solve(
        lambda z: (0.5 * z[1][:, :, 0] + 1.0, 0.5 * z[0].unsqueeze(2)),
        (torch.zeros(1, 2), torch.zeros(1, 2, 1)),
        settings=TIGHT,
    )
    assert len(report.arrivals) == 3  # there is no other sample
    assert report.score == 1.0


def test_nothing_is_touched_and_the_seed_decides() -> None:
    deq, x = DEQ(Tanh(2.0)), torch.randn(4, 3)
    random_state = torch.get_rng_state()
    first = path_independence(deq, x, settings=TIGHT)
    again = path_independence(deq, x, settings=TIGHT)
    assert torch.equal(torch.get_rng_state(), random_state)
    for a, b in zip(first.arrivals, again.arrivals, strict=True):
        assert torch.equal(a.distance, b.distance)
    assert deq.cell.input.weight.grad is None
    other = path_independence(deq, x, settings=TIGHT, seed=1)
    assert other.arrivals[1].cosine.tolist() != first.arrivals[1].cosine.tolist()


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch: int) -> None:
    """Of no sample nothing depends on the path."""
    report = path_independence(DEQ(Tanh(0.5)), torch.randn(batch, 3), settings=TIGHT)
    assert (report.score, report.different) == (1.0, 0.0)
    assert report.alignment == pytest.approx(1.0)
    assert "100% (same fixed point)" in str(report)


class Graph(Tanh):
    """The rows of one problem see their sum."""

    def inject(self, x: Tensor, graph: Tensor) -> tuple[Tensor, Tensor]:
        return (graph[:, None] == graph).to(x), super().inject(x)

    def initial_state(self, injection: tuple[Tensor, Tensor]) -> Tensor:
        return super().initial_state(injection[1])

    def forward(self, z: Tensor, injection: tuple[Tensor, Tensor]) -> Tensor:
        return super().forward(injection[0] @ z, injection[1])


def test_a_ragged_batch_is_judged_by_problem() -> None:
    """Gain 0.5 contracts for one row or two, and has three fixed points for eight."""
    graph = torch.tensor([0] * 8 + [1] + [2] * 2).roll(3)
    deq, x = DEQ(Graph(0.4)), torch.randn(11, 3)
    report = path_independence(deq, x, graph, segments=graph, settings=TIGHT)
    assert all(a.distance.shape == (3,) for a in report.arrivals)
    noise = report.arrivals[1]
    assert (noise.distance <= report.tolerance).tolist() == [False, True, True]
    alone = path_independence(deq, x, graph * 0, batch_dims=0, settings=TIGHT)
    assert [a.distance.shape for a in alone.arrivals] == [(1,)] * 3
    of_map = path_independence_of_solve(
        lambda z: 0.5 * torch.cos(z), torch.zeros(11, 3), segments=graph, settings=TIGHT
    )
    assert of_map.score == 1.0


def test_scores_are_shares_of_the_pairs() -> None:
    """Of four pairs one arrived, two elsewhere, and one nowhere, however near it is."""

    def arrival(start: str, distance: list[float], converged: list[bool]) -> Arrival:
        near = torch.tensor(distance)
        return Arrival(start, near, 1.0 - near, torch.tensor(converged), 1e-6 * near)

    report = PathIndependence(
        (arrival("zeros", [0.0, 0.5], [True, True]), arrival("noise", [1.0, 0.0], [True, False])),
        tolerance=0.1,
    )
    assert (report.score, report.different) == (0.25, 0.5)
    assert report.alignment == pytest.approx(0.625)
    lines = str(report).splitlines()
    assert lines[0].startswith("path independence 25% (same fixed point), 50% reached another")
    assert lines[3].split() == ["noise", "0.0e+00", "1.0e+00", "50%"]
