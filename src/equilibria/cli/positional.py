"""The one positional argument of commands that look at a run."""

from __future__ import annotations

from collections.abc import Sequence

from equilibria.core.errors import UserError


def split_run(arguments: Sequence[str], command: str) -> tuple[str, list[str]]:
    """Separate the run folder from the flags; it may come first or last.

    Raises:
        UserError: there is none.
    """
    given = list(arguments)
    if "-h" in given or "--help" in given:
        return "", ["--help"]
    if given and not given[0].startswith("-"):
        return given[0], given[1:]
    raise UserError(f"{command} needs a run folder first: equilibria {command} RUN [options]")
