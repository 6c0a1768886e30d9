"""Shipped cells, and small ones of every kind of state, keep the contract of cells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equilibria import Cell
from equilibria.models.deq_transformer import DEQTransformerCell, DEQTransformerConfig
from equilibria.testing.cell_contract import CellContract


class Tanh(Cell):
    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.recurrent = nn.Linear(width, width)
        self.input = nn.Linear(3, width)
        with torch.no_grad():
            self.recurrent.weight.mul_(0.9 / torch.linalg.matrix_norm(self.recurrent.weight, 2))

    def inject(self, x: Tensor) -> Tensor:
        return self.input(x)

    def initial_state(self, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(self.recurrent(z) + injection)


class TwoScales(Cell):
    """A tree of two resolutions that see each other, as in a multiscale DEQ."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1)
        self.down, self.up = nn.Conv2d(2, 3, 2, stride=2), nn.Conv2d(3, 2, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.5)

    def inject(self, x: Tensor) -> Tensor:
        return x

    def initial_state(self, injection: Tensor) -> dict[str, Tensor]:
        batch, _, height, width = injection.shape
        coarse = injection.new_zeros(batch, 3, height // 2, width // 2)
        return {"fine": torch.zeros_like(injection), "coarse": coarse}

    def forward(self, z: dict[str, Tensor], injection: Tensor) -> dict[str, Tensor]:
        fine, coarse = z["fine"], z["coarse"]
        raised = nn.functional.interpolate(self.up(coarse), scale_factor=2.0)
        lowered = self.down(fine + injection)
        return {
            "fine": torch.tanh(self.fine(fine) + raised + injection),
            "coarse": torch.tanh(0.5 * coarse + lowered),
        }


class TestTanh(CellContract):
    max_spectral_radius = 0.9

    def make_cell(self) -> Cell:
        return Tanh()

    def make_inputs(self, batch: int) -> tuple[Any, ...]:
        return (torch.randn(batch, 3),)


@pytest.mark.slow
class TestTwoScales(CellContract):
    unused_parameters = frozenset({"coarse.weight", "coarse.bias"})

    def make_cell(self) -> Cell:
        return TwoScales()

    def make_inputs(self, batch: int) -> tuple[Any, ...]:
        return (torch.randn(batch, 2, 4, 4),)


class TestDEQTransformer(CellContract):
    norm = "post"

    def make_cell(self) -> Cell:
        return DEQTransformerCell(
            DEQTransformerConfig(
                d_model=16, num_heads=2, d_inner=32, dropout=0.1, norm=self.norm, init_std=0.1
            )
        )

    def make_inputs(self, batch: int) -> tuple[Any, ...]:
        return (4.0 * torch.randn(batch, 5, 16),)


class TestDEQTransformerWithAWindow(TestDEQTransformer):
    """And with every mask."""

    def make_cell(self) -> Cell:
        config = DEQTransformerConfig(
            d_model=16, num_heads=2, d_inner=32, dropout=0.1, attention_dropout=0.1,
            position_dropout=0.1, attention_window=3, attention_bias=True, init_std=0.1,
        )  # fmt: skip
        return DEQTransformerCell(config)


@pytest.mark.slow
class TestPreNormDEQTransformer(TestDEQTransformer):
    norm = "pre"
