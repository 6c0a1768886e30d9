"""`torch.compile` around a whole solve: one graph where steps are fixed, right numbers always."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend

from equilibria import (
    DEQ,
    Anderson,
    AnyOf,
    Broyden,
    Fallback,
    FixedSteps,
    Implicit,
    NeumannSeries,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Residual,
    Reversible,
    ReversibleAdjoint,
    Shine,
    Stagnation,
    Status,
    Unrolled,
    solve,
)
from equilibria.normalizations.weight_norm import weight_norm

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SOLVERS = [
    Picard(),
    Picard(relaxation=0.7),
    Anderson(),
    Anderson(kind="II", safeguard=2.0, relaxation=0.9, restart=2),
    Broyden(),
    Broyden(kind="bad"),
]
IN_ONE_GRAPH = [OneStep(), Phantom(), Unrolled()]
ASKING_FOR_NUMBERS = [
    {"termination": Residual(1e-10)},
    {"termination": AnyOf(Residual(1e-10), Stagnation())},
    {"termination": FixedSteps(4), "adjoint": Implicit(rtol=1e-12)},
    {"termination": FixedSteps(4), "adjoint": NeumannSeries(3)},
    {"termination": FixedSteps(4), "adjoint": Unrolled(checkpoint=True)},
    {"termination": FixedSteps(4), "solver": Broyden(), "adjoint": Shine()},
    {
        "termination": FixedSteps(4),
        "solver": Reversible(),
        "adjoint": ReversibleAdjoint(),
        "max_steps": 4,
    },
    {"termination": FixedSteps(2), "solver": NewtonKrylov()},
    {"termination": FixedSteps(4), "solver": Fallback(Anderson(), Picard())},
    {"termination": FixedSteps(4), "solver": Broyden(line_search=True)},
    {"termination": FixedSteps(4), "on_failure": "raise"},
]
FIXED = {"termination": FixedSteps(4), "on_failure": "warn"}


def slow_but_the_first(values: list[Any]) -> list[Any]:
    """Compiling takes its time."""
    return [values[0], *(pytest.param(value, marks=pytest.mark.slow) for value in values[1:])]


def gradients(layer: Callable[[Tensor], Tensor], deq: DEQ, x: Tensor) -> list[Tensor]:
    """The fixed point, and the gradients of all parameters and of the input."""
    x = x.clone().requires_grad_()
    z = layer(x)
    return [z.detach(), *torch.autograd.grad(z.square().sum(), [*deq.parameters(), x])]


def compiled(deq: DEQ, backend: Any = "aot_eager") -> Callable[[Tensor], Tensor]:
    """The layer in one graph, or an error."""
    return torch.compile(lambda x: deq(x).z, fullgraph=True, backend=backend)


@pytest.mark.parametrize("solver", slow_but_the_first(SOLVERS), ids=str)
def test_inference_in_one_graph(make_deq: Callable[..., DEQ], x: Tensor, solver: Any) -> None:
    deq = make_deq(solver=solver, **FIXED)
    with torch.no_grad():
        torch.testing.assert_close(compiled(deq, "eager")(x), deq(x).z)


@pytest.mark.parametrize("adjoint", slow_but_the_first(IN_ONE_GRAPH), ids=str)
def test_training_in_one_graph(make_deq: Callable[..., DEQ], x: Tensor, adjoint: Any) -> None:
    deq = make_deq(solver=Picard(), adjoint=adjoint, **FIXED)
    layer = compiled(deq)
    for inputs in (x, x + 1.0):
        expected = gradients(lambda x: deq(x).z, deq, inputs)
        torch.testing.assert_close(gradients(layer, deq, inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", IN_ONE_GRAPH, ids=lambda adjoint: type(adjoint).__name__)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_training_in_one_graph_with_every_solver(
    make_deq: Callable[..., DEQ], x: Tensor, solver: Any, adjoint: Any
) -> None:
    deq = make_deq(solver=solver, adjoint=adjoint, **FIXED)
    expected = gradients(lambda x: deq(x).z, deq, x)
    torch.testing.assert_close(gradients(compiled(deq), deq, x), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        (Picard(), OneStep()),
        (Picard(), Phantom(2)),
        (Picard(), Unrolled()),
        (Anderson(), OneStep()),
        (Broyden(), OneStep()),  # half a minute
    ],
    ids=str,
)
def test_training_in_one_graph_by_inductor(
    make_deq: Callable[..., DEQ], x: Tensor, solver: Any, adjoint: Any
) -> None:
    deq = make_deq(solver=solver, adjoint=adjoint, **FIXED)
    expected = gradients(lambda x: deq(x).z, deq, x)
    torch.testing.assert_close(gradients(compiled(deq, "inductor"), deq, x), expected)


@pytest.mark.slow
def test_inductor_and_another_batch_size(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    deq = make_deq(solver=Picard(), adjoint=OneStep(), **FIXED)
    layer = torch.compile(lambda x: deq(x).z, fullgraph=True, dynamic=True)
    for batch in (4, 3, 2):
        expected = gradients(lambda x: deq(x).z, deq, x[:batch])
        torch.testing.assert_close(gradients(layer, deq, x[:batch]), expected)


@pytest.mark.slow
def test_the_whole_report_comes_out_of_the_graph(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    deq = make_deq(solver=Picard(), **FIXED)
    layer = torch.compile(
        lambda x: _report(deq(x, trace=True, states="all")), fullgraph=True, backend="eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(layer(x), _report(deq(x, trace=True, states="all")))


def _report(solution: Any) -> list[Any]:
    return [
        solution.z,
        solution.status,
        solution.residual,
        solution.relative_residual,
        solution.num_steps,
        solution.num_evals,
        solution.trace,
        *solution.states,
    ]


@pytest.mark.slow
def test_time_is_unknown_in_a_graph(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    deq = make_deq(solver=Picard(), **FIXED)

    @torch.compile(fullgraph=True, backend="eager")
    def seconds(x: Tensor) -> tuple[Tensor, float]:
        solution = deq(x)
        return solution.z, solution.seconds

    with torch.no_grad():
        assert math.isnan(seconds(x)[1])


@pytest.mark.slow
def test_a_tree_of_a_state_in_one_graph(x: Tensor) -> None:
    def f(state: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b = state["a"], state["b"]
        mean = b.mean((1, 2)).unsqueeze(1)
        return {"a": 0.3 * torch.cos(a + mean + x), "b": 0.5 * torch.sin(b)}

    def run(x: Tensor) -> dict[str, Tensor]:
        z0 = {"a": torch.zeros_like(x), "b": torch.ones(4, 2, 2, dtype=torch.float32)}
        return solve(f, z0, solver=Anderson(), termination=FixedSteps(3)).z

    with torch.no_grad():
        layer = torch.compile(run, fullgraph=True, backend="eager")
        torch.testing.assert_close(layer(x), run(x))


@pytest.mark.slow
def test_autocast_in_one_graph(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    deq = make_deq(solver=Anderson(), adjoint=OneStep(), **FIXED).float()

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return deq(x).z

    layer = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, expected = (gradients(g, deq, x.float()) for g in (layer, run))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_normalised_weights_in_one_graph(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    deq = make_deq(solver=Picard(), adjoint=OneStep(), **FIXED)
    weight_norm(deq.cell.recurrent)
    expected = gradients(lambda x: deq(x).z, deq, x)
    torch.testing.assert_close(gradients(compiled(deq), deq, x), expected)


def test_a_sample_that_is_not_finite_says_so_in_its_status(x: Tensor) -> None:
    """There is no warning: in one graph nobody looks at numbers."""
    spoiled = x.clone()
    spoiled[1] = math.nan

    @torch.compile(fullgraph=True, backend="eager")
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        solution = solve(
            lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x), termination=FixedSteps(3)
        )
        return solution.z, solution.status

    with torch.no_grad():
        z, status = run(spoiled)
    assert status.tolist() == [Status.SUCCESS, Status.NONFINITE, Status.SUCCESS, Status.SUCCESS]
    assert z.isfinite().all()


@pytest.mark.parametrize("settings", slow_but_the_first(ASKING_FOR_NUMBERS), ids=str)
def test_what_asks_for_numbers_runs_between_two_graphs(
    make_deq: Callable[..., DEQ], x: Tensor, settings: dict[str, Any]
) -> None:
    deq = make_deq(**({"adjoint": OneStep()} | FIXED | settings))
    head = nn.Linear(5, 2).double()

    def model(x: Tensor) -> Tensor:
        return head(deq(x + 1.0).z)

    counter = CompileCounterWithBackend("aot_eager")
    layer = torch.compile(model, backend=counter)
    torch.testing.assert_close(gradients(layer, deq, x), gradients(model, deq, x))
    assert 2 <= counter.frame_count <= 4  # what comes before, and what comes after


@pytest.mark.slow
def test_a_compiled_cell_stays_compiled_between_two_graphs(
    make_deq: Callable[..., DEQ], x: Tensor
) -> None:
    deq = make_deq()
    expected = gradients(lambda x: deq(x).z, deq, x)
    counter = CompileCounterWithBackend("aot_eager")
    deq.cell.compile(backend=counter, fullgraph=True)
    layer = torch.compile(lambda x: deq(x).z, backend="aot_eager")
    torch.testing.assert_close(gradients(layer, deq, x), expected)
    assert counter.frame_count == 2


def test_one_graph_asked_for_and_impossible_says_why(
    make_deq: Callable[..., DEQ], x: Tensor
) -> None:
    with pytest.raises(Unsupported, match="between_graphs"):
        compiled(make_deq())(x)


def test_failure_is_raised_from_compiled_code(x: Tensor) -> None:
    @torch.compile(backend="eager")
    def run(x: Tensor) -> Tensor:
        return solve(lambda z: 2.0 * z + x, x, max_steps=3, solver=Picard(), on_failure="raise").z

    with torch.no_grad(), pytest.raises(RuntimeError, match="the forward solve"):
        run(x)


@pytest.mark.slow
def test_a_second_derivative_through_one_graph_raises(
    make_deq: Callable[..., DEQ], x: Tensor
) -> None:
    x = x.clone().requires_grad_()

    def differentiate_twice(layer: Callable[[Tensor], Tensor]) -> None:
        (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        torch.autograd.grad(g.sum(), x)

    for adjoint in (OneStep(), Unrolled()):
        deq = make_deq(solver=Picard(), adjoint=adjoint, **FIXED)
        with pytest.raises(RuntimeError, match="second derivative|double backward"):
            differentiate_twice(compiled(deq))


def test_the_first_solve_of_a_thread_may_be_a_compiled_one(x: Tensor) -> None:
    """What the first call leaves behind must not fail the guards of the second."""

    def run(x: Tensor) -> Tensor:
        return solve(lambda z: 0.5 * torch.cos(z + x), x, solver=Picard(), **FIXED).z

    def twice() -> list[Tensor]:
        layer = torch.compile(run, fullgraph=True, backend="eager")
        with torch.no_grad():
            return [layer(x) for _ in range(2)]

    with ThreadPoolExecutor(1) as fresh:
        for found in fresh.submit(twice).result():
            torch.testing.assert_close(found, run(x))
