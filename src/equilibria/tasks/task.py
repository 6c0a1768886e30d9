"""The contract between a task and whatever trains it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from equilibria.core.errors import UserError
from equilibria.core.solution import Solution

Split = Literal["valid", "test"]
Phase = Literal["unrolled", "equilibrium", "explicit"]


class Share(NamedTuple):
    """Which rows of every batch this process trains on, where several share the work."""

    rank: int = 0
    num_processes: int = 1

    def rows(self, batch_size: int) -> slice:
        """Rows of a batch.

        Raises:
            UserError: not all processes would get as many, and means of means would be wrong.
        """
        if batch_size % self.num_processes:
            raise UserError(
                f"task.batch_size={batch_size} cannot be shared by {self.num_processes} processes; "
                "it is that of all together, so give a multiple of their number"
            )
        size = batch_size // self.num_processes
        return slice(self.rank * size, (self.rank + 1) * size)

    def rows_if_equal(self, num_rows: int) -> slice:
        """Rows to score; all of them where they cannot be shared equally."""
        return slice(None) if num_rows % self.num_processes else self.rows(num_rows)


class StepLoss(NamedTuple):
    """Loss of a training step or a chunk of it (nats, mean over items), how many items, the solve.

    An explicit model has no solve and one phase. `figures` are other scalars worth a curve. A
    `penalty` is added to what is minimised, and is no part of the loss that is reported. `weight`
    is the chunk's share of the rows of the step.
    """

    loss: Tensor
    num_items: int
    solution: Solution | None
    phase: Phase
    figures: Mapping[str, Tensor] = {}
    penalty: Tensor | None = None
    weight: float = 1.0

    @property
    def minimised(self) -> Tensor:
        """Loss and penalty, weighted so that chunks add up to the mean of the step."""
        total = self.loss if self.penalty is None else self.loss + self.penalty
        return total if self.weight == 1.0 else self.weight * total


class SolveFigures(NamedTuple):
    """What an evaluation remembers of a solve, per sample (B,).

    Not the solution itself, which keeps its problem alive: injection, masks and state.
    """

    num_steps: Tensor
    relative_residual: Tensor
    converged: Tensor

    @staticmethod
    def of(solution: Solution) -> SolveFigures:
        """Of one solution, on the CPU."""
        return SolveFigures(
            solution.num_steps.cpu(), solution.relative_residual.cpu(), solution.converged.cpu()
        )


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
        num_missed: samples whose solves ended before their tolerance.
    """

    loss: float
    num_items: int
    num_evals: Tensor
    relative_residual: Tensor
    seconds: float
    figures: Mapping[str, float] = field(default_factory=dict[str, float])
    num_missed: int = 0

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
            num_missed=sum(int((~solve.converged).sum()) for solve in solves),
        )

    @classmethod
    def gathered(cls, parts: Sequence[Self]) -> Self:
        """One of the evaluations of all shares: means over items, all solves."""
        if len(parts) == 1:
            return parts[0]
        num_items = sum(part.num_items for part in parts)

        def mean(values: Sequence[float]) -> float:
            weighted = zip(values, parts, strict=True)
            return sum(value * part.num_items for value, part in weighted) / max(num_items, 1)

        return cls(
            loss=mean([part.loss for part in parts]),
            num_items=num_items,
            num_evals=torch.cat([part.num_evals for part in parts]),
            relative_residual=torch.cat([part.relative_residual for part in parts]),
            seconds=max(part.seconds for part in parts),
            figures={name: mean([p.figures[name] for p in parts]) for name in parts[0].figures},
            num_missed=sum(part.num_missed for part in parts),
        )

    @property
    def shortfall(self) -> str | None:
        """A sentence about solves that ended before their tolerance; None where none did."""
        if not self.num_missed:
            return None
        return (
            f"{self.num_missed:,} of {self.num_evals.numel():,} solves ended short of their "
            "tolerance; more steps (--max-steps of eval) may change the score"
        )


class TaskConfig(ABC):
    """Options of a task; a frozen dataclass."""

    batch_size: int
    """Of all processes together."""
    pretrain_steps: int


class Task(ABC):
    """What is to be learnt: a loss to step on and a split to be judged by.

    A task owns the model and its place in the data; it knows nothing about optimisers,
    schedules, checkpoints or progress. Of the processes of a training it knows its own share of the
    rows, and a stand-in for the model by which gradients are averaged.
    """

    model: nn.Module
    share: Share = Share()
    distributed: nn.Module | None = None
    """What is called in training instead of the model, or None for the model itself."""

    @property
    def baselines(self) -> dict[str, float]:
        """Losses, in nats per item, of what needs no training; for the report and the plot."""
        return {}

    @abstractmethod
    def training_losses(self, step: int, num_chunks: int = 1) -> Iterator[StepLoss]:
        """Losses of the chunks of the next batch, with the graph recorded.

        Each is to be differentiated before the next is asked for, so that memory is that of one.
        """

    def training_loss(self, step: int) -> StepLoss:
        """Loss of the next batch as a whole."""
        (loss,) = self.training_losses(step)
        return loss

    def recover(self) -> None:  # noqa: B027 - most tasks carry nothing over
        """Drop what the last training step left to the next, because it was not finite."""

    @abstractmethod
    def evaluate(self, split: Split) -> Evaluation:
        """Score this share of a split in eval mode; leaves the place in the training data alone.

        Where a split cannot be shared equally, all score the whole of it.
        """

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
        """Everything besides parameters that the next training step depends on, of this share."""

    def gathered(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One state of the `state_dict` of all shares, in their order, for any number of them."""
        return states[0]

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this share of what `gathered` returned."""


def chunks(tensors: Sequence[Tensor], num_chunks: int) -> Iterator[tuple[Tensor, ...]]:
    """Rows of all tensors in as many parts, whose sizes differ by at most one."""
    check_chunks(len(tensors[0]), num_chunks)
    yield from zip(*(tensor.tensor_split(num_chunks) for tensor in tensors), strict=True)


def check_chunks(num_rows: int, num_chunks: int) -> None:
    """Raise UserError where a chunk would be empty."""
    if num_chunks > num_rows:
        raise UserError(
            f"{num_rows} rows of a process cannot be cut into {num_chunks} chunks; give fewer "
            "train.batch_chunks, or a larger task.batch_size"
        )
