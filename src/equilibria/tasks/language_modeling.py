"""Language modelling: predict the next token, segment by segment, with memory across segments."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from equilibria.api import SolveSettings
from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer
from equilibria.core.solution import Solution
from equilibria.models.config import SolveConfig, unrolled_settings
from equilibria.tasks.stabilisers import StabiliserConfig
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


class Segment(Protocol):
    """Inputs and targets (B, L) of one segment, and whether the streams begin with it."""

    @property
    def inputs(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def starts(self) -> bool: ...


class TrainingSource(Protocol):
    """Endless training segments with a place that can be saved."""

    def next_segment(self) -> Segment: ...
    def state_dict(self) -> dict[str, int]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class LanguageModelOutput(Protocol):
    """What a language model returns for a segment."""

    @property
    def logits(self) -> Tensor: ...
    @property
    def losses(self) -> Tensor | None: ...
    @property
    def memory(self) -> tuple[Tensor, ...]: ...
    @property
    def solution(self) -> Solution | None: ...


class LanguageModel(Protocol):
    """What this task needs of a model."""

    def __call__(
        self,
        tokens: Tensor,
        memory: Any = None,
        *,
        targets: Tensor | None = None,
        memory_length: int = 0,
        settings: SolveSettings | None = None,
        trace: bool = False,
    ) -> LanguageModelOutput: ...
    def memory_from(self, tensors: Sequence[Tensor]) -> Any: ...


@dataclass(frozen=True)
class LanguageModelingConfig(TaskConfig):
    """Batches, segments and memory of language modelling."""

    batch_size: int = 16
    """Parallel streams of text in training."""
    segment_length: int = 64
    """Tokens per segment; gradients do not cross its borders."""
    memory_length: int = 64
    """Positions of the previous segments that training attends to; 0 for none."""
    pretrain_steps: int = 0
    """First steps trained as an unrolled weight-tied network, before equilibria are solved."""
    pretrain_layers: int = 2
    """Depth of that network."""
    stabilisers: StabiliserConfig = StabiliserConfig()
    """Jacobian regularisation and random step limits."""
    eval_streams: int = 8
    """Parallel streams in evaluation; each starts without context, 1 reads the text end to end."""
    eval_memory_length: int | None = None
    """Memory in evaluation; None: as in training."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "segment_length", "pretrain_layers", "eval_streams"):
            check_positive_integer(name, getattr(self, name))
        if self.memory_length < 0 or (self.eval_memory_length or 0) < 0:
            given = min(self.memory_length, self.eval_memory_length or 0)
            raise UserError(f"a memory of {given} positions is impossible; give 0 for no memory")
        if self.pretrain_steps < 0:
            raise UserError(f"pretrain_steps={self.pretrain_steps} must be at least 0")

    @property
    def memory_length_in_evaluation(self) -> int:
        """The memory evaluation uses, after defaults."""
        return self.memory_length if self.eval_memory_length is None else self.eval_memory_length


