"""The training loop: what it writes and when, and what it does when the numbers go wrong."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from equilibria import UserError
from equilibria.models.config import ModelConfig
from equilibria.models.recurrent import RecurrentConfig
from equilibria.models.tcn import TCNConfig
from equilibria.tasks.copy_memory import CopyMemoryConfig
from equilibria.train.experiment import Experiment
from equilibria.train.loop import Trainer, TrainingError
from equilibria.train.run_folder import RunFolder

TrainerFactory = Callable[..., Trainer]


def _records(trainer: Trainer, kind: str) -> list[dict[str, Any]]:
    return [record for record in trainer.run.metrics() if record["kind"] == kind]


def test_a_run_writes_what_it_promises(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer()
    assert trainer.fit() == 0
    training, validation = _records(trainer, "train"), _records(trainer, "valid")
    assert [r["step"] for r in training] == [5, 10, 12]  # every 5, and the last
    assert [r["step"] for r in validation] == [4, 8, 12]
    assert [r["phase"] for r in training] == ["equilibrium"] * 3
    for record in training:
        assert set(record) == {
            "kind",
            "step",
            "phase",
            "learning_rate",
            "loss",
            "gradient_norm",
            "num_evals",
            "num_evals_max",
            "relative_residual",
            "relative_residual_max",
            "backward_num_evals",
            "backward_relative_residual",
            "forward_seconds",
            "backward_seconds",
            "seconds",
            "tokens_per_second",
        }
        assert 0 < record["loss"] < 2 * math.log(20)
        assert 1 < record["num_evals"] <= record["num_evals_max"] <= 6
        assert record["forward_seconds"] + record["backward_seconds"] < record["seconds"]
    for record in validation:
        assert set(record) == {"kind", "step", "loss", "num_evals", "relative_residual"}
    # JSON that other readers take too, so no NaN or Infinity
    for line in trainer.run.metrics_file.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_learning_rate_is_that_of_the_schedule(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer({"train": {"log_every": 1}})
    trainer.fit()
    optimizer = trainer.experiment.optimizer
    expected = [optimizer.learning_rate_at(step, 12) for step in range(12)]
    assert [r["learning_rate"] for r in _records(trainer, "train")] == expected
    phases = [r["phase"] for r in _records(trainer, "train")]
    assert phases == ["unrolled"] * 4 + ["equilibrium"] * 8


def test_training_learns(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer(
        {
            "optimizer": {"learning_rate": 0.02},
            "train": {"num_steps": 60, "log_every": 30, "eval_every": 60},
        }
    )
    trainer.fit()
    first, second = (record["loss"] for record in _records(trainer, "train"))
    assert second < first - 0.2
    assert second < math.log(20)


def test_gradients_are_clipped_to_the_norm(make_trainer: TrainerFactory) -> None:
    """A step of plain gradient descent is as long as the learning rate times the clipped norm."""
    trainer = make_trainer(
        {
            "optimizer": {
                "name": "sgd",
                "momentum": 0.0,
                "clip_norm": 0.01,
                "learning_rate": 0.5,
                "warmup_steps": 0,
                "schedule": "constant",
            },
            "train": {"num_steps": 1, "log_every": 1},
        }
    )
    before = [p.detach().clone() for p in trainer.task.model.parameters()]
    trainer.fit()
    moved = sum(
        (p.detach() - b).square().sum()
        for p, b in zip(trainer.task.model.parameters(), before, strict=True)
    )
    assert math.sqrt(moved) == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert _records(trainer, "train")[0]["gradient_norm"] > 0.01  # the norm before clipping


def test_no_clipping_is_possible(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer({"optimizer": {"clip_norm": 0.0}, "train": {"num_steps": 2}})
    assert trainer.fit() == 0


def test_checkpoints_are_the_newest_and_the_best(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer({"train": {"checkpoint_every": 1, "keep_checkpoints": 2}})
    losses = iter([3.0, 2.0, 2.5])
    evaluate = trainer.task.evaluate

    def scripted(split: Any) -> Any:
        return evaluate(split).__class__(next(losses), 1, torch.ones(1), torch.ones(1), seconds=0.0)

    trainer.task.evaluate = scripted  # pyright: ignore[reportAttributeAccessIssue]
    trainer.fit()
    assert trainer.run.checkpoints.steps() == [8, 11, 12]
    assert (trainer.run.checkpoints.best(), trainer.run.checkpoints.best_loss()) == (8, 2.0)


def test_an_improvement_is_saved_at_once(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer({"train": {"checkpoint_every": 1000}})
    trainer.fit()
    validation = {r["step"]: r["loss"] for r in _records(trainer, "valid")}
    best = min(validation, key=validation.__getitem__)
    assert trainer.run.checkpoints.best() == best
    assert set(trainer.run.checkpoints.steps()) >= {best, 12}


def test_the_same_seed_gives_the_same_run(make_trainer: TrainerFactory) -> None:
    trainers: list[Trainer] = []
    for seed in (3, 3, 4):
        trainers.append(make_trainer({"seed": seed}))
        trainers[-1].fit()
    first, second, _ = (list(trainer.task.model.parameters()) for trainer in trainers)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    losses = [[record["loss"] for record in _records(t, "train")] for t in trainers]
    assert losses[0] == losses[1] != losses[2]


def _poison(trainer: Trainer, where: str, steps: set[int]) -> None:
    """Make the loss, or the gradient alone, of some steps not finite."""
    training_losses = trainer.task.training_losses
    parameter = next(trainer.task.model.parameters())

    def poisoned(step: int, num_chunks: int = 1) -> Any:
        for result in training_losses(step, num_chunks):
            if step not in steps:
                yield result
            elif where == "loss":
                yield result._replace(loss=result.loss * math.nan)
            else:
                # the square root's derivative at zero is infinite, its value is not
                yield result._replace(loss=result.loss + (parameter * 0.0).abs().sum().sqrt())

    trainer.task.training_losses = poisoned  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    make_trainer: TrainerFactory, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer({"train": {"checkpoint_every": 1, "keep_checkpoints": 20}})
    _poison(trainer, where, {6, 7})
    assert trainer.fit() == 0
    assert f"the {where} of step 7 is not finite" in capsys.readouterr().err
    assert [r.get("skipped_steps") for r in _records(trainer, "train")] == [None, 2, None]
    weights = [
        load_file(trainer.run.checkpoints.path(step) / "model.safetensors") for step in (6, 8, 9)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert all(math.isfinite(r["loss"]) for r in _records(trainer, "train"))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_many_steps_that_are_not_finite_stop_the_run(
    make_trainer: TrainerFactory, where: str
) -> None:
    trainer = make_trainer({"train": {"checkpoint_every": 1, "max_nonfinite_steps": 3}})
    _poison(trainer, where, {2, 3, 7, 8, 9})
    with pytest.raises(TrainingError, match=rf"the {where} of step 10 is not finite") as error:
        trainer.fit()
    assert "as were 2 steps before it" in str(error.value)
    assert "lower --optimizer.learning-rate" in str(error.value)
    assert "\n" not in str(error.value)
    assert trainer.run.checkpoints.latest() == 9
    resumed = make_trainer(run=trainer.run)
    resumed.resume()
    assert all(p.isfinite().all() for p in resumed.task.model.parameters())
    assert resumed.fit() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_saves(
    make_trainer: TrainerFactory, number: signal.Signals
) -> None:
    trainer = make_trainer()
    training_losses = trainer.task.training_losses

    def interrupted(step: int, num_chunks: int = 1) -> Any:
        if step == 6:
            os.kill(os.getpid(), number)
        return training_losses(step, num_chunks)

    trainer.task.training_losses = interrupted  # pyright: ignore[reportAttributeAccessIssue]
    assert trainer.fit() == 128 + number
    assert trainer.step == 7
    assert trainer.run.checkpoints.latest() == 7


def test_stopping_where_a_checkpoint_is_due_writes_it_once(
    make_trainer: TrainerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer({"train": {"eval_every": 100}})
    training_losses = trainer.task.training_losses
    saved: list[int] = []
    save = type(trainer.run.checkpoints).save

    def counted(folder: Any, step: int, *rest: Any) -> Any:
        saved.append(step)
        return save(folder, step, *rest)

    def interrupted(step: int, num_chunks: int = 1) -> Any:
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return training_losses(step, num_chunks)

    monkeypatch.setattr(type(trainer.run.checkpoints), "save", counted)
    trainer.task.training_losses = interrupted  # pyright: ignore[reportAttributeAccessIssue]
    assert trainer.fit() == 130
    assert saved == [6]


@pytest.mark.parametrize("model", [RecurrentConfig(unit="lstm"), TCNConfig(num_blocks=2)])
def test_explicit_models_train_on_text_too(
    experiment: Experiment, tmp_path: Path, model: ModelConfig
) -> None:
    """With their own memory from segment to segment, and without figures of solves."""
    task_config = replace(experiment.task, pretrain_steps=0)  # pyright: ignore[reportArgumentType]
    explicit = replace(experiment, model=model, task=task_config)
    run = RunFolder.create(tmp_path, "explicit")
    trainer = Trainer(explicit, explicit.build_task(explicit.data.load()), run)
    assert trainer.fit() == 0
    assert trainer.statistics.as_dict() is None
    records = [record for record in run.metrics() if record["kind"] == "train"]
    assert {record["phase"] for record in records} == {"explicit"}
    assert not any("num_evals" in record for record in records)
    resumed = Trainer(explicit, explicit.build_task(explicit.data.load()), run)
    resumed.resume()
    assert resumed.task.state_dict()["memory"]


def test_pretraining_needs_an_equilibrium(experiment: Experiment) -> None:
    with pytest.raises(UserError, match="pretrain_steps=4, but TCNConfig is an explicit model"):
        replace(experiment, model=TCNConfig())


def test_task_and_data_have_to_belong_together(experiment: Experiment) -> None:
    foreign = replace(experiment, task=CopyMemoryConfig())
    with pytest.raises(UserError, match="CopyMemoryConfig cannot learn from TextCorpus"):
        foreign.build_task(foreign.data.load())


def test_statistics_are_of_equilibria_only(
    make_trainer: TrainerFactory, experiment: Experiment
) -> None:
    trainer = make_trainer({"train": {"num_steps": 4}})
    trainer.fit()
    assert trainer.statistics.as_dict() is None  # all four steps were unrolled
    trainer = make_trainer()
    trainer.fit()
    figures = trainer.statistics.as_dict()
    assert figures is not None
    assert 3 < figures["num_evals"]["mean"] <= 6
    clock = trainer.clock.as_dict()
    assert min(clock.values()) > 0
    assert clock["rest_seconds"] < clock["total_seconds"]


def test_bfloat16_computes_in_less_precision(make_trainer: TrainerFactory) -> None:
    """Weights and losses stay in float32."""
    losses = []
    for precision in ("float32", "bfloat16"):
        trainer = make_trainer({"train": {"precision": precision}})
        assert trainer.fit() == 0
        assert {p.dtype for p in trainer.task.model.parameters()} == {torch.float32}
        losses.append(_records(trainer, "valid")[-1]["loss"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    with pytest.raises(UserError, match="cannot be 'float16'"):
        make_trainer({"train": {"precision": "float16"}})


def test_a_plateau_is_saved_and_resumed(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer({"optimizer": {"schedule": "plateau"}})
    trainer.fit()
    trainer.plateau.factor = 0.125
    trainer._save()
    trainer.plateau.factor = 1.0
    trainer.resume()
    assert trainer.plateau.factor == 0.125
