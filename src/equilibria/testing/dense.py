"""The slow and certain answers: everything written out as matrices and solved by elimination.

For small problems only: memory and time grow with the square and the cube of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.core.problem import Problem
from equilibria.core.state import State
from equilibria.testing.expect import rows

Map = Callable[[Tensor], Tensor]


def jacobian(f: Map, z: Tensor) -> Tensor:
    """The Jacobian df/dz of every sample, (B, D, D), for `z` (B, ...) with D = numel per sample.

    Entry [b, i, j] is d f(z)[b, i] / d z[b, j]. Samples are taken to be independent: what one
    does to another is not in these blocks (`full_jacobian` has it).
    """
    with torch.enable_grad():
        free = z.detach().requires_grad_()
        image = rows(f(free))
        if not image.requires_grad:  # a map that ignores z and everything else
            return z.new_zeros(z.shape[0], image.shape[1], image.shape[1])
        gradients = [
            torch.autograd.grad(image[:, i].sum(), free, retain_graph=True, materialize_grads=True)
            for i in range(image.shape[1])
        ]
    if not gradients:
        return z.new_zeros(z.shape[0], 0, 0)
    return torch.stack([rows(gradient) for (gradient,) in gradients], dim=1)


def full_jacobian(f: Map, z: Tensor) -> Tensor:
    """The Jacobian of the whole batch, (B * D, B * D), cross-sample blocks included."""
    batch = z.shape[0]
    as_one = jacobian(lambda flat: f(flat.view_as(z)).reshape(1, -1), z.reshape(1, -1))
    return as_one.squeeze(0) if batch else as_one.reshape(0, 0)


def spectral_radius(matrices: Tensor) -> Tensor:
    """Largest modulus of the eigenvalues of (B, D, D) matrices, complex ones included; (B,)."""
    if matrices.numel() == 0:
        return matrices.new_zeros(matrices.shape[0])
    return torch.linalg.eigvals(matrices).abs().amax(-1)


def newton(f: Map, z0: Tensor, *, tolerance: float = 1e-13, max_steps: int = 200) -> Tensor:
    """The fixed point by Newton's method with dense Jacobians and step halving, in float64.

    Args:
        f: the map in float64, each sample on its own.
        z0: where to start, (B, ...).
        tolerance: for the largest |f(z) - z| of every sample, relative to 1 + its largest |z|.
        max_steps: Newton steps at most.

    Raises:
        UserError: no fixed point was found from here.
    """
    z = z0.detach().double()
    best = torch.full((z.shape[0],), torch.inf, dtype=torch.float64, device=z.device)
    for _ in range(max_steps):
        residual = rows((f(z) - z).detach())
        best = _size(residual) / (1.0 + _size(rows(z)))
        if bool((best <= tolerance).all()):
            return z
        matrix = torch.eye(residual.shape[1]).to(residual) - jacobian(f, z)
        step, info = torch.linalg.solve_ex(matrix, residual)
        usable = (info == 0) & torch.isfinite(step).all(1)
        step = torch.where(usable.unsqueeze(1), step, residual).view_as(z)
        z = _halve_until_better(f, z, step, _size(residual))
    raise UserError(
        f"the dense Newton reference found no fixed point: the relative residual is still "
        f"{float(best.max()):.1e} after {max_steps} steps; start nearer to it"
    )


def implicit_gradients(
    f: Callable[[State], State], z_star: State, cotangent: State, inputs: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The exact gradients g^T (I - J)^-1 df/dinputs of a fixed point, for a loss with dL/dz* = g.

    J is that of the whole batch, so a map that couples samples gets its true gradient too.

    Args:
        f: the map; a tensor or a tree of tensors in and out.
        z_star: its fixed point.
        cotangent: g, of the form of `z_star`.
        inputs: tensors that require a gradient: parameters, inputs of the model, closures.

    Returns:
        One gradient per input, zeros where f does not depend on it.
    """
    packed = Problem(f, z_star)
    point = packed.z0.detach()
    g = packed.layout.pack(cotangent).reshape(-1)
    matrix = full_jacobian(packed.image, point)
    u = torch.linalg.solve(torch.eye(len(g)).to(matrix) - matrix.mT, g)
    with torch.enable_grad():
        image = packed.image(point)
    return torch.autograd.grad(
        image,
        list(inputs),
        u.view_as(image).to(image.dtype),
        # Parts of the graph outside of f belong to the caller.
        retain_graph=True,
        materialize_grads=True,
    )


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest |a - b| / |b| over pairs of tensors; plain |a| where b is zero."""
    errors = [0.0]
    for a, b in zip(found, wanted, strict=True):
        scale = float(b.norm())
        errors.append(float((a.double() - b.double()).norm()) / (scale if scale > 0 else 1.0))
    return max(errors)


def _size(x: Tensor) -> Tensor:
    return x.abs().amax(1) if x.numel() else x.new_zeros(x.shape[0])


def _halve_until_better(f: Map, z: Tensor, step: Tensor, before: Tensor) -> Tensor:
    """z + step, the step halved per sample while the residual would grow."""
    length = torch.ones_like(before)
    for _ in range(30):
        scaled = step * length.view(-1, *(1,) * (z.dim() - 1))
        after = _size(rows((f(z + scaled) - (z + scaled)).detach()))
        worse = ~(after < before) & (before > 0)
        if not bool(worse.any()):
            break
        length = torch.where(worse, 0.5 * length, length)
    return z + step * length.view(-1, *(1,) * (z.dim() - 1))
