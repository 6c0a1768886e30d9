"""`solve` and `DEQ` under torch.func, torch.vmap and forward-mode AD, against a plain loop.

The loop has as many Picard steps as float64 can tell apart, so that PyTorch's own transforms of it
are the truth for derivatives of any order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    vjp,
    vmap,
)
from torch.utils import _pytree as pytree

from equilibria import (
    DEQ,
    Anderson,
    BiCGStab,
    Broyden,
    Cell,
    ConvergenceError,
    ConvergenceWarning,
    FixedSteps,
    Implicit,
    Neumann,
    NeumannSeries,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Residual,
    Solution,
    TransformError,
    Unrolled,
    solve,
)
from equilibria.core.pure import is_transformed

# PyTorch warns of itself when forward mode is first used
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

TIGHT = {
    "termination": Residual(1e-13, 0.0),
    "adjoint": Implicit(rtol=1e-13, max_steps=100),
    "max_steps": 200,
    "on_failure": "raise",
}

Find = Callable[..., Tensor]


def by_solve(f, z0, **settings):
    return solve(f, z0, **(TIGHT | settings)).z


def by_loop(f, z0, **settings):
    z = z0
    for _ in range(40):
        z = f(z)
    return z


def double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture
def weight() -> Tensor:
    return 0.15 * double(3, 3)


@pytest.fixture
def x() -> Tensor:
    return double(2, 3)


def layer(find: Find, x: Tensor, weight: Tensor, **settings) -> Tensor:
    injection = 2.0 * x  # a closure tensor that is made by the transform
    return find(lambda z: torch.tanh(z @ weight.T + injection), torch.zeros_like(x), **settings)


def loss(find: Find, x: Tensor, weight: Tensor, **settings) -> Tensor:
    return layer(find, x, weight, **settings).pow(3).sum()


def assert_same(derivative, *, rtol=1e-8, atol=1e-9):
    """A transform of the solve and of the loop."""
    torch.testing.assert_close(derivative(by_solve), derivative(by_loop), rtol=rtol, atol=atol)


def of(function, find, **settings):
    return partial(function, find, **settings)


ONE_SAMPLE = {
    "grad": lambda find, x, w: grad(of(loss, find), (0, 1))(x, w),
    "vjp": lambda find, x, w: vjp(of(layer, find), x, w)[1](x),
    "jacrev": lambda find, x, w: jacrev(of(layer, find), (0, 1))(x, w),
    "jvp": lambda find, x, w: jvp(of(layer, find), (x, w), (x, w)),
    "jacfwd": lambda find, x, w: jacfwd(of(layer, find), (0, 1))(x, w),
    "hessian": lambda find, x, w: hessian(of(loss, find), (0, 1))(x, w),
    "grad(grad)": lambda find, x, w: grad(lambda w: grad(of(loss, find))(x, w).sum())(w),
    "jacrev(jacrev)": lambda find, x, w: jacrev(jacrev(of(loss, find)), 1)(x, w),
    # PyTorch loses nested tangents of a Function: zeros without a word
    "jacfwd(jacfwd)": lambda find, x, w: jacfwd(jacfwd(of(loss, find)), 1)(x, w),
    "jacrev(jacfwd)": lambda find, x, w: jacrev(jacfwd(of(loss, find)), 1)(x, w),
    "third": lambda find, x, w: jacfwd(lambda x: hessian(of(loss, find))(x, w))(x[:1]),
}


@pytest.mark.parametrize("name", ONE_SAMPLE)
def test_derivatives_of_any_order_and_mode(name, x, weight):
    assert_same(lambda find: ONE_SAMPLE[name](find, x, weight))


MAPPED = {
    "states": lambda find, xs, w: vmap(of(layer, find), (0, None))(xs, w[0]),
    "weights": lambda find, xs, w: vmap(of(layer, find), (None, 0))(xs[0], w),
    "both, another dim": lambda find, xs, w: vmap(of(layer, find), (1, 0))(xs.movedim(0, 1), w),
    "vmap(vmap)": lambda find, xs, w: vmap(vmap(of(layer, find), (0, None)), (None, 0))(xs, w),
    "vmap(grad)": lambda find, xs, w: vmap(grad(of(loss, find), (0, 1)), (0, None))(xs, w[0]),
    "vmap(hessian)": lambda find, xs, w: vmap(hessian(of(loss, find)), (0, None))(xs, w[0]),
    "vmap(jvp)": lambda find, xs, w: vmap(
        lambda x, t: jvp(lambda x: layer(find, x, w[0]), (x,), (t,))
    )(xs, xs),
    "grad(vmap)": lambda find, xs, w: grad(
        lambda w: vmap(of(loss, find), (0, None))(xs, w).square().sum()
    )(w[0]),
    "vmap(grad(vmap))": lambda find, xs, w: vmap(
        grad(lambda w: vmap(of(loss, find), (0, None))(xs, w).square().sum())
    )(w),
}


@pytest.mark.parametrize("name", MAPPED)
def test_mapped_over_the_layer(name):
    xs, weights = double(4, 2, 3), 0.15 * double(4, 3, 3)
    assert_same(lambda find: MAPPED[name](find, xs, weights))


@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_none_and_one(batch, weight):
    xs = double(3, batch, 3)
    assert_same(lambda find: vmap(grad(of(loss, find)), (0, None))(xs, weight))
    assert_same(lambda find: jvp(lambda x: layer(find, x, weight), (xs[0],), (xs[0],)))


def test_a_mapped_sample_is_solved_as_if_alone(weight):
    """Its own status, steps and trace; frozen when it is done, whatever its neighbours do."""
    xs = double(4, 2, 3) * torch.logspace(-3, 1, 4, dtype=torch.float64)[:, None, None]

    def fields(x):
        solution = solve(
            lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x), states=[1, 2], trace=True
        )
        return (
            solution.z,
            solution.status,
            solution.residual,
            solution.relative_residual,
            solution.num_steps,
            solution.converged,
            solution.states[0],
            solution.trace,
        )

    together = vmap(fields)(xs)
    for number, x in enumerate(xs):
        *alone, trace = fields(x)
        for a, b in zip(together, alone, strict=False):
            torch.testing.assert_close(a[number], b, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(together[-1][number, : len(trace)], trace, equal_nan=True)


def test_trees_and_one_global_problem(weight):
    def tree_loss(find, x):
        def f(z):
            return {
                "a": torch.tanh(z["a"] @ weight + x + 0.1 * z["b"][0].sum((1, 2))[:, None]),
                "b": (torch.sin(0.3 * z["b"][0] + x[:, None, :1]),),
            }

        z = find(f, {"a": torch.zeros_like(x), "b": (x.new_zeros(x.shape[0], 2, 2),)})
        return z["a"].square().sum() + z["b"][0].pow(3).sum()

    def one_problem(find, x):
        return find(lambda z: torch.tanh(weight @ z + x), torch.zeros_like(x), batch_dims=0)

    xs = double(3, 2, 3)
    assert_same(lambda find: vmap(grad(of(tree_loss, find)))(xs))
    assert_same(lambda find: hessian(of(tree_loss, find))(xs[0]))
    assert_same(lambda find: vmap(jacrev(of(one_problem, find)))(xs[0]))
    assert_same(lambda find: vmap(jacfwd(of(one_problem, find)))(xs[0]))


def test_segments(weight):
    graph = torch.tensor([0, 1, 1, 0, 2])
    xs = double(2, 5, 3)

    def nodes(find, x):
        def f(z):
            pooled = torch.zeros(3, 3, dtype=z.dtype).index_add(0, graph, z)[graph]
            return torch.tanh(z @ weight + x + 0.1 * pooled)

        return find(f, torch.zeros_like(x), segments=graph)

    assert_same(lambda find: vmap(of(nodes, find))(xs))
    assert_same(lambda find: jacrev(jacfwd(lambda x: nodes(find, x).pow(3).sum()))(xs[0]))


@pytest.mark.parametrize("solver", [Picard(), Broyden(), NewtonKrylov()], ids=repr)
def test_every_kind_of_forward_solver(solver, x, weight):
    settings = {"solver": solver}
    assert_same(lambda find: vmap(grad(of(loss, find, **settings)), (0, None))(x[:, None], weight))
    assert_same(lambda find: jacfwd(of(layer, find, **settings))(x, weight))


@pytest.mark.parametrize("solver", [BiCGStab(), Neumann(), Anderson()], ids=repr)
def test_every_kind_of_linear_solver(solver, x, weight):
    settings = {"adjoint": Implicit(solver, rtol=1e-13, max_steps=200)}
    assert_same(lambda find: hessian(of(loss, find, **settings))(x, weight))


def test_half_precision_is_rounded_as_in_a_plain_solve():
    weight, xs = (0.25 * torch.randn(3, 3)).bfloat16(), torch.randn(3, 2, 3).bfloat16()

    def state(x):
        return solve(lambda z: torch.tanh(z @ weight + x), torch.zeros_like(x), max_steps=9).z

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        alone = torch.stack([state(x) for x in xs])
        assert torch.equal(vmap(state)(xs), alone)
        assert vmap(grad(lambda x: state(x).sum()))(xs).dtype == torch.bfloat16


def test_the_backward_solve_sees_the_autocast_of_the_forward_one():
    linear = nn.Linear(3, 3)
    nn.init.orthogonal_(linear.weight, gain=0.3)
    x = torch.randn(2, 3)

    def total(x):
        with torch.autocast("cpu", torch.bfloat16):
            return solve(
                lambda z: torch.tanh(linear(z) + x).float(), torch.zeros_like(x), max_steps=7
            ).z.sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        wanted = torch.autograd.grad(total(x.requires_grad_()), x)[0]
        assert torch.equal(grad(total)(x.detach()), wanted)


# --- what f closes over --------------------------------------------------------------------------


class Layer(nn.Module):
    """A DEQ, or the same cell iterated."""

    def __init__(self, deq: DEQ, find: Find = by_solve) -> None:
        super().__init__()
        self.deq = deq
        self.iterated = find is by_loop

    def forward(self, x):
        if not self.iterated:
            return self.deq(x).z
        injection = self.deq.cell.inject(x)
        return by_loop(
            lambda z: self.deq.cell(z, injection), self.deq.cell.initial_state(injection)
        )


class SmallCell(Cell):
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


def model_loss(find, deq, parameters, x):
    return functional_call(Layer(deq, find), parameters, (x,)).pow(3).sum()


@pytest.fixture
def deq() -> DEQ:
    return DEQ(SmallCell(), **TIGHT)


@pytest.fixture
def parameters(deq) -> dict[str, Tensor]:
    """Other values than the module holds: using the module's own would show."""
    return {name: 0.9 * value.detach() + 0.01 for name, value in Layer(deq).named_parameters()}


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_given_by_functional_call(deq, parameters, frozen):
    deq.requires_grad_(not frozen)
    x = double(5, 4)
    assert_same(lambda find: grad(lambda p: model_loss(find, deq, p, x))(parameters))
    per_sample = x[:, None]
    assert_same(
        lambda find: vmap(grad(lambda p, x: model_loss(find, deq, p, x)), (None, 0))(
            parameters, per_sample
        )
    )


