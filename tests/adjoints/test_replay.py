"""What the backward pass evaluates again is the function that was solved, or the user is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equilibria import (
    DEQ,
    Cell,
    Implicit,
    OneStep,
    ReplayError,
    Residual,
    Solution,
    TransformError,
    Unrolled,
    solve,
)
from equilibria.regularizers.jacobian import jacobian_penalty
from equilibria.regularizers.spectral_radius import spectral_radius

TIGHT: dict[str, Any] = {
    "termination": Residual(1e-12, 0.0),
    "adjoint": Implicit(rtol=1e-12),
    "max_steps": 200,
    "on_failure": "raise",
}
REPLAYED = [Implicit(rtol=1e-12), Unrolled(checkpoint=True)]


class Tanh(Cell):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size).double()
        nn.init.orthogonal_(self.linear.weight, gain=0.5)

    def inject(self, x: Tensor) -> Tensor:
        return x

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


class Normalised(Tanh):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4).double()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.3 * self.norm(self.linear(z)) + x)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, requires_grad=True)


def weights(num: int = 1) -> list[Tensor]:
    return [0.2 * torch.randn(4, 4, dtype=torch.float64) for _ in range(num)]


def by_hand(weight: Tensor, bias: Tensor | float, x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(200):
        z = torch.tanh(z @ weight.T + bias + x)
    return z


def both_derivatives(layer: Callable[[Tensor], Tensor], *inputs: Tensor) -> list[Tensor]:
    """Of the energy sum(z^3), and of the squared force."""
    first = torch.autograd.grad(layer(inputs[0]).pow(3).sum(), inputs, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


# --- the same function as then ------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [False, True])
def test_weights_given_for_one_call_are_those_of_all_derivatives(
    x: Tensor, trainable: bool
) -> None:
    """`functional_call` has put the module's own back when the backward pass comes."""
    deq = DEQ(Tanh(), **TIGHT).requires_grad_(False)
    given = {
        name: (0.3 * p.detach() + 0.1).requires_grad_(trainable)
        for name, p in deq.named_parameters()
    }
    own = dict(deq.named_parameters())
    weight, bias = given["cell.linear.weight"], given["cell.linear.bias"]
    inputs = [x, weight, bias] if trainable else [x]
    assert_same(
        both_derivatives(lambda x: torch.func.functional_call(deq, given, (x,)).z, *inputs),
        both_derivatives(lambda x: by_hand(weight, bias, x), *inputs),
    )
    assert all(own[name] is parameter for name, parameter in deq.named_parameters())


def test_batch_statistics_are_not_updated_by_a_backward_pass(x: Tensor) -> None:
    deq = DEQ(Normalised(), **TIGHT)
    z = deq(x).z
    counted = deq.cell.norm.num_batches_tracked.clone()
    mean = deq.cell.norm.running_mean.clone()
    torch.autograd.grad(z.square().sum(), x, create_graph=True)
    assert torch.equal(deq.cell.norm.num_batches_tracked, counted)
    assert torch.equal(deq.cell.norm.running_mean, mean)


def test_second_derivatives_taken_inside_autocast() -> None:
    """Weights that autocast had rounded before belong to the graph of before."""
    linear = nn.Linear(8, 8)
    nn.init.orthogonal_(linear.weight, gain=0.5)
    x = torch.randn(4, 8, requires_grad=True)

    def derivatives() -> list[Tensor]:
        solution = solve(
            lambda z: torch.tanh(linear(z) + x), torch.zeros(4, 8), termination=Residual(1e-2)
        )
        (force,) = torch.autograd.grad(solution.z.float().square().sum(), x, create_graph=True)
        return [force, *torch.autograd.grad(force.square().sum(), [x, linear.weight])]

    plain = derivatives()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = derivatives()
    for a, b in zip(rounded, plain, strict=True):
        assert (a - b).norm() < 0.1 * b.norm()


# --- solves inside of others --------------------------------------------------------------------


@pytest.mark.parametrize("inner", [Implicit(rtol=1e-13), Unrolled()], ids=["implicit", "unrolled"])
@pytest.mark.parametrize("outer", [Implicit(rtol=1e-13), Unrolled()], ids=["implicit", "unrolled"])
def test_second_derivatives_of_a_solve_inside_of_a_solve(x: Tensor, inner: Any, outer: Any) -> None:
    a, b = (weight.requires_grad_() for weight in weights(2))
    settings = TIGHT | {"termination": Residual(1e-13, 0.0)}

    def layer(x: Tensor) -> Tensor:
        def f(z: Tensor) -> Tensor:
            inside = solve(
                lambda y: torch.tanh(y @ a.T + 0.3 * z + x),
                torch.zeros_like(z),
                **settings | {"adjoint": inner},
            )
            return torch.tanh(inside.z @ b.T)

        return solve(f, torch.zeros_like(x), **settings | {"adjoint": outer}).z

    def truth(x: Tensor) -> Tensor:
        y, z = torch.zeros_like(x), torch.zeros_like(x)
        for _ in range(200):
            y = torch.tanh(y @ a.T + 0.3 * z + x)
            z = torch.tanh(y @ b.T)
        return z

    assert_same(both_derivatives(layer, x, a, b), both_derivatives(truth, x, a, b))


def test_second_derivatives_of_a_checkpointed_solve(x: Tensor) -> None:
    weight = weights()[0].requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return solve(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x), **TIGHT).z

    assert_same(
        both_derivatives(lambda x: checkpoint(layer, x, use_reentrant=False), x, weight),
        both_derivatives(layer, x, weight),
    )


