"""Running figures of a run's solves."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from equilibria.core.solution import Solution
from equilibria.tasks.task import StepLoss

_KEPT_STEPS = 1000
"""Equilibrium steps over which the closing percentiles are taken; bounds memory."""


@dataclass
class Clock:
    """Seconds spent in forward solves, in backward solves and in all of training."""

    forward: float = 0.0
    backward: float = 0.0
    total: float = 0.0

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

    def add(self, step: StepLoss, gradient_norm: Tensor, seconds: float) -> None:
        """Take in one training step after its backward pass."""
        solution = step.solution
        self.clock.forward += solution.seconds
        self.clock.backward += solution.backward.seconds
        self.clock.total += seconds
        self.losses.append(step.loss.detach())
        self.gradient_norms.append(gradient_norm.detach())
        self.num_items += step.num_items
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
            name: [tensor.to(device) for tensor in value] if isinstance(value, list) else value
            for name, value in state.items()
        }
        values["clock"] = Clock(**state["clock"])
        return Interval(**values)

    def record(self) -> dict[str, Any]:
        """Means over the interval, ready for JSON."""
        evals, residuals = torch.cat(self.num_evals).double(), torch.cat(self.residuals)
        return {
            "loss": torch.stack(self.losses).double().mean().item(),
            "gradient_norm": torch.stack(self.gradient_norms).double().mean().item(),
            "num_evals": evals.mean().item(),
            "num_evals_max": evals.max().item(),
            "relative_residual": residuals.mean().item(),
            "relative_residual_max": residuals.max().item(),
            "backward_num_evals": _mean(self.backward_num_evals),
            "backward_relative_residual": _mean(self.backward_residuals),
            "forward_seconds": self.clock.forward,
            "backward_seconds": self.clock.backward,
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


def summarize_solves(num_evals: Tensor, residuals: Tensor) -> dict[str, dict[str, float]]:
    """Mean and 95th percentile over samples of evaluations and relative residual."""
    return {
        "num_evals": _mean_and_p95(num_evals.double()),
        "relative_residual": _mean_and_p95(residuals.double()),
    }


def _mean_and_p95(values: Tensor) -> dict[str, float]:
    # torch.quantile refuses more than 16 million values; a sorted pick has no limit
    rank = max(int(0.95 * values.numel() + 0.5) - 1, 0)
    return {"mean": values.mean().item(), "p95": values.sort().values[rank].item()}


def _mean(values: list[Tensor]) -> float | None:
    return torch.cat(values).double().mean().item() if values else None
