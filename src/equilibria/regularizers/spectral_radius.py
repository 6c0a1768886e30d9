"""The largest eigenvalues of the Jacobian of a map, per sample, without writing it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from equilibria.core.autocast import without_autocast
from equilibria.core.errors import UserError
from equilibria.core.history import inner_products
from equilibria.core.iterate import Iterate
from equilibria.core.jacobian import transposed_jacobian
from equilibria.core.parameters import check_not_negative, check_positive_integer
from equilibria.core.problem import Map, Problem
from equilibria.core.solution import Solution, image_again, solved_problem
from equilibria.core.state import State


@dataclass(frozen=True)
class Spectrum:
    """What is known of the eigenvalues of J = df/dz at a point, per sample.

    Args:
        radius: modulus of the largest eigenvalue (B,); NaN where a derivative is not finite.
        angle: its argument in radians, 0 to pi (B,): 0 is monotone growth, pi alternates in
            sign, anything between is a complex pair that rotates.
        error: first-order bound on the error of that eigenvalue relative to the radius (B,): the
            residual of the eigenpair times the condition number of the eigenvalue, as far as the
            Krylov space shows it.
        converged: mask (B,) of the samples whose error is within the tolerance.
        eigenvalues: approximations to the outermost eigenvalues (B, m), complex, by falling
            modulus.
        num_products: vector-Jacobian products made for the whole batch.
    """

    radius: Tensor
    angle: Tensor
    error: Tensor
    converged: Tensor
    eigenvalues: Tensor
    num_products: int


def spectral_radius(
    solution: Solution, *, num_vectors: int = 24, num_restarts: int = 2, tolerance: float = 1e-2
) -> Spectrum:
    """Spectral radius of the Jacobian at a fixed point, by `spectrum`.

    f is the one that was solved: same injection, masks and normalised weights; segments and
    `batch_dims` are those of the solve. Below 1, plain iteration converges near z*, and cheap
    gradients (`OneStep`, `Phantom`) point the right way; the further above, the less a solver can
    rely on the map itself.

    Raises:
        UserError: a number out of range; inference mode.
        ReplayError: f has become another function since the solve.

    Examples:
        >>> from equilibria import solve
        >>> solution = solve(torch.cos, torch.ones(1, 1, dtype=torch.float64))
        >>> round(spectral_radius(solution).radius.item(), 3)
        0.674
    """
    problem = solved_problem(solution)
    point = problem.layout.pack(solution.z)
    return _spectrum(partial(image_again, solution), point, num_vectors, num_restarts, tolerance)


def spectrum(
    f: Callable[[State], State],
    z: State,
    *,
    num_vectors: int = 24,
    num_restarts: int = 2,
    tolerance: float = 1e-2,
    batch_dims: Literal[0, 1] = 1,
    segments: Tensor | None = None,
) -> Spectrum:
    """Approximate the outermost eigenvalues of df/dz at `z` by Arnoldi's method on J^T.

    Right for complex pairs, where power iteration with a Rayleigh quotient reports the real part
    (0 for a rotation by 90 degrees), and exact when the Krylov space is the whole space. Samples
    are taken to be independent. Not differentiable: train with `JacobianRegularizer`.

    What a dtype can tell of the eigenvalues of a defective matrix is limited, by this method or
    any other: a Jordan block of size k moves by eps^(1/k). Of an 8 x 8 nilpotent block, whose
    eigenvalues are 0, float32 sees a radius of 0.1; solve in float64 where that matters.

    Cost: one evaluation of f and `num_vectors` vector-Jacobian products, at most `num_restarts`
    times more; memory for `num_vectors` copies of the state.

    Args:
        f: the map on states, a function of z alone.
        z: where; commonly the fixed point.
        num_vectors: size of the Krylov space; more for many eigenvalues of nearly the same
            modulus, which is what random weights have.
        num_restarts: how often to start over from the largest eigenvector found, at most.
        tolerance: relative error at which a sample is done.
        batch_dims: as in `solve`.
        segments: as in `solve`.

    Raises:
        UserError: a number out of range; inference mode.

    References:
        Saad, Numerical Methods for Large Eigenvalue Problems (2011), section 6.2.
    """
    problem = Problem(f, z, batch_dims, segments)
    return _spectrum(problem.image, problem.z0, num_vectors, num_restarts, tolerance)


def _spectrum(
    image: Map, point: Tensor, num_vectors: int, num_restarts: int, tolerance: float
) -> Spectrum:
    check_positive_integer("num_vectors", num_vectors)
    check_not_negative("num_restarts", num_restarts)
    check_not_negative("tolerance", tolerance)
    if torch.is_inference_mode_enabled() or point.is_inference():
        raise UserError(
            "the spectral radius needs autograd, which inference mode switches off for good; use "
            "torch.no_grad() instead, around the solve as well"
        )
    with without_autocast(point.device):
        return _measured(image, point, num_vectors, num_restarts, tolerance)


def _measured(
    image: Map, point: Tensor, num_vectors: int, num_restarts: int, tolerance: float
) -> Spectrum:
    with torch.enable_grad():
        at = point.detach().requires_grad_()
        taped = Iterate(at, image(at))
    batch, width = taped.z.shape
    if not taped.fz.requires_grad or batch * width == 0:
        zero = taped.z.new_zeros(batch)
        none = torch.zeros(batch, 1, dtype=torch.complex128)
        return Spectrum(zero, zero, zero, zero == 0, none, 0)
    product = transposed_jacobian(taped)
    size = min(num_vectors, width)
    # The same for all samples: what a sample is told must not depend on its place in the batch.
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(1, width, generator=draw).to(taped.z).expand(batch, width)
    basis, hessenberg = _arnoldi(product, start, size)
    values, vectors, error = _ritz(hessenberg)
    num_products = size
    for _ in range(num_restarts):
        if bool((error <= tolerance).all()):
            break
        # The real part alone: its Krylov space holds both halves of a complex pair.
        leading = vectors[:, :, 0].real.to(basis)
        start = torch.bmm(leading.unsqueeze(1), basis[:, :size]).squeeze(1)
        basis, hessenberg = _arnoldi(product, start, size)
        new_values, vectors, new_error = _ritz(hessenberg)
        # A sample that was done stays as it is, whatever it is batched with.
        better = (error > tolerance) & (new_error < error)
        values = torch.where(better.unsqueeze(1), new_values, values)
        error = torch.where(better, new_error, error)
        num_products += size
    largest = values[:, 0]
    return Spectrum(
        radius=largest.abs().to(taped.z),
        angle=largest.angle().abs().to(taped.z),
        error=error.to(taped.z),
        converged=(error <= tolerance).to(taped.z.device),
        eigenvalues=values,
        num_products=num_products,
    )


def _arnoldi(
    product: Callable[[Tensor], Tensor], start: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Orthonormal basis (B, m + 1, D) and H (B, m + 1, m) in float64, with A V_m = V_{m+1} H."""
    batch, width = start.shape
    basis = start.new_zeros(batch, size + 1, width)
    hessenberg = start.new_zeros(batch, size + 1, size)
    basis[:, 0] = start / torch.linalg.vector_norm(start, dim=1, keepdim=True).clamp_min(1e-30)
    for k in range(size):
        vector = product(basis[:, k])
        norm = torch.linalg.vector_norm(vector, dim=1)
        for _ in range(2):  # once is not enough when the vector nearly lies in the space
            column = inner_products(vector, basis[:, : k + 1]).unsqueeze(2)
            vector = vector - torch.bmm(column.transpose(1, 2), basis[:, : k + 1]).squeeze(1)
            hessenberg[:, : k + 1, k] += column.squeeze(2)
        length = torch.linalg.vector_norm(vector, dim=1)
        # What is left of rounding is no direction: the space is invariant and H decouples.
        exhausted = length <= 10 * torch.finfo(length.dtype).eps * norm
        length = torch.where(exhausted, 0.0, length)
        hessenberg[:, k + 1, k] = length
        scale = torch.where(exhausted, 0.0, 1.0 / length.clamp_min(1e-30))
        basis[:, k + 1] = vector * scale.unsqueeze(1)
    return basis, hessenberg.cpu().double()  # small, and eigenvalues are found on the host


