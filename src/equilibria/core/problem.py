"""The fixed-point problem z = f(z) on packed states, with honest counting of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from equilibria.core.iterate import Iterate
from equilibria.core.state import Layout, State

Map = Callable[[Tensor], Tensor]
"""A function on packed states, (B, D) -> (B, D)."""

Evaluate = Callable[[Tensor], Iterate]
"""What a solver calls: a packed point in, that point with its image out.

It returns an `Iterate` and not a bare image because the point may not be the one asked for: rows
of finished samples stay where they are, and a low-precision state is rounded to what `f` sees.
"""


class Problem:
    """Find `z` with `z = f(z)`, for each sample of a batch.

    Args:
        f: the map on the user's states.
        z0: where to start; any tree of tensors (B, ...).
        batch_dims: 1, or 0 when the whole state is one problem without a batch dimension.

    Raises:
        StateError: `z0` is no valid state (see `Layout.of`).
    """

    def __init__(
        self, f: Callable[[State], State], z0: State, batch_dims: Literal[0, 1] = 1
    ) -> None:
        self.f = f
        self.layout = Layout.of(z0, batch_dims)
        self.z0 = self.layout.pack(z0)
        self.num_evals = 0

    def image(self, z: Tensor) -> Tensor:
        """Call `f` once on a packed point; with grad enabled the call is recorded."""
        self.num_evals += 1
        return self.layout.pack(self.f(self.layout.unpack(z)))

    def evaluate(self, z: Tensor) -> Iterate:
        """Pair a point with its image; `z` is first rounded to what `f` really sees."""
        if self.layout.rounds:
            z = self.layout.pack(self.layout.unpack(z))
        return Iterate(z, self.image(z))

    def tape(self, z: Tensor) -> Iterate:
        """Evaluate `f` at a copy of `z` that is an independent variable, recording gradients."""
        with torch.enable_grad():
            free = z.detach().requires_grad_()
            return Iterate(free, self.image(free))
