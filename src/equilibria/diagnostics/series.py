"""Numbers of a run as curves: taken from its records, split, smoothed, and their medians."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

Record = dict[str, Any]
Points = list[tuple[float, float]]
"""(step, value), by step; a value that is not finite is NaN."""


def records_of(records: list[Record], kind: str) -> list[Record]:
    """Records of one kind that know their step."""
    return [r for r in records if r.get("kind") == kind and isinstance(r.get("step"), int)]


def as_number(value: Any) -> float | None:
    """The value if it is a number; NaN if it is one that is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan  # JSON has integers of any size


def curve(records: list[Record], kind: str, key: str) -> Points:
    """Values of a key over steps; a step that was written twice counts with its last value."""
    values = {r["step"]: as_number(r.get(key)) for r in records_of(records, kind)}
    return [(float(step), value) for step, value in sorted(values.items()) if value is not None]


def curves_by_sample(rows: Sequence[Sequence[Any]] | None) -> list[Points]:
    """Residuals over solver steps by sample, without the nulls after a sample finished."""
    numbers = [[(float(i), as_number(value)) for i, value in enumerate(row)] for row in rows or []]
    samples = [[(i, value) for i, value in row if value is not None] for row in numbers]
    return [sample for sample in samples if sample]


def finite_values(points: Points) -> list[float]:
    """Values without those that are not finite."""
    return [value for _, value in points if math.isfinite(value)]


def columns(points: Points) -> tuple[list[float], list[float]]:
    """Steps and values, as matplotlib wants them."""
    return [x for x, _ in points], [y for _, y in points]


def end_of_unrolling(records: list[Record]) -> float | None:
    """Last unrolled step, if equilibrium steps follow."""
    train = records_of(records, "train")
    unrolled = [r["step"] for r in train if r.get("phase") == "unrolled"]
    return max(unrolled) if 0 < len(unrolled) < len(train) else None


def split_at(points: Points, border: float | None) -> list[Points]:
    """Points up to the border and after it: the two phases are no one curve."""
    if border is None:
        return [points]
    return [[p for p in points if p[0] <= border], [p for p in points if p[0] > border]]


def half_window(points: Points) -> int:
    """Half the window of the running mean: both halves are a twentieth of the run."""
    return len(points) // 40


def running_mean(points: Points, reach: int) -> Points:
    """Mean over up to `reach` finite neighbours on each side; NaN stays NaN.

    At the start the window looks less far ahead, which would hide the first descent.
    """
    sums = list(accumulate((y if math.isfinite(y) else 0.0 for _, y in points), initial=0.0))
    counts = list(accumulate((int(math.isfinite(y)) for _, y in points), initial=0))
    means: Points = []
    for i, (x, y) in enumerate(points):
        ahead = max(min(reach, i), reach // 4)
        low, high = max(i - reach, 0), min(i + ahead + 1, len(points))
        total, count = sums[high] - sums[low], counts[high] - counts[low]
        means.append((x, y if reach == 0 or not math.isfinite(y) else total / count))
    return means


def median_curve(samples: list[Points]) -> Points:
    """Median by step until half the samples have finished; those count with their last residual.

    Past that point it would be flat whatever the others do, and look like stagnation. A sample
    that is not finite counts as the worst.
    """
    points: Points = []
    lengths = [len(sample) for sample in samples]
    for step in range(max(lengths)):
        reached = [s[min(step, len(s) - 1)][1] for s in samples]
        middle = statistics.median(v if math.isfinite(v) else math.inf for v in reached)
        points.append((step, middle if math.isfinite(middle) else math.nan))
        if 2 * sum(length > step + 1 for length in lengths) < len(samples):
            break
    return points
