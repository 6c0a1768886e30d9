"""What the models wrote."""

from __future__ import annotations

from collections.abc import Sequence

from equilibria.report.blocks import Passage, Section
from equilibria.report.runs import Run, value_at
from equilibria.report.wording import count

_MOST_CHARACTERS = 10_000


def section(runs: Sequence[Run]) -> Section | None:
    """A passage per run that has one; None if none has."""
    passages = tuple(passage for run in runs if (passage := _passage(run)) is not None)
    if not passages:
        return None
    intro = "The beginning of the validation text, and how the model goes on (marked)."
    return Section("Samples", passages, intro)


def _passage(run: Run) -> Passage | None:
    prompt, text = (value_at(run.summary, "sample", key) for key in ("prompt", "text"))
    if not isinstance(prompt, str) or not isinstance(text, str):
        return None
    lost = max(len(prompt) - _MOST_CHARACTERS, 0) + max(len(text) - _MOST_CHARACTERS, 0)
    note = f"{count(lost)} characters are left out." if lost else ""
    return Passage(run.name, prompt[-_MOST_CHARACTERS:], text[:_MOST_CHARACTERS], note)
