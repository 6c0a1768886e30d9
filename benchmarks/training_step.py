"""A whole training step: forward solve, backward solve, optimiser; to the same tolerance.

Relative 1e-4 forward and backward. Ours stops when every sample is there, the peers when the
batch's overall norm is; what was reached is measured afterwards in both ways and reported. The
"floor" makes as many evaluations and products as ours did, without a solver.

    python -m benchmarks.training_step [NAME ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import published
from benchmarks.cells import WORKS, Map, Work
from benchmarks.record import save
from benchmarks.timing import Spread, interleave, ratio
from equilibria import Anderson, Broyden, Implicit, Residual, solve
from equilibria.core.adjoint import AttachGraph

TOLERANCE, MAX_STEPS = 1e-4, 60


@dataclass
class Counted:
    """A map that counts its calls, recorded calls and products, for the report only."""

    f: Map
    evaluations: int = 0
    products: int = 0
    points: list[Tensor] = field(default_factory=list)

    def __call__(self, z: Tensor) -> Tensor:
        """Evaluate."""
        self.evaluations += 1
        image = self.f(z)
        if image.requires_grad and z.requires_grad:
            image.register_hook(self._count)
        return image

    def _count(self, cotangent: Tensor) -> None:
        self.products += 1


Solve = Callable[[Map, Tensor], Tensor]
"""f and z0 to z* with its gradient attached."""


def ours(solver: Any, backward: Any = None) -> Solve:
    """With the default backward solver, GMRES, or another."""
    options = {} if backward is None else {"solver": backward}
    adjoint = Implicit(rtol=TOLERANCE, max_steps=MAX_STEPS, **options)
    return lambda f, z0: solve(
        f, z0, solver=solver, adjoint=adjoint, termination=Residual(TOLERANCE, 0.0),
        max_steps=MAX_STEPS, on_failure="ignore",
    ).z  # fmt: skip


def torchdeq(name: str) -> Solve:
    """torchdeq's implicit gradient with the same solver both ways."""
    from torchdeq import get_deq

    layer = get_deq(
        ift=True, f_solver=name, b_solver=name, f_tol=TOLERANCE, b_tol=TOLERANCE,
        f_stop_mode="rel", b_stop_mode="rel", f_max_iter=MAX_STEPS, b_max_iter=MAX_STEPS,
    )  # fmt: skip
    return lambda f, z0: layer(f, z0)[0][-1]


def first_public_code(f: Map, z0: Tensor) -> Tensor:
    """Anderson forward, one recorded evaluation, Broyden backward."""
    with torch.no_grad():
        z, _ = published.anderson(f, z0, max_steps=MAX_STEPS, tolerance=TOLERANCE)
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        image = f(z)

    def backward(g: Tensor) -> Tensor:
        def linear(u: Tensor) -> Tensor:
            return torch.autograd.grad(image, z, u, retain_graph=True)[0] + g

        return published.broyden(linear, torch.zeros_like(g), max_steps=MAX_STEPS,
                                 tolerance=TOLERANCE)[0]  # fmt: skip

    return AttachGraph.apply(z.detach(), image, "published", backward)


METHODS: dict[str, Callable[[], Solve]] = {
    "ours, Anderson + GMRES": lambda: ours(Anderson()),
    "ours, Broyden + GMRES": lambda: ours(Broyden()),
    "torchdeq anderson": lambda: torchdeq("anderson"),
    "torchdeq broyden": lambda: torchdeq("broyden"),
    "published": lambda: first_public_code,
}


def training_step(work: Work, solve_: Solve) -> Callable[[], None]:
    """One step of SGD on a loss that pulls the state to a fixed target."""
    target = torch.randn(work.z0.shape, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(work.module.parameters(), lr=0.0)  # weights stay as they are

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        z = solve_(work.prepare(), work.z0)
        (z - target).square().mean().backward()
        optimizer.step()

    return step


def reached(work: Work, solve_: Solve) -> dict[str, float]:
    """Residual and cost of one step, counted from outside."""
    counted = Counted(work.prepare())
    z = solve_(counted, work.z0)
    evaluations = counted.evaluations
    with torch.no_grad():
        image = counted.f(z.detach())
    residual = image - z.detach()
    per_sample = residual.norm(dim=1) / image.norm(dim=1)
    (z * torch.randn_like(z)).mean().backward()
    return {
        "evaluations": evaluations,
        "products": counted.products,
        "residual": float(residual.norm() / image.norm()),
        "worst_sample": float(per_sample.max()),
    }


def floor(work: Work, evaluations: int, products: int) -> Callable[[], None]:
    """The same numbers of evaluations and products, and nothing else."""

    def step() -> None:
        f = work.prepare()
        z = work.z0
        with torch.no_grad():
            for _ in range(evaluations - 1):
                z = f(z)
        z = z.detach().requires_grad_()
        image = f(z)
        u = image.detach()
        for _ in range(products - 1):
            u = torch.autograd.grad(image, z, u, retain_graph=True)[0]
        image.backward(u)
        work.module.zero_grad(set_to_none=True)

    return step


def measure(name: str) -> dict[str, Any]:
    """All methods on one cell."""
    work = WORKS[name]()
    solves = {method: make() for method, make in METHODS.items()}
    costs = {method: reached(work, solve_) for method, solve_ in solves.items()}
    cases = {method: training_step(work, solve_) for method, solve_ in solves.items()}
    mine = "ours, Anderson + GMRES"
    cases["floor"] = floor(work, int(costs[mine]["evaluations"]), int(costs[mine]["products"]))
    seconds = interleave(cases, rounds=5 if name == "wide transformer" else 9, seconds=0.1)
    peers = [method for method in METHODS if not method.startswith("ours")]
    best_peer = min(peers, key=lambda method: Spread.of(seconds[method]).median)
    ratios = {f"{method} / {mine}": ratio(seconds[method], seconds[mine]) for method in peers}
    ratios[f"{mine} / floor"] = ratio(seconds[mine], seconds["floor"])
    for method, values in seconds.items():
        print(f"{name:18} {method:26} {1e3 * Spread.of(values).median:9.3g} ms  "
              f"{costs.get(method, '')}")  # fmt: skip
    for pair, spread in ratios.items():
        print(f"{name:18} {pair:50} {spread}")
    return {
        "name": name,
        "about": work.about,
        "best_peer": best_peer,
        "milliseconds": {k: Spread.of([1e3 * s for s in v]).as_dict() for k, v in seconds.items()},
        "reached": costs,
        "ratios": {k: v.as_dict() for k, v in ratios.items()},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(WORKS)
    save("training_step", tolerance=TOLERANCE, rows=[measure(name) for name in names])
