"""The parametrisation itself; `weight_drop` is in `test_variational_dropout_modules`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from equilibria import UserError, solve_scope
from equilibria.layers.weight_drop import WeightDrop


@pytest.fixture
def layer() -> nn.Linear:
    layer = nn.Linear(40, 50)
    nn.init.ones_(layer.weight)
    parametrize.register_parametrization(layer, "weight", WeightDrop(0.25))
    return layer


def test_entries_are_zero_or_scaled_and_the_same_in_one_solve(layer: nn.Linear) -> None:
    with solve_scope():
        weight = layer.weight
        assert torch.equal(layer.weight, weight)
    assert set(weight.flatten().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert (weight == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert not torch.equal(layer.weight, weight)  # the next one draws anew


def test_evaluation_and_assignment_see_the_weight_itself(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight = torch.full((50, 40), 3.0)
    assert bool((layer.eval().weight == 3.0).all())
    assert set(layer.train().weight.flatten().tolist()) == {0.0, 4.0}


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_and_everything(p: float) -> None:
    weight = torch.ones(3, 3)
    assert torch.equal(WeightDrop(p)(weight), (1 - p) * weight)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_no_probability(p: float) -> None:
    with pytest.raises(UserError, match="is no probability; give a number from 0 to 1"):
        WeightDrop(p)
