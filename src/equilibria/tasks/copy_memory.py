"""Copy memory: repeat at the end of a sequence the symbols it began with."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.api import SolveSettings
from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer
from equilibria.core.solution import Solution
from equilibria.models.config import unrolled_settings
from equilibria.tasks.task import (
    Evaluation,
    Phase,
    SolveFigures,
    Split,
    StepLoss,
    Task,
    TaskConfig,
    chunks,
)

_ALPHABET_SIZE = 8


class Batch(Protocol):
    """Inputs and targets (B, L), int64."""

    @property
    def inputs(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...


@runtime_checkable  # an experiment asks whether its data are one
class CopySource(Protocol):
    """Sequences to copy: training batches by number, and two splits that never change."""

    @property
    def vocabulary_size(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def num_symbols(self) -> int: ...
    def training_batch(self, index: int, batch_size: int) -> Batch: ...
    def evaluation_batches(self, split: Split, batch_size: int) -> Iterator[Batch]: ...
    def describe(self) -> dict[str, object]: ...


class SequenceOutput(Protocol):
    """Logits (B, L, V), and the solve of a model that solves something."""

    @property
    def logits(self) -> Tensor: ...
    @property
    def solution(self) -> Solution | None: ...


class SequenceModel(Protocol):
    """What this task needs of a model."""

    def __call__(
        self, tokens: Tensor, *, settings: SolveSettings | None = None, trace: bool = False
    ) -> SequenceOutput: ...


@dataclass(frozen=True)
class CopyMemoryConfig(TaskConfig):
    """Batches of copy memory."""

    batch_size: int = 32
    """Sequences per training step; each is new."""
    pretrain_steps: int = 0
    """First steps trained as an unrolled weight-tied network, before equilibria are solved."""
    pretrain_layers: int = 2
    """Depth of that network."""
    eval_batch_size: int = 32
    """Sequences at a time in evaluation; changes memory and time, not the score."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "pretrain_layers", "eval_batch_size"):
            check_positive_integer(name, getattr(self, name))
        if self.pretrain_steps < 0:
            raise UserError(f"pretrain_steps={self.pretrain_steps} must be at least 0")


class CopyMemory(Task):
    """Mean cross-entropy over all positions, and how many symbols come back.

    A model that knows where the symbols go but none of them has the loss n log 8 / (T + 2 n),
    0.0495 for T = 400 and n = 10: `baselines`.

    Args:
        model: a sequence model on the device where everything is to run.
        config: batches and shallow pre-training.
        source: the sequences.
    """

    def __init__(self, model: SequenceModel, config: CopyMemoryConfig, source: CopySource) -> None:
        self.model = cast(nn.Module, model)
        self.config = config
        self._source = source
        self._num_served = 0

    @property
    def baselines(self) -> dict[str, float]:
        """Loss without memory."""
        count = self._source.num_symbols
        return {"memoryless": count * math.log(_ALPHABET_SIZE) / self._source.length}

    def training_losses(self, step: int, num_chunks: int = 1) -> Iterator[StepLoss]:
        """Mean cross-entropy of the next batch; see `Task.training_losses`."""
        batch = self._source.training_batch(self._num_served, self.config.batch_size)
        self._num_served += 1
        rows = self.share.rows(self.config.batch_size)
        inputs, targets = batch.inputs[rows], batch.targets[rows]
        for chunk in chunks((inputs, targets), num_chunks):
            loss = self._chunk_loss(step, *chunk)
            yield loss._replace(weight=len(chunk[0]) / len(inputs))

    def _chunk_loss(self, step: int, inputs: Tensor, targets: Tensor) -> StepLoss:
        """Loss of some rows."""
        unrolled = step < self.config.pretrain_steps
        settings = unrolled_settings(self.config.pretrain_layers) if unrolled else None
        output = self._call(self.distributed or self.model, inputs, settings=settings)
        logits, targets = output.logits.float(), targets.to(output.logits.device)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        phase: Phase = "unrolled" if unrolled else "equilibrium"
        return StepLoss(
            loss,
            targets.numel(),
            output.solution,
            "explicit" if output.solution is None else phase,
            {"recall": self._recalled(logits, targets).double().mean()},
        )

    def evaluate(self, split: Split) -> Evaluation:
        """Score a split; its figures are the shares of symbols and of sequences recalled.

        The logarithms are taken in float64: a loss of 1e-6 is the mean of numbers that float32
        rounds to multiples of 1e-7.
        """
        start = time.perf_counter()
        total, num_items = 0.0, 0
        recalled: list[Tensor] = []
        solves: list[SolveFigures] = []
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for batch in self._source.evaluation_batches(split, self.config.eval_batch_size):
                    rows = self.share.rows_if_equal(len(batch.inputs))
                    output = self._call(self.model, batch.inputs[rows])
                    logits, targets = output.logits.double().cpu(), batch.targets[rows]
                    total += F.cross_entropy(
                        logits.flatten(0, 1), targets.flatten(), reduction="sum"
                    ).item()
                    num_items += targets.numel()
                    recalled.append(self._recalled(logits, targets))
                    if output.solution is not None:
                        solves.append(SolveFigures.of(output.solution))
        finally:
            self.model.train(was_training)
        right = torch.cat(recalled)
        return Evaluation.of_solves(
            loss=total / num_items,
            num_items=num_items,
            solves=solves,
            seconds=time.perf_counter() - start,
            figures={
                "recall": right.double().mean().item(),
                "exact_recall": right.all(dim=1).double().mean().item(),
            },
        )

    def trace(self) -> Solution | None:
        """Trace both solves on a validation batch; see `Task.trace`."""
        batch = next(self._source.evaluation_batches("valid", self.config.eval_batch_size))
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.enable_grad():
                output = self._call(self.model, batch.inputs, trace=True)
                if output.solution is None:
                    return None
                targets = batch.targets.to(output.logits.device)
                loss = F.cross_entropy(output.logits.float().flatten(0, 1), targets.flatten())
                # grad() and not backward(): a look at the model leaves no gradients behind.
                parameters = [p for p in self.model.parameters() if p.requires_grad]
                torch.autograd.grad(loss, parameters, allow_unused=True)
        finally:
            self.model.train(was_training)
        return output.solution

    def shown(self, record: dict[str, Any]) -> dict[str, str]:
        """The share of symbols recalled; unknown where every step was skipped."""
        return {"recall": f"{record['recall']:.1%}"} if "recall" in record else {}

    def state_dict(self) -> dict[str, Any]:
        """The number of the next batch."""
        return {"num_served": self._num_served}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; see `Task.load_state_dict`."""
        num_served = state["num_served"]
        if type(num_served) is not int or num_served < 0:  # a bool is an int to isinstance
            raise UserError(
                f"the saved place in the data is {str(num_served)[:60]!r}, expected the number of "
                "the next batch; the checkpoint is damaged, resume from another one"
            )
        self._num_served = num_served

    def _call(
        self,
        model: nn.Module,
        inputs: Tensor,
        settings: SolveSettings | None = None,
        trace: bool = False,
    ) -> SequenceOutput:
        device = next(self.model.parameters()).device
        return cast(SequenceModel, model)(inputs.to(device), settings=settings, trace=trace)

    def _recalled(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Whether each symbol (B, n) at the end is the most likely one."""
        count = self._source.num_symbols
        return logits[:, -count:].argmax(dim=-1) == targets[:, -count:]
