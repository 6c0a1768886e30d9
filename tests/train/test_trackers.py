"""Metrics that also go to experiment trackers: the real ones, offline, and one that fails."""

from __future__ import annotations

import json
import math
import re
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from equilibria import UserError
from equilibria.train import trackers
from equilibria.train.run_folder import RunFolder
from equilibria.train.trackers import Trackers, check_trackers

RECORDS: list[dict[str, Any]] = [
    {"kind": "train", "step": 5, "loss": 1.5, "phase": "unrolled", "backward_num_evals": None},
    {"kind": "train", "step": 10, "loss": math.nan},
    {"kind": "valid", "step": 10, "loss": 1.25},
]
SUMMARY = {"kind": "summary", "step": 10, "test_loss": 1.125, "training_time": {"rest": 2.0}}


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No account, no network, nothing in the home of whoever runs the tests."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create_named(tmp_path / "tiny-20261125-120000")


class Recorder:
    """Keeps what it gets, and fails when it is told to."""

    def __init__(self, *about: Any) -> None:
        self.about, self.broken = about, False
        self.records: list[tuple[int, Mapping[str, float]]] = []
        self.end: tuple[int, Mapping[str, float]] | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.broken:
            raise ConnectionError("the network is away\nand more lines")
        self.records.append((step, values))

    def finish(self, code: int, summary: Mapping[str, float]) -> None:
        self.end = (code, summary)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Instead of wandb: all that were started."""
    started: list[Recorder] = []

    def start(*about: Any) -> Recorder:
        started.append(Recorder(*about))
        return started[-1]

    monkeypatch.setitem(trackers.TRACKERS, "wandb", start)
    return started


def track(run: RunFolder, *names: str, **config: Any) -> Trackers:
    return Trackers.start(names, "equilibria", run, config)


def test_numbers_go_there_by_kind(run: RunFolder, recorder: list[Recorder]) -> None:
    with track(run, "wandb", seed=3) as tracked:
        for record in RECORDS:
            tracked.log(record)
        tracked.summarise(SUMMARY)
    (one,) = recorder
    assert [step for step, _ in one.records] == [5, 10, 10]
    assert one.records[0][1] == {"train/loss": 1.5}
    assert math.isnan(one.records[1][1]["train/loss"])
    assert one.end == (0, {"summary/test_loss": 1.125, "summary/training_time/rest": 2.0})
    project, folder, identity, config, resumed = one.about
    assert (project, folder, config, resumed) == ("equilibria", run, {"seed": 3}, False)
    assert run.read_json("trackers.json") == {"wandb": identity}


def test_a_resumed_run_is_the_same_there(run: RunFolder, recorder: list[Recorder]) -> None:
    for _ in range(2):
        with track(run, "wandb"):
            pass
    first, second = (one.about for one in recorder)
    assert first[2] == second[2]
    assert (first[4], second[4]) == (False, True)


def test_a_record_that_is_not_taken_costs_no_run(run: RunFolder, recorder: list[Recorder]) -> None:
    """It is said once; later ones are tried again."""
    with track(run, "wandb") as tracked:
        recorder[0].broken = True
        tracked.log(RECORDS[0])
        (complaint,) = tracked.told()
        assert "wandb did not take a record (the network is away)" in complaint
        tracked.log(RECORDS[1])
        recorder[0].broken = False
        tracked.log(RECORDS[2])
        assert tracked.told() == []
    assert [step for step, _ in recorder[0].records] == [10]


@pytest.mark.parametrize("code", [0, 143])
def test_the_end_is_told(run: RunFolder, recorder: list[Recorder], code: int) -> None:
    with track(run, "wandb") as tracked:
        tracked.exit_code = code
    assert recorder[0].end == (code, {})


def test_an_error_is_told(run: RunFolder, recorder: list[Recorder]) -> None:
    with pytest.raises(ZeroDivisionError), track(run, "wandb"):
        raise ZeroDivisionError
    assert recorder[0].end == (1, {})


def test_a_tracker_that_cannot_begin_stops_a_new_run_only(
    run: RunFolder, recorder: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("no account")

    with monkeypatch.context() as patch:
        patch.setitem(trackers.TRACKERS, "wandb", refuse)
        with pytest.raises(UserError, match=r"wandb could not begin \(no account\); log in"):
            track(run, "wandb")
    with track(run, "wandb"):
        pass
    monkeypatch.setitem(trackers.TRACKERS, "wandb", refuse)
    with track(run, "wandb") as tracked:
        tracked.log(RECORDS[0])
        assert tracked.told() == ["wandb could not go on (no account) and gets no records"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read"),
        ("[]", "holds other things"),
        ('{"wandb": 7}', "holds other things"),
        ('{"wandb": "../../etc"}', "holds other things"),
        (None, "cannot be read .*directory"),
    ],
)
def test_a_damaged_identity_costs_records_and_no_run(
    run: RunFolder, recorder: list[Recorder], content: str | None, reason: str
) -> None:
    """The run goes on under a new one; also where the tracker itself cannot begin."""
    file = run.path / "trackers.json"
    if content is None:
        file.mkdir()
    else:
        file.write_text(content)
    with track(run, "wandb") as tracked:
        tracked.log(RECORDS[0])
        complaints = tracked.told()
    assert re.search(rf"trackers\.json {reason}.*; it goes on as a new run", complaints[0])
    assert len(recorder[0].records) == 1
    if content is None:
        assert "trackers.json could not be written" in complaints[1]
    else:
        assert re.fullmatch("[0-9a-f]{8}", run.read_json("trackers.json")["wandb"])


def test_unknown_and_missing_trackers_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no tracker 'wanb'.*wandb"):
        check_trackers(["wanb"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'equilibria\[trackio\]'"):
        check_trackers(["trackio"])


def test_weights_and_biases_offline(run: RunFolder) -> None:
    """The real one: a run and its continuation, from a checkpoint before the last record."""
    pytest.importorskip("wandb")
    for steps in ((5, 10), (10, 15)):
        with track(run, "wandb", model={"width": 8}) as tracked:
            for step in steps:
                tracked.log({"kind": "train", "step": step, "loss": 1.0 / step})
            tracked.summarise(SUMMARY)
        assert tracked.told() == []
    identity = run.read_json("trackers.json")["wandb"]
    written = sorted(run.path.glob(f"wandb/offline-run-*/run-{identity}.wandb"))
    content = b"".join(file.read_bytes() for file in written)
    assert written
    assert all(word in content for word in (b"train/loss", b"summary/test_loss", b"width"))


def test_trackio_on_this_machine(run: RunFolder, tmp_path: Path) -> None:
    """The real one; what is not finite stays that."""
    pytest.importorskip("trackio")
    for records in (RECORDS, [{"kind": "train", "step": 15, "loss": math.inf}]):
        with track(run, "trackio", model={"width": 8}) as tracked:
            for record in records:
                tracked.log(record)
        assert tracked.told() == []
    with sqlite3.connect(tmp_path / "trackio" / "equilibria.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id")
        found = [(name, step, json.loads(values)) for name, step, values in rows]
    assert {name for name, *_ in found} == {
        f"{run.path.name}-{run.read_json('trackers.json')['trackio']}"
    }
    assert [(step, values) for _, step, values in found] == [
        (5, {"train/loss": 1.5}),
        (10, {"train/loss": "NaN"}),
        (10, {"valid/loss": 1.25}),
        (15, {"train/loss": "Infinity"}),
    ]
