"""How the loss fell, and what drove it: learning rate, gradient norm, speed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from equilibria.diagnostics.series import Points, half_window, running_mean
from equilibria.report.blocks import Chart, Charts, Section
from equilibria.report.charts import Line, Scale, line_chart
from equilibria.report.runs import Run, mapping_at, number

_STEP = "training step"
_KNOWN = {
    "step",
    "loss",
    "learning_rate",
    "gradient_norm",
    "num_evals",
    "num_evals_max",
    "relative_residual",
    "relative_residual_max",
    "backward_num_evals",
    "backward_relative_residual",
    "forward_seconds",
    "backward_seconds",
    "seconds",
    "tokens_per_second",
}
_MOST_OTHER = 6
_BASELINES = {
    "baseline_losses": 1.0,
    "baseline_bits_per_character": math.log(2.0),
    "baseline_bits_per_token": math.log(2.0),
}
"""Where the summary has baselines, and how many nats one of them is."""


def section(runs: Sequence[Run]) -> Section | None:
    """Curves of training and validation; None if no run has any."""
    charts = [chart for chart in _charts(runs) if chart is not None]
    if not charts:
        return None
    names = tuple(run.name for run in runs) if len(runs) > 1 else ()
    return Section("Learning", (Charts(tuple(charts), names),))


def _charts(runs: Sequence[Run]) -> Iterator[Chart | None]:
    yield _loss(runs)
    yield _plain(runs, "valid", "loss", "Validation loss (nats)")
    for kind, key, title in _other_figures(runs):
        yield _plain(runs, kind, key, title)
    yield _plain(runs, "train", "learning_rate", "Learning rate", scale="from zero")
    yield _smoothed(runs, "gradient_norm", "Gradient norm, before clipping", "auto")
    yield _smoothed(runs, "tokens_per_second", "Tokens per second", "from zero")


def _loss(runs: Sequence[Run]) -> Chart | None:
    """Training and validation in one picture."""
    alone = len(runs) == 1
    lines: list[Line] = []
    for run in runs:
        train, valid = run.curve("train", "loss"), run.curve("valid", "loss")
        lines += _with_mean(train, run.name.colour)
        # two colours tell two curves apart, but those of several runs are taken
        lines.append(Line(valid, 2 if alone else run.name.colour, "dots" if alone else "dotted"))
    note = (
        "blue: training, running mean; orange: validation"
        if alone
        else "solid: training, running mean; dotted: validation"
    )
    levels = _baselines(runs[0]) if alone else []
    note += "; dashed: baselines" * bool(levels)
    return line_chart("Loss (nats)", lines, x_label=_STEP, levels=levels, note=note)


def _baselines(run: Run) -> list[float]:
    """Losses of methods without training, in nats."""
    found: list[float] = []
    for key, nats in _BASELINES.items():
        values = mapping_at(run.summary, key)
        losses = [number(values, name) for name in list(values)[:_MOST_OTHER]]
        found += [loss * nats for loss in losses if loss is not None]
    return found


def _plain(
    runs: Sequence[Run], kind: str, key: str, title: str, scale: Scale = "auto"
) -> Chart | None:
    look = "dots" if kind == "valid" else "line"
    lines = [Line(run.curve(kind, key), run.name.colour, look) for run in runs]
    return line_chart(title, lines, x_label=_STEP, scale=scale)


def _smoothed(runs: Sequence[Run], key: str, title: str, scale: Scale) -> Chart | None:
    lines = [line for run in runs for line in _with_mean(run.curve("train", key), run.name.colour)]
    return line_chart(title, lines, x_label=_STEP, scale=scale)


def _with_mean(points: Points, colour: int) -> list[Line]:
    """The values faint, and their running mean over them."""
    return [Line(points, colour, "faint"), Line(running_mean(points, half_window(points)), colour)]


def _other_figures(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Kind, key and title of whatever else a task measures."""
    found = {
        (kind, key): None
        for run in runs
        for kind in ("valid", "train")
        for key in list(run.latest(kind))
        if key not in _KNOWN and number(run.latest(kind), key) is not None
    }
    titles = {"valid": "in validation", "train": "in training"}
    return [
        (kind, key, f"{key.replace('_', ' ').capitalize()} {titles[kind]}")
        for kind, key in list(found)[:_MOST_OTHER]
    ]
