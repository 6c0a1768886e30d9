"""Pictures of a training run, made from its metrics file alone."""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from equilibria.core.errors import UserError

Record = dict[str, Any]

# Okabe and Ito's colours, told apart with any colour vision.
_FORWARD, _BACKWARD, _GREY = "#0072B2", "#D55E00", "#666666"
_INCHES, _DPI = (8.0, 5.0), 150
_BASELINE_NAMES = {"five_gram": "5-gram"}


def plot_run(folder: Path, baselines: Mapping[str, float] | None = None) -> list[Path]:
    """Draw `loss.png`, `solver.png` and `convergence.png` into `folder`/plots.

    A picture whose records are missing is left out.

    Args:
        folder: a run folder with metrics.jsonl.
        baselines: bits per token of other methods, drawn as lines beside the loss.

    Returns:
        The pictures drawn.

    Raises:
        UserError: the folder has no metrics.
    """
    records = read_metrics(folder)
    drawers: dict[str, Callable[[list[Record], Figure], bool]] = {
        "loss.png": lambda r, f: _draw_loss(r, f, baselines or {}),
        "solver.png": _draw_solver,
        "convergence.png": _draw_convergence,
    }
    target = folder / "plots"
    target.mkdir(exist_ok=True)
    drawn: list[Path] = []
    for name, draw in drawers.items():
        figure = Figure(figsize=_INCHES, dpi=_DPI, layout="constrained")
        if draw(records, figure):
            _save(figure, target / name)
            drawn.append(target / name)
    return drawn


def read_metrics(folder: Path) -> list[Record]:
    """Records of a run; a last line that a crash cut short is skipped.

    Raises:
        UserError: there are none.
    """
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    records: list[Record] = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    if not records:
        raise UserError(f"{file} has no records to draw; give the folder of a run that has begun")
    return records


def _draw_loss(records: list[Record], figure: Figure, baselines: Mapping[str, float]) -> bool:
    train = _series(records, "train", "loss")
    valid = _series(records, "valid", "loss")
    if not train:
        return False
    axes = figure.subplots()
    axes.plot(*_columns(train), color=_FORWARD, alpha=0.25, linewidth=1)
    axes.plot(*_columns(_smooth(train)), color=_FORWARD, linewidth=2, label="train (smoothed)")
    if valid:
        axes.plot(*_columns(valid), color=_BACKWARD, marker="o", linewidth=2, label="validation")
    losses = [y for _, y in (*_smooth(train), *valid)]
    top = _upper_limit(losses)
    references = {_BASELINE_NAMES.get(k, k): v * math.log(2.0) for k, v in baselines.items()}
    bottom = min([*losses, *(v for v in references.values())])
    axes.set_ylim(bottom - 0.08 * (top - bottom), top)
    for name, loss in references.items():
        if loss < top:
            axes.axhline(loss, color=_GREY, linewidth=1, linestyle=":")
            _beside(axes, loss, f" {name}, test")
    _mark_pretraining(axes, records)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss, nats per token")
    axes.set_title("Loss over training")
    axes.legend(loc="upper right", frameon=False)
    bits = axes.secondary_yaxis(-0.13, functions=(_to_bits, _to_nats))
    bits.set_ylabel("bits per token")
    return True


def _draw_solver(records: list[Record], figure: Figure) -> bool:
    if not _series(records, "train", "num_evals"):
        return False
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, forward, backward in (
        (upper, "num_evals", "backward_num_evals"),
        (lower, "relative_residual", "backward_relative_residual"),
    ):
        for key, colour, name in (
            (forward, _FORWARD, "forward"),
            (backward, _BACKWARD, "backward"),
        ):
            points = _series(records, "train", key)
            if points:
                axes.plot(*_columns(points), color=colour, linewidth=1.5, label=name)
        _mark_pretraining(axes, records, label=axes is upper)
    upper.set_ylabel("evaluations per sample")
    upper.set_ylim(bottom=0)
    upper.yaxis.set_major_locator(MaxNLocator(integer=True))
    upper.set_title("Solver effort (above) and what it reached (below)")
    upper.legend(loc="lower right", frameon=False, ncols=2)
    lower.set_yscale("log")
    lower.set_ylabel("relative residual")
    lower.set_xlabel("optimiser step")
    return True


