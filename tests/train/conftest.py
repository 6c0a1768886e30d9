"""A run small enough to be trained hundreds of times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from equilibria import Anderson, Implicit
from equilibria.data.character_corpus import CharacterCorpusConfig
from equilibria.models.config import SolveConfig
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.tasks.language_modeling import LanguageModelingConfig
from equilibria.train.config_file import from_json
from equilibria.train.experiment import Experiment, TrainConfig
from equilibria.train.loop import Trainer
from equilibria.train.optimizers import OptimizerConfig
from equilibria.train.run_folder import RunFolder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of 432 characters with a vocabulary of 20."""
    file = tmp_path / "text.txt"
    file.write_text("the quick brown dog jumps over a lazy cow. but why?\n".replace("j", "t") * 8)
    return file


@pytest.fixture
def experiment(text_file: Path, tmp_path: Path) -> Experiment:
    """Twelve steps on a 5-segment text, all kinds of dropout, the first steps unrolled."""
    return Experiment(
        data=CharacterCorpusConfig(path=text_file, valid_fraction=0.1, test_fraction=0.1),
        model=DEQTransformerConfig(
            d_model=8,
            num_heads=2,
            d_inner=12,
            dropout=0.2,
            embedding_dropout=0.1,
            solve=SolveConfig(
                solver=Anderson(), max_steps=5, adjoint=Implicit(rtol=1e-2, max_steps=4)
            ),
        ),
        task=LanguageModelingConfig(
            batch_size=4,
            segment_length=16,
            memory_length=12,
            pretrain_steps=4,
            pretrain_layers=2,
            eval_streams=2,
        ),
        optimizer=OptimizerConfig(warmup_steps=3),
        train=TrainConfig(
            num_steps=12,
            log_every=5,
            eval_every=4,
            checkpoint_every=6,
            device="cpu",
            folder=tmp_path / "runs",
        ),
        seed=3,
    )


@pytest.fixture
def make_trainer(experiment: Experiment) -> Callable[..., Trainer]:
    """Trainer of `experiment` with some options changed, in a new run folder or a given one."""

    def make(changes: dict[str, Any] | None = None, run: RunFolder | None = None) -> Trainer:
        changed = from_json(experiment, changes or {})
        task = changed.build_task(changed.data.load())
        if run is None:
            run = RunFolder.create(changed.train.folder, "tiny")
            run.write_config("tiny", changed)
        return Trainer(changed, task, run)

    return make
