"""The way back through the steps of the reversible solver, against recording them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equilibria import (
    Adjoint,
    Anderson,
    AnyOf,
    ConvergenceError,
    ConvergenceWarning,
    FixedSteps,
    Implicit,
    Residual,
    Reversible,
    ReversibleAdjoint,
    SecondDerivativeError,
    Solver,
    Stagnation,
    Status,
    TransformError,
    Unrolled,
    UserError,
    solve,
)
from equilibria.testing.adjoint_contract import AdjointContract
from equilibria.testing.dense import relative_error
from equilibria.testing.expect import expect
from equilibria.testing.problems import FixedPointProblem, problem
from equilibria.testing.states import STATES, StateProblem

FREE = Reversible(reconstruction_tolerance=None)
ROUNDED = {"mixed_dtypes", "half"}


def gradients(
    f: Any, z0: Tensor, sources: Any, adjoint: Adjoint, **settings: Any
) -> tuple[Tensor, ...]:
    """Of a fixed random loss, for z0 and the sources."""
    settings = {"solver": Reversible(), "max_steps": 16, "on_failure": "ignore"} | settings
    start = z0.clone().requires_grad_()
    z = solve(f, start, adjoint=adjoint, **settings).z
    g = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(0))
    return torch.autograd.grad(z, (start, *sources), g, materialize_grads=True)


def assert_as_unrolled(
    given: FixedPointProblem, adjoint: Adjoint | None = None, rtol: float = 1e-7, **settings: Any
) -> None:
    found = gradients(given.f, given.z0, given.sources, adjoint or ReversibleAdjoint(), **settings)
    wanted = gradients(given.f, given.z0, given.sources, Unrolled(), **settings)
    assert relative_error(found, wanted) < rtol


class TestContract(AdjointContract):
    """What it can promise: the gradient of as many steps as can be undone."""

    rtol = 1e-3
    max_steps = 22
    accuracy = 0.1

    def make_adjoint(self) -> Adjoint:
        return ReversibleAdjoint()

    def make_solver(self) -> Solver:
        return Reversible()

    def supports(self, problem: FixedPointProblem) -> bool:
        """Where 22 steps come near to the fixed point; steps towards z = 0 never do, relatively."""
        return super().supports(problem) and problem.name != "zero"

    @pytest.mark.parametrize("kind", STATES)
    def test_every_kind_of_state(self, adjoint: Adjoint, kind: str) -> None:
        """States that are rounded are refused; the others are as rows, and as recorded steps."""
        given = StateProblem(kind)
        if kind in ROUNDED:
            with pytest.raises(UserError, match="rounded to a narrower dtype"):
                self.run(given, given.z0, adjoint, **given.settings)
            return
        z = given.join(self.run(given, given.z0, adjoint, **given.settings).z)
        g = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(0))
        found = torch.autograd.grad(z, given.sources, g)
        rows = self.run(given.packed, torch.zeros_like(z), Unrolled(), **given.settings).z
        if kind == "empty":
            assert not any(gradient.any() for gradient in found)
            return
        wanted = torch.autograd.grad(rows, given.sources, g)
        expect(relative_error(found, wanted) < 1e-5, f"{kind} has the gradient of its steps")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_lower_precision(self, adjoint: Adjoint, dtype: torch.dtype) -> None:
        """8 steps in float32; bfloat16 is refused."""
        given = problem("tanh", dtype=dtype).differentiable()
        if dtype == torch.bfloat16:
            with pytest.raises(UserError, match="narrower dtype.*float32 or wider"):
                self.run(given.f, given.z0, adjoint, max_steps=8)
            return
        assert_as_unrolled(given, rtol=1e-4, max_steps=8)


def test_several_cotangents_at_once_are_refused_with_the_way_to_do_it() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)

    def layer(x: Tensor) -> Tensor:
        return solve(
            lambda z: 0.5 * torch.cos(z) + x,
            torch.zeros_like(x),
            solver=Reversible(),
            adjoint=ReversibleAdjoint(),
            max_steps=20,
            on_failure="ignore",
        ).z

    with pytest.raises(TransformError, match="one cotangent at a time"):
        torch.autograd.functional.jacobian(layer, x, vectorize=True)


# --- right -------------------------------------------------------------------------------------


@pytest.mark.parametrize("relaxation", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("name", ["rotation", "tanh", "expansive_tanh", "attention", "constant"])
def test_the_gradient_is_that_of_recorded_steps(name, relaxation):
    """For z0, too, which under Implicit gets none."""
    assert_as_unrolled(
        problem(name).differentiable(),
        solver=Reversible(relaxation),
        termination=FixedSteps(5),
        max_steps=5,
    )


@pytest.mark.parametrize("keep", ["best", "last"])
def test_samples_that_stop_at_different_steps(keep):
    given = problem("tanh").differentiable()
    settings = {"termination": Residual(1e-2), "keep": keep, "max_steps": 20}
    solution = solve(
        given.f, given.z0, solver=Reversible(), adjoint=ReversibleAdjoint(), **settings
    )
    assert len(solution.num_steps.unique()) > 2
    assert_as_unrolled(given, **settings)


def test_a_sample_alone_gets_the_same_gradient():
    given = problem("tanh").differentiable()
    settings = {"termination": Residual(1e-2), "max_steps": 20}
    batched = gradients(given.f, given.z0, given.inputs, ReversibleAdjoint(), **settings)
    for row in range(4):
        rows = slice(row, row + 1)
        lone = given.rows(rows)
        found = torch.autograd.grad(
            solve(
                lone.f, lone.z0, solver=Reversible(), adjoint=ReversibleAdjoint(), **settings
            ).z.sum(),
            given.inputs,
        )
        whole = solve(
            given.f, given.z0, solver=Reversible(), adjoint=ReversibleAdjoint(), **settings
        )
        wanted = torch.autograd.grad(whole.z[rows].sum(), given.inputs)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
    assert all(torch.isfinite(gradient).all() for gradient in batched)


def test_it_approaches_the_implicit_gradient():
    given = problem("symmetric").rows(slice(0, 2)).differentiable()  # the two easiest
    settings = {"termination": FixedSteps(20), "max_steps": 20}
    found = gradients(given.f, given.z0, given.sources, ReversibleAdjoint(), **settings)
    wanted = gradients(given.f, given.z0, given.sources, Implicit(rtol=1e-10), **settings)
    assert relative_error(found[1:], wanted[1:]) < 0.02
    assert found[0].norm() < 0.02 * wanted[1].norm()  # what is left of z0


def test_a_weight_shared_by_two_layers_is_counted_once():
    """The second layer's input depends on its weight: a partial derivative must stop there."""
    weight = (0.4 * torch.randn(3, 3, dtype=torch.float64)).requires_grad_()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def network(adjoint: Adjoint) -> tuple[Tensor, ...]:
        z = x
        for _ in range(2):
            y = z
            z = solve(
                lambda z, y=y: torch.tanh(z @ weight + y),
                torch.zeros_like(x),
                solver=Reversible(),
                termination=FixedSteps(8),
                max_steps=8,
                adjoint=adjoint,
            ).z
        return torch.autograd.grad(z.square().sum(), (weight, x))

    assert relative_error(network(ReversibleAdjoint()), network(Unrolled())) < 1e-9


