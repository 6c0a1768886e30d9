"""SHINE: the inverse that the forward solve has estimated, used again for the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.core.adjoint import Adjoint, AttachGraph, Forward
from equilibria.core.autocast import without_autocast
from equilibria.core.clock import clock
from equilibria.core.closure import is_constant
from equilibria.core.errors import UserError
from equilibria.core.iterate import rms
from equilibria.core.jacobian import transposed_jacobian
from equilibria.core.linear import scaled_to_one, times_power_of_two
from equilibria.core.loop import LoopResult
from equilibria.core.parameters import check_above_zero
from equilibria.core.pure import refuse_batched
from equilibria.core.solver import Solver
from equilibria.linear.gmres import GMRES

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shine(Adjoint):
    """Let the quasi-Newton solver that found the fixed point stand in for the backward solve.

    Broyden's method ends with a matrix H near (I - J)^-1. Its transpose gives the backward
    direction for an incoming cotangent g without a single product with J,

        u = H^T g   instead of   u = (I - J^T)^-1 g,

    which costs as much as `OneStep` and is nearer to the exact gradient where H is good: few
    directions matter, or the solve took many steps. H knows J only along the steps that were
    made, so the bias does not vanish with the forward tolerance. `refinement` removes it.

    A sample whose estimate is no good falls back to the one-step direction u = g. Never NaN, as
    long as g and the recorded evaluation are finite.

    Memory: one recorded evaluation and the pairs of the forward solver, at most 2 history_size
    state copies, until the graph is freed. Cost: none with refinement=0, otherwise
    refinement + 2 products; the residual reached is then in `Solution.backward`, where missing
    a tolerance is no failure.

    Args:
        refinement: GMRES steps on (I - J^T) H^T v = g, u = H^T v, which begin with the estimate
            and end with the exact gradient. H^T serves in every step, as the preconditioner, and
            not only as the starting point of the reference: on a tanh cell of radius 0.9, 13
            products leave an error of 0.002, where GMRES on its own leaves 0.14.
        fallback: whether a sample whose direction is too long uses u = g instead (and no
            preconditioner): a nearly singular H is then an accident rather than a property of J.
        max_ratio: what is too long, |H^T g| / |g|. The reference uses 1.3; 5, as expected of a
            spectral radius of 0.8, lets most good estimates pass on our problems.

    Raises:
        UserError: a negative refinement, max_ratio not above 0; with a solver that estimates no
            Jacobian (all but Broyden).

    References:
        Ramzi et al., SHINE: SHaring the INverse Estimate from the forward pass for bi-level
        optimization and implicit models, arXiv 2106.00553. Nguyen and Mauch, Efficient training of
        deep equilibrium models, arXiv 2304.11663.
    """

    refinement: int = 0
    fallback: bool = True
    max_ratio: float = 5.0

    @property
    def needs_history(self) -> bool:
        """The estimate is the solver's memory."""
        return True

    def __post_init__(self) -> None:
        if type(self.refinement) is not int or self.refinement < 0:
            raise UserError(f"refinement={self.refinement!r} must be an integer of at least 0")
        if not isinstance(self.fallback, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(f"fallback={self.fallback!r} of Shine must be True or False")
        check_above_zero("max_ratio", self.max_ratio)

    def check(self, solver: Solver) -> None:
        """Refuse solvers that have no estimate to share."""
        if type(solver).inverse_jacobian_t is Solver.inverse_jacobian_t:
            raise UserError(_no_estimate(solver))

    def apply(self, forward: Forward) -> tuple[Tensor, LoopResult]:
        """Solve, keep the estimate, and attach it to one recorded evaluation."""
        with torch.no_grad():
            result = forward.run()
            solver = forward.solver
            estimate = solver and solver.inverse_jacobian_t(result.solver_state, result.iterate)
        if estimate is None:
            raise UserError(_no_estimate(solver))
        forward.notes["estimate"] = estimate
        return self.attach(forward, result.iterate.z), result

    def attach(self, forward: Forward, z: Tensor) -> Tensor:
        """Record one evaluation at z; for an intermediate state, too, the estimate is the final."""
        taped, inputs = forward.problem.tape(z)
        if is_constant(taped.fz, taped.z, inputs):
            return z.clone()
        estimate: Map = forward.notes["estimate"]
        product = transposed_jacobian(taped)

        def backward(g: Tensor) -> Tensor:
            if self.refinement:
                refuse_batched(g)
            start = clock()
            with without_autocast(g.device):
                unit, exponent = scaled_to_one(g)
                precondition = self._safeguarded(estimate, unit)
                u = precondition(unit)
                if self.refinement:
                    u = self._refined(forward, product, precondition, unit, u)
                u = times_power_of_two(u, exponent)
            forward.report.seconds += clock() - start
            return u

        return AttachGraph.apply(z, taped.fz, "Shine", backward)

    def _safeguarded(self, estimate: Map, g: Tensor) -> Map:
        """The estimate for samples that may use it for g, the identity for the others."""
        length = rms(estimate(g))
        usable = torch.isfinite(length)
        if self.fallback:
            usable = usable & (length <= self.max_ratio * rms(g))
        rows = usable.unsqueeze(1)
        return lambda v: torch.where(rows, estimate(v), v)

    def _refined(
        self, forward: Forward, product: Map, precondition: Map, g: Tensor, u: Tensor
    ) -> Tensor:
        """Minimise the residual of (I - J^T) H^T v = g over a growing space that contains v = g."""

        def complement(v: Tensor) -> Tensor:
            step = precondition(v)
            return v - step + product(step)

        result = GMRES().solve(
            complement,
            g,
            rtol=100 * torch.finfo(g.dtype).eps,
            atol=0.0,
            max_steps=self.refinement + 1,
            trace=forward.trace,
        )
        forward.report.result = result
        # A sample that broke down is left with v = 0, whose residual is g.
        solved = (result.residual < rms(g)).unsqueeze(1)
        return torch.where(solved, precondition(result.u), u)


def _no_estimate(solver: Solver | None) -> str:
    return (
        "Shine needs a forward solver that estimates the inverse Jacobian, and "
        f"{type(solver).__name__} does not; give solver=Broyden(), or another gradient: "
        "adjoint=Implicit() is exact, OneStep() as cheap"
    )
