"""Drawings: limits, marks, and numbers as words."""

from __future__ import annotations

import math
import re

import pytest

from equilibria.report import wording
from equilibria.report.charts import Counts, Line, histogram, line_chart, thinned

NBSP = "\N{NO-BREAK SPACE}"
TIMES = "\N{MULTIPLICATION SIGN}"


def _ticks(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>(.*?)</text>", svg)


def _line(values: list[float]) -> Line:
    return Line([(float(i), value) for i, value in enumerate(values)], 1)


def test_far_apart_is_logarithmic() -> None:
    chart = line_chart("loss", [_line([1.0, 1e-3, 1e-6])], x_label="step")
    assert chart is not None
    assert {"1", "0.01", "10⁻⁴", "10⁻⁶"} <= set(_ticks(chart.svg))


def test_near_is_linear() -> None:
    chart = line_chart("loss", [_line([1.0, 2.0, 3.0])], x_label="step")
    assert chart is not None
    assert {"1", "2", "3", "step"} <= set(_ticks(chart.svg))


def test_a_range_within_a_decade_is_marked() -> None:
    for low, high in ((4e-5, 7e-5), (0.9, 1.1), (2.0, 40.0)):
        chart = line_chart("x", [_line([low, high])], x_label="step", scale="log")
        assert chart is not None
        assert len(_ticks(chart.svg)) >= 2 + 2, (low, high)  # at least two on either axis


def test_a_spike_is_left_off_the_top_and_said() -> None:
    values = [1.0 + 0.01 * (i % 7) for i in range(200)]
    spiked = [*values[:100], 40.0, *values[100:]]
    chart = line_chart("norm", [_line(spiked)], x_label="step", scale="linear")
    assert chart is not None
    assert chart.note == "highest 40, off the top"
    # but not a curve that is all there
    chart = line_chart("norm", [_line(values), _line([40.0] * 5)], x_label="step", scale="linear")
    assert chart is not None
    assert chart.note == ""


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-300, 1e300, 5.0])
@pytest.mark.parametrize("scale", ["linear", "log", "auto", "from zero"])
def test_values_that_do_not_change(value: float, scale: str) -> None:
    chart = line_chart("x", [_line([value, value])], x_label="step", scale=scale)  # pyright: ignore[reportArgumentType]
    assert chart is not None


def test_nothing_finite_is_no_chart() -> None:
    assert line_chart("x", [_line([math.nan, math.nan]), _line([])], x_label="step") is None
    assert histogram("x", [], x_label="value") is None
    assert histogram("x", [Counts([0.0, 1.0], [0], 1)], x_label="value") is None


def test_the_same_drawing_is_the_same_text() -> None:
    first, second = (line_chart("x", [_line([1.0, 2.0])], x_label="step") for _ in range(2))
    assert first == second


def test_drawing_leaves_the_settings_of_matplotlib_alone() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    line_chart("x", [_line([1.0, 2.0])], x_label="step")
    assert dict(mpl.rcParams) == before


def test_long_curves_are_thinned_by_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(100_000)]
    few = thinned(points)
    assert len(few) <= 400
    assert all(value == pytest.approx(0.5) for _, value in few[:-1])
    assert thinned(points[:400]) == points[:400]


def test_shares_of_a_histogram() -> None:
    chart = histogram("x", [Counts([0.5, 1.5, 2.5], [1, 3], 2)], x_label="NFE")
    assert chart is not None
    assert {"1", "2", "NFE"} <= set(_ticks(chart.svg))
    assert "60%" in _ticks(chart.svg)
    assert "var(--series-2)" in chart.svg


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.25, "0.2 s"),
        (59.6, "1 min 0 s"),
        (3_661, "1 h 1 min"),
        (90_000, "1 d 1 h"),
        (math.nan, "not finite"),
        (-1.0, "not finite"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert wording.duration(seconds) == words.replace("not finite", "not~finite").replace(
        " ", NBSP
    ).replace("~", " ")


def test_numbers_as_words() -> None:
    assert wording.scientific(3.94e-5) == f"3.9{NBSP}{TIMES}{NBSP}10⁻⁵"
    assert wording.scientific(1e-4) == "10⁻⁴"
    assert wording.scientific(0.0) == "0"
    assert wording.residual(0.87) == "0.87"
    assert wording.score(4.95473) == "4.9547"
    assert wording.score(141.845) == "141.84"
    assert wording.score(math.inf) == "not finite"
    assert wording.count(1234567.0) == "1,234,567"
    assert [wording.tick(v) for v in (0.0, 0.0005, 0.02, 1500.0, 2e6, 4e-7, -3.0)] == [
        "0", "0.0005", "0.02", "1.5k", "2M", f"4{TIMES}10⁻⁷", "-3",
    ]  # fmt: skip
    assert wording.plural(1, "line") == "1 line"
    assert wording.plural(2, "line") == "2 lines"
