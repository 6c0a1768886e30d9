"""`equilibria generate`: continue a text with a trained model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from equilibria.cli.parsing import parse
from equilibria.cli.positional import split_run
from equilibria.cli.runs import load_task, on_text, open_run
from equilibria.tasks.generation import SamplingConfig, generate


@dataclass(frozen=True)
class GenerateOptions(SamplingConfig):
    """What to continue, and how tokens are drawn."""

    prompt: str | None = None
    """Text to continue; None: the beginning of the validation text."""
    mem_len: int | None = None
    """Positions of context; None: a segment and its memory, as in training."""
    checkpoint: str = "best"
    """best, last, or a step."""


def main(arguments: Sequence[str]) -> int:
    """Print the prompt and its continuation."""
    path, rest = split_run(arguments, "generate")
    options = parse(
        GenerateOptions(), rest, prog="equilibria generate RUN", description="Continue a text."
    )
    run, experiment = open_run(Path(path))
    task, corpus = on_text(*load_task(run, experiment, options.checkpoint)[:2])
    config = task.config
    prompt = options.prompt
    if prompt is None:
        prompt = corpus.vocabulary.decode(corpus.valid[: config.segment_length])
    context = config.segment_length + config.memory_length_in_evaluation
    new = generate(
        task.language_model,
        corpus.vocabulary.encode(prompt),
        context if options.mem_len is None else options.mem_len,
        options,
    )
    sys.stdout.write(prompt + corpus.vocabulary.decode(new) + "\n")
    return 0
