"""The dense truth that gradients are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor


def dense_gradients(
    f: Callable[[Tensor], Tensor], z_star: Tensor, cotangent: Tensor, inputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """g^T (I - J)^-1 df/dinputs with J written out and the system solved by elimination."""
    z_star = z_star.detach()
    jacobian = torch.autograd.functional.jacobian(f, z_star)
    jacobian = jacobian.reshape(z_star.numel(), z_star.numel())
    identity = torch.eye(z_star.numel(), dtype=z_star.dtype)
    u = torch.linalg.solve(identity - jacobian.mT, cotangent.reshape(-1))
    # retained: parts of the graph outside of f belong to the caller
    return torch.autograd.grad(f(z_star), list(inputs), u.view_as(z_star), retain_graph=True)


@pytest.fixture
def dense() -> Callable[..., tuple[Tensor, ...]]:
    return dense_gradients


@pytest.fixture
def relative_error() -> Callable[[Sequence[Tensor], Sequence[Tensor]], float]:
    """Largest |a - b| / |b| over pairs of gradients."""

    def largest(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
        pairs = zip(found, wanted, strict=True)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)

    return largest
