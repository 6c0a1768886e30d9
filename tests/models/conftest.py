"""Tiny models in float64 whose equilibria exist and can be found to the last digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from equilibria import Broyden, Implicit
from equilibria.models.config import SolveConfig
from equilibria.models.deq_transformer import (
    DEQTransformer,
    DEQTransformerCell,
    DEQTransformerConfig,
)

ModelFactory = Callable[..., DEQTransformer]

TIGHT = SolveConfig(
    solver=Broyden(history_size=None),
    rtol=0.0,
    atol=1e-13,
    max_steps=200,
    adjoint=Implicit(solver=Broyden(history_size=None), rtol=1e-13, max_steps=200),
)


@pytest.fixture
def make_model() -> ModelFactory:
    """Build a float64 model of vocabulary 11; options are those of `DEQTransformerConfig`."""

    def make(*, seed: int = 4, **options: Any) -> DEQTransformer:
        # Large initial weights: at 0.02 the block is nearly the identity and converges slowly.
        defaults = {
            "d_model": 8,
            "num_heads": 2,
            "d_inner": 20,
            "dropout": 0.0,
            "embedding_dropout": 0.0,
            "init_std": 0.4,
            "solve": TIGHT,
        }
        torch.manual_seed(seed)
        model = DEQTransformerConfig(**{**defaults, **options}).build(11).double()
        _calm(model.cell)
        return model

    return make


@pytest.fixture
def tokens() -> Tensor:
    """Ids (2, 9) below 11."""
    return torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(1))


def _calm(cell: DEQTransformerCell) -> None:
    """Let the input rule and z whisper, so that plain iteration converges from anywhere.

    Where the attention's output outweighs z, layer norm all but forgets z.
    """
    _set_weight(cell.qkv, 0.25 * cell.qkv.weight)
    _set_weight(cell.output, 3.0 * cell.output.weight)
    _set_weight(cell.contract, 0.5 * cell.contract.weight)


def _set_weight(layer: nn.Linear, weight: Tensor) -> None:
    """Set the effective weight, with weight norm or without."""
    with torch.no_grad():
        layer.weight = weight if is_parametrized(layer) else nn.Parameter(weight.detach())
