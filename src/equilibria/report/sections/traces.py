"""How the residual fell, step by step, in the solves that were traced at the end of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from equilibria.diagnostics.series import Points, as_number, median_curve
from equilibria.report.blocks import Block, Chart, Charts, Note, Section
from equilibria.report.charts import Line, line_chart
from equilibria.report.runs import Run

_MOST_SAMPLES, _MOST_STEPS = 32, 2_000
_TITLES = {"forward": "Forward solves", "backward": "Backward solves"}


def section(runs: Sequence[Run]) -> Section | None:
    """A drawing per direction; None if nothing was traced."""
    traced = [run for run in runs if run.latest("trace")]
    charts = tuple(
        chart
        for side, title in _TITLES.items()
        if (chart := _chart(traced, side, title, alone=len(runs) == 1)) is not None
    )
    if not charts:
        return None
    names = tuple(run.name for run in traced) if len(runs) > 1 else ()
    blocks: list[Block] = [Charts(charts, names)]
    untraced = [run for run in runs if run not in traced and run.curve("train", "num_evals")]
    blocks += [Note("The run left no trace of its solves.", run.name) for run in untraced]
    intro = "Residual after every solver step, on one batch of the validation split."
    return Section("Traces", tuple(blocks), intro)


def _chart(runs: Sequence[Run], side: str, title: str, *, alone: bool) -> Chart | None:
    lines: list[Line] = []
    levels: list[float] = []
    counts: list[str] = []
    for run in runs:
        trace = run.latest("trace")
        samples = _samples(trace.get(side))
        if not samples:
            continue
        colour = run.name.colour
        lines += [Line(points, colour, "faint") for points in samples]
        lines.append(Line(median_curve(samples), colour))
        tolerance = as_number(trace.get(f"{side}_tolerance"))
        if tolerance is not None and tolerance > 0:
            levels.append(tolerance)
            reached = sum(points[-1][1] <= tolerance for points in samples)
            counts.append(f"{reached} of {len(samples)} within the tolerance (dashed)")
    note = "; ".join(["faint: samples, strong: median", *(counts if alone else [])])
    return line_chart(
        title, lines, x_label="solver step", scale="log", levels=sorted(set(levels)), note=note
    )


def _samples(rows: Any) -> list[Points]:
    """Finite residuals over solver steps, by sample."""
    if not isinstance(rows, list):
        return []
    found: list[Points] = []
    for row in cast(list[Any], rows)[:_MOST_SAMPLES]:
        values = cast(list[Any], row)[:_MOST_STEPS] if isinstance(row, list) else []
        numbers = [(float(i), as_number(value)) for i, value in enumerate(values)]
        points = [(i, value) for i, value in numbers if value is not None and math.isfinite(value)]
        if points:
            found.append(points)
    return found
