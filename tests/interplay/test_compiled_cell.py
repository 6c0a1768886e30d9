"""`torch.compile` of the cell, in every mode: the same numbers, gradients that reach everything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from equilibria import DEQ, Cell, Implicit, OneStep, Phantom, Residual, Unrolled, solve
from equilibria.layers.variational_dropout import VariationalDropout
from equilibria.normalizations.weight_norm import weight_norm

pytestmark = pytest.mark.usefixtures("fresh_compiler")

MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
ADJOINTS = [Implicit(rtol=1e-12), OneStep(), Phantom(), Unrolled()]


class DropoutCell(Cell):
    """Draws in `forward`, which is inside of what is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 3)
        self.dropout = VariationalDropout(0.4)
        with torch.no_grad():
            self.hidden.weight.mul_(0.3)

    def inject(self, x: Tensor) -> Tensor:
        return x

    def initial_state(self, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(self.dropout(self.hidden(z)) + injection)


def both_passes(deq: DEQ, x: Tensor) -> list[Tensor]:
    """The fixed point, and the gradients of all parameters and of the input."""
    x = x.clone().requires_grad_()
    z = deq(x).z
    return [z.detach(), *torch.autograd.grad(z.square().sum(), [*deq.parameters(), x])]


def second_derivatives(deq: DEQ, x: Tensor) -> tuple[Tensor, ...]:
    """The gradient of a norm of the input's gradient."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(deq(x).z.square().sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), [*deq.parameters(), x])


@pytest.mark.parametrize(
    ("backend", "adjoint"),
    [
        ("aot_eager", ADJOINTS[0]),
        *(
            pytest.param(backend, adjoint, marks=pytest.mark.slow)
            for backend in ("eager", "aot_eager")
            for adjoint in ADJOINTS[backend == "aot_eager" :]
        ),
    ],
    ids=str,
)
def test_both_passes_are_right(
    make_deq: Callable[..., DEQ], x: Tensor, backend: str, adjoint: Any
) -> None:
    deq = make_deq(adjoint=adjoint)
    expected = both_passes(deq, x)
    deq.cell.compile(backend=backend, fullgraph=True)
    torch.testing.assert_close(both_passes(deq, x), expected)


@pytest.mark.slow
def test_inductor(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    deq = make_deq()
    expected = both_passes(deq, x)
    deq.cell.compile(fullgraph=True)
    torch.testing.assert_close(both_passes(deq, x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(make_deq: Callable[..., DEQ], x: Tensor, mode: str, adjoint: Any) -> None:
    deq = make_deq(adjoint=adjoint)
    expected = both_passes(deq, x)
    deq.cell.compile(mode=mode, fullgraph=True)
    torch.testing.assert_close(both_passes(deq, x), expected)
    with torch.no_grad():
        torch.testing.assert_close(deq(x).z, expected[0])


@pytest.mark.parametrize(
    "compiled",
    [
        lambda deq: deq.cell.compile(backend="aot_eager"),
        lambda deq: setattr(deq, "cell", torch.compile(deq.cell, backend="aot_eager")),
        lambda deq: setattr(
            deq.cell, "forward", torch.compile(deq.cell.forward, backend="aot_eager")
        ),
    ],
    ids=["in place", "wrapped", "forward only"],
)
def test_every_way_to_compile(
    make_deq: Callable[..., DEQ], x: Tensor, compiled: Callable[[DEQ], None]
) -> None:
    deq = make_deq()
    expected = both_passes(deq, x)
    compiled(deq)
    torch.testing.assert_close(both_passes(deq, x), expected)


@pytest.mark.slow
def test_a_wrapped_cell_is_a_cell(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    plain = make_deq()
    wrapped = DEQ(torch.compile(plain.cell, backend="aot_eager"), **vars(plain.train_settings))
    torch.testing.assert_close(wrapped(x).z, plain(x).z)


def test_few_compilations(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    """Without gradients for the solver, with them for the recorded evaluation, and no more."""
    deq = make_deq()
    counter = CompileCounterWithBackend("aot_eager")
    deq.cell.compile(backend=counter, fullgraph=True)
    for _ in range(3):
        both_passes(deq, x)
    assert counter.frame_count == 2


def test_a_closure_without_a_module(x: Tensor) -> None:
    weight = torch.full((3, 3), 0.2, dtype=torch.float64, requires_grad=True)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight + x)

    def gradient(f: Callable[[Tensor], Tensor]) -> Tensor:
        z = solve(
            f, torch.zeros_like(x), termination=Residual(1e-12), adjoint=Implicit(rtol=1e-12)
        ).z
        return torch.autograd.grad(z.square().sum(), weight)[0]

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(compiled), gradient(f))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_second_derivative_raises_and_is_never_incomplete(
    make_deq: Callable[..., DEQ], x: Tensor, backend: str
) -> None:
    """AOTAutograd has none; whether it or we say so, it is said."""
    deq = make_deq()
    deq.cell.compile(backend=backend)
    with pytest.raises(RuntimeError, match="second derivative|double back"):
        second_derivatives(deq, x)


def test_a_second_derivative_that_can_be_had_is_right(
    make_deq: Callable[..., DEQ], x: Tensor
) -> None:
    """The backend "eager" leaves the backward pass to autograd, which has one."""
    deq = make_deq()
    expected = second_derivatives(deq, x)
    deq.cell.compile(backend="eager")
    torch.testing.assert_close(second_derivatives(deq, x), expected)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_masks_drawn_inside_are_drawn_once(x: Tensor, backend: str) -> None:
    deq = DEQ(
        DropoutCell(), termination=Residual(1e-9), adjoint=Implicit(rtol=1e-9), max_steps=200
    ).double()
    reference = copy.deepcopy(deq)
    counter = CompileCounterWithBackend(backend)
    deq.cell.compile(backend=counter, fullgraph=True)
    num_compiled: list[int] = []
    for _ in range(4):
        torch.manual_seed(0)
        found = both_passes(deq, x)
        num_compiled.append(counter.frame_count)
        if backend != "inductor":  # which has random numbers of its own
            torch.manual_seed(0)
            torch.testing.assert_close(found, both_passes(reference, x))
    assert deq(x).converged.all()  # with new masks at every evaluation it would not
    assert num_compiled[-1] == num_compiled[1] <= 3  # not one more per solve


@pytest.mark.slow
def test_weights_normalised_once_per_solve_keep_their_gradient(
    make_deq: Callable[..., DEQ], x: Tensor
) -> None:
    deq = make_deq()
    weight_norm(deq.cell.recurrent)
    expected = both_passes(deq, x)
    deq.cell.compile(backend="aot_eager")
    torch.testing.assert_close(both_passes(deq, x), expected)
    torch.testing.assert_close(both_passes(deq, x), expected)


@pytest.mark.slow
def test_under_function_transforms_it_is_right_or_raises(
    make_deq: Callable[..., DEQ], x: Tensor
) -> None:
    deq = make_deq()
    expected = torch.func.grad(lambda x: deq(x).z.square().sum())(x)
    deq.cell.compile(backend="aot_eager")
    try:
        found = torch.func.grad(lambda x: deq(x).z.square().sum())(x)
    except (RuntimeError, ValueError):
        return
    torch.testing.assert_close(found, expected)
