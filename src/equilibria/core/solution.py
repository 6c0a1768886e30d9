"""What a solve returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from equilibria.core.adjoint import BackwardReport
from equilibria.core.state import State
from equilibria.core.status import Status


@dataclass(frozen=True)
class Solution:
    """A fixed point and the evidence for it; per-sample tensors are (B,).

    Args:
        z: the state, in the form of `z0`, carrying the gradient.
        status: `Status` codes, int8.
        residual: rms(f(z) - z) of exactly the returned z, undamped.
        relative_residual: that over rms(f(z)).
        num_steps: solver steps until each sample finished.
        num_evals: calls of f in the forward pass for the whole batch (NFE), the recorded ones
            included.
        seconds: wall time of the forward pass as seen by the host.
        backward: filled in by the backward pass.
        states: the intermediate states asked for, then the final one; empty if none were.
        trace: relative residual after every step (num_steps + 1, B), NaN once a sample is
            finished; None unless asked for.
    """

    z: State
    status: Tensor
    residual: Tensor
    relative_residual: Tensor
    num_steps: Tensor
    num_evals: int
    seconds: float
    backward: BackwardReport
    states: tuple[State, ...] = ()
    trace: Tensor | None = None

    @property
    def converged(self) -> Tensor:
        """Mask (B,) of the samples that met the tolerance."""
        return self.status == Status.SUCCESS
