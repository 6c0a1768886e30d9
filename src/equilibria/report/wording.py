"""Numbers as a person reads them."""

from __future__ import annotations

import math

ABSENT = "\N{EN DASH}"
"""Where a run has no such figure or option."""

_JOINT = "\N{NO-BREAK SPACE}"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_TIMES = "\N{MULTIPLICATION SIGN}"
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(value: float) -> str:
    """A whole number with thousands apart."""
    return f"{value:,.0f}" if math.isfinite(value) else "not finite"


def decimals(value: float, places: int = 1) -> str:
    """A number of ordinary size."""
    return f"{value:,.{places}f}" if math.isfinite(value) else "not finite"


def scientific(value: float, places: int = 1) -> str:
    """A number by powers of ten."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{places}e}".partition("e")
    power = f"10{superscript(int(exponent))}"
    return power if float(mantissa) == 1.0 else f"{mantissa}{_JOINT}{_TIMES}{_JOINT}{power}"


def score(value: float) -> str:
    """A loss, or what else a task measures: about five digits, and powers of ten below 0.05."""
    size = abs(value)
    if 0 < size < 0.05:
        return scientific(value, 2)
    return decimals(value, 4 if size < 10 else 2 if size < 1000 else 1)


def residual(value: float) -> str:
    """A relative residual: by powers of ten where it is small, as it should be."""
    return scientific(value) if abs(value) < 0.01 else decimals(value, 2)


def duration(seconds: float) -> str:
    """The two largest units: 46 min 55 s."""
    if not math.isfinite(seconds) or seconds < 0:
        return "not finite"
    if seconds < 10:
        return f"{seconds:.1f}{_JOINT}s"
    whole = round(seconds)
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    parts: list[str] = []
    for name, size in units:
        amount, whole = divmod(whole, size)
        if amount or parts:
            parts.append(f"{amount:,}{_JOINT}{name}")
    return _JOINT.join(parts[:2])


def tick(value: float, _: object = None) -> str:
    """A mark of an axis, short: 0.02, 12k, a power of ten."""
    size = abs(value)
    if size == 0 or 1e-4 <= size < 1e3:
        return f"{value:.6g}"
    for factor, prefix in _PREFIXES:
        if 1 <= size / factor < 1e3:
            return f"{value / factor:.4g}{prefix}"
    return scientific(value, 0).replace(_JOINT, "")


def power_tick(value: float, _: object = None) -> str:
    """A mark of a logarithmic axis: 10⁻³."""
    exponent = round(math.log10(value)) if value > 0 else 0
    return tick(value) if -2 <= exponent <= 3 else f"10{superscript(exponent)}"


def superscript(exponent: int) -> str:
    """An exponent."""
    return str(exponent).translate(_SUPERSCRIPTS)


def plural(amount: int, word: str) -> str:
    """1 run, 2 runs."""
    return f"{amount:,} {word}" + ("" if amount == 1 else "s")
