"""Metrics, as JSON lines and as TensorBoard events."""

from __future__ import annotations

import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from equilibria.train.metrics_log import MetricsLog
from equilibria.train.run_folder import RunFolder


def _events(run: RunFolder, tag: str) -> list[tuple[int, float]]:
    reader = EventAccumulator(str(run.path / "tensorboard"))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def test_lines_and_events_say_the_same(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    record = {"kind": "train", "step": 5, "loss": 1.5, "phase": "unrolled", "backward": None}
    with MetricsLog(run, 0) as log:
        log.write(record)
        log.write({**record, "step": 10, "loss": 1.25})
    assert [r["loss"] for r in run.metrics()] == [1.5, 1.25]
    assert next(run.metrics()) == record
    assert _events(run, "train/loss") == [(5, 1.5), (10, 1.25)]
    reader = EventAccumulator(str(run.path / "tensorboard"))
    reader.Reload()
    assert reader.Tags()["scalars"] == ["train/loss"]


def test_events_after_the_place_of_resuming_are_replaced(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with MetricsLog(run, 0) as log:
        for step in (5, 10, 15):
            log.write({"kind": "train", "step": step, "loss": float(step)})
    # TensorBoard reads files by the second in their names, and within one second of one process by
    # a counter as text, in which "10" comes before "9".
    time.sleep(1.1)
    with MetricsLog(run, 10) as log:
        log.write({"kind": "train", "step": 15, "loss": 99.0})
    assert _events(run, "train/loss") == [(5, 5.0), (10, 10.0), (15, 99.0)]