def _ritz(hessenberg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of H by falling modulus, their vectors, relative error of the largest."""
    size = hessenberg.shape[2]
    finite = torch.isfinite(hessenberg).all(dim=(1, 2))
    square = torch.where(finite.view(-1, 1, 1), hessenberg[:, :size], 0.0)
    values, vectors = torch.linalg.eig(square)
    order = values.abs().argsort(dim=1, descending=True)
    values = values.gather(1, order)
    vectors = vectors.gather(2, order.unsqueeze(1).expand_as(vectors))
    residual = hessenberg[:, size, size - 1].abs() * vectors[:, -1, 0].abs()
    bound = residual * _condition(square, values[:, 0], vectors[:, :, 0])
    error = bound / values[:, 0].abs().clamp_min(1e-30)
    nan = torch.tensor(torch.nan, dtype=error.dtype)
    return (
        torch.where(finite.unsqueeze(1), values, nan),
        vectors,
        torch.where(finite, error, nan),
    )


def _condition(matrix: Tensor, value: Tensor, right: Tensor) -> Tensor:
    """1 / |y^H x| (B,) of an eigenvalue: how much faster it moves than the matrix is disturbed."""
    values, vectors = torch.linalg.eig(matrix.mT)
    nearest = (values - value.unsqueeze(1)).abs().argmin(1)
    left = vectors.gather(2, nearest.view(-1, 1, 1).expand(-1, len(matrix[0]), 1)).squeeze(2)
    # matrix^T y = value y, so that y^T x without conjugation is the inner product meant
    return 1.0 / (left * right).sum(1).abs().clamp_min(1e-12)
