"""Going on with a text token by token.

Every model has three methods for that: `prefill` reads prompts of one length, `step` one more
token of every text, `join` makes one batch of several caches. What is kept of the positions that
were read is the cache, a value: a step returns a new one.

Shape suffixes: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from equilibria.core.solution import Solution


class Prediction(NamedTuple):
    """What comes after the last token that was read."""

    logits: Tensor
    """Log-probabilities (B, V) up to a constant per text."""
    cache: Any
    """For the next step."""
    solution: Solution | None = None
    """How the solve went; None of an explicit model."""


class Rows(NamedTuple):
    """A cache of one tensor or several, each (B, ...), that are as long for every text."""

    tensors: tuple[Tensor, ...]

    def select(self, rows: Tensor) -> Self:
        """Of some texts only."""
        return type(self)(tuple(tensor[rows] for tensor in self.tensors))

    @classmethod
    def join(cls, caches: Sequence[Self]) -> Self:
        """One batch of several."""
        return cls(tuple(map(torch.cat, zip(*(c.tensors for c in caches), strict=True))))
