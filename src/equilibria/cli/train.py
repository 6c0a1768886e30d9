"""`equilibria train`: train a recipe, a saved configuration, or go on with a run."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from equilibria import recipes
from equilibria.cli.main import EXIT_TRAINING_ERROR
from equilibria.cli.parsing import parse
from equilibria.core.errors import UserError
from equilibria.train.config_file import from_json
from equilibria.train.environment import describe_environment
from equilibria.train.experiment import Corpus, Data, Experiment
from equilibria.train.files import read_json
from equilibria.train.loop import Trainer, TrainingError
from equilibria.train.report import finish, render
from equilibria.train.run_folder import RunFolder


def main(arguments: Sequence[str]) -> int:
    """Train; 0 when finished, 128 + signal when stopped and saved, 1 when loss is not finite."""
    given = list(arguments)
    if "--resume" in given or any(word.startswith("--resume=") for word in given):
        trainer, data = _resume(given)
    else:
        trainer, data = _start(given)
    try:
        exit_code = trainer.fit()
        if exit_code:
            _say_how_to_go_on(trainer, f"stopped after step {trainer.step} and saved")
            return exit_code
        summary = finish(trainer, data)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_TRAINING_ERROR
    except KeyboardInterrupt:
        # a second Ctrl-C, or one while the report is made
        steps = trainer.run.checkpoints.steps()
        if steps:
            _say_how_to_go_on(trainer, f"stopped at once; step {steps[-1]} is saved")
        raise
    print(render(summary, trainer.run))
    return 0


def _say_how_to_go_on(trainer: Trainer, what: str) -> None:
    folder = shlex.quote(str(trainer.run.path))
    print(f"{what}; go on with:\n  {_program()} train --resume {folder}", file=sys.stderr)


def _program() -> str:
    """How this command can be called again: by path when it is not on PATH, as in `make train`."""
    called = Path(sys.argv[0])
    if called.name == "equilibria" and shutil.which("equilibria") is None:
        return shlex.quote(str(called))
    return "equilibria"


def load_config(source: str | None) -> tuple[str, Experiment, str]:
    """Recipe name, configuration and description behind a recipe's name or a config file.

    Raises:
        UserError: neither a recipe nor a readable configuration.
    """
    if source is not None and (source.endswith(".json") or Path(source).is_dir()):
        file = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
        saved = read_json(file, "give a recipe's name or the config.json of a run")
        if not isinstance(saved, dict) or not {"recipe", "config"} <= saved.keys():
            raise UserError(f"{file} has no recipe and config; it is not the config of a run")
        recipe = recipes.load(str(saved["recipe"]))
        return recipe.name, from_json(recipe.experiment, saved["config"]), recipe.description
    recipe = recipes.load(source or recipes.DEFAULT)
    return recipe.name, recipe.experiment, f"{recipe.description}. Expected: {recipe.expected}"


def _start(given: list[str]) -> tuple[Trainer, Data]:
    source = given.pop(0) if given and not given[0].startswith("-") else None
    name, default, description = load_config(source)
    given = ["--data.folder" if word == "--data" else word for word in given]
    experiment = parse(default, given, prog=f"equilibria train {name}", description=description)
    data = experiment.data.load()
    task = experiment.build_task(data)
    run = RunFolder.create(experiment.train.folder, name)
    run.write_config(name, experiment)
    run.write_json(
        "environment.json",
        {**describe_environment(experiment.train.torch_device()), "data": data.describe()},
    )
    if isinstance(data, Corpus):
        run.write_json("vocabulary.json", json.loads(data.vocabulary.to_json()))
    size = sum(p.numel() for p in task.model.parameters())
    print(f"recipe {name}, {size:,} parameters, run folder {run.path}", file=sys.stderr)
    return Trainer(experiment, task, run), data


def _resume(given: list[str]) -> tuple[Trainer, Data]:
    folder = given[0].partition("=")[2] if len(given) == 1 else given[-1]
    if len(given) > 2 or not folder or folder.startswith("--"):
        raise UserError(
            "--resume takes one run folder and no other options, because a resumed run keeps its "
            "configuration; to change something start anew from RUN/config.json"
        )
    run = RunFolder.open(Path(folder))
    _, experiment, _ = load_config(str(run.config_file))
    data = experiment.data.load()
    check_data(run, data)
    trainer = Trainer(experiment, experiment.build_task(data), run)
    trainer.resume()
    print(f"going on after step {trainer.step} in {run.path}", file=sys.stderr)
    return trainer, data


def check_data(run: RunFolder, data: Data) -> None:
    """Refuse to go on with a run on other data than it began with.

    Raises:
        UserError: the digest differs, or was not recorded.
    """
    match run.read_json("environment.json"):
        case {"data": {"digest": str(digest), **recorded}}:
            pass
        case _:
            raise UserError(
                f"environment.json in {run.path} does not say which text the run read; restore "
                "it, or train again from its config.json"
            )
    present = data.describe()
    if digest == present["digest"]:
        return
    then, now = recorded.get("python_version"), present.get("python_version")
    versions = f" (Python {then} then, {now} now)" if then or now else ""
    raise UserError(
        f"the run was made with text of digest {digest[:12]}, the text here has "
        f"{str(present['digest'])[:12]}{versions}; use the same text"
        f"{' and version of Python' if versions else ''}"
    )
