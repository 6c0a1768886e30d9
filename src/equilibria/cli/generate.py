"""`equilibria generate`: continue texts with a trained model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from equilibria.cli.parsing import parse
from equilibria.cli.positional import split_run
from equilibria.cli.runs import load_task, on_text, open_run
from equilibria.core.errors import UserError
from equilibria.tasks.generation import Generated, SamplingConfig, generate_batch
from equilibria.train.experiment import Vocabulary
from equilibria.train.statistics import summarize_solves

_BETWEEN_TEXTS = "-" * 20


@dataclass(frozen=True)
class GenerateOptions(SamplingConfig):
    """What to continue, and how tokens are drawn."""

    prompt: tuple[str, ...] = ()
    """Text to continue, or several; none: the beginning of the validation text."""
    stop: str | None = None
    """Token after which a text ends, such as a full stop."""
    mem_len: int | None = None
    """Positions of context; None: a segment and its memory, as in training."""
    checkpoint: str = "best"
    """best, last, or a step."""


def main(arguments: Sequence[str]) -> int:
    """Print prompts and their continuations; evaluations and residuals go to stderr."""
    path, rest = split_run(arguments, "generate")
    options = parse(
        GenerateOptions(), rest, prog="equilibria generate RUN", description="Continue texts."
    )
    run, experiment = open_run(Path(path))
    task, corpus = on_text(*load_task(run, experiment, options.checkpoint)[:2])
    config, vocabulary = task.config, corpus.vocabulary
    prompts = options.prompt or (vocabulary.decode(corpus.valid[: config.segment_length]),)
    context = config.segment_length + config.memory_length_in_evaluation
    generated = generate_batch(
        task.language_model,
        [vocabulary.encode(prompt) for prompt in prompts],
        context if options.mem_len is None else options.mem_len,
        options,
        stop=None if options.stop is None else _token(vocabulary, options.stop),
    )
    texts = [
        f"{prompt}{vocabulary.decode(new)}\n"
        for prompt, new in zip(prompts, generated.tokens, strict=True)
    ]
    sys.stdout.write(f"{_BETWEEN_TEXTS}\n".join(texts))
    if generated.solves:
        print(_render_solves(generated), file=sys.stderr)
    return 0


def _token(vocabulary: Vocabulary, text: str) -> int:
    """The id of the one token that a text is.

    Raises:
        UserError: it is none, or several.
    """
    ids = vocabulary.encode(text)
    if len(ids) != 1:
        raise UserError(
            f"--stop {text!r} is {len(ids)} tokens of this vocabulary; give exactly one"
        )
    return int(ids[0])


def _render_solves(generated: Generated) -> str:
    solves = summarize_solves(
        torch.cat([solve.num_steps + 1 for solve in generated.solves]),
        torch.cat([solve.relative_residual for solve in generated.solves]),
    )
    evals, residual = solves["num_evals"], solves["relative_residual"]
    return (
        f"per token: function evaluations mean {evals['mean']:.1f}, 95th percentile "
        f"{evals['p95']:.0f}; relative residual mean {residual['mean']:.1e}, 95th percentile "
        f"{residual['p95']:.1e}"
    )
