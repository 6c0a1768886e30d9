"""Fixed-point problems with known solutions, easy ones and every known way to be hard.

Each is a function of (batch, dtype, seed). Parameters are drawn in float64, rounded to `dtype`,
and `z_star` is the fixed point of the rounded map to float64 accuracy: a float32 solve is
compared with the truth about the map it was given. Samples of a batch differ in difficulty, so
that they finish at different steps.

Tags say what is special:
    contraction     plain iteration converges within about a hundred steps
    expansive       spectral radius at the fixed point above 1: plain iteration diverges
    linear          f(z) = A z + c
    non_normal      errors grow before they fall
    complex         rotates: eigenvalues in complex pairs
    stiff           eigenvalues close to 1 and far from it
    multiple        more than one fixed point; z_star is the one plain iteration finds
    singular        I - J is singular at the fixed point: it exists, but converges sublinearly
                    and has no implicit gradient
    no_solution     there is no fixed point; z_star is None
    non_finite      f is NaN in parts of the space
    half            everything is exact in bfloat16
    shaped          the state of a sample is no vector
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from equilibria.core.errors import UserError, nearest
from equilibria.testing.dense import jacobian, newton, spectral_radius

WIDTH = 6


@dataclass(frozen=True)
class FixedPointProblem:
    """Find z with z = map(z, *inputs, *weights), each sample of the batch on its own.

    Args:
        name: as in `PROBLEMS`.
        map: the map as a pure function of everything it depends on.
        z0: where solvers start, (B, ...).
        z_star: the fixed point in float64 whatever the dtype of the rest, or None.
        inputs: tensors (B, ...) that belong to single samples.
        weights: tensors shared by all samples.
        tags: what is special, see the module.
    """

    name: str
    map: Callable[..., Tensor]
    z0: Tensor
    z_star: Tensor | None
    inputs: tuple[Tensor, ...] = ()
    weights: tuple[Tensor, ...] = ()
    tags: frozenset[str] = frozenset()

    def f(self, z: Tensor) -> Tensor:
        """The map, (B, ...) -> (B, ...)."""
        return self.map(z, *self.inputs, *self.weights)

    def jacobian(self, z: Tensor) -> Tensor:
        """The dense Jacobian of every sample at `z`, (B, D, D)."""
        return jacobian(self.f, z)

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """Everything the map depends on besides z."""
        return (*self.inputs, *self.weights)

    @property
    def spectral_radius(self) -> Tensor:
        """That of the Jacobian at the fixed point, (B,) in float64; NaN where there is none."""
        if self.z_star is None:
            return torch.full((self.z0.shape[0],), torch.nan, dtype=torch.float64)
        exact = self.to(torch.float64)
        return spectral_radius(exact.jacobian(self.z_star))

    @property
    def conditioning(self) -> Tensor:
        """Norm of (I - J)^-1 at the fixed point, (B,): error per residual; inf where singular."""
        if self.z_star is None:
            return torch.full((self.z0.shape[0],), torch.inf, dtype=torch.float64)
        matrices = self.to(torch.float64).jacobian(self.z_star)
        smallest = torch.linalg.svdvals(torch.eye(matrices.shape[1]).to(matrices) - matrices)[:, -1]
        return torch.where(smallest > 1e-12, 1.0 / smallest, torch.inf)

    def rows(self, rows: slice) -> FixedPointProblem:
        """The same problem for some of its samples."""
        return replace(
            self,
            z0=self.z0[rows],
            z_star=None if self.z_star is None else self.z_star[rows],
            inputs=tuple(tensor[rows] for tensor in self.inputs),
        )

    def to(self, target: torch.dtype | torch.device | str) -> FixedPointProblem:
        """The same problem in another dtype or on another device; z_star stays in float64."""
        star = self.z_star
        if star is not None and not isinstance(target, torch.dtype):
            star = star.to(target)
        return replace(
            self,
            z0=self.z0.to(target),
            z_star=star,
            inputs=tuple(tensor.to(target) for tensor in self.inputs),
            weights=tuple(tensor.to(target) for tensor in self.weights),
        )

    def differentiable(self) -> FixedPointProblem:
        """The same problem with fresh sources that require gradients."""
        return replace(
            self,
            inputs=tuple(tensor.detach().clone().requires_grad_() for tensor in self.inputs),
            weights=tuple(tensor.detach().clone().requires_grad_() for tensor in self.weights),
        )


# --- linear ------------------------------------------------------------------------------------


def symmetric(
    batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> FixedPointProblem:
    """f(z) = A z + c, A symmetric, eigenvalues of both signs, radius .1 to .8 over the batch."""
    draw = _generator(seed)
    basis, z_star = _orthogonal(draw), _solution(draw, batch)
    eigenvalues = _over_batch(0.1, 0.8, batch) * torch.linspace(-1, 1, WIDTH, dtype=torch.float64)
    matrix = basis @ torch.diag_embed(eigenvalues) @ basis.mT
    return _linear("symmetric", matrix, z_star, dtype, "contraction")


def nonsymmetric(
    batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> FixedPointProblem:
    """f(z) = A z + c with random A of norm .2 to .9 over the batch."""
    draw = _generator(seed)
    matrix, z_star = _normal(draw, batch, WIDTH, WIDTH), _solution(draw, batch)
    norms = torch.linalg.matrix_norm(matrix, 2).view(batch, 1, 1)
    matrix = matrix / norms * _over_batch(0.2, 0.9, batch).unsqueeze(2)
    return _linear("nonsymmetric", matrix, z_star, dtype, "contraction")


def non_normal(
    batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> FixedPointProblem:
    """f(z) = A z + c, all eigenvalues .5 but a norm of about 5: errors grow before they fall."""
    draw = _generator(seed)
    basis, z_star = _orthogonal(draw), _solution(draw, batch)
    triangle = 2.0 * torch.triu(_normal(draw, batch, WIDTH, WIDTH), 1)
    matrix = basis @ (triangle + 0.5 * torch.eye(WIDTH, dtype=torch.float64)) @ basis.mT
    return _linear("non_normal", matrix, z_star, dtype, "contraction", "non_normal")


def rotation(
    batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> FixedPointProblem:
    """f(z) = A z + c, A a rotation in planes shrunk to .3 to .8: complex pairs of one modulus."""
    draw = _generator(seed)
    basis, z_star = _orthogonal(draw), _solution(draw, batch)
    angles = torch.linspace(0.5, 2.5, WIDTH // 2, dtype=torch.float64)
    planes = torch.block_diag(
        *(
            torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]).double()
            for a in angles.tolist()
        )
    )
    matrix = _over_batch(0.3, 0.8, batch).unsqueeze(2) * (basis @ planes @ basis.mT)
    return _linear("rotation", matrix, z_star, dtype, "contraction", "complex")


def expansive_linear(
    batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> FixedPointProblem:
    """f(z) = A z + c with eigenvalues -3 to 2, none of them 1."""
    draw = _generator(seed)
    eigenvalues = torch.tensor([-3.0, -1.5, -0.5, 0.2, 0.6, 2.0]).double()
    basis, z_star = _orthogonal(draw), _solution(draw, batch)
    matrix = (basis @ torch.diag(eigenvalues) @ basis.mT).expand(batch, -1, -1)
    return _linear("expansive_linear", matrix, z_star, dtype, "expansive")


def stiff(batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> FixedPointProblem:
    """f(z) = A z + c with eigenvalues .1 to .999: plain iteration needs thousands of steps."""
    draw = _generator(seed)
    eigenvalues = torch.tensor([0.1, 0.5, 0.8, 0.9, 0.99, 0.999]).double()
    basis, z_star = _orthogonal(draw), _solution(draw, batch)
    matrix = (basis @ torch.diag(eigenvalues) @ basis.mT).expand(batch, -1, -1)
    return _linear("stiff", matrix, z_star, dtype, "stiff")


def constant(
    batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> FixedPointProblem:
    """f(z) = c, solved by one step; J = 0, and differences of images are exactly zero."""
    z_star = _solution(_generator(seed), batch)

    def f(z: Tensor, c: Tensor) -> Tensor:
        return c.expand_as(z)

    return _build("constant", f, torch.zeros_like(z_star), dtype, (z_star,), (), "contraction")


def half_precision(
    batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> FixedPointProblem:
    """f(z) = z reversed / 2 + c, with map and fixed point exact in bfloat16."""
    steps = torch.randint(-8, 9, (batch, WIDTH), generator=_generator(seed))
    z_star = steps.double() / 4.0

    def f(z: Tensor, c: Tensor) -> Tensor:
        return 0.5 * z.flip(1) + c

    c = z_star - 0.5 * z_star.flip(1)
    return _build("half_precision", f, torch.zeros_like(c), dtype, (c,), (), "contraction", "half")


# --- nonlinear ---------------------------------------------------------------------------------


def tanh(batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> FixedPointProblem:
    """f(z) = tanh(W z + x), |W| = .9: the textbook DEQ cell."""
    draw = _generator(seed)
    weight, x = _orthogonal(draw) * 0.9, _over_batch(0.1, 2.0, batch) * _normal(draw, batch, WIDTH)
    return _build("tanh", _tanh_map, torch.zeros_like(x), dtype, (x,), (weight,), "contraction")


def expansive_tanh(
    batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> FixedPointProblem:
    """f(z) = tanh(W z + x) with eigenvalues of W down to -3: one fixed point, and it repels."""
    draw = _generator(seed)
    basis, x = _orthogonal(draw), 0.2 * _normal(draw, batch, WIDTH)
    weight = basis @ torch.diag(torch.linspace(-3.0, 0.5, WIDTH, dtype=torch.float64)) @ basis.mT
    return _build(
        "expansive_tanh", _tanh_map, torch.zeros_like(x), dtype, (x,), (weight,), "expansive"
    )


def multiple(
    batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> FixedPointProblem:
    """f(z) = tanh(gain z) with gain 1.5 to 3: each component has fixed points -s, 0 and s."""
    draw = _generator(seed)
    gain = _over_batch(1.5, 3.0, batch)
    z0 = 0.3 * torch.randint(0, 2, (batch, WIDTH), generator=draw).double() - 0.15

    def f(z: Tensor, gain: Tensor) -> Tensor:
        return torch.tanh(gain * z)

    start = z0.sign() * 0.95  # so that Newton finds the one that plain iteration finds
    return _build("multiple", f, z0, dtype, (gain,), (), "contraction", "multiple", start=start)


def zero(batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> FixedPointProblem:
    """f(z) = gain sin(z reversed): fixed point at 0, where a relative residual means little."""
    gain = _over_batch(0.1, 0.8, batch)
    z0 = _solution(_generator(seed), batch)

    def f(z: Tensor, gain: Tensor) -> Tensor:
        return gain * torch.sin(z.flip(1))

    star = torch.zeros_like(z0)
    return _build("zero", f, z0, dtype, (gain,), (), "contraction", start=star)


def singular(
    batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> FixedPointProblem:
    """f(z) = c + sin(z - c), J = I at the fixed point c: convergence like 1 / sqrt(steps)."""
    c = torch.randint(-8, 9, (batch, WIDTH), generator=_generator(seed)).double() / 8.0

    def f(z: Tensor, c: Tensor) -> Tensor:
        return c + torch.sin(z - c)

    return _build("singular", f, c + 1.0, dtype, (c,), (), "singular", start=c)


def no_fixed_point(
    batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> FixedPointProblem:
    """f(z) = z + 1: there is nothing to find, and saying so is the right answer."""

    def f(z: Tensor) -> Tensor:
        return z + 1.0

    z0 = _solution(_generator(seed), batch).to(dtype)
    return FixedPointProblem("no_fixed_point", f, z0, None, tags=frozenset({"no_solution"}))


def nan_outside_ball(
    batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> FixedPointProblem:
    """NaN where rms(z) > 4, else A z + c: samples 0, 2, ... contract, 1, 3, ... are thrown out."""
    draw = _generator(seed)
    z_star = _solution(draw, batch)
    slope = torch.where(torch.arange(batch) % 2 == 0, 0.5, -3.0).double().unsqueeze(1)

    def f(z: Tensor, slope: Tensor, c: Tensor) -> Tensor:
        size = z.square().mean(1, keepdim=True).sqrt()
        return torch.where(size > 4.0, torch.nan, slope * z + c)

    c = z_star - slope * z_star
    return _build("nan_outside_ball", f, torch.zeros_like(c), dtype, (slope, c), (), "non_finite")


def convolution(
    batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> FixedPointProblem:
    """f(z) = tanh(conv(z) + x) on images (B, 2, 4, 4): a convolutional cell."""
    draw = _generator(seed)
    kernel = 0.12 * _normal(draw, 2, 2, 3, 3)
    x = _over_batch(0.2, 2.0, batch).view(batch, 1, 1, 1) * _normal(draw, batch, 2, 4, 4)

    def f(z: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
        return torch.tanh(F.conv2d(z, kernel, padding=1) + x)

    z0 = torch.zeros_like(x)
    return _build("convolution", f, z0, dtype, (x,), (kernel,), "contraction", "shaped")


def attention(
    batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> FixedPointProblem:
    """f(z) = tanh(softmax(z Q (z K)^T) z V + x) on sequences (B, 5, 4): an attention cell."""
    draw = _generator(seed)
    query, key = _normal(draw, 4, 4) * 0.5, _normal(draw, 4, 4) * 0.5
    value = torch.linalg.qr(_normal(draw, 4, 4))[0] * 0.7
    x = _over_batch(0.2, 2.0, batch).unsqueeze(2) * _normal(draw, batch, 5, 4)

    def f(z: Tensor, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = torch.softmax((z @ query) @ (z @ key).mT / 2.0, dim=-1)
        return torch.tanh(weights @ (z @ value) + x)

    z0, weights = torch.zeros_like(x), (query, key, value)
    return _build("attention", f, z0, dtype, (x,), weights, "contraction", "shaped")


PROBLEMS: dict[str, Callable[[int, torch.dtype, int], FixedPointProblem]] = {
    build.__name__: build
    for build in (
        symmetric,
        nonsymmetric,
        non_normal,
        rotation,
        expansive_linear,
        stiff,
        constant,
        half_precision,
        tanh,
        expansive_tanh,
        multiple,
        zero,
        singular,
        no_fixed_point,
        nan_outside_ball,
        convolution,
        attention,
    )
}
"""Every problem by its name."""


def problem(
    name: str, batch: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0
) -> FixedPointProblem:
    """Build the problem called `name`.

    Raises:
        UserError: there is none of that name.
    """
    if name not in PROBLEMS:
        raise UserError(f"no problem is called {name!r}{nearest(name, PROBLEMS)}")
    return PROBLEMS[name](batch, dtype, seed)


# --- what they are made of ---------------------------------------------------------------------


def _build(
    name: str,
    f: Callable[..., Tensor],
    z0: Tensor,
    dtype: torch.dtype,
    inputs: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    *tags: str,
    start: Tensor | None = None,
) -> FixedPointProblem:
    """Round everything to `dtype`, then find the fixed point of the rounded map in float64."""
    rounded = FixedPointProblem(
        name,
        f,
        z0.to(dtype),
        None,
        tuple(tensor.to(dtype).contiguous() for tensor in inputs),
        tuple(tensor.to(dtype).contiguous() for tensor in weights),
        frozenset(tags),
    )
    exact = rounded.to(torch.float64)
    return replace(rounded, z_star=newton(exact.f, exact.z0 if start is None else start))


def _linear(
    name: str, matrix: Tensor, z_star: Tensor, dtype: torch.dtype, *tags: str
) -> FixedPointProblem:
    c = z_star - (matrix * z_star.unsqueeze(1)).sum(2)
    return _build(name, _linear_map, torch.zeros_like(c), dtype, (matrix, c), (), "linear", *tags)


def _linear_map(z: Tensor, matrix: Tensor, c: Tensor) -> Tensor:
    # A sum and no product of matrices: the order of additions must not depend on the batch size.
    return (matrix * z.unsqueeze(1)).sum(2) + c


def _tanh_map(z: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh((weight * z.unsqueeze(1)).sum(2) + x)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=draw)


def _orthogonal(draw: torch.Generator) -> Tensor:
    return torch.linalg.qr(_normal(draw, WIDTH, WIDTH))[0]


def _solution(draw: torch.Generator, batch: int) -> Tensor:
    return _normal(draw, batch, WIDTH).clamp(-2.0, 2.0)


def _over_batch(low: float, high: float, batch: int) -> Tensor:
    """(B, 1), from low to high."""
    return torch.linspace(low, high, batch, dtype=torch.float64).unsqueeze(1)