def test_ensembles(deq, parameters):
    stacked = {name: torch.stack([value, 0.5 * value]) for name, value in parameters.items()}
    x = double(3, 4)
    assert_same(
        lambda find: vmap(grad(lambda p, x: model_loss(find, deq, p, x)), (0, None))(stacked, x)
    )


def test_the_module_is_as_it_was_afterwards(deq, parameters):
    before = dict(deq.named_parameters())
    grad(lambda p: model_loss(by_solve, deq, p, double(2, 4)))(parameters)
    after = dict(deq.named_parameters())
    assert all(after[name] is before[name] for name in before)


def test_plain_backward_through_a_mapped_layer(deq):
    """Parameters that no transform knows of still get their gradient."""
    xs = double(3, 2, 4)

    def gradients(find):
        return torch.autograd.grad(
            vmap(Layer(deq, find))(xs).pow(3).sum(), list(deq.parameters()), create_graph=True
        )

    assert_same(lambda find: [g.detach() for g in gradients(find)])
    assert_same(
        lambda find: torch.autograd.grad(
            sum(g.square().sum() for g in gradients(find)), list(deq.parameters())
        ),
        rtol=1e-6,
    )


def test_z0_has_no_derivative(x, weight):
    def from_(z0):
        return by_solve(lambda z: torch.tanh(z @ weight), z0).sum()

    assert not grad(from_)(x).any()
    assert not jvp(from_, (x,), (x,))[1].any()


