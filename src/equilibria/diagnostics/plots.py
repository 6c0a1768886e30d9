"""Pictures of a training run, made from its metrics file alone.

The file is longer than most: three pictures share their smoothing, marks and labels. matplotlib
is imported where a figure is made, so that importing this module stays cheap, and only its object
interface is used, so that nothing global changes.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from equilibria.core.errors import UserError
from equilibria.diagnostics.record_lines import lines_of
from equilibria.diagnostics.series import (
    Points,
    Record,
    as_number,
    columns,
    curve,
    curves_by_sample,
    end_of_unrolling,
    finite_values,
    half_window,
    median_curve,
    records_of,
    running_mean,
    split_at,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision.
_FORWARD, _BACKWARD, _FAILED, _GREY = "#0072B2", "#D55E00", "#CC79A7", "#595959"
_INCHES, _DPI = (8.0, 5.0), 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.11, 0.91, 0.84, 0.115
_LINEAR_SPAN = 200.0  # losses further apart than this get a logarithmic axis
_LABEL_ROOM = 0.25  # free room for labels right of the last step, relative to the steps
_BASELINE_NAMES = {"five_gram": "5-gram"}


def plot_run(folder: Path, baselines: Mapping[str, float] | None = None) -> list[Path]:
    """Draw `loss.png`, `solver.png` and `convergence.png` into `folder`/plots.

    A picture whose records are missing is left out. Each is replaced in one step, so that a
    reader never sees half of one.

    Args:
        folder: a run folder with metrics.jsonl.
        baselines: bits per token of other methods on the test split, drawn as lines in the
            loss; one that is worse than every loss has no place there and is left out.

    Returns:
        The pictures drawn.

    Raises:
        UserError: the folder has no metrics, or cannot be written to.
    """
    records = read_metrics(folder)
    figures = {
        "loss.png": draw_loss(records, baselines),
        "solver.png": draw_solver(records),
        "convergence.png": draw_convergence(records),
    }
    target = folder / "plots"
    drawn: list[Path] = []
    for name, figure in figures.items():
        if figure is not None:
            _save(figure, target / name)
            drawn.append(target / name)
    return drawn


def read_metrics(folder: Path) -> list[Record]:
    """Records of a run; a line that a crash cut short is skipped.

    Raises:
        UserError: there are none.
    """
    file = folder / "metrics.jsonl"
    records: list[Record] = []
    for line in lines_of(file) if file.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    if not records:
        raise UserError(
            f"{file} has no records to draw; give the folder of a run that has written at least "
            "one step"
        )
    return records


def draw_loss(records: list[Record], baselines: Mapping[str, float] | None = None) -> Figure | None:
    """Training and validation loss over the steps; None without a finite training loss.

    Args:
        records: as from `read_metrics`.
        baselines: see `plot_run`.
    """
    train, valid = curve(records, "train", "loss"), curve(records, "valid", "loss")
    if not finite_values(train):
        return None
    figure = _figure("Training and validation loss")
    axes = figure.subplots()
    last = _frame_steps(axes, train, valid)
    smooth = _curve(axes, train, None, _FORWARD)
    axes.plot(*columns(valid), color=_BACKWARD, marker="o", markersize=4, linewidth=1.5)

    references = {
        _BASELINE_NAMES.get(name, name): _to_nats(bits)
        for name, bits in (baselines or {}).items()
        if math.isfinite(bits)
    }
    losses = finite_values(train) + finite_values(valid)
    if min(losses) * _LINEAR_SPAN > _usual_top(losses):
        axes.set_ylim(*_loss_limits(losses, list(references.values())))
    else:
        _log_scale(axes, losses + list(references.values()))
    bottom, top = axes.get_ylim()
    ends = [_End("train, smoothed" if half_window(train) else "train", smooth, _FORWARD)]
    ends += [_End("validation", valid, _BACKWARD)]
    for name, loss in references.items():
        if bottom < loss < top:
            axes.hlines(loss, 0, last, color=_GREY, linewidth=1, linestyle=":", zorder=1)
            ends.append(_End(f"{name}, test", [(last, loss)], _GREY))
    _label_ends(axes, ends, last)
    _mark_border(axes, records)
    _shade_failures(axes, train)
    axes.set_ylabel("loss (nats per token)")
    bits = axes.secondary_yaxis("right", functions=(_to_bits, _to_nats))
    bits.set_ylabel("loss (bits per token)")

    notes: list[str] = []
    if finite_values(valid):
        step, lowest = min((p for p in valid if math.isfinite(p[1])), key=lambda p: p[1])
        shown = f"{lowest:.3f}" if lowest >= 0.05 else f"{lowest:.2e}"
        notes.append(f"lowest validation loss {shown} at step {step:,.0f}")
    highest = max(losses)
    if highest > top:
        notes.append(f"highest loss {highest:.3g}, off the top")
    num_failed = len(train) - len(finite_values(train))
    if num_failed:
        notes.append(f"shaded: {num_failed:,} of {len(train):,} training losses are not finite")
    _subtitle(figure, notes)
    return figure


def draw_solver(records: list[Record]) -> Figure | None:
    """Evaluations and residuals of both solves over the steps; None if none was recorded."""
    series = {
        key: curve(records, "train", key)
        for key in (
            "num_evals",
            "backward_num_evals",
            "relative_residual",
            "backward_relative_residual",
        )
    }
    if not any(finite_values(points) for points in series.values()):
        return None
    figure = _figure("Work and accuracy of the solves in training")
    panels = figure.subplots(2, 1, sharex=True)
    border = end_of_unrolling(records)
    notes: list[str] = []
    failed = smoothed = False
    for axes, name in zip(panels, ("num_evals", "relative_residual"), strict=True):
        sides = {"forward": series[name], "backward": series[f"backward_{name}"]}
        last = _frame_steps(axes, *series.values())
        ends: list[_End] = []
        for colour, (side, points) in zip((_FORWARD, _BACKWARD), sides.items(), strict=True):
            smooth = _curve(axes, points, border, colour)
            ends.append(_End(side, smooth, colour))
            smoothed |= half_window(points) > 0
        values = [value for points in sides.values() for value in finite_values(points)]
        failed |= _shade_failures(axes, *sides.values())
        if name == "num_evals":
            axes.set_ylim(0, 1.18 * max([*values, 1.0]))  # room for a name at the top
        else:
            _log_scale(axes, values)
        _label_ends(axes, ends, last)
    upper, lower = panels
    _mark_border(upper, records)
    _mark_border(lower, records, label=False)
    _whole_numbers(upper)
    upper.set_xlabel("")
    upper.set_ylabel("function evaluations\nper sample (mean)")
    lower.set_ylabel("relative residual\n(mean over samples)")

    if not finite_values(series["backward_num_evals"]):
        unrolled = all(r.get("phase") == "unrolled" for r in records_of(records, "train"))
        notes.append("all steps unrolled: no backward solves" if unrolled else "no backward solves")
    if failed:
        notes.append("shaded: residual not finite")
    if smoothed:
        notes.append("bold lines are running means")
    _subtitle(figure, notes)
    return figure


def draw_convergence(records: list[Record]) -> Figure | None:
    """Residual by solver step in the last trace; None if there is none or it is empty."""
    traces = records_of(records, "trace")
    if not traces:
        return None
    trace = traces[-1]
    sides = {side: curves_by_sample(trace.get(side)) for side in ("forward", "backward")}
    tolerances = {side: as_number(trace.get(f"{side}_tolerance")) for side in sides}
    tolerances = {side: t if t and math.isfinite(t) else None for side, t in tolerances.items()}
    values = [v for samples in sides.values() for points in samples for v in finite_values(points)]
    if not values:
        return None
    lengths = [max(map(len, samples)) for samples in sides.values() if samples]
    alike = max(lengths) <= 4 * min(lengths)  # else the shorter solve would be squeezed
    figure = _figure(f"Residual of each solve, step by step, at training step {trace['step']:,}")
    figure.subplots_adjust(top=0.82)
    panels = figure.subplots(1, 2, sharey=True)
    _log_scale(panels[0], [*values, *(t for t in tolerances.values() if t)])
    panels[0].set_ylabel("relative residual")
    for axes, side, colour in zip(panels, sides, (_FORWARD, _BACKWARD), strict=True):
        samples, tolerance = sides[side], tolerances[side]
        longest = max(map(len, samples)) if samples and not alike else max(lengths)
        axes.set_xlim(-0.02 * longest, 1.04 * max(longest - 1, 1))
        _whole_numbers(axes, "x")
        axes.set_xlabel("solver step")
        title = _describe(side, samples, tolerance)
        axes.set_title(title, loc="left", fontsize=9.5, color=colour)
        if samples:
            end = _draw_samples(axes, samples, colour)
            _draw_tolerance(axes, tolerance, left=end > 0.5 * longest)
    _subtitle(figure, ["thin: one sample, dot: where it ended", "bold: median over samples"])
    return figure


def _draw_samples(axes: Axes, samples: list[Points], colour: str) -> float:
    """Draw every sample and their median; return the step where the median ends."""
    alpha = min(max(8.0 / len(samples), 0.08), 0.4)
    for points in samples:
        axes.plot(*columns(points), color=colour, alpha=alpha, linewidth=0.8)
        ended = [p for p in points if math.isfinite(p[1])][-1:]
        axes.plot(*columns(ended), color=colour, alpha=alpha, marker="o", markersize=2.5)
    median = median_curve(samples)
    axes.plot(*columns(median), color=colour, linewidth=2.5)
    ended = [p for p in median if math.isfinite(p[1])][-1:]
    axes.plot(*columns(ended), color=colour, marker="o", markersize=5)
    for point in ended:
        place = point[0] / axes.get_xlim()[1]
        ha = "right" if place > 0.85 else "left" if place < 0.15 else "center"
        _write(axes, "median", point, colour, (0, -7), ha=ha, va="top", weight="bold")
    return ended[0][0] if ended else 0.0


def _draw_tolerance(axes: Axes, tolerance: float | None, left: bool) -> None:
    """Dashed line, named at the side that the end of the median leaves free."""
    if tolerance:
        axes.axhline(tolerance, color=_GREY, linewidth=1, linestyle="--", zorder=1)
        point = (axes.get_xlim()[0 if left else 1], tolerance)
        shift, ha = ((4, -3), "left") if left else ((-4, -3), "right")
        _write(axes, f"tolerance {tolerance:.2g}", point, _GREY, shift, ha=ha, va="top")


def _describe(side: str, samples: list[Points], tolerance: float | None) -> str:
    """What a panel of the convergence picture shows, in a line."""
    if not samples:
        return f"{side.capitalize()}: no solve recorded"
    if not tolerance:
        return f"{side.capitalize()}: {len(samples)} sample{'s' if len(samples) > 1 else ''}"
    reached = sum(min(finite_values(points), default=math.inf) <= tolerance for points in samples)
    return f"{side.capitalize()}: {reached} of {len(samples)} reach the tolerance"


# --- Parts of pictures ---------------------------------------------------------------------------


class _End(NamedTuple):
    """A curve to be named at its last finite point."""

    text: str
    points: Points
    colour: str


def _figure(title: str) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.subplots_adjust(_LEFT, _BOTTOM, _RIGHT, _TOP, wspace=0.06, hspace=0.12)
    figure.text(_LEFT, 0.95, title, fontsize=13, weight="bold")
    return figure


def _subtitle(figure: Figure, notes: list[str]) -> None:
    text = textwrap.fill("; ".join(notes), 92)
    text = text[:1].upper() + text[1:]
    figure.text(_LEFT, 0.935, text, va="top", fontsize=9, color=_GREY)


def _frame_steps(axes: Axes, *series: Points) -> float:
    """Lay out the axis of training steps, with room for labels; return the last step."""
    last = max([step for points in series for step, _ in points] + [1.0])
    axes.set_xlim(0, (1 + _LABEL_ROOM) * last)
    _whole_numbers(axes, "x")
    # no ticks where there are only labels
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("training step")
    axes.spines[["top", "right"]].set_visible(False)
    return last


def _curve(axes: Axes, points: Points, border: float | None, colour: str) -> Points:
    """Draw the values light and their running mean strong, apart before and after the border.

    Returns:
        The running means.
    """
    means: Points = []
    marker = "." if len(points) < 40 else ""  # a lone value is no line
    for part in split_at(points, border):
        smooth = running_mean(part, half_window(points))
        axes.plot(*columns(part), color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(*columns(smooth), color=colour, linewidth=2, marker=marker)
        means += smooth
    return means


def _mark_border(axes: Axes, records: list[Record], label: bool = True) -> None:
    """Vertical line where unrolled pre-training ended, named at its roomier side."""
    border = end_of_unrolling(records)
    if border is None:
        return
    axes.axvline(border, color=_GREY, linewidth=1, zorder=1)
    if label:
        early = border <= 0.5 * axes.get_xlim()[1]
        axes.annotate(
            "end of unrolled pre-training",
            (border, 0.97),
            (5 if early else -5, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="left" if early else "right",
            va="top",
            fontsize=9,
            color=_GREY,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )


def _shade_failures(axes: Axes, *series: Points) -> bool:
    """Shade the steps where a value is not finite, between their neighbours; return if any was."""
    sums: dict[float, float] = {}  # NaN if one of them is
    for step, value in (point for points in series for point in points):
        sums[step] = sums.get(step, 0.0) + value
    points = sorted(sums.items())
    previous = None
    for i, (step, value) in enumerate(points):
        failed = not math.isfinite(value)
        if failed and previous is None:
            previous = points[max(i - 1, 0)][0]
        if previous is not None and (not failed or i == len(points) - 1):
            # the edge keeps a single step visible in a long run
            axes.axvspan(previous, step, facecolor=_FAILED, edgecolor=_FAILED, alpha=0.3, zorder=0)
            previous = None
    return any(not math.isfinite(value) for value in sums.values())


def _label_ends(axes: Axes, ends: list[_End], last: float) -> None:
    """Name curves right of their ends, moved up or down where the names would touch."""
    bottom, top = axes.get_ylim()
    places: list[tuple[float, tuple[float, float], _End]] = []
    for end in ends:
        finite = [p for p in end.points if math.isfinite(p[1])]
        if finite:
            x, y = finite[-1][0], min(max(finite[-1][1], bottom), top)
            pixel = axes.transData.transform((x, y))
            places.append((float(axes.transAxes.inverted().transform(pixel)[1]), (x, y), end))
    places.sort(key=lambda place: place[0])
    line_height = 12.5 / 72 / (axes.get_position().height * _INCHES[1])
    heights = _spread([height for height, _, _ in places], line_height)
    column = (1 + 0.1 * _LABEL_ROOM) * last / axes.get_xlim()[1]
    for height, (_, point, end) in zip(heights, places, strict=True):
        # a long leader, from a curve that ended early, would look like data
        leader = {"arrowstyle": "-", "color": end.colour, "linewidth": 0.6, "shrinkB": 0}
        axes.annotate(
            end.text,
            point,
            (column, height),
            xycoords="data",
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=end.colour,
            annotation_clip=False,
            arrowprops=leader if point[0] > 0.97 * last else None,
        )


def _spread(heights: list[float], gap: float) -> list[float]:
    """Move ascending heights apart to at least about `gap`, staying inside [0, 1]."""
    spread = list(heights)
    for _ in range(100):
        for i in range(1, len(spread)):
            push = max(0.0, gap - (spread[i] - spread[i - 1])) / 2
            spread[i - 1] -= push
            spread[i] += push
        spread = [min(max(height, gap / 2), 1 - gap / 2) for height in spread]
    return spread


def _write(
    axes: Axes, text: str, point: tuple[float, float], colour: str, shift: tuple[float, float],
    **style: Any,
) -> None:  # fmt: skip
    """Write beside a point, readable on top of lines."""
    from matplotlib.patheffects import withStroke

    axes.annotate(
        text,
        point,
        shift,
        textcoords="offset points",
        fontsize=9,
        color=colour,
        path_effects=[withStroke(linewidth=3, foreground="white")],
        **style,
    )


def _whole_numbers(axes: Axes, axis: str = "y") -> None:
    from matplotlib.ticker import MaxNLocator

    which = axes.xaxis if axis == "x" else axes.yaxis
    which.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))


def _log_scale(axes: Axes, values: list[float]) -> None:
    """Logarithmic y axis with whole decades around the values, and room for names below them."""
    from matplotlib.ticker import NullFormatter

    # an exact 0 leaves at the bottom
    axes.set_yscale("log", nonpositive="clip")
    positive = [value for value in values if value > 0] or [1.0]
    low = math.floor(math.log10(min(positive) / 2.5))
    high = math.ceil(math.log10(max(positive)))
    axes.set_ylim(10.0**low, 1.4 * 10.0**high)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _loss_limits(losses: list[float], references: list[float]) -> tuple[float, float]:
    """Range of the usual losses and of the references among them."""
    top = max([_usual_top(losses), *(loss for loss in references if loss <= max(losses))])
    bottom = min([*losses, *references])
    margin = 0.07 * (top - bottom) or 0.1 * abs(top) or 0.1
    return bottom - margin, top + 1.8 * margin  # above: the name of the border


def _usual_top(losses: list[float]) -> float:
    """The highest but for 3 %: the first descent, or a spike, would flatten all the rest."""
    return sorted(losses)[min(int(0.97 * len(losses)), len(losses) - 1)]


def _to_bits(nats: Any) -> Any:
    return nats / math.log(2.0)


def _to_nats(bits: Any) -> Any:
    return bits * math.log(2.0)


def _save(figure: Figure, path: Path) -> None:
    """Replace a picture in one step."""
    try:
        path.parent.mkdir(exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); make the run folder writable or copy it"
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            figure.savefig(file, format="png")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
