"""The contract between a task and whatever trains it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from equilibria.core.solution import Solution

Split = Literal["valid", "test"]


class StepLoss(NamedTuple):
    """Loss of one training step (nats, mean over items), how many items, and the solve."""

    loss: Tensor
    num_items: int
    solution: Solution
    phase: Literal["unrolled", "equilibrium"]


@dataclass(frozen=True)
class Evaluation:
    """Result of a pass over a split.

    Args:
        loss: mean nats per item.
        num_items: items scored.
        num_evals: function evaluations each sample needed (num_solves * batch,).
        relative_residual: of each sample (num_solves * batch,).
        seconds: wall time.
    """

    loss: float
    num_items: int
    num_evals: Tensor
    relative_residual: Tensor
    seconds: float


class Task(ABC):
    """What is to be learnt: a loss to step on and a split to be judged by.

    A task owns the model and its place in the data; it knows nothing about optimisers,
    schedules, checkpoints or progress.
    """

    model: nn.Module

    @abstractmethod
    def training_loss(self, step: int) -> StepLoss:
        """Loss of the next batch, with the graph recorded."""

    @abstractmethod
    def evaluate(self, split: Split) -> Evaluation:
        """Score a whole split in eval mode without touching the place in the training data."""

    @abstractmethod
    def trace(self) -> Solution:
        """Solve one validation batch with traces recorded, run its backward pass, return it."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything besides parameters that the next training step depends on."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
