"""What several folders of tests share: seeding, the tanh cell, tight solve settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from equilibria import DEQ, Cell, Implicit, Residual
from equilibria.testing import solver_contract

if not torch.cuda.is_available():
    # Before anything imports Triton: its kernels then run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Timings on a shared machine say nothing; the same examples on every run.
settings.register_profile("equilibria", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("equilibria")


@pytest.fixture(scope="module", params=["plain", "fused"])
def steps(request: pytest.FixtureRequest) -> Generator[str]:
    """Run the tests of a module twice: with plain steps, and with the compiled ones for the CPU.

    Plain is what they are without Numba, so that must be hidden where it is installed.
    """
    with pytest.MonkeyPatch.context() as patch:
        solver_contract._solved_once.cache_clear()  # solved with the other steps
        if request.param == "plain":
            patch.setattr("equilibria.core.fused._is_installed", lambda package: False)
        else:
            pytest.importorskip("numba")
        yield request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)


class TanhCell(Cell):
    """f(z, x) = tanh(W z + b + U x) with |W| = 0.9: a contraction with a known bound."""

    def __init__(self, width: int = 5, num_inputs: int = 3) -> None:
        super().__init__()
        self.recurrent = nn.Linear(width, width)
        self.input = nn.Linear(num_inputs, width, bias=False)
        with torch.no_grad():
            self.recurrent.weight.mul_(0.9 / torch.linalg.matrix_norm(self.recurrent.weight, 2))

    def inject(self, x: Tensor) -> Tensor:
        return self.input(x)

    def initial_state(self, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(self.recurrent(z) + injection)


@pytest.fixture
def tight() -> dict[str, Any]:
    """Keywords of `solve` that reach 1e-12 in float64, or fail loudly."""
    return {
        "termination": Residual(rtol=1e-12, atol=0.0),
        "adjoint": Implicit(rtol=1e-12, max_steps=300),
        "max_steps": 300,
        "on_failure": "raise",
    }


@pytest.fixture
def make_deq(tight: dict[str, Any]) -> Callable[..., DEQ]:
    """Factory of float64 DEQs around a `TanhCell`, tight unless told otherwise."""

    def make(**overrides: Any) -> DEQ:
        torch.manual_seed(0)
        return DEQ(TanhCell(), **(tight | overrides)).double()

    return make


@pytest.fixture
def x() -> Tensor:
    """Inputs (4, 3) of very different size: saturated samples are easy, small ones hard."""
    return torch.tensor([[0.05], [0.5], [2.0], [10.0]], dtype=torch.float64) * torch.randn(
        4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
