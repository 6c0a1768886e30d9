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

    Hyphens, underscores and case are ignored in the comparison, since people mix them; the
    beginning of a name counts as close, however short.
    """
    plain = {name.lower().replace("-", "_"): name for name in valid}
    word = given.lower().replace("-", "_")
    match = difflib.get_close_matches(word, plain, n=1, cutoff=0.5)
    match = match or [name for name in sorted(plain) if word and name.startswith(word)]
    return f"; did you mean {plain[match[0]]!r}?" if match else ""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on a GPU or here, or a size is beyond any machine."""
    signs = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
