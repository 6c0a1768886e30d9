"""Problem families for the comparison with other libraries: z = f(z), single samples, float64.

Every family is a list of instances drawn from stated seeds, at sizes (50 to 10,000 unknowns) where
a quasi-Newton method cannot simply learn the whole Jacobian. The small problems with known
solutions that the tests use are in `equilibria.testing.problems`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from equilibria.models.deq_transformer import DEQTransformerCell, DEQTransformerConfig

NUM_INSTANCES = 5


@dataclass(frozen=True)
class Instance:
    """One map (1, D) -> (1, D) in float64, and where solvers start."""

    f: Callable[[Tensor], Tensor]
    z0: Tensor

    @property
    def size(self) -> int:
        """Number of unknowns D."""
        return self.z0.shape[1]


@dataclass(frozen=True)
class Family:
    """Problems of one kind; `draw(seed)` makes the instance of a seed."""

    name: str
    about: str
    draw: Callable[[int], Instance]

    def instances(self) -> Iterator[tuple[int, Instance]]:
        """The instances with their seeds 0, 1, ..."""
        for seed in range(NUM_INSTANCES):
            yield seed, self.draw(seed)


def _tanh_contraction(radius: float) -> Callable[[int], Instance]:
    def draw(seed: int) -> Instance:
        draw = _generator(seed)
        weight = _with_radius(_normal(draw, 100, 100), radius)
        return _tanh(weight, 0.1 * _normal(draw, 1, 100))

    return draw


def _non_normal(seed: int) -> Instance:
    draw = _generator(seed)
    basis = _orthogonal(draw, 60)
    triangle = torch.triu(_normal(draw, 60, 60), 1) * 0.25
    weight = basis @ (triangle + torch.diag(torch.linspace(-0.8, 0.8, 60).double())) @ basis.mT
    return _tanh(weight, 0.1 * _normal(draw, 1, 60))


def _expansive_real(seed: int) -> Instance:
    """A linear map plus a bounded nonlinear one, eigenvalues of both signs beyond 1."""
    draw = _generator(seed)
    eigenvalues = torch.cat(
        [_uniform(draw, -0.9, 0.8, 92), _uniform(draw, -3.0, -1.2, 6), _uniform(draw, 1.4, 2.5, 2)]
    )
    basis, x = _orthogonal(draw, 100), _normal(draw, 1, 100)
    weight = basis @ torch.diag(eigenvalues) @ basis.mT
    return Instance(lambda z: z @ weight.mT + 0.1 * torch.sin(z) + x, torch.zeros_like(x))


def _expansive_complex(seed: int) -> Instance:
    draw = _generator(seed)
    moduli = torch.cat([_uniform(draw, 0.0, 0.8, 44), _uniform(draw, 1.1, 2.0, 6)])
    angles = _uniform(draw, 0.25 * math.pi, math.pi, 50)
    basis, x = _orthogonal(draw, 100), _normal(draw, 1, 100)
    weight = basis @ _planes(moduli, angles) @ basis.mT
    return Instance(lambda z: z @ weight.mT + 0.1 * torch.sin(z) + x, torch.zeros_like(x))


def _rotation(seed: int) -> Instance:
    draw = _generator(seed)
    moduli, angles = torch.full((50,), 0.95).double(), _uniform(draw, 0.2, math.pi, 50)
    basis = _orthogonal(draw, 100)
    return _tanh(basis @ _planes(moduli, angles) @ basis.mT, 0.3 * _normal(draw, 1, 100))


def _stiff(seed: int) -> Instance:
    """1 - eigenvalue spread evenly in logarithm from 1e-3 to 1."""
    draw = _generator(seed)
    gaps = torch.logspace(-3, 0, 100, dtype=torch.float64)
    basis, x = _orthogonal(draw, 100), _normal(draw, 1, 100)
    weight = basis @ torch.diag(1.0 - gaps) @ basis.mT
    return Instance(lambda z: z @ weight.mT + 0.01 * torch.sin(z) + x, torch.zeros_like(x))


def _near_singular(seed: int) -> Instance:
    """tanh(W z + x) with one eigenvalue of the Jacobian within 1e-2 of 1 near the solution."""
    draw = _generator(seed)
    basis = _orthogonal(draw, 100)
    eigenvalues = torch.cat([torch.ones(1).double(), _uniform(draw, -0.9, 0.6, 99)])
    weight = basis @ torch.diag(eigenvalues) @ basis.mT
    return _tanh(weight, 0.02 * _normal(draw, 1, 100))


def _multiple(seed: int) -> Instance:
    """A Hopfield network with gain 1.5: many fixed points, start near none of them."""
    draw = _generator(seed)
    weight = _normal(draw, 100, 100)
    weight = _with_radius(weight + weight.mT, 1.5)
    return _tanh(weight, 0.1 * _normal(draw, 1, 100), z0=0.5 * _normal(draw, 1, 100))


def _transformer(seed: int) -> Instance:
    """The block of the DEQ-Transformer, 16 positions x 32, weights as large as training makes."""
    draw = _generator(seed)
    config = DEQTransformerConfig(
        d_model=32, num_heads=4, d_inner=64, weight_norm=False, dropout=0.0
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cell = DEQTransformerCell(config).double().requires_grad_(False).eval()
    for parameter in cell.parameters():
        parameter.normal_(std=0.2, generator=draw)
    injection = cell.inject(_normal(draw, 1, 16, 32))

    def f(z: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the only one with forward-mode derivatives
            return cell(z.view(1, 16, 32), injection).reshape(1, -1)

    return Instance(f, torch.zeros(1, 16 * 32, dtype=torch.float64))


def _conv_block(seed: int) -> Instance:
    """A residual block as in multiscale DEQs: convolutions, group norms, a strong injection."""
    draw = _generator(seed)
    channels, side = 12, 8
    expand = 0.25 * _normal(draw, 2 * channels, channels, 3, 3)
    contract = 0.15 * _normal(draw, channels, 2 * channels, 3, 3)
    x = 2.0 * _normal(draw, 1, channels, side, side)

    def f(z: Tensor) -> Tensor:
        z = z.view_as(x)
        inner = F.relu(F.group_norm(F.conv2d(z, expand, padding=1), 4))
        mixed = F.group_norm(F.conv2d(inner, contract, padding=1) + x, 4)
        return F.group_norm(F.relu(mixed + z), 4).reshape(1, -1)

    return Instance(f, torch.zeros(1, x.numel(), dtype=torch.float64))


def _bratu(seed: int) -> Instance:
    """u = (-Laplace)^-1 lambda e^u on a 20 x 20 grid, lambda up to near the turning point 6.81."""
    side, strength = 20, (5.0, 6.0, 6.5, 6.7, 6.8)[seed]
    step = 1.0 / (side + 1)
    second = 2 * torch.eye(side) - torch.diag(torch.ones(side - 1), 1)
    second = (second - torch.diag(torch.ones(side - 1), -1)).double() / step**2
    identity = torch.eye(side).double()
    inverse = torch.linalg.inv(torch.kron(second, identity) + torch.kron(identity, second))
    return Instance(lambda u: strength * torch.exp(u) @ inverse, torch.zeros(1, side**2).double())


def _chandrasekhar(seed: int) -> Instance:
    """The H-equation of radiative transfer, 200 nodes, with c up to near the singular c = 1."""
    num_nodes, c = 200, (0.5, 0.9, 0.99, 0.999, 0.9999)[seed]
    mu = (torch.arange(num_nodes).double() + 0.5) / num_nodes
    kernel = 0.5 * c * mu.unsqueeze(1) / (mu.unsqueeze(1) + mu) / num_nodes
    return Instance(
        lambda h: 1.0 / (1.0 - h @ kernel.mT), torch.ones(1, num_nodes, dtype=torch.float64)
    )


def _adjoint(seed: int) -> Instance:
    """The backward system of a tanh layer: u = J^T u + g, spectral radius 0.97."""
    draw = _generator(seed)
    slopes = _uniform(draw, 0.3, 1.0, 200).unsqueeze(1)
    jacobian = _with_radius(slopes * _normal(draw, 200, 200), 0.97)
    g = _normal(draw, 1, 200)
    return Instance(lambda u: u @ jacobian + g, g)


def _high_dimensional(seed: int) -> Instance:
    """tanh(conv(z) + x) on 10 x 32 x 32, kernels scaled so that plain iteration just converges."""
    draw = _generator(seed)
    kernel, x = _normal(draw, 10, 10, 3, 3), 0.3 * _normal(draw, 1, 10, 32, 32)
    kernel = 1.05 * kernel / math.sqrt(10 * 9)
    return Instance(
        lambda z: torch.tanh(F.conv2d(z.view_as(x), kernel, padding=1) + x).reshape(1, -1),
        torch.zeros(1, x.numel(), dtype=torch.float64),
    )


FAMILIES = (
    Family("tanh, radius 0.5", "tanh(Wz + x), D = 100", _tanh_contraction(0.5)),
    Family("tanh, radius 0.9", "tanh(Wz + x), D = 100", _tanh_contraction(0.9)),
    Family("tanh, radius 0.99", "tanh(Wz + x), D = 100", _tanh_contraction(0.99)),
    Family("non-normal", "tanh(Wz + x), W far from normal, D = 60", _non_normal),
    Family("expansive, real", "eigenvalues -3 to 2.5, none near 1, D = 100", _expansive_real),
    Family("expansive, complex", "complex pairs of modulus up to 2, D = 100", _expansive_complex),
    Family("rotation", "all eigenvalues of modulus 0.95, D = 100", _rotation),
    Family("stiff", "eigenvalues 0 to 0.999, D = 100", _stiff),
    Family("near-singular", "one eigenvalue of J close to 1, D = 100", _near_singular),
    Family("multiple fixed points", "symmetric tanh network, gain 1.5, D = 100", _multiple),
    Family("transformer block", "DEQ-Transformer cell, 16 x 32", _transformer),
    Family("convolutional block", "MDEQ-like cell, 12 x 8 x 8", _conv_block),
    Family("Bratu", "-Laplace u = lambda e^u, 20 x 20", _bratu),
    Family("H-equation", "Chandrasekhar's, 200 nodes", _chandrasekhar),
    Family("adjoint", "u = J^T u + g, radius 0.97, D = 200", _adjoint),
    Family("high-dimensional", "tanh(conv(z) + x), D = 10,240", _high_dimensional),
)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=draw)


def _uniform(draw: torch.Generator, low: float, high: float, count: int) -> Tensor:
    return low + (high - low) * torch.rand(count, dtype=torch.float64, generator=draw)


def _orthogonal(draw: torch.Generator, size: int) -> Tensor:
    return torch.linalg.qr(_normal(draw, size, size))[0]


def _with_radius(weight: Tensor, radius: float) -> Tensor:
    return weight * (radius / torch.linalg.eigvals(weight).abs().max())


def _planes(moduli: Tensor, angles: Tensor) -> Tensor:
    """Block diagonal with one scaled rotation of a plane for each modulus and angle."""
    cos, sin = moduli * torch.cos(angles), moduli * torch.sin(angles)
    blocks = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    return torch.block_diag(*blocks)


def _tanh(weight: Tensor, x: Tensor, z0: Tensor | None = None) -> Instance:
    start = torch.zeros_like(x) if z0 is None else z0
    return Instance(lambda z: torch.tanh(z @ weight.mT + x), start)
