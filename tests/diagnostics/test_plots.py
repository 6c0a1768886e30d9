"""Pictures of a run: which are drawn, what they say, and what they do with broken records."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from equilibria.core.errors import UserError
from equilibria.diagnostics.plots import (
    draw_convergence,
    draw_loss,
    draw_solver,
    plot_run,
    read_metrics,
)

ALL = ["loss.png", "solver.png", "convergence.png"]


def train_record(step: int, loss: float = 2.0, phase: str = "equilibrium") -> dict[str, Any]:
    backward = phase == "equilibrium"
    return {
        "kind": "train",
        "step": step,
        "phase": phase,
        "loss": loss,
        "num_evals": 12.0,
        "relative_residual": 1e-3,
        "backward_num_evals": 10.0 if backward else None,
        "backward_relative_residual": 1e-3 if backward else None,
        "a key of later": [1],
    }


TRACE: dict[str, Any] = {
    "kind": "trace",
    "step": 20,
    "forward": [[1.0, 0.1, 0.01], [1.0, 0.2, None]],
    "backward": [[1.0, 0.5], [1.0, 0.3]],
    "forward_tolerance": 1e-2,
    "backward_tolerance": None,
}


def write(folder: Path, *records: object, tail: str = "") -> None:
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, tail]), encoding="utf-8")


def full_run(num_steps: int = 20) -> list[dict[str, Any]]:
    steps = [
        train_record(s, 1 + 3 / s, "unrolled" if s < num_steps / 2 else "equilibrium")
        for s in range(1, num_steps + 1)
    ]
    valid = {"kind": "valid", "step": num_steps, "loss": 1.5}
    return [*steps, valid, TRACE, {"kind": "summary", "step": num_steps}, {"kind": "of later"}]


def png_size(file: Path) -> tuple[int, int]:
    """Width and height, after every chunk's checksum was found right up to the closing one."""
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    place, kind = 8, b""
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind, end = data[place + 4 : place + 8], place + 8 + length
        assert struct.unpack(">I", data[end : end + 4])[0] == zlib.crc32(data[place + 4 : end])
        place = end + 4
    assert kind == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def texts(figure: Any) -> list[Any]:
    """Everything written in a figure except numbers at ticks."""
    from matplotlib.axis import Tick
    from matplotlib.text import Text

    ticks = {text for tick in figure.findobj(Tick) for text in tick.findobj(Text)}
    return [text for text in figure.findobj(Text) if text not in ticks and text.get_text()]


def said(figure: Any) -> list[str]:
    """What is written in a figure, in lower case and on one line each."""
    return [" ".join(text.get_text().lower().split()) for text in texts(figure)]


def bold(axes: Any) -> list[list[tuple[float, float]]]:
    """Points of the lines that catch the eye: running means, medians."""
    return [
        list(zip(*line.get_data(), strict=True)) for line in axes.lines if line.get_linewidth() >= 2
    ]


def shaded(axes: Any) -> list[tuple[float, float]]:
    return sorted((p.get_x(), p.get_x() + p.get_width()) for p in axes.patches)


def test_a_full_run_gets_three_valid_pictures_of_one_size(tmp_path: Path) -> None:
    write(tmp_path, *full_run())
    drawn = plot_run(tmp_path, {"bigram": 3.2, "five_gram": 1.7})
    assert [file.name for file in drawn] == ALL
    assert {png_size(file) for file in drawn} == {(1200, 750)}
    # nothing temporary stays, and others may read
    assert sorted((tmp_path / "plots").iterdir()) == sorted(drawn)
    assert {file.stat().st_mode & 0o777 for file in drawn} == {0o644}


def test_drawing_again_replaces_the_pictures(tmp_path: Path) -> None:
    write(tmp_path, *full_run())
    before = [file.read_bytes() for file in plot_run(tmp_path)]
    write(tmp_path, *full_run(60))
    assert all(a != b.read_bytes() for a, b in zip(before[:2], plot_run(tmp_path), strict=False))


def test_a_failed_write_leaves_the_old_picture_and_nothing_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, *full_run())
    before = {file: file.read_bytes() for file in plot_run(tmp_path)}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_run(tmp_path)
    assert {file: file.read_bytes() for file in (tmp_path / "plots").iterdir()} == before


@pytest.mark.parametrize("tail", ['{"kind": "train", "st', '{"kind": "valid", "step": 21, "loss"'])
def test_a_line_cut_short_by_a_crash_is_skipped(tmp_path: Path, tail: str) -> None:
    write(tmp_path, *full_run(), tail=tail)
    assert read_metrics(tmp_path) == full_run()
    assert len(plot_run(tmp_path)) == 3


def test_a_crash_in_the_middle_of_a_character_is_tolerated(tmp_path: Path) -> None:
    write(tmp_path, *full_run())
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"kind": "summary", "text": "é'.encode()[:-1])
    assert len(plot_run(tmp_path)) == 3


