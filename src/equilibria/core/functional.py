"""Fixed points under function transforms: `torch.func`, `torch.vmap`, forward-mode AD.

A transform cannot look into a solver's loop, because the loop decides by the numbers it sees. So a
solve becomes two operations that a transform takes as a whole:

    values:  z* and the report of the solve, from plain tensors, without a derivative;
    edge:    the identity on z*, with the derivative of the implicit function theorem.

Both fold a mapped dimension into the batch, so that every mapped sample has its own convergence
and status. The derivative of the edge is another fixed point, of a linear map: u = J^T u + g
backward, v = J v + b forward. It is solved by the same two operations, hence derivatives of any
order and of any mixture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

from equilibria.core.iterate import Iterate, Measurement, measure
from equilibria.core.loop import LoopResult
from equilibria.core.problem import Map, Problem
from equilibria.core.pure import PureMap
from equilibria.core.status import enforce

if TYPE_CHECKING:
    from equilibria.core.adjoint import Forward

Image = Callable[..., Tensor]
"""(z, *inputs) -> f(z), packed (B, D)."""

Dims = Sequence[int | None]


class SolveLinear(Protocol):
    """Solves u = a(u) + b on plain tensors and reports how it went; `what` names it in messages."""

    def __call__(self, a: Map, b: Tensor, what: str) -> Tensor: ...


def solve_transformed(
    forward: Forward, solve_linear: SolveLinear | None
) -> tuple[Tensor, LoopResult]:
    """Solve while transforms are active; the packed fixed point with its derivative, and the rest.

    Costs one evaluation more than a plain solve, to find what f closes over, and every derivative
    evaluates f anew. `solve_linear=None` returns values without a derivative.
    """
    if torch.compiler.is_compiling():  # which would give tensors other identities
        from equilibria.core.graph_break import between_graphs

        return between_graphs(_solve_transformed, forward, solve_linear)
    return _solve_transformed(forward, solve_linear)


def _solve_transformed(
    forward: Forward, solve_linear: SolveLinear | None
) -> tuple[Tensor, LoopResult]:
    problem = forward.problem
    pure = PureMap(problem)
    system = _Equation(
        pure.image, pure.rounded if problem.layout.rounds else None, forward, solve_linear
    )
    outputs = _Values.apply(system, problem.z0, problem.layout.norm_scale, *pure.inputs)
    result = _as_result(outputs, trace=forward.trace)
    if solve_linear is None:
        return result.iterate.z, result

    def with_derivative(z: Tensor) -> Tensor:
        return _Edge.apply(system, z, *pure.inputs)

    states = [with_derivative(z) for z in result.states]
    return with_derivative(result.iterate.z), replace(result, states=states)


class _System(ABC):
    """z = image(z, *inputs), packed (B, D)."""

    image: Image

    @abstractmethod
    def values(
        self, start: Tensor | None, scale: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """Solve on plain tensors: the solution first; all lead with the batch dimension."""

    @abstractmethod
    def linear_solution(
        self, z: Tensor, b: Tensor, inputs: Sequence[Tensor], *, transposed: bool
    ) -> Tensor:
        """(I - J)^-1 b, or (I - J^T)^-1 b, J the Jacobian at z; differentiable."""

    @abstractmethod
    def folded(
        self, size: int, dims: Dims, randomness: str, inputs: Sequence[Tensor]
    ) -> tuple[_System, Sequence[Tensor]]:
        """The system of all mapped samples in one batch (size * B, D), and its inputs."""


@dataclass(frozen=True)
class _Equation(_System):
    """The problem itself."""

    image: Image
    rounded: Image | None
    forward: Forward
    solve_linear: SolveLinear | None

    def values(
        self, start: Tensor | None, scale: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        if start is None:
            raise RuntimeError("a solve needs a starting point")
        result = self.forward.run(_PackedProblem(self, start, scale, inputs))
        enforce(result.status, self.forward.on_failure, "the forward solve")
        return _as_tensors(result)

    def linear_solution(
        self, z: Tensor, b: Tensor, inputs: Sequence[Tensor], *, transposed: bool
    ) -> Tensor:
        return _solution(_LinearEquation(self, transposed), z, b, inputs)

    def folded(
        self, size: int, dims: Dims, randomness: str, inputs: Sequence[Tensor]
    ) -> tuple[_System, Sequence[Tensor]]:
        def fold(image: Image) -> Image:
            mapped = torch.vmap(image, (0, *dims), randomness=randomness)

            def on_all(z: Tensor, *inputs: Tensor) -> Tensor:
                return mapped(_apart(z, size), *inputs).flatten(0, 1)

            return on_all

        rounded = None if self.rounded is None else fold(self.rounded)
        return replace(self, image=fold(self.image), rounded=rounded), inputs


@dataclass(frozen=True)
class _LinearEquation(_System):
    """u = J u + b, or u = J^T u + b, with J the Jacobian of `of` at z; inputs (z, b, *its own)."""

    of: _Equation
    transposed: bool

    def image(self, u: Tensor, z: Tensor, b: Tensor, *inputs: Tensor) -> Tensor:
        return self._product(z, inputs)(u) + b

    def values(
        self, start: Tensor | None, scale: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        if self.of.solve_linear is None:
            raise RuntimeError("this solve was made without derivatives")
        z, b, *others = inputs
        what = "the backward solve" if self.transposed else "the tangent solve"
        return (self.of.solve_linear(self._product(z, others), b, what),)

    def linear_solution(
        self, z: Tensor, b: Tensor, inputs: Sequence[Tensor], *, transposed: bool
    ) -> Tensor:
        # The map is linear: its Jacobian is J or J^T itself, wherever the solution lies.
        at, _, *others = inputs
        system = _LinearEquation(self.of, self.transposed != transposed)
        return _solution(system, at, b, others)

    def folded(
        self, size: int, dims: Dims, randomness: str, inputs: Sequence[Tensor]
    ) -> tuple[_System, Sequence[Tensor]]:
        z, b = (_together(inputs[i], dims[i], size) for i in range(2))
        of, others = self.of.folded(size, dims[2:], randomness, inputs[2:])
        return replace(self, of=of), (z, b, *others)

    def _product(self, z: Tensor, inputs: Sequence[Tensor]) -> Map:
        def image(z: Tensor) -> Tensor:
            return self.of.image(z, *inputs)

        if not self.transposed:
            return _pushforward(image, z)
        _, pull = _vjp(image, z)
        return lambda u: pull(u)[0]


class _Values(torch.autograd.Function):
    """Solve a system: its solution and report, all without a derivative."""

    @staticmethod
    def forward(
        system: _System, start: Tensor | None, scale: Tensor | None, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        # On, because solvers may use forward mode themselves, but not on the tangents of others.
        with forward_ad._set_fwd_grad_enabled(True):  # pyright: ignore[reportPrivateUsage]
            return system.values(*map(_without_tangent, (start, scale, *inputs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.num_outputs = len(output)
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[None, ...]:
        return (None,) * ctx.num_outputs

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[tuple[Tensor, ...], int]:
        system, start, scale, *inputs = arguments
        size = info.batch_size
        start, scale = (
            None if tensor is None else _together(tensor, dim, size)
            for tensor, dim in ((start, in_dims[1]), (scale, in_dims[2]))
        )
        system, inputs = system.folded(size, in_dims[3:], info.randomness, inputs)
        outputs = _Values.apply(system, start, scale, *inputs)
        return tuple(_apart(output, size) for output in outputs), 0


class _Edge(torch.autograd.Function):
    """The identity on the solution z of a system, carrying the implicit derivative."""

    @staticmethod
    def forward(system: _System, z: Tensor, *inputs: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.system, _, *tensors = inputs
        # The output and not z: a further derivative has to see that z depends on the inputs.
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        if cotangents[0] is None or not wanted:
            return tuple(gradients)
        # vjp of torch.func takes its cotangents after its transform has ended
        z, *inputs = map(_functorch.unwrap_if_dead, ctx.saved_tensors)
        u = ctx.system.linear_solution(z, cotangents[0], inputs, transposed=True)
        _, pull = _vjp(_of_some(ctx.system.image, z, inputs, wanted), *(inputs[i] for i in wanted))
        for i, gradient in zip(wanted, pull(u), strict=True):
            gradients[i + 2] = gradient
        return tuple(gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor | None:
        wanted = [i for i, tangent in enumerate(tangents[2:]) if tangent is not None]
        if not wanted:
            return None
        num_saved = len(ctx.saved_tensors)

        def tangent(*tensors: Tensor) -> Tensor:
            (z, *inputs), directions = tensors[:num_saved], tensors[num_saved:]
            push = _pushforward(
                _of_some(ctx.system.image, z, inputs, wanted), *(inputs[i] for i in wanted)
            )
            return ctx.system.linear_solution(z, push(*directions), inputs, transposed=False)

        saved = map(_functorch.unwrap_if_dead, ctx.saved_tensors)
        return _one_level_down(tangent, *saved, *(tangents[i + 2] for i in wanted))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> tuple[Tensor, int]:
        system, z, *inputs = arguments
        size = info.batch_size
        system, inputs = system.folded(size, in_dims[2:], info.randomness, inputs)
        return _apart(_Edge.apply(system, _together(z, in_dims[1], size), *inputs), size), 0


class _PackedProblem(Problem):
    """A system with its inputs given, for the loop; states stay packed."""

    def __init__(
        self, system: _Equation, z0: Tensor, scale: Tensor | None, inputs: Sequence[Tensor]
    ) -> None:
        super().__init__(lambda z: system.image(z, *inputs), z0)
        self._system = system
        self._scale = scale
        self._arguments = inputs

    def evaluate(self, z: Tensor, *, record: bool = True) -> Iterate:
        """Round as the layout of the user's state does, then evaluate."""
        rounded = self._system.rounded
        return super().evaluate(
            z if rounded is None else rounded(z, *self._arguments), record=record
        )

    def measure(self, iterate: Iterate, fused: ModuleType | None = None) -> Measurement:
        """Norms per sample; padding does not count."""
        return measure(iterate, self._scale)