def test_in_a_deq_with_a_computed_injection(make_deq, x):
    settings = {"solver": Reversible(), "termination": FixedSteps(10), "max_steps": 10}
    found, wanted = (
        torch.autograd.grad(deq(x).z.square().sum(), list(deq.parameters()))
        for deq in (make_deq(adjoint=a, **settings) for a in (ReversibleAdjoint(), Unrolled()))
    )
    assert relative_error(found, wanted) < 1e-9


def test_autocast_of_the_map_is_that_of_the_solve():
    """f may compute in bfloat16 while the states are float32."""
    layer, z0 = nn.Linear(6, 6), torch.zeros(3, 6)
    settings = {"solver": Reversible(0.3), "termination": FixedSteps(6), "max_steps": 6}

    def gradient(adjoint: Adjoint) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            z = solve(lambda z: torch.tanh(layer(z)), z0, adjoint=adjoint, **settings).z
        return torch.autograd.grad(z.sum(), list(layer.parameters()))

    assert relative_error(gradient(ReversibleAdjoint()), gradient(Unrolled())) < 0.02


# --- cost --------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_steps(make_deq, x):
    def saved(num_steps: int, adjoint: Adjoint) -> int:
        """Most bytes alive at once for the backward pass, over the whole training step."""
        deq = make_deq(
            solver=FREE, termination=FixedSteps(num_steps), adjoint=adjoint, max_steps=num_steps
        )
        alive: dict[int, int] = {}
        most = 0

        class Held:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal most
                self.tensor = tensor
                alive[id(self)] = tensor.numel() * tensor.element_size()
                most = max(most, sum(alive.values()))

            def __del__(self) -> None:
                del alive[id(self)]

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            deq(x).z.sum().backward()
        return most

    assert saved(2, ReversibleAdjoint(1e9)) == saved(20, ReversibleAdjoint(1e9))
    assert saved(20, Unrolled()) > 5 * saved(20, ReversibleAdjoint(1e9))


