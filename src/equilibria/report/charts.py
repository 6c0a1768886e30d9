"""Drawings as SVG that takes its colours and fonts from the page.

matplotlib draws with colours that stand for others, and the text of the SVG is changed afterwards:
colours become variables of the page's style, so that one drawing serves light and dark; fonts
become the page's; what would clash or point outside when several drawings share a page goes. A
drawing holds numbers and words of ours, no text of a run.

Drawings are as wide as a phone, and several stand side by side where there is room: scaled down,
a wide one could not be read.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup

from equilibria.diagnostics.series import Points, columns, finite_values
from equilibria.report.blocks import NUM_COLOURS, Chart
from equilibria.report.wording import plural, power_tick, tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Look = Literal["line", "faint", "dotted", "dots"]
Scale = Literal["linear", "log", "auto", "from zero"]

_WIDTH, _HEIGHT = 340.0, 210.0  # points, which are the units of the drawing
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 10.0, 36.0
_FONT_SIZE = 10.5
_MOST_POINTS = 400
_LINEAR_SPAN = 100.0  # values further apart than this get a logarithmic axis
_DECADES_BELOW = 14  # what is smaller than the largest by more is drawn at the bottom
_TEXT, _GRID, _AXIS = "#010101", "#020202", "#030303"
_COLOURS = tuple(f"#0400{i:02x}" for i in range(1, NUM_COLOURS + 1))
_VARIABLES = {
    _TEXT: "var(--muted)",
    _GRID: "var(--grid)",
    _AXIS: "var(--axis)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(_COLOURS, start=1)},
}


@dataclass(frozen=True)
class Line:
    """A curve.

    Args:
        points: by x.
        colour: from 1, one of those of the style.
        look: strong, faint, dotted, or a thin line with a dot at every point.
    """

    points: Points
    colour: int
    look: Look = "line"


@dataclass(frozen=True)
class Counts:
    """Samples by value.

    Args:
        edges: of the bins, ascending; one more than samples.
        samples: in each bin.
        colour: from 1.
    """

    edges: Sequence[float]
    samples: Sequence[float]
    colour: int


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    scale: Scale = "auto",
    marks: Sequence[tuple[float, int]] = (),
    levels: Sequence[float] = (),
    note: str = "",
) -> Chart | None:
    """Curves over steps; None without a finite value.

    Args:
        title: what is drawn, with its unit.
        lines: the last is drawn on top.
        x_label: what the steps are.
        scale: of the values; "auto" is logarithmic where they are far apart.
        marks: x and colour of vertical lines.
        levels: values of horizontal dashed lines, drawn where there are curves.
        note: what to know to read it.
    """
    values = [value for line in lines for value in finite_values(line.points)]
    if not values:
        return None
    if scale == "auto":
        apart = min(values) > 0 and max(values) > _LINEAR_SPAN * min(values)
        scale = "log" if apart else "linear"
    if scale == "log" and max(values) <= 0:
        scale = "linear"  # nothing that has a logarithm
    figure, axes = _figure()
    for line in lines:
        _draw_line(axes, line)
    _limit_x(axes, lines)
    off_top = _limit_y(axes, lines, scale, levels)
    bottom, top = axes.get_ylim()
    for level in levels:
        if bottom < level < top:
            axes.axhline(level, color=_AXIS, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for x, colour in marks:
        axes.axvline(x, color=_COLOURS[colour - 1], alpha=0.6, linewidth=1, linestyle=":", zorder=1)
    axes.set_xlabel(x_label)
    lost = sum(len(line.points) for line in lines if line.look != "faint") - sum(
        len(finite_values(line.points)) for line in lines if line.look != "faint"
    )
    notes = [note, f"highest {max(values):.3g}, off the top" if off_top else ""]
    notes.append(f"{plural(lost, 'value')} not finite" if lost else "")
    return Chart(title, "; ".join(filter(None, notes)), _render(figure, title))


def histogram(
    title: str,
    counts: Sequence[Counts],
    *,
    x_label: str,
    is_log: bool = False,
    note: str = "",
) -> Chart | None:
    """Shares of the samples by value; None where there are none.

    Args:
        title: what is counted.
        counts: of every run, drawn over one another.
        x_label: what the values are.
        is_log: whether edges are powers of ten.
        note: what to know to read it.
    """
    counts = [item for item in counts if sum(item.samples) > 0]
    if not counts:
        return None
    figure, axes = _figure()
    for item in counts:
        shares = [100.0 * amount / sum(item.samples) for amount in item.samples]
        colour = _COLOURS[item.colour - 1]
        axes.stairs(shares, list(item.edges), fill=True, color=colour, alpha=0.25, linewidth=0)
        axes.stairs(shares, list(item.edges), color=colour, linewidth=1.4)
    low = min(item.edges[0] for item in counts)
    high = max(item.edges[-1] for item in counts)
    axes.set_ylim(0, None)
    axes.margins(y=0.08)
    if is_log:
        axes.set_xscale("log")
        _name_decades(axes.xaxis, low, high)
    else:
        _whole_marks(axes.xaxis)
    axes.set_xlim(low, high)
    axes.yaxis.set_major_formatter("{x:g}%")
    axes.set_xlabel(x_label)
    return Chart(title, note, _render(figure, title))


def _draw_line(axes: Axes, line: Line) -> None:
    colour = _COLOURS[line.colour - 1]
    points = thinned(line.points)
    style: dict[str, Any] = {"linewidth": 1.8}
    match line.look:
        case "faint":
            style = {"linewidth": 0.8, "alpha": 0.3}
        case "dotted":
            style = {"linewidth": 1.6, "linestyle": (0, (1.2, 1.6))}
        case "dots":
            style = {"linewidth": 1.2, "marker": "o", "markersize": 3.4}
        case "line":
            pass
    if len(points) == 1:
        style |= {"marker": "o", "markersize": 4}  # a lone value is no line
    axes.plot(*columns(points), color=colour, solid_joinstyle="round", **style)


def thinned(points: Points) -> Points:
    """At most some hundred points: means over neighbours, which no eye could tell apart."""
    width = math.ceil(len(points) / _MOST_POINTS)
    if width <= 1:
        return points
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def _limit_x(axes: Axes, lines: Sequence[Line]) -> None:
    steps = [x for line in lines for x, _ in line.points]
    span = max(steps) - min(0.0, min(steps))
    axes.set_xlim(-0.01 * span, max(1.02 * span, 1.0))
    _whole_marks(axes.xaxis)


def _limit_y(axes: Axes, lines: Sequence[Line], scale: Scale, levels: Sequence[float]) -> bool:
    """Frame the values; return whether the highest are left outside."""
    values = [value for line in lines for value in finite_values(line.points)]
    highest = max(values)
    if scale == "log":
        positive = [value for value in values if value > 0] or [1.0]
        low = max(min(positive), max(positive) * 10.0**-_DECADES_BELOW)
        shown = [level for level in levels if low / 100 < level < 100 * max(positive)]
        low, high = min([low, *shown]) / 1.5, max([*positive, *shown]) * 1.5
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(low, high)
        _name_decades(axes.yaxis, low, high)
        return False
    if scale == "from zero":
        axes.set_ylim(0.0, 1.08 * highest if highest > 0 else 1.0)
        axes.yaxis.set_major_formatter(tick)
        return False
    bottom = min(values)
    top = max(_usual_top(values) for line in lines if (values := finite_values(line.points)))
    if highest - bottom <= 1.6 * (top - bottom) or top <= bottom:
        top = highest  # nothing to win by leaving values out
    top = max([top, *(level for level in levels if level <= highest)])
    margin = 0.08 * (top - bottom) or 0.1 * abs(top) or 0.1
    axes.set_ylim(bottom - margin, top + margin)
    axes.yaxis.set_major_formatter(tick)
    return highest > top + margin


def _usual_top(values: Sequence[float]) -> float:
    """The highest but for 3 %: the first descent, or a spike, would flatten all the rest."""
    return sorted(values)[min(int(0.97 * len(values)), len(values) - 1)]


def _name_decades(axis: Any, low: float, high: float) -> None:
    """Marks at powers of ten, and between them where there are only few."""
    from matplotlib.ticker import FixedLocator, NullFormatter

    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first < 1:
        axis.set_major_locator(FixedLocator(_within_decades(low, high, first)))
        axis.set_major_formatter(tick)
    else:
        # six names have room; a locator of matplotlib would fall back to marks between decades
        stride = math.ceil((last - first + 1) / 6)
        axis.set_major_locator(FixedLocator([10.0**k for k in range(first, last + 1, stride)]))
        axis.set_major_formatter(power_tick)
    axis.set_minor_locator(FixedLocator([]))
    axis.set_minor_formatter(NullFormatter())


def _within_decades(low: float, high: float, first: int) -> list[float]:
    """Round numbers of a range of about a decade, at most five."""
    from matplotlib.ticker import MaxNLocator

    candidates = [m * 10.0**k for k in (first - 1, first) for m in (1, 2, 5)]
    if sum(low <= mark <= high for mark in candidates) < 2:
        candidates = [float(mark) for mark in MaxNLocator(nbins=4).tick_values(low, high)]
    return [mark for mark in candidates if low <= mark <= high]


def _whole_marks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axis.set_major_formatter(tick)


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), facecolor="none")
    figure.subplots_adjust(
        left=_LEFT / _WIDTH,
        right=1 - _RIGHT / _WIDTH,
        top=1 - _TOP / _HEIGHT,
        bottom=_BOTTOM / _HEIGHT,
    )
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_AXIS)
    axes.tick_params(colors=_TEXT, labelsize=_FONT_SIZE, length=0, pad=5, which="both")
    axes.tick_params(axis="x", length=3, color=_AXIS)
    axes.xaxis.label.set(color=_TEXT, fontsize=_FONT_SIZE)
    return figure, axes


def _render(figure: Figure, title: str) -> Markup:
    import matplotlib as mpl

    out = io.StringIO()
    # Text stays text, and the same drawing gives the same SVG.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "equilibria"}):
        figure.savefig(out, format="svg", transparent=True)
    return Markup(_for_page(out.getvalue(), title))


def _for_page(svg: str, title: str) -> str:
    """Take a file of its own apart and make it a part of a page."""
    svg = svg[svg.index("<svg") :]
    for pattern, replacement in _CHANGES:
        svg = re.sub(pattern, replacement, svg, flags=re.DOTALL)
    return _own_names(svg, title).strip()


_CHANGES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    # who made it and when
    (r"<metadata>.*?</metadata>", ""),
    # rules for "*", which would reach the whole page
    (r"<style.*?</style>", ""),
    (r'\sxmlns(:\w+)?="[^"]*"', ""),
    (r'(<svg[^>]*?)\swidth="[^"]*"', r"\1"),
    (r'(<svg[^>]*?)\sheight="[^"]*"', r"\1"),
    (r"<!--.*?-->", ""),
    (r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px"),
    (r"#0[0-4]0[0-9]0[0-9]\b", lambda match: _VARIABLES.get(match[0], match[0])),
    (r"\n\s*", "\n"),
)


def _own_names(svg: str, title: str) -> str:
    """Names that no other drawing has; names that nothing refers to go."""
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg))
    names = {name for pair in used for name in pair if name}
    prefix = hashlib.sha256(f"{title}\n{svg}".encode()).hexdigest()[:8]
    svg = re.sub(r'\sid="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' * (m[1] in names), svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    return re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
