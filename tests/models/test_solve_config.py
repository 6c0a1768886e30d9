"""How a model's equilibria are solved, as configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from torch import nn

from equilibria import Anderson, Broyden, FixedSteps, OneStep, Picard, Residual, Unrolled, UserError
from equilibria.models.config import (
    ModelConfig,
    SolveConfig,
    unrolled_settings,
    with_evaluation_solve,
)
from equilibria.models.deq_transformer import DEQTransformerConfig


@dataclass(frozen=True)
class ExplicitConfig(ModelConfig):
    """A model without equilibria."""

    def build(self, vocabulary_size: int) -> nn.Module:
        return nn.Identity()


def test_evaluation_follows_training_unless_told_otherwise() -> None:
    config = SolveConfig(solver=Picard(), rtol=1e-2, atol=1e-5, max_steps=7)
    settings = config.eval_settings()
    assert settings.solver == Picard()
    assert settings.termination == Residual(1e-2, 1e-5)
    assert settings.max_steps == 7


def test_training_uses_the_gradient_method_and_does_not_warn() -> None:
    settings = SolveConfig(adjoint=OneStep()).train_settings()
    assert (settings.adjoint, settings.on_failure) == (OneStep(), "ignore")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps=0 allows no step"),
        ({"eval_max_steps": -1}, "max_steps=-1 allows no step"),
        ({"rtol": -1e-3}, "rtol=-0.001 must be"),
        ({"eval_rtol": float("nan")}, "rtol=nan must be"),
        ({"rtol": 0.0, "atol": 0.0}, "both 0"),
        ({"solver": Anderson}, r"an instance, not the class"),
        ({"adjoint": Broyden()}, "is no Adjoint"),
    ],
)
def test_impossible_settings_are_refused_where_they_are_written(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        SolveConfig(**options)


def test_pretraining_is_a_network_of_given_depth() -> None:
    settings = unrolled_settings(3)
    assert settings.termination == FixedSteps(3)
    assert (settings.solver, settings.adjoint, settings.max_steps) == (Picard(), Unrolled(), 3)
    with pytest.raises(UserError, match="0 layers is empty; give at least 1"):
        unrolled_settings(0)


def test_evaluation_solve_changes_only_what_is_given() -> None:
    model = DEQTransformerConfig()
    assert with_evaluation_solve(model, None, None, None) is model
    changed = with_evaluation_solve(model, Broyden(history_size=9), 77, 1e-6)
    assert isinstance(changed, DEQTransformerConfig)
    assert changed.solve.eval_settings().solver == Broyden(history_size=9)
    assert changed.solve.eval_settings().max_steps == 77
    assert changed.solve.eval_settings().termination == Residual(1e-6)
    assert changed.solve.train_settings() == model.solve.train_settings()


def test_an_explicit_model_has_no_solver_to_change() -> None:
    model = ExplicitConfig()
    assert with_evaluation_solve(model, None, None, None) is model
    with pytest.raises(UserError, match="ExplicitConfig is an explicit model.*leave out max_steps"):
        with_evaluation_solve(model, None, 5, None)
