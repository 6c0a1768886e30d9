"""The end of a run: the best checkpoint is judged, and everything is written down."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from equilibria.tasks.generation import SamplingConfig
from equilibria.train.loop import Trainer
from equilibria.train.report import finish, render

TrainerFactory = Callable[..., Trainer]


@pytest.fixture(autouse=True)
def short_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 tokens would outlast the training."""
    monkeypatch.setattr(
        "equilibria.train.report.SamplingConfig",
        lambda num_tokens, seed: SamplingConfig(num_tokens=num_tokens // 50, seed=seed),
    )


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equilibria.diagnostics.plots.plot_run", lambda *_, **__: None)


@pytest.fixture
def trained(make_trainer: TrainerFactory, no_pictures: None) -> Trainer:
    trainer = make_trainer({"model": {"solve": {"eval_max_steps": 3}}})
    trainer.fit()
    return trainer


def _finish(trainer: Trainer) -> dict[str, Any]:
    return finish(trainer, trainer.experiment.data.load())


def test_the_best_checkpoint_is_judged_and_not_the_last(trained: Trainer) -> None:
    with torch.no_grad():
        for parameter in trained.task.model.parameters():
            parameter.zero_()  # what is in memory must not matter
    summary = _finish(trained)
    best = trained.run.checkpoints.best()
    assert (summary["best_step"], summary["step"]) == (best, 12)
    trained.run.checkpoints.load_weights(best, trained.task.model)
    assert summary["test_loss"] == trained.task.evaluate("test").loss


def test_the_summary_is_written_and_told(trained: Trainer) -> None:
    summary = _finish(trained)
    written = json.loads((trained.run.path / "summary.json").read_text())
    assert written == summary
    told = render(summary, trained.run)
    assert str(trained.run.path) in told
    lines = told.splitlines()
    bits = [summary["test_bits_per_character"], *summary["baseline_bits_per_character"].values()]
    table = [line for line in lines if line.startswith("  ")][1:]
    shown = [float(line.split()[-2]) for line in table]
    assert shown == pytest.approx(sorted(bits), abs=1e-3)  # the best first, whoever it is
    assert summary["num_parameters"] == sum(p.numel() for p in trained.task.model.parameters())


def test_the_trace_is_of_both_solves(trained: Trainer) -> None:
    _finish(trained)
    (trace,) = [record for record in trained.run.metrics() if record["kind"] == "trace"]
    for solve in ("forward", "backward"):
        assert len(trace[solve]) == 2
        for sample in trace[solve]:
            assert all(value is None or math.isfinite(value) for value in sample)
    assert trace["backward_tolerance"] == 1e-2
    assert trace["step"] == 12


@pytest.mark.parametrize("adjoint", ["one_step", "phantom(num_steps=2)", "unrolled"])
def test_gradients_without_a_backward_solve(
    make_trainer: TrainerFactory, no_pictures: None, adjoint: str
) -> None:
    trainer = make_trainer({"model": {"solve": {"adjoint": adjoint, "eval_max_steps": 3}}})
    trainer.fit()
    _finish(trainer)
    (trace,) = [record for record in trainer.run.metrics() if record["kind"] == "trace"]
    assert trace["backward"] == []
    assert trace["backward_tolerance"] is None


def test_a_run_without_equilibria_has_no_figures_of_them(
    make_trainer: TrainerFactory, no_pictures: None
) -> None:
    trainer = make_trainer({"task": {"pretrain_steps": 12}, "model": {"solve": {"max_steps": 2}}})
    trainer.fit()
    summary = _finish(trainer)
    assert summary["training_solves"] is None
    told = render(summary, trainer.run)
    assert "equilibria in training" not in told
    assert "equilibria of the test" in told


def test_pictures_are_drawn(make_trainer: TrainerFactory) -> None:
    trainer = make_trainer({"model": {"solve": {"eval_max_steps": 3}}})
    trainer.fit()
    _finish(trainer)
    assert len(list(trainer.run.path.rglob("*.png"))) >= 3
