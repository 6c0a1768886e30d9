"""How many products with J^T does the backward system take to 1e-3, 1e-4 and 1e-6?

    python -m benchmarks.backward_evaluations [--families Bratu ...]

The system is u = J^T u + g at the fixed point of every instance of every family, with a random
cotangent g; the tolerance is on |J^T u + g - u| / |g|. A solver is asked for a tolerance, its
products are counted, and it has met the tolerance if the point that it returned does, by one more
product of ours. The solvers of torchdeq stop by other criteria, so they are given the benefit of
being stopped at the first point they visit that meets it. Writes `results/backward.json`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from benchmarks.counting import TOLERANCES, Enough
from benchmarks.families import FAMILIES, NUM_INSTANCES, Family, Instance
from benchmarks.record import save
from equilibria import Anderson, Broyden, Residual, solve
from equilibria.core.linear import LinearSolver
from equilibria.linear.bicgstab import BiCGStab
from equilibria.linear.fixed_point import FixedPoint
from equilibria.linear.gmres import GMRES
from equilibria.linear.neumann import Neumann

BUDGET = 300
SLACK = 1.01
"""A recurrence may be wrong about its residual by that much."""


class System:
    """u = a(u) + b for (1, D), with every product counted."""

    def __init__(self, a: Callable[[Tensor], Tensor], b: Tensor) -> None:
        self._a, self.b = a, b
        self.num_products = 0

    def product(self, u: Tensor) -> Tensor:
        """a(u), counted."""
        if self.num_products >= BUDGET:
            raise Enough
        self.num_products += 1
        return self._a(u)

    def residual(self, u: Tensor) -> float:
        """|a(u) + b - u| / |b|, not counted."""
        return float(torch.linalg.vector_norm(self._a(u) + self.b - u) / self.b.norm())


Solve = Callable[[System, float], Tensor]
"""System and tolerance to solution."""


def _ours(solver: LinearSolver) -> Solve:
    def run(system: System, tolerance: float) -> Tensor:
        return solver.solve(system.product, system.b, rtol=tolerance, atol=0.0, max_steps=BUDGET).u

    return run


def _scipy(name: str, **options: Any) -> Solve:
    def run(system: System, tolerance: float) -> Tensor:
        from scipy.sparse import linalg

        def matvec(u: Any) -> Any:
            point = torch.from_numpy(u.ravel().copy()).view_as(system.b)
            return (point - system.product(point)).numpy().ravel()

        size = system.b.numel()
        operator = linalg.LinearOperator((size, size), matvec=matvec, dtype=float)
        b = system.b.numpy().ravel()
        u = getattr(linalg, name)(operator, b, rtol=tolerance, atol=0.0, **options)[0]
        return torch.from_numpy(u).view_as(system.b)

    return run


def _torchdeq(name: str, **options: Any) -> Solve:
    def run(system: System, tolerance: float) -> Tensor:
        from torchdeq import solver

        found: list[Tensor] = []

        def f(u: Tensor) -> Tensor:
            image = system.product(u) + system.b
            if float((image - u).norm() / system.b.norm()) <= tolerance:
                found.append(u.clone())
                raise Enough
            return image

        start = torch.zeros_like(system.b)  # as its own backward pass does
        with suppress(Enough):
            getattr(solver, name)(f, start, max_iter=BUDGET, tol=0.0, **options)
        return found[0] if found else start

    return run


SOLVERS: dict[str, dict[str, Solve]] = {
    "equilibria": {
        "GMRES()": _ours(GMRES()),
        "BiCGStab()": _ours(BiCGStab()),
        "FixedPoint(Anderson())": _ours(FixedPoint(Anderson())),
        "FixedPoint(Broyden())": _ours(FixedPoint(Broyden())),
        "Neumann()": _ours(Neumann()),
    },
    "scipy": {
        "scipy gmres": _scipy("gmres", restart=40, maxiter=20),
        "scipy bicgstab": _scipy("bicgstab", maxiter=BUDGET),
    },
    "torchdeq": {
        "torchdeq fixed_point_iter": _torchdeq("fixed_point_iter"),
        "torchdeq anderson": _torchdeq("anderson_solver"),
        "torchdeq anderson, tuned": _torchdeq("anderson_solver", lam=1e-12),
        "torchdeq broyden": _torchdeq("broyden_solver"),
    },
}


def main() -> None:
    """Solve all systems by all solvers and save the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=[family.name for family in FAMILIES])
    wanted = parser.parse_args().families
    families = [family for family in FAMILIES if wanted is None or family.name in wanted]
    counts = {}
    for family in families:
        started = time.perf_counter()
        counts[family.name] = _measure(family)
        print(f"{family.name}: {time.perf_counter() - started:.1f} s", flush=True)
    save(
        "backward",
        tolerances=TOLERANCES,
        budget=BUDGET,
        seeds=list(range(NUM_INSTANCES)),
        families={family.name: family.about for family in families},
        libraries={library: list(solvers) for library, solvers in SOLVERS.items()},
        counts=counts,
    )


def _measure(family: Family) -> dict[str, list[list[int | None]]]:
    """For each solver and instance the products to each tolerance, None where it is missed."""
    systems = [_system(seed, instance) for seed, instance in family.instances()]
    return {
        name: [[_count(run, *system, tolerance) for tolerance in TOLERANCES] for system in systems]
        for solvers in SOLVERS.values()
        for name, run in solvers.items()
    }


def _count(run: Solve, a: Callable[[Tensor], Tensor], b: Tensor, tolerance: float) -> int | None:
    system = System(a, b)
    try:
        u = run(system, tolerance)
    except Enough:
        return None
    residual = system.residual(u)
    met = math.isfinite(residual) and residual <= SLACK * tolerance
    return system.num_products if met else None


def _system(seed: int, instance: Instance) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The transposed Jacobian at the fixed point, and a cotangent."""
    z_star = instance.z0
    for solver in (Anderson(20), Broyden(None)):  # the second only polishes what is left
        with torch.no_grad():
            z_star = solve(
                instance.f,
                z_star,
                solver=solver,
                termination=Residual(1e-10, 0.0),
                max_steps=1000,
                on_failure="ignore",
            ).z
    pull_back = torch.func.vjp(instance.f, z_star)[1]
    generator = torch.Generator().manual_seed(1000 + seed)
    b = torch.randn(z_star.shape, dtype=torch.float64, generator=generator)
    return lambda u: pull_back(u)[0].detach(), b


if __name__ == "__main__":
    main()
