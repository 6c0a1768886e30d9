"""Timing alternatives side by side: round by round in one process, compared within rounds.

Other load on the machine hits all alternatives of a round alike, so ratios are steadier than
seconds. The order rotates from round to round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Summarise at least two values."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)

    def as_dict(self) -> dict[str, float]:
        """Rounded to four digits, for a result file."""
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def interleave(
    cases: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 9,
    seconds: float = 0.05,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Seconds per call of every case in every round; each measurement lasts about `seconds`.

    `warm` says that every case has been called before.
    """
    repeats = {name: _repeats(case, seconds, warm=warm) for name, case in cases.items()}
    measured: dict[str, list[float]] = {name: [] for name in cases}
    order = list(cases)
    for _ in range(rounds):
        for name in order:
            measured[name].append(_time(cases[name], repeats[name]))
        order = order[1:] + order[:1]
    return measured


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of two cases, round by round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def difference(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Of two cases, round by round."""
    return [a - b for a, b in zip(above, below, strict=True)]


def _repeats(case: Callable[[], object], seconds: float, *, warm: bool) -> int:
    """Calls that take about `seconds`; the first call compiles and allocates, the next tells."""
    if not warm:
        case()
    once = _time(case, 1)
    return max(1, round(seconds / max(once, 1e-7)))


def _time(case: Callable[[], object], repeats: int) -> float:
    _wait()
    start = time.perf_counter()
    for _ in range(repeats):
        case()
    _wait()
    return (time.perf_counter() - start) / repeats


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
