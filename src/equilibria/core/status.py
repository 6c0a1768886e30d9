"""How a sample's solve ended, and what happens when it did not end well."""

from __future__ import annotations

import warnings
from enum import IntEnum
from typing import Literal, get_args

from torch import Tensor

from equilibria.core.errors import UserError, nearest

OnFailure = Literal["warn", "raise", "ignore"]

RUNNING = -1
"""Code of a sample that has not finished; never seen in a returned status."""


class Status(IntEnum):
    """Per-sample outcome of a solve."""

    SUCCESS = 0
    MAX_STEPS = 1
    STALLED = 2
    DIVERGED = 3
    NONFINITE = 4

    @property
    def message(self) -> str:
        """What the outcome means and what usually helps."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.SUCCESS: "the residual met the tolerance",
    Status.MAX_STEPS: (
        "the step limit was reached before the tolerance; raise max_steps, loosen rtol, make the "
        "map more contractive (Jacobian regularisation, weight norm, smaller initial weights), or "
        "give Residual an atol if the fixed point is exactly 0"
    ),
    Status.STALLED: (
        "the residual stopped improving; the tolerance may be below what the dtype can resolve, "
        "or another method is needed: Broyden, a smaller relaxation, or GMRES with a larger "
        "restart for the backward solve"
    ),
    Status.DIVERGED: (
        "the residual grew; the map is probably not contractive near this point (try Broyden, a "
        "smaller relaxation, or Jacobian regularisation)"
    ),
    Status.NONFINITE: (
        "the map returned NaN or infinity; look at the inputs, at the learning rate, and for a "
        "division, log or overflow inside the map (under fixed steps the norm of a float32 "
        "state overflows from about 1e19 on; solve in float64 there)"
    ),
}


class ConvergenceWarning(UserWarning):
    """Some samples of a solve did not reach the tolerance."""


class ConvergenceError(RuntimeError):
    """Raised instead of the warning under `on_failure="raise"`."""


def check_on_failure(policy: str) -> None:
    """Raise UserError unless `policy` is one of the three known ones."""
    if policy not in get_args(OnFailure):
        raise UserError(
            f"on_failure={policy!r} is not one of {', '.join(map(repr, get_args(OnFailure)))}"
            f"{nearest(str(policy), get_args(OnFailure))}"
        )


def enforce(status: Tensor, policy: OnFailure, what: str) -> None:
    """Warn or raise when any sample of `status` (B,) is not SUCCESS.

    The text of the warning names outcomes but no counts, so that Python's default filter shows
    it once and not at every training step; the exception carries the counts.
    """
    if policy == "ignore" or not bool(status.any()):
        return
    counts = {code: int((status == code).sum()) for code in Status if code is not Status.SUCCESS}
    failed = {code: count for code, count in counts.items() if count}
    if policy == "raise":
        numbers = ", ".join(f"{count} {code.name}" for code, count in failed.items())
        reasons = " ".join(f"{code.name}: {code.message}." for code in failed)
        raise ConvergenceError(f"{what}: of {status.numel()} samples {numbers}. {reasons}")
    reasons = " ".join(f"{code.name}: {code.message}." for code in failed)
    warnings.warn(
        f"{what} did not converge for some samples. {reasons} Per-sample outcomes are in the "
        'status of the solution; on_failure="raise" or "ignore" changes this warning.',
        ConvergenceWarning,
        stacklevel=4,
    )
