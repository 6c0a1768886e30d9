"""Inexact Newton with a Krylov method inside."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from equilibria.core.backtracking import backtrack
from equilibria.core.errors import UserError, nearest
from equilibria.core.iterate import Iterate, rms
from equilibria.core.linear import LinearSolver
from equilibria.core.parameters import check_positive_integer
from equilibria.core.problem import Evaluate
from equilibria.core.solver import Solver
from equilibria.linear.gmres import GMRES

Products = Literal["auto", "forward", "double_backward", "difference"]
Product = Callable[[Tensor], Tensor]


@dataclass
class NewtonKrylovState:
    """The forcing term, residual norm and point of the last step, and how products are made."""

    products: Products
    forcing: Tensor | None = None
    norm: Tensor | None = None
    z: Tensor | None = None


@dataclass(frozen=True)
class NewtonKrylov(Solver):
    """Solve the linearised equation by a Krylov method, and not more exactly than it deserves.

        (I - J_k) d = r_k   to   |r_k - (I - J_k) d| <= eta_k |r_k|,    r_k = f(z_k) - z_k
        z_{k+1} = z_k + t d,    eta_k = 0.9 (|r_k| / |r_{k-1}|)^2

    with t from a line search and J_k never formed, only multiplied by. The forcing term eta_k is
    per sample (Eisenstat and Walker's choice 2): loose far away, quadratic convergence at the
    end. For hard problems of moderate effective dimension and for high accuracy; on easy ones it
    needs more evaluations than Anderson or Broyden.

    A product with J_k is

    - "forward": forward-mode AD, one call of f on dual numbers, counted as one evaluation though
      it takes the time of about two;
    - "double_backward": one recorded evaluation per step (counted), then two backward passes a
      product, which call f no more and are not counted: about two evaluations of time each, and
      the memory of one recorded evaluation. For maps with operations that lack forward mode;
    - "difference": (f(z + e v) - f(z)) / e, one evaluation, good to the root of the precision. For
      fused kernels that know neither. Useless on half-precision states;
    - "auto" (default): the first of these that the map supports.

    Cost per step: one evaluation, one per product ("forward", "difference"), at most 5 of the
    line search; `max_products` + 4 state copies of memory. The steps of a batch share their
    products, so a step lasts as long as its slowest sample; finished ones ask for none.

    Not unrollable: the products are not recorded. Use Implicit for gradients.

    Args:
        linear: the Krylov method, or any linear solver.
        max_products: per step and sample. Too few and a stiff problem takes ten times the steps.
        products: see above.
        line_search: as in Broyden; on by default, as a Newton step far from the solution often
            overshoots.

    Raises:
        UserError: no LinearSolver, max_products below 1, unknown products; at the start of a
            solve that records gradients; where the map does not support the products asked for.

    References:
        Knoll and Keyes, Jacobian-free Newton-Krylov methods, J. Comput. Phys. 193 (2004).
        Eisenstat and Walker, Choosing the forcing terms in an inexact Newton method, SIAM J. Sci.
        Comput. 17 (1996).
    """

    linear: LinearSolver = GMRES()
    max_products: int = 40
    products: Products = "auto"
    line_search: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.linear, LinearSolver):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(
                f"NewtonKrylov(linear={self.linear!r}) is no linear solver; give for example "
                "GMRES()"
            )
        check_positive_integer("max_products", self.max_products)
        if self.products not in get_args(Products):
            raise UserError(
                f"products={self.products!r} of NewtonKrylov is not one of "
                f"{', '.join(map(repr, get_args(Products)))}"
                f"{nearest(str(self.products), get_args(Products))}"
            )
        if not isinstance(self.line_search, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(f"line_search={self.line_search!r} must be True or False")

    @property
    def recordable(self) -> bool:
        """Its Jacobian products are not recorded."""
        return False

    def init(self, iterate: Iterate, max_steps: int) -> NewtonKrylovState:
        """Nothing is known yet."""
        return NewtonKrylovState(self.products)

    def step(
        self, evaluate: Evaluate, iterate: Iterate, state: NewtonKrylovState
    ) -> tuple[Iterate, NewtonKrylovState]:
        """Solve for the Newton direction, then move along it."""
        residual = iterate.fz - iterate.z
        forcing = _forcing(rms(residual), state)
        if state.z is not None:
            # A sample that did not move is finished; with a right side of 0 it asks for nothing.
            moved = (iterate.z != state.z).any(1, keepdim=True)
            residual = torch.where(moved, residual, 0.0)
        direction, products = self._direction(evaluate, iterate, residual, forcing, state.products)
        target = iterate.z + direction
        new = backtrack(evaluate, iterate, target) if self.line_search else evaluate(target)
        return new, NewtonKrylovState(products, forcing, rms(iterate.fz - iterate.z), iterate.z)

    def _direction(
        self,
        evaluate: Evaluate,
        iterate: Iterate,
        residual: Tensor,
        forcing: Tensor,
        products: Products,
    ) -> tuple[Tensor, Products]:
        """Solve for the step; return it with the kind of products that worked."""
        candidates = _LADDER if products == "auto" else (products,)
        for number, kind in enumerate(candidates):
            try:
                solution = self.linear.solve(
                    _PRODUCTS[kind](evaluate, iterate),
                    residual,
                    rtol=forcing,  # pyright: ignore[reportArgumentType]  # per sample, (B,)
                    atol=0.0,
                    max_steps=self.max_products,
                )
            except RuntimeError as error:
                if not _says_unsupported(error):
                    raise
                if number + 1 < len(candidates):
                    continue
                raise UserError(
                    f'the map does not support products="{kind}" of NewtonKrylov ({error}); '
                    'give products="difference", or use Broyden()'
                ) from error
            # A solve that broke down leaves the plain step.
            usable = torch.isfinite(solution.u).all(1, keepdim=True)
            return torch.where(usable, solution.u, residual), kind
        raise RuntimeError("no way to make products was tried")


def _forcing(norm: Tensor, state: NewtonKrylovState) -> Tensor:
    """Eisenstat and Walker's second choice with their safeguard, per sample (B,)."""
    if state.norm is None or state.forcing is None:
        return torch.full_like(norm, 0.5)
    ratio = norm / state.norm.clamp_min(torch.finfo(norm.dtype).tiny)
    forcing = 0.9 * ratio.square()
    floor = 0.9 * state.forcing.square()
    forcing = torch.where(floor > 0.1, torch.maximum(forcing, floor), forcing)
    # Below 1e-3 a linear solve outruns the next linearisation. NaN: a sample that is finished.
    return forcing.clamp(1e-3, 0.9).nan_to_num(0.5)


def _says_unsupported(error: RuntimeError) -> bool:
    """Whether an operation lacks the derivative asked for, as opposed to a fault in the map."""
    return isinstance(error, NotImplementedError) or any(
        words in str(error)
        # the last: inside torch.func.jvp or a dual level, which PyTorch cannot nest
        for words in ("is not implemented", "differentiate twice", "Nested forward mode AD")
    )


@cache
def _load_forward_mode() -> None:
    """Let torch load its forward-mode decompositions, which warns of its own use of TorchScript."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def _by_forward_mode(evaluate: Evaluate, iterate: Iterate) -> Product:
    _load_forward_mode()
    z = iterate.z.contiguous()  # an expanded z0 takes no tangent

    def product(v: Tensor) -> Tensor:
        with forward_ad.dual_level():
            image = evaluate(forward_ad.make_dual(z, v)).fz
            tangent = forward_ad.unpack_dual(image).tangent
        return torch.zeros_like(v) if tangent is None else tangent

    return product


def _by_double_backward(evaluate: Evaluate, iterate: Iterate) -> Product:
    z = iterate.z.detach().requires_grad_()
    image = evaluate.recorded(z).fz
    if not image.requires_grad:  # f does not depend on z
        return torch.zeros_like
    with torch.enable_grad():
        dummy = torch.zeros_like(image, requires_grad=True)
        # J^T w is linear in w; its derivative with respect to w, applied to v, is J v.
        transposed = torch.autograd.grad(
            image, z, dummy, create_graph=True, materialize_grads=True
        )[0]

    def product(v: Tensor) -> Tensor:
        if not transposed.requires_grad:
            return torch.zeros_like(v)
        return torch.autograd.grad(transposed, dummy, v, retain_graph=True, materialize_grads=True)[
            0
        ]

    return product


def _by_difference(evaluate: Evaluate, iterate: Iterate) -> Product:
    root = torch.finfo(iterate.z.dtype).eps ** 0.5
    size = torch.linalg.vector_norm(iterate.z, dim=1, keepdim=True)
    at_zero = torch.linalg.vector_norm(iterate.fz, dim=1, keepdim=True)
    size = torch.where(size > 0, size, at_zero)

    def product(v: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        step = root * size / torch.where(length > 0, length, 1.0)
        moved = evaluate(iterate.z + step * v)
        change = (moved.fz - iterate.fz) / torch.where(step > 0, step, 1.0)
        return torch.where(length > 0, change, 0.0)

    return product


_LADDER: tuple[Products, ...] = ("forward", "double_backward", "difference")
_PRODUCTS: dict[Products, Callable[[Evaluate, Iterate], Product]] = {
    "forward": _by_forward_mode,
    "double_backward": _by_double_backward,
    "difference": _by_difference,
}
