"""The implicit function theorem: the exact gradient in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from equilibria.core.adjoint import Adjoint, Forward, SecondDerivativeError
from equilibria.core.autocast import without_autocast
from equilibria.core.clock import clock
from equilibria.core.closure import Exchange, covers, graph_position, is_constant, is_nested
from equilibria.core.errors import UserError
from equilibria.core.functional import solve_transformed
from equilibria.core.iterate import Iterate
from equilibria.core.jacobian import transposed_jacobian
from equilibria.core.linear import LinearSolver, scaled_to_one, times_power_of_two
from equilibria.core.loop import LoopResult
from equilibria.core.parameters import check_not_negative, check_positive_integer
from equilibria.core.problem import Problem
from equilibria.core.pure import refuse_batched
from equilibria.core.replay import Replay
from equilibria.core.solver import Solver
from equilibria.core.status import enforce
from equilibria.core.warm_start import Start, WarmStart
from equilibria.linear.fixed_point import FixedPoint
from equilibria.linear.gmres import GMRES
from equilibria.solvers.fallback import Fallback
from equilibria.solvers.reversible import Reversible


@dataclass(frozen=True)
class Implicit(Adjoint):
    """Differentiate the equation z = f(z, theta) instead of the steps that solved it.

    For an incoming cotangent g the backward pass solves

        u = J^T u + g,   J = df/dz at the fixed point,

    and continues with u through one recorded evaluation of f, which reaches every parameter and
    every tensor f closes over without a list of them. The gradient is exact up to the two
    tolerances, wherever the forward solver started: `z0` gets none, in theory and here.

    Second and higher derivatives (`create_graph=True`, forces from energies) are right as well:
    u is then itself the solution of a fixed-point problem and is differentiated the same way.

    Memory: one recorded evaluation, whatever the number of steps. Cost: one more evaluation
    forward, one vector-Jacobian product per backward step.

    Args:
        solver: for the backward system; a `LinearSolver`, or any fixed-point solver, chosen
            independently of the forward one. GMRES needs the fewest products.
        rtol: backward tolerance relative to the cotangent, so that scaling the loss, or averaging
            it, changes nothing.
        atol: absolute backward tolerance; 0 because cotangents have no natural scale.
        max_steps: backward step limit.
        warm_start: where the backward solve starts: `Previous()` or `Cached(...)`, which guess u
            by what it was when the sample was last solved. None starts from zero. The tolerance
            stays relative to the cotangent, so the gradient is as exact as without.

    Raises:
        UserError: a solver of neither kind, a `Reversible` one with its guard, a negative
            tolerance, rtol of 1 or more, max_steps below 1, a warm start that remembers nothing.

    References:
        Bai, Kolter and Koltun, Deep Equilibrium Models, arXiv 1909.01377, theorem 1.
    """

    solver: Solver | LinearSolver = GMRES()
    rtol: float = 1e-4
    atol: float = 0.0
    max_steps: int = 50
    warm_start: WarmStart | None = None

    exact = True

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver | LinearSolver):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(
                f"Implicit(solver={self.solver!r}) is neither a fixed-point solver nor a linear "
                "one; give for example GMRES() or Broyden()"
            )
        _refuse_guards(self.solver)
        check_not_negative("rtol", self.rtol)
        check_not_negative("atol", self.atol)
        if self.rtol == self.atol == 0.0:
            raise UserError("rtol and atol of Implicit are both 0; give at least one")
        if self.rtol >= 1.0:
            raise UserError(
                f"rtol={self.rtol} of Implicit accepts a gradient of zero, whose residual is the "
                "cotangent itself; give less than 1, for example 1e-2, or use adjoint=OneStep(), "
                "which needs no tolerance"
            )
        check_positive_integer("max_steps", self.max_steps)
        if self.warm_start is not None and not (
            isinstance(self.warm_start, WarmStart) and self.warm_start.recalls  # pyright: ignore[reportUnnecessaryIsInstance]
        ):
            raise UserError(
                f"Implicit(warm_start={self.warm_start!r}) does not know where earlier solves "
                "ended; give Previous() or Cached(num_entries), or None to start from zero"
            )

    @property
    def backward_warm_start(self) -> WarmStart | None:
        """That of the linear solve."""
        return self.warm_start

    def without_warm_start(self) -> Implicit:
        """The same starting from zero."""
        return replace(self, warm_start=None)

    def attach(self, forward: Forward, z: Tensor) -> Tensor:
        """Record one evaluation at z and attach the implicit edge to it."""
        return _FixedPointEdge(forward.problem, z, self, forward).attach()

    def apply_transformed(self, forward: Forward) -> tuple[Tensor, LoopResult]:
        """Solve with derivatives of any order and mode; see `equilibria.core.functional`."""
        return solve_transformed(forward, partial(self.solve_linear, forward))

    def solve_linear(
        self,
        forward: Forward,
        a: Callable[[Tensor], Tensor],
        b: Tensor,
        what: str,
        warm: Start | None = None,
    ) -> Tensor:
        """Solve u = a(u) + b and report on it as `what`."""
        start = clock()
        linear = self.solver if isinstance(self.solver, LinearSolver) else FixedPoint(self.solver)
        with without_autocast(b.device):
            unit, exponent = scaled_to_one(b)
            result = linear.solve(
                a,
                unit,
                rtol=self.rtol,
                atol=self.atol
                and times_power_of_two(b.new_full(exponent.shape, self.atol), -exponent)[:, 0],
                max_steps=self.max_steps,
                guess=None if warm is None else warm.guess(),
                trace=forward.trace,
            )
            result = replace(
                result,
                u=times_power_of_two(result.u, exponent),
                residual=times_power_of_two(result.residual, exponent[:, 0]),
            )
        if warm is not None:
            warm.remember(result.u, result.status, result.relative_residual)
        forward.report.result = result
        forward.report.seconds += clock() - start
        enforce(result.status, forward.on_failure, what)
        return result.u


def _refuse_guards(solver: Solver | LinearSolver) -> None:
    """Raise UserError for a solver that would refuse the backward solve when it comes to it."""
    if isinstance(solver, FixedPoint):
        solver = solver.solver
    parts = solver.solvers if isinstance(solver, Fallback) else (solver,)
    for part in parts:
        if isinstance(part, Reversible) and part.reconstruction_tolerance is not None:
            raise UserError(
                f"Implicit(solver={solver!r}) limits its steps to those that can be undone, and a "
                "backward solve is never undone; give Reversible(reconstruction_tolerance=None), "
                "or GMRES(), which needs the fewest products"
            )


class _FixedPointEdge:
    """One recorded evaluation f(z*) and the way back through it.

    Kept alive by the output's graph alone: not by a hook, a module or a reference cycle.
    """

    def __init__(
        self,
        problem: Problem,
        z: Tensor,
        adjoint: Implicit,
        forward: Forward,
        *,
        border: _Gate | None = None,
    ) -> None:
        """`border` is the gate around all inputs of a problem whose inputs are known completely."""
        self._border = border
        self._problem = problem
        self._adjoint = adjoint
        self._forward = forward
        self._z = z
        self._taped, self._inputs = problem.tape(z)
        self._replay = Replay(problem.f, self._taped.fz, problem.rounding)
        # The final state comes first.
        forward.notes.setdefault("replay", self._replay)
        forward.notes.setdefault("tape", self._taped)

    def attach(self) -> Tensor:
        """The fixed point, carrying the implicit gradient if there is anything to give one to."""
        if is_constant(self._taped.fz, self._taped.z, self._inputs):
            return self._z.clone()
        return _Implicit.apply(self._taped.fz, self._z, self, *self._inputs)

    def cotangent(self, g: Tensor) -> Tensor:
        """Solve u = J^T u + g on the recorded evaluation."""
        return self._adjoint.solve_linear(
            self._forward,
            transposed_jacobian(self._taped),
            g,
            "the backward solve",
            self._forward.start,
        )

    def differentiable_gradients(self, g: Tensor, z: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients for the inputs of f that can be differentiated again.

        The recorded evaluation was made at a detached z*. Here f is evaluated anew at the output
        z itself, so that the result depends on z, and u is the solution of another fixed-point
        problem, u = h(u) with h(u) = (df/dz)^T u + g, which is differentiated implicitly too.
        """
        gate = _Gate(self._border)
        with torch.enable_grad():
            here, inputs = self._evaluated_at(gate, z)
            with torch.no_grad():
                solution = self.cotangent(g)
            g_inside = gate.through(g) if g.requires_grad else g
            system = Problem(
                lambda u: transposed_jacobian(here, create_graph=True)(u) + g_inside,
                solution,
                inputs=(here.z, g_inside, *inputs),
            )
            # Its own derivatives are other systems than the one that a warm start knows.
            cold = replace(self._forward, start=None)
            u = _FixedPointEdge(system, solution, self._adjoint, cold, border=gate).attach()
            with gate.closed():
                return torch.autograd.grad(here.fz, inputs, u, create_graph=True, allow_unused=True)

    def _evaluated_at(self, gate: _Gate, z: Tensor) -> tuple[Iterate, tuple[Tensor, ...]]:
        """f recorded anew at z, and its inputs, all behind the gate if autograd would pass them."""
        if self._border is not None:
            free = gate.through(z)
            return Iterate(free, self._problem.image(free)), self._inputs
        torch.clear_autocast_cache()  # weights that were cast before have nodes of before
        start = graph_position()
        free = gate.through(z)
        nested = is_nested(self._inputs)
        behind = inputs = self._inputs
        if nested:
            behind = tuple(t if t.grad_fn is None else gate.through(t) for t in inputs)
        exchange = Exchange(inputs, behind) if nested else nullcontext()
        with self._replay.as_then(), exchange:
            image = self._problem.image(free)
        self._replay.check(image)
        if not covers(image, (*behind, free), start):
            advice = (
                "Some of its inputs are computed from others: leave f uncompiled."
                if nested
                else "Leave f uncompiled, or give all such tensors to solve(..., inputs=[...])."
            )
            raise SecondDerivativeError(
                "f depends on a tensor that was not seen when it was recorded (inside a "
                f"compiled function, say), so a second derivative would be incomplete. {advice}"
            )
        return Iterate(free, image), behind


