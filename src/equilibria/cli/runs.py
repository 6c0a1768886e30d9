"""Opening a finished or unfinished run for a look."""

from __future__ import annotations

from pathlib import Path

from equilibria.cli.train import check_data, load_config
from equilibria.core.errors import UserError
from equilibria.tasks.language_modeling import LanguageModeling
from equilibria.tasks.task import Task
from equilibria.train.experiment import Corpus, Data, Experiment
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
    task = experiment.build_task(data)
    run.checkpoints.load_weights(step, task.model)
    return task, data, step


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
