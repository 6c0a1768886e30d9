"""Spectral radius and quality of the gradient of the best checkpoint, where they were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from equilibria.report import wording
from equilibria.report.blocks import Block, Charts, RunName, Section, Table
from equilibria.report.blocks import Row as TableRow
from equilibria.report.charts import Line, line_chart
from equilibria.report.measurements import Measurements
from equilibria.report.runs import Run, value_at

_MOST_PARAMETERS = 60


def section(runs: Sequence[Run]) -> Section | None:
    """A table, radii by sample, gradients by parameter; None if nothing was measured."""
    measured = [(run, run.measurements) for run in runs if run.measurements is not None]
    if not measured:
        return None
    names = tuple(run.name for run, _ in measured) if len(runs) > 1 else ()
    blocks: list[Block] = [_overview(measured)]
    lines = [Line(_by_rank(found.radius), run.name.colour, "dots") for run, found in measured]
    chart = line_chart(
        "Spectral radius by sample",
        lines,
        x_label="sample, by radius",
        scale="linear",
        levels=[1.0],
        note="dashed: 1, below which plain iteration converges",
    )
    if chart is not None:
        blocks.append(Charts((chart,), names))
    blocks += [_parameters(run.name, found) for run, found in measured if found.gradient]
    return Section(
        "Measured",
        tuple(blocks),
        "Of the best checkpoint: Jacobian of the cell at the equilibria of one validation batch, "
        "gradient of one training batch by the parameters of the cell beside the exact one.",
    )


def _by_rank(radius: Sequence[float]) -> list[tuple[float, float]]:
    return [(float(i), value) for i, value in enumerate(sorted(radius, reverse=True))]


def _overview(measured: Sequence[tuple[Run, Measurements]]) -> Table:
    columns = [_column(run, found) for run, found in measured]
    return Table(
        columns=tuple(run.name for run, _ in measured),
        rows=tuple(
            TableRow(name, tuple(column.get(name, wording.ABSENT) for column in columns))
            for name in dict.fromkeys(name for column in columns for name in column)
        ),
    )


def _column(run: Run, found: Measurements) -> dict[str, str]:
    finite = [value for value in found.radius if math.isfinite(value)]
    figures = {"Checkpoint": f"step {wording.count(found.step)}"}
    if finite:
        figures["Spectral radius, mean"] = wording.decimals(sum(finite) / len(finite), 3)
        figures["Spectral radius, largest"] = wording.decimals(max(finite), 3)
        below = sum(value < 1.0 for value in finite)
        figures["Samples below 1"] = f"{below} of {len(found.radius)}"
    if found.gradient is not None:
        figures["Gradient method"] = str(
            value_at(run.config, "model", "solve", "adjoint") or wording.ABSENT
        )
        figures["Cosine to the exact gradient"] = wording.decimals(found.gradient.overall.cosine, 4)
        figures["Length / exact length"] = wording.decimals(found.gradient.overall.norm_ratio, 4)
        figures["Exact backward solves that converged"] = f"{found.gradient.exact_converged:.0%}"
    return figures


def _parameters(run: RunName, found: Measurements) -> Table:
    """The parameters with the worst gradients first."""
    gradient = found.gradient
    items = sorted(gradient.parameters, key=lambda item: item.cosine) if gradient else []
    more = len(items) - _MOST_PARAMETERS
    return Table(
        columns=("cosine", "length / exact"),
        rows=tuple(
            TableRow(
                item.name,
                (wording.decimals(item.cosine, 4), wording.decimals(item.norm_ratio, 4)),
            )
            for item in items[:_MOST_PARAMETERS]
        ),
        caption=f"Gradient by parameter, worst first: {run.text}"
        + (f" ({more} more left out)" if more > 0 else ""),
        is_folded=True,
    )
