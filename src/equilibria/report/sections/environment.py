"""What the runs ran on, and which data they read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from equilibria.report.blocks import Row, Section, Table
from equilibria.report.runs import Run
from equilibria.report.wording import ABSENT

_LONGEST_VALUE = 200
_MOST_ROWS = 200


def section(runs: Sequence[Run]) -> Section | None:
    """A row per fact, a column per run; None where no run recorded any."""
    recorded = [run for run in runs if run.environment]
    if not recorded:
        return None
    facts = [dict(_facts(run.environment)) for run in recorded]
    names = list(dict.fromkeys(name for of_run in facts for name in of_run))
    rows = (
        Row(name, tuple(of_run.get(name, ABSENT)[:_LONGEST_VALUE] for of_run in facts))
        for name in names[:_MOST_ROWS]
    )
    return Section("Environment", (Table(tuple(run.name for run in recorded), tuple(rows)),))


def _facts(values: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        words = name.replace("_", " ")
        if isinstance(value, Mapping):
            # versions speak for themselves
            inner = "" if name == "packages" else f"{group}{words}: "
            yield from _facts(cast(Mapping[str, Any], value), inner)
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{group}{words}", text
