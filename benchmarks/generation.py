"""What does the next token cost, with and without a cache of keys and values?

    equilibria train pydoc-characters          # and others
    python -m benchmarks.generation --runs runs/pydoc-characters-... [--tiny]

For a trained model that has read so many tokens of its validation text, the time to the logits of
one more:

    cached      keys and values of what was read are kept, projected once (what `generate` does)
    memory      equilibria, or inputs of layers, are kept, and projected anew for every token
    recomputed  nothing is kept, the whole text is read again

and the time per token of 16 texts that go on together from caches. Besides, the function
evaluations per token of each way, with the evaluation tolerance of the run, and of cached solves
that begin at the equilibrium of the position before; and by how much the log-probabilities of the
token that comes next differ between cached and recomputed (the mean of the absolute difference).
The text is given, not drawn, so that all ways read the same.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import options
from benchmarks.options import Options
from benchmarks.timing import Spread, ratio
from equilibria import Previous
from equilibria.cli.runs import load_task, on_text, open_run
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.models.deq_trellisnet import DEQTrellisNetConfig
from equilibria.models.transformer_xl import TransformerXLConfig
from equilibria.models.trellisnet import TrellisNetConfig

LENGTHS, BATCH = (64, 256, 1024), 16
CACHED, MEMORY, RECOMPUTED = "cached", "memory", "recomputed"
TOGETHER = f"cached, {BATCH} texts"


@dataclass(frozen=True)
class Subject:
    """A model and a text for it to read."""

    name: str
    about: str
    model: Any
    text: Tensor


def subjects(runs: Sequence[Path]) -> list[Subject]:
    """The best checkpoints of runs."""
    found: list[Subject] = []
    for path in runs:
        run, experiment = open_run(path)
        task, corpus = on_text(*load_task(run, experiment, "best")[:2])
        recipe = run.read_json("config.json")["recipe"]
        model = task.model.to("cpu").eval()
        found.append(Subject(recipe, type(model).__name__, model, corpus.valid.long()))
    return found


def tiny_subjects() -> list[Subject]:
    """One of each kind of model, for a dry run."""
    small: dict[str, Any] = {"d_model": 8, "num_heads": 2, "d_inner": 12}
    trellis: dict[str, Any] = {"d_embed": 4, "d_hidden": 6}
    configs = (
        DEQTransformerConfig(**small),
        TransformerXLConfig(**small, num_layers=2, tied=True),
        DEQTrellisNetConfig(**trellis),
        TrellisNetConfig(**trellis, num_layers=2),
    )
    text = torch.randint(11, (100,), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    models = [config.build(11).eval() for config in configs]
    return [Subject(type(m).__name__, type(m).__name__, m, text) for m in models]


@dataclass(frozen=True)
class Ways:
    """Logits of the token after `length` others, each way."""

    subject: Subject
    length: int
    memory_length: int

    def cached(self) -> Callable[[], Any]:
        """One step from a cache."""
        return self._next([self.subject.text[None, : self.length - 2]])

    def together(self) -> Callable[[], Any]:
        """One step of many texts, whose lengths differ a little."""
        return self._next([self.subject.text[None, i : self.length - 2] for i in range(BATCH)])

    def _next(self, prompts: Sequence[Tensor]) -> Callable[[], Any]:
        """The second step after prompts: the first makes room for many."""
        model, text = self.subject.model, self.subject.text
        caches = [model.prefill(prompt, self.memory_length).cache for prompt in prompts]
        first, second = (text[i].expand(len(prompts)) for i in (self.length - 2, self.length - 1))
        cache = model.step(first, model.join(caches)).cache
        return lambda: model.step(second, cache)

    def memory(self) -> Callable[[], Any]:
        """One segment of one token, with the memory of the text."""
        model, text = self.subject.model, self.subject.text
        read = text[None, : self.length - 1]
        memory = model(read, memory_length=self.memory_length).memory
        token = text[None, self.length - 1 : self.length]
        return lambda: model(token, memory, memory_length=self.memory_length)

    def recomputed(self) -> Callable[[], Any]:
        """The whole text."""
        model, text = self.subject.model, self.subject.text
        return lambda: model.prefill(text[None, : self.length], self.memory_length)


def measure(given: Options, subject: Subject, length: int, num_tokens: int) -> dict[str, Any]:
    """A row of the table."""
    ways = Ways(subject, length, subject.text.numel())
    cases = {
        CACHED: ways.cached(),
        MEMORY: ways.memory(),
        RECOMPUTED: ways.recomputed(),
        TOGETHER: ways.together(),
    }
    times = given.interleave(cases, rounds=7)
    times[TOGETHER] = [seconds / BATCH for seconds in times[TOGETHER]]
    return {
        "name": subject.name,
        "about": subject.about,
        "length": length,
        "milliseconds": {
            name: Spread.of([1e3 * t for t in seconds]).as_dict() for name, seconds in times.items()
        },
        "ratios": {
            f"{name} / {CACHED}": ratio(times[name], times[CACHED]).as_dict()
            for name in (MEMORY, RECOMPUTED, TOGETHER)
        },
        **count(subject, length, num_tokens),
    }


def count(subject: Subject, length: int, num_tokens: int) -> dict[str, Any]:
    """Evaluations per token each way, and how far cached is from recomputed."""
    places = range(length, length + num_tokens)
    memory_length = subject.text.numel()
    found: dict[str, list[Any]] = {CACHED: [], RECOMPUTED: []}
    model, text = subject.model, subject.text
    prediction = model.prefill(text[None, : length - 1], memory_length)
    for end in places:
        prediction = model.step(text[None, end - 1], prediction.cache)
        found[CACHED].append(prediction)
        found[RECOMPUTED].append(model.prefill(text[None, :end], memory_length))
    surprises = {
        name: [p.logits[0].log_softmax(0)[text[end]].item()
               for p, end in zip(predictions, places, strict=True)]
        for name, predictions in found.items()
    }  # fmt: skip
    differences = [
        abs(a - b) for a, b in zip(surprises[CACHED], surprises[RECOMPUTED], strict=True)
    ]
    content: dict[str, Any] = {"difference": statistics.mean(differences), "num_evals": None}
    if found[CACHED][0].solution is not None:
        evals = {
            name: statistics.mean(p.solution.num_evals for p in predictions)
            for name, predictions in found.items()
        }
        evals["cached, from the position before"] = _evals_from_the_last(subject, places)
        content["num_evals"] = evals
    return content


def _evals_from_the_last(subject: Subject, places: range) -> float:
    """Evaluations per token where every solve begins where the last one ended."""
    model, text = subject.model, subject.text
    prediction = model.prefill(text[None, : places.start - 1], text.numel())
    plain = model.deq.eval_settings
    model.deq.eval_settings = replace(plain, warm_start=Previous())
    counts: list[int] = []
    try:
        for end in places:
            prediction = model.step(text[None, end - 1], prediction.cache)
            counts.append(prediction.solution.num_evals)
    finally:
        model.deq.eval_settings = plain
        model.deq.eval_memory.clear()
    return statistics.mean(counts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="folders of finished runs")
    own, rest = parser.parse_known_args(arguments)
    given = options.parse(__doc__, rest)
    if not given.tiny and not own.runs:
        raise SystemExit("give finished runs of language models: --runs RUN ...")
    lengths, num_tokens = ((20, 24), 2) if given.tiny else (LENGTHS, 40)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for subject in tiny_subjects() if given.tiny else subjects(own.runs):
            for length in lengths:
                row = measure(given, subject, length, num_tokens)
                print(row["name"], length, row["milliseconds"], row["num_evals"], flush=True)
                rows.append(row)
    given.save("generation", rows=rows)


if __name__ == "__main__":
    main()
