"""Weights that change over training, as pure functions of the training step."""

from __future__ import annotations

from dataclasses import dataclass

from equilibria.core.errors import UserError
from equilibria.core.options import Options
from equilibria.core.parameters import check_not_negative, check_positive_integer


@dataclass(frozen=True)
class StepwiseWeight(Options):
    """A weight that grows by a fixed amount every so many training steps.

        weight(step) = min(start + increase * floor(step / every), maximum),   begin <= step < end,

    and 0 outside. Nothing to save in a checkpoint, and the same on all ranks.

    Args:
        start: weight at training step 0.
        increase: added every `every` steps; 0 (default) is a constant weight with an end.
        every: training steps between two increases; needed where `increase` is not 0.
        maximum: no increase goes above it; None for no limit.
        begin: first step with a weight, for example the end of an unrolled pre-training.
        end: first step without one; None for never. Jacobian regularisation is often switched off
            near the end of the training.

    Raises:
        UserError: a negative weight or step, an increase without `every`, an end before the
            beginning.

    Examples:
        >>> weight = StepwiseWeight(1.9, increase=0.1, every=35_000)
        >>> [round(weight(step), 1) for step in (0, 34_999, 35_000, 70_000)]
        [1.9, 1.9, 2.0, 2.1]
    """

    start: float
    increase: float = 0.0
    every: int | None = None
    maximum: float | None = None
    begin: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        check_not_negative("start", self.start)
        check_not_negative("increase", self.increase)
        if self.maximum is not None:
            check_not_negative("maximum", self.maximum)
        if self.every is not None:
            check_positive_integer("every", self.every)
        elif self.increase > 0:
            raise UserError(
                f"increase={self.increase} says by how much the weight grows but not how often; "
                "give every=... training steps"
            )
        if self.begin < 0 or (self.end is not None and self.end <= self.begin):
            raise UserError(
                f"a weight from training step {self.begin} to {self.end} never acts; give "
                "0 <= begin < end"
            )

    def __call__(self, step: int) -> float:
        """The weight at a training step, counted from 0."""
        if step < self.begin or (self.end is not None and step >= self.end):
            return 0.0
        weight = self.start + self.increase * (step // (self.every or 1))
        return weight if self.maximum is None else min(weight, self.maximum)
