"""The contract between a task and whatever trains it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from equilibria.core.solution import Solution

Split = Literal["valid", "test"]
Phase = Literal["unrolled", "equilibrium", "explicit"]


class StepLoss(NamedTuple):
    """Loss of one training step (nats, mean over items), how many items, and the solve.

    An explicit model has no solve and one phase. `figures` are other scalars worth a curve. A
    `penalty` is added to what is minimised, and is no part of the loss that is reported.
    """

    loss: Tensor
    num_items: int
    solution: Solution | None
    phase: Phase
    figures: Mapping[str, Tensor] = {}
    penalty: Tensor | None = None

    @property
    def minimised(self) -> Tensor:
        """Loss and penalty."""
        return self.loss if self.penalty is None else self.loss + self.penalty


class SolveFigures(NamedTuple):
    """What an evaluation remembers of a solve, per sample (B,).

    Not the solution itself, which keeps its problem alive: injection, masks and state.
    """

    num_steps: Tensor
    relative_residual: Tensor

    @staticmethod
    def of(solution: Solution) -> SolveFigures:
        """Of one solution, on the CPU."""
        return SolveFigures(solution.num_steps.cpu(), solution.relative_residual.cpu())


@dataclass(frozen=True)
class Evaluation:
    """Result of a pass over a split.

    Args:
        loss: mean nats per item.
        num_items: items scored.
        num_evals: function evaluations each sample needed (num_solves * batch,); empty for an
            explicit model.
        relative_residual: of each sample (num_solves * batch,).
        seconds: wall time.
        figures: other measures of the task, by name.
    """

    loss: float
    num_items: int
    num_evals: Tensor
    relative_residual: Tensor
    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict[str, float])

    @classmethod
    def of_solves(
        cls,
        loss: float,
        num_items: int,
        solves: Sequence[SolveFigures],
        seconds: float,
        figures: Mapping[str, float] | None = None,
    ) -> Self:
        """Gather evaluations and residuals of the solves of a pass; none for explicit models."""
        none = torch.empty(0)
        return cls(
            loss=loss,
            num_items=num_items,
            num_evals=torch.cat([none, *(solve.num_steps + 1 for solve in solves)]),
            relative_residual=torch.cat([none, *(solve.relative_residual for solve in solves)]),
            seconds=seconds,
            figures=figures or {},
        )


class TaskConfig(ABC):
    """Options of a task; a frozen dataclass."""

    pretrain_steps: int


class Task(ABC):
    """What is to be learnt: a loss to step on and a split to be judged by.

    A task owns the model and its place in the data; it knows nothing about optimisers,
    schedules, checkpoints or progress.
    """

    model: nn.Module

    @property
    def baselines(self) -> dict[str, float]:
        """Losses, in nats per item, of what needs no training; for the report and the plot."""
        return {}

    @abstractmethod
    def training_loss(self, step: int) -> StepLoss:
        """Loss of the next batch, with the graph recorded."""

    @abstractmethod
    def evaluate(self, split: Split) -> Evaluation:
        """Score a whole split in eval mode without touching the place in the training data."""

    @abstractmethod
    def trace(self) -> Solution | None:
        """Solve one validation batch with traces recorded, run its backward pass, return it.

        None when the model solves nothing.
        """

    @abstractmethod
    def shown(self, record: dict[str, Any]) -> dict[str, str]:
        """What a record of metrics says in the task's own terms, for the progress line."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything besides parameters that the next training step depends on."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
