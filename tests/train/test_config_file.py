"""Configurations as JSON: nothing lost, nothing guessed, nothing executed."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equilibria import (
    Anderson,
    Broyden,
    Implicit,
    OneStep,
    Phantom,
    Picard,
    Unrolled,
    UserError,
    recipes,
)
from equilibria.data.character_corpus import CharacterCorpusConfig
from equilibria.models.config import SolveConfig
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.tasks.language_modeling import LanguageModelingConfig
from equilibria.train.config_file import from_json, to_json
from equilibria.train.experiment import Experiment, TrainConfig
from equilibria.train.optimizers import OptimizerConfig

DEFAULT = Experiment(data=CharacterCorpusConfig(), model=DEQTransformerConfig())

COUNTS = st.integers(1, 10**9)
POSITIVE = st.floats(0, 1e6, exclude_min=True)
SOLVERS = st.one_of(
    st.builds(Anderson, COUNTS),
    st.builds(Broyden, st.none() | COUNTS),
    st.builds(Picard, st.floats(0.1, 1.9)),
)
ADJOINTS = st.one_of(
    st.builds(Implicit, SOLVERS, st.floats(1e-9, 0.9), POSITIVE, COUNTS),
    st.builds(Phantom, COUNTS),
    st.sampled_from([OneStep(), Unrolled()]),
)
EXPERIMENTS = st.builds(
    Experiment,
    data=st.builds(
        CharacterCorpusConfig,
        path=st.none() | st.text("ab/é .", min_size=1).map(Path),
        valid_fraction=st.floats(0.01, 0.4),
        test_fraction=st.floats(0.01, 0.4),
    ),
    model=st.builds(
        DEQTransformerConfig,
        d_model=st.sampled_from([4, 8, 700]),
        num_heads=st.sampled_from([1, 2, 4]),
        d_inner=COUNTS,
        norm=st.sampled_from(["post", "pre"]),
        weight_norm=st.booleans(),
        dropout=st.floats(0, 0.9),
        init_std=POSITIVE,
        solve=st.builds(
            SolveConfig,
            solver=SOLVERS,
            rtol=POSITIVE,
            max_steps=COUNTS,
            adjoint=ADJOINTS,
            eval_solver=st.none() | SOLVERS,
            eval_rtol=st.none() | POSITIVE,
            eval_max_steps=st.none() | COUNTS,
        ),
    ),
    task=st.builds(
        LanguageModelingConfig,
        batch_size=COUNTS,
        memory_length=st.integers(0, 1000),
        eval_memory_length=st.none() | st.integers(0, 1000),
    ),
    optimizer=st.builds(
        OptimizerConfig,
        name=st.sampled_from(["adam", "adamw", "radam", "sgd"]),
        learning_rate=POSITIVE,
        schedule=st.sampled_from(["cosine", "constant", "inverse-sqrt"]),
    ),
    train=st.builds(
        TrainConfig,
        num_steps=COUNTS,
        device=st.sampled_from(["auto", "cpu", "cuda"]),
        folder=st.text("ab/é .", min_size=1).map(Path),
    ),
    seed=st.integers(0, 2**63 - 1),
)


def _through_a_file(config: Any) -> Any:
    return json.loads(json.dumps(to_json(config)))


@given(EXPERIMENTS)
def test_every_experiment_survives_its_file(experiment: Experiment) -> None:
    assert from_json(DEFAULT, _through_a_file(experiment)) == experiment


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_survives_its_file(name: str) -> None:
    experiment = recipes.load(name).experiment
    assert from_json(experiment, _through_a_file(experiment)) == experiment


def test_every_option_is_in_the_file() -> None:
    def count(value: Any) -> int:
        fields = dataclasses.fields(value)
        return sum(
            count(item)
            if dataclasses.is_dataclass(item := getattr(value, field.name))
            and not isinstance(item, Anderson | Broyden | Implicit)
            else 1
            for field in fields
        )

    def leaves(value: Any) -> int:
        return sum(map(leaves, value.values())) if isinstance(value, dict) else 1

    assert leaves(to_json(DEFAULT)) == count(DEFAULT) > 35


def test_plugins_are_their_description() -> None:
    text = to_json(DEFAULT)["model"]["solve"]["solver"]
    assert text.startswith("anderson(history_size=10, ")


def test_options_that_the_file_lacks_keep_their_default() -> None:
    """Runs of an older version stay readable."""
    changed = from_json(DEFAULT, {"model": {"solve": {"max_steps": 7}}, "seed": 4})
    assert changed.seed == 4
    assert isinstance(changed.model, DEQTransformerConfig)
    assert changed.model.solve == dataclasses.replace(SolveConfig(), max_steps=7)
    assert from_json(DEFAULT, {}) == DEFAULT


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, r"unknown option 'sed'; did you mean 'seed'\?"),
        (
            {"task": {"batchsize": 1}},
            r"unknown option 'task\.batchsize'; did you mean 'batch_size'",
        ),
        (
            {"model": {"solve": {"Max-Steps": 1}}},
            r"'model\.solve\.Max-Steps'; did you mean 'max_st",
        ),
        ({"model": {"qqqqqq": 1}}, r"unknown option 'model\.qqqqqq'$"),
        ({"model": 3}, r"model is 3, expected named options"),
        ([1], r"the configuration is \[1\], expected named options"),
        (None, r"the configuration is None, expected named options"),
        ({"model": {"solve": {"solver": "andersn"}}}, "did you mean 'anderson'"),
        ({"model": {"solve": {"solver": None}}}, r"'model\.solve\.solver' cannot be None"),
        ({"model": {"solve": {"solver": 3}}}, r"'model\.solve\.solver' cannot be 3"),
        ({"model": {"solve": {"eval_solver": "andersn"}}}, "did you mean 'anderson'"),
        ({"model": {"num_heads": 3}}, "num_heads=3 does not divide d_model=128"),
        ({"train": {"num_steps": 0}}, "num_steps=0 must be an integer of at least 1"),
        ({"optimizer": {"learning_rate": math.nan}}, "learning_rate=nan"),
        ({"seed": -1}, r"seed=-1 must be between 0 and 2\*\*63 - 1"),
        ({"seed": 10**40}, r"seed=10+ must be between"),
    ],
)
def test_what_cannot_be_meant_is_refused(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_json(DEFAULT, values)


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("task", "batch_size", "5"),
        ("task", "batch_size", 5.0),
        ("task", "batch_size", True),
        ("task", "batch_size", None),
        ("task", "batch_size", [5]),
        ("task", "eval_memory_length", "5"),
        ("model", "dropout", "0.1"),
        ("model", "dropout", None),
        ("model", "dropout", True),
        ("model", "weight_norm", 1),
        ("model", "weight_norm", "true"),
        ("model", "norm", "past"),
        ("model", "norm", 3),
        ("train", "device", "gpu"),
        ("train", "folder", None),
        ("train", "folder", 3),
        ("data", "path", 3),
        ("data", "path", ["a"]),
    ],
)
def test_values_of_another_type_are_refused(section: str, option: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"option '{section}\.{option}' cannot be") as error:
        from_json(DEFAULT, {section: {option: value}})
    assert "<class" not in str(error.value)


def test_whole_numbers_may_stand_for_real_ones() -> None:
    changed = from_json(DEFAULT, {"optimizer": {"clip_norm": 1}, "model": {"init_std": 2}})
    assert type(changed.optimizer.clip_norm) is float
    assert changed.optimizer.clip_norm == 1.0


def test_the_default_is_untouched() -> None:
    before = to_json(DEFAULT)
    from_json(DEFAULT, {"seed": 9, "task": {"batch_size": 3}})
    assert to_json(DEFAULT) == before


@pytest.mark.parametrize("nested", [False, True])
def test_a_file_imports_no_module_that_nobody_asked_for(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: bool
) -> None:
    """To import a module is to run it, and a file may be somebody else's."""
    (tmp_path / "stranger.py").write_text(
        "from dataclasses import dataclass\n"
        "from equilibria import Picard\n"
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Picard):\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    solver = "fallback(anderson, stranger:Mine)" if nested else "stranger:Mine(relaxation=0.5)"
    values = {"model": {"solve": {"solver": solver}}}
    with pytest.raises(UserError, match="EQUILIBRIA_TRUST=stranger"):
        from_json(experiment, values)
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv("EQUILIBRIA_TRUST", "other,stranger")
    assert "stranger:Mine" in json.dumps(to_json(from_json(experiment, values)))
    sys.modules.pop("stranger")


@pytest.mark.parametrize(
    "text",
    [
        "trap:Solver()",
        "trap.Solver",
        "equilibria:Anderson()",  # imported already, and still no name of ours
        "fallback(anderson, trap:Solver())",
        "newton_krylov(linear_solver=trap:Solver(x=1))",
        "anderson(ridge=trap.ridge)",
        "anderson().__class__()",
    ],
)
def test_files_of_strangers_name_plug_ins_of_ours_only(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("EQUILIBRIA_TRUST", "trap")  # what a run may do, a shared model may not
    with pytest.raises(UserError, match="names a class outside of equilibria"):
        from_json(SolveConfig(), {"solver": text}, outside=False)


@pytest.mark.parametrize("text", ["anderson", "fallback(anderson, broyden(history_size=3))"])
def test_files_of_strangers_have_our_names(text: str) -> None:
    values = {"solver": text}
    assert from_json(SolveConfig(), values, outside=False) == from_json(SolveConfig(), values)
