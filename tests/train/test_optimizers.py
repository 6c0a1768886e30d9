"""Optimisers and the course of the learning rate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from equilibria import UserError
from equilibria.train.optimizers import OptimizerConfig, Plateau


def _rates(num_steps: int, **options: Any) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **options)
    return [config.learning_rate_at(step, num_steps) for step in range(num_steps)]


def test_warm_up_is_linear_and_never_zero() -> None:
    rates = _rates(8, warmup_steps=4, schedule="constant")
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("name", ["adam", "adamw", "radam"])
def test_beta2_reaches_the_optimizer(name: Any) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = OptimizerConfig(name=name, beta2=0.95).build([parameter])
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("beta2", [1.0, -0.1, math.nan])
def test_beta2_is_a_decay(beta2: float) -> None:
    with pytest.raises(UserError, match="beta2=.* must be at least 0 and below 1, such as 0.98"):
        OptimizerConfig(beta2=beta2)


def test_cosine_goes_from_the_peak_to_its_share() -> None:
    rates = _rates(101, warmup_steps=1, schedule="cosine", final_fraction=0.1)
    assert rates[:2] == pytest.approx([1.0, 1.0])
    assert rates[51] == pytest.approx(0.1 + 0.9 * 0.5)
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=1, final_fraction=0.1)
    assert config.learning_rate_at(101, 101) == pytest.approx(0.1)
    assert config.learning_rate_at(10_000, 101) == pytest.approx(0.1)


def test_inverse_square_root_continues_the_warm_up() -> None:
    rates = _rates(400, warmup_steps=100, schedule="inverse-sqrt")
    assert rates[99] == 1.0
    assert rates[399] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(math.sqrt(100 / 101))


@pytest.mark.parametrize("schedule", ["cosine", "constant", "inverse-sqrt"])
def test_no_warm_up_starts_at_the_peak(schedule: str) -> None:
    assert _rates(5, warmup_steps=0, schedule=schedule)[0] == pytest.approx(1.0)


@given(
    st.sampled_from(["cosine", "constant", "inverse-sqrt"]),
    st.integers(0, 50),
    st.integers(1, 60),
    st.floats(0, 1),
)
def test_rate_is_positive_and_at_most_the_peak(
    schedule: str, warmup_steps: int, num_steps: int, final_fraction: float
) -> None:
    rates = _rates(
        num_steps, warmup_steps=warmup_steps, schedule=schedule, final_fraction=final_fraction
    )
    assert all(0.0 < rate <= 1.0 + 1e-12 for rate in rates)
    assert rates[:warmup_steps] == sorted(rates[:warmup_steps])
    assert rates[warmup_steps:] == sorted(rates[warmup_steps:], reverse=True)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("radam", torch.optim.RAdam),
        ("sgd", torch.optim.SGD),
    ],
)
def test_every_optimiser_takes_a_step(name: Any, cls: type) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.01).build([parameter])
    assert type(optimizer) is cls
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    parameter.square().sum().backward()
    optimizer.step()
    assert (parameter < 1).all()


def test_momentum_is_that_of_sgd() -> None:
    optimizer = OptimizerConfig(name="sgd", momentum=0.7).build([nn.Parameter(torch.ones(1))])
    assert optimizer.param_groups[0]["momentum"] == 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be"),
        ({"learning_rate": math.inf}, "learning_rate=inf must be"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be"),
        ({"momentum": -0.1}, "momentum=-0.1 must be"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be"),
        ({"final_fraction": -0.5}, "final_fraction=-0.5 must be"),
        ({"clip_norm": math.inf}, "clip_norm=inf must be"),
        ({"name": "adan"}, "name='adan' is not one of .*; did you mean 'adam'"),
        ({"schedule": "cosin"}, "schedule='cosin' is not one of .*; did you mean 'cosine'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**options)


def test_a_plateau_lowers_the_rate_and_starts_to_wait_again() -> None:
    config = OptimizerConfig(schedule="plateau", plateau_factor=0.5, plateau_patience=2)
    plateau = Plateau()
    factors = []
    for loss in (3.0, 2.0, 2.5, 2.0, 1.9, 1.9, 1.9, 1.9, 1.9):
        plateau.see(loss, config)
        factors.append(plateau.factor)
    assert factors == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]
    assert config.learning_rate_at(500, 1000) == config.learning_rate
    other = Plateau()
    for _ in range(9):
        other.see(1.0, OptimizerConfig(schedule="cosine"))
    assert other == Plateau()


def test_a_plateau_has_a_floor() -> None:
    config = OptimizerConfig(schedule="plateau", plateau_factor=0.5, final_fraction=0.2)
    plateau = Plateau()
    for _ in range(9):
        plateau.see(1.0, config)
    assert plateau.factor == 0.2


@pytest.mark.parametrize(
    "options", [{"plateau_factor": 0.0}, {"plateau_factor": 1.5}, {"plateau_patience": 0}]
)
def test_impossible_plateaus(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        OptimizerConfig(**options)