def test_costs_two_evaluations_and_two_products_a_step():
    given = problem("tanh").differentiable()
    calls = 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return given.f(z)

    solution = solve(
        f,
        given.z0,
        solver=Reversible(),
        termination=FixedSteps(7),
        adjoint=ReversibleAdjoint(),
        max_steps=7,
    )
    assert solution.num_evals == calls == 1 + 2 * 7 + 1  # the last finds what f depends on
    solution.z.sum().backward()
    assert calls == solution.num_evals + 2 * 7
    assert solution.backward.result.num_evals == 2 * 7
    assert solution.backward.seconds > 0


# --- the guard ---------------------------------------------------------------------------------


def test_the_report_measures_the_way_back():
    given = problem("tanh").differentiable()
    short, long = (
        solve(
            given.f,
            given.z0,
            solver=FREE,
            termination=FixedSteps(n),
            adjoint=ReversibleAdjoint(),
            max_steps=n,
        )
        for n in (4, 20)
    )
    for solution in (short, long):
        solution.z.sum().backward()
        assert solution.backward.result.status.tolist() == [Status.SUCCESS] * 4
    assert (short.backward.result.relative_residual < 1e-13).all()
    assert (long.backward.result.relative_residual > 1e-11).all()


def run_too_far(on_failure: str, adjoint: Adjoint) -> tuple[Any, tuple[Tensor, ...]]:
    """30 steps: a saturated sample still finds back, the other does not."""
    x = torch.tensor([[0.1], [30.0]], dtype=torch.float64).expand(2, 4).clone().requires_grad_()
    weight = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0].requires_grad_()
    solution = solve(
        lambda z: torch.tanh(z @ weight + x),
        torch.zeros(2, 4, dtype=torch.float64),
        solver=FREE,
        termination=FixedSteps(30),
        adjoint=adjoint,
        max_steps=30,
        on_failure=on_failure,
    )
    return solution, torch.autograd.grad(solution.z.sum(), (x, weight))


