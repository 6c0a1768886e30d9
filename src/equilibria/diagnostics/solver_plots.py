"""Pictures of single solves: residuals over steps, quality of gradients, eigenvalues.

matplotlib is imported when something is drawn, not when this module is. Every function returns
the path that it wrote, a PNG of 1200 by 750 pixels.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.diagnostics.gradient_quality import GradientQuality
from equilibria.diagnostics.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_GREY = "#666666"
_MOST_ROWS = 24


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
