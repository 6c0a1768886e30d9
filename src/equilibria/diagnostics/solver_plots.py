"""Pictures of solves and models: residuals, gradients, eigenvalues, other starts, a report.

matplotlib is imported when something is drawn, not when this module is. Every function returns
the path that it wrote, a PNG of 1200 by 750 pixels.
"""

from __future__ import annotations

import math
import os
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.diagnostics.doctor import Finding, Report, Severity
from equilibria.diagnostics.gradient_quality import GradientQuality
from equilibria.diagnostics.path_independence import Arrival, PathIndependence
from equilibria.diagnostics.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#666666"
_MOST_ROWS = 24
_MOST_FINDINGS = 4
_GREEN, _ORANGE, _RED = "#009E73", "#E69F00", "#D55E00"
_LIMITS = {"gain far out": 1.0, "spectral radius": 1.0, "sensitivity to the injection": 100.0}
"""From where on a measurement of the doctor is a finding."""


def plot_residuals(
    traces: Mapping[str, Tensor], path: Path, *, tolerance: float | None = None
) -> Path:
    """Relative residual after every step, one colour per solve.

    Args:
        traces: name to `Solution.trace` or `LinearResult.trace`, (num_steps + 1, B); solve with
            trace=True to get one. Thin lines are samples, the thick one is their median.
        path: the PNG to write.
        tolerance: drawn as a dashed line.

    Raises:
        UserError: there is no trace, or one of the wrong shape.
    """
    if not traces:
        raise UserError("no traces to draw; give {name: solution.trace} of solves with trace=True")
    for name, trace in traces.items():
        if not isinstance(trace, Tensor) or trace.dim() != 2:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(
                f"the trace of {name!r} is {type(trace).__name__}, expected a tensor "
                "(num_steps + 1, B); solve with trace=True"
            )
    figure = _figure()
    axes = figure.subplots()
    for index, (name, trace) in enumerate(traces.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        values = trace.detach().double().cpu()
        drawable = torch.where(values > 0, values, torch.nan)
        for sample in drawable.T[:64].tolist():
            axes.plot(range(len(sample)), sample, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(*_median(values), color=colour, linewidth=2.5, label=name)
    if tolerance is not None:
        axes.axhline(tolerance, color=_GREY, linestyle="--", linewidth=1, label="tolerance")
    axes.set_yscale("log")
    _integer_ticks(axes)
    axes.set_xlabel("solver step")
    axes.set_ylabel("relative residual")
    axes.set_title("How the residual falls (thin: samples, thick: median)")
    axes.legend(loc="upper right", frameon=False)
    return _save(figure, path)


def plot_gradient_quality(qualities: Sequence[GradientQuality], path: Path) -> Path:
    """Cosine and norm ratio to the exact gradient, per parameter and method.

    Args:
        qualities: from `gradient_quality`, of the same parameters, one per method.
        path: the PNG to write.

    Raises:
        UserError: nothing to draw.
    """
    if not qualities:
        raise UserError("no gradient qualities to draw; make them with gradient_quality")
    names = [item.name for item in (qualities[0].overall, *qualities[0].parameters)][:_MOST_ROWS]
    figure = _figure()
    cosines, ratios = figure.subplots(1, 2, sharey=True)
    height = 0.8 / len(qualities)
    for index, quality in enumerate(qualities):
        items = {item.name: item for item in (quality.overall, *quality.parameters)}
        shown = [items[name] for name in names if name in items]
        rows = [
            i + height * (index - (len(qualities) - 1) / 2)
            for i, name in enumerate(names)
            if name in items
        ]
        colour = _COLOURS[index % len(_COLOURS)]
        cosines.barh(rows, [item.cosine for item in shown], height, color=colour)
        ratios.barh(
            rows, [item.norm_ratio for item in shown], height, color=colour, label=quality.method
        )
    cosines.set_yticks(range(len(names)), names, fontsize=8 if len(names) < 16 else 6)
    cosines.invert_yaxis()
    cosines.set_xlabel("cosine to the exact gradient")
    ratios.set_xlabel("length / exact length")
    for axes in (cosines, ratios):
        axes.axvline(1.0, color=_GREY, linestyle="--", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Cheap gradients beside the exact one (dashed: exact)")
    figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    return _save(figure, path)


def plot_spectrum(spectrum: Spectrum, path: Path) -> Path:
    """The outermost eigenvalues of the Jacobian in the complex plane, with the unit circle.

    Plain iteration converges when all lie inside the circle; 1 itself is the one place where an
    eigenvalue makes the fixed point degenerate.

    Args:
        spectrum: from `equilibria.diagnostics.spectrum.spectrum`.
        path: the PNG to write.
    """
    values = spectrum.eigenvalues.detach().cpu()
    radius = spectrum.radius.detach().double().cpu()
    figure = _figure()
    plane, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    turn = [2.0 * math.pi * i / 200 for i in range(201)]
    circle = ([math.cos(a) for a in turn], [math.sin(a) for a in turn])
    plane.plot(
        *circle, color=_GREY, linewidth=1, label="unit circle: plain iteration converges inside"
    )
    plane.plot(
        [1.0],
        [0.0],
        marker="x",
        color=_COLOURS[1],
        markersize=9,
        linestyle="none",
        label="1: an eigenvalue here makes I - J singular",
    )
    flat = values.flatten()
    plane.scatter(flat.real.tolist(), flat.imag.tolist(), s=14, alpha=0.6, color=_COLOURS[0])
    plane.set_aspect("equal")
    plane.set_xlabel("real part")
    plane.set_ylabel("imaginary part")
    plane.set_title("eigenvalues of df/dz, all samples", fontsize=10)
    ordered = radius.sort(descending=True).values.tolist()
    bars.bar(
        range(len(ordered)),
        ordered,
        color=[_COLOURS[1] if value >= 1.0 else _COLOURS[0] for value in ordered],
    )
    bars.axhline(1.0, color=_GREY, linestyle="--", linewidth=1)
    bars.set_xlabel("sample, by radius")
    bars.set_title("spectral radius", fontsize=10)
    _integer_ticks(bars)
    bars.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=2)
    return _save(figure, path)


def plot_path_independence(report: PathIndependence, path: Path) -> Path:
    """How far from the usual fixed point each start ended, and what became of the samples.

    Left one dot per sample, right the shares: arrived at the same fixed point, at another one, or
    not converged.

    Args:
        report: from `path_independence`.
        path: the PNG to write.

    Raises:
        UserError: a report of an empty batch.
    """
    arrivals = [arrival for arrival in report.arrivals if arrival.distance.numel()]
    if not arrivals:
        raise UserError("no samples to draw; call path_independence on a batch with at least one")
    figure = _figure()
    distances, shares = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for row, arrival in enumerate(arrivals):
        _draw_arrival(distances, shares, row, arrival, report.tolerance)
    distances.axvline(report.tolerance, color=_GREY, linestyle="--", linewidth=1)
    distances.set_xscale("log")
    distances.set_yticks(range(len(arrivals)), [arrival.start for arrival in arrivals])
    distances.set_ylim(len(arrivals) - 0.5, -0.5)
    distances.set_xlabel("distance / size of the usual one (dashed: the same)")
    distances.set_title("where solves from other starts ended", fontsize=10)
    shares.set_xlim(0.0, 1.0)
    shares.set_xlabel("share of the samples")
    shares.set_title(f"path independence {report.score:.0%}", fontsize=10)
    for axes in (distances, shares):
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = shares.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(),
        unique.keys(),
        loc="outside lower center",
        frameon=False,
        fontsize=8,
        ncols=3,
    )
    return _save(figure, path)


def plot_report(report: Report, path: Path) -> Path:
    """What the doctor measured, beside the limits, and what it found.

    Args:
        report: from `doctor` or `examine`.
        path: the PNG to write. The first few findings, which are the errors, are written out.
    """
    figure = _figure()
    numbers, text = figure.subplots(1, 2, width_ratios=(2, 3))
    _draw_measurements(numbers, report.measurements)
    text.set_axis_off()
    count = len(report.findings)
    title = f"{count} finding{'s' if count != 1 else ''}" if count else "no findings"
    lines = [(title, _RED if count else _GREEN, 12)]
    for finding in report.findings[:_MOST_FINDINGS]:
        lines += _written(finding)
    if count > _MOST_FINDINGS:
        names = ", ".join(finding.cause for finding in report.findings[_MOST_FINDINGS:])
        lines += [(line, _GREY, 8) for line in textwrap.wrap(f"and {names}", 62)]
    height = 1.0
    for line, colour, size in lines:
        height -= size / 230
        weight = "bold" if size > 8 else "normal"
        text.text(
            0.0,
            height,
            line,
            transform=text.transAxes,
            color=colour,
            fontsize=size,
            fontweight=weight,
            # matplotlib would read dollars and underscores of names as formulas
            parse_math=False,
        )
    return _save(figure, path)


def _draw_arrival(
    distances: Axes, shares: Axes, row: int, arrival: Arrival, tolerance: float
) -> None:
    """One start: its samples as dots spread over the height of the row, and its bar."""
    distance = arrival.distance.detach().double().cpu()
    same = arrival.converged.cpu() & (distance <= tolerance)
    other = arrival.converged.cpu() & (distance > tolerance)
    kinds = {
        "the same fixed point": (same, _GREEN),
        "another fixed point": (other, _RED),
        "not converged": (~arrival.converged.cpu(), "#BBBBBB"),
    }
    heights = row + torch.linspace(-0.25, 0.25, len(distance)) if len(distance) > 1 else [row]
    # an exact zero has no place on a logarithmic axis
    shown = distance.clamp_min(1e-6 * max(tolerance, 1e-6))
    left = 0.0
    for name, (mask, colour) in kinds.items():
        rows = [float(h) for h, hit in zip(heights, mask.tolist(), strict=True) if hit]
        distances.scatter(shown[mask].tolist(), rows, s=16, color=colour, alpha=0.8)
        share = float(mask.double().mean())
        shares.barh([row], [share], 0.5, left=left, color=colour, label=name)
        left += share


def _draw_measurements(axes: Axes, measurements: Mapping[str, Mapping[str, float]]) -> None:
    """One row per measured number, one dot per layer, a bar where it becomes a finding."""
    names = list(dict.fromkeys(name for numbers in measurements.values() for name in numbers))
    if not names:
        axes.set_axis_off()
        return
    for index, (layer, numbers) in enumerate(list(measurements.items())[: len(_COLOURS)]):
        for name, value in numbers.items():
            row, sick = names.index(name), value >= _LIMITS.get(name, math.inf)
            axes.scatter(
                [max(value, 1e-9)],
                [row],
                s=40,
                color=_COLOURS[index],
                edgecolors="black" if sick else "none",
                linewidths=1.5,
                zorder=3,
                label=layer or "the model",
            )
            if len(measurements) == 1:
                right = axes.get_yaxis_transform()
                axes.text(
                    1.0, row, f"{value:.2g}", transform=right, fontsize=8, ha="right", va="center"
                )
    for name, limit in _LIMITS.items():
        if name in names:
            row = names.index(name)
            axes.plot([limit, limit], [row - 0.3, row + 0.3], color=_GREY, linewidth=2)
    axes.set_xscale("log")
    axes.margins(x=0.3)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_title("measured (bar: limit, ringed: beyond)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if len(measurements) > 1:
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axes.legend(unique.values(), unique.keys(), fontsize=7, frameon=False, loc="lower right")


def _written(finding: Finding) -> list[tuple[str, str, int]]:
    """Lines of text with colour and size."""
    colour = _RED if finding.severity is Severity.ERROR else _ORANGE
    where = f" in {finding.layer}" if finding.layer else ""
    lines = [("", colour, 4), (f"{finding.cause}{where} ({finding.severity})", colour, 9)]
    for words, shade in ((finding.evidence, "black"), (finding.advice, _GREY)):
        wrapped = textwrap.wrap(words, 62, max_lines=3, placeholder=" ...")
        lines += [(line, shade, 8) for line in wrapped]
    return lines


def _figure() -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(8.0, 5.0), dpi=150, layout="constrained")


def _integer_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _median(values: Tensor) -> tuple[list[int], list[float]]:
    """Over the samples by step; a finished sample counts with its last residual."""
    last = torch.full_like(values[0], torch.nan)
    steps: list[int] = []
    medians: list[float] = []
    for step, row in enumerate(values):
        last = torch.where(torch.isnan(row), last, row)
        median = float(last.nanmedian()) if last.numel() else math.nan
        if median > 0:
            steps.append(step)
            medians.append(median)
    return steps, medians


def _save(figure: Figure, path: Path) -> Path:
    """Replace a picture in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            figure.savefig(file, format="png")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
