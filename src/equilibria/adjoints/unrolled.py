"""Back-propagation through every step of the solver."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from equilibria.core.adjoint import Adjoint, Forward
from equilibria.core.loop import LoopResult


@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Differentiate the solver's own steps, as in an explicit weight-tied network.

    The gradient is that of the returned iterate whatever its residual, `z0` gets one too, and
    second derivatives are right. Memory grows with the number of steps. With `Picard()` and
    `FixedSteps(k)` this is a weight-tied network of k layers: shallow pre-training.

    Args:
        checkpoint: keep only the state of each step and evaluate f again in the backward pass:
            one state per step instead of all that f records, for one more evaluation per step.
            f must give the same result twice (masks and weights made once per solve do).
    """

    checkpoint: bool = False

    exact = True

    def apply(self, forward: Forward) -> tuple[Tensor, LoopResult]:
        """Run the solve with the graph recorded."""
        forward.problem.checkpoint = self.checkpoint
        result = forward.run()
        return self.attach(forward, result.iterate.z), result

    def attach(self, forward: Forward, z: Tensor) -> Tensor:
        """A copy: the iterate carries its graph already, and may be the user's own z0."""
        return z.clone()
