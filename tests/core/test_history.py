"""The ring of vectors and its matrix of inner products."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from equilibria.core.history import Ring, SmallMatrix


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_a_ring_keeps_the_newest(size, recorded):
    points = torch.arange(6.0).square().view(6, 1, 1).expand(6, 2, 4)
    with torch.set_grad_enabled(recorded):
        ring = Ring(points[0], size)
        for old, new in pairwise(points):
            assert torch.equal(ring.push_difference(new, old), new - old)
    by_age = {age: ring.vectors[:, slot] for slot, age in enumerate(ring.ages)}
    assert len(ring) == size == len(by_age)
    for age in range(size):
        assert torch.equal(by_age[age], points[5 - age] - points[4 - age])
    assert ring.ages[ring.newest] == 0


def test_a_ring_that_is_not_full_shows_what_it_has():
    ring = Ring(torch.zeros(2, 4), 3)
    assert ring.vectors.shape == (2, 0, 4)
    ring.push_difference(torch.ones(2, 4), torch.zeros(2, 4))
    assert ring.vectors.shape == (2, 1, 4)
    assert ring.ages == [0]


def test_a_recorded_ring_does_not_overwrite_what_the_graph_holds():
    x = torch.ones(2, 4, requires_grad=True)
    ring = Ring(x, 1)
    first = ring.push_difference(x, torch.zeros(2, 4))
    kept = ring.vectors
    ring.push_difference(3 * x, first)
    (kept.sum() + ring.vectors.sum()).backward()
    assert torch.equal(x.grad, torch.full((2, 4), 3.0))


@pytest.mark.parametrize("recorded", [False, True])
def test_a_small_matrix_is_double_and_written_by_slot(recorded):
    with torch.set_grad_enabled(recorded):
        matrix = SmallMatrix(torch.zeros(1, 9), 3)
        before = matrix.leading(3)
        matrix.set_column(1, torch.tensor([[1.0, 2.0]]))
        matrix.set_row(1, torch.tensor([[3.0, 4.0]]))
    assert matrix.dtype == torch.float64
    wanted = torch.tensor([[[0.0, 1.0], [3.0, 4.0]]], dtype=torch.float64)
    assert torch.equal(matrix.leading(2), wanted)
    assert bool(before.any()) != recorded  # a copy only while a graph may hold the old one
