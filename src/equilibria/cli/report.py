"""`equilibria report`: a page about one run, or several side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from equilibria.cli.parsing import parse
from equilibria.cli.runs import load_task, open_run
from equilibria.core.adjoint import Adjoint
from equilibria.core.errors import UserError
from equilibria.models.config import SolveConfig
from equilibria.report.measurements import Measurements, measure
from equilibria.report.page import render_page
from equilibria.report.runs import Run, read_runs
from equilibria.tasks.task import Task
from equilibria.train.experiment import Experiment
from equilibria.train.files import write_text


@dataclass(frozen=True)
class ReportOptions:
    """Which runs, and where the page goes."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders, finished or not."""
    output: Path = Path("report.html")
    """The page, one file that needs no other."""
    measure: bool = False
    """Also measure the best checkpoint of each run: spectral radius of the Jacobian, gradient
    beside the exact one. Loads the model and reads the data."""


def main(arguments: Sequence[str]) -> int:
    """Write the page and say where it is."""
    options = parse(
        ReportOptions(),
        arguments,
        prog="equilibria report",
        description="Show runs in one HTML page.",
    )
    runs = read_runs(options.runs)
    _refuse_bad_output(options.output)
    if options.measure:
        runs = [_measured(run) for run in runs]
    page = render_page(runs)
    try:
        write_text(options.output, page)
    except OSError as error:
        raise UserError(
            f"{options.output} cannot be written ({error.strerror}); choose another --output"
        ) from error
    for run in runs:
        for notice in run.notices:
            print(f"{run.name.text}: {notice}", file=sys.stderr)
    print(f"report of {len(runs)} run{'' if len(runs) == 1 else 's'}: {options.output}")
    return 0


def _refuse_bad_output(output: Path) -> None:
    """Before anything takes time."""
    if output.is_dir():
        raise UserError(f"{output} is a folder; give the page's file name (--output FILE.html)")
    if not output.parent.is_dir():
        raise UserError(f"the folder {output.parent} does not exist; make it, or choose another")


def _measured(run: Run) -> Run:
    """The run with its measurements, or with a sentence why there are none."""
    try:
        return replace(run, measurements=_measure(run.path))
    except UserError as error:
        return replace(run, notices=(*run.notices, f"Nothing was measured: {error}."))


def _measure(path: Path) -> Measurements:
    folder, experiment = open_run(path)

    def make(adjoint: Adjoint | None) -> Task:
        return load_task(folder, _with_adjoint(experiment, adjoint), "best")[0]

    with experiment.train.autocast():
        return measure(
            make, step=folder.checkpoints.best(), training_step=experiment.task.pretrain_steps
        )


def _with_adjoint(experiment: Experiment, adjoint: Adjoint | None) -> Experiment:
    """The same experiment with another gradient method; None leaves it alone."""
    solve = getattr(experiment.model, "solve", None)
    if adjoint is None or not isinstance(solve, SolveConfig):
        return experiment
    changed = replace(solve, adjoint=adjoint)
    model = replace(experiment.model, solve=changed)  # pyright: ignore[reportArgumentType, reportCallIssue, reportGeneralTypeIssues]
    return replace(experiment, model=model)
