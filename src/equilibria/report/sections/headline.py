"""The figures that a run is judged by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from equilibria.diagnostics.series import finite_values
from equilibria.report import wording
from equilibria.report.blocks import Block, Note, Row, Section, Table, Tile, Tiles
from equilibria.report.runs import Run, mapping_at, number

_MOST_OTHER = 12
"""Other scores and baselines that are shown; a task of ours has fewer."""


_ORDER = (
    "Recipe",
    "State",
    "Test",
    "Baseline",
    "Best validation",
    "NFE, test",
    "NFE, validation",
    "NFE",
    "Relative residual, test",
    "Relative residual, validation",
    "Relative residual",
)


@dataclass(frozen=True)
class Figure:
    """A figure of one run."""

    label: str
    value: str
    note: str = ""


def section(runs: Sequence[Run]) -> Section:
    """Tiles for one run, a table for several, and what is missing."""
    figures = [list(_figures(run)) for run in runs]
    blocks: list[Block] = [
        Note(notice, run.name if len(runs) > 1 else None) for run in runs for notice in run.notices
    ]
    if len(runs) > 1:
        return Section("Figures", (*blocks, _table(runs, figures)))
    recipe, state, *rest = figures[0]
    tiles = [Tile(figure.label, figure.value, figure.note) for figure in rest]
    intro = f"Recipe {recipe.value}, {state.value} ({state.note})."
    return Section("Figures", (*blocks, Tiles(tuple(tiles))), intro)


def _table(runs: Sequence[Run], figures: Sequence[Sequence[Figure]]) -> Table:
    by_label = [{figure.label: figure for figure in of_run} for of_run in figures]
    labels = dict.fromkeys(figure.label for of_run in figures for figure in of_run)
    return Table(
        columns=tuple(run.name for run in runs),
        rows=tuple(
            Row(label, tuple(_cell(found.get(label)) for found in by_label))
            for label in sorted(labels, key=_place)
        ),
    )


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return wording.ABSENT
    return f"{figure.value} ({figure.note})" if figure.note else figure.value


def _place(label: str) -> int:
    """What it is, its scores, its solves, its costs: in this order whatever a run lacks."""
    return next((i for i, start in enumerate(_ORDER) if label.startswith(start)), len(_ORDER))


def _figures(run: Run) -> Iterator[Figure]:
    yield Figure("Recipe", run.recipe or "unknown")
    yield _state(run)
    yield from _scores(run)
    yield from _baselines(run)
    yield from _validation(run)
    yield from _solve_figures(run)
    yield from _costs(run)


def _state(run: Run) -> Figure:
    total = number(run.config, "train", "num_steps")
    of = f" of {wording.count(total)}" if total is not None else ""
    if number(run.summary, "step") is not None:
        return Figure("State", "finished", f"{wording.count(_steps(run))} steps")
    return Figure("State", "unfinished", f"step {wording.count(run.last_step)}{of}")


def _steps(run: Run) -> float:
    step = number(run.summary, "step")
    return run.last_step if step is None else step


def _scores(run: Run) -> Iterator[Figure]:
    """Whatever of the test split the summary has, in words."""
    found = {
        name.removeprefix("test_").replace("_", " "): value
        for name in list(run.summary)[:100]
        if name.startswith("test_") and (value := number(run.summary, name)) is not None
    }
    loss = found.pop("loss", None)
    for name, value in list(found.items())[:_MOST_OTHER]:
        yield Figure(f"Test {name}", wording.score(value))
    if loss is not None:
        yield Figure("Test loss", wording.score(loss), "nats")


def _baselines(run: Run) -> Iterator[Figure]:
    for key, unit in (
        ("baseline_bits_per_character", "bits per character"),
        ("baseline_bits_per_token", "bits per token"),
        ("baseline_losses", "nats"),
    ):
        values = mapping_at(run.summary, key)
        for name in list(values)[:_MOST_OTHER]:
            if (value := number(values, name)) is not None:
                yield Figure(f"Baseline {name.replace('_', ' ')}", wording.score(value), unit)


def _validation(run: Run) -> Iterator[Figure]:
    finite = [(y, x) for x, y in run.curve("valid", "loss") if math.isfinite(y)]
    if finite:
        loss, step = min(finite)
        yield Figure("Best validation loss", wording.score(loss), f"step {wording.count(step)}")


def _solves(run: Run, kind: str, key: str, show: Callable[[float], str]) -> Figure | None:
    """Of the summary; of an unfinished run, what its last record says."""
    words = "NFE" if key == "num_evals" else "Relative residual"
    mean, p95 = (number(run.summary, f"{kind}_solves", key, n) for n in ("mean", "p95"))
    if mean is not None:
        note = "" if p95 is None else f"95th percentile {show(p95)}"
        return Figure(f"{words}, {kind}", show(mean), note)
    split, record = ("training", "train") if kind == "training" else ("validation", "valid")
    latest = number(run.latest(record), key)
    if latest is None or run.summary:
        return None
    return Figure(f"{words}, {split}", show(latest), "last record")


def _solve_figures(run: Run) -> Iterator[Figure]:
    for key, show in (("num_evals", wording.decimals), ("relative_residual", wording.residual)):
        for kind in ("test", "training"):
            if found := _solves(run, kind, key, show):
                yield found
        backward = number(run.latest("train"), f"backward_{key}")
        if backward is not None:
            words = "NFE" if key == "num_evals" else "Relative residual"
            yield Figure(f"{words}, backward", show(backward), "last record")


def _costs(run: Run) -> Iterator[Figure]:
    seconds = number(run.summary, "training_time", "total_seconds")
    if seconds is None:
        found = finite_values(run.curve("train", "seconds"))
        seconds = sum(found) if found else None
    if seconds is not None:
        yield Figure("Training time", wording.duration(seconds))
    if speeds := sorted(finite_values(run.curve("train", "tokens_per_second"))):
        yield Figure("Speed", wording.count(speeds[len(speeds) // 2]), "tokens/s, median")
    if (parameters := number(run.summary, "num_parameters")) is not None:
        yield Figure("Parameters", wording.count(parameters))
    if (memory := number(run.summary, "peak_memory_mib")) is not None:
        yield Figure("Peak memory", f"{wording.count(memory)} MiB")
