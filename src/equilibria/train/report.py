"""The end of a run: test score beside honest baselines, solver figures, a sample, pictures."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from equilibria.tasks.compression_baselines import baselines, unigram_bits_per_token
from equilibria.tasks.generation import SamplingConfig, generate
from equilibria.tasks.language_modeling import LanguageModeling, LanguageModelingConfig
from equilibria.tasks.task import Evaluation, Task
from equilibria.train.environment import peak_memory_mib
from equilibria.train.experiment import CharacterCorpus, Corpus, Data, Experiment
from equilibria.train.loop import Trainer
from equilibria.train.progress import readable
from equilibria.train.run_folder import RunFolder
from equilibria.train.statistics import solve_histograms, summarize_solves

_NAMES = {
    "unigram": "unigram",
    "bigram": "bigram",
    "five_gram": "5-gram, interpolated",
    "xz": "xz -9e after the training text",
}
_TRACED_SAMPLES = 32


def finish(trainer: Trainer, data: Data) -> dict[str, Any]:
    """Judge the best checkpoint on the test split; write and return the summary.

    A task on a text gets what only a text has: baselines of compression, and a sample.
    """
    trainer.stand_alone(data)
    experiment, task, run = trainer.experiment, trainer.task, trainer.run
    # here and not above: drawing is the last thing a run does, and matplotlib is slow to import
    from equilibria.diagnostics.plots import plot_run

    best = run.checkpoints.best()
    run.checkpoints.load_weights(best, task.model)
    with experiment.train.autocast():
        test = task.evaluate("test")
    summary: dict[str, Any] = {
        "kind": "summary",
        "step": trainer.step,
        "best_step": best,
        "test_loss": test.loss,
        **_scores(task, test, data, experiment),
        "training_solves": trainer.statistics.as_dict(),
        "test_solves": (
            summarize_solves(test.num_evals, test.relative_residual)
            if test.num_evals.numel()
            else None
        ),
        "shortfall": test.shortfall,
        "training_time": trainer.clock.as_dict(),
        "peak_memory_mib": peak_memory_mib(experiment.train.torch_device()),
        "num_parameters": sum(p.numel() for p in task.model.parameters()),
    }
    _write_trace(trainer)
    _write_histograms(trainer, test)
    run.write_json("summary.json", summary)
    try:
        plot_run(run.path, baselines=_baseline_bits(summary, task))
    except OSError as error:
        warnings.warn(
            f"the pictures could not be written ({error.strerror}); --resume draws them again",
            RuntimeWarning,
            stacklevel=2,
        )
    return summary


def _baseline_bits(summary: dict[str, Any], task: Task) -> dict[str, float]:
    """Of whatever a token is."""
    for unit in ("character", "token"):
        if bits := summary.get(f"baseline_bits_per_{unit}"):
            return bits
    return {name: loss / math.log(2.0) for name, loss in task.baselines.items()}


def _scores(task: Task, test: Evaluation, data: Data, experiment: Experiment) -> dict[str, Any]:
    if not isinstance(task, LanguageModeling) or not isinstance(data, Corpus):
        return {
            **{f"test_{name}": value for name, value in test.figures.items()},
            "num_test_items": test.num_items,
            "baseline_losses": task.baselines,
        }
    size = len(data.vocabulary)
    scores = {
        "test_perplexity": math.exp(min(test.loss, 700.0)),
        "sample": _sample(task, task.config, data, experiment),
    }
    if not isinstance(data, CharacterCorpus):
        bits = unigram_bits_per_token(data.train, data.test, size)
        return {
            **scores,
            "test_bits_per_token": test.loss / math.log(2.0),
            "num_test_tokens": test.num_items,
            "baseline_bits_per_token": {"unigram": bits},
        }
    bits = baselines(data.train, data.test, data.train_text, data.test_text, size)
    return {
        **scores,
        "test_bits_per_character": test.loss / math.log(2.0),
        "num_test_characters": test.num_items,
        "baseline_bits_per_character": dict(bits),
    }


def _sample(
    task: LanguageModeling, config: LanguageModelingConfig, corpus: Corpus, experiment: Experiment
) -> dict[str, str]:
    prompt = corpus.valid[: config.segment_length]
    context = config.segment_length + config.memory_length_in_evaluation
    new = generate(
        task.language_model, prompt, context, SamplingConfig(num_tokens=300, seed=experiment.seed)
    )
    before = corpus.vocabulary.decode(prompt)
    whole = corpus.vocabulary.continued(before, new)
    return {"prompt": before, "text": whole.removeprefix(before)}


def _write_trace(trainer: Trainer) -> None:
    """Record how the residual falls, step by step, at the end of training."""
    with trainer.experiment.train.autocast():
        solution = trainer.task.trace()
    if solution is None:
        return
    backward = solution.backward.result
    solve = getattr(trainer.experiment.model, "solve", None)
    trainer.run.append_metrics(
        {
            "kind": "trace",
            "step": trainer.step,
            "forward": _by_sample(solution.trace),
            "backward": _by_sample(None if backward is None else backward.trace),
            "forward_tolerance": getattr(solve, "eval_rtol", None) or getattr(solve, "rtol", None),
            "backward_tolerance": getattr(getattr(solve, "adjoint", None), "rtol", None),
        }
    )


def _write_histograms(trainer: Trainer, test: Evaluation) -> None:
    """Record how solves differ from sample to sample, of which the summary has mean and p95."""
    if not test.num_evals.numel():
        return
    histograms = {
        "training": trainer.statistics.histograms(),
        "test": solve_histograms(test.num_evals, test.relative_residual),
    }
    trainer.run.write_json("solves.json", histograms)


def _by_sample(trace: torch.Tensor | None) -> list[list[float | None]]:
    """Residuals by sample, without what comes after a sample finished."""
    if trace is None:
        return []
    samples = trace.detach().cpu().T[:_TRACED_SAMPLES].tolist()
    return [[None if math.isnan(value) else value for value in sample] for sample in samples]


def render(summary: dict[str, Any], run: RunFolder) -> str:
    """The summary as text for a terminal."""
    lines = _render_text_scores(summary) if "sample" in summary else _render_scores(summary)
    for title, key in (
        ("equilibria in training", "training_solves"),
        ("equilibria of the test", "test_solves"),
    ):
        if summary[key] is not None:
            lines.append(_render_solves(title, summary[key]))
    if summary["shortfall"]:
        lines.append(summary["shortfall"])
    clock = summary["training_time"]
    lines += [
        f"training time: {clock['total_seconds']:.0f} s = forward solves "
        f"{clock['forward_seconds']:.0f} s + backward solves {clock['backward_seconds']:.0f} s + "
        f"rest {clock['rest_seconds']:.0f} s",
        f"peak memory: {summary['peak_memory_mib']:.0f} MiB; parameters: "
        f"{summary['num_parameters']:,}; best checkpoint: step {summary['best_step']}",
        "",
    ]
    if "sample" in summary:
        prompt, text = summary["sample"]["prompt"], summary["sample"]["text"]
        lines += ["sample (the text before | is the prompt):", f"{prompt}|{text}", ""]
    return "\n".join([*lines, f"run folder: {run.path}"])


def _render_text_scores(summary: dict[str, Any]) -> list[str]:
    unit = "character" if "num_test_characters" in summary else "token"
    scores = {
        "this run": math.log2(summary["test_perplexity"]),
        **{_NAMES[name]: bits for name, bits in summary[f"baseline_bits_per_{unit}"].items()},
    }
    return [
        "",
        f"test split, {summary[f'num_test_{unit}s']} {unit}s:",
        f"  {'':32} {'bits/' + unit:>14}   perplexity",
        *(
            f"  {name:32} {bits:14.3f} {2.0**bits:12.2f}"
            for name, bits in sorted(scores.items(), key=lambda item: item[1])
        ),
    ]


def _render_scores(summary: dict[str, Any]) -> list[str]:
    """The loss beside that of the baselines, then whatever else the task measures."""
    losses = {"this run": summary["test_loss"], **summary["baseline_losses"]}
    figures = {
        name.removeprefix("test_").replace("_", " "): value
        for name, value in summary.items()
        if name.startswith("test_") and name not in ("test_loss", "test_solves")
    }
    return [
        "",
        f"test split, {summary['num_test_items']} positions:",
        *(f"  {name:32} loss {readable(loss, 4)}" for name, loss in losses.items()),
        *(f"  {name:32}      {value:.4f}" for name, value in figures.items()),
    ]


def _render_solves(title: str, solves: dict[str, dict[str, float]]) -> str:
    evals, residual = solves["num_evals"], solves["relative_residual"]
    return (
        f"{title}: function evaluations mean {evals['mean']:.1f}, 95th percentile "
        f"{evals['p95']:.0f}; relative residual mean {residual['mean']:.1e}, 95th percentile "
        f"{residual['p95']:.1e}"
    )
