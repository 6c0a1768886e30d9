"""The contract of a gradient method, and the report of its backward solve."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from equilibria.core.functional import solve_transformed
from equilibria.core.linear import LinearResult
from equilibria.core.loop import LoopResult
from equilibria.core.options import Options
from equilibria.core.problem import Problem
from equilibria.core.pure import TransformError, is_forward_mode
from equilibria.core.solver import Solver
from equilibria.core.status import OnFailure
from equilibria.core.warm_start import Start, WarmStart


@dataclass
class BackwardReport:
    """How the backward solve went; empty until a backward pass has run.

    Args:
        result: status, residual and steps of the last backward solve; stays None for gradient
            methods that solve nothing.
        seconds: wall time of all backward solves of this solution so far.
    """

    result: LinearResult | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Forward:
    """A forward solve that an adjoint may run, once, in whichever grad mode it needs.

    `run` solves `problem`, or another problem given to it, with the same settings. `notes` are
    what an adjoint, which is a frozen value, wants to remember of one solve. `start` is the warm
    start of the backward solve, if the adjoint asked for one. `needs_sync` tells whether the solve
    looks at numbers; where it does not, it makes all its steps and nothing else may look either.
    """

    problem: Problem
    run: Callable[..., LoopResult]
    on_failure: OnFailure
    report: BackwardReport = field(default_factory=BackwardReport)
    trace: bool = False
    solver: Solver | None = None
    notes: dict[str, Any] = field(default_factory=dict[str, Any])
    start: Start | None = None
    needs_sync: bool = True


class Adjoint(Options, ABC):
    """How gradients pass through the fixed point.

    Every adjoint returns the same value, the solver's iterate; only the graph edge differs.
    """

    exact: bool = False
    """Whether the gradient is right in the limit of tight tolerances."""

    through_steps: bool = False
    """Whether it is the gradient of the steps made, and so depends on where they began."""

    @property
    def traceable(self) -> bool:
        """Whether torch.compile can make one graph of a solve with this gradient."""
        return False

    @property
    def needs_history(self) -> bool:
        """Whether it looks at what the solver remembers of the whole batch when the solve ends."""
        return self.through_steps

    @property
    def backward_warm_start(self) -> WarmStart | None:
        """Where its backward solve is to start, if it has one that can start warm."""
        return None

    def without_warm_start(self) -> Adjoint:
        """The same with a backward solve that starts cold."""
        return self

    def check(self, solver: Solver) -> None:
        """Raise UserError for a forward solver that this method cannot go with."""

    def apply(self, forward: Forward) -> tuple[Tensor, LoopResult]:
        """Run the solve and return the packed fixed point carrying the graph, and the result.

        Called with grad enabled only; without it there is no gradient to attach.
        """
        with torch.no_grad():
            result = forward.run()
        return self.attach(forward, result.iterate.z), result

    def apply_transformed(self, forward: Forward) -> tuple[Tensor, LoopResult]:
        """`apply` under `torch.func` transforms, `torch.vmap` or forward-mode AD.

        Called in any grad mode. By default values only, since a transform that went past the
        adjoint would get another derivative than the adjoint promises.

        Raises:
            TransformError: a derivative might be asked for.
        """
        if torch.is_grad_enabled() or is_forward_mode():
            raise TransformError(
                f"{type(self).__name__} has no derivative under torch.func transforms, torch.vmap "
                "or forward-mode AD; use adjoint=Implicit(), or torch.no_grad() where vmap is to "
                "give values only"
            )
        return solve_transformed(forward, None)

    @abstractmethod
    def attach(self, forward: Forward, z: Tensor) -> Tensor:
        """Give a packed iterate of the solve its gradient, as if it were the fixed point."""


class AttachGraph(torch.autograd.Function):
    """Give `value` the gradient of `path`: forward is `value`, backward passes to `path`.

    `transform` turns the cotangent of the value into that of the path; None leaves it as it is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        path: Tensor,
        method: str,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        ctx.method = method
        ctx.transform = transform
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[None, Tensor, None, None]:
        refuse_second_derivatives(ctx.method)
        cotangent: Tensor = cotangents[0]
        return None, ctx.transform(cotangent) if ctx.transform else cotangent, None, None


class SecondDerivativeError(RuntimeError):
    """A second derivative was asked of a gradient method that would get it wrong."""


def refuse_second_derivatives(method: str) -> None:
    """Raise when the running backward pass is itself being recorded (`create_graph=True`).

    `once_differentiable` is not enough: it stays silent when the cotangent needs no gradient.
    """
    if torch.is_grad_enabled():
        raise SecondDerivativeError(
            f"{method} has no right second derivative, and backward was called with "
            "create_graph=True; use Implicit() or Unrolled() for second derivatives"
        )
