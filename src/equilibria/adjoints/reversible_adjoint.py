"""Back-propagation through every step of the reversible solver, in constant memory."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from equilibria.core.adjoint import Adjoint, Forward, refuse_second_derivatives
from equilibria.core.autocast import without_autocast
from equilibria.core.clock import clock
from equilibria.core.closure import Exchange, covers, graph_position, is_nested
from equilibria.core.errors import UserError
from equilibria.core.iterate import rms
from equilibria.core.linear import LinearResult
from equilibria.core.loop import LoopResult
from equilibria.core.parameters import check_not_negative
from equilibria.core.problem import Problem
from equilibria.core.pure import refuse_batched
from equilibria.core.solver import Solver
from equilibria.core.status import ConvergenceError, ConvergenceWarning, Status
from equilibria.solvers.reversible import Reversible, ReversibleState


@dataclass(frozen=True)
class ReversibleAdjoint(Adjoint):
    """Differentiate the steps of the `Reversible` solver by undoing them one after the other.

        z_k = (z_{k+1} - b f(y_{k+1})) / (1 - b)      y_k = (y_{k+1} - b f(z_k)) / (1 - b)

    The gradient is that of `Unrolled`: exact for the computation that was made, whatever the
    residual, and right for `z0`; the states that it needs are computed instead of stored.

    Rounding errors grow on the way back, by up to 1 / (1 - b)^2 a step, and a map that is not the
    same twice leads elsewhere. So the start that is reached is compared with z0, for every sample:
    where they agree, the gradient is that of steps which did lead from there to the result.
    One that misses it by more than `tolerance` is reported by `on_failure`: under "raise" by an
    error, otherwise (and with a warning under "warn") it is left out of the way back and gets the
    one-step gradient at its returned point. The same goes for a sample whose last point is not the
    one that was returned: one that failed under keep="best" and was better before, or whose steps
    were not finite. keep="last" avoids the former.

    `Solution.backward.result` has the outcome per sample: u is the gradient for z0, the residual
    is the distance from z0 (relative to the larger of z0 and z).

    Memory: 4 state copies and one recorded evaluation at a time. Cost: one evaluation more
    forward; backward two recorded evaluations and two vector-Jacobian products per step (twice
    where a sample has to be left out), for f is evaluated anew.

    Args:
        tolerance: how far from z0 a sample may be led, relative to the larger of z0 and z. None
            means eps^(1/4) of the state's dtype: 2e-2 in float32, 1e-4 in float64. On our
            contractions the error of the gradient for f's inputs is less than a tenth of that of
            the start, because what is furthest off counts least.

    Raises:
        UserError: a negative tolerance; any solver but Reversible; at the solve, a state that is
            rounded after every step (bfloat16, float16, mixed dtypes), intermediate states, or a
            tensor that f depends on and that cannot be found (name it in `inputs`).

    References:
        McCallum, Arora and Foster, Reversible deep equilibrium models, arXiv 2509.12917.
    """

    tolerance: float | None = None

    exact = True
    through_steps = True

    def __post_init__(self) -> None:
        if self.tolerance is not None:
            check_not_negative("tolerance", self.tolerance)

    def check(self, solver: Solver) -> None:
        """Refuse steps that cannot be undone."""
        if not isinstance(solver, Reversible):
            raise UserError(
                f"ReversibleAdjoint cannot undo the steps of {type(solver).__name__}; give "
                "solver=Reversible(), or adjoint=Unrolled(checkpoint=True) for any other solver"
            )

    def apply(self, forward: Forward) -> tuple[Tensor, LoopResult]:
        """Solve without recording, and attach the way back."""
        problem = forward.problem
        if problem.layout.rounds:
            raise UserError(
                "ReversibleAdjoint cannot undo steps whose states are rounded to a narrower dtype "
                f"than {problem.layout.dtype}; give a z0 of one dtype, float32 or wider (f may "
                "compute under autocast), or adjoint=Unrolled(checkpoint=True)"
            )
        with torch.no_grad():
            result = forward.run()
        way = _WayBack(self, forward, result)
        return _Undo.apply(result.iterate.z, problem.z0, way, *way.inputs), result

    def attach(self, forward: Forward, z: Tensor) -> Tensor:
        """Refuse intermediate states: from their points alone there is no way back."""
        raise UserError(
            "ReversibleAdjoint gives no gradient to intermediate states; leave out states=, or "
            "use adjoint=Unrolled(checkpoint=True)"
        )

    def tolerance_for(self, dtype: torch.dtype) -> float:
        """The tolerance in this dtype."""
        return torch.finfo(dtype).eps ** (1 / 4) if self.tolerance is None else self.tolerance


class _WayBack:
    """The last states of a solve, and how to go back from them."""

    def __init__(self, adjoint: ReversibleAdjoint, forward: Forward, result: LoopResult) -> None:
        solver, state = forward.solver, result.solver_state
        if not isinstance(solver, Reversible) or not isinstance(state, ReversibleState):
            raise UserError("ReversibleAdjoint was not given the state of a Reversible solve")
        self._adjoint, self._forward = adjoint, forward
        self._problem: Problem = forward.problem
        self._start = self._problem.z0.detach().clone()  # it may be written to before backward
        self._z, self._y, self._num_steps = result.iterate.z, state.y, result.num_steps
        self._still = (result.num_steps == 0) & (result.status == Status.SUCCESS)
        self._keep = solver.relaxation, 1.0 - solver.relaxation
        self._may_go = torch.isfinite(rms(state.y))
        start = _beginning()
        taped, self.inputs = self._problem.tape(self._z)
        """The tensors that f depends on besides z; found by one evaluation."""
        _require(covers(taped.fz, (taped.z, *self.inputs), start))
        self._versions = self._current_versions()
        self._free_inputs = _free(self.inputs) if is_nested(self.inputs) else self.inputs

    def _current_versions(self) -> list[int]:
        return [tensor._version for tensor in self.inputs]

    def gradients(self, g: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """For z0 and for the inputs, from that of the returned point."""
        began = clock()
        if self._versions != self._current_versions():
            raise UserError(
                "a tensor that f depends on was written to between the solve and the backward "
                "pass, and ReversibleAdjoint evaluates f again there; make the optimiser step "
                "after backward()"
            )
        with without_autocast(g.device):
            rows = self._may_go
            sweep = self._sweep(g, rows)
            lost = ~(rows & (sweep.error <= self._adjoint.tolerance_for(g.dtype)))
            error = torch.where(rows, sweep.error, torch.inf)
            if bool(lost.any()):
                self._complain(lost)
                if bool((lost & rows).any()):
                    sweep = self._sweep(g, ~lost)
                sweep.pull(self._z, torch.where(lost.unsqueeze(1), g, 0.0))  # one step
            still = self._still.unsqueeze(1)
            if bool(still.any()):  # as under Unrolled
                _, pulled = sweep.pull(self._z, torch.where(still, g, 0.0))
                sweep.start = torch.where(still, pulled, sweep.start)
        self._report(sweep, error, lost, clock() - began)
        return sweep.start, sweep.totals

    def _sweep(self, g: Tensor, rows: Tensor) -> _Sweep:
        """Go back with the samples of `rows` (B,); the others stay at their returned points.

        A sample that finished before the last one waits: its z was held, so that only its y went
        on, which the same formula undoes.
        """
        b, rest = self._keep
        sweep = _Sweep(self._problem, self.inputs, self._free_inputs)
        z, y = self._z, self._y
        z_bar, y_bar = torch.where(rows.unsqueeze(1), g, 0.0), torch.zeros_like(g)
        num_steps = int(self._num_steps.max()) if self._num_steps.numel() else 0
        for step in range(num_steps, 0, -1):
            active = (rows & (self._num_steps >= step)).unsqueeze(1)
            image, pulled = sweep.pull(
                torch.where(active, y, self._z), torch.where(active, b * z_bar, 0.0)
            )
            y_bar = y_bar + pulled
            z_bar = torch.where(active, rest * z_bar, z_bar)
            z = torch.where(active, image.lerp(z, 1.0 / rest), self._z)
            image, pulled = sweep.pull(z, torch.where(active, b * y_bar, 0.0))
            z_bar = z_bar + pulled
            y_bar = torch.where(active, rest * y_bar, 0.0)
            y = image.lerp(y, 1.0 / rest)
        sweep.start = torch.where(rows.unsqueeze(1), z_bar + y_bar, 0.0)
        off = torch.maximum(rms(z - self._start), rms(y - self._start))
        sweep.distance = torch.where(torch.isfinite(off), off, torch.inf)
        size = torch.maximum(rms(self._start), rms(self._z))
        sweep.error = sweep.distance / size.clamp_min(torch.finfo(g.dtype).tiny)
        return sweep

    def _complain(self, lost: Tensor) -> None:
        """Follow the failure policy for samples (B,) that have no way back."""
        text = (
            "the way back through the steps of Reversible missed the start. Rounding errors grow "
            "by 1 / (1 - relaxation)^2 a step (take fewer steps, a smaller relaxation, or a "
            'float64 state), the returned point was not the last one (give keep="last"), or the '
            "map is not the same twice (dropout, updated weights)"
        )
        if self._forward.on_failure == "raise":
            raise ConvergenceError(f"for {int(lost.sum())} of {lost.numel()} samples {text}")
        if self._forward.on_failure == "warn":
            warnings.warn(
                f"For some samples {text}. They get the one-step gradient; which they are is in "
                'Solution.backward.result.status; on_failure="raise" or "ignore" changes this.',
                ConvergenceWarning,
                stacklevel=2,
            )

    def _report(self, sweep: _Sweep, error: Tensor, lost: Tensor, seconds: float) -> None:
        self._forward.report.seconds += seconds
        self._forward.report.result = LinearResult(
            u=sweep.start,
            residual=sweep.distance,
            relative_residual=error,
            status=torch.where(lost, Status.DIVERGED, Status.SUCCESS).to(torch.int8),
            num_steps=self._num_steps,
            num_evals=sweep.num_products,
        )


class _Sweep:
    """One way back: what it collects for the inputs of f, and where it ends."""

    start: Tensor
    """Gradient for z0, (B, D)."""
    distance: Tensor
    """From z0 (B,), rms."""
    error: Tensor
    """The same, relative."""

    def __init__(self, problem: Problem, inputs: Sequence[Tensor], free: Sequence[Tensor]) -> None:
        self._problem = problem
        self._exchange = nullcontext() if free is inputs else Exchange(inputs, free)
        self._inputs = free
        self._totals: list[Tensor | None] = [None] * len(inputs)
        self.num_products = 0

    @property
    def totals(self) -> tuple[Tensor | None, ...]:
        """Gradients for the inputs; zeros if no sample made a step."""
        if not self.num_products:
            return tuple(map(torch.zeros_like, self._inputs))
        return tuple(self._totals)

    def pull(self, z: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """f(z), and the cotangent of z that belongs to that of f(z)."""
        start = 0 if self.num_products else _beginning()
        with torch.enable_grad(), self._exchange:
            free = z.detach().requires_grad_()
            image = self._problem.image(free)
        if not image.requires_grad:
            return image, torch.zeros_like(z)
        if not self.num_products:
            _require(covers(image, (free, *self._inputs), start))
        self.num_products += 1
        # materialize_grads would make zeros of the size of every unused weight
        gradients = torch.autograd.grad(image, (free, *self._inputs), cotangent, allow_unused=True)
        pulled, *others = cast("tuple[Tensor | None, ...]", gradients)
        for i, gradient in enumerate(others):
            if gradient is not None:
                total = self._totals[i]
                self._totals[i] = gradient if total is None else total + gradient
        return image.detach(), torch.zeros_like(z) if pulled is None else pulled


def _free(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies of the computed inputs without their history, and the others as they are."""
    return tuple(t if t.grad_fn is None else t.detach().requires_grad_() for t in inputs)


def _beginning() -> int:
    """The position in the graph from where on nodes belong to the evaluation that follows."""
    torch.clear_autocast_cache()  # weights that were cast before have nodes of before
    return graph_position()


def _require(complete: bool) -> None:
    """Raise unless every tensor that f depends on is known."""
    if not complete:
        raise UserError(
            "f depends on a tensor that was not seen when it was evaluated (inside a compiled "
            "function, or exchanged since then), so ReversibleAdjoint would miss its gradient; "
            "name all such tensors in solve(..., inputs=[...]), or use Unrolled()"
        )


class _Undo(torch.autograd.Function):
    """The returned point, with the gradient of all steps for z0 and for the inputs of f."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, z0: Tensor, way: _WayBack, *inputs: Tensor) -> Tensor:
        ctx.way = way
        ctx.set_materialize_grads(False)
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("ReversibleAdjoint")
        if cotangents[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        refuse_batched(cotangents[0])
        start, totals = ctx.way.gradients(cotangents[0])
        return (None, start, None, *totals)
