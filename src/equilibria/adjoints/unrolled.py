"""Back-propagation through every step of the solver."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equilibria.core.adjoint import Adjoint, Forward
from equilibria.core.errors import UserError
from equilibria.core.loop import LoopResult
from equilibria.core.pure import TransformError, is_forward_mode
from equilibria.core.solver import Solver
from equilibria.core.status import Status, enforce


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Differentiate the solver's own steps, as in an explicit weight-tied network.

    The gradient is that of the returned iterate whatever its residual, `z0` gets one too, and
    second derivatives are right. Memory grows with the number of steps. With `Picard()` and
    `FixedSteps(k)` this is a weight-tied network of k layers: shallow pre-training.

    A sample that ends where it began, since that met the tolerance, has made no step to be
    differentiated, and no parameter would get a gradient from it. It gets that of f(z0), which is
    the same point to the tolerance: of the shallowest network there is, one layer.

    Args:
        checkpoint: keep only the state of each step and evaluate f again in the backward pass:
            one state per step instead of all that f records, for one more evaluation per step.
            f must give the same result twice (masks and weights made once per solve do).
    """

    checkpoint: bool = False

    exact = True
    through_steps = True

    @property
    def traceable(self) -> bool:
        """Steps are traced like any code, checkpoints with masks drawn inside are not."""
        return not self.checkpoint

    def check(self, solver: Solver) -> None:
        """Refuse a solver whose steps cannot be recorded."""
        if not solver.recordable:
            raise UserError(
                f"{type(solver).__name__} cannot be unrolled, because not all of its steps can be "
                "recorded; use adjoint=Implicit(), or unroll Anderson or Broyden"
            )

    def apply(self, forward: Forward) -> tuple[Tensor, LoopResult]:
        """Run the solve with the graph recorded."""
        forward.problem.checkpoint = self.checkpoint
        result = forward.run()
        z = _with_a_step(forward, result) if forward.needs_sync else result.iterate.z
        return self.attach(forward, z), result

    def apply_transformed(self, forward: Forward) -> tuple[Tensor, LoopResult]:
        """Let the transform differentiate the steps; `torch.vmap` cannot follow them.

        Raises:
            TransformError: the transform maps over the solve, whose loop decides by numbers, or
                evaluations are checkpointed.
        """
        if not (torch.is_grad_enabled() or is_forward_mode()):
            return super().apply_transformed(forward)
        if self.checkpoint:
            raise TransformError(
                "Unrolled(checkpoint=True) has no derivative under torch.func transforms or "
                "forward-mode AD, which checkpointing does not support; use Implicit(), which "
                "needs little memory as well, or Unrolled()"
            )
        try:
            with torch.enable_grad():  # solvers write in place without it, which drops tangents
                z, result = self.apply(forward)
            enforce(result.status, forward.on_failure, "the forward solve")
        except RuntimeError as error:
            if "data-dependent" not in str(error):
                raise
            raise TransformError(
                "Unrolled has no derivative under torch.vmap, because its loop decides by the "
                "numbers of each sample; use adjoint=Implicit(), or torch.no_grad() where vmap is "
                "to give values only"
            ) from error
        return z, result

    def attach(self, forward: Forward, z: Tensor) -> Tensor:
        """A copy: the iterate carries its graph already, and may be the user's own z0."""
        return z.clone()


def _with_a_step(forward: Forward, result: LoopResult) -> Tensor:
    """The iterate, with the gradient of its image where it is the starting point itself."""
    z, fz = result.iterate
    still = (result.num_steps == 0) | (result.status != Status.SUCCESS)
    with torch.no_grad():
        still = still & (z == forward.problem.z0).all(1) & torch.isfinite(fz).all(1)
    if not bool(still.any()):
        return z
    # the value stays that of z, to the last bit: it is the one that was measured
    return torch.where(still.unsqueeze(1), z.detach() + (fz - fz.detach()), z)
