"""Reading run folders for a look, whatever state they are in.

A run may be unfinished, cut short by a crash, or put together by somebody else. What can be read
is kept; what cannot becomes a sentence of `Run.notices`. Nothing here loads a model or data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from equilibria.core.errors import UserError, nearest
from equilibria.diagnostics.record_lines import lines_of
from equilibria.diagnostics.series import (
    Points,
    Record,
    as_number,
    curve,
    end_of_unrolling,
    records_of,
)
from equilibria.report.blocks import RunName
from equilibria.report.measurements import Measurements
from equilibria.report.wording import count, plural
from equilibria.train.files import MAX_JSON, read_bounded

_FILES = ("config.json", "metrics.jsonl", "summary.json")
_DEEPEST = 50
_LARGEST_STEP = 2**53  # beyond it a float cannot tell steps apart


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Args:
        name: number and name on the page.
        path: the folder.
        recipe: what was trained; "" if that is not known.
        config: every option, as nested names; empty if it cannot be read.
        environment: versions, hardware and data.
        summary: final figures; empty before the run finished.
        solves: histograms of the solves, by "training" and "test".
        records: lines of the metrics.
        notices: sentences about what is missing or damaged.
        measurements: of the best checkpoint, where they were asked for.
    """

    name: RunName
    path: Path
    recipe: str = ""
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    environment: Mapping[str, Any] = field(default_factory=dict[str, Any])
    summary: Mapping[str, Any] = field(default_factory=dict[str, Any])
    solves: Mapping[str, Any] = field(default_factory=dict[str, Any])
    records: list[Record] = field(default_factory=list[Record])
    notices: tuple[str, ...] = ()
    measurements: Measurements | None = None

    def curve(self, kind: str, key: str) -> Points:
        """Values of a key over steps."""
        return curve(self.records, kind, key)

    def latest(self, kind: str) -> Record:
        """The last record of a kind; empty if there is none."""
        records = records_of(self.records, kind)
        return max(records, key=lambda record: record["step"]) if records else {}

    @property
    def last_step(self) -> int:
        """The last step that the metrics know of; 0 without any."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def end_of_unrolling(self) -> float | None:
        """Last step of unrolled pre-training, if another phase follows."""
        return end_of_unrolling(self.records)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders in the order given; one that is given twice counts once.

    Raises:
        UserError: none are given, or one of them is no run folder.
    """
    unique = list({path.resolve(): path for path in reversed(folders)}.values())[::-1]
    if not unique:
        raise UserError("report needs at least one run folder: equilibria report RUN [RUN ...]")
    for path in unique:
        _refuse_unless_run(path)
    names = [path.resolve().name for path in unique]
    return [
        _read_run(RunName(i, name if names.count(name) == 1 else str(path)), path)
        for i, (name, path) in enumerate(zip(names, unique, strict=True), start=1)
    ]


def number(values: Mapping[str, Any], *keys: str) -> float | None:
    """A number that may lie deep, None where there is none."""
    return as_number(value_at(values, *keys))


def value_at(values: Mapping[str, Any], *keys: str) -> Any:
    """A value that may lie deep, None where there is none."""
    found: Any = values
    for key in keys:
        if not isinstance(found, Mapping):
            return None
        found = cast(Mapping[str, Any], found).get(key)
    return found


def mapping_at(values: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """Named values that may lie deep, empty where there are none."""
    found = value_at(values, *keys)
    return cast(Mapping[str, Any], found) if isinstance(found, Mapping) else {}


def _refuse_unless_run(path: Path) -> None:
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path} is no folder{nearest(path.name, siblings)}; give a run folder")
    if not any((path / name).is_file() for name in _FILES):
        raise UserError(f"{path} is no run folder: it has none of {', '.join(_FILES)}")


def _read_run(name: RunName, path: Path) -> Run:
    notices: list[str] = []
    saved = _read_object(path / "config.json", notices, "no configuration is shown")
    environment = _read_object(path / "environment.json", notices, "no environment is shown")
    records = _read_records(path / "metrics.jsonl", notices)
    finished = (path / "summary.json").exists()
    summary = (
        _read_object(path / "summary.json", notices, "figures are those of the last records")
        if finished
        else {}
    )
    histograms = path / "solves.json"
    solves = (
        _read_object(histograms, notices, "histograms are those of the metrics")
        if histograms.exists()
        else {}
    )
    recipe = saved.get("recipe")
    run = Run(
        name=name,
        path=path,
        recipe=recipe if isinstance(recipe, str) else "",
        config=mapping_at(saved, "config"),
        environment=environment,
        summary=summary,
        solves=solves,
        records=records,
    )
    if not finished:
        notices.insert(0, _unfinished(run))
    return replace(run, notices=tuple(notices))


def _unfinished(run: Run) -> str:
    if (run.path / "conversion.txt").exists():
        return (
            "The run was converted from a checkpoint of another code base: nothing was trained or "
            "measured here."
        )
    total = number(run.config, "train", "num_steps")
    of = f" of {count(total)}" if total is not None else ""
    return (
        f"The run has not finished (it has no summary.json): its records reach step "
        f"{count(run.last_step)}{of}, and figures are those of the last records."
    )


def _read_object(file: Path, notices: list[str], consequence: str) -> dict[str, Any]:
    """A JSON object; empty, with a notice, where there is none."""
    try:
        text = read_bounded(file, MAX_JSON) if file.is_file() else None
        value = None if text is None else json.loads(text.decode(errors="replace"))
    except OSError as error:
        notices.append(f"{file.name} cannot be read ({error.strerror}): {consequence}.")
        return {}
    except (ValueError, RecursionError):
        notices.append(f"{file.name} is damaged, it is no JSON: {consequence}.")
        return {}
    if text is None:
        notices.append(f"{file.name} is missing: {consequence}.")
    elif not isinstance(value, dict):
        notices.append(f"{file.name} holds no named values: {consequence}.")
    elif _is_deep(value):
        notices.append(f"{file.name} is nested too deeply to show: {consequence}.")
    else:
        return cast(dict[str, Any], value)
    return {}


def _is_deep(value: Any) -> bool:
    """Whether a value is nested deeper than anything we write."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(cast(dict[str, Any], value).values())
    return cast(list[Any], value) if isinstance(value, list) else []


def _read_records(file: Path, notices: list[str]) -> list[Record]:
    """Whole lines of the metrics, with a notice about others."""
    if not file.is_file():
        notices.append(f"{file.name} is missing: there are no curves.")
        return []
    records: list[Record] = []
    num_lines = 0
    try:
        for line in lines_of(file):
            num_lines += 1
            record = _record(line)
            if record is not None:
                records.append(record)
    except OSError as error:
        notices.append(f"{file.name} cannot be read to its end ({error.strerror}).")
        if not num_lines:
            return []
    num_damaged = num_lines - len(records)
    if num_damaged:
        are = "is no record" if num_damaged == 1 else "are no records"
        notices.append(
            f"{plural(num_damaged, 'line')} of {count(num_lines)} in {file.name} {are}, as after a "
            "crash, and left out."
        )
    elif not records:
        notices.append(f"{file.name} is empty: there are no curves.")
    return records


def _record(line: str) -> Record | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        return None
    step = value.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= _LARGEST_STEP:
        return None
    return value
