"""A map with a known contraction rate, and loops of solves around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from equilibria import Residual, Solution, WarmStart, WarmStartMemory, solve

TIGHT: dict[str, Any] = {"termination": Residual(1e-9, 0.0), "max_steps": 200}


@pytest.fixture
def weight() -> Tensor:
    """(24, 24), norm 0.9, float64."""
    matrix = torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return 0.9 * matrix / torch.linalg.matrix_norm(matrix, 2)


@pytest.fixture
def tanh_map(weight: Tensor) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    """x (B, 24) -> f."""
    return lambda x: lambda z: torch.tanh(z @ weight.mT + x)


@pytest.fixture
def data() -> Tensor:
    """(8, 24), a data set."""
    return torch.randn(8, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


class Loop:
    """Solves of one loop, with one memory."""

    def __init__(self, warm_start: WarmStart, **settings: Any) -> None:
        self.memory = WarmStartMemory()
        self._settings = {**TIGHT, "warm_start": warm_start, **settings}

    def __call__(self, f: Callable[[Any], Any], z0: Any, **overrides: Any) -> Solution:
        """Solve, remembering."""
        return solve(f, z0, memory=self.memory, **{**self._settings, **overrides})


@pytest.fixture
def loop() -> type[Loop]:
    """Makes loops."""
    return Loop
