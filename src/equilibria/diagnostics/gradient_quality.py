"""How good a cheap gradient is: compared with the exact one, on your batch and your loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from equilibria.adjoints.implicit import Implicit
from equilibria.api import SolveSettings, solve_with
from equilibria.core.adjoint import Adjoint
from equilibria.core.errors import UserError
from equilibria.core.solution import Solution
from equilibria.core.state import State
from equilibria.core.status import Status
from equilibria.deq import DEQ
from equilibria.diagnostics.isolation import untouched

Loss = Callable[[State], Tensor]

REFERENCE = Implicit(rtol=1e-6, max_steps=200)
"""What cheap methods are compared with unless told otherwise."""


@dataclass(frozen=True)
class TensorQuality:
    """One gradient beside the exact one.

    Args:
        name: of the parameter, or "all together".
        cosine: 1 is the same direction, 0 none of it, below 0 uphill. NaN when one is zero.
        norm_ratio: length over the exact length.
    """

    name: str
    cosine: float
    norm_ratio: float


@dataclass(frozen=True)
class GradientQuality:
    """A gradient method against the exact gradient on one batch.

    Args:
        method: the cheap method.
        overall: all parameters as one vector.
        parameters: one by one.
        forward_converged: share of the samples whose fixed point was found; where it was not,
            even the exact method differentiates something else.
        exact_residual: largest relative residual of the exact backward solve; NaN if the exact
            method solves nothing.
        exact_converged: share of the samples whose exact backward solve succeeded.
    """

    method: str
    overall: TensorQuality
    parameters: tuple[TensorQuality, ...]
    forward_converged: float
    exact_residual: float
    exact_converged: float

    def __str__(self) -> str:
        width = max(len(item.name) for item in (self.overall, *self.parameters))
        lines = [f"{self.method} against the exact gradient"]
        lines += [f"{'':{width}}   cosine   norm ratio"]
        lines += [
            f"{item.name:{width}}   {item.cosine:6.3f}   {item.norm_ratio:10.3f}"
            for item in (*self.parameters, self.overall)
        ]
        if self.forward_converged < 1.0:
            lines.append(f"caution: only {self.forward_converged:.0%} of the samples converged")
        if self.exact_converged < 1.0:
            lines.append(
                f"caution: the exact backward solve succeeded for {self.exact_converged:.0%} of "
                f"the samples (relative residual up to {self.exact_residual:.1e}), so the "
                "reference itself is in doubt"
            )
        return "\n".join(lines)


def gradient_quality(
    deq: DEQ,
    *inputs: Any,
    adjoint: Adjoint | None = None,
    exact: Adjoint = REFERENCE,
    loss: Loss | None = None,
    batch_dims: Literal[0, 1] = 1,
    segments: Tensor | None = None,
    **named_inputs: Any,
) -> GradientQuality:
    """Compare a gradient method with the exact gradient for the parameters of a layer.

    Both use the same injection, so the same dropout masks. Nothing of the layer changes: not
    `.grad`, not the random state, not its buffers.

    Args:
        deq: the layer, in the mode to be examined.
        *inputs: a batch, as for the layer.
        adjoint: the cheap method; by default the layer's own.
        exact: what it is compared with.
        loss: scalar of the state z; by default a fixed random direction, which favours nothing.
        batch_dims: as for the layer.
        segments: as for the layer.
        **named_inputs: as for the layer.

    Raises:
        UserError: no parameter of the cell requires a gradient.
    """
    settings = deq.settings.cold()
    settings = settings if adjoint is None else replace(settings, adjoint=adjoint)
    parameters = {name: p for name, p in deq.cell.named_parameters() if p.requires_grad}
    with untouched(deq), torch.enable_grad():
        injection = deq.cell.inject(*inputs, **named_inputs)
        z0 = deq.cell.initial_state(injection)
        run = partial(
            solve_with,
            lambda z: deq.cell(z, injection),
            z0,
            batch_dims=batch_dims,
            segments=segments,
        )
        return _compare(run, parameters, settings, exact, loss)


def gradient_quality_of_solve(
    f: Callable[[State], State],
    z0: State,
    tensors: Mapping[str, Tensor],
    *,
    adjoint: Adjoint,
    settings: SolveSettings = SolveSettings(),
    exact: Adjoint = REFERENCE,
    loss: Loss | None = None,
    batch_dims: Literal[0, 1] = 1,
    segments: Tensor | None = None,
) -> GradientQuality:
    """The same for a plain `solve(f, z0)`.

    Args:
        f: the map; has to be the same function at every call.
        z0: initial state.
        tensors: what gradients are taken for, by name.
        adjoint: the cheap method.
        settings: of the forward solve; its own adjoint is not used.
        exact: what the cheap method is compared with.
        loss: scalar of the state z; by default a fixed random direction.
        batch_dims: as in `solve`.
        segments: as in `solve`.

    Raises:
        UserError: no tensor requires a gradient.
    """
    live = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    with untouched(), torch.enable_grad():
        run = partial(solve_with, f, z0, batch_dims=batch_dims, segments=segments)
        return _compare(run, live, replace(settings, adjoint=adjoint), exact, loss)


def _compare(
    run: Callable[[SolveSettings], Solution],
    tensors: Mapping[str, Tensor],
    settings: SolveSettings,
    exact: Adjoint,
    loss: Loss | None,
) -> GradientQuality:
    if not tensors:
        raise UserError(
            "nothing to compare gradients of: no parameter requires a gradient; call "
            "requires_grad_(True) on those to be examined"
        )
    if not exact.exact:
        raise UserError(f"exact={exact!r} is itself an approximation; give for example Implicit()")
    settings = replace(settings, on_failure="ignore")
    found, solution = _gradients(run, tensors, settings, loss)
    wanted, reference = _gradients(run, tensors, replace(settings, adjoint=exact), loss)
    report = reference.backward.result
    return GradientQuality(
        method=repr(settings.adjoint),
        overall=tensor_quality("all together", _joined(found), _joined(wanted)),
        parameters=tuple(
            tensor_quality(name, found[i], wanted[i]) for i, name in enumerate(tensors)
        ),
        forward_converged=_share(solution.converged),
        exact_residual=float("nan") if report is None else _largest(report.relative_residual),
        exact_converged=1.0 if report is None else _share(report.status == Status.SUCCESS),
    )


def _gradients(
    run: Callable[[SolveSettings], Solution],
    tensors: Mapping[str, Tensor],
    settings: SolveSettings,
    loss: Loss | None,
) -> tuple[tuple[Tensor, ...], Solution]:
    solution = run(settings)
    scalar = (loss or _random_direction)(solution.z)
    gradients = torch.autograd.grad(
        scalar,
        list(tensors.values()),
        retain_graph=True,  # both methods go back through one injection
        materialize_grads=True,
    )
    return gradients, solution


def _random_direction(z: State) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    products = [
        (leaf * torch.randn(leaf.shape, generator=draw).to(leaf)).sum()
        for leaf in pytree.tree_leaves(z)
    ]
    return torch.stack([product.to(products[0]) for product in products]).sum()


def tensor_quality(name: str, found: Tensor, wanted: Tensor) -> TensorQuality:
    """One gradient beside the exact one.

    Args:
        name: of the parameter.
        found: by the cheap method.
        wanted: the exact one, of the same shape.
    """
    a, b = found.detach().double().flatten(), wanted.detach().double().flatten()
    length, reference = float(a.norm()), float(b.norm())
    both = length * reference
    return TensorQuality(
        name=name,
        cosine=float(a @ b) / both if both > 0 else float("nan"),
        norm_ratio=length / reference if reference > 0 else float("nan"),
    )


def _joined(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def _share(mask: Tensor) -> float:
    return float(mask.double().mean()) if mask.numel() else 1.0


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
