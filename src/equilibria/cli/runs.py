"""Opening a finished or unfinished run for a look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from equilibria.cli.train import check_data, load_config
from equilibria.core.errors import UserError
from equilibria.models.config import ModelConfig
from equilibria.pretrained.folder import read_vocabulary
from equilibria.tasks.language_modeling import LanguageModeling
from equilibria.tasks.task import Task
from equilibria.train.experiment import Corpus, Data, Experiment, Vocabulary
from equilibria.train.fit import check_fits
from equilibria.train.run_folder import RunFolder


def open_run(path: Path) -> tuple[RunFolder, Experiment]:
    """Return a run and its configuration.

    Raises:
        UserError: no run folder, or one without checkpoint.
    """
    run = RunFolder.open(path)
    run.checkpoints.latest()
    return run, load_config(str(run.config_file))[1]


def load_task(run: RunFolder, experiment: Experiment, checkpoint: str) -> tuple[Task, Data, int]:
    """Build the task of a run with the weights of a checkpoint: "best", "last" or a step.

    Raises:
        UserError: no such checkpoint, other data, or weights that do not fit.
    """
    step = checkpoint_step(run, checkpoint)
    data = experiment.data.load()
    check_data(run, data)
    task = experiment.build_task(data, run.checkpoints.weights(step))
    run.checkpoints.load_weights(step, task.model)
    return task, data, step


def build_model(run: RunFolder, config: ModelConfig, step: int, vocabulary_size: int) -> nn.Module:
    """The model of a run with the weights of a checkpoint; the data are not needed.

    Raises:
        UserError: the weights are damaged, or do not fit; no model is made then.
    """
    check_fits(run.checkpoints.weights(step), config, vocabulary_size)
    model = config.build(vocabulary_size)
    run.checkpoints.load_weights(step, model)
    return model


def on_text(task: Task, data: Data) -> tuple[LanguageModeling, Corpus]:
    """The same task and data, known to be language modelling on a text.

    Raises:
        UserError: they are not.
    """
    if not isinstance(task, LanguageModeling) or not isinstance(data, Corpus):
        raise UserError(
            f"the run is {type(task).__name__} on {data.describe()['name']}; only a language "
            "model of a text can continue one"
        )
    return task, data


def environment_of(run: RunFolder) -> dict[str, Any]:
    """What a run recorded of where it was made and what it read.

    Raises:
        UserError: the record is missing or damaged.
    """
    environment = run.read_json("environment.json")
    if not isinstance(environment, dict) or not isinstance(environment.get("data"), dict):
        raise UserError(
            f"environment.json in {run.path} does not say what the run read; restore it"
        )
    return environment


def vocabulary_of(run: RunFolder, experiment: Experiment) -> Vocabulary | None:
    """Symbols of the token ids of a run, without its data; None of one that read no text.

    Raises:
        UserError: it is damaged, or of another size than the run recorded.
    """
    if not run.vocabulary_file.exists():
        return None
    size = vocabulary_size_of(run, experiment)
    vocabulary = read_vocabulary(run.vocabulary_file, size)
    if len(vocabulary) != size:
        raise UserError(
            f"{run.vocabulary_file} has {len(vocabulary):,} symbols, and by its environment.json "
            f"the run {size:,}; restore both"
        )
    return vocabulary


def vocabulary_size_of(run: RunFolder, experiment: Experiment) -> int:
    """As the run recorded it of a text, else that of its data.

    Raises:
        UserError: the record is of no size.
    """
    size = environment_of(run)["data"].get("vocabulary_size")
    if size is not None:
        if type(size) is not int or size < 1:
            raise UserError(
                f"environment.json in {run.path} says that the vocabulary has the size "
                f"{str(size)[:60]!r}, expected a number of at least 1; restore it"
            )
        return size
    data: Any = experiment.data.load()
    return len(data.vocabulary) if isinstance(data, Corpus) else int(data.vocabulary_size)


def checkpoint_step(run: RunFolder, checkpoint: str) -> int:
    """The step of a checkpoint: of "best", "last" or a step itself.

    Raises:
        UserError: no such checkpoint.
    """
    steps = run.checkpoints.steps()
    match checkpoint:
        case "best":
            return run.checkpoints.best()
        case "last":
            return run.checkpoints.latest()
        case _ if checkpoint.isdecimal() and int(checkpoint) in steps:
            return int(checkpoint)
        case _:
            raise UserError(
                f"the run has no checkpoint {checkpoint!r}; give 'best', 'last' or one of "
                f"{', '.join(map(str, steps))}"
            )
