"""What does each gradient method cost, and how far is it from the exact gradient?

A tanh cell z = tanh(W z + x), 64 wide, batch 16, float64, whose Jacobian at the fixed point has a
given spectral radius (mean over the batch; W is scaled by bisection until it does). The forward
solve is the same for all methods, to a relative residual of 1e-6; the gradient for W and x is
compared with a dense solve of (I - J^T) u = g. Products with the Jacobian are counted by a node
in the graph of f, evaluations by a counter in f, so that nothing is taken from reports.

    python -m benchmarks.gradients
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import save
from equilibria import (
    Adjoint,
    Broyden,
    Implicit,
    NeumannSeries,
    OneStep,
    Phantom,
    Residual,
    Shine,
    Unrolled,
    solve,
)
from equilibria.testing import implicit_gradients, jacobian, spectral_radius

WIDTH, BATCH, SEEDS = 64, 16, range(5)
RADII = (0.3, 0.6, 0.9, 0.97)
METHODS: dict[str, Adjoint] = {
    "OneStep()": OneStep(),
    "Phantom(5, relaxation=0.5)": Phantom(5, 0.5),
    "Phantom(5, relaxation=1)": Phantom(5, 1.0),
    "NeumannSeries(5)": NeumannSeries(5),
    "NeumannSeries(20)": NeumannSeries(20),
    "Shine()": Shine(),
    "Shine(fallback=False)": Shine(fallback=False),
    "Shine(refinement=3)": Shine(refinement=3),
    "Shine(refinement=10)": Shine(refinement=10),
    "Implicit(rtol=1e-1)": Implicit(rtol=1e-1),
    "Implicit(rtol=1e-2)": Implicit(rtol=1e-2),
    "Implicit(rtol=1e-4)": Implicit(rtol=1e-4, max_steps=200),
    "Implicit(rtol=1e-6)": Implicit(rtol=1e-6, max_steps=200),
    "Unrolled()": Unrolled(),
}


class Counter:
    """The map, counting its calls, those that are recorded, and passes back through it."""

    def __init__(self, weight: Tensor, x: Tensor) -> None:
        self.weight, self.x = weight, x
        self.evaluations = self.recorded = self.products = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.evaluations += 1
        image = torch.tanh(z @ self.weight.mT + self.x)
        if image.requires_grad:
            self.recorded += 1
            image.register_hook(self._count)
        return image

    def _count(self, cotangent: Tensor) -> None:
        self.products += 1


@dataclass(frozen=True)
class Measured:
    """One method on one problem."""

    evaluations: int
    recorded: int
    products: int
    cosine: float
    error: float


def problem(radius: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """W and x such that the Jacobian at the fixed point has this mean radius, and a cotangent."""
    draw = torch.Generator().manual_seed(seed)
    shape, x_shape = (WIDTH, WIDTH), (BATCH, WIDTH)
    matrix = torch.randn(shape, generator=draw, dtype=torch.float64) / WIDTH**0.5
    x = 0.5 * torch.randn(x_shape, generator=draw, dtype=torch.float64)
    g = torch.randn(x_shape, generator=draw, dtype=torch.float64)
    low, high = 0.1, 4.0
    for _ in range(20):
        scale = 0.5 * (low + high)
        if radius_at_fixed_point(scale * matrix, x) < radius:
            low = scale
        else:
            high = scale
    return (low * matrix), x, g


def radius_at_fixed_point(weight: Tensor, x: Tensor) -> float:
    """Mean spectral radius of the Jacobian over the batch."""
    f = Counter(weight, x)
    with torch.no_grad():
        z = solve(
            f,
            torch.zeros_like(x),
            solver=Broyden(None),
            termination=Residual(1e-10),
            max_steps=300,
            on_failure="ignore",
        ).z
    return float(spectral_radius(jacobian(f, z)).mean())


def measure(adjoint: Adjoint, weight: Tensor, x: Tensor, g: Tensor) -> Measured:
    """Cost and bias of one method."""
    weight, x = weight.clone().requires_grad_(), x.clone().requires_grad_()
    f = Counter(weight, x)
    solution = solve(
        f,
        torch.zeros_like(x),
        solver=Broyden(None),
        adjoint=adjoint,
        termination=Residual(1e-6),
        max_steps=300,
        on_failure="raise",
    )
    solution.z.backward(g)
    counted = f.evaluations, f.recorded, f.products
    exact = implicit_gradients(f, solution.z.detach(), g, (weight, x))
    found = torch.cat([weight.grad.flatten(), x.grad.flatten()])
    wanted = torch.cat([gradient.flatten() for gradient in exact])
    cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=0)
    return Measured(*counted, float(cosine), float((found - wanted).norm() / wanted.norm()))


def run() -> list[dict[str, Any]]:
    """All methods on all problems; medians over the seeds."""
    rows: list[dict[str, Any]] = []
    for radius in RADII:
        problems = [problem(radius, seed) for seed in SEEDS]
        for name, adjoint in METHODS.items():
            measured = [measure(adjoint, *given) for given in problems]
            medians = {
                field: statistics.median(getattr(each, field) for each in measured)
                for field in Measured.__dataclass_fields__
            }
            rows.append({"spectral_radius": radius, "method": name, **medians})
            print(f"{radius:5} {name:28}", *(f"{value:9.4g}" for value in medians.values()))
    return rows


if __name__ == "__main__":
    save("gradients", seeds=list(SEEDS), width=WIDTH, batch=BATCH, rows=run())
