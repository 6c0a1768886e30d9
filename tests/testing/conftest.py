"""Contracts on every problem are slow; a few problems with every known difficulty are not."""

from __future__ import annotations

from pathlib import Path

import pytest

QUICK = {"tanh", "nonsymmetric", "expansive_tanh", "no_fixed_point", "nan_outside_ball"}
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(HERE) or not isinstance(item, pytest.Function):
            continue
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        name = parameters.get("problem", parameters.get("system"))
        if name is not None and name not in QUICK:
            item.add_marker(pytest.mark.slow)
