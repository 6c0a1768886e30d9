"""Ways to a fixed point with its gradient, ours and others, and what they reach.

Every one is a function of a forward and a backward tolerance (relative) and gives a `Solve`. Ours
holds every sample to the tolerance; so does torchdeq, by the worst of the batch; the published code
looks at one norm of the whole batch. What is reached is measured from outside, by one definition.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import published
from benchmarks.cells import Map, Work
from benchmarks.variants import fastest, has_torchdeq
from equilibria import Implicit, Residual, solve
from equilibria.core.adjoint import AttachGraph
from equilibria.linear.gmres import GMRES

MAX_STEPS = 60

Solve = Callable[[Map, Tensor], Tensor]
"""f and z0 to z* with its gradient attached."""
Method = Callable[[float, float], Solve]
"""Of the tolerances, forward and backward."""
Tolerances = tuple[float, float]


def ours(
    solver: Any, backward: Any = None, *, max_steps: int = MAX_STEPS, **options: Any
) -> Method:
    """With GMRES as its backward solver, or another."""

    def make(forward_tolerance: float, backward_tolerance: float) -> Solve:
        adjoint = Implicit(
            GMRES() if backward is None else backward, rtol=backward_tolerance, max_steps=max_steps
        )
        return lambda f, z0: solve(
            f, z0, solver=solver, adjoint=adjoint, termination=Residual(forward_tolerance, 0.0),
            max_steps=max_steps, on_failure="ignore", **options,
        ).z  # fmt: skip

    return make


def ours_fastest(solver: Any, device: torch.device) -> Method:
    """With the fused steps that there are, forward and backward."""
    return ours(fastest(solver, device), fastest(GMRES(), device))


def torchdeq(name: str, *, max_steps: int = MAX_STEPS) -> Method:
    """torchdeq's implicit gradient with the same solver both ways."""
    from torchdeq import get_deq

    def make(forward_tolerance: float, backward_tolerance: float) -> Solve:
        layer = get_deq(
            ift=True, f_solver=name, b_solver=name, f_tol=forward_tolerance,
            b_tol=backward_tolerance, f_stop_mode="rel", b_stop_mode="rel",
            f_max_iter=max_steps, b_max_iter=max_steps,
        )  # fmt: skip
        return lambda f, z0: layer(f, z0)[0][-1]

    return make


def first_public_code(*, max_steps: int = MAX_STEPS) -> Method:
    """Anderson forward, one recorded evaluation, Broyden backward."""

    def make(forward_tolerance: float, backward_tolerance: float) -> Solve:
        def run(f: Map, z0: Tensor) -> Tensor:
            with torch.no_grad():
                z, _ = published.anderson(f, z0, max_steps=max_steps, tolerance=forward_tolerance)
            z = z.detach().requires_grad_()
            with torch.enable_grad():
                image = f(z)

            def backward(g: Tensor) -> Tensor:
                def linear(u: Tensor) -> Tensor:
                    return torch.autograd.grad(image, z, u, retain_graph=True)[0] + g

                return published.broyden(
                    linear, torch.zeros_like(g), max_steps=max_steps, tolerance=backward_tolerance
                )[0]

            return AttachGraph.apply(z.detach(), image, "published", backward)

        return run

    return make


def peers(*, max_steps: int = MAX_STEPS) -> dict[str, Method]:
    """The others that there are."""
    found: dict[str, Method] = {}
    if has_torchdeq():
        for name in ("anderson", "broyden"):
            found[f"torchdeq {name}"] = torchdeq(name, max_steps=max_steps)
    return {**found, "published": first_public_code(max_steps=max_steps)}


# --- what is reached ---------------------------------------------------------------------------


class Counted:
    """A map that counts its calls and the products with its transposed Jacobian.

    The last product is the one that gives the gradient to the parameters, so that its cotangent is
    the solution u of the backward system.
    """

    def __init__(self, f: Map) -> None:
        self.f = f
        self.evaluations = self.products = 0
        self.cotangent: Tensor | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """Evaluate."""
        self.evaluations += 1
        image = self.f(z)
        if image.requires_grad:
            image.register_hook(self._count)
        return image

    def _count(self, cotangent: Tensor) -> None:
        self.products += 1
        self.cotangent = cotangent


