"""`equilibria train`: train a recipe, a saved configuration, or go on with a run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import cast

from equilibria import recipes
from equilibria.cli.main import EXIT_TRAINING_ERROR
from equilibria.cli.parsing import long_names, parse
from equilibria.core.errors import UserError
from equilibria.tasks.task import Task
from equilibria.train.config_file import from_json, to_json
from equilibria.train.engine import Engine, Strategy, start_engine
from equilibria.train.environment import describe_environment
from equilibria.train.experiment import Corpus, Data, Experiment
from equilibria.train.files import disk_error, read_json
from equilibria.train.launch import (
    VerdictError,
    give_verdict,
    is_launched,
    is_launched_by_user,
    launch,
    leave,
    run_name,
    verdict,
)
from equilibria.train.loop import MemoryRanOutError, Trainer, TrainingError
from equilibria.train.report import finish, render
from equilibria.train.run_folder import RunFolder
from equilibria.train.tensor_files import TensorFiles
from equilibria.train.trackers import Trackers, check_trackers

_SHORT = {
    "--data": "--data.folder",
    "--devices": "--train.devices",
    "--nodes": "--train.nodes",
    "--strategy": "--train.strategy",
    "--precision": "--train.precision",
}
"""Options that have a shorter name of their own."""


@dataclass(frozen=True)
class ProcessOptions:
    """How many processes go on with a run, and how they share the work."""

    devices: int
    nodes: int
    strategy: Strategy
    restarts: int
    batch_chunks: int


@dataclass(frozen=True)
class ResumeOptions:
    """What a resumed run may change: nothing that changes its results."""

    train: ProcessOptions


@dataclass(frozen=True)
class Plan:
    """What is to be trained: a configuration, anew or in the folder of a run."""

    recipe: str
    experiment: Experiment
    resumed: RunFolder | None = None


def main(arguments: Sequence[str]) -> int:
    """Train; 0 when finished, 128 + signal when stopped and saved, 1 when loss is not finite."""
    plan = _plan(long_names(arguments, _SHORT))
    config = plan.experiment.train
    check_trackers(config.trackers)
    if config.devices > 1 and config.nodes == 1 and not is_launched():
        threads = max((os.cpu_count() or 1) // config.devices, 1)
        try:
            restarts = int(config.restarts)
            return launch(worker, arguments, plan.recipe, config.devices, restarts, threads)
        except VerdictError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_TRAINING_ERROR
    engine = start_engine(config.torch_device(), config.devices, config.nodes, config.strategy)
    try:
        code = _train(plan, engine)
    finally:
        engine.close()
    if is_launched_by_user():
        leave(code)
    return code


def worker(arguments: list[str]) -> int:
    """`equilibria train` in one of the processes of a launch; only the first of them speaks."""
    from equilibria.cli.main import main as equilibria

    if (given := verdict()) is not None:
        return given
    with ExitStack() as stack:
        if os.environ["LOCAL_RANK"] != "0":
            nobody = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nobody))
            stack.enter_context(redirect_stderr(nobody))
        code = equilibria(["train", *arguments])
    if 0 < code < 128 and os.environ["LOCAL_RANK"] == "0" and verdict() is None:
        give_verdict(code)  # it has said why; the others may not know
    if code >= 128:
        # Asked to stop: the launcher, who was asked, too, no longer waits for what is returned.
        sys.exit(code)
    return code


def _train(plan: Plan, engine: Engine) -> int:
    with ExitStack() as stack:
        data, trainer = _prepared(plan, engine, stack)
        trackers = trainer.trackers
        try:
            exit_code = trackers.exit_code = trainer.fit()
            if not engine.is_main:
                return exit_code
            if exit_code:
                _say_how_to_go_on(trainer, f"stopped after step {trainer.step} and saved")
                return exit_code
            print("scoring the best checkpoint on the test split", file=sys.stderr)
            summary = finish(trainer, data)
            trackers.summarise(summary)
        except MemoryRanOutError as error:
            trackers.exit_code = EXIT_TRAINING_ERROR
            if not is_launched() or is_launched_by_user():
                print(f"error: {error}", file=sys.stderr)
            give_verdict(EXIT_TRAINING_ERROR, str(error))
            return EXIT_TRAINING_ERROR
        except TrainingError as error:
            trackers.exit_code = EXIT_TRAINING_ERROR
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


def _prepared(plan: Plan, engine: Engine, stack: ExitStack) -> tuple[Data, Trainer]:
    """Data and trainer in all processes, or an error in all of them.

    The run folder is locked until the stack is closed.

    Raises:
        UserError: something is wrong here, or in another process.
    """
    failure, made = None, None
    try:
        data = plan.experiment.data.load()
        task = plan.experiment.build_task(data, _weights(plan.resumed, data))
        run = None
        if engine.is_main:
            run = _run_folder(plan, data, task, engine)
            stack.enter_context(run.lock())
            run.remove_leftovers()
        made = data, task, run
    except UserError as error:
        failure = error
    except OSError as error:
        failure = disk_error(error)
    failures = engine.gather(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, text in enumerate(failures):
        if text is not None:
            raise UserError(f"process {rank} cannot begin: {text}")
    data, task, run = cast(tuple[Data, Task, RunFolder | None], made)
    path = engine.from_main(None if run is None else run.path)
    run = run or RunFolder(cast(Path, path))
    trainer = Trainer(plan.experiment, task, run, engine)
    _start_trackers(trainer, stack)
    if engine.from_main(bool(run.checkpoints.steps())):
        trainer.resume()
        if engine.is_main:
            print(f"going on after step {trainer.step} in {run.path}", file=sys.stderr)
    elif plan.resumed is not None:
        run.checkpoints.latest()  # which says that there is none
    elif engine.is_main:
        run.rewind_metrics(0)  # of an attempt that died before its first checkpoint
    return data, trainer


def _weights(resumed: RunFolder | None, data: Data) -> TensorFiles | None:
    """Of the checkpoint that a run goes on from, on the same data as before.

    Raises:
        UserError: the data are others, or the weights are damaged.
    """
    if resumed is not None:
        check_data(resumed, data)  # of another text the weights would not fit, either
    if resumed is None or not resumed.checkpoints.steps():
        return None
    return resumed.checkpoints.weights(resumed.checkpoints.latest(), resuming=True)


def _start_trackers(trainer: Trainer, stack: ExitStack) -> None:
    """In the main process, until the stack is closed; all processes learn of a failure.

    Raises:
        UserError: one could not begin.
    """
    config, engine, failure = trainer.experiment.train, trainer.engine, None
    if engine.is_main and config.trackers:
        about = to_json(trainer.experiment)
        try:
            trackers = Trackers.start(config.trackers, config.project, trainer.run, about)
            stack.callback(_tell, trackers)  # when they have ended
            trainer.trackers = stack.enter_context(trackers)
        except UserError as error:
            failure = str(error)
    if failure := engine.from_main(failure):
        raise UserError(failure)


def _tell(trackers: Trackers) -> None:
    for complaint in trackers.told():
        print(complaint, file=sys.stderr)


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
    is_recipe = source in recipes.names()
    if source is not None and not is_recipe and (source.endswith(".json") or Path(source).is_dir()):
        file = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
        saved = read_json(file, "give a recipe's name or the config.json of a run")
        if not isinstance(saved, dict) or not {"recipe", "config"} <= saved.keys():
            raise UserError(f"{file} has no recipe and config; it is not the config of a run")
        recipe = recipes.load(str(saved["recipe"]))
        return recipe.name, from_json(recipe.experiment, saved["config"]), recipe.description
    recipe = recipes.load(source or recipes.DEFAULT)
    return recipe.name, recipe.experiment, f"{recipe.description}. Expected: {recipe.expected}"


def _plan(given: list[str]) -> Plan:
    if "--resume" in given or any(word.startswith("--resume=") for word in given):
        return _resumed_plan(given)
    source = given.pop(0) if given and not given[0].startswith("-") else None
    name, default, description = load_config(source)
    short = ", ".join(f"{given} for {meant}" for given, meant in _SHORT.items())
    description = f"{description}. Short names: {short}. --resume RUN goes on with a run."
    experiment = parse(default, given, prog=f"equilibria train {name}", description=description)
    return Plan(name, experiment)


def _resumed_plan(given: list[str]) -> Plan:
    """A run goes on as it began, on any number of processes."""
    place = next(i for i, word in enumerate(given) if word.partition("=")[0] == "--resume")
    folder = given.pop(place).partition("=")[2] or (given.pop(place) if given[place:] else "")
    changes = {f"--train.{field.name}": field.name for field in fields(ProcessOptions)}
    named = [word.partition("=")[0].replace("-", "_").replace("__", "--", 1) for word in given]
    foreign = [
        word
        for at, (word, name) in enumerate(zip(given, named, strict=True))
        if name not in changes and (at == 0 or named[at - 1] not in changes)
    ]
    if not folder or folder.startswith("-") or foreign:
        raise UserError(
            "--resume takes one run folder and no other options than --devices, --nodes, "
            "--strategy, --train.restarts and --train.batch-chunks, because a resumed run keeps "
            "its configuration; to change something else start anew from RUN/config.json"
        )
    run = RunFolder.open(Path(folder))
    name, experiment, _ = load_config(str(run.config_file))
    train = experiment.train
    options = ResumeOptions(
        ProcessOptions(**{name: getattr(train, name) for name in changes.values()})
    )
    chosen = parse(options, given, prog="equilibria train --resume RUN", description="Go on.")
    changed = replace(train, **vars(chosen.train))
    return Plan(name, replace(experiment, train=changed), run)


def _run_folder(plan: Plan, data: Data, task: Task, engine: Engine) -> RunFolder:
    """The folder to train in: of the run to resume, of an attempt before, or a new one."""
    if plan.resumed is not None:
        check_data(plan.resumed, data)
        return plan.resumed
    parent, shared_name = plan.experiment.train.folder, run_name(plan.recipe)
    if shared_name is None:
        run = RunFolder.create(parent, plan.recipe)
    else:
        run = RunFolder.create_named(parent / shared_name)
    if run.config_file.exists():
        check_same_config(run, plan.recipe, plan.experiment)
        check_data(run, data)
        return run
    try:
        _describe(run, plan, data)
    except OSError:
        run.remove_if_empty()
        raise
    size = sum(p.numel() for p in task.model.parameters())
    shared = engine.share.num_processes
    processes = f", {shared} processes ({plan.experiment.train.strategy})" if shared > 1 else ""
    print(
        f"recipe {plan.recipe}, {size:,} parameters{processes}, run folder {run.path}",
        file=sys.stderr,
    )
    return run


def _describe(run: RunFolder, plan: Plan, data: Data) -> None:
    """Write what a run begins with; the configuration last, by which it is one."""
    run.write_json(
        "environment.json",
        {**describe_environment(plan.experiment.train.torch_device()), "data": data.describe()},
    )
    if isinstance(data, Corpus):
        run.write_json("vocabulary.json", json.loads(data.vocabulary.to_json()))
    run.write_config(plan.recipe, plan.experiment)


def check_same_config(run: RunFolder, recipe: str, experiment: Experiment) -> None:
    """Refuse to go on in the folder of another run that has the name of this launch.

    Raises:
        UserError: its configuration differs.
    """
    name, saved, _ = load_config(str(run.config_file))
    if (name, saved) != (recipe, experiment):
        raise UserError(
            f"{run.path} is the folder of this launch and holds a run of another configuration; "
            "give torchrun another --rdzv-id, or --train.folder another place"
        )


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
