"""Run folders: never overwritten, recognised, and cut back cleanly."""

from __future__ import annotations

import json
import os
import resource
import signal
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from equilibria import UserError
from equilibria.train import run_folder
from equilibria.train.config_file import from_json
from equilibria.train.experiment import Experiment
from equilibria.train.run_folder import RunFolder


def test_every_run_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "20260102-030405")
    runs = [RunFolder.create(tmp_path / "a" / "b", "tiny") for _ in range(3)]
    assert [run.path.name for run in runs] == [
        "tiny-20260102-030405",
        "tiny-20260102-030405-1",
        "tiny-20260102-030405-2",
    ]
    assert all(run.path.is_dir() for run in runs)


def test_an_existing_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "now")
    (tmp_path / "tiny-now").write_text("a file of that name")
    assert RunFolder.create(tmp_path, "tiny").path.name == "tiny-now-1"
    assert (tmp_path / "tiny-now").read_text() == "a file of that name"


def test_a_place_that_cannot_hold_runs_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match="cannot be made .*choose another place with --train.folder"
    ):
        RunFolder.create(tmp_path / "file", "tiny")
    with pytest.raises(UserError, match="cannot be made"):
        RunFolder.create(tmp_path / ("x" * 300), "tiny")


def test_opening_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "tiny-1").mkdir()
    with pytest.raises(UserError, match=r"tiny-2 is no folder; did you mean 'tiny-1'\?"):
        RunFolder.open(tmp_path / "tiny-2")
    with pytest.raises(UserError, match="is no folder; give a run folder"):
        RunFolder.open(tmp_path / "nowhere" / "run")
    with pytest.raises(UserError, match="is no run folder: it has no config.json"):
        RunFolder.open(tmp_path / "tiny-1")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is no folder"):
        RunFolder.open(tmp_path / "file")


def test_the_configuration_can_be_run_again(tmp_path: Path, experiment: Experiment) -> None:
    run = RunFolder.create(tmp_path, "tiny")
    run.write_config("tiny", experiment)
    stored = RunFolder.open(run.path).read_json("config.json")
    assert stored["recipe"] == "tiny"
    assert from_json(experiment, stored["config"]) == experiment


def test_a_missing_file_of_a_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"environment\.json is missing; the run folder is incompl"):
        RunFolder(tmp_path).read_json("environment.json")


RECORDS: list[dict[str, Any]] = [
    {"kind": "train", "step": 5, "loss": 1.5},
    {"kind": "valid", "step": 5, "loss": 1.0 / 3.0},
    {"kind": "train", "step": 10, "loss": float("inf"), "text": "naïve"},
    {"kind": "train", "step": 15, "loss": None},
]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    for record in RECORDS:
        run.append_metrics(record)
    return run


def test_metrics_come_back(run: RunFolder) -> None:
    assert list(run.metrics()) == RECORDS
    assert list(RunFolder(run.path / "nowhere").metrics()) == []


@pytest.mark.parametrize("step", [0, 5, 9, 10, 15, 99])
def test_rewinding_keeps_what_was_before(run: RunFolder, step: int) -> None:
    lines = run.metrics_file.read_text(encoding="utf-8").splitlines()
    run.rewind_metrics(step)
    kept = run.metrics_file.read_text(encoding="utf-8").splitlines()
    assert kept == [line for line in lines if json.loads(line)["step"] <= step]


def test_rewinding_drops_the_trace_which_the_end_writes_again(run: RunFolder) -> None:
    run.append_metrics({"kind": "trace", "step": 15, "forward": []})
    run.rewind_metrics(15)
    assert list(run.metrics()) == RECORDS


def test_a_full_disk_leaves_no_half_line(run: RunFolder) -> None:
    limit = run.metrics_file.stat().st_size + 20
    record = {"kind": "train", "step": 20, "text": "longer than there is room for"}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(OSError, match="No space left|File too large"):
            run.append_metrics(record)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    run.append_metrics(record)
    assert list(run.metrics()) == [*RECORDS, record]


def test_a_line_cut_short_by_a_crash_is_dropped(run: RunFolder) -> None:
    with run.metrics_file.open("a") as file:
        file.write('{"kind": "train", "step": 20, "lo')
    assert list(run.metrics()) == RECORDS
    run.rewind_metrics(99)
    run.append_metrics({"kind": "train", "step": 20})
    assert list(run.metrics()) == [*RECORDS, {"kind": "train", "step": 20}]


@pytest.mark.parametrize("line", ["3", "[]", '{"kind": "note"}', '{"step": "x"}', "", "\0\0"])
def test_lines_that_are_no_records_are_dropped(run: RunFolder, line: str) -> None:
    with run.metrics_file.open("a") as file:
        file.write(line + "\n")
    run.rewind_metrics(99)
    assert list(run.metrics()) == RECORDS


def test_what_a_killed_process_left_is_removed_and_nothing_else(run: RunFolder) -> None:
    run.checkpoints.folder.mkdir()
    left = [
        run.path / ".metrics.jsonl.x1_y2z3w",
        run.path / ".summary.json.abcdefgh",
        run.checkpoints.folder / ".best.json.abcdefgh",
        run.checkpoints.folder / ".writing-00000003" / "model.safetensors",
    ]
    others = [run.path / ".notes", run.path / ".metrics.jsonl.mine", run.path / "plot.png"]
    for file in (*left, *others):
        file.parent.mkdir(exist_ok=True)
        file.write_text("?")
    run.remove_leftovers()
    assert not any(file.exists() for file in left)
    assert all(file.exists() for file in others)


def test_a_folder_is_locked_once(run: RunFolder, experiment: Experiment) -> None:
    run.write_config("tiny", experiment)
    refused = pytest.raises(UserError, match="another process is training in")
    with run.lock(), refused, run.lock():
        pass
    with run.lock():
        pass


def test_metrics_of_any_size(tmp_path: Path) -> None:
    """A line that is longer than any record is none; a file of such a size is a sentence."""
    run = RunFolder(tmp_path)
    run.append_metrics({"kind": "train", "step": 1})
    with run.metrics_file.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.truncate(2**28)  # without a line feed, and without a block on the disk
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"kind": "train", "step": 2}\n')
    tracemalloc.start()
    assert [record["step"] for record in run.metrics()] == [1, 2]
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()
    os.truncate(run.metrics_file, 2**33)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read \(.*move it away"):
        run.rewind_metrics(1)
