"""pytest for the contract modules, or a message that says why it is wanted.

Problems, dense references and probes work without it, and `import equilibria` never comes here.
"""

from __future__ import annotations

try:
    import pytest
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the contracts of equilibria.testing are classes of pytest tests, and pytest is not "
        "installed; run `pip install pytest` (equilibria.testing itself works without it)",
        name="pytest",
    ) from error

__all__ = ["pytest"]