def _draw_convergence(records: list[Record], figure: Figure) -> bool:
    traces = [record for record in records if record.get("kind") == "trace"]
    if not traces or not traces[-1].get("forward"):
        return False
    panels = figure.subplots(1, 2, sharey=True)
    for axes, side, colour in zip(
        panels, ("forward", "backward"), (_FORWARD, _BACKWARD), strict=True
    ):
        samples: list[list[float | None]] = traces[-1].get(side) or []
        for sample in samples:
            points = [(i, v) for i, v in enumerate(sample) if v]
            axes.plot(*_columns(points), color=colour, alpha=0.3, linewidth=1)
        axes.plot(*_columns(_median(samples)), color=colour, linewidth=2.5, label="median")
        tolerance = traces[-1].get(f"{side}_tolerance")
        if tolerance:
            axes.axhline(tolerance, color=_GREY, linewidth=1, linestyle="--", label="tolerance")
        axes.set_yscale("log")
        axes.set_xlabel("solver step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"{side.capitalize()} solve" + ("" if samples else ": none"))
        if samples:
            axes.legend(loc="upper right", frameon=False)
    panels[0].set_ylabel("relative residual, one line per sample")
    figure.suptitle(f"How the residual falls, after training step {traces[-1]['step']}")
    return True


def _to_bits(nats: Any) -> Any:
    return nats / math.log(2.0)


def _to_nats(bits: Any) -> Any:
    return bits * math.log(2.0)


def _mark_pretraining(axes: Axes, records: list[Record], label: bool = True) -> None:
    """Vertical line where unrolled pre-training ended, if both phases are there."""
    train = [r for r in records if r.get("kind") == "train"]
    unrolled = [r["step"] for r in train if r.get("phase") == "unrolled"]
    if not unrolled or len(unrolled) == len(train):
        return
    border = max(unrolled)
    axes.axvline(border, color=_GREY, linewidth=1)
    if label:
        axes.annotate(
            "unrolled | equilibrium",
            (border, 0.98),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="top",
            fontsize=8,
            color=_GREY,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )


def _beside(axes: Axes, y: float, text: str) -> None:
    """Write at the right edge of the axes, at the height of a line."""
    axes.annotate(
        text, (1.0, y), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=_GREY
    )


def _series(records: list[Record], kind: str, key: str) -> list[tuple[float, float]]:
    """Finite values of a key over steps."""
    return [
        (r["step"], r[key])
        for r in records
        if r.get("kind") == kind
        and isinstance(r.get(key), int | float)
        and math.isfinite(r[key])
        and "step" in r
    ]


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean over a centred window of about a twentieth of the run."""
    reach = len(points) // 40
    return [
        (x, statistics.fmean(y for _, y in points[max(i - reach, 0) : i + reach + 1]))
        for i, (x, _) in enumerate(points)
    ]


def _upper_limit(losses: list[float]) -> float:
    """Cut off the steep first descent, which would flatten everything that matters."""
    ordered = sorted(losses)
    return ordered[min(int(0.97 * len(ordered)), len(ordered) - 1)] * 1.05


def _median(samples: list[list[float | None]]) -> list[tuple[float, float]]:
    """Median over all samples by step; a finished sample counts with its last residual."""
    points: list[tuple[float, float]] = []
    last: list[float] = []
    for step in range(max((len(sample) for sample in samples), default=0)):
        reached = [s[step] if step < len(s) else None for s in samples]
        last = [
            value or (last[i] if i < len(last) else math.nan) for i, value in enumerate(reached)
        ]
        points.append((step, statistics.median(last)))
    return points


def _save(figure: Figure, path: Path) -> None:
    """Replace a picture in one step."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            figure.savefig(file, format="png")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
