"""Implicit is differentiable any number of times, or says that it cannot be."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from equilibria import (
    DEQ,
    Anderson,
    Broyden,
    Cell,
    Implicit,
    Residual,
    SecondDerivativeError,
    Unrolled,
    solve,
)
from equilibria.core.closure import covers, graph_position

TIGHT = Implicit(rtol=1e-13, max_steps=100)


@pytest.fixture
def weight() -> torch.Tensor:
    return (0.35 * torch.randn(4, 4, dtype=torch.float64)).requires_grad_()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 4, dtype=torch.float64, requires_grad=True)


def layer(x, weight, adjoint=TIGHT):
    injection = 2.0 * x  # a closure tensor that is no leaf
    return solve(
        lambda z: torch.tanh(z @ weight.T + injection),
        torch.zeros_like(x),
        termination=Residual(1e-13, 0.0),
        adjoint=adjoint,
        max_steps=200,
        on_failure="raise",
    ).z


def unrolled(x, weight, num_steps=150):
    z = torch.zeros_like(x)
    for _ in range(num_steps):
        z = torch.tanh(z @ weight.T + 2.0 * x)
    return z


@pytest.mark.parametrize("solver", [None, Anderson(), Broyden()], ids=repr)
def test_first_and_second_derivatives_against_finite_differences(x, weight, solver):
    adjoint = TIGHT if solver is None else Implicit(solver=solver, rtol=1e-13, max_steps=100)
    assert gradcheck(lambda *a: layer(*a, adjoint), (x, weight))
    assert gradgradcheck(lambda *a: layer(*a, adjoint), (x, weight))


def test_third_derivatives_against_finite_differences(x, weight):
    def gradient(x, weight):
        return torch.autograd.grad(layer(x, weight).pow(3).sum(), x, create_graph=True)[0]

    assert gradgradcheck(gradient, (x, weight))


def test_hessian_equals_that_of_the_unrolled_loop(x, weight):
    fixed = weight.detach()

    def hessian(f):
        return torch.autograd.functional.hessian(lambda x: f(x, fixed).square().sum(), x.detach())

    torch.testing.assert_close(hessian(layer), hessian(unrolled), rtol=1e-9, atol=1e-11)


class EnergyCell(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 4).double()
        nn.init.orthogonal_(self.hidden.weight, gain=0.5)

    def inject(self, x):
        return x.sin()

    def initial_state(self, injection):
        return torch.zeros_like(injection)

    def forward(self, z, injection):
        return torch.tanh(self.hidden(z) + injection)


def test_a_loss_on_forces_trains_the_parameters_of_a_deq(x):
    """The force is -dE/dx; its loss needs d2E / dx dtheta."""
    deq = DEQ(EnergyCell(), termination=Residual(1e-13, 0.0), adjoint=TIGHT, max_steps=200)

    def loss_of(z):
        force = -torch.autograd.grad(z.square().sum(), x, create_graph=True)[0]
        return force.square().sum()

    def unrolled_state():
        z = torch.zeros_like(x)
        for _ in range(100):
            z = deq.cell(z, deq.cell.inject(x))
        return z

    parameters = list(deq.parameters())
    got = torch.autograd.grad(loss_of(deq(x).z), parameters)
    expected = torch.autograd.grad(loss_of(unrolled_state()), parameters)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_a_tensor_that_is_not_known_is_an_error_and_no_wrong_number(x, weight):
    def state(inputs):
        return solve(
            lambda z: torch.tanh(z @ weight.T + x),
            torch.zeros_like(x),
            termination=Residual(1e-12),
            adjoint=TIGHT,
            inputs=inputs,
        ).z

    def second(z):
        (gradient,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.sum(), weight)[0]

    torch.autograd.grad(state([x]).sum(), weight)  # a first derivative needs no list
    with pytest.raises(SecondDerivativeError, match="inputs="):
        second(state([x]))
    torch.testing.assert_close(second(state([x, weight])), second(state(None)))


def test_cover_is_judged_by_paths_that_leave_the_evaluation(weight):
    before = weight * 2.0
    start = graph_position()
    output = (before * 3.0).sum() + weight.sum()
    assert covers(output, [before, weight], start)
    assert not covers(output, [before], start)
    assert not covers(output, [weight], start)


def stacked(x, weight, adjoint=TIGHT):
    """Two layers that share a weight: the second one's input depends on it, too."""
    z = x
    for _ in range(2):
        z = solve(
            lambda z, y=z: torch.tanh(z @ weight.T + y),
            torch.zeros_like(x),
            termination=Residual(1e-13, 0.0),
            adjoint=adjoint,
            max_steps=200,
            on_failure="raise",
        ).z
    return z


def test_a_weight_shared_by_two_layers_is_counted_once(x, weight):
    loss = stacked(x, weight).square().sum()
    wanted = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    found = torch.autograd.grad(loss, (x, weight), create_graph=True)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    unrolled = torch.autograd.grad(stacked(x, weight, Unrolled()).square().sum(), (x, weight))
    for a, b in zip(found, unrolled, strict=True):
        torch.testing.assert_close(a, b)


def test_second_and_third_derivatives_of_layers_that_share_a_weight(x, weight):
    """A derivative that is recorded equals the same without; a wrong one may be in itself right."""
    x = x.detach()

    def gradient(weight):
        loss = stacked(x, weight).square().sum()
        return torch.autograd.grad(loss, weight, create_graph=True)[0]

    assert gradcheck(gradient, (weight,))
    along = gradient(weight)[0, 1]
    (plain,) = torch.autograd.grad(along, weight, retain_graph=True)
    (recorded,) = torch.autograd.grad(along, weight, create_graph=True)
    torch.testing.assert_close(recorded, plain)
    (third,) = torch.autograd.grad(recorded[1, 2], weight)
    step = 1e-5 * torch.eye(4, dtype=torch.float64)[0].outer(torch.ones(4, dtype=torch.float64))

    def second(weight):
        return torch.autograd.grad(gradient(weight)[0, 1], weight)[0][1, 2]

    ahead, behind = ((weight + sign * step).detach().requires_grad_() for sign in (1.0, -1.0))
    quotient = (second(ahead) - second(behind)) / 2e-5
    torch.testing.assert_close(third[0].sum(), quotient, rtol=1e-4, atol=1e-6)


def test_computed_inputs_of_what_cannot_be_looked_into_raise(x, weight):
    """As compiled code: the computed one cannot be exchanged, and would be counted twice."""
    y = x @ weight

    def hidden(z):
        with torch._C.DisableTorchFunction():
            return torch.tanh(z @ weight.T + y)

    solution = solve(hidden, torch.zeros_like(x), adjoint=TIGHT, inputs=[weight, y])
    torch.autograd.grad(solution.z.sum(), weight, retain_graph=True)
    with pytest.raises(SecondDerivativeError, match="computed from others"):
        torch.autograd.grad(solution.z.sum(), weight, create_graph=True)