# --- another function than then -----------------------------------------------------------------


def derive(adjoint: Any, zs: list[Tensor], x: Tensor) -> Tensor:
    energy = sum((z**3).sum() for z in zs)
    (force,) = torch.autograd.grad(energy, x, create_graph=isinstance(adjoint, Implicit))
    return force


@pytest.mark.parametrize("adjoint", REPLAYED, ids=str)
def test_a_loop_variable_that_f_looks_up_late(x: Tensor, adjoint: Any) -> None:
    settings, zero, matrices = TIGHT | {"adjoint": adjoint}, torch.zeros_like(x), weights(3)
    late, bound = [], []
    for weight in matrices:
        late.append(solve(lambda z: torch.tanh(z @ weight.T + x), zero, **settings).z)  # noqa: B023
        bound.append(solve(lambda z, W=weight: torch.tanh(z @ W.T + x), zero, **settings).z)
    with pytest.raises(ReplayError, match="loop variable"):
        derive(adjoint, late, x)
    (wanted,) = torch.autograd.grad(sum((by_hand(w, 0.0, x) ** 3).sum() for w in matrices), x)
    torch.testing.assert_close(derive(adjoint, bound, x), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("adjoint", REPLAYED, ids=str)
def test_a_configuration_that_has_changed(x: Tensor, adjoint: Any) -> None:
    weight, configuration = weights()[0], {"gain": 1.0}
    solution = solve(
        lambda z: torch.tanh(configuration["gain"] * z @ weight.T + x),
        torch.zeros_like(x),
        **TIGHT | {"adjoint": adjoint},
    )
    configuration["gain"] = 1.1
    with pytest.raises(ReplayError, match="configuration"):
        derive(adjoint, [solution.z], x)


@pytest.mark.parametrize("adjoint", REPLAYED, ids=str)
def test_a_module_that_has_changed_its_mode(x: Tensor, adjoint: Any) -> None:
    deq = DEQ(Normalised(), **TIGHT | {"adjoint": adjoint}).eval()
    z = deq(x).z
    deq.train()
    with pytest.raises(ReplayError, match="another mode"):
        derive(adjoint, [z], x)


MEASUREMENTS: list[Callable[[Solution], object]] = [
    lambda solution: jacobian_penalty(solution),
    lambda solution: jacobian_penalty(solution, through_state=True),
    lambda solution: spectral_radius(solution).radius,
    lambda solution: solution.function(solution.z),
    lambda solution: solution.function(torch.zeros_like(solution.z)),
]
OF_EACH_KIND = [Implicit(rtol=1e-12), OneStep(), Unrolled()]


@pytest.mark.parametrize("measure", MEASUREMENTS, ids=range(5))
@pytest.mark.parametrize("adjoint", OF_EACH_KIND, ids=repr)
def test_measurements_after_the_solve_are_of_the_function_solved(
    x: Tensor, adjoint: Any, measure: Callable[[Solution], object]
) -> None:
    settings, solutions = TIGHT | {"adjoint": adjoint}, []
    for weight in weights(2):
        solutions.append(solve(lambda z: torch.tanh(z @ weight.T + x), x.detach(), **settings))  # noqa: B023
    with pytest.raises(ReplayError, match="measurement.*loop variable"):
        measure(solutions[0])
    measure(solutions[1])
    with torch.no_grad():  # which has no graph to measure by
        weight.mul_(1.1)
    with pytest.raises(ReplayError, match="written to.*optimiser"):
        measure(solutions[1])


def test_measurements_in_their_own_place_are_let_pass(x: Tensor) -> None:
    """A start that is the solution is the user's to write to; so is the mode of batch norm."""
    deq = DEQ(Normalised(), **TIGHT)
    counted = deq.cell.norm.num_batches_tracked.clone()
    solution = deq(x)
    spectral_radius(solution)
    assert deq.cell.norm.num_batches_tracked == counted + solution.num_evals
    weight, z0 = weights()[0], torch.zeros(3, 4, dtype=torch.float64)
    with torch.no_grad():
        solution = solve(lambda z: torch.tanh(z @ weight.T), z0, **TIGHT)
        z0.add_(1.0)
    assert spectral_radius(solution).converged.all()


def test_parameters_given_for_one_call_are_those_of_measurements(x: Tensor) -> None:
    deq = DEQ(Tanh(), **TIGHT)
    given = {name: 0.3 * p.detach() for name, p in deq.named_parameters()}
    solution = torch.func.functional_call(deq, given, (x,))
    weight, bias = given["cell.linear.weight"], given["cell.linear.bias"]
    image = torch.tanh(solution.z @ weight.T + bias + x)
    torch.testing.assert_close(solution.function(solution.z), image)
    assert (spectral_radius(solution).radius < 0.2).all()  # 0.5 with the module's own


def test_several_cotangents_at_once_are_refused_with_the_way_to_do_it(x: Tensor) -> None:
    weight = weights()[0]

    def layer(x: Tensor) -> Tensor:
        return solve(lambda z: torch.tanh(z @ weight.T + x), torch.zeros_like(x), **TIGHT).z

    with pytest.raises(TransformError, match="jacrev"):
        torch.autograd.functional.jacobian(layer, x, vectorize=True)
    torch.testing.assert_close(
        torch.func.jacrev(layer)(x.detach()), torch.autograd.functional.jacobian(layer, x)
    )
