"""`equilibria eval`: score a run or a shared model, with other solver steps, memory or text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import torch
import tyro

from equilibria.cli.parsing import parse
from equilibria.cli.positional import split_run
from equilibria.cli.runs import (
    build_model,
    checkpoint_step,
    load_task,
    open_run,
    vocabulary_of,
    vocabulary_size_of,
)
from equilibria.core.errors import UserError
from equilibria.core.solver import Solver
from equilibria.data.segments import Segment, evaluation_segments
from equilibria.models.config import with_evaluation_solve
from equilibria.pretrained.folder import is_shared
from equilibria.pretrained.hub import Pretrained
from equilibria.pretrained.texts import encode_file
from equilibria.regularizers.spectral_radius import spectral_radius
from equilibria.tasks.language_modeling import LanguageModeling, LanguageModelingConfig
from equilibria.tasks.task import Evaluation, Split, Task, TaskConfig
from equilibria.train.experiment import TrainConfig, Vocabulary
from equilibria.train.progress import readable
from equilibria.train.statistics import summarize_solves


@dataclass(frozen=True)
class EvalOptions:
    """How to score; what is not given is as the run was trained."""

    split: Literal["valid", "test"] | None = None
    """Which split of the text of the run; None for test."""
    text: Path | None = None
    """UTF-8 file to score instead; what a shared model needs."""
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


class _Scored(NamedTuple):
    """A model with a text, and what both are called."""

    task: Task
    name: str
    split: Split
    autocast: torch.autocast
    notes: tuple[str, ...] = ()


def main(arguments: Sequence[str]) -> int:
    """Print the score, evaluations and residuals of a run or a shared model."""
    path, rest = split_run(arguments, "eval")
    options = parse(EvalOptions(), rest, prog="equilibria eval RUN", description="Score a run.")
    scored = (_of_shared if is_shared(Path(path)) else _of_run)(Path(path), options)
    with scored.autocast:
        result = scored.task.evaluate(scored.split)
    print(f"{scored.name}, {result.num_items} tokens")
    on_text = isinstance(scored.task, LanguageModeling)
    print("\n".join([*scored.notes, _render_loss(result, on_text=on_text)]))
    if result.num_evals.numel():
        solves = summarize_solves(result.num_evals, result.relative_residual)
        evals, residual = solves["num_evals"], solves["relative_residual"]
        print(
            f"function evaluations mean {evals['mean']:.1f}, 95th percentile {evals['p95']:.0f}\n"
            f"relative residual mean {residual['mean']:.1e}, 95th percentile {residual['p95']:.1e}"
        )
        if result.shortfall:
            print(result.shortfall)
    print(f"{result.seconds:.1f} s, {result.num_items / result.seconds:.0f} tokens/s")
    if options.spectral_radius:
        with scored.autocast:
            print(_render_radius(scored.task))
    return 0


def _of_run(path: Path, options: EvalOptions) -> _Scored:
    run, experiment = open_run(path)
    config = _with_text_options(experiment.task, options)
    model = with_evaluation_solve(experiment.model, options.solver, options.max_steps, options.rtol)
    experiment = replace(experiment, task=config, model=model)
    autocast = experiment.train.autocast()
    if options.text is None:
        task, _, step = load_task(run, experiment, options.checkpoint)
        split = options.split or "test"
        return _Scored(task, f"{split} split, checkpoint of step {step}", split, autocast)
    if not run.vocabulary_file.exists() or not isinstance(config, LanguageModelingConfig):
        raise UserError("the run is no language model of a text; leave out --text")
    step = checkpoint_step(run, options.checkpoint)
    # First, because a vocabulary may be as large as its size says.
    built = build_model(run, model, step, vocabulary_size_of(run, experiment))
    vocabulary = cast(Vocabulary, vocabulary_of(run, experiment))
    built = built.to(experiment.train.torch_device())
    task, notes = _on_file(built, config, vocabulary, options)
    return _Scored(task, f"{options.text}, checkpoint of step {step}", "test", autocast, notes)


def _of_shared(path: Path, options: EvalOptions) -> _Scored:
    """A folder of `equilibria share`, which has one checkpoint and no text of its own."""
    if options.text is None:
        raise UserError(f"{path} is a shared model and has no data of its own; give --text FILE")
    if options.checkpoint != EvalOptions.checkpoint:
        raise UserError(f"{path} holds one checkpoint only; leave out --checkpoint")
    shared = Pretrained.from_pretrained(path)
    if shared.vocabulary is None or shared.reading is None:
        raise UserError(f"{path} is no language model of a text; only such can read --text")
    config = with_evaluation_solve(shared.config, options.solver, options.max_steps, options.rtol)
    model = config.build(len(shared.vocabulary))
    model.load_state_dict(shared.model.state_dict())
    train = TrainConfig()
    reading = LanguageModelingConfig(
        segment_length=shared.reading.segment_length, memory_length=shared.reading.memory_length
    )
    task, notes = _on_file(
        model.to(train.torch_device()),
        _with_text_options(reading, options),
        shared.vocabulary,
        options,
    )
    return _Scored(task, f"{options.text}, {path}", "test", train.autocast(), notes)


def _on_file(
    model: Any, config: TaskConfig, vocabulary: Vocabulary, options: EvalOptions
) -> tuple[LanguageModeling, tuple[str, ...]]:
    """A task that scores the file of --text, and what is to be said about it."""
    if options.split is not None:
        raise UserError(
            f"--split {options.split} is of the text of the run; leave it out, or --text"
        )
    config = cast(LanguageModelingConfig, config)
    text = encode_file(cast(Path, options.text), vocabulary)

    def segments(_: Split) -> Iterator[Segment]:
        return evaluation_segments(text.tokens, config.eval_streams, config.segment_length)

    notes = ()
    if text.num_unknown:
        notes = (
            f"{text.num_unknown} of {len(text.tokens)} tokens are words that the vocabulary does "
            "not have, read as <unk>",
        )
    return LanguageModeling(model, config, None, segments), notes


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
