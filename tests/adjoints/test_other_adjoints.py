"""OneStep, Phantom and Unrolled against the formulas they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from equilibria import (
    Anderson,
    Broyden,
    FixedSteps,
    Implicit,
    OneStep,
    Phantom,
    Picard,
    Residual,
    Reversible,
    ReversibleAdjoint,
    SecondDerivativeError,
    Unrolled,
    UserError,
    solve,
)

INEXACT_SECOND = [OneStep(), Phantom()]


def gradients_of(deq, x, cotangent):
    return torch.autograd.grad(deq(x).z, list(deq.parameters()), cotangent)


@pytest.fixture
def cotangent() -> Tensor:
    return torch.randn(4, 5, dtype=torch.float64)


@pytest.fixture
def explicit(make_deq, x):
    """The fixed point, and f at it as a function of z and the parameters."""
    deq = make_deq()
    with torch.no_grad():
        z_star = deq(x).z
    return z_star, lambda z: deq.cell(z, deq.cell.inject(x)), list(deq.parameters())


def test_one_step_is_one_vector_jacobian_product(make_deq, x, cotangent, explicit):
    z_star, f, parameters = explicit
    wanted = torch.autograd.grad(f(z_star), parameters, cotangent)
    for a, b in zip(gradients_of(make_deq(adjoint=OneStep()), x, cotangent), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("num_steps", "relaxation"), [(1, 1.0), (1, 0.5), (5, 0.5), (4, 1.0)])
def test_phantom_is_a_damped_neumann_sum(num_steps, relaxation, make_deq, x, cotangent, explicit):
    """u = relaxation * sum_{i<k} ((1 - relaxation) I + relaxation J^T)^i g, then g^T df/dtheta."""
    z_star, f, parameters = explicit
    z = z_star.clone().requires_grad_()
    fz = f(z)
    term, u = relaxation * cotangent, torch.zeros_like(cotangent)
    for _ in range(num_steps):
        u = u + term
        (product,) = torch.autograd.grad(fz, z, term, retain_graph=True)
        term = (1 - relaxation) * term + relaxation * product
    wanted = torch.autograd.grad(fz, parameters, u)
    found = gradients_of(make_deq(adjoint=Phantom(num_steps, relaxation)), x, cotangent)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Phantom(), Unrolled()], ids=repr)
def test_the_adjoint_does_not_change_the_value(adjoint, make_deq, x):
    solver = Anderson(fused=False)  # as the steps that are recorded always are
    deq = make_deq(solver=solver)
    with torch.no_grad():
        wanted = deq(x)
    found = make_deq(solver=solver, adjoint=adjoint)(x)
    assert torch.equal(found.z, wanted.z)
    assert torch.equal(found.residual, wanted.residual)
    recorded = {Implicit(): 1, OneStep(): 1, Phantom(): 5, Unrolled(): 0}[adjoint]
    assert found.num_evals == wanted.num_evals + recorded


@pytest.mark.parametrize("max_steps", [12, 20])
def test_unrolled_picard_is_a_hand_written_loop(max_steps, make_deq, x, cotangent):
    deq = make_deq(
        solver=Picard(), termination=FixedSteps(12), adjoint=Unrolled(), max_steps=max_steps
    )
    injection = deq.cell.inject(x)
    z = torch.zeros(4, 5, dtype=torch.float64)
    for _ in range(12):
        z = deq.cell(z, injection)
    wanted = torch.autograd.grad(z, list(deq.parameters()), cotangent)
    assert torch.equal(deq(x).z, z)
    for a, b in zip(gradients_of(deq, x, cotangent), wanted, strict=True):
        assert torch.equal(a, b)


def test_unrolled_and_implicit_agree_in_the_limit(make_deq, x, cotangent, relative_error):
    wanted = gradients_of(make_deq(), x, cotangent)
    errors = []
    for num_steps in (3, 12, 48, 192):
        unrolled = make_deq(solver=Picard(), termination=FixedSteps(num_steps), adjoint=Unrolled())
        errors.append(relative_error(gradients_of(unrolled, x, cotangent), wanted))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.05
    assert errors[-1] < 1e-6


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
@pytest.mark.parametrize(
    ("termination", "max_steps"), [(FixedSteps(4), 4), (FixedSteps(4), 9), (Residual(1e-6), 99)]
)
def test_unrolled_differentiates_the_steps_of_any_solver(
    solver, termination, max_steps, make_deq, x
):
    """Samples that finish early are frozen; their gradients stay finite and right."""
    deq = make_deq(solver=solver, termination=termination, adjoint=Unrolled(), max_steps=max_steps)
    z0 = torch.randn(4, 5, dtype=torch.float64)
    assert gradcheck(
        lambda x, z0: deq(x, z0=z0).z, (x.requires_grad_(), z0.requires_grad_()), atol=1e-4
    )


@pytest.mark.parametrize("num_arrived", [1, 4])
@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        (Picard(), Unrolled()),
        (Anderson(), Unrolled(checkpoint=True)),
        (Reversible(), ReversibleAdjoint()),
    ],
    ids=repr,
)
def test_samples_that_begin_within_the_tolerance_get_the_gradient_of_one_step(
    num_arrived, solver, adjoint, make_deq, x, cotangent
):
    """They made no step, and so no parameter would learn anything from them."""
    deq = make_deq(solver=solver, adjoint=adjoint, termination=Residual(2e-2), max_steps=20)
    z0 = torch.zeros(4, 5, dtype=torch.float64)
    z0[:num_arrived] = deq(x).z[:num_arrived].detach()
    z0.requires_grad_()
    sources = [*deq.parameters(), z0]
    solution = deq(x, z0=z0)
    assert (solution.num_steps == 0).tolist() == [i < num_arrived for i in range(4)]
    assert torch.equal(solution.z[:num_arrived], z0[:num_arrived])
    cotangent[num_arrived:] = 0.0
    found = torch.autograd.grad(solution.z, sources, cotangent)
    wanted = torch.autograd.grad(deq.cell(z0, deq.cell.inject(x)), sources, cotangent)
    torch.testing.assert_close(found, wanted)


def test_a_solve_without_a_step_has_a_tangent_and_second_derivatives_under_unrolled():
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    z0 = solve(lambda z: torch.cos(a * z), torch.ones(2, 3).double()).z.detach()

    def layer(a):
        return solve(
            lambda z: torch.cos(a * z), z0, adjoint=Unrolled(), termination=Residual(1e-2)
        ).z

    _, push = torch.func.jvp(layer, (a.detach(),), (torch.ones_like(a.detach()),))
    torch.testing.assert_close(push, -z0 * torch.sin(a.detach() * z0))
    (first,) = torch.autograd.grad(layer(a).sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first, a)
    torch.testing.assert_close(second, -(z0.square() * torch.cos(a * z0)).sum().detach())


@pytest.mark.parametrize("max_steps", [4, 9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_unrolled_reaches_parameters_and_z0_in_every_dtype(dtype, max_steps):
    weight = torch.tensor(0.5, dtype=dtype, requires_grad=True)
    z0 = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    solution = solve(
        lambda z: weight * z,
        z0,
        solver=Picard(),
        termination=FixedSteps(4),
        adjoint=Unrolled(),
        max_steps=max_steps,
    )
    solution.z.sum().backward()
    assert weight.grad.item() == 6 * 4 * 0.5**3
    assert torch.equal(z0.grad, torch.full_like(z0, 0.5**4))


@pytest.mark.parametrize("adjoint", [OneStep(), Phantom()], ids=repr)
def test_z0_gets_no_gradient(adjoint, make_deq, x):
    z0 = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    make_deq(adjoint=adjoint)(x, z0=z0).z.sum().backward()
    assert z0.grad is None or not z0.grad.any()


@pytest.mark.parametrize("adjoint", [OneStep(), Phantom(), Unrolled()], ids=repr)
def test_without_a_backward_solve_there_is_no_backward_report(adjoint, make_deq, x):
    solution = make_deq(adjoint=adjoint)(x)
    solution.z.sum().backward()
    assert solution.backward.result is None


@pytest.mark.parametrize("adjoint", INEXACT_SECOND, ids=repr)
@pytest.mark.parametrize("loss", [torch.sum, lambda z: z.square().sum()], ids=["linear", "square"])
def test_second_derivatives_are_refused(adjoint, loss, make_deq, x):
    """Also when the cotangent is a constant, where `once_differentiable` would stay silent."""
    deq = make_deq(adjoint=adjoint)
    with pytest.raises(SecondDerivativeError, match=r"create_graph=True; use Implicit\(\)"):
        torch.autograd.grad(loss(deq(x).z), list(deq.parameters()), create_graph=True)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
def test_unrolled_has_second_derivatives(solver, make_deq, x):
    deq = make_deq(solver=solver, termination=FixedSteps(3), adjoint=Unrolled(), max_steps=3)
    x = x[:2].requires_grad_()
    assert gradgradcheck(lambda x: deq(x).z, x)


@pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Phantom(), Unrolled()], ids=repr)
def test_no_graph_without_grad_mode(adjoint, make_deq, x):
    deq = make_deq(adjoint=adjoint)
    with torch.no_grad():
        assert not deq(x).z.requires_grad
    with torch.inference_mode():
        assert deq(x).z.is_inference()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 2.0}, "num_steps=2.0"),
        ({"relaxation": 0.0}, "between 0 and 2"),
        ({"relaxation": float("nan")}, "between 0 and 2"),
    ],
)
def test_bad_arguments_of_phantom(arguments, message):
    with pytest.raises(UserError, match=message):
        Phantom(**arguments)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_what_unrolling_returns_is_nobody_elses_tensor(checkpoint):
    """A constant map returns what it closes over; writing to the solution must not change that."""
    c = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    solution = solve(
        lambda z: c, torch.zeros_like(c), solver=Picard(), adjoint=Unrolled(checkpoint=checkpoint)
    )
    assert solution.z.data_ptr() != c.data_ptr()
    (gradient,) = torch.autograd.grad(solution.z.sum(), c)
    assert torch.equal(gradient, torch.ones_like(c))