@pytest.mark.parametrize(
    ("records", "names"),
    [
        ([train_record(1)], ALL[:2]),
        ([TRACE], ALL[2:]),
        ([TRACE | {"backward": []}], ALL[2:]),
        ([TRACE | {"forward": [], "backward": None}], []),
        ([{"kind": "valid", "step": 1, "loss": 2.0}], []),
        ([{"kind": "train", "step": 1, "loss": 2.0}], ALL[:1]),
        ([{"kind": "summary", "step": 1}], []),
    ],
)
def test_a_picture_without_records_is_left_out(
    tmp_path: Path, records: list[object], names: list[str]
) -> None:
    write(tmp_path, *records)
    assert [file.name for file in plot_run(tmp_path)] == names
    assert (tmp_path / "plots").exists() == bool(names)


def test_a_run_of_nothing_but_nan_has_no_loss_to_draw_but_shows_that_it_failed() -> None:
    records = [train_record(s, math.nan) | {"relative_residual": math.nan} for s in range(1, 5)]
    assert draw_loss(records) is None
    figure = draw_solver(records)
    assert figure is not None
    assert shaded(figure.axes[1]) == [(1, 4)]
    assert any("not finite" in text for text in said(figure))


def test_losses_that_are_not_finite_are_gaps_shaded_and_counted() -> None:
    bad = {5: math.nan, 6: math.inf, 19: math.nan, 20: math.nan}
    figure = draw_loss([train_record(s, bad.get(s, 2.0)) for s in range(1, 21)])
    assert figure is not None
    axes = figure.axes[0]
    assert shaded(axes) == [(4, 7), (18, 20)]
    assert any("4 of 20 training losses are not finite" in text for text in said(figure))
    # a gap, not a line across it; and the axis still goes to the last step
    for line in axes.lines[:2]:
        assert [x for x, y in zip(*line.get_data(), strict=True) if math.isnan(y)] == list(bad)
    assert axes.get_xlim()[1] > 20


def test_one_spike_neither_flattens_the_losses_nor_goes_unsaid() -> None:
    records = [train_record(s, 1e6 if s == 50 else 2 + 1 / s) for s in range(1, 101)]
    figure = draw_loss(records)
    assert figure is not None
    assert figure.axes[0].get_ylim()[1] < 4
    assert any("highest loss 1e+06, off the top" in text for text in said(figure))


def test_losses_of_many_sizes_get_a_logarithmic_axis() -> None:
    figure = draw_loss([train_record(s, 10.0 ** (-s / 10)) for s in range(1, 61)])
    assert figure is not None
    assert figure.axes[0].get_yscale() == "log"
    figure = draw_loss(
        [train_record(s, 10.0 ** (-s / 10)) for s in range(1, 61)]
        + [{"kind": "valid", "step": 60, "loss": 3.5e-6}]
    )
    assert "lowest validation loss 3.50e-06 at step 60" in said(figure)
    figure = draw_loss(full_run())
    assert figure is not None
    assert figure.axes[0].get_yscale() == "linear"


def test_an_explicit_model_has_no_picture_of_a_solver(tmp_path: Path) -> None:
    records = [{"kind": "train", "step": s, "phase": "explicit", "loss": 1 / s} for s in (1, 2, 3)]
    write(tmp_path, *records)
    assert [file.name for file in plot_run(tmp_path)] == ["loss.png"]


def test_baselines_are_in_the_units_of_the_axis_and_named() -> None:
    bits = {"five_gram": 2.0, "xz": 2.1, "unigram": 60.0, "broken": math.nan}
    figure = draw_loss(full_run(), bits)
    assert figure is not None
    (heights,) = {
        tuple(sorted(round(c.get_segments()[0][0][1], 6) for c in figure.axes[0].collections))
    }
    assert heights == (round(2 * math.log(2), 6), round(2.1 * math.log(2), 6))
    written = said(figure)
    assert {"5-gram, test", "xz, test"} <= set(written)
    assert not any("unigram" in text or "broken" in text for text in written)
    assert {"loss (nats per token)", "loss (bits per token)"} <= set(written)


def test_the_right_axis_is_the_left_one_in_bits() -> None:
    figure = draw_loss(full_run())
    assert figure is not None
    figure.canvas.draw()
    (left,) = figure.axes
    (right,) = left.child_axes
    assert right.get_ylim() == pytest.approx([nats / math.log(2) for nats in left.get_ylim()])


def test_the_end_of_pretraining_is_named_only_where_there_is_one() -> None:
    name = "end of unrolled pre-training"
    for draw in (draw_loss, draw_solver):
        assert said(draw(full_run())).count(name) == 1
        for phase in ("unrolled", "equilibrium"):
            assert name not in said(draw([train_record(s, phase=phase) for s in (1, 2, 3)]))
    unrolled = said(draw_solver([train_record(s, phase="unrolled") for s in (1, 2)]))
    assert any("all steps unrolled" in text for text in unrolled)


