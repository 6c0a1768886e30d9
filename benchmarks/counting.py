"""Counting evaluations, with one definition of the residual for every library.

A `Counter` wraps the map, so that each real call is seen, and computes from the pair (z, f(z)) of
every call the relative residual |f(z) - z| / |f(z)|. What a library says about itself is not
used: neither its count, nor its residual, nor its verdict. A product with the Jacobian, by
forward-mode AD or a backward pass, counts like a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

TOLERANCES = (1e-3, 1e-4, 1e-6)


class Enough(Exception):  # noqa: N818  # no error: how a measured solve ends
    """The tightest tolerance is met, or the budget is spent."""


@dataclass(frozen=True)
class Count:
    """Evaluations, products included, until a visited point met the tolerance; None: never."""

    num_evals: int | None
    num_products: int | None


class Counter:
    """The map z -> f(z) for (1, D), counted.

    Args:
        f: the map.
        budget: evaluations and products allowed together.
        stop: "raise" `Enough` when there is nothing more to learn; or "echo": answer every point
            by itself, so that a solver that cannot be left by an exception sees a residual of 0.
    """

    def __init__(self, f: Callable[[Tensor], Tensor], budget: int, stop: str = "raise") -> None:
        self._f, self._budget, self.stop = f, budget, stop
        self._found: dict[float, Count] = {}
        self.num_values = self.num_products = 0

    def __call__(self, z: Tensor) -> Tensor:
        """Evaluate; a dual number is a product with the Jacobian at a point known already."""
        if forward_ad.unpack_dual(z).tangent is not None:
            self._before()
            self.num_products += 1
            return self._f(z)
        if self._before():
            return z.clone()
        self.num_values += 1
        with torch.no_grad():
            image = self._f(z)
            norm = torch.linalg.vector_norm(image)
            relative = float(torch.linalg.vector_norm(image - z) / norm)
        for tolerance in TOLERANCES:
            if relative <= tolerance and tolerance not in self._found:
                self._found[tolerance] = Count(self.spent, self.num_products)
        return image

    def product(self, z: Tensor, v: Tensor) -> Tensor:
        """J(z) v, counted."""
        if self._before():
            return torch.zeros_like(v)
        self.num_products += 1
        return torch.func.jvp(self._f, (z,), (v,))[1]

    def transposed_product(self, z: Tensor, w: Tensor) -> Tensor:
        """J(z)^T w, counted."""
        if self._before():
            return torch.zeros_like(w)
        self.num_products += 1
        return torch.func.vjp(self._f, z)[1](w)[0]

    @property
    def spent(self) -> int:
        """Evaluations and products so far."""
        return self.num_values + self.num_products

    @property
    def counts(self) -> Sequence[Count]:
        """For every one of `TOLERANCES`."""
        return [self._found.get(tolerance, Count(None, None)) for tolerance in TOLERANCES]

    def _before(self) -> bool:
        """Whether the measurement is over."""
        over = TOLERANCES[-1] in self._found or self.spent >= self._budget
        if over and self.stop == "raise":
            raise Enough
        return over
