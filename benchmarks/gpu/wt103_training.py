"""Tokens per second and memory of the published WikiText-103 models, trained as their recipes say.

Whole models with all 267,735 words, whole batches, on made-up text: a few equilibrium steps each,
after two to warm up, in float32 and by autocast in bfloat16. What does not fit into memory is
measured in chunks of the batch.

    python -m benchmarks.gpu.wt103_training [--device cuda] [--tiny] [RECIPE ...]
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from benchmarks import options
from benchmarks.options import Options
from equilibria import recipes
from equilibria.data.segments import TrainingSegments
from equilibria.tasks.language_modeling import LanguageModeling, LanguageModelingConfig
from equilibria.train.experiment import Experiment

RECIPES = (
    "wt103-deq-transformer",
    "wt103-deq-transformer-regularised",
    "wt103-deq-transformer-small",
    "wt103-deq-trellisnet",
    "wt103-torchdeq",
)
WARM, STEPS = 2, 5
CHUNKS = (1, 2, 4, 8)


def shrunk(experiment: Experiment) -> Experiment:
    """The same at a size that says nothing."""
    sizes = {
        "d_model": 16, "num_heads": 2, "d_inner": 32, "d_embed": 16, "d_hidden": 8,
        "cutoffs": (20, 40), "subsequence_length": 4,
    }  # fmt: skip
    known = {name: value for name, value in sizes.items() if getattr(experiment.model, name, None)}
    task = replace(_task(experiment), batch_size=4, segment_length=8, memory_length=8)
    return replace(experiment, model=replace(experiment.model, **known), task=task)  # pyright: ignore[reportArgumentType]


def _task(experiment: Experiment) -> LanguageModelingConfig:
    if not isinstance(experiment.task, LanguageModelingConfig):
        raise TypeError("the recipe trains no language model")
    return replace(experiment.task, pretrain_steps=0)


def measure(name: str, precision: str, given: Options) -> dict[str, Any]:
    """One recipe, in as few chunks as fit."""
    experiment = recipes.load(name).experiment
    experiment = replace(experiment, task=_task(experiment))
    if given.tiny:
        experiment = shrunk(experiment)
    for chunks in CHUNKS:
        with suppress(torch.OutOfMemoryError):
            found = trained(experiment, precision, chunks, given)
            print(name, precision, found, flush=True)
            return {"recipe": name, "precision": precision, "batch_chunks": chunks, **found}
        gc.collect()
        torch.cuda.empty_cache()
    return {"recipe": name, "precision": precision, "batch_chunks": None}


def trained(experiment: Experiment, precision: str, chunks: int, given: Options) -> dict[str, Any]:
    """Seconds per step after warming up, and the peak of memory."""
    config, size = _task(experiment), 60 if given.tiny else 267_735
    torch.manual_seed(0)
    model = experiment.model.build(size).to(given.device)
    count = config.batch_size * config.segment_length * (WARM + STEPS + 1)
    text = TrainingSegments(
        torch.randint(size, (count + 1,)), config.batch_size, config.segment_length
    )
    solve = getattr(experiment.model, "solve", None)
    task = LanguageModeling(model, config, text, lambda split: (), solve)  # pyright: ignore[reportArgumentType]
    optimizer = experiment.optimizer.build(model.parameters())
    cuda = given.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    evaluations, start = [], 0.0
    for step in range(WARM + STEPS):
        if step == WARM:
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        losses = task.training_losses(step, chunks)
        for _ in range(chunks):
            enabled = precision == "bfloat16"
            with torch.autocast(given.device.type, torch.bfloat16, enabled=enabled):
                loss = next(losses)
            loss.minimised.backward()
            if loss.solution is not None:
                evaluations.append(loss.solution.num_evals)
        optimizer.step()
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / STEPS
    return {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "seconds_per_step": seconds,
        "tokens_per_second": config.batch_size * config.segment_length / seconds,
        "evaluations": sum(evaluations) / len(evaluations) if evaluations else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and save."""
    given = options.parse(__doc__, arguments, RECIPES)
    rows = [
        measure(name, precision, given)
        for name in given.names
        for precision in ("float32", "bfloat16")
    ]
    given.save("wt103_training", rows=rows)


if __name__ == "__main__":
    main()