@dataclass(frozen=True)
class Gradient:
    """That of all parameters, and how it compares with another one."""

    parts: list[Tensor | None]

    @staticmethod
    def taken_from(work: Work) -> Gradient:
        """What a backward pass has left in the parameters; they are cleared."""
        parts = [parameter.grad for parameter in work.module.parameters()]
        work.module.zero_grad(set_to_none=True)
        return Gradient(parts)

    def compared_with(self, exact: Gradient) -> dict[str, float]:
        """Relative error and one minus the cosine (which itself would round to 1)."""
        inner = mine = theirs = distance = 0.0
        for part, wanted in zip(self.parts, exact.parts, strict=True):
            if wanted is None:
                continue
            w = wanted.double()
            p = torch.zeros_like(w) if part is None else part.double()
            inner += float((p * w).sum())
            mine += float(p.square().sum())
            theirs += float(w.square().sum())
            distance += float((p - w).square().sum())
        cosine = inner / max((mine * theirs) ** 0.5, 1e-300)
        return {
            "gradient_error": (distance / max(theirs, 1e-300)) ** 0.5,
            "one_minus_cosine": max(0.0, 1.0 - cosine),
        }


def worst_residual(f: Map, z: Tensor) -> float:
    """Largest relative residual of a sample, |f(z) - z| / |f(z)|."""
    with torch.no_grad():
        image = f(z)
    return float(((image - z).norm(dim=1) / image.norm(dim=1)).max())


def loss_of(z: Tensor) -> Tensor:
    """A loss that pulls the state to a fixed random target."""
    return (z - _target(z.shape, z.device, z.dtype)).square().mean()


@functools.lru_cache(maxsize=4)
def _target(shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Drawn once, so that drawing and moving it is no part of a step."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def reached(work: Work, solve_: Solve) -> tuple[dict[str, float], Gradient]:
    """Cost and residuals of one step, forward and backward, and the gradient it gives."""
    counted, given = Counted(work.prepare()), []
    z = solve_(counted, work.z0)
    evaluations = counted.evaluations
    z.register_hook(given.append)
    loss_of(z).backward()
    gradient = Gradient.taken_from(work)
    (g,), u = given, counted.cotangent
    if u is None:
        raise RuntimeError("no gradient has reached f")
    point = z.detach().requires_grad_()
    pulled = torch.autograd.grad(counted.f(point), point, u)[0]
    costs = {
        "evaluations": evaluations,
        "products": counted.products,
        "residual": worst_residual(counted.f, z.detach()),
        "backward_residual": float(((pulled + g - u).norm(dim=1) / g.norm(dim=1)).max()),
    }
    return {name: float(f"{value:.4g}") for name, value in costs.items()}, gradient


def loosest(
    reaches: Callable[[float], bool], start: float, *, factor: float = 10**0.25
) -> float | None:
    """The loosest tolerance, in steps of `factor` from `start`, that reaches what is wanted.

    None where a hundredth of `start` does not either.
    """
    if reaches(start):
        while start < 0.1 and reaches(start * factor):
            start *= factor
        return start
    tightest = start / 100
    if not reaches(tightest):
        return None
    while start / factor > tightest:
        start /= factor
        if reaches(start):
            return start
    return tightest


def equalised(work: Work, method: Method, wanted: float, factor: float) -> Tolerances | None:
    """The loosest tolerances at which a method has every residual below `wanted`, both ways."""

    def reaches_forward(tolerance: float) -> bool:
        with torch.no_grad():
            f = work.prepare()
            return worst_residual(f, method(tolerance, 1.0)(f, work.z0)) <= wanted

    forward = loosest(reaches_forward, wanted, factor=factor)
    if forward is None:
        return None

    def reaches_backward(tolerance: float) -> bool:
        return reached(work, method(forward, tolerance))[0]["backward_residual"] <= wanted

    backward = loosest(reaches_backward, wanted, factor=factor)
    return None if backward is None else (forward, backward)
