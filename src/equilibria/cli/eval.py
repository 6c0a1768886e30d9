"""`equilibria eval`: score a run, with more or fewer solver steps or another memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from equilibria.cli.parsing import parse
from equilibria.cli.positional import split_run
from equilibria.cli.runs import load_task, open_run
from equilibria.core.errors import UserError
from equilibria.core.solver import Solver
from equilibria.models.config import with_evaluation_solve
from equilibria.regularizers.spectral_radius import spectral_radius
from equilibria.tasks.language_modeling import LanguageModelingConfig
from equilibria.tasks.task import Evaluation, Task, TaskConfig
from equilibria.train.progress import readable
from equilibria.train.statistics import summarize_solves


@dataclass(frozen=True)
class EvalOptions:
    """How to score; what is not given is as the run was trained."""

    split: Literal["valid", "test"] = "test"
    """Which split."""
    checkpoint: str = "best"
    """best, last, or a step."""
    solver: Solver | None = None
    """Forward solver, for example "broyden(history_size=30)"."""
    max_steps: int | None = None
    """Forward step limit."""
    rtol: float | None = None
    """Relative tolerance."""
    mem_len: Annotated[int | None, tyro.conf.arg(aliases=["--memory-length"])] = None
    """Positions of memory; more than in training is allowed."""
    streams: int | None = None
    """Parallel streams; 1 reads the split end to end."""
    spectral_radius: bool = False
    """Also estimate the spectral radius of the Jacobian at the equilibria of the first validation
    batch."""


def main(arguments: Sequence[str]) -> int:
    """Print the score, evaluations and residuals of a run."""
    path, rest = split_run(arguments, "eval")
    default = EvalOptions()
    options = parse(default, rest, prog="equilibria eval RUN", description="Score a run.")
    run, experiment = open_run(Path(path))
    task_config = _with_text_options(experiment.task, options)
    model = with_evaluation_solve(experiment.model, options.solver, options.max_steps, options.rtol)
    task, _, step = load_task(
        run, replace(experiment, task=task_config, model=model), options.checkpoint
    )
    with experiment.train.autocast():
        result = task.evaluate(options.split)
    print(f"{options.split} split, checkpoint of step {step}, {result.num_items} tokens")
    print(_render_loss(result, on_text=isinstance(task_config, LanguageModelingConfig)))
    if result.num_evals.numel():
        solves = summarize_solves(result.num_evals, result.relative_residual)
        evals, residual = solves["num_evals"], solves["relative_residual"]
        print(
            f"function evaluations mean {evals['mean']:.1f}, 95th percentile {evals['p95']:.0f}\n"
            f"relative residual mean {residual['mean']:.1e}, 95th percentile {residual['p95']:.1e}"
        )
    print(f"{result.seconds:.1f} s, {result.num_items / result.seconds:.0f} tokens/s")
    if options.spectral_radius:
        with experiment.train.autocast():
            print(_render_radius(task))
    return 0


def _render_radius(task: Task) -> str:
    solution = task.trace()
    if solution is None:
        raise UserError("the model solves no equilibrium; leave out --spectral-radius")
    radius = spectral_radius(solution).radius
    return f"spectral radius mean {radius.mean():.3f}, largest {radius.max():.3f}"


def _with_text_options(task: TaskConfig, options: EvalOptions) -> TaskConfig:
    """Change memory and streams, which only language modelling has.

    Raises:
        UserError: one of them is given for another task.
    """
    given = {"eval_memory_length": options.mem_len, "eval_streams": options.streams}
    changes = {name: value for name, value in given.items() if value is not None}
    if changes and not isinstance(task, LanguageModelingConfig):
        raise UserError("the run is no language model; leave out --mem-len and --streams")
    return replace(task, **changes)  # pyright: ignore[reportArgumentType]


def _render_loss(result: Evaluation, *, on_text: bool) -> str:
    if on_text:
        return (
            f"loss {result.loss:.4f} nats, perplexity {math.exp(min(result.loss, 700.0)):.3f}, "
            f"{result.loss / math.log(2.0):.4f} bits per token"
        )
    figures = (f"{name.replace('_', ' ')} {value:.4f}" for name, value in result.figures.items())
    return ", ".join([f"loss {readable(result.loss, 4)} nats", *figures])
