"""The largest eigenvalues of the Jacobian of a map, per sample, without writing it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.core.jacobian import transposed_jacobian
from equilibria.core.problem import Problem
from equilibria.core.state import State


@dataclass(frozen=True)
class Spectrum:
    """What is known of the eigenvalues of J = df/dz at a point, per sample.

    Args:
        radius: modulus of the largest eigenvalue (B,).
        angle: its argument in radians, 0 to pi (B,): 0 is monotone growth, pi alternates in
            sign, anything between is a complex pair that rotates.
        error: size of the eigenpair's residual relative to the radius (B,); below .1 the radius
            can be trusted to about a tenth.
        eigenvalues: approximations to the outermost eigenvalues (B, m), complex.
        num_products: vector-Jacobian products made.
    """

    radius: Tensor
    angle: Tensor
    error: Tensor
    eigenvalues: Tensor
    num_products: int


def spectrum(
    f: Callable[[State], State], z: State, *, num_vectors: int = 24, num_restarts: int = 2
) -> Spectrum:
    """Approximate the outermost eigenvalues of df/dz at `z` by Arnoldi's method on J^T.

    Right for complex pairs, where power iteration with a Rayleigh quotient reports the real part
    (0 for a rotation by 90 degrees), and exact when the Krylov space is the whole space. Samples
    are taken to be independent.

    Args:
        f: the map on states, a function of z alone.
        z: where; commonly the fixed point.
        num_vectors: size of the Krylov space, and its memory in copies of the state.
        num_restarts: how often to start over from the largest eigenvector found, at most; stops
            when all eigenpairs have an error below 1e-2.

    References:
        Saad, Numerical Methods for Large Eigenvalue Problems (2011), section 6.2.
    """
    problem = Problem(f, z)
    with torch.enable_grad():
        taped, _ = problem.tape(problem.z0.detach())
    batch, width = taped.z.shape
    if not taped.fz.requires_grad or batch * width == 0:
        zero = taped.z.new_zeros(batch)
        return Spectrum(zero, zero, zero, torch.zeros(batch, 1, dtype=torch.complex128), 0)
    product = transposed_jacobian(taped)
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(batch, width, generator=draw).to(taped.z)
    size = min(num_vectors, width)
    basis, hessenberg = _arnoldi(product, start, size)
    values, vectors, error = _ritz(hessenberg)
    num_products = size
    for _ in range(num_restarts):
        if bool((error < 1e-2).all()):
            break
        # The real part alone: its Krylov space holds both halves of a complex pair.
        leading = vectors[:, :, 0].real.to(basis.dtype)
        start = torch.bmm(leading.unsqueeze(1), basis[:, :size]).squeeze(1)
        basis, hessenberg = _arnoldi(product, start, size)
        values, vectors, error = _ritz(hessenberg)
        num_products += size
    largest = values[:, 0]
    return Spectrum(
        radius=largest.abs().to(taped.z),
        angle=largest.angle().abs().to(taped.z),
        error=error.to(taped.z),
        eigenvalues=values,
        num_products=num_products,
    )


def _arnoldi(
    product: Callable[[Tensor], Tensor], start: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Orthonormal basis (B, size + 1, D) and A V_m = V_{m+1} H, H (B, size + 1, size)."""
    batch, width = start.shape
    basis = start.new_zeros(batch, size + 1, width)
    hessenberg = torch.zeros(batch, size + 1, size, dtype=torch.float64)
    basis[:, 0] = start / torch.linalg.vector_norm(start, dim=1, keepdim=True).clamp_min(1e-30)
    for k in range(size):
        vector = product(basis[:, k])
        norm = torch.linalg.vector_norm(vector, dim=1)
        for _ in range(2):  # once is not enough when the vector nearly lies in the space
            column = torch.bmm(basis[:, : k + 1], vector.unsqueeze(2))
            vector = vector - torch.bmm(column.transpose(1, 2), basis[:, : k + 1]).squeeze(1)
            hessenberg[:, : k + 1, k] += column.squeeze(2).double().cpu()
        length = torch.linalg.vector_norm(vector, dim=1)
        # What is left of rounding is no direction: the space is invariant and H decouples.
        exhausted = length <= 10 * torch.finfo(length.dtype).eps * norm
        length = torch.where(exhausted, 0.0, length)
        hessenberg[:, k + 1, k] = length.double().cpu()
        scale = torch.where(exhausted, 0.0, 1.0 / length.clamp_min(1e-30))
        basis[:, k + 1] = vector * scale.unsqueeze(1)
    return basis, hessenberg


def _ritz(hessenberg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of H by falling modulus, their vectors, relative residual of the largest."""
    size = hessenberg.shape[2]
    finite = torch.isfinite(hessenberg).all(dim=(1, 2))
    square = torch.where(finite.view(-1, 1, 1), hessenberg[:, :size], 0.0)
    values, vectors = torch.linalg.eig(square)
    order = values.abs().argsort(dim=1, descending=True)
    values = values.gather(1, order)
    vectors = vectors.gather(2, order.unsqueeze(1).expand_as(vectors))
    residual = hessenberg[:, size, size - 1].abs() * vectors[:, -1, 0].abs()
    error = residual / values[:, 0].abs().clamp_min(1e-30)
    return torch.where(finite.unsqueeze(1), values, torch.nan), vectors, error
