"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from equilibria.core.errors import UserError, nearest
from equilibria.core.parameters import check_not_negative, check_positive_integer

OptimizerName = Literal["adam", "adamw", "radam", "sgd"]
Schedule = Literal["cosine", "constant", "inverse-sqrt", "plateau"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimiser, learning-rate schedule and gradient clipping."""

    name: OptimizerName = "adam"
    """Which optimiser."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled for adamw, added to the gradient for the others."""
    momentum: float = 0.9
    """Of sgd."""
    beta2: float = 0.999
    """Decay per step of the mean squared gradient, of the others; a smaller one, such as 0.98,
    soon forgets how large the gradients of the first steps were."""
    schedule: Schedule = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises linearly to its peak."""
    final_fraction: float = 0.02
    """Where the cosine ends, and below which plateaus do not lower the rate, as a share of the
    peak."""
    plateau_factor: float = 0.5
    """What the rate is multiplied with when the validation loss stands still."""
    plateau_patience: int = 1
    """Evaluations without a new best loss that are waited for before that."""
    clip_norm: float = 0.25
    """Gradients are scaled down to this norm; 0 for no clipping."""

    def __post_init__(self) -> None:
        _check_choice("name", self.name, OptimizerName)
        _check_choice("schedule", self.schedule, Schedule)
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate={self.learning_rate} must be a number above 0")
        if not 0 <= self.beta2 < 1:
            raise UserError(f"beta2={self.beta2} must be at least 0 and below 1, such as 0.98")
        if not 0 < self.plateau_factor <= 1:
            raise UserError(f"plateau_factor={self.plateau_factor} must be above 0 and at most 1")
        check_positive_integer("plateau_patience", self.plateau_patience)
        for name in ("weight_decay", "momentum", "warmup_steps", "final_fraction", "clip_norm"):
            check_not_negative(name, getattr(self, name))

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimiser."""
        rate, decay, betas = self.learning_rate, self.weight_decay, (0.9, self.beta2)
        match self.name:
            case "adam":
                return torch.optim.Adam(parameters, rate, betas, weight_decay=decay)
            case "adamw":
                return torch.optim.AdamW(parameters, rate, betas, weight_decay=decay)
            case "radam":
                return torch.optim.RAdam(parameters, rate, betas, weight_decay=decay)
            case "sgd":
                return torch.optim.SGD(parameters, rate, self.momentum, weight_decay=decay)

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Learning rate of 0-based `step` out of `num_steps`; a pure function, nothing to save."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        match self.schedule:
            case "constant" | "plateau":
                factor = 1.0
            case "inverse-sqrt":
                factor = math.sqrt(max(self.warmup_steps, 1) / (step + 1))
            case "cosine":
                span = max(num_steps - self.warmup_steps, 1)
                progress = min((step - self.warmup_steps) / span, 1.0)
                falling = 0.5 * (1.0 + math.cos(math.pi * progress))
                factor = self.final_fraction + (1.0 - self.final_fraction) * falling
        return self.learning_rate * factor


@dataclass
class Plateau:
    """How far the schedule "plateau" has lowered the learning rate, and what it waits for."""

    factor: float = 1.0
    best: float = math.inf
    waited: int = 0

    def see(self, loss: float, config: OptimizerConfig) -> None:
        """Take note of a validation loss."""
        if config.schedule != "plateau":
            return
        if loss < self.best:
            self.best, self.waited = loss, 0
            return
        self.waited += 1
        if self.waited >= config.plateau_patience:
            lowered = max(self.factor * config.plateau_factor, config.final_fraction)
            self.factor, self.waited = float(min(lowered, self.factor)), 0


def _check_choice(name: str, given: str, choices: Any) -> None:
    known = get_args(choices)
    if given not in known:
        raise UserError(
            f"{name}={given!r} is not one of {', '.join(known)}{nearest(str(given), known)}"
        )
