"""What a person sees while a run goes on."""

from __future__ import annotations

import math
import sys
import time
from typing import Any, Self

from tqdm import tqdm


class Progress:
    """A bar on a terminal, plain lines elsewhere.

    Args:
        first: step at which this process starts (not 0 when resuming).
        total: last step.
    """

    def __init__(self, first: int, total: int) -> None:
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
        loss = record["loss"]
        figures = {
            "loss": f"{loss:.3f}",
            "ppl": f"{math.exp(min(loss, 50.0)):.2f}",
            "NFE": f"{record['num_evals']:.1f}",
            "residual": f"{record['relative_residual']:.1e}",
            "tok/s": f"{record['tokens_per_second']:.0f}",
        }
        if self._bar is not None:
            self._bar.set_postfix(figures)
            return
        step = record["step"]
        done = max(step - self._first, 1)
        left = (time.perf_counter() - self._start) / done * (self._total - step)
        shown = "  ".join(f"{name} {value}" for name, value in figures.items())
        self.say(f"step {step}/{self._total}  {shown}  left {_duration(left)}")

    def say(self, line: str) -> None:
        """Print a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
