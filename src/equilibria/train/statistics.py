"""Running figures of a run's solves."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from equilibria.core.solution import Solution
from equilibria.tasks.task import StepLoss

_BINS_PER_DECADE = 8
_KEPT_STEPS = 1000
"""Equilibrium steps over which the closing percentiles are taken; bounds memory."""


@dataclass
class Clock:
    """Seconds spent in forward solves, in backward solves and in all of training."""

    forward: float = 0.0
    backward: float = 0.0
    total: float = 0.0

    def add(self, solution: Solution | None, seconds: float) -> None:
        """Take in one training step after its backward pass."""
        self.total += seconds
        if solution is not None:
            self.forward += solution.seconds
            self.backward += solution.backward.seconds

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

    def add(self, step: StepLoss, gradient_norm: Tensor, seconds: float) -> None:
        """Take in one training step after its backward pass."""
        self.clock.add(step.solution, seconds)
        self.losses.append(step.loss.detach())
        self.gradient_norms.append(gradient_norm.detach())
        self.num_items += step.num_items
        for name, value in step.figures.items():
            self.figures.setdefault(name, []).append(value.detach())
        if step.solution is not None:
            self._add_solve(step.solution)

    def _add_solve(self, solution: Solution) -> None:
        self.num_evals.append(solution.num_steps + 1)
        self.residuals.append(solution.relative_residual)
        if solution.backward.result is not None:
            self.backward_num_evals.append(solution.backward.result.num_steps + 1)
            self.backward_residuals.append(solution.backward.result.relative_residual)

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
            "loss": torch.stack(self.losses).double().mean().item(),
            "gradient_norm": torch.stack(self.gradient_norms).double().mean().item(),
            **{name: torch.stack(v).double().mean().item() for name, v in self.figures.items()},
        }
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


class SolveStatistics:
    """Function evaluations and residuals of the latest equilibrium steps."""

    def __init__(self) -> None:
        self._num_evals: deque[Tensor] = deque(maxlen=_KEPT_STEPS)
        self._residuals: deque[Tensor] = deque(maxlen=_KEPT_STEPS)

    def add(self, solution: Solution) -> None:
        """Take in the samples of one solve."""
        self._num_evals.append(solution.num_steps.cpu() + 1)
        self._residuals.append(solution.relative_residual.cpu())

    def state_dict(self) -> dict[str, list[Tensor]]:
        """The samples as tensors."""
        return {"num_evals": list(self._num_evals), "residuals": list(self._residuals)}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Restore `state_dict`."""
        self._num_evals = deque(state["num_evals"], maxlen=_KEPT_STEPS)
        self._residuals = deque(state["residuals"], maxlen=_KEPT_STEPS)

    def as_dict(self) -> dict[str, dict[str, float]] | None:
        """Mean and 95th percentile, None before the first equilibrium step."""
        if not self._num_evals:
            return None
        return summarize_solves(torch.cat(list(self._num_evals)), torch.cat(list(self._residuals)))

    def histograms(self) -> dict[str, Any] | None:
        """How often which count and residual occurred, None before the first equilibrium step."""
        if not self._num_evals:
            return None
        return solve_histograms(torch.cat(list(self._num_evals)), torch.cat(list(self._residuals)))


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


def _mean(values: list[Tensor]) -> float | None:
    return torch.cat(values).double().mean().item() if values else None
