"""The contract of a stopping rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from equilibria.core.iterate import Measurement
from equilibria.core.options import Options


class Termination(Options, ABC):
    """Decides per sample, after every step, whether its solve is over.

    Sees measurements only, never states, so it costs next to nothing and is shared by all
    solvers. NaN and infinity are caught by the loop, whatever a rule says of them.
    """

    @property
    def needs_sync(self) -> bool:
        """Whether the decision depends on the numbers measured; if not, nothing waits for them."""
        return True

    def check_limit(self, max_steps: int) -> None:
        """Raise UserError where a solve of at most `max_steps` steps could not do what it says."""

    @abstractmethod
    def init(self, measurement: Measurement) -> Any:
        """Make the memory for one solve from the measurement of the initial point."""

    def select(self, state: Any, rows: Tensor) -> Any:
        """The memory of some samples only, given by their indices (b,).

        Right for every memory whose tensors end with the batch, (B,) or (..., B).
        """
        return pytree.tree_map_only(Tensor, lambda tensor: tensor[..., rows], state)

    @abstractmethod
    def check(self, measurement: Measurement, step: int, state: Any) -> tuple[Tensor | None, Any]:
        """Return a code (B,) int8 per sample: a `Status`, or RUNNING to go on.

        None says that every sample is finite and goes on, which is the usual case and the one
        that should cost nothing. `step` is the number of steps made so far, 0 for the initial
        point.
        """
