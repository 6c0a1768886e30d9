"""Checks of hyper-parameters that several methods share."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from equilibria.core.errors import UserError


def as_integer(value: Any) -> Any:
    """An integer of another kind, such as NumPy's, as Python's; anything else as it is."""
    return value if isinstance(value, bool) or not isinstance(value, Integral) else int(value)


def check_relaxation(relaxation: float) -> None:
    """Accept 0 < relaxation < 2; 1 means undamped."""
    if not _is_number(relaxation) or not 0.0 < relaxation < 2.0:
        raise UserError(
            f"relaxation={relaxation!r} must lie between 0 and 2 (1 is undamped, below 1 damps)"
            f"{_hint(relaxation)}"
        )


def check_positive_integer(name: str, value: int) -> None:
    """Accept an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"{name}={value!r} must be an integer of at least 1{_hint(value)}")


def check_not_negative(name: str, value: float) -> None:
    """Accept a finite number that is not negative."""
    if not _is_number(value) or not math.isfinite(value) or value < 0:
        raise UserError(f"{name}={value!r} must be a finite number of at least 0{_hint(value)}")


def check_above_zero(name: str, value: float, otherwise: str = "") -> None:
    """Accept a number above 0; `otherwise` is what else may be given."""
    if not _is_number(value) or not value > 0:
        also = f", {otherwise}" if otherwise else ""
        raise UserError(f"{name}={value!r} must be a number above 0{also}{_hint(value)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _hint(value: object) -> str:
    """What to do with a number of NumPy or PyTorch, which no configuration can be written with."""
    if isinstance(value, bool | int | float):
        return ""
    kind = type(value).__name__
    if isinstance(value, Integral):
        return f"; this is a {kind}, give int(...) of it"
    if isinstance(value, Real) or hasattr(value, "item"):
        return f"; this is a {kind}, give float(...) of it, or .item()"
    return f"; this is a {kind}"
