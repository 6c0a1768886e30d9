"""Draw the pictures of the docs from the results.

    python -m benchmarks.plots

Writes docs/images/scaling.png from results/scaling.json: one panel per dimension, both axes
logarithmic, every curve labelled at its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.record import RESULTS, load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGES = Path(__file__).parent.parent / "docs" / "images"
# Okabe and Ito's colours, told apart with any colour vision; the marker tells them apart, too.
STYLES = {
    "ours": ("#0072B2", "o"),
    "torchdeq anderson": ("#D55E00", "s"),
    "torchdeq broyden": ("#CC79A7", "^"),
    "published": ("#009E73", "D"),
    "explicit": ("#595959", "x"),
}
LABELS = {"ours": "equilibria", "explicit": "explicit, 16 tied layers"}
AXES = {
    "batch": "samples in the batch",
    "length": "tokens in a sequence",
    "width": "width (feed-forward 4 times that)",
    "steps": "solver steps, forward and backward each",
}


def scaling(result: dict[str, Any]) -> Figure:
    """Milliseconds of a training step over each dimension."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 7.6), dpi=150, layout="constrained")
    rows = result["rows"]
    panels = figure.subplots(2, 2).ravel()
    for axes, row in zip(panels, rows, strict=False):
        _panel(axes, row)
    for axes in panels[len(rows) :]:
        axes.remove()
    figure.suptitle(
        f"Milliseconds of a training step; otherwise {result['base']}",
        fontsize=12,
        x=0.01,
        ha="left",
    )
    return figure


def _panel(axes: Axes, row: dict[str, Any]) -> None:
    from matplotlib.ticker import LogLocator

    points = row["points"]
    values = [point["value"] for point in points]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ends: list[tuple[float, str, str]] = []
    for name in points[0]["milliseconds"]:
        kind = next(kind for kind in STYLES if name.startswith(kind))
        colour, marker = STYLES[kind]
        spreads = [point["milliseconds"][name] for point in points]
        medians = [spread["median"] for spread in spreads]
        axes.fill_between(
            values, [s["low"] for s in spreads], [s["high"] for s in spreads],
            color=colour, alpha=0.15, linewidth=0,
        )  # fmt: skip
        axes.plot(values, medians, color=colour, marker=marker, markersize=5, linewidth=1.7)
        label = LABELS.get(kind, kind)
        if row["dimension"] == "steps" and kind == "explicit":
            label = "explicit, as many tied layers"
        ends.append((medians[-1], f"{label} (exponent {row['exponents'][name]:.2f})", colour))
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(AXES[row["dimension"]])
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = axes.get_ylim()
    for y, (_, text, colour) in zip(_apart(ends, low, high), sorted(ends), strict=True):
        axes.annotate(
            text, (1.015, y), xycoords=("axes fraction", "data"), color=colour, fontsize=8.5,
            va="center", annotation_clip=False,
        )  # fmt: skip


def _apart(ends: list[tuple[float, str, str]], low: float, high: float) -> list[float]:
    """Heights for the labels, from below: those of the curves, moved up to not overlap."""
    room = (high / low) ** 0.06
    heights: list[float] = []
    for y, _, _ in sorted(ends):
        heights.append(max(y, heights[-1] * room) if heights else y)
    if heights and heights[-1] > high:  # down again, as far as it takes
        heights[-1] = high
        for i in range(len(heights) - 2, -1, -1):
            heights[i] = min(heights[i], heights[i + 1] / room)
    return heights


def main(results: Path = RESULTS, images: Path = IMAGES) -> None:
    """Draw what there are results for."""
    if not (results / "scaling.json").exists():
        print("no scaling.json: run python -m benchmarks.scaling")
        return
    images.mkdir(parents=True, exist_ok=True)
    path = images / "scaling.png"
    scaling(load("scaling", results)).savefig(path)
    print(f"drew {path}")


if __name__ == "__main__":
    main()
