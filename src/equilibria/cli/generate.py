"""`equilibria generate`: continue texts with a trained model, of a run or shared."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch

from equilibria.cli.parsing import parse
from equilibria.cli.positional import split_run
from equilibria.cli.runs import load_task, on_text, open_run
from equilibria.core.errors import UserError
from equilibria.pretrained.folder import is_shared
from equilibria.pretrained.hub import Pretrained
from equilibria.tasks.generation import Generated, SamplingConfig, generate_batch
from equilibria.tasks.language_modeling import LanguageModel
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
    speaker = (_of_shared if is_shared(Path(path)) else _of_run)(Path(path), options)
    vocabulary = speaker.vocabulary
    generated = generate_batch(
        speaker.model,
        [vocabulary.encode(prompt) for prompt in speaker.prompts],
        speaker.context if options.mem_len is None else options.mem_len,
        options,
        stop=None if options.stop is None else _token(vocabulary, options.stop),
    )
    texts = [
        f"{vocabulary.continued(prompt, new)}\n"
        for prompt, new in zip(speaker.prompts, generated.tokens, strict=True)
    ]
    sys.stdout.write(f"{_BETWEEN_TEXTS}\n".join(texts))
    if generated.solves:
        print(_render_solves(generated), file=sys.stderr)
    return 0


class _Speaker(NamedTuple):
    """Who continues what."""

    model: LanguageModel
    vocabulary: Vocabulary
    prompts: Sequence[str]
    context: int


def _of_run(path: Path, options: GenerateOptions) -> _Speaker:
    run, experiment = open_run(path)
    task, corpus = on_text(*load_task(run, experiment, options.checkpoint)[:2])
    config, vocabulary = task.config, corpus.vocabulary
    prompts = options.prompt or (vocabulary.decode(corpus.valid[: config.segment_length]),)
    context = config.segment_length + config.memory_length_in_evaluation
    return _Speaker(task.language_model, vocabulary, prompts, context)


def _of_shared(path: Path, options: GenerateOptions) -> _Speaker:
    """A folder of `equilibria share`, which has one checkpoint and no text of its own."""
    pretrained = Pretrained.from_pretrained(path)
    if pretrained.vocabulary is None or pretrained.reading is None:
        raise UserError(f"{path} is no language model of a text; only such can continue one")
    if not options.prompt:
        raise UserError(f"{path} has no text to begin with; give --prompt TEXT")
    if options.checkpoint != GenerateOptions.checkpoint:
        raise UserError(f"{path} holds one checkpoint only; leave out --checkpoint")
    model = cast(LanguageModel, pretrained.model)
    return _Speaker(model, pretrained.vocabulary, options.prompt, pretrained.reading.context)


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
