"""What keeps the equilibria of a training run easy to solve: a penalty and a random limit."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from torch import Tensor

from equilibria.api import SolveSettings
from equilibria.core.errors import UserError
from equilibria.core.parameters import check_not_negative, check_positive_integer
from equilibria.core.solution import Solution
from equilibria.models.config import SolveConfig
from equilibria.regularizers.jacobian import JacobianRegularizer
from equilibria.regularizers.schedule import StepwiseWeight


@dataclass(frozen=True)
class StabiliserConfig:
    """Jacobian regularisation and random step limits, at equilibrium steps of training."""

    jacobian_weight: float = 0.0
    """Of the penalty ||J||^2 / D at the fixed point; 0 for none. 1.9 to 2 are published for
    language models."""
    jacobian_probability: float = 1.0
    """Of applying it at a step; .35 to .4 are published."""
    jacobian_increase: float = 0.0
    """What is added to the weight every so many steps; not before the pre-training has ended."""
    jacobian_increase_every: int | None = None
    """Steps between two increases."""
    step_jitter: int = 0
    """Forward solves stop at a limit drawn from the step limit less so many, up to the limit."""

    def __post_init__(self) -> None:
        check_not_negative("jacobian_weight", self.jacobian_weight)
        check_not_negative("step_jitter", self.step_jitter)
        self._regularizer(0)
        if self.jacobian_increase_every is not None:
            check_positive_integer("jacobian_increase_every", self.jacobian_increase_every)

    def penalty(
        self, solution: Solution, step: int, seed: int, pretrain_steps: int = 0
    ) -> Tensor | None:
        """What to add to the loss of a training step; None where the penalty is off."""
        if self.jacobian_weight == 0.0 and self.jacobian_increase == 0.0:
            return None
        return self._regularizer(seed, pretrain_steps)(solution, step=step)

    def settings(self, solve: SolveConfig, step: int, seed: int) -> SolveSettings | None:
        """Settings of a training step; None for those of the model.

        Decided by a hash of seed and step: the same on all ranks, and after resuming.

        Raises:
            UserError: the jitter leaves no step.
        """
        if not self.step_jitter:
            return None
        if self.step_jitter >= solve.max_steps:
            raise UserError(
                f"step_jitter={self.step_jitter} leaves no steps of max_steps={solve.max_steps}; "
                "give less"
            )
        drawn = random.Random(f"{seed}:{step}:jitter").randint(0, self.step_jitter)
        return replace(solve.train_settings(), max_steps=solve.max_steps - drawn)

    def _regularizer(self, seed: int, pretrain_steps: int = 0) -> JacobianRegularizer:
        schedule = StepwiseWeight(
            self.jacobian_weight, self.jacobian_increase, self.jacobian_increase_every
        )
        # As in the first public code, increases of the pre-training are not made up for.
        missed = schedule(pretrain_steps) - schedule(0)
        return JacobianRegularizer(
            lambda step: schedule(step) - missed,
            self.jacobian_probability,
            share_evaluation=True,
            seed=seed,
        )
