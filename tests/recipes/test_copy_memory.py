"""The copy-memory recipes: of the published sizes, comparable, and one that is learnt here."""

from __future__ import annotations

from pathlib import Path

import pytest

from equilibria import recipes
from equilibria.train.loop import Trainer
from equilibria.train.run_folder import RunFolder

SIZES = {"deq-transformer": 14_058, "tcn": 16_070, "lstm": 13_942, "gru": 14_079}
PUBLISHED = {"deq-transformer": "3.5e-6", "tcn": "2.7e-5", "lstm": "0.0501", "gru": "0.0491"}


@pytest.mark.parametrize("model", SIZES)
def test_sizes_and_losses_are_the_published_ones(model: str) -> None:
    """14K, and 16K for the TCN; the output bias and, of the DEQ, the embedding are in."""
    recipe = recipes.load(f"copy-memory-{model}")
    built = recipe.experiment.model.build(10)
    assert sum(p.numel() for p in built.parameters()) == SIZES[model]
    assert f"{SIZES[model] / 1000:.0f}" in recipe.description
    assert PUBLISHED[model] in recipe.expected


def test_all_models_see_the_same_sequences() -> None:
    experiments = [recipes.load(f"copy-memory-{model}").experiment for model in SIZES]
    for experiment in experiments:
        assert experiment.data == experiments[0].data
        assert experiment.task.batch_size == experiments[0].task.batch_size  # pyright: ignore[reportAttributeAccessIssue]
        assert experiment.train.num_steps == experiments[0].train.num_steps
        assert experiment.seed == 0


@pytest.mark.slow
def test_the_small_one_is_learnt(tmp_path: Path) -> None:
    experiment = recipes.load("copy-memory-small").experiment
    task = experiment.build_task(experiment.data.load())
    trainer = Trainer(experiment, task, RunFolder.create(tmp_path, "small"))
    assert trainer.fit() == 0
    result = task.evaluate("test")
    assert result.figures == {"recall": 1.0, "exact_recall": 1.0}
    assert result.loss < 2e-3
    assert result.relative_residual.max() < 1e-3
