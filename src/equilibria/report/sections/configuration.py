"""What was configured: between runs only what differs, and all of it folded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from equilibria.report.blocks import Block, Folded, Note, Row, Section, Table
from equilibria.report.runs import Run
from equilibria.report.wording import ABSENT

_MOST_CHARACTERS = 100_000
_LONGEST_VALUE = 500
_MOST_ROWS = 500


def section(runs: Sequence[Run]) -> Section | None:
    """The difference of several configurations, and each in full; None without any."""
    configured = [run for run in runs if run.config]
    if not configured:
        return None
    blocks: list[Block] = []
    if len(configured) > 1:
        blocks.append(_difference(configured))
    blocks += [Folded(f"All options of {run.name.text}", _in_full(run)) for run in configured]
    return Section("Configuration", tuple(blocks))


def _difference(runs: Sequence[Run]) -> Block:
    options = [{"recipe": run.recipe, **dict(flattened(run.config))} for run in runs]
    names = list(dict.fromkeys(name for of_run in options for name in of_run))
    differing = [name for name in names if len({of_run.get(name) for of_run in options}) > 1]
    if not differing:
        return Note("The configurations are the same.")
    more = len(differing) - _MOST_ROWS
    return Table(
        columns=tuple(run.name for run in runs),
        rows=tuple(
            Row(name, tuple(_shortened(of_run.get(name, ABSENT)) for of_run in options))
            for name in differing[:_MOST_ROWS]
        ),
        caption=f"Options that differ; {ABSENT} where a run has no such option"
        + (f" ({more} more left out)" if more > 0 else ""),
        is_code=True,
    )


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Options by dotted name, as on the command line, with their values as text."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(cast(Mapping[str, Any], value), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _written(value)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} …"


def _in_full(run: Run) -> str:
    text = json.dumps(run.config, indent=2, ensure_ascii=False)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}\n…"
