"""The contract of a fixed-point solver."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from equilibria.core.iterate import Iterate
from equilibria.core.options import Options
from equilibria.core.problem import Evaluate


class Solver(Options, ABC):
    """A rule that turns the current iterate into the next one.

    A solver is a frozen dataclass of hyper-parameters; what it remembers lives in a separate
    state, so one solver object serves any number of solves at once. Stopping, bookkeeping and
    freezing of finished samples belong to the loop, not here.
    """

    @property
    def single_evaluation(self) -> bool:
        """Whether a step is `evaluate(propose(iterate, state))` and nothing else.

        Saying so promises that `propose` asks for no numbers (no `bool(tensor)`, no `.item()`),
        so that a solve of fixed steps never waits for the device and can be compiled as one graph;
        and that the evaluation after the last step may go unrecorded.
        """
        return False

    @property
    def prefers_fused(self) -> bool | None:
        """What a solver with an option `fused` was given; None, automatic, for the others."""
        return getattr(self, "fused", None)

    @property
    def recordable(self) -> bool:
        """Whether its steps can be recorded and differentiated, as `Unrolled` does."""
        return True

    @abstractmethod
    def init(self, iterate: Iterate, max_steps: int) -> Any:
        """Make the memory for one solve of at most `max_steps` steps."""

    @abstractmethod
    def step(self, evaluate: Evaluate, iterate: Iterate, state: Any) -> tuple[Iterate, Any]:
        """Make one step: choose the next point and return it with its image.

        May write to its own buffers in `state`, never to `iterate`. Samples are independent:
        row b of the result depends on row b of what it is given only.
        """

    @property
    def separable(self) -> bool:
        """Whether `select` is there, so that finished samples can leave the batch."""
        return False

    def select(self, state: Any, rows: Tensor) -> Any:
        """The memory of some samples only, given by their indices (b,); see `separable`."""
        raise NotImplementedError(f"{type(self).__name__} cannot take its memory apart")

    def inverse_jacobian_t(self, state: Any, iterate: Iterate) -> Callable[[Tensor], Tensor] | None:
        """The estimate of u = (I - J^T)^-1 g that the solve has built, as a map g -> u on (B, D).

        For the `Shine` gradient. Asked once, after the solve: `state` is its memory, which may be
        written to, and `iterate` what it returned. The map keeps only what it needs. None where a
        method estimates no Jacobian, which is the default.
        """
        return None
