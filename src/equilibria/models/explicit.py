"""What explicit models share: they are called as a DEQ is and solve nothing."""

from __future__ import annotations

from torch import nn

from equilibria.api import SolveSettings
from equilibria.core.errors import UserError


def refuse_solve(model: nn.Module, settings: SolveSettings | None) -> None:
    """Refuse settings of a solve that a model does not make.

    Raises:
        UserError: settings are given.
    """
    if settings is not None:
        raise UserError(
            f"{type(model).__name__} is an explicit model: it has no equilibrium to unroll or to "
            "solve; set task.pretrain_steps to 0"
        )


def count_parameters(model: nn.Module, embedding: nn.Embedding, *, with_embedding: bool) -> int:
    """Number of trainable scalars, with or without the embedding of the tokens."""
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return total if with_embedding else total - embedding.weight.numel()
