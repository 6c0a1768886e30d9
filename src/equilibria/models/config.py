"""What every model configuration has: how to build it, and how its fixed point is solved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from torch import nn

from equilibria.adjoints.implicit import Implicit
from equilibria.adjoints.unrolled import Unrolled
from equilibria.api import SolveSettings
from equilibria.core.adjoint import Adjoint
from equilibria.core.errors import UserError
from equilibria.core.solver import Solver
from equilibria.deq import DEQ, Cell
from equilibria.linear.gmres import GMRES
from equilibria.solvers.anderson import Anderson
from equilibria.solvers.picard import Picard
from equilibria.terminations.fixed_steps import FixedSteps
from equilibria.terminations.residual import Residual


class ModelConfig(ABC):
    """Hyper-parameters of a model; a frozen dataclass."""

    @abstractmethod
    def build(self, vocabulary_size: int) -> nn.Module:
        """Make the model with freshly drawn parameters."""


@dataclass(frozen=True)
class SolveConfig:
    """How the fixed point of a model is solved, in training and in evaluation."""

    solver: Solver = Anderson()
    """Forward solver, for example "anderson(history_size=8)", "broyden" or "picard"."""
    rtol: float = 1e-3
    """A sample is done when its residual is below this share of its state."""
    atol: float = 0.0
    """... or below this per component (root mean square), in the unit of the state."""
    max_steps: int = 30
    """Forward step limit in training."""
    adjoint: Adjoint = Implicit(solver=GMRES(), rtol=1e-3, max_steps=30)
    """Gradient method with its own solver, tolerance and step limit: "implicit(solver=gmres,
    rtol=1e-3, max_steps=30)", "one_step", "phantom(num_steps=5, relaxation=0.5)", "unrolled"."""
    eval_solver: Solver | None = None
    """Forward solver in evaluation; None: as in training."""
    eval_rtol: float | None = None
    """Relative tolerance in evaluation; None: as in training."""
    eval_max_steps: int | None = None
    """Step limit in evaluation; None: as in training."""

    def __post_init__(self) -> None:
        self.train_settings()
        self.eval_settings()

    def train_settings(self) -> SolveSettings:
        """Settings of the equilibrium phase of training.

        A truncated solve is common practice in training and is recorded in the metrics, so
        nothing warns here; the training loop stops on what is not finite.
        """
        return SolveSettings(
            solver=self.solver,
            termination=Residual(self.rtol, self.atol),
            adjoint=self.adjoint,
            max_steps=self.max_steps,
            on_failure="ignore",
        )

    def eval_settings(self) -> SolveSettings:
        """Settings of evaluation."""
        return SolveSettings(
            solver=self.eval_solver or self.solver,
            termination=Residual(
                self.rtol if self.eval_rtol is None else self.eval_rtol, self.atol
            ),
            max_steps=self.max_steps if self.eval_max_steps is None else self.eval_max_steps,
            on_failure="ignore",
        )

    def layer(self, cell: Cell) -> DEQ:
        """The DEQ layer of a cell that is solved like this."""
        train, evaluation = self.train_settings(), self.eval_settings()
        return DEQ(
            cell,
            solver=train.solver,
            termination=train.termination,
            adjoint=train.adjoint,
            max_steps=train.max_steps,
            on_failure=train.on_failure,
            eval_solver=evaluation.solver,
            eval_termination=evaluation.termination,
            eval_max_steps=evaluation.max_steps,
        )


def unrolled_settings(num_layers: int) -> SolveSettings:
    """Settings that make the model a weight-tied network of `num_layers` layers.

    Shallow pre-training (arXiv 1909.01377, section 3.2): cheap steps that bring the weights to
    where the equilibrium is well behaved.
    """
    if num_layers < 1:
        raise UserError(f"pre-training with {num_layers} layers is empty; give at least 1")
    return SolveSettings(
        solver=Picard(),
        termination=FixedSteps(num_layers),
        adjoint=Unrolled(),
        max_steps=num_layers,
        on_failure="ignore",
    )


def with_evaluation_solve(
    model: ModelConfig, solver: Solver | None, max_steps: int | None, rtol: float | None
) -> ModelConfig:
    """Change how a model's equilibria are solved in evaluation; None leaves an option alone.

    Raises:
        UserError: an option is given and the model solves no equilibria.
    """
    changes = {"eval_solver": solver, "eval_max_steps": max_steps, "eval_rtol": rtol}
    changes = {name: value for name, value in changes.items() if value is not None}
    if not changes:
        return model
    solve = getattr(model, "solve", None)
    if not isinstance(solve, SolveConfig):
        raise UserError(
            f"{type(model).__name__} is an explicit model without a solver; leave out "
            f"{', '.join(name.removeprefix('eval_') for name in changes)}"
        )
    changed = replace(solve, **changes)
    return replace(model, solve=changed)  # pyright: ignore[reportArgumentType, reportCallIssue, reportGeneralTypeIssues]