def _solution(system: _LinearEquation, z: Tensor, b: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Solve a linear system, differentiably."""
    (u,) = _Values.apply(system, None, None, z, b, *inputs)
    return _Edge.apply(system, u, z, b, *inputs)


def _pushforward(function: Callable[..., Tensor], *primals: Tensor) -> Callable[..., Tensor]:
    """The map tangents -> tangent at `primals`, which evaluates `function` once.

    The derivative of the backward pass, which is linear, by its cotangent. Forward-mode AD would
    not do: PyTorch cannot nest it in `forward_ad.dual_level`.
    """
    value, pull = _vjp(function, *primals)
    _, push = _vjp(pull, torch.zeros_like(value))
    return lambda *tangents: push(tangents)[0]


def _vjp(function: Callable[..., Any], *primals: Tensor) -> tuple[Any, Callable[..., Any]]:
    """`torch.func.vjp`, whose type allows for a third result that is not asked for here."""
    return cast("tuple[Any, Callable[..., Any]]", torch.func.vjp(function, *primals))


def _of_some(
    image: Image, z: Tensor, inputs: Sequence[Tensor], chosen: Sequence[int]
) -> Callable[..., Tensor]:
    """The image at z as a function of the chosen inputs, the others fixed."""

    def function(*values: Tensor) -> Tensor:
        arguments = list(inputs)
        for i, value in zip(chosen, values, strict=True):
            arguments[i] = value
        return image(z, *arguments)

    return function


def _one_level_down(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Run a rule of forward mode below the transform that asked for it.

    PyTorch runs the jvp of a Function with forward mode switched off at all levels, so that
    forward mode over forward mode would silently give zero (seen in 2.13).
    """
    if _functorch.peek_interpreter_stack() is None:
        return function(*tensors)
    interpreter = retrieve_current_functorch_interpreter()
    level = interpreter.level()
    unwrapped = [_functorch._unwrap_for_grad(tensor, level) for tensor in tensors]  # pyright: ignore[reportPrivateUsage]
    with (
        torch.enable_grad(),
        forward_ad._set_fwd_grad_enabled(True),  # pyright: ignore[reportPrivateUsage]
        interpreter.lower(),
    ):
        result = function(*unwrapped)
    return _functorch._wrap_for_grad(result, level)  # pyright: ignore[reportPrivateUsage]


def _without_tangent(tensor: Tensor | None) -> Any:
    return None if tensor is None else forward_ad.unpack_dual(tensor).primal


def _together(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Put a mapped dimension, or copies where there is none, in front of the batch."""
    stacked = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return stacked.flatten(0, 1)


def _apart(tensor: Tensor, size: int) -> Tensor:
    """(size * B, ...) -> (size, B, ...)."""
    return tensor.reshape(size, tensor.shape[0] // size, *tensor.shape[1:])


def _as_tensors(result: LoopResult) -> tuple[Tensor, ...]:
    """A result as a flat tuple; all lead with the batch. Copies where it may be the user's z0."""
    trace = () if result.trace is None else [norms.T for norms in result.trace]
    return (
        result.iterate.z.clone(),
        result.iterate.fz.clone(),
        *result.measurement,
        result.status,
        result.num_steps,
        *trace,
        *(z.clone() for z in result.states),
    )


def _as_result(tensors: Sequence[Tensor], *, trace: bool) -> LoopResult:
    """The inverse of `_as_tensors`."""
    z, fz, residual, image, status, num_steps, *others = tensors
    norms = [others.pop(0).T for _ in range(2)] if trace else None
    return LoopResult(
        iterate=Iterate(z, fz),
        measurement=Measurement(residual, image),
        status=status,
        num_steps=num_steps,
        trace=None if norms is None else Measurement(*norms),
        solver_state=None,
        states=others,
    )
