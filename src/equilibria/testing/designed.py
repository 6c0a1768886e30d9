"""Random problems by design: fixed point, spectral radius and non-normality are chosen, not found.

For drawing many, with hypothesis or a loop; `problems` has the ones with a name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.core.parameters import check_not_negative
from equilibria.testing.problems import FixedPointProblem


def designed_problem(
    *,
    batch: int = 4,
    shape: tuple[int, ...] = (6,),
    spectral_radius: float = 0.9,
    non_normality: float = 0.0,
    nonlinear: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> FixedPointProblem:
    """A problem whose Jacobian at its fixed point has a given spectral radius.

        f(z) = A (z - z*) + z*           or    f(z) = tanh(W z + x),
        J = Q (block-diagonal + non_normality * U) Q^T at z* in both,

    where the diagonal blocks are rotations and numbers of moduli up to `spectral_radius`, U is
    strictly upper triangular, and Q orthogonal. One input per sample: x, or c = z* - A z*. With a
    radius above 1 the nonlinear map may have other fixed points besides z*.

    Args:
        batch: samples, each with a J of its own; the largest modulus is the same in all.
        shape: that of a sample's state.
        spectral_radius: of J.
        non_normality: size of U's entries; at 1 errors may grow tenfold before they fall.
        nonlinear: tanh, or linear.
        dtype: that everything is rounded to; z_star stays in float64 and is that of the map
            before rounding.
        seed: of the draws.

    Raises:
        UserError: a negative radius or non-normality, a shape without elements.
    """
    check_not_negative("spectral_radius", spectral_radius)
    check_not_negative("non_normality", non_normality)
    size = math.prod(shape)
    if size < 1:
        raise UserError(f"shape={shape} has no elements; give a problem at least one number")
    draw = torch.Generator().manual_seed(seed)
    jacobian = spectral_radius * _schur_form(draw, batch, size)
    jacobian = jacobian + non_normality * _above_the_blocks(draw, batch, size)
    basis = torch.linalg.qr(_normal(draw, batch, size, size))[0]
    jacobian = basis @ jacobian @ basis.mT
    z_star = 1.6 * torch.rand(batch, size, dtype=torch.float64, generator=draw) - 0.8
    if nonlinear:
        weight = jacobian / (1.0 - z_star.square()).unsqueeze(2)
        shift = torch.atanh(z_star) - _product(weight, z_star)
    else:
        weight, shift = jacobian, z_star - _product(jacobian, z_star)

    def f(z: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
        moved = _product(weight, z.reshape(len(z), size)) + shift
        return (torch.tanh(moved) if nonlinear else moved).reshape(z.shape)

    return FixedPointProblem(
        "designed",
        f,
        torch.zeros(batch, *shape, dtype=dtype),
        z_star.reshape(batch, *shape),
        (shift.to(dtype), weight.to(dtype)),
        tags=frozenset({"designed"} if nonlinear else {"designed", "linear"}),
    )


def _schur_form(draw: torch.Generator, batch: int, size: int) -> Tensor:
    """Block-diagonal (B, D, D): 2 x 2 rotations and numbers, the largest modulus exactly 1."""
    blocks = torch.zeros(batch, size, size, dtype=torch.float64)
    for start in range(0, size, 2):
        modulus = torch.rand(batch, dtype=torch.float64, generator=draw)
        modulus = torch.ones_like(modulus) if start == 0 else modulus
        angle = math.pi * torch.rand(batch, dtype=torch.float64, generator=draw)
        if start + 1 == size:
            blocks[:, start, start] = modulus * torch.where(angle < 2.0, 1.0, -1.0)
            continue
        # Every third block has two real eigenvalues, m and -m / 2, instead of a complex pair.
        real = torch.rand(batch, generator=draw) < 0.34
        cos, sin = modulus * angle.cos(), modulus * angle.sin()
        blocks[:, start, start] = torch.where(real, modulus, cos)
        blocks[:, start, start + 1] = torch.where(real, 0.0, -sin)
        blocks[:, start + 1, start] = torch.where(real, 0.0, sin)
        blocks[:, start + 1, start + 1] = torch.where(real, -0.5 * modulus, cos)
    return blocks


def _above_the_blocks(draw: torch.Generator, batch: int, size: int) -> Tensor:
    """Random (B, D, D), zero on and below the 2 x 2 blocks of the diagonal."""
    block = torch.arange(size) // 2
    above = block.unsqueeze(1) < block.unsqueeze(0)
    return torch.where(above, _normal(draw, batch, size, size), 0.0)


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=draw)


def _product(matrix: Tensor, z: Tensor) -> Tensor:
    # A sum and no product of matrices: the order of additions must not depend on the batch size.
    return (matrix * z.unsqueeze(1)).sum(2)
