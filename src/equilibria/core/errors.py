"""Errors that are addressed to a person: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


def nearest(given: str, valid: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest valid name, or an empty string.

    Hyphens, underscores and case are ignored in the comparison, since people mix them.
    """
    plain = {name.lower().replace("-", "_"): name for name in valid}
    match = difflib.get_close_matches(given.lower().replace("-", "_"), plain, n=1, cutoff=0.5)
    return f"; did you mean {plain[match[0]]!r}?" if match else ""
