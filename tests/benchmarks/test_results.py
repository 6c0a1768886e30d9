"""Results of real runs belong to the recipes that the docs name them by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from equilibria import recipes
from equilibria.train.config_file import from_json

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
RUNS = [
    path
    for folder in ("copy_memory", "language_models")
    for path in RESULTS.glob(f"{folder}/*.json")
]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_had_the_options_of_its_recipe(path: Path) -> None:
    """Options that came later are at their defaults."""
    run = json.loads(path.read_text())
    experiment = recipes.load(run["recipe"]).experiment
    assert from_json(experiment, run["config"]) == experiment
    assert run["train"][-1]["step"] == experiment.train.num_steps


def test_there_are_such_runs() -> None:
    assert len(RUNS) >= 7
