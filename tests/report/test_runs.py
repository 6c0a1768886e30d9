"""Runs that are unfinished, damaged or none: a sentence for each, and the rest is shown."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from equilibria.core.errors import UserError
from equilibria.report.runs import read_runs


def test_an_unfinished_run(make_run: Any, page_of: Any) -> None:
    page = page_of(make_run(summary=None, solves=None))
    (notice,) = page.notices
    assert "has not finished" in notice
    assert "step 100 of 100" in notice
    text = page.parsed.text
    assert "unfinished (step 100 of 100)" in text
    assert "NFE, validation 9.0 last record" in text
    assert "Training time 50 s" in text
    titles = ["Figures", "Learning", "Solves", "Traces", "Configuration", "Environment"]
    assert page.titles == titles


def test_a_run_that_has_just_begun(make_run: Any, page_of: Any) -> None:
    page = page_of(make_run(metrics=[], summary=None, solves=None))
    assert page.notices == [
        "The run has not finished (it has no summary.json): its records reach step 0 of 100, and "
        "figures are those of the last records.",
        "metrics.jsonl is empty: there are no curves.",
    ]
    assert page.titles == ["Figures", "Configuration", "Environment"]


def test_a_line_that_a_crash_cut_short(make_run: Any, page_of: Any) -> None:
    folder = make_run()
    file = folder / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + b'{"kind": "train", "step": 102, "loss": 0.\xc3')
    page = page_of(folder)
    assert page.notices == [
        "1 line of 57 in metrics.jsonl is no record, as after a crash, and left out."
    ]
    assert "Loss (nats)" in page.chart_titles


@pytest.mark.parametrize(
    "line",
    [
        b"\x00\xff\xfe",
        b"[1, 2]",
        b"7",
        b'{"kind": "train"}',
        b'{"kind": 3, "step": 4}',
        b'{"kind": "train", "step": true, "loss": 1}',
        b'{"kind": "train", "step": -1, "loss": 1}',
        b'{"kind": "train", "step": 1e3, "loss": 1}',
        b'{"kind": "train", "step": 1' + b"0" * 400 + b', "loss": 1}',
        b'{"kind": "train", "step": 1' + b"0" * 9000 + b', "loss": 1}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_lines_that_are_no_records(make_run: Any, page_of: Any, line: bytes) -> None:
    folder = make_run()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    assert "1 line of 57" in page_of(folder).notices[0]


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), "text", None, [1], {"a": 1}, True, 10**400, -1.0, 0]
)
@pytest.mark.parametrize(
    "key",
    [
        "loss",
        "learning_rate",
        "gradient_norm",
        "num_evals",
        "relative_residual",
        "seconds",
        "phase",
    ],
)
def test_values_of_every_kind(make_run: Any, page_of: Any, key: str, value: Any) -> None:
    lines = [
        {"kind": "train", "step": s, "loss": 1.0, "num_evals": 3.0, key: value if s % 2 else 0.5}
        for s in range(1, 60)
    ]
    page = page_of(make_run(metrics=lines, solves=None))
    assert "Loss (nats)" in page.chart_titles


def test_values_that_are_not_finite_are_counted(make_run: Any, page_of: Any) -> None:
    lines = [
        {"kind": "valid", "step": s, "loss": float("nan") if s > 7 else 2.0} for s in range(10)
    ]
    assert "2 values not finite" in page_of(make_run(metrics=lines)).parsed.text


@pytest.mark.parametrize("file", ["config.json", "environment.json", "summary.json", "solves.json"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "is damaged, it is no JSON"),
        ("", "is damaged, it is no JSON"),
        ("[1]", "holds no named values"),
        ("[" * 100_000, "is damaged, it is no JSON"),
        ('{"a":' * 200 + "1" + "}" * 200, "is nested too deeply to show"),
    ],
)
def test_damaged_files(make_run: Any, page_of: Any, file: str, content: str, what: str) -> None:
    folder = make_run()
    (folder / file).write_text(content)
    page = page_of(folder)
    (notice,) = [notice for notice in page.notices if file in notice]
    assert notice.startswith(f"{file} {what}: ")
    assert "Loss (nats)" in page.chart_titles


@pytest.mark.parametrize("file", ["config.json", "environment.json", "metrics.jsonl"])
def test_missing_files(make_run: Any, page_of: Any, file: str) -> None:
    folder = make_run()
    (folder / file).unlink()
    page = page_of(folder)
    assert [notice for notice in page.notices if notice.startswith(f"{file} is missing: ")]
    assert "Figures" in page.titles


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl", "solves.json"])
def test_a_pipe_is_not_waited_for(make_run: Any, page_of: Any, file: str) -> None:
    folder = make_run()
    (folder / file).unlink()
    os.mkfifo(folder / file)
    assert any(file in notice for notice in page_of(folder).notices)


@pytest.mark.parametrize("value", [None, 3, "text", [], [[]], {"mean": "x"}, {"mean": [1]}])
def test_a_summary_of_other_types(make_run: Any, page_of: Any, value: Any) -> None:
    keys = ("test_loss", "sample", "training_solves", "training_time", "baseline_losses", "step")
    page = page_of(make_run(summary=dict.fromkeys(keys, value)))
    assert "Figures" in page.titles


@pytest.mark.parametrize(
    "histogram",
    [
        None,
        [],
        {"values": [1, 2], "samples": [1]},
        {"values": [1, 10**9], "samples": [1, 1], "bins": [1, 10**9], "bins_per_decade": 8},
        {"values": ["a"], "samples": [1], "bins": [5000], "bins_per_decade": 1e9},
        {"values": [True], "samples": [1], "bins": [9999], "bins_per_decade": 8},
        {"values": [10**400], "samples": [10**400], "bins": [0], "bins_per_decade": 0},
        {"values": [1], "samples": [0], "bins": [1], "bins_per_decade": float("nan")},
    ],
)
def test_histograms_that_make_no_sense(make_run: Any, page_of: Any, histogram: Any) -> None:
    solves = {"test": {"num_evals": histogram, "relative_residual": histogram}}
    page = page_of(make_run(solves=solves))
    assert "NFE, forward" in page.chart_titles


@pytest.mark.parametrize(
    "rows", [None, 3, [], [[]], [3], [["a", None]], [[float("nan")]], [[10**400]], [[0.0, -1.0]]]
)
def test_traces_that_make_no_sense(make_run: Any, page_of: Any, rows: Any) -> None:
    trace = {"kind": "trace", "step": 9, "forward": rows, "backward": [[1.0, 0.1]]}
    page = page_of(make_run(metrics=[trace]))
    assert "Backward solves" in page.chart_titles


def test_a_folder_that_is_no_run(tmp_path: Path, make_run: Any) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="empty is no run folder: it has none of config.json"):
        read_runs([make_run(), tmp_path / "empty"])
    with pytest.raises(UserError, match="a-rum is no folder; did you mean 'a-run'?"):
        read_runs([tmp_path / "runs" / "a-rum"])
    with pytest.raises(UserError, match="at least one run folder"):
        read_runs([])


def test_a_run_is_left_as_it_is(make_run: Any, page_of: Any) -> None:
    folder = make_run()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    page_of(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert json.loads(before["summary.json"])


def test_files_of_any_size(make_run: Any, page_of: Any) -> None:
    """Sparse ones, which cost the disk nothing and the memory all of it."""
    folder = make_run()
    os.truncate(folder / "metrics.jsonl", 2**33)
    os.truncate(folder / "environment.json", 2**33)
    notices = " ".join(page_of(folder).notices)
    assert "metrics.jsonl cannot be read to its end (it has more than 4,294,967,296" in notices
    assert "is empty" not in notices
    assert "environment.json cannot be read (it has more than 16,777,216 bytes)" in notices
