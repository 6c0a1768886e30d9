"""The solvers of the first public DEQ code, restated from their description as a yardstick.

The state is (B, D). What is kept on purpose, because it is what users of that code pay for: one
scalar norm for the whole batch and its transfer to the host in every step, a copy of the best
state whenever it improves, Anderson's bordered Gram matrix rebuilt in every step, Broyden's inverse
Jacobian as a sum of rank-one terms in two buffers of `max_steps` columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def anderson(
    f: Map,
    z0: Tensor,
    *,
    max_steps: int,
    tolerance: float,
    history_size: int = 6,
    ridge: float = 1e-4,
) -> tuple[Tensor, int]:
    """Type II with an absolute ridge; returns the best state and the evaluations made."""
    batch, width = z0.shape
    points = z0.new_zeros(batch, history_size, width)
    images = torch.zeros_like(points)
    points[:, 0], images[:, 0] = z0, f(z0)
    points[:, 1] = images[:, 0]
    images[:, 1] = f(images[:, 0])
    bordered = z0.new_zeros(batch, history_size + 1, history_size + 1)
    bordered[:, 0, 1:] = bordered[:, 1:, 0] = 1.0
    right = z0.new_zeros(batch, history_size + 1, 1)
    right[:, 0] = 1.0
    best, lowest = points[:, 1].clone(), float("inf")
    evaluations = 2
    for step in range(2, max_steps):
        n = min(step, history_size)
        residuals = images[:, :n] - points[:, :n]
        gram = torch.bmm(residuals, residuals.mT)
        identity = torch.eye(n, dtype=gram.dtype, device=gram.device)
        bordered[:, 1 : n + 1, 1 : n + 1] = gram + ridge * identity
        weights = torch.linalg.solve(bordered[:, : n + 1, : n + 1], right[:, : n + 1])[:, 1:]
        slot = step % history_size
        points[:, slot] = torch.bmm(weights.mT, images[:, :n]).squeeze(1)
        images[:, slot] = f(points[:, slot])
        evaluations += 1
        absolute = (images[:, slot] - points[:, slot]).norm().item()
        relative = absolute / (1e-5 + images[:, slot].norm().item())
        if relative < lowest:
            lowest, best = relative, points[:, slot].clone()
        if relative < tolerance:
            break
    return best, evaluations


def broyden(f: Map, z0: Tensor, *, max_steps: int, tolerance: float) -> tuple[Tensor, int]:
    """Good Broyden on g(z) = f(z) - z, inverse Jacobian -I + U V^T; full memory."""
    batch, width = z0.shape
    left = z0.new_zeros(batch, width, max_steps)
    right = z0.new_zeros(batch, max_steps, width)
    z, residual = z0, f(z0) - z0
    update = residual
    best, lowest = z0.clone(), float("inf")
    evaluations = 1
    for step in range(max_steps):
        z_new = z + update
        new_residual = f(z_new) - z_new
        evaluations += 1
        moved, change = z_new - z, new_residual - residual
        z, residual = z_new, new_residual
        absolute = residual.norm().item()
        relative = absolute / ((residual + z).norm().item() + 1e-9)
        if relative < lowest:
            lowest, best = relative, z.clone()
        if relative < tolerance:
            break
        used_left, used_right = left[:, :, :step], right[:, :step]
        row = _transposed_product(used_left, used_right, moved)
        column = moved - _product(used_left, used_right, change)
        column = column / torch.einsum("bd,bd->b", row, change).unsqueeze(1)
        right[:, step] = torch.nan_to_num(row)
        left[:, :, step] = torch.nan_to_num(column)
        update = -_product(left[:, :, : step + 1], right[:, : step + 1], residual)
    return best, evaluations


def _product(left: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """(-I + U V^T) x."""
    inner = torch.einsum("bkd,bd->bk", right, x)
    return -x + torch.einsum("bdk,bk->bd", left, inner)


def _transposed_product(left: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """x^T (-I + U V^T)."""
    inner = torch.einsum("bd,bdk->bk", x, left)
    return -x + torch.einsum("bk,bkd->bd", inner, right)
