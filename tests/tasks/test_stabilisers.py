"""Jacobian regularisation and random step limits of a training run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equilibria import Anderson, UserError
from equilibria.data.segments import TrainingSegments, evaluation_segments
from equilibria.models.config import SolveConfig
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.models.recurrent import RecurrentConfig
from equilibria.regularizers.jacobian import jacobian_penalty
from equilibria.tasks.language_modeling import LanguageModeling, LanguageModelingConfig
from equilibria.tasks.stabilisers import StabiliserConfig

TEXT = torch.randint(11, (61,), generator=torch.Generator().manual_seed(2))
SOLVE = SolveConfig(solver=Anderson(), rtol=1e-12, max_steps=9)


def task(
    model: Any = None, solve: SolveConfig | None = SOLVE, seed: int = 0, **options: Any
) -> Any:
    torch.manual_seed(4)
    if model is None:
        model = DEQTransformerConfig(
            d_model=8, num_heads=2, d_inner=12, dropout=0.0, embedding_dropout=0.0, init_std=0.4,
            solve=SOLVE,
        ).build(11)  # fmt: skip
    config = LanguageModelingConfig(
        batch_size=2, segment_length=6, memory_length=5, pretrain_steps=1,
        stabilisers=StabiliserConfig(**options),
    )  # fmt: skip
    training = TrainingSegments(TEXT, 2, 6)
    return LanguageModeling(
        model, config, training, lambda split: evaluation_segments(TEXT, 2, 6), solve, seed
    )


def test_the_penalty_is_minimised_and_not_reported():
    trained = task(jacobian_weight=0.5)
    first = trained.training_loss(0)
    assert first.phase == "unrolled"
    assert first.penalty is None
    step = trained.training_loss(1)
    assert step.penalty is not None
    assert step.minimised.item() == pytest.approx((step.loss + step.penalty).item())
    assert torch.equal(step.figures["jacobian_penalty"], step.penalty)
    torch.manual_seed(5)
    wanted = 0.5 * jacobian_penalty(step.solution).mean()
    torch.manual_seed(5)
    again = trained.config.stabilisers.penalty(step.solution, 1, 0)
    torch.testing.assert_close(again, wanted)
    step.minimised.backward()


def test_without_it_nothing_changes():
    plain, off = task(), task(jacobian_probability=0.5)
    for step in range(3):
        one, other = plain.training_loss(step), off.training_loss(step)
        assert torch.equal(one.minimised, other.minimised)
        assert one.penalty is None


def test_it_applies_as_often_as_asked_and_grows():
    stabilisers = StabiliserConfig(
        jacobian_weight=1.0, jacobian_probability=0.25, jacobian_increase=0.5,
        jacobian_increase_every=10,
    )  # fmt: skip
    regularizer = stabilisers._regularizer(3)
    applied = [regularizer.applies_at(step) for step in range(2000)]
    assert 0.2 < sum(applied) / 2000 < 0.3
    assert [regularizer.weight_at(step) for step in (0, 9, 10, 25)] == [1.0, 1.0, 1.5, 2.0]


def test_jitter_draws_limits_up_to_the_one_given():
    stabilisers = StabiliserConfig(step_jitter=2)
    limits = [stabilisers.settings(SOLVE, step, 0).max_steps for step in range(60)]
    assert set(limits) == {7, 8, 9}
    assert limits == [stabilisers.settings(SOLVE, step, 0).max_steps for step in range(60)]
    assert limits != [stabilisers.settings(SOLVE, step, 1).max_steps for step in range(60)]
    trained = task(step_jitter=2)
    trained.training_loss(0)
    made = [int(trained.training_loss(step).solution.num_steps.max()) for step in range(1, 9)]
    assert made == limits[1:9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jacobian_weight": -1.0}, "jacobian_weight=-1.0"),
        ({"jacobian_probability": 2.0}, "probability=2.0"),
        ({"jacobian_increase": 0.1}, "not how often"),
        ({"jacobian_increase_every": 0}, "every=0|jacobian_increase_every=0"),
        ({"step_jitter": -1}, "step_jitter=-1"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(UserError, match=message):
        StabiliserConfig(**options)


def test_a_jitter_that_leaves_no_steps():
    with pytest.raises(UserError, match="leaves no steps of max_steps=9"):
        task(step_jitter=9).training_loss(1)


def test_explicit_models_have_nothing_to_stabilise():
    model = RecurrentConfig(d_hidden=4).build(11)
    task(model, solve=None)
    with pytest.raises(UserError, match="no equilibrium to stabilise"):
        task(model, solve=None, jacobian_weight=1.0)


def test_increases_of_the_pretraining_are_not_made_up_for():
    """First step with the penalty at 32, an increase every 30: the next one is at 60."""
    torch.manual_seed(0)
    solution = task().training_loss(1).solution
    stabilisers = StabiliserConfig(
        jacobian_weight=2.0, jacobian_increase=1.0, jacobian_increase_every=30
    )

    def penalty(step: int, pretrain_steps: int) -> float:
        torch.manual_seed(5)
        return stabilisers.penalty(solution, step, 0, pretrain_steps).item()

    one = penalty(0, 0) / 2.0
    assert [round(penalty(step, 32) / one) for step in (32, 59, 60, 90)] == [2, 2, 3, 4]
    assert [round(penalty(step, 0) / one) for step in (29, 30, 60)] == [2, 3, 4]
