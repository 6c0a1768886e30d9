"""A run that was stopped and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from equilibria import UserError
from equilibria.train.loop import Trainer

TrainerFactory = Callable[..., Trainer]
CLOCKS = {"forward_seconds", "backward_seconds", "seconds", "tokens_per_second"}


def _metrics(trainer: Trainer) -> list[dict[str, Any]]:
    """All records without what depends on the speed of the machine."""
    return [
        {name: value for name, value in record.items() if name not in CLOCKS}
        for record in trainer.run.metrics()
    ]


def _assert_same(resumed: Trainer, straight: Trainer) -> None:
    expected = straight.task.model.state_dict()
    for name, tensor in resumed.task.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert _metrics(resumed) == _metrics(straight)
    assert resumed.statistics.as_dict() == straight.statistics.as_dict()
    assert resumed.run.checkpoints.latest() == straight.run.checkpoints.latest()
    assert resumed.run.checkpoints.best() == straight.run.checkpoints.best()
    assert resumed.run.checkpoints.best_loss() == straight.run.checkpoints.best_loss()


def _stop_before(trainer: Trainer, stops: set[int], how: Callable[[], None]) -> None:
    training_losses = trainer.task.training_losses

    def interrupted(step: int, num_chunks: int = 1) -> Any:
        if step in stops:
            how()
        return training_losses(step, num_chunks)

    trainer.task.training_losses = interrupted  # pyright: ignore[reportAttributeAccessIssue]


def _request() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class _PowerCutError(BaseException):
    pass


def _power_cut() -> None:
    raise _PowerCutError


@pytest.fixture
def straight(make_trainer: TrainerFactory) -> Trainer:
    """The uninterrupted run. Pre-training ends at step 4, epochs at 5 and 10, metrics at 5."""
    trainer = make_trainer()
    assert trainer.fit() == 0
    return trainer


@pytest.mark.parametrize("stop", [0, 3, 4, 8])
def test_stopped_by_request_at_any_step(
    make_trainer: TrainerFactory, straight: Trainer, stop: int
) -> None:
    stopped = make_trainer()
    _stop_before(stopped, {stop}, _request)
    assert stopped.fit() == 130
    resumed = make_trainer(run=stopped.run)
    torch.manual_seed(77)  # the state of a fresh process is not the state of the run
    resumed.resume()
    assert resumed.step == stop + 1
    assert resumed.fit() == 0
    _assert_same(resumed, straight)


def test_stopped_at_every_step(make_trainer: TrainerFactory, straight: Trainer) -> None:
    trainer = make_trainer()
    for stop in range(11):
        _stop_before(trainer, {stop}, _request)
        assert trainer.fit() == 130
        trainer = make_trainer(run=trainer.run)
        trainer.resume()
    assert trainer.fit() == 0
    _assert_same(trainer, straight)


@pytest.mark.parametrize("stop", [7, 11])
def test_a_power_cut_costs_only_what_came_after_the_last_checkpoint(
    make_trainer: TrainerFactory, straight: Trainer, stop: int
) -> None:
    """No handler runs; records after the checkpoint are written again, not twice."""
    stopped = make_trainer()
    _stop_before(stopped, {stop}, _power_cut)
    with pytest.raises(_PowerCutError):
        stopped.fit()
    resumed = make_trainer(run=stopped.run)
    resumed.resume()
    assert resumed.step <= stop
    assert resumed.fit() == 0
    _assert_same(resumed, straight)


def test_resuming_from_an_earlier_checkpoint(
    make_trainer: TrainerFactory, straight: Trainer
) -> None:
    """The advice for a damaged one: delete it. The best mark went with it, and comes again."""
    trainer = make_trainer({"train": {"keep_checkpoints": 99}})
    trainer.fit()
    steps = trainer.run.checkpoints.steps()
    for step in steps[2:]:
        shutil.rmtree(trainer.run.checkpoints.path(step))
    resumed = make_trainer(run=trainer.run)
    resumed.resume()
    assert resumed.step == steps[1] < 12
    assert resumed.fit() == 0
    _assert_same(resumed, straight)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"name": "sgd"}},
        {"optimizer": {"name": "radam"}},
        {"optimizer": {"name": "adamw", "weight_decay": 0.1, "schedule": "inverse-sqrt"}},
        {"task": {"memory_length": 0, "pretrain_steps": 0}},
        {"task": {"memory_length": 40, "pretrain_steps": 7}},
        {"model": {"solve": {"adjoint": "phantom", "solver": "broyden"}}},
        {"model": {"norm": "pre", "weight_norm": False}},
    ],
    ids=["sgd", "radam", "adamw", "no memory", "long memory", "phantom", "pre-norm"],
)
def test_whatever_the_configuration(make_trainer: TrainerFactory, changes: dict[str, Any]) -> None:
    straight = make_trainer(changes)
    assert straight.fit() == 0
    stopped = make_trainer(changes)
    _stop_before(stopped, {6}, _request)
    assert stopped.fit() == 130
    resumed = make_trainer(changes, run=stopped.run)
    resumed.resume()
    assert resumed.fit() == 0
    _assert_same(resumed, straight)


def test_a_finished_run_has_nothing_left_to_do(
    make_trainer: TrainerFactory, straight: Trainer
) -> None:
    resumed = make_trainer(run=straight.run)
    before = straight.run.metrics_file.read_bytes()
    resumed.resume()
    assert resumed.fit() == 0
    assert resumed.step == 12
    assert straight.run.metrics_file.read_bytes() == before
    _assert_same(resumed, straight)


def test_a_run_without_checkpoint_cannot_go_on(make_trainer: TrainerFactory) -> None:
    with pytest.raises(UserError, match="holds no checkpoint; .*start it again"):
        make_trainer().resume()


def _foreign(trainer: Trainer, state: dict[str, Any]) -> Path:
    file = trainer.run.checkpoints.path(trainer.run.checkpoints.latest()) / "training.pt"
    torch.save(state, file)
    return file


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: {},
        lambda state: {**state, "optimizer": {}},
        lambda state: {**state, "optimizer": {"state": {}, "param_groups": [{"params": [0]}]}},
        lambda state: {**state, "clock": {"ticks": 1}},
        lambda state: {**state, "random": {"cpu": torch.zeros(3), "cuda": []}},
        lambda state: {**state, "task": {**state["task"], "memory": [torch.zeros(1, 1, 1)]}},
        lambda state: {**state, "task": {"memory": None}},
    ],
    ids=["empty", "no optimiser", "another optimiser", "clock", "random", "memory", "place"],
)
def test_a_foreign_training_state_is_a_sentence(
    make_trainer: TrainerFactory,
    straight: Trainer,
    damage: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    _foreign(straight, damage(straight.run.checkpoints.load_training(12)))
    before = straight.run.metrics_file.read_bytes()
    with pytest.raises(UserError) as error:
        make_trainer(run=straight.run).resume()
    assert "\n" not in str(error.value)
    assert straight.run.metrics_file.read_bytes() == before


def test_weights_of_another_configuration_are_refused(
    make_trainer: TrainerFactory, straight: Trainer
) -> None:
    with pytest.raises(UserError, match="of shape"):
        make_trainer({"model": {"d_inner": 16}}, run=straight.run).resume()