class LanguageModeling(Task):
    """Truncated back-propagation through time over contiguous streams.

    Args:
        model: a language model on the device where everything is to run.
        config: batches, segments and memory.
        training: source of training segments; None of a task that only scores.
        evaluation: gives the segments of a split, every token a target exactly once.
        solve: how the model's equilibria are solved, which stabilisers vary; None of an explicit
            model.
        seed: of what the stabilisers draw.

    Raises:
        UserError: stabilisers for a model that solves nothing.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: LanguageModelingConfig,
        training: TrainingSource | None,
        evaluation: Callable[[Split], Iterable[Segment]],
        solve: SolveConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.model = cast(nn.Module, model)
        self.config = config
        self._source = training
        self._evaluation = evaluation
        self._memory: Any = None
        self._solve, self._seed = solve, seed
        if solve is None and config.stabilisers != StabiliserConfig():
            raise UserError(
                "task.stabilisers are given, and the model has no equilibrium to stabilise; leave "
                "them at their defaults"
            )

    @property
    def language_model(self) -> LanguageModel:
        """The model, as this task calls it."""
        return cast(LanguageModel, self.model)

    @property
    def _trained(self) -> LanguageModel:
        return cast(LanguageModel, self.distributed or self.model)

    @property
    def _training(self) -> TrainingSource:
        if self._source is None:
            raise UserError("the task was made without training segments; it can only score")
        return self._source

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def training_losses(self, step: int, num_chunks: int = 1) -> Iterator[StepLoss]:
        """Mean cross-entropy of the next segment; see `Task.training_losses`."""
        segment = self._training.next_segment()
        rows = self.share.rows(len(segment.inputs))
        before = self._memory
        if segment.starts or before is None:
            before = ()
        inputs, targets = segment.inputs[rows], segment.targets[rows]
        memories: list[tuple[Tensor, ...]] = []
        for chunk in chunks((inputs, targets, *before), num_chunks):
            loss, memory = self._chunk_loss(step, chunk[0], chunk[1], chunk[2:])
            memories.append(memory)
            if len(memories) == num_chunks:  # before the last is handed out: nobody may come back
                self._memory = self._joined(memories)
            yield loss._replace(weight=len(chunk[0]) / len(inputs))

    def _chunk_loss(
        self, step: int, inputs: Tensor, targets: Tensor, memory: Sequence[Tensor]
    ) -> tuple[StepLoss, tuple[Tensor, ...]]:
        """Loss of some rows, and the memory they leave."""
        unrolled = step < self.config.pretrain_steps
        output = self._trained(
            inputs.to(self._device),
            self.language_model.memory_from(memory) if memory else None,
            targets=targets.to(self._device),
            memory_length=self.config.memory_length,
            settings=self._settings(step),
        )
        phase: Phase = "unrolled" if unrolled else "equilibrium"
        penalty = None
        if output.solution is not None and not unrolled:
            penalty = self.config.stabilisers.penalty(
                output.solution, step, self._seed, self.config.pretrain_steps
            )
        loss = StepLoss(
            _losses(output).mean(),
            targets.numel(),
            output.solution,
            "explicit" if output.solution is None else phase,
            {} if penalty is None else {"jacobian_penalty": penalty},
            penalty,
        )
        return loss, output.memory if self.config.memory_length else ()

    def _joined(self, memories: Sequence[tuple[Tensor, ...]]) -> Any:
        """The memory of all rows of this process."""
        if not memories[0]:
            return None
        if len(memories) == 1:
            return memories[0]
        parts = [torch.cat(tensors) for tensors in zip(*memories, strict=True)]
        return self.language_model.memory_from(parts)

    def recover(self) -> None:
        """Forget the memory; the streams go on without context."""
        self._memory = None

    def _settings(self, step: int) -> SolveSettings | None:
        """Of the solve of a training step; None for those of the model."""
        if step < self.config.pretrain_steps:
            return unrolled_settings(self.config.pretrain_layers)
        if self._solve is None:
            return None
        return self.config.stabilisers.settings(self._solve, step, self._seed)

    def evaluate(self, split: Split) -> Evaluation:
        """Score a split with the evaluation settings; see `Task.evaluate`."""
        start = time.perf_counter()
        total, num_items, memory = 0.0, 0, None
        solves: list[SolveFigures] = []
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for segment in self._evaluation(split):
                    memory = None if segment.starts else memory
                    rows = self.share.rows_if_equal(len(segment.inputs))
                    targets = segment.targets[rows]
                    output = self.language_model(
                        segment.inputs[rows].to(self._device),
                        memory,
                        targets=targets.to(self._device),
                        memory_length=self.config.memory_length_in_evaluation,
                    )
                    memory = output.memory if self.config.memory_length_in_evaluation else None
                    total += _losses(output).sum().item()
                    num_items += int((targets >= 0).sum())
                    if output.solution is not None:
                        solves.append(SolveFigures.of(output.solution))
        finally:
            self.model.train(was_training)
        return Evaluation.of_solves(
            loss=total / max(num_items, 1),
            num_items=num_items,
            solves=solves,
            seconds=time.perf_counter() - start,
        )

    def trace(self) -> Solution | None:
        """Trace both solves on the first validation segment; see `Task.trace`."""
        segment = next(iter(self._evaluation("valid")))
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.enable_grad():
                output = self.language_model(
                    segment.inputs.to(self._device),
                    targets=segment.targets.to(self._device),
                    trace=True,
                )
                if output.solution is None:
                    return None
                loss = _losses(output).mean()
                # grad() and not backward(): a look at the model leaves no gradients behind.
                parameters = [p for p in self.model.parameters() if p.requires_grad]
                torch.autograd.grad(loss, parameters, allow_unused=True)
        finally:
            self.model.train(was_training)
        return output.solution

    def shown(self, record: dict[str, Any]) -> dict[str, str]:
        """The perplexity of the mean loss."""
        return {"ppl": f"{math.exp(min(record['loss'], 50.0)):.2f}"}

    def state_dict(self) -> dict[str, Any]:
        """Place in the text, and the memory that came with it."""
        memory = None if self._memory is None else [t.cpu() for t in self._memory]
        return {"training": self._training.state_dict(), "memory": memory}

    def gathered(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The memory of all rows; see `Task.gathered`."""
        memories = [state["memory"] for state in states]
        memory = memories[0] and [torch.cat(parts) for parts in zip(*memories, strict=True)]
        return {**states[0], "memory": memory}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore this share of the rows; see `Task.load_state_dict`."""
        self._training.load_state_dict(state["training"])
        tensors, rows = state["memory"], self.share.rows(self.config.batch_size)
        self._memory = None
        if tensors is not None:
            self._check_memory(tensors)
            memory = self.language_model.memory_from([t[rows] for t in tensors])
            self._memory = self.language_model.memory_from([t.to(self._device) for t in memory])

    def _check_memory(self, tensors: Sequence[Tensor]) -> None:
        """Find out before training whether segments can go on from a saved memory.

        The model checks what else it knows of it.

        Raises:
            UserError: it is of another batch, or not what a forward pass leaves.
        """
        wanted = next(self.model.parameters()).dtype
        rows = {tuple(tensor.shape[:2]) for tensor in tensors}
        if len(rows) != 1 or len(first := rows.pop()) < 2 or first[0] != self.config.batch_size:
            raise UserError(
                f"the saved memory has shapes {[tuple(t.shape) for t in tensors][:4]}, expected "
                f"{self.config.batch_size} rows of one length; the checkpoint is damaged, resume "
                "from another one"
            )
        for tensor in tensors:
            is_view = tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
            if is_view or torch.promote_types(tensor.dtype, wanted) != wanted:
                raise UserError(
                    f"the saved memory is of {tensor.dtype} or has fewer numbers than its shape; "
                    "the checkpoint is damaged, resume from another one"
                )


def _losses(output: LanguageModelOutput) -> Tensor:
    if output.losses is None:
        raise UserError(
            "the model was called with targets and returned no losses; its output needs a field "
            "'losses' with their negative log-likelihoods (B, L)"
        )
    return output.losses