class _Implicit(torch.autograd.Function):
    """Value z*, gradient (I - J^T)^-1 g into the recorded image f(z*).

    The inputs of f are arguments too, unused by a first derivative (autograd continues through
    the recorded image), and the receivers of a differentiable one.
    """

    @staticmethod
    def forward(ctx: Any, fz: Tensor, z: Tensor, edge: _FixedPointEdge, *inputs: Tensor) -> Tensor:
        ctx.edge = edge
        # A copy, so that writing to the output in place cannot corrupt the recorded evaluation.
        output = z.clone()
        ctx.save_for_backward(output, *inputs)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor | None, ...]:
        nothing: tuple[None, ...] = (None,) * (len(ctx.needs_input_grad) - 3)
        if cotangents[0] is None:
            return (None, None, None, *nothing)
        refuse_batched(cotangents[0])
        if not torch.is_grad_enabled():
            return (ctx.edge.cotangent(cotangents[0]), None, None, *nothing)
        # Not before: unpacking checks that none was written to, which only matters here.
        z, *_ = ctx.saved_tensors
        gradients = ctx.edge.differentiable_gradients(cotangents[0], z)
        return (None, None, None, *gradients)


class _Gate:
    """An identity whose backward can be shut, to differentiate f at fixed z and fixed inputs.

    Shut while the partial derivatives are taken; open afterwards, so that their own dependence
    on z and on what computed inputs were made of is seen. Shuts what it stands in front of, too.
    """

    def __init__(self, border: _Gate | None = None) -> None:
        self.is_open = True
        self._border = border

    def through(self, z: Tensor) -> Tensor:
        return _GateFunction.apply(z, self)

    @contextmanager
    def closed(self) -> Generator[None]:
        with self._border.closed() if self._border else nullcontext():
            self.is_open = False
            try:
                yield
            finally:
                self.is_open = True


class _GateFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, gate: _Gate) -> Tensor:
        ctx.gate = gate
        # What a shut gate stops is nothing, not zeros that a solve behind it would be started for.
        ctx.set_materialize_grads(False)
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor | None, None]:
        return (cotangents[0] if ctx.gate.is_open else None), None