def energy(z, y, weight):
    return (0.3 * torch.tanh(z @ weight + y)).sum()


def test_transforms_inside_f(x, weight):
    """A cell that is the gradient of an energy, of each sample by itself."""

    def total(find, x, weight):
        force = vmap(grad(energy), (0, 0, None))
        return find(lambda z: force(z, x, weight) + 0.1 * x, torch.zeros_like(x)).pow(2).sum()

    assert_same(lambda find: vmap(grad(of(total, find), (0, 1)), (0, None))(x[:, None], weight))
    assert_same(lambda find: hessian(of(total, find))(x, weight))


class Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z, w):
        return z @ w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        z, w = ctx.saved_tensors
        return g @ w.mT, z.mT @ g


def test_custom_functions_inside_f(x, weight):
    def total(find, x, weight):
        return find(lambda z: torch.tanh(Product.apply(z, weight) + x), torch.zeros_like(x)).sum()

    assert_same(lambda find: vmap(grad(of(total, find), (0, 1)), (0, None))(x[:, None], weight))


@pytest.mark.parametrize(
    "transform",
    [
        grad,
        pytest.param(jacfwd, marks=pytest.mark.slow),
        pytest.param(
            lambda f: vmap(grad(lambda x: f(x[None]))), marks=pytest.mark.slow, id="vmap(grad)"
        ),
    ],
)
def test_a_solve_inside_f(transform, x, weight):
    def total(find, x):
        def outer(z):
            inner = find(lambda u: torch.tanh(u @ weight + z), torch.zeros_like(z))
            return torch.tanh(0.3 * inner + x)

        return find(outer, torch.zeros_like(x)).square().sum()

    by_short_loop = of(total, lambda f, z0: by_loop_of(f, z0, 25))
    found, wanted = transform(of(total, by_solve))(x), transform(by_short_loop)(x)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-8)


