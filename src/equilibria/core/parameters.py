"""Checks of hyper-parameters that several methods share."""

from __future__ import annotations

import math

from equilibria.core.errors import UserError


def check_relaxation(relaxation: float) -> None:
    """Accept 0 < relaxation < 2; 1 means undamped."""
    if not _is_number(relaxation) or not 0.0 < relaxation < 2.0:
        raise UserError(
            f"relaxation={relaxation!r} must lie between 0 and 2 (1 is undamped, below 1 damps)"
        )


def check_positive_integer(name: str, value: int) -> None:
    """Accept an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"{name}={value!r} must be an integer of at least 1")


def check_not_negative(name: str, value: float) -> None:
    """Accept a finite number that is not negative."""
    if not _is_number(value) or not math.isfinite(value) or value < 0:
        raise UserError(f"{name}={value!r} must be a finite number of at least 0")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
