"""Work and accuracy of the solves: over training, by sample, and in seconds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from equilibria.diagnostics.series import finite_values, half_window, running_mean, split_at
from equilibria.report import wording
from equilibria.report.blocks import Bar, Bars, Block, Chart, Charts, Part, Section
from equilibria.report.charts import Counts, Line, Scale, histogram, line_chart
from equilibria.report.runs import Run, mapping_at, number

_STEP = "training step"
_NUM_BINS, _FEWEST = 24, 20
_MOST_BINS = 10_000
_EVALUATIONS, _RESIDUAL = "function evaluations (NFE) per sample", "relative residual"


def section(runs: Sequence[Run]) -> Section | None:
    """Curves, histograms and times; None if no run solves an equilibrium."""
    solving = [run for run in runs if _solves(run)]
    if not solving:
        return None
    names = tuple(run.name for run in solving) if len(runs) > 1 else ()
    charts = tuple(chart for chart in _charts(solving) if chart is not None)
    histograms = tuple(chart for chart in _histograms(solving) if chart is not None)
    blocks: list[Block] = [Charts(group, names) for group in (charts, histograms) if group]
    bars = [bar for run in solving if (bar := _bar(run)) is not None]
    if bars:
        blocks.append(Bars("Where the time of training went", tuple(bars)))
    explicit = [run.name.text for run in runs if run not in solving]
    intro = f"Explicit, without a solve: {', '.join(explicit)}." if explicit else ""
    return Section("Solves", tuple(blocks), intro)


def _solves(run: Run) -> bool:
    """Whether there is anything to show."""
    return bool(run.solves) or bool(finite_values(run.curve("train", "num_evals")))


def _charts(runs: Sequence[Run]) -> Iterator[Chart | None]:
    yield _curve(runs, "num_evals", "NFE, forward", "from zero")
    yield _curve(runs, "relative_residual", "Relative residual, forward", "log")
    yield _curve(runs, "backward_num_evals", "NFE, backward", "from zero")
    yield _curve(runs, "backward_relative_residual", "Relative residual, backward", "log")
    yield _validation(runs, "num_evals", "NFE, validation", "from zero")
    yield _validation(runs, "relative_residual", "Relative residual, validation", "log")


def _curve(runs: Sequence[Run], key: str, title: str, scale: Scale) -> Chart | None:
    """Means over samples, and faint the worst sample where it was recorded."""
    lines: list[Line] = []
    marks: list[tuple[float, int]] = []
    for run in runs:
        colour, border = run.name.colour, run.end_of_unrolling
        lines.append(Line(run.curve("train", f"{key}_max"), colour, "faint"))
        parts = split_at(run.curve("train", key), border)
        lines += [Line(running_mean(part, half_window(part)), colour) for part in parts]
        if border is not None:
            marks.append((border, colour))
    notes = ["mean over samples"]
    if any(line.points for line in lines if line.look == "faint"):
        notes.append("faint: largest")
    if marks:
        notes.append("dotted: end of unrolled pre-training")
    return line_chart(title, lines, x_label=_STEP, scale=scale, marks=marks, note="; ".join(notes))


def _validation(runs: Sequence[Run], key: str, title: str, scale: Scale) -> Chart | None:
    lines = [Line(run.curve("valid", key), run.name.colour, "dots") for run in runs]
    return line_chart(title, lines, x_label=_STEP, scale=scale, note="mean over samples")


# --- Histograms ----------------------------------------------------------------------------------


def _histograms(runs: Sequence[Run]) -> Iterator[Chart | None]:
    for split, words in (("test", "test split"), ("training", "late training")):
        recorded = [run for run in runs if mapping_at(run.solves, split)]
        for key, label in (("num_evals", _EVALUATIONS), ("relative_residual", _RESIDUAL)):
            is_log = key == "relative_residual"
            counts = [
                item
                for run in recorded
                if (item := _recorded(mapping_at(run.solves, split, key), run.name.colour, is_log))
            ]
            title = f"{'Residuals' if is_log else 'NFE'} by sample, {words}"
            yield histogram(
                title, counts, x_label=label, is_log=is_log, note=_lost(recorded, split)
            )
    older = [run for run in runs if not run.solves]
    for key, label in (("num_evals", _EVALUATIONS), ("relative_residual", _RESIDUAL)):
        is_log = key == "relative_residual"
        counts = [item for run in older if (item := _of_curve(run, key, is_log))]
        title = f"{'Residuals' if is_log else 'NFE'} in training"
        note = "of means over logged steps; this run keeps no histogram by sample"
        yield histogram(title, counts, x_label=label, is_log=is_log, note=note)


def _recorded(values: Mapping[str, Any], colour: int, is_log: bool) -> Counts | None:
    """Bins of `solves.json`; None where they make no sense."""
    bins = _whole_numbers(values.get("bins" if is_log else "values"))
    samples = _whole_numbers(values.get("samples"))
    if not bins or len(bins) != len(samples):
        return None
    per_decade = number(values, "bins_per_decade") or 0.0
    if is_log and not 1 <= per_decade <= 100:
        return None
    return _counts(dict(zip(bins, samples, strict=True)), colour, per_decade if is_log else None)


def _of_curve(run: Run, key: str, is_log: bool) -> Counts | None:
    """Bins of what the metrics have, without unrolled pre-training."""
    points = split_at(run.curve("train", key), run.end_of_unrolling)[-1]
    values = [value for value in finite_values(points) if value > 0]
    if len(values) < _FEWEST:
        return None
    places = [math.log10(value) if is_log else value for value in values]
    low, high = min(places), max(places)
    width = (high - low) / _NUM_BINS or 1.0
    samples = [0] * _NUM_BINS
    for place in places:
        samples[min(int((place - low) / width), _NUM_BINS - 1)] += 1
    edges = [low + k * width for k in range(_NUM_BINS + 1)]
    return Counts([10.0**edge for edge in edges] if is_log else edges, samples, run.name.colour)


def _counts(samples: Mapping[int, int], colour: int, per_decade: float | None) -> Counts | None:
    """Bins side by side, with those that are empty."""
    first, last = min(samples), max(samples)
    # 600 decades hold every float
    if last - first > _MOST_BINS or (per_decade and max(-first, last) > 300 * per_decade):
        return None
    places = range(first, last + 2)
    edges = [10.0 ** (k / per_decade) if per_decade else k - 0.5 for k in places]
    return Counts(edges, [samples.get(k, 0) for k in places[:-1]], colour)


def _whole_numbers(values: Any) -> list[int]:
    """A list of counts; empty if it is anything else."""
    if not isinstance(values, list):
        return []
    items = cast(list[Any], values)
    plain = all(type(item) is int and abs(item) < 2**53 for item in items)
    return items if plain else []


def _lost(runs: Sequence[Run], split: str) -> str:
    """Samples that have no place on a logarithmic axis."""
    parts: list[str] = []
    for key, words in (("num_zero", "zero"), ("num_not_finite", "not finite")):
        lost = sum(number(run.solves, split, "relative_residual", key) or 0 for run in runs)
        if lost > 0:
            parts.append(f"{wording.count(lost)} residuals {words}")
    return "; ".join(parts)


# --- Time ----------------------------------------------------------------------------------------


def _bar(run: Run) -> Bar | None:
    clock = mapping_at(run.summary, "training_time")
    total = number(clock, "total_seconds")
    if total is None or not total > 0 or not math.isfinite(total):
        return None
    parts: list[Part] = []
    for key, label in (
        ("forward_seconds", "forward solves"),
        ("backward_seconds", "backward solves"),
        ("rest_seconds", "rest"),
    ):
        seconds = number(clock, key)
        if seconds is not None and math.isfinite(seconds):
            share = min(max(100.0 * seconds / total, 0.0), 100.0)
            parts.append(Part(label, f"{wording.duration(seconds)}, {share:.0f}%", share))
    return Bar(run.name, wording.duration(total), tuple(parts))