def test_no_line_joins_the_solves_of_the_two_phases() -> None:
    figure = draw_solver(full_run())
    assert figure is not None
    for axes in figure.axes:
        for line in axes.lines:
            steps = line.get_xdata()
            if len(set(steps)) > 1:  # not the border itself
                assert max(steps) < 10 or min(steps) >= 10


def test_the_last_trace_is_shown_and_who_reached_the_tolerance_is_counted() -> None:
    early = TRACE | {"step": 1, "forward": [[1.0, 1.0]]}
    figure = draw_convergence([early, TRACE])
    assert figure is not None
    written = said(figure)
    assert any("step 20" in text for text in written)
    assert "forward: 1 of 2 reach the tolerance" in written
    assert "backward: 2 samples" in written
    assert "tolerance 0.01" in written


def test_residuals_of_zero_and_of_failed_samples_are_drawn(tmp_path: Path) -> None:
    rows = [[1.0, 0.0], [1.0, math.inf], [math.nan], [None], []]
    write(tmp_path, TRACE | {"forward": rows, "backward": [[0.0], [0.0]]})
    assert [file.name for file in plot_run(tmp_path)] == ["convergence.png"]


def median(rows: list[list[float]]) -> list[tuple[float, float]]:
    figure = draw_convergence([TRACE | {"forward": rows}])
    assert figure is not None
    (points,) = bold(figure.axes[0])
    return points


def test_the_median_counts_finished_samples_with_their_last_residual() -> None:
    slow = [1.0, 0.9, 0.8, 0.7, 0.6]
    # two of three have finished after step 2: what comes then would be flat
    assert median([[1.0, 0.3], [1.0, 0.4, 0.1], slow]) == [(0, 1.0), (1, 0.4), (2, 0.3)]
    assert median([slow]) == list(enumerate(slow))


def test_a_sample_that_is_not_finite_counts_as_the_worst() -> None:
    assert median([[1.0, math.nan], [1.0, 0.5], [1.0, 0.1]]) == [(0, 1.0), (1, 0.5)]


def test_the_running_mean_is_a_mean_and_skips_what_is_not_finite() -> None:
    losses = [math.nan if step == 60 else float(step) for step in range(1, 121)]
    figure = draw_loss([train_record(i + 1, loss) for i, loss in enumerate(losses)])
    assert figure is not None
    (means,) = bold(figure.axes[0])
    assert means[29] == (30, 30.0)
    assert means[60] == (61, pytest.approx((58 + 59 + 61 + 62 + 63 + 64) / 6))
    assert math.isnan(means[59][1])
    assert "train, smoothed" in said(figure)


def test_a_step_written_twice_counts_with_its_last_value() -> None:
    figure = draw_loss([train_record(2, 5.0), train_record(1, 3.0), train_record(2, 1.0)])
    assert figure is not None
    assert bold(figure.axes[0]) == [[(1, 3.0), (2, 1.0)]]


@pytest.mark.parametrize("num_steps", [2, 20, 500])
@pytest.mark.parametrize("bits", [2.1, 0.1, 3.9])
def test_no_text_lies_on_another_or_leaves_the_picture(num_steps: int, bits: float) -> None:
    from matplotlib.text import Text

    baselines = {"unigram": 3.9, "bigram": bits + 0.02, "five_gram": bits + 0.01, "xz": bits}
    records = full_run(num_steps)
    records[1] |= {"loss": math.nan, "relative_residual": math.nan}
    for figure in (draw_loss(records, baselines), draw_solver(records), draw_convergence(records)):
        assert figure is not None
        figure.canvas.draw()
        # of the text alone, without its leader
        boxes = [Text.get_window_extent(text) for text in texts(figure) if text.get_visible()]
        for i, box in enumerate(boxes):
            assert 0 <= box.x0 < box.x1 <= 1200
            assert 0 <= box.y0 < box.y1 <= 750
            for other in boxes[:i]:
                width = min(box.x1, other.x1) - max(box.x0, other.x0)
                height = min(box.y1, other.y1) - max(box.y0, other.y0)
                assert width <= 0 or height <= 3, "one text lies on another"


@pytest.mark.parametrize("content", [None, "", "\n\n", '{"kind": "tr', "[1, 2]\n3\n"])
def test_no_metrics_is_an_error_that_says_what_was_given_and_what_to_give(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError) as caught:
        plot_run(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / "metrics.jsonl") in message
    assert "give the folder of a run" in message
    assert not (tmp_path / "plots").exists()


def test_a_place_that_cannot_be_written_to_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, *full_run())
    (tmp_path / "plots").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written .*run folder"):
        plot_run(tmp_path)


def test_importing_loads_no_matplotlib_and_drawing_no_pyplot(tmp_path: Path) -> None:
    write(tmp_path, *full_run())
    script = (
        "import sys, pathlib, equilibria.diagnostics.plots as plots;"
        "assert 'matplotlib' not in sys.modules;"
        "plots.plot_run(pathlib.Path(sys.argv[1]));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=100)