def test_a_sample_that_does_not_find_back_is_left_out_with_a_warning():
    with pytest.warns(ConvergenceWarning, match="missed the start.*one-step gradient"):
        solution, found = run_too_far("warn", ReversibleAdjoint())
    result = solution.backward.result
    assert result.status.tolist() == [Status.DIVERGED, Status.SUCCESS]
    assert result.relative_residual[0] > 1e-4 > result.relative_residual[1]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        _, silent = run_too_far("ignore", ReversibleAdjoint())
    assert all(torch.isfinite(gradient).all() for gradient in (*found, *silent))
    torch.manual_seed(0)
    _, unrolled = run_too_far("ignore", Unrolled())
    torch.testing.assert_close(silent[0][1], unrolled[0][1], rtol=1e-6, atol=1e-300)


def test_a_sample_that_does_not_find_back_gets_the_one_step_gradient():
    solution, found = run_too_far("ignore", ReversibleAdjoint())
    z = solution.z[0].detach()
    # d tanh(z W + x) / dx = 1 - f^2, and f(z) = z at the fixed point up to the residual
    torch.testing.assert_close(found[0][0], 1 - z.square(), rtol=0, atol=1e-2)


def test_a_sample_that_does_not_find_back_raises():
    with pytest.raises(ConvergenceError, match="for 1 of 2 samples the way back.*take fewer steps"):
        run_too_far("raise", ReversibleAdjoint())


def test_a_map_that_is_not_the_same_twice_is_noticed():
    layer = nn.Dropout(0.3)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    z = solve(
        lambda z: torch.tanh(0.5 * layer(z) + x),
        torch.zeros_like(x),
        solver=Reversible(),
        termination=FixedSteps(6),
        adjoint=ReversibleAdjoint(),
        max_steps=6,
    ).z
    with pytest.warns(ConvergenceWarning, match="not the same twice"):
        z.sum().backward()


def oscillating(x: Tensor) -> Any:
    """Sample 0 gets worse after a good start, sample 1 converges."""
    slope = torch.tensor([[-6.0], [0.3]], dtype=torch.float64)
    return lambda z: slope * torch.sin(z) + x


@pytest.mark.parametrize("terminate", [Residual(1e-6), AnyOf(Residual(1e-6), Stagnation(3))])
def test_a_failed_sample_that_was_better_before(terminate):
    """keep="best" returns an earlier point, which is not where the way back begins."""
    x = torch.tensor([[1.0, 2.0], [0.5, 0.1]], dtype=torch.float64, requires_grad=True)
    settings = {"solver": Reversible(), "termination": terminate, "max_steps": 20}
    z0 = torch.ones_like(x).detach()

    def run(adjoint: Adjoint, **more: Any) -> Any:
        return solve(oscillating(x), z0, adjoint=adjoint, **settings, **more)

    solution = run(ReversibleAdjoint(), on_failure="ignore")
    assert solution.status[0] != Status.SUCCESS
    (found,) = torch.autograd.grad(solution.z.sum(), x)
    assert solution.backward.result.status.tolist() == [Status.DIVERGED, Status.SUCCESS]
    (unrolled,) = torch.autograd.grad(run(Unrolled(), on_failure="ignore").z.sum(), x)
    torch.testing.assert_close(found[1], unrolled[1], rtol=1e-6, atol=0)
    assert torch.equal(found[0], torch.ones(2).double())  # one step: df/dx = 1
    with pytest.warns(ConvergenceWarning):
        failing = run(ReversibleAdjoint())
    with pytest.warns(ConvergenceWarning, match='keep="last"'):
        failing.z.sum().backward()


def test_a_nan_sample_gets_no_nan_gradient():
    x = torch.tensor([[0.5, 0.1], [0.5, torch.nan]], dtype=torch.float64, requires_grad=True)
    weight = torch.eye(2, dtype=torch.float64).mul(0.5).requires_grad_()
    solution = solve(
        lambda z: torch.tanh(z @ weight + x),
        torch.zeros(2, 2, dtype=torch.float64),
        solver=Reversible(),
        adjoint=ReversibleAdjoint(),
        max_steps=20,
        on_failure="ignore",
    )
    solution.z[0].sum().backward()
    assert torch.isfinite(x.grad[0]).all()
    assert solution.status[1] == Status.NONFINITE
    assert solution.backward.result.status.tolist() == [Status.SUCCESS, Status.DIVERGED]


