"""What is measured on the best checkpoint of a run: it needs the model and the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from equilibria.core.adjoint import Adjoint
from equilibria.core.errors import UserError
from equilibria.core.status import Status
from equilibria.deq import DEQ
from equilibria.diagnostics.gradient_quality import REFERENCE, TensorQuality, tensor_quality
from equilibria.regularizers.spectral_radius import spectral_radius
from equilibria.tasks.task import Task

MakeTask = Callable[[Adjoint | None], Task]
"""Builds a task with the weights to be measured; with another gradient method if one is given."""


@dataclass(frozen=True)
class GradientMeasurement:
    """The gradient of one training batch beside the exact one.

    Args:
        overall: all parameters as one vector.
        parameters: one by one.
        exact_converged: share of the samples whose exact backward solve succeeded.
    """

    overall: TensorQuality
    parameters: tuple[TensorQuality, ...]
    exact_converged: float


@dataclass(frozen=True)
class Measurements:
    """Of one checkpoint.

    Args:
        step: of the checkpoint.
        radius: spectral radius of the Jacobian at the equilibria of the first validation batch,
            by sample; NaN where it could not be found.
        gradient: None where no parameter of a cell is trained.
    """

    step: int
    radius: tuple[float, ...]
    gradient: GradientMeasurement | None


def measure(make_task: MakeTask, *, step: int, training_step: int) -> Measurements:
    """Spectral radius on a validation batch, quality of the gradient on a training batch.

    Args:
        make_task: called twice; both tasks must begin at the same place in the data.
        step: of the checkpoint, to be reported.
        training_step: a step after pre-training, whose loss is taken.

    Raises:
        UserError: the model solves no equilibrium.
    """
    task = make_task(None)
    solution = task.trace()
    if solution is None:
        raise UserError("the model is explicit and solves no equilibrium")
    radius = spectral_radius(solution).radius.detach().double().cpu().tolist()
    found, wanted = _gradients(task, training_step), _gradients(make_task(REFERENCE), training_step)
    return Measurements(step, tuple(map(float, radius)), _compare(found, wanted))


@dataclass(frozen=True)
class _Gradients:
    """By parameter, and which share of the samples was solved backward."""

    by_name: dict[str, Tensor]
    converged: float


def _gradients(task: Task, training_step: int) -> _Gradients:
    task.model.train()
    torch.manual_seed(0)  # the same dropout masks both times
    result = task.training_loss(training_step)
    named = _cell_parameters(task.model)
    gradients = torch.autograd.grad(
        result.loss, list(named.values()), allow_unused=True, materialize_grads=True
    )
    report = None if result.solution is None else result.solution.backward.result
    return _Gradients(
        {name: gradient.detach() for name, gradient in zip(named, gradients, strict=True)},
        1.0 if report is None else float((report.status == Status.SUCCESS).double().mean()),
    )


def _cell_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Those whose gradients go through a fixed point; all methods agree on the others."""
    cells = [part.cell for part in model.modules() if isinstance(part, DEQ)]
    inside = {id(parameter) for cell in cells for parameter in cell.parameters()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in inside and parameter.requires_grad
    }


def _compare(found: _Gradients, wanted: _Gradients) -> GradientMeasurement | None:
    if not wanted.by_name:
        return None
    pairs = [(name, found.by_name[name], exact) for name, exact in wanted.by_name.items()]
    return GradientMeasurement(
        overall=tensor_quality(
            "all together",
            torch.cat([cheap.flatten() for _, cheap, _ in pairs]),
            torch.cat([exact.flatten() for _, _, exact in pairs]),
        ),
        parameters=tuple(tensor_quality(*pair) for pair in pairs),
        exact_converged=wanted.converged,
    )
