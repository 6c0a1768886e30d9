import pytest
import torch

from equilibria import (
    Anderson,
    NeumannSeries,
    OneStep,
    Residual,
    SecondDerivativeError,
    Unrolled,
    UserError,
    solve,
)
from equilibria.solvers.picard import Picard
from equilibria.terminations.fixed_steps import FixedSteps


@pytest.fixture
def weight() -> torch.Tensor:
    return (0.4 * torch.randn(4, 4, dtype=torch.float64)).requires_grad_()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 4, dtype=torch.float64, requires_grad=True)


def state(x, weight, adjoint):
    return solve(
        lambda z: torch.tanh(z @ weight.T + x),
        torch.zeros_like(x),
        termination=Residual(1e-13, 0.0),
        adjoint=adjoint,
        max_steps=200,
        on_failure="raise",
    ).z


def dense_jacobian(z, x, weight):
    slope = 1 - torch.tanh(z @ weight.T + x).square()
    return slope.unsqueeze(2) * weight, slope


@pytest.mark.parametrize("num_terms", [1, 2, 7])
def test_equals_the_truncated_series(x, weight, num_terms):
    g = torch.randn(3, 4, dtype=torch.float64)
    z = state(x, weight, NeumannSeries(num_terms))
    got = torch.autograd.grad(z, x, g)[0]
    jacobian, slope = dense_jacobian(z.detach(), x.detach(), weight.detach())
    u = term = g
    for _ in range(num_terms):
        term = (jacobian.mT @ term.unsqueeze(2)).squeeze(2)
        u = u + term
    torch.testing.assert_close(got, u * slope, rtol=1e-10, atol=1e-12)


def test_clipping_bounds_every_term_of_every_sample(x, weight):
    big = (weight.detach() * 20).requires_grad_()
    g = torch.randn(3, 4, dtype=torch.float64)

    def gradient(adjoint):
        z = solve(
            lambda z: z @ big.T + x,  # linear and expanding: the series would blow up
            torch.zeros_like(x),
            termination=FixedSteps(1),
            solver=Picard(),
            adjoint=adjoint,
        ).z
        return torch.autograd.grad(z, x, g)[0]

    clipped, free = gradient(NeumannSeries(6, clip=1.0)), gradient(NeumannSeries(6))
    assert bool((clipped.norm(dim=1) <= 7 * g.norm(dim=1) + 1e-9).all())
    assert bool((free.norm(dim=1) > 100 * g.norm(dim=1)).all())
    small = state(x, weight, NeumannSeries(6, clip=10.0))  # nothing to clip: nothing changes
    plain = state(x, weight, NeumannSeries(6))
    torch.testing.assert_close(
        torch.autograd.grad(small, x, g), torch.autograd.grad(plain, x, g), rtol=1e-12, atol=0.0
    )


def test_the_value_is_that_of_other_adjoints_and_second_derivatives_are_refused(x, weight):
    z = state(x, weight, NeumannSeries())
    assert torch.equal(z, state(x, weight, OneStep()))
    with pytest.raises(SecondDerivativeError, match="NeumannSeries"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


@pytest.mark.parametrize("options", [{"num_terms": 0}, {"clip": 0.0}, {"clip": -1.0}])
def test_bad_options(options):
    with pytest.raises(UserError):
        NeumannSeries(**options)


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=repr)
def test_checkpointed_unrolling_gives_the_same_gradient_with_less_memory(x, weight, solver):
    def run(adjoint):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (saved.append(t.untyped_storage().data_ptr()), t)[1], lambda t: t
        ):
            z = solve(
                lambda z: torch.tanh(torch.tanh(z @ weight.T + x) @ weight.T + x).sin(),
                torch.zeros_like(x),
                solver=solver,
                termination=FixedSteps(8),
                adjoint=adjoint,
            ).z
        return len(set(saved)), *torch.autograd.grad(z.square().sum(), (x, weight))

    plain, *expected = run(Unrolled())
    fewer, *got = run(Unrolled(checkpoint=True))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    assert fewer < plain
