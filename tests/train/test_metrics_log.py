"""Metrics, as JSON lines and as TensorBoard events."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_events_go_on_after_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's writer is dead from its first failure on, so there has to be another."""
    run = RunFolder(tmp_path)
    record = {"kind": "train", "loss": 1.0}
    with MetricsLog(run, 0) as log:
        log.write({**record, "step": 1})
        time.sleep(1.1)  # see below
        with monkeypatch.context() as patch:
            patch.setattr(RecordWriter, "write", _no_space)
            for step in range(2, 400):
                try:
                    log.write({**record, "step": step})
                except OSError:
                    break
                time.sleep(0.01)  # its thread notices first
            else:
                pytest.fail("nothing was said")
        log.write({**record, "step": 400})
        log.write({**record, "step": 401})
    assert [step for step, _ in _events(run, "train/loss")][-2:] == [400, 401]
    assert [r["step"] for r in run.metrics()] == [*range(1, step + 1), 400, 401]


def test_a_disk_that_is_full_at_the_end_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MetricsLog(RunFolder(tmp_path), 0)
    log.write({"kind": "train", "step": 1, "loss": 1.0})
    monkeypatch.setattr(RecordWriter, "flush", _no_space)
    with pytest.warns(RuntimeWarning, match=r"last TensorBoard.*No space.*metrics\.jsonl has"):
        log.__exit__()


def _no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
