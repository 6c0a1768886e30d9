"""Dropout masks that are drawn once and shared, as a fixed point needs them."""

from __future__ import annotations

import torch
from torch import Tensor

from equilibria.core.errors import UserError


def check_dropout(name: str, probability: float) -> None:
    """Accept a probability in [0, 1)."""
    if not 0.0 <= probability < 1.0:
        raise UserError(f"{name}={probability} must be at least 0 and below 1")


def variational_mask(like: Tensor, width: int, probability: float, training: bool) -> Tensor | None:
    """Draw a mask (B, 1, width) with entries 0 or 1 / (1 - p), shared over time.

    `like` (B, L, ...) gives batch size, device and dtype. None when nothing is dropped, so that
    evaluation pays nothing. Draw it where the injection is made, once per solve: a mask drawn
    inside the map makes every evaluation another function, which has no fixed point.

    Source: Gal and Ghahramani, arXiv 1512.05287; its use in DEQs, arXiv 1909.01377, section 3.
    """
    if not training or probability == 0.0:
        return None
    keep = 1.0 - probability
    return (
        torch.empty(like.shape[0], 1, width, device=like.device, dtype=like.dtype).bernoulli_(keep)
        / keep
    )