def by_loop_of(f, z0, num_steps):
    z = z0
    for _ in range(num_steps):
        z = f(z)
    return z


# --- forward-mode AD without torch.func -----------------------------------------------------------


def test_dual_numbers(x, weight):
    def tangent(find):
        with forward_ad.dual_level():
            y, w = forward_ad.make_dual(x, x.sin()), forward_ad.make_dual(weight, weight)
            return tuple(forward_ad.unpack_dual(layer(find, y, w)))

    assert_same(tangent)
    with torch.no_grad():
        assert_same(tangent)


def test_dual_numbers_with_a_backward_pass(x, weight):
    """Forward over reverse, and reverse over forward."""

    def mixed(find, reverse_first):
        y = x.clone().requires_grad_()
        with forward_ad.dual_level():
            total = loss(find, forward_ad.make_dual(y, x), weight)
            if reverse_first:
                return forward_ad.unpack_dual(
                    torch.autograd.grad(total, y, create_graph=True)[0]
                ).tangent.detach()
            return torch.autograd.grad(forward_ad.unpack_dual(total).tangent, y)[0]

    assert_same(lambda find: mixed(find, reverse_first=False))
    assert_same(lambda find: mixed(find, reverse_first=True))


def test_gradcheck_in_both_modes(x, weight):
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert gradcheck(partial(layer, by_solve), inputs, check_forward_ad=True)