def test_weights_that_change_before_backward_are_noticed():
    weight = torch.eye(3, dtype=torch.float64).mul(0.5).requires_grad_()
    z = solve(
        lambda z: torch.cos(z @ weight),
        torch.zeros(2, 3, dtype=torch.float64),
        solver=Reversible(),
        termination=FixedSteps(4),
        adjoint=ReversibleAdjoint(),
        max_steps=4,
    ).z
    with torch.no_grad():
        weight.mul_(2.0)
    with pytest.raises(UserError, match="written to between the solve and the backward"):
        z.sum().backward()


def test_z0_may_be_written_to_before_backward():
    given = problem("tanh").differentiable()
    settings = {"solver": Reversible(), "termination": FixedSteps(5), "max_steps": 5}
    wanted = gradients(given.f, given.z0, given.sources, Unrolled(), **settings)
    z0 = given.z0.clone()
    z = solve(given.f, z0, adjoint=ReversibleAdjoint(), on_failure="raise", **settings).z
    z0.fill_(torch.nan)
    g = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(0))
    assert relative_error(torch.autograd.grad(z, given.sources, g), wanted[1:]) < 1e-9


# --- refusals ----------------------------------------------------------------------------------


def test_only_with_the_reversible_solver():
    with pytest.raises(UserError, match=r"cannot undo the steps of Anderson; give solver=Rev"):
        solve(torch.cos, torch.zeros(2, 3), solver=Anderson(), adjoint=ReversibleAdjoint())


def test_intermediate_states_are_refused():
    with pytest.raises(UserError, match="no gradient to intermediate states"):
        solve(
            torch.cos,
            torch.zeros(2, 3),
            solver=Reversible(),
            adjoint=ReversibleAdjoint(),
            termination=FixedSteps(8),
            max_steps=8,
            states=2,
        )


def test_second_derivatives_are_refused():
    given = problem("tanh").differentiable()
    z = solve(
        given.f,
        given.z0,
        solver=Reversible(),
        adjoint=ReversibleAdjoint(),
        max_steps=10,
        on_failure="ignore",
    ).z
    with pytest.raises(SecondDerivativeError, match="ReversibleAdjoint has no right second"):
        torch.autograd.grad(z.sum(), given.sources, create_graph=True)


def test_transforms_are_refused():
    def loss(x: Tensor) -> Tensor:
        return solve(
            lambda z: 0.5 * torch.sin(z) + x,
            torch.zeros(2, 3),
            solver=Reversible(),
            adjoint=ReversibleAdjoint(),
            max_steps=8,
        ).z.sum()

    with pytest.raises(TransformError, match="ReversibleAdjoint has no derivative under"):
        torch.func.grad(loss)(torch.ones(2, 3))


def test_a_tensor_that_cannot_be_seen_has_to_be_named():
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    settings: dict[str, Any] = {
        "solver": Reversible(),
        "termination": FixedSteps(5),
        "max_steps": 5,
    }

    def f(z: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():  # as inside a compiled function
            return weight * z + 1

    def run(adjoint: Adjoint, **more: Any) -> Tensor:
        z = solve(f, torch.ones(2, 3).double(), adjoint=adjoint, **settings, **more).z
        return torch.autograd.grad(z.sum(), weight)[0]

    with pytest.raises(UserError, match=r"was not seen.*inputs=\[\.\.\.\]"):
        run(ReversibleAdjoint())
    torch.testing.assert_close(run(ReversibleAdjoint(), inputs=[weight]), run(Unrolled()))


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), "1e-3"])
def test_bad_tolerance(tolerance):
    with pytest.raises(UserError, match=r"tolerance=.* must be a finite number of at least 0"):
        ReversibleAdjoint(tolerance)
