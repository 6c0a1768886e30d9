"""Several stopping rules at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.core.iterate import Measurement
from equilibria.core.status import RUNNING, Status
from equilibria.core.termination import Termination


@dataclass(frozen=True, init=False)
class AnyOf(Termination):
    """Stop a sample as soon as one of several rules says so.

    Where rules disagree at the same step a SUCCESS wins, then the rule that was named first:
    `AnyOf(Residual(), Stagnation(), Divergence())`.

    Args:
        rules: at least one termination; named in order of precedence.

    Raises:
        UserError: no rule, or something that is no termination.
    """

    rules: tuple[Termination, ...]

    def __init__(self, *rules: Termination) -> None:
        if not rules:
            raise UserError("AnyOf needs at least one rule, for example AnyOf(Residual())")
        for rule in rules:
            _check_rule(rule)
        object.__setattr__(self, "rules", rules)

    def init(self, measurement: Measurement) -> tuple[Any, ...]:
        """The memory of every rule."""
        return tuple(rule.init(measurement) for rule in self.rules)

    @property
    def needs_sync(self) -> bool:
        """Whether any of the rules looks at numbers."""
        return any(rule.needs_sync for rule in self.rules)

    def check(
        self, measurement: Measurement, step: int, state: tuple[Any, ...]
    ) -> tuple[Tensor | None, tuple[Any, ...]]:
        """The first code that is not RUNNING, SUCCESS before all others."""
        checked = [
            rule.check(measurement, step, memory)
            for rule, memory in zip(self.rules, state, strict=True)
        ]
        codes = None
        for later, _ in checked:
            if codes is None or later is None:
                codes = later if codes is None else codes
            else:
                wins = (codes == RUNNING) | (later == Status.SUCCESS)
                codes = torch.where(wins, later, codes)
        return codes, tuple(memory for _, memory in checked)


def _check_rule(rule: object) -> None:
    if not isinstance(rule, Termination):
        hint = " (an instance, not the class)" if isinstance(rule, type) else ""
        raise UserError(
            f"AnyOf got {rule!r}, which is no Termination{hint}; give for example "
            "AnyOf(Residual(), Stagnation())"
        )