# --- what cannot be done says so ------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", [OneStep(), Phantom(), NeumannSeries()], ids=repr)
def test_inexact_gradients_are_refused(adjoint, x, weight):
    for transform in (grad, jacfwd, vmap):
        with pytest.raises(TransformError, match=rf"{type(adjoint).__name__}.*Implicit\(\)"):
            transform(lambda x: loss(by_solve, x, weight, adjoint=adjoint))(x[:, None][:1])
    with torch.no_grad():  # values need no adjoint
        found = vmap(lambda x: layer(by_solve, x, weight, adjoint=adjoint))(x[:, None])
    torch.testing.assert_close(found[:, 0], layer(by_loop, x, weight))


def test_unrolled_steps_are_differentiated_by_the_transform(x, weight):
    settings = {"adjoint": Unrolled(), "solver": Picard(), "termination": FixedSteps(40)}
    for transform in (grad, jacfwd, hessian):
        assert_same(lambda find, t=transform: t(of(loss, find, **settings))(x, weight))
    anderson = {"adjoint": Unrolled()}
    assert_same(lambda find: jacrev(of(layer, find, **anderson))(x, weight), rtol=1e-6)
    with torch.no_grad():
        assert_same(lambda find: jvp(lambda x: layer(find, x, weight, **anderson), (x,), (x,)))
    with pytest.raises(TransformError, match=r"Unrolled.*vmap.*Implicit\(\)"):
        vmap(lambda x: layer(by_solve, x, weight, **settings))(x[:, None])
    with pytest.raises(TransformError, match=r"checkpoint=True.*Implicit\(\)"):
        grad(lambda x: loss(by_solve, x, weight, adjoint=Unrolled(checkpoint=True)))(x)


class Slot:
    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class Holder(nn.Module):
    """A layer whose f reaches a module only through what `held` does."""

    def __init__(self, module: nn.Module, held: Any) -> None:
        super().__init__()
        self.module = module
        self.held = held

    def forward(self, x: Tensor, find: Any = by_solve) -> Tensor:
        module = self.held  # not self, which is a module itself

        def f(z: Tensor) -> Tensor:
            return torch.tanh(0.3 * (module() if callable(module) else module.module)(z) + x)

        return find(f, torch.zeros_like(x))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_module_in_a_slot_is_found(x, frozen):
    linear = nn.Linear(3, 3).double().requires_grad_(not frozen)
    layer = Holder(linear, Slot(linear))
    others = {name: 0.5 * value.detach() for name, value in layer.named_parameters()}
    assert_same(lambda find: grad(lambda p: functional_call(layer, p, (x, find)).sum())(others))
    assert_same(lambda find: grad(lambda x: functional_call(layer, others, (x, find)).sum())(x))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_module_out_of_sight_is_an_error_and_no_wrong_number(x, frozen):
    linear = nn.Linear(3, 3).double().requires_grad_(not frozen)
    hidden = iter(lambda: linear, None)  # no attribute leads to the module
    layer = Holder(linear, hidden.__next__)
    others = {name: 0.5 * value.detach() for name, value in layer.named_parameters()}
    with pytest.raises(TransformError, match="functional_call"):
        grad(lambda p: functional_call(layer, p, (x,)).sum())(others)
    with pytest.raises(TransformError, match="functional_call"):  # what is given is a constant
        grad(lambda x: functional_call(layer, others, (x,)).sum())(x)


def test_randomness_inside_f_follows_the_randomness_of_vmap(x, weight):
    def state(x):
        return solve(
            lambda z: nn.functional.dropout(torch.tanh(z @ weight + x)),
            torch.zeros_like(x),
            max_steps=2,
            on_failure="ignore",
        ).z

    xs = x[:1].expand(2, 1, 3)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(state)(xs)
    same = vmap(state, randomness="same")(xs)
    different = vmap(state, randomness="different")(xs)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])


