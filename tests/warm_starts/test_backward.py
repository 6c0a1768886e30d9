"""The backward solve starts warm: fewer products, the same gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equilibria import (
    GMRES,
    Adjoint,
    Anderson,
    BiCGStab,
    Broyden,
    Cached,
    FixedPoint,
    Implicit,
    Neumann,
    OneStep,
    Previous,
    Random,
    Residual,
    Status,
    UserError,
    WarmStartMemory,
    Zeros,
    registry,
    solve,
)
from equilibria.core.linear import start_from

RTOL = 1e-8
LINEAR = [GMRES(), BiCGStab(), Neumann(), FixedPoint(Anderson()), Broyden()]


class Layer:
    """f(z) = tanh(W z + x), counting its evaluations and products by itself."""

    def __init__(self, weight, x, warm_start=Previous()):
        self.weight = weight.clone().requires_grad_()
        self.x = x
        self.memory = WarmStartMemory()
        self.products = 0
        self._adjoint = Implicit(rtol=RTOL, warm_start=warm_start, max_steps=200)

    def __call__(self, z):
        image = torch.tanh(z @ self.weight.mT + self.x)
        if image.requires_grad:
            image.register_hook(self._count)
        return image

    def _count(self, cotangent):
        self.products += 1

    def gradient(self, cotangent, adjoint=None, **settings):
        """Of the weight; and the solution."""
        self.weight.grad, self.products = None, 0
        solution = solve(
            self,
            torch.zeros_like(self.x),
            solver=Broyden(None),
            termination=Residual(1e-11, 0.0),
            adjoint=adjoint or self._adjoint,
            max_steps=100,
            memory=self.memory,
            **({"on_failure": "raise"} | settings),
        )
        solution.z.backward(cotangent)
        return self.weight.grad.clone(), solution


@pytest.fixture
def g(data):
    return torch.randn(data.shape, dtype=data.dtype, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("linear", LINEAR, ids=lambda solver: type(solver).__name__)
def test_a_warm_backward_solve_is_shorter_and_as_right(linear, weight, data, g):
    layer = Layer(weight, data)
    adjoint = Implicit(linear, rtol=RTOL, max_steps=200, warm_start=Previous())
    cold, solution = layer.gradient(g, adjoint)
    cold_products = layer.products
    warm, solution = layer.gradient(g * (1.0 + 1e-3 * data), adjoint)
    assert layer.products < cold_products
    # the last product is the one on the way to the parameters
    assert layer.products == solution.backward.result.num_evals + 1
    exact, _ = layer.gradient(g * (1.0 + 1e-3 * data), Implicit(rtol=1e-12, max_steps=200))
    torch.testing.assert_close(warm, exact, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(warm, cold, rtol=1e-6)


def test_the_scale_of_the_loss_does_not_matter(weight, data, g):
    """Loss scaling jumps by powers of two, and gradients shrink as training goes on."""
    layer = Layer(weight, data)
    layer.gradient(g)
    for scale in (2.0**16, 1e-9):
        found, _ = layer.gradient(scale * g)
        assert layer.products <= 2
        exact, _ = layer.gradient(scale * g, Implicit(rtol=1e-12, max_steps=200))
        torch.testing.assert_close(found / scale, exact / scale, rtol=1e-6, atol=1e-7)


def test_the_tolerance_stays_relative_to_the_cotangent(weight, data, g):
    """Not to the residual that the guess begins with, which would never be small enough."""
    layer = Layer(weight, data)
    layer.gradient(g)
    _, solution = layer.gradient(g)
    assert solution.backward.result.relative_residual.max() <= RTOL
    assert solution.backward.result.num_steps.tolist() == [0] * 8


def test_cached_by_sample(weight, data, g):
    layer = Layer(weight, data, Cached(8))
    layer.gradient(g, sample_index=range(8))
    order = [7, 3, 0, 1, 6, 2, 5, 4]
    layer.x = data[order]
    layer.gradient(g[order], sample_index=order)
    assert layer.products <= 2
    layer.gradient(g, sample_index=order)
    assert layer.products > 4


def test_samples_that_are_not_known_are_solved_beside_those_that_are(weight, data, g):
    layer = Layer(weight, data, Cached(8))
    layer.x = data[:4]
    layer.gradient(g[:4], sample_index=range(4))
    layer.x = data
    found, solution = layer.gradient(g, sample_index=range(8))
    steps = solution.backward.result.num_steps
    assert steps[:4].tolist() == [0] * 4
    assert steps[4:].min() > 0
    exact, _ = layer.gradient(g, Implicit(rtol=1e-12, max_steps=200))
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7)


def test_a_backward_solve_that_failed_is_forgotten(weight, data, g):
    """An overflow under loss scaling: the step is skipped, the next one starts cold."""
    layer = Layer(weight, data)
    layer.gradient(g)
    spoiled = g.clone()
    spoiled[2] = torch.inf
    _, solution = layer.gradient(spoiled, on_failure="ignore")
    assert solution.backward.result.status[2] == Status.NONFINITE
    _, solution = layer.gradient(g)
    steps = solution.backward.result.num_steps
    assert steps[2] > 0
    assert steps[[0, 1, 3, 4, 5, 6, 7]].max() == 0


def test_forward_and_backward_do_not_mix(weight, data, g):
    layer = Layer(weight, data, warm_start=Previous())
    for _ in range(2):
        found, solution = layer.gradient(g, warm_start=Previous())
    assert solution.num_steps.max() == 0
    assert layer.products <= 2
    exact, _ = layer.gradient(g, Implicit(rtol=1e-12, max_steps=200))
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7)


def test_second_derivatives_stay_right(weight, data):
    """Only the system of the first derivative is known; the others start cold."""
    x = data[:2]
    f = lambda z, w: torch.tanh(z @ w.mT + x)  # noqa: E731
    memory = WarmStartMemory()

    def energy(w, adjoint):
        solution = solve(
            lambda z: f(z, w),
            torch.zeros_like(x),
            termination=Residual(1e-12, 0.0),
            adjoint=adjoint,
            max_steps=200,
            memory=memory,
        )
        (force,) = torch.autograd.grad(solution.z.square().sum(), w, create_graph=True)
        return torch.autograd.grad(force.square().sum(), w)[0]

    w = weight.clone().requires_grad_()
    wanted = energy(w, Implicit(rtol=1e-12, max_steps=200))
    for _ in range(3):
        found = energy(w, Implicit(rtol=1e-12, max_steps=200, warm_start=Previous()))
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-8)


def test_intermediate_states_have_backward_solves_of_their_own(weight, data, g):
    layer = Layer(weight, data)
    gradients = []
    for adjoint in (Implicit(rtol=1e-12, max_steps=200), layer._adjoint, layer._adjoint):
        layer.weight.grad = None
        solution = solve(
            layer, 0 * data, adjoint=adjoint, memory=layer.memory, states=3, max_steps=60,
            termination=Residual(1e-10, 0.0),
        )  # fmt: skip
        sum((state * g).sum() for state in solution.states).backward()
        gradients.append(layer.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-6, atol=1e-6)


@given(
    seed=st.integers(0, 2**20),
    batch=st.integers(0, 4),
    width=st.integers(0, 6),
    exponent=st.sampled_from([-150, -30, 0, 30, 150]),
    spoiled=st.sampled_from([None, float("nan"), float("inf")]),
)
def test_the_best_multiple_is_never_worse_than_zero(seed, batch, width, exponent, spoiled):
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.randn(width, width, dtype=torch.float64, generator=draw)
    b, guess = torch.randn(2, batch, width, dtype=torch.float64, generator=draw)
    guess = guess * 10.0**exponent
    if spoiled is not None and guess.numel():
        guess[0, 0] = spoiled
    u, residual = start_from(lambda v: v @ matrix, b, guess)
    torch.testing.assert_close(residual, b - u + u @ matrix, rtol=1e-9, atol=1e-9)
    slack = 1.0 + 1e-12
    assert bool((residual.norm(dim=1) <= slack * b.norm(dim=1)).all())
    if spoiled is not None and guess.numel():
        assert not u[0].any()


@pytest.mark.parametrize("warm_start", [Zeros(), Random(), Previous, 3], ids=repr)
def test_what_knows_no_earlier_solve_is_refused(warm_start):
    with pytest.raises(UserError, match=r"does not know where .*Previous\(\) or Cached"):
        Implicit(warm_start=warm_start)


def test_without_a_place_to_remember(weight, data):
    f = lambda z: torch.tanh(z @ weight + 1.0)  # noqa: E731
    with pytest.raises(UserError, match="no place to remember"):
        solve(f, data, adjoint=Implicit(warm_start=Previous()))
    with torch.no_grad():  # nothing to solve backward
        solve(f, data, adjoint=Implicit(warm_start=Previous()))


def test_the_adjoint_has_a_name_with_its_warm_start():
    adjoint = Implicit(warm_start=Cached(5, dtype=torch.float16))
    assert registry.parse(Adjoint, registry.describe(adjoint)) == adjoint
    assert registry.parse(Adjoint, "implicit(warm_start=previous)").warm_start == Previous()


def test_the_adjoint_stays_a_value():
    adjoint = Implicit(warm_start=Cached(5))
    assert copy.deepcopy(adjoint) == adjoint == Implicit(warm_start=Cached(5))
    assert hash(adjoint) == hash(Implicit(warm_start=Cached(5)))
    assert adjoint.without_warm_start() == Implicit()
    assert OneStep().without_warm_start() == OneStep()
