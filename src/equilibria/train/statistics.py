"""Running figures of a run's solves."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from equilibria.core.solution import Solution
from equilibria.tasks.task import Phase, StepLoss

_BINS_PER_DECADE = 8
_KEPT_STEPS = 1000
"""Equilibrium steps over which the closing percentiles are taken; bounds memory."""


class SolveRecord(NamedTuple):
    """Figures of a solve and its backward pass, which keep nothing else of it alive."""

    num_evals: Tensor
    relative_residual: Tensor
    num_failed: int
    backward_num_evals: Tensor | None
    backward_residual: Tensor | None
    forward_seconds: float
    backward_seconds: float

    @staticmethod
    def of(solution: Solution) -> SolveRecord:
        """Of one solve, after its backward pass."""
        backward = solution.backward.result
        return SolveRecord(
            solution.num_steps + 1,
            solution.relative_residual,
            int((solution.status != 0).sum()),
            None if backward is None else backward.num_steps + 1,
            None if backward is None else backward.relative_residual,
            solution.seconds,
            solution.backward.seconds,
        )


class StepRecord(NamedTuple):
    """Figures of a training step, or of a chunk of it; the loss is the mean over its items."""

    loss: Tensor
    num_items: int
    phase: Phase
    figures: dict[str, Tensor]
    solves: tuple[SolveRecord, ...]

    @staticmethod
    def of(step: StepLoss) -> StepRecord:
        """Of a chunk after its backward pass."""
        return StepRecord(
            step.loss.detach() if step.weight == 1.0 else step.weight * step.loss.detach(),
            step.num_items,
            step.phase,
            {name: step.weight * value.detach() for name, value in step.figures.items()},
            () if step.solution is None else (SolveRecord.of(step.solution),),
        )

    @staticmethod
    def joined(chunks: Sequence[StepRecord]) -> StepRecord:
        """Of all chunks of a step, whose losses and figures are weighted already."""
        if len(chunks) == 1:
            return chunks[0]
        names = chunks[0].figures
        return StepRecord(
            torch.stack([chunk.loss for chunk in chunks]).sum(),
            sum(chunk.num_items for chunk in chunks),
            chunks[0].phase,
            {n: torch.stack([chunk.figures[n] for chunk in chunks]).sum() for n in names},
            tuple(solve for chunk in chunks for solve in chunk.solves),
        )


@dataclass
class Clock:
    """Seconds spent in forward solves, in backward solves and in all of training."""

    forward: float = 0.0
    backward: float = 0.0
    total: float = 0.0

    def add(self, solves: Iterable[SolveRecord], seconds: float) -> None:
        """Take in the solves of one training step, which took so long."""
        self.total += seconds
        for solve in solves:
            self.forward += solve.forward_seconds
            self.backward += solve.backward_seconds

    def as_dict(self) -> dict[str, float]:
        """Split into forward, backward and rest."""
        return {
            "forward_seconds": self.forward,
            "backward_seconds": self.backward,
            "rest_seconds": self.total - self.forward - self.backward,
            "total_seconds": self.total,
        }


@dataclass
class Interval:
    """Sums over the steps since the last line of metrics."""

    clock: Clock = field(default_factory=Clock)
    losses: list[Tensor] = field(default_factory=list)
    gradient_norms: list[Tensor] = field(default_factory=list)
    num_items: int = 0
    num_evals: list[Tensor] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)
    backward_num_evals: list[Tensor] = field(default_factory=list)
    backward_residuals: list[Tensor] = field(default_factory=list)
    figures: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])
    num_skipped: int = 0

    def add(self, step: StepRecord, gradient_norm: Tensor, seconds: float) -> None:
        """Take in one training step."""
        self.clock.add(step.solves, seconds)
        self.losses.append(step.loss)
        self.gradient_norms.append(gradient_norm.detach())
        self.num_items += step.num_items
        for name, value in step.figures.items():
            self.figures.setdefault(name, []).append(value)
        for solve in step.solves:
            self._add_solve(solve)

    def skip(self, seconds: float) -> None:
        """Take in a step that changed nothing."""
        self.clock.add((), seconds)
        self.num_skipped += 1

    def _add_solve(self, solve: SolveRecord) -> None:
        self.num_evals.append(solve.num_evals)
        self.residuals.append(solve.relative_residual)
        if solve.backward_num_evals is not None and solve.backward_residual is not None:
            self.backward_num_evals.append(solve.backward_num_evals)
            self.backward_residuals.append(solve.backward_residual)

    @staticmethod
    def gathered(states: Sequence[dict[str, Any]]) -> Interval:
        """The interval of all processes, of the `state_dict` of each; the times of the first."""
        parts = [Interval.from_state_dict(state, torch.device("cpu")) for state in states]
        first = parts[0]
        if len(parts) == 1:
            return first
        return Interval(
            clock=first.clock,
            losses=_means([part.losses for part in parts]),
            gradient_norms=first.gradient_norms,
            num_items=sum(part.num_items for part in parts),
            num_evals=[tensor for part in parts for tensor in part.num_evals],
            residuals=[tensor for part in parts for tensor in part.residuals],
            backward_num_evals=[tensor for part in parts for tensor in part.backward_num_evals],
            backward_residuals=[tensor for part in parts for tensor in part.backward_residuals],
            figures={name: _means([p.figures[name] for p in parts]) for name in first.figures},
            num_skipped=first.num_skipped,
        )

    def without_counts(self) -> Interval:
        """Means of the steps so far, for a process that goes on beside the one that counts."""
        return Interval(
            losses=[*self.losses],
            gradient_norms=[*self.gradient_norms],
            figures={name: [*values] for name, values in self.figures.items()},
        )

    def state_dict(self) -> dict[str, Any]:
        """The sums as plain values and tensors."""
        return {**vars(self), "clock": vars(self.clock)}

    @staticmethod
    def from_state_dict(state: dict[str, Any], device: torch.device) -> Interval:
        """Restore `state_dict`, with the tensors where those to come will be."""
        values: dict[str, Any] = {
            name: _moved(value, device) for name, value in state.items() if name != "clock"
        }
        values["clock"] = Clock(**state["clock"])
        return Interval(**values)

    def record(self) -> dict[str, Any]:
        """Means over the interval, ready for JSON."""
        record: dict[str, Any] = {
            "loss": _mean_of_steps(self.losses),
            "gradient_norm": _mean_of_steps(self.gradient_norms),
            **{name: _mean_of_steps(values) for name, values in self.figures.items()},
        }
        if self.num_skipped:
            record["skipped_steps"] = self.num_skipped
        if self.num_evals:  # an explicit model has none
            evals, residuals = torch.cat(self.num_evals).double(), torch.cat(self.residuals)
            record |= {
                "num_evals": evals.mean().item(),
                "num_evals_max": evals.max().item(),
                "relative_residual": residuals.mean().item(),
                "relative_residual_max": residuals.max().item(),
                "backward_num_evals": _mean(self.backward_num_evals),
                "backward_relative_residual": _mean(self.backward_residuals),
                "forward_seconds": self.clock.forward,
                "backward_seconds": self.clock.backward,
            }
        return {
            **record,
            "seconds": self.clock.total,
            "tokens_per_second": self.num_items / max(self.clock.total, 1e-9),
        }


class _LatestRows:
    """The rows of the latest steps, in one block that is allocated once.

    A small tensor of its own per step would pin the heap around it: the large ones of a step leave
    holes that the next step does not fit into, and memory grows with every step kept.
    """

    def __init__(self) -> None:
        self._block: Tensor | None = None
        self._lengths: deque[int] = deque(maxlen=_KEPT_STEPS)
        self._next = 0

    def append(self, row: Tensor) -> None:
        """Take in one step's samples; the oldest step makes room."""
        if self._block is None or row.numel() > self._block.shape[1]:
            self._widen(row)
        elif row.dtype != self._block.dtype:
            row = row.to(self._block.dtype)
        block = cast(Tensor, self._block)
        block[self._next, : row.numel()] = row
        self._lengths.append(row.numel())
        self._next = (self._next + 1) % _KEPT_STEPS

    def _widen(self, row: Tensor) -> None:
        dtype = row.dtype if self._block is None else self._block.dtype
        block = torch.zeros(_KEPT_STEPS, row.numel(), dtype=dtype)
        if self._block is not None:
            block[:, : self._block.shape[1]] = self._block
        self._block = block

    def rows(self) -> list[Tensor]:
        """Copies of the rows, the oldest first."""
        if self._block is None:
            return []
        first = self._next - len(self._lengths)
        places = ((first + i) % _KEPT_STEPS for i in range(len(self._lengths)))
        return [
            self._block[place, :length].clone()
            for place, length in zip(places, self._lengths, strict=True)
        ]