def expanding(x: Tensor, on_failure: str, **settings) -> Solution:
    rotation = torch.tensor([[0.0, 0.95], [-0.95, 0.0]], dtype=x.dtype)
    return solve(lambda z: z @ rotation + x, torch.zeros_like(x), on_failure=on_failure, **settings)


SHORT = {"adjoint": Implicit(Picard(), max_steps=2)}


@pytest.mark.parametrize(
    ("what", "settings", "transform"),
    [
        ("the forward solve", {"max_steps": 1}, lambda f: vmap(lambda x: f(x[None]))),
        ("the backward solve", SHORT, grad),
        ("the backward solve", SHORT, lambda f: vmap(grad(lambda x: f(x[None])))),
        ("the tangent solve", SHORT, lambda f: lambda x: jvp(f, (x,), (x,))),
    ],
)
def test_failures_follow_on_failure(what, settings, transform):
    x = double(3, 2)

    def run(on_failure):
        return transform(lambda x: expanding(x, on_failure, **settings).z.square().sum())(x)

    with pytest.raises(ConvergenceError, match=f"{what}: of 3 samples 3 MAX_STEPS"):
        run("raise")
    with pytest.warns(ConvergenceWarning, match=what):
        run("warn")
    assert all(value.isfinite().all() for value in pytree.tree_leaves(run("ignore")))


def test_the_backward_report_holds_plain_tensors_of_all_mapped_samples():
    reports = []

    def total(x):
        solution = expanding(x[None], "raise", trace=True)
        reports.append(solution.backward)
        return solution.z.square().sum()

    vmap(grad(total))(double(3, 2))
    result = reports[0].result
    assert result.status.tolist() == [0, 0, 0]
    assert result.trace.shape[1] == 3
    assert reports[0].seconds > 0


def test_evaluations_are_counted_and_a_plain_solve_pays_nothing(x, weight):
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        return torch.tanh(z @ weight + 1.0)

    plain = solve(f, x)
    assert calls == plain.num_evals
    calls = 0
    with torch.no_grad():
        steps_only = solve(f, x).num_evals
    assert steps_only == plain.num_evals - 1
    calls, counted = 0, []
    vmap(lambda z0: counted.append(solve(f, z0).num_evals) or z0)(x[:, None])
    assert counted == [calls] == [steps_only + 1]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_inside_of_a_solve_under_transforms(x, weight, frozen):
    """With parameters that require a gradient, whether it is asked for or not."""
    tight = {"termination": Residual(1e-12), "adjoint": Implicit(rtol=1e-12), "max_steps": 200}
    linear = nn.Linear(3, 3).double().requires_grad_(not frozen)
    with torch.no_grad():
        linear.weight.mul_(0.3)

    def layer(x, weight, inner):
        return solve(lambda z: 0.5 * inner(z) @ weight + x, torch.zeros_like(x), **tight).z

    def solved(z):
        return solve(lambda y: torch.tanh(linear(y) + z), torch.zeros_like(z), **tight).z

    def repeated(z):
        y = torch.zeros_like(z)
        for _ in range(60):
            y = torch.tanh(linear(y) + z)
        return y

    def derivatives(inner):
        return (
            *grad(lambda x, w: layer(x, w, inner).pow(3).sum(), argnums=(0, 1))(x, weight),
            torch.func.jvp(lambda x: layer(x, weight, inner), (x,), (x,))[1],
            vmap(lambda x: layer(x[None], weight, inner)[0])(x),
        )

    torch.testing.assert_close(derivatives(solved), derivatives(repeated), rtol=1e-7, atol=1e-9)


def test_transforms_are_seen_in_eager_and_in_compiled_code(x):
    compiled = torch.compile(
        lambda x: x + 1 if is_transformed() else x, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(x), x)
    assert not is_transformed()
    seen: list[bool] = []
    vmap(lambda x: seen.append(is_transformed()) or x)(x)
    with forward_ad.dual_level():
        seen.append(is_transformed())
    assert seen == [True, True]
