"""Products with the Jacobian of a recorded evaluation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from equilibria.core.iterate import Iterate


def transposed_jacobian(at: Iterate, *, create_graph: bool = False) -> Callable[[Tensor], Tensor]:
    """The map u -> J^T u, J = df/dz where `at` was recorded; (B, D) -> (B, D).

    One vector-Jacobian product per call; the recording is kept. With `create_graph` the product
    can be differentiated again.
    """

    def product(u: Tensor) -> Tensor:
        return torch.autograd.grad(
            at.fz, at.z, u, retain_graph=True, create_graph=create_graph, materialize_grads=True
        )[0]

    return product
