import json
import math
import struct
from pathlib import Path

import pytest

from equilibria.core.errors import UserError
from equilibria.diagnostics.plots import plot_run, read_metrics


def train_record(step: int, loss: float = 2.0, phase: str = "equilibrium") -> dict[str, object]:
    return {
        "kind": "train",
        "step": step,
        "phase": phase,
        "loss": loss,
        "num_evals": 12.0,
        "relative_residual": 1e-3,
        "backward_num_evals": None if phase == "unrolled" else 10.0,
        "backward_relative_residual": None if phase == "unrolled" else 1e-3,
    }


TRACE = {
    "kind": "trace",
    "step": 20,
    "forward": [[1.0, 0.1, 0.01], [1.0, 0.2, None]],
    "backward": [[1.0, 0.5], [1.0, 0.3]],
    "forward_tolerance": 1e-2,
    "backward_tolerance": None,
}


def write(folder: Path, *records: object, tail: str = "") -> None:
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, tail]))


def full_run() -> list[dict[str, object]]:
    steps = [
        train_record(s, 3.0 / s, "unrolled" if s < 10 else "equilibrium") for s in range(1, 21)
    ]
    return [*steps, {"kind": "valid", "step": 20, "loss": 1.0}, TRACE, {"kind": "unknown"}]


def png_size(file: Path) -> tuple[int, int]:
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_a_full_run_gets_three_pictures_of_one_size(tmp_path: Path) -> None:
    write(tmp_path, *full_run())
    drawn = plot_run(tmp_path, {"bigram": 3.2, "five_gram": 1.7})
    assert [file.name for file in drawn] == ["loss.png", "solver.png", "convergence.png"]
    assert {png_size(file) for file in drawn} == {(1200, 750)}
    assert sorted(f.name for f in (tmp_path / "plots").iterdir()) == sorted(f.name for f in drawn)


def test_a_line_cut_short_by_a_crash_is_skipped(tmp_path: Path) -> None:
    write(tmp_path, *full_run(), tail='{"kind": "train", "st')
    assert len(read_metrics(tmp_path)) == len(full_run())
    assert len(plot_run(tmp_path)) == 3


@pytest.mark.parametrize(
    ("records", "names"),
    [
        ([train_record(1)], ["loss.png", "solver.png"]),
        ([TRACE], ["convergence.png"]),
        ([TRACE | {"backward": []}], ["convergence.png"]),
        ([{"kind": "valid", "step": 1, "loss": 2.0}], []),
        ([train_record(1, math.nan), train_record(2, 2.0)], ["loss.png", "solver.png"]),
        ([train_record(s, phase="unrolled") for s in (1, 2)], ["loss.png", "solver.png"]),
    ],
)
def test_a_picture_without_records_is_left_out(
    tmp_path: Path, records: list[object], names: list[str]
) -> None:
    write(tmp_path, *records)
    assert [file.name for file in plot_run(tmp_path)] == names


def test_no_metrics_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder of a run"):
        plot_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="folder of a run"):
        plot_run(tmp_path)
