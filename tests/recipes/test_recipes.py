"""Recipes: every one loads, says what it is, and trains."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch

from equilibria import UserError, recipes
from equilibria.train.config_file import from_json, to_json
from equilibria.train.experiment import Experiment
from equilibria.train.loop import Trainer
from equilibria.train.run_folder import RunFolder

NAMES = recipes.names()
# What makes any recipe tiny; options that a recipe does not have are left out.
TINY: dict[str, Any] = {
    "data": {
        "valid_fraction": 0.1,
        "test_fraction": 0.1,
        "num_blanks": 8,
        "num_valid": 2,
        "num_test": 2,
    },
    "model": {
        "d_model": 8,
        "d_hidden": 8,
        "num_blocks": 2,
        "cutoffs": [],
        "div_val": 1,
        "num_heads": 2,
        "d_inner": 12,
        "solve": {"max_steps": 4, "eval_max_steps": 4},
    },
    "task": {"batch_size": 2, "segment_length": 8, "memory_length": 8, "pretrain_steps": 1},
    "train": {"num_steps": 2, "device": "cpu"},
}


def _known(options: dict[str, Any], present: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _known(value, present[name]) if isinstance(value, dict) else value
        for name, value in options.items()
        if name in present
    }


def _tiny(experiment: Experiment, text_file: Path) -> Experiment:
    present = to_json(experiment)
    if not experiment.task.pretrain_steps:  # an explicit model has nothing to unroll
        del present["task"]["pretrain_steps"]
    small = from_json(experiment, _known(TINY, present))
    texts = {"path": str(text_file), "name": None, "folder": str(text_file.parent)}
    if "cache" in present["data"]:  # words
        texts["cache"] = str(text_file.parent / "cache")
    return from_json(small, _known({"data": texts}, to_json(small)))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown dog\n" * 20)
    for split in ("train", "valid", "test"):
        (tmp_path / f"ptb.{split}.txt").write_text("the quick brown dog\n" * 20)
    return file


def test_there_is_a_default_and_names_are_those_of_files() -> None:
    assert recipes.DEFAULT in NAMES
    assert sorted(NAMES) == NAMES
    files = [module.name for module in pkgutil.iter_modules(recipes.__path__)]
    assert [name.replace("-", "_") for name in NAMES] == sorted(files)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_is(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name
    assert 20 < len(recipe.description) < 120
    assert recipe.description[0].isupper()
    assert not recipe.description.endswith(".")
    assert any(character.isdigit() for character in recipe.expected)  # the number to expect
    module = importlib.import_module(f"equilibria.recipes.{name.replace('-', '_')}")
    assert len((module.__doc__ or "").strip().splitlines()) > 1  # more than the one-line summary
    assert recipe.experiment == recipes.load(name).experiment


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_a_consistent_schedule(name: str) -> None:
    """Long enough to reach the equilibrium phase, to be evaluated and to be saved."""
    experiment = recipes.load(name).experiment
    assert experiment.task.pretrain_steps < experiment.train.num_steps
    assert experiment.optimizer.warmup_steps < experiment.train.num_steps
    assert experiment.train.eval_every <= experiment.train.num_steps


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_builds_at_full_size(name: str) -> None:
    experiment = recipes.load(name).experiment
    with torch.device("meta"):
        model = experiment.model.build(267_735)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1000


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains(name: str, text_file: Path, tmp_path: Path) -> None:
    """One unrolled step and one at equilibrium, an evaluation and a checkpoint."""
    experiment = _tiny(recipes.load(name).experiment, text_file)
    task = experiment.build_task(experiment.data.load())
    before = [p.detach().clone() for p in task.model.parameters()]
    run = RunFolder.create(tmp_path, name)
    assert Trainer(experiment, task, run).fit() == 0
    assert run.checkpoints.latest() == 2
    kinds = [record["kind"] for record in run.metrics()]
    assert kinds.count("valid") >= 1
    for parameter, old in zip(task.model.parameters(), before, strict=True):
        assert not parameter.equal(old)


@pytest.mark.parametrize("name", NAMES)
def test_hyphens_underscores_and_case_are_the_same(name: str) -> None:
    for written in (name, name.replace("-", "_"), name.upper()):
        assert recipes.load(written).name == name


@pytest.mark.parametrize("written", ["pydoc-character", "pydoc charakters"])
def test_a_name_that_is_nearly_right(written: str) -> None:
    with pytest.raises(UserError, match=f"no recipe is called {written!r}; did you mean 'pydoc-ch"):
        recipes.load(written)


def test_a_name_that_is_not() -> None:
    with pytest.raises(UserError, match="no recipe is called 'x'; 'equilibria recipes' lists them"):
        recipes.load("x")
