"""Tiny language models for the tests of tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from equilibria import Broyden
from equilibria.models.config import SolveConfig
from equilibria.models.deq_transformer import DEQTransformer, DEQTransformerConfig


@pytest.fixture
def make_model() -> Callable[..., DEQTransformer]:
    """Build a float64 DEQ-Transformer of vocabulary 11 that converges to the last digits."""

    def make(**options: Any) -> DEQTransformer:
        defaults = {
            "d_model": 8,
            "num_heads": 2,
            "d_inner": 20,
            "dropout": 0.0,
            "embedding_dropout": 0.0,
            "init_std": 0.4,
            "weight_norm": False,
            "solve": SolveConfig(
                solver=Broyden(history_size=None), rtol=0.0, atol=1e-13, max_steps=200
            ),
        }
        torch.manual_seed(4)
        model = DEQTransformerConfig(**{**defaults, **options}).build(11).double()
        with torch.no_grad():  # a strong input and a weak feedback make a contraction
            model.cell.qkv.weight *= 0.25
            model.cell.output.weight *= 3.0
            model.cell.contract.weight *= 0.5
        return model

    return make