class SolveStatistics:
    """Function evaluations and residuals of the latest equilibrium steps."""

    def __init__(self) -> None:
        self._num_evals = _LatestRows()
        self._residuals = _LatestRows()

    def add(self, solves: Sequence[SolveRecord]) -> None:
        """Take in the samples of one step."""
        if solves:
            self._num_evals.append(torch.cat([solve.num_evals.cpu() for solve in solves]))
            self._residuals.append(torch.cat([solve.relative_residual.cpu() for solve in solves]))

    def state_dict(self) -> dict[str, list[Tensor]]:
        """The samples as tensors."""
        return {"num_evals": self._num_evals.rows(), "residuals": self._residuals.rows()}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Restore `state_dict`."""
        self._num_evals, self._residuals = _LatestRows(), _LatestRows()
        for evals, residuals in zip(state["num_evals"], state["residuals"], strict=True):
            self._num_evals.append(evals)
            self._residuals.append(residuals)

    def as_dict(self) -> dict[str, dict[str, float]] | None:
        """Mean and 95th percentile, None before the first equilibrium step."""
        samples = self._samples()
        return samples and summarize_solves(*samples)

    def histograms(self) -> dict[str, Any] | None:
        """How often which count and residual occurred, None before the first equilibrium step."""
        samples = self._samples()
        return samples and solve_histograms(*samples)

    def _samples(self) -> tuple[Tensor, Tensor] | None:
        """Evaluations and residuals of all samples."""
        evals, residuals = self._num_evals.rows(), self._residuals.rows()
        return (torch.cat(evals), torch.cat(residuals)) if evals else None


def _moved(value: Any, device: torch.device) -> Any:
    """A saved sum with its tensors, in lists or in dictionaries of lists, on a device."""
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [tensor.to(device) for tensor in cast(list[Tensor], value)]
    return value


def summarize_solves(num_evals: Tensor, residuals: Tensor) -> dict[str, dict[str, float]]:
    """Mean and 95th percentile over samples of evaluations and relative residual."""
    return {
        "num_evals": _mean_and_p95(num_evals.double()),
        "relative_residual": _mean_and_p95(residuals.double()),
    }


def solve_histograms(num_evals: Tensor, residuals: Tensor) -> dict[str, Any]:
    """Every count of evaluations, and residuals by eighths of a decade, with their samples.

    Residuals that are zero or not finite have no place on a logarithmic axis and are counted
    apart, so that no sample is lost.
    """
    counts, samples = num_evals.long().unique(return_counts=True)
    values = residuals.double()
    drawable = values[values.isfinite() & (values > 0)]
    bins = (drawable.log10() * _BINS_PER_DECADE).floor().long()
    places, in_bin = bins.unique(return_counts=True)
    return {
        "num_evals": {"values": counts.tolist(), "samples": samples.tolist()},
        "relative_residual": {
            "bins_per_decade": _BINS_PER_DECADE,
            "bins": places.tolist(),
            "samples": in_bin.tolist(),
            "num_zero": int((values == 0).sum()),
            "num_not_finite": int((~values.isfinite()).sum()),
        },
    }


def _mean_and_p95(values: Tensor) -> dict[str, float]:
    # torch.quantile refuses more than 16 million values; a sorted pick has no limit
    rank = max(int(0.95 * values.numel() + 0.5) - 1, 0)
    return {"mean": values.mean().item(), "p95": values.sort().values[rank].item()}


def _means(steps: Sequence[list[Tensor]]) -> list[Tensor]:
    """Step by step, the mean over processes."""
    return [torch.stack(values).mean(0) for values in zip(*steps, strict=True)]


def _mean_of_steps(values: list[Tensor]) -> float:
    """NaN where every step was skipped."""
    return torch.stack(values).double().mean().item() if values else math.nan


def _mean(values: list[Tensor]) -> float | None:
    return torch.cat(values).double().mean().item() if values else None
