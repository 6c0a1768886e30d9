"""The implicit function theorem: the exact gradient in constant memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equilibria.core.adjoint import Adjoint, Forward, refuse_second_derivatives
from equilibria.core.errors import UserError
from equilibria.core.iterate import Iterate
from equilibria.core.linear import LinearSolver
from equilibria.core.loop import LoopResult
from equilibria.core.parameters import check_not_negative, check_positive_integer
from equilibria.core.solver import Solver
from equilibria.core.status import OnFailure, enforce
from equilibria.linear.fixed_point import FixedPoint
from equilibria.linear.gmres import GMRES


@dataclass(frozen=True)
class Implicit(Adjoint):
    """Differentiate the equation z = f(z, theta) instead of the steps that solved it.

    For an incoming cotangent g the backward pass solves

        u = J^T u + g,   J = df/dz at the fixed point,

    and continues with u through one recorded evaluation of f, which reaches every parameter and
    every tensor f closes over without a list of them. The gradient is exact up to the two
    tolerances, wherever the forward solver started: `z0` gets none, in theory and here.

    Memory: one recorded evaluation, whatever the number of steps. Cost: one more evaluation
    forward, one vector-Jacobian product per backward step.

    Args:
        solver: for the backward system; a `LinearSolver`, or any fixed-point solver, chosen
            independently of the forward one. GMRES needs the fewest products.
        rtol: backward tolerance relative to the cotangent, so that scaling the loss, or averaging
            it, changes nothing.
        atol: absolute backward tolerance; 0 because cotangents have no natural scale.
        max_steps: backward step limit.

    Raises:
        UserError: a solver of neither kind, a negative tolerance, max_steps below 1.

    References:
        Bai, Kolter and Koltun, Deep Equilibrium Models, arXiv 1909.01377, theorem 1.
    """

    solver: Solver | LinearSolver = GMRES()
    rtol: float = 1e-4
    atol: float = 0.0
    max_steps: int = 50

    exact = True

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver | LinearSolver):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(
                f"Implicit(solver={self.solver!r}) is neither a fixed-point solver nor a linear "
                "one; give for example GMRES() or Broyden()"
            )
        check_not_negative("rtol", self.rtol)
        check_not_negative("atol", self.atol)
        if self.rtol == self.atol == 0.0:
            raise UserError("rtol and atol of Implicit are both 0; give at least one")
        check_positive_integer("max_steps", self.max_steps)

    def apply(self, forward: Forward) -> tuple[Tensor, LoopResult]:
        """Solve without a graph, record one evaluation at the solution, attach the edge."""
        with torch.no_grad():
            result = forward.run()
        taped = forward.problem.tape(result.iterate.z)
        solve = _BackwardSolve(self, taped, forward)
        return _ImplicitEdge.apply(taped.fz, result.iterate.z, solve), result


class _BackwardSolve:
    """Turns a cotangent of z* into the cotangent of the recorded image f(z*)."""

    def __init__(self, adjoint: Implicit, taped: Iterate, forward: Forward) -> None:
        solver = adjoint.solver
        self._linear = solver if isinstance(solver, LinearSolver) else FixedPoint(solver)
        self._adjoint = adjoint
        self._taped = taped
        self._report = forward.report
        self._on_failure: OnFailure = forward.on_failure
        self._trace = forward.trace

    def __call__(self, cotangent: Tensor) -> Tensor:
        start = time.perf_counter()
        result = self._linear.solve(
            self._transposed_jacobian(),
            cotangent,
            rtol=self._adjoint.rtol,
            atol=self._adjoint.atol,
            max_steps=self._adjoint.max_steps,
            trace=self._trace,
        )
        self._report.result = result
        self._report.seconds += time.perf_counter() - start
        enforce(result.status, self._on_failure, "the backward solve")
        return result.u

    def _transposed_jacobian(self) -> Callable[[Tensor], Tensor]:
        z, fz = self._taped

        def product(u: Tensor) -> Tensor:
            return torch.autograd.grad(fz, z, u, retain_graph=True, materialize_grads=True)[0]

        return product


class _ImplicitEdge(torch.autograd.Function):
    """Value z*, gradient (I - J^T)^-1 g into the recorded image f(z*).

    Not a hook on a stored tensor: nothing lives on a module, a layer can be used any number of
    times in one graph, and the tape is freed with the output.
    """

    @staticmethod
    def forward(ctx: Any, fz: Tensor, z: Tensor, solve: _BackwardSolve) -> Tensor:
        ctx.solve = solve
        # A copy, so that writing to the output in place cannot corrupt the recorded evaluation.
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor, None, None]:
        refuse_second_derivatives("Implicit")
        return ctx.solve(cotangents[0]), None, None
