"""What a person sees while a run goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Self

from tqdm import tqdm


class Progress:
    """A bar on a terminal, plain lines elsewhere.

    Args:
        first: step at which this process starts (not 0 when resuming).
        total: last step.
        shown: what a record says in the terms of the task, by short name.
    """

    def __init__(
        self, first: int, total: int, shown: Callable[[dict[str, Any]], dict[str, str]]
    ) -> None:
        self._shown = shown
        self._first, self._total = first, total
        self._start = time.perf_counter()
        terminal = sys.stderr.isatty()
        self._bar = (
            tqdm(total=total, initial=first, unit="step", dynamic_ncols=True) if terminal else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def metrics(self, record: dict[str, Any]) -> None:
        """Show a training record."""
        figures = {"loss": readable(record["loss"]), **self._shown(record)}
        if "num_evals" in record:  # an explicit model has none
            figures["NFE"] = f"{record['num_evals']:.1f}"
            figures["residual"] = f"{record['relative_residual']:.1e}"
        figures["tok/s"] = f"{record['tokens_per_second']:.0f}"
        if self._bar is not None:
            self._bar.set_postfix(figures)
            return
        step = record["step"]
        done = max(step - self._first, 1)
        left = (time.perf_counter() - self._start) / done * (self._total - step)
        shown = "  ".join(f"{name} {value}" for name, value in figures.items())
        self.say(f"step {step}/{self._total}  {shown}  left {_duration(left)}")

    def validation(self, record: dict[str, Any]) -> None:
        """Show the score of the validation split."""
        figures = {"loss": readable(record["loss"], 4), **self._shown(record)}
        shown = ", ".join(f"{name} {value}" for name, value in figures.items())
        self.say(f"step {record['step']}: validation {shown}")

    def say(self, line: str) -> None:
        """Print a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


def readable(loss: float, num_decimals: int = 3) -> str:
    """A loss with decimals, or by powers of ten where those would show little but zeros."""
    return f"{loss:.{num_decimals}f}" if loss >= 0.05 else f"{loss:.2e}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
