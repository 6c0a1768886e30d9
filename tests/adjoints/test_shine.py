"""The shared inverse estimate, against Broyden's updates and the dense gradient."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equilibria import (
    Adjoint,
    Anderson,
    AnyOf,
    Broyden,
    Fallback,
    FixedSteps,
    NeumannSeries,
    OneStep,
    Residual,
    SecondDerivativeError,
    Shine,
    Solver,
    Stagnation,
    Status,
    TransformError,
    UserError,
    solve,
)
from equilibria.core.iterate import Iterate
from equilibria.core.loop import LoopResult, iterate
from equilibria.core.problem import Problem
from equilibria.testing.adjoint_contract import AdjointContract
from equilibria.testing.dense import relative_error
from equilibria.testing.expect import expect
from equilibria.testing.problems import PROBLEMS, FixedPointProblem, problem
from equilibria.testing.states import STATES, StateProblem

KINDS = [
    Broyden(),
    Broyden(history_size=None),
    Broyden(history_size=3),
    Broyden(kind="bad"),
    Broyden(history_size=3, kind="bad"),
    Broyden(line_search=True),
    Broyden(relaxation=0.7),
]


class TestContract(AdjointContract):
    min_cosine = 0.8

    def make_adjoint(self) -> Adjoint:
        return Shine()

    def make_solver(self) -> Solver:
        return Broyden()

    @pytest.mark.parametrize("kind", STATES)
    def test_every_kind_of_state(self, adjoint: Adjoint, kind: str) -> None:
        """The estimate depends on the steps, and these on rounding: narrow states differ more."""
        if kind not in ("mixed_dtypes", "half"):
            super().test_every_kind_of_state(adjoint, kind)
            return
        given = StateProblem(kind)
        tolerance = 4 * given.precision
        z = given.join(
            self.run(given, given.z0, adjoint, termination=Residual(tolerance, tolerance)).z
        )
        g = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(0))
        found = torch.autograd.grad(z, given.sources, g)
        for a, b in zip(found, given.gradients(g), strict=True):
            expect(cosine(a, b) > 0.75, "a direction of descent")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_lower_precision(self, adjoint: Adjoint, dtype: torch.dtype) -> None:
        """A loose tolerance makes few steps, and few steps a rough estimate."""
        rtol = 1e-5 if dtype == torch.float32 else 2e-2
        rounded, exact = problem("tanh", dtype=dtype), problem("tanh").differentiable()
        found = self.gradients(rounded.differentiable(), adjoint, termination=Residual(rtol, 1e-6))
        assert all(gradient.dtype == dtype for gradient in found)
        for a, b in zip(found, self.gradients(exact, adjoint), strict=True):
            expect(cosine(a.double(), b) > 0.85, f"{dtype} points roughly the way float64 does")


@pytest.mark.slow
class TestContractOfTheBadMethod(TestContract):
    def make_solver(self) -> Solver:
        return Broyden(kind="bad")

    def make_adjoint(self) -> Adjoint:
        return Shine(fallback=False)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def run(f: Any, z0: Tensor, solver: Broyden, **settings: Any) -> LoopResult:
    settings = {"termination": Residual(1e-6, 1e-12), "max_steps": 60} | settings
    with torch.no_grad():
        return iterate(Problem(f, z0), solver, **settings)


def estimate(solver: Broyden, result: LoopResult, at: Iterate | None = None) -> Tensor:
    """H^T of every sample written out, (B, D, D), by what it does to the unit vectors."""
    with torch.no_grad():
        h = solver.inverse_jacobian_t(result.solver_state, at or result.iterate)
        assert h is not None
        batch, width = result.iterate.z.shape
        columns = [
            h(torch.eye(width, dtype=result.iterate.z.dtype)[i].expand(batch, -1).contiguous())
            for i in range(width)
        ]
    return torch.stack(columns, dim=2)


def by_updates(steps: list[Tensor], residuals: list[Tensor], kind: str) -> Tensor:
    """Broyden's inverse by its rank-one updates: B of g(z) = f(z) - z, from B = -I; -B^-1."""
    inverse = -torch.eye(steps[0].numel(), dtype=torch.float64)
    for s, r in zip(steps, residuals, strict=True):
        row = inverse.T @ s if kind == "good" else r
        inverse = inverse + torch.outer(s - inverse @ r, row) / (row @ r)
    return -inverse


# --- the estimate ------------------------------------------------------------------------------


@pytest.mark.parametrize("history_size", [None, 3])
@pytest.mark.parametrize("kind", ["good", "bad"])
def test_the_estimate_is_broydens_with_the_last_step_included(kind, history_size):
    given = problem("tanh", batch=1)
    points: list[Tensor] = []

    def f(z: Tensor) -> Tensor:
        points.append(z[0].clone())
        return given.f(z)

    solver = Broyden(history_size, kind=kind)
    result = run(f, given.z0, solver)
    images = [given.f(z.unsqueeze(0))[0] for z in points]
    residuals = [image - z for z, image in zip(points, images, strict=True)]
    pairs = range(max(1, len(points) - (history_size or 99)), len(points))
    wanted = by_updates(
        [points[k] - points[k - 1] for k in pairs],
        [residuals[k] - residuals[k - 1] for k in pairs],
        kind,
    )
    torch.testing.assert_close(estimate(solver, result)[0], wanted.T, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", KINDS, ids=repr)
def test_the_newest_secant_is_explained(solver):
    """(I - J)^-1 maps the change of z - f(z) to the change of z; so does the estimate."""
    given = problem("nonsymmetric")
    result = run(given.f, given.z0, solver, termination=FixedSteps(5))
    before = result.solver_state.previous
    matrix = estimate(solver, result).mT
    step = result.iterate.z - before.z
    change = step - (result.iterate.fz - before.fz)
    torch.testing.assert_close((matrix @ change.unsqueeze(2)).squeeze(2), step, rtol=1e-7, atol=0)


@pytest.mark.parametrize("solver", KINDS, ids=repr)
@pytest.mark.parametrize("termination", [Residual(1e-3), AnyOf(Residual(1e-12), Stagnation(4))])
@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_sample_has_the_estimate_that_it_has_alone(solver, termination, keep):
    """However long others go on, whether it succeeded or was put back to its best point."""
    given = problem("tanh")
    wild = torch.tensor([[1.0], [-4.0], [1.0], [0.2]], dtype=torch.float64)

    def map_of(rows: slice) -> Any:
        return lambda z: torch.tanh(z @ given.weights[0] * wild[rows] + given.inputs[0][rows])

    settings = {"termination": termination, "keep": keep, "max_steps": 40}
    together = run(map_of(slice(None)), given.z0, solver, **settings)
    assert len(together.num_steps.unique()) > 2
    found = estimate(solver, together)
    for row in range(4):
        rows = slice(row, row + 1)
        alone = run(map_of(rows), given.z0[rows], solver, **settings)
        assert alone.num_steps == together.num_steps[row]
        torch.testing.assert_close(
            found[row], estimate(solver, alone)[0], rtol=1e-4, atol=1e-6 * found[row].abs().max()
        )


@pytest.mark.parametrize("solver", KINDS, ids=repr)
def test_a_nan_sample_keeps_what_it_knew(solver):
    """The pairs made before f broke down; the others as if nothing had been."""
    given = problem("tanh")
    calls = 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        broken = torch.tensor([[0.0], [torch.nan], [0.0], [0.0]], dtype=z.dtype)
        return given.f(z) + (broken if calls > 4 else 0.0)

    result = run(f, given.z0, solver)
    assert result.status.tolist() == [0, Status.NONFINITE, 0, 0]
    matrices = estimate(solver, result)
    assert torch.isfinite(matrices).all()
    assert not torch.equal(matrices[1], torch.eye(6).double())
    calls = -1000
    torch.testing.assert_close(
        matrices[[0, 2, 3]],
        estimate(solver, run(f, given.z0, solver))[[0, 2, 3]],
        rtol=1e-5,
        atol=1e-8,
    )


def test_without_a_step_the_estimate_is_the_identity():
    given = problem("half_precision", batch=2)
    result = run(given.f, torch.as_tensor(given.z_star), Broyden())
    assert torch.equal(estimate(Broyden(), result), torch.eye(6).double().expand(2, 6, 6))


@pytest.mark.parametrize("max_steps", [8, 300])
def test_the_estimate_holds_no_more_than_the_pairs(max_steps):
    """Not the room that was made for steps that were never needed."""
    given = problem("tanh")
    solver = Broyden(history_size=None)
    result = run(given.f, given.z0, solver, max_steps=max_steps, termination=FixedSteps(8))
    h = solver.inverse_jacobian_t(result.solver_state, result.iterate)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in vars(h).values()
        if isinstance(t, Tensor)
    }
    # 4 samples, 8 pairs of width 6 and an empty one
    vectors, small = 2 * 4 * 9 * 6 * 8, 2 * 4 * 9 * 9 * 8
    assert sum(storages.values()) <= vectors + small


# --- the gradient ------------------------------------------------------------------------------


def gradients(
    given: FixedPointProblem, adjoint: Adjoint, solver: Solver | None = None, **settings: Any
) -> tuple[Tensor, ...]:
    settings = {"termination": Residual(1e-8, 1e-12), "max_steps": 200} | settings
    z = solve(
        given.f,
        given.z0,
        solver=solver or Broyden(),
        adjoint=adjoint,
        on_failure="ignore",
        **settings,
    ).z
    g = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(0))
    return torch.autograd.grad(z, given.sources, g, materialize_grads=True)


def dense(given: FixedPointProblem) -> tuple[Tensor, ...]:
    from equilibria.testing.dense import implicit_gradients

    g = torch.randn(given.z0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return implicit_gradients(given.f, torch.as_tensor(given.z_star), g, given.sources)


def whole(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


SOLVED = [
    name
    for name in PROBLEMS
    if not problem(name).tags & {"no_solution", "singular", "multiple", "non_normal", "stiff"}
    and name not in ("constant", "zero")  # there one step is exact, or the gradient is zero
]


@pytest.mark.parametrize("name", SOLVED)
def test_nearer_to_the_exact_gradient_than_one_step(name):
    given = problem(name).differentiable()
    wanted = whole(dense(given))
    shine, one_step = (cosine(whole(gradients(given, a)), wanted) for a in (Shine(), OneStep()))
    assert shine > one_step
    assert shine > 0.85


@pytest.mark.parametrize("solver", [Broyden(), Broyden(kind="bad"), Broyden(history_size=4)])
def test_u_is_the_transposed_estimate(solver):
    given = problem("tanh").differentiable()
    settings = {"termination": Residual(1e-8), "max_steps": 60}
    matrices = estimate(solver, run(given.f, given.z0, solver, **settings))
    z = solve(given.f, given.z0, solver=solver, adjoint=Shine(fallback=False), **settings).z
    g = torch.randn_like(z)
    u = (matrices @ g.unsqueeze(2)).squeeze(2)
    wanted = torch.autograd.grad(given.f(z.detach()), given.sources, u)
    assert relative_error(torch.autograd.grad(z, given.sources, g), wanted) < 1e-9


@pytest.mark.parametrize("name", ["tanh", "rotation", "expansive_linear", "non_normal", "stiff"])
def test_refinement_ends_with_the_exact_gradient(name):
    given = problem(name).differentiable()
    wanted = dense(given)
    errors = [
        relative_error(gradients(given, Shine(refinement=k), termination=Residual(1e-10)), wanted)
        for k in (1, 3, 12)
    ]
    assert errors[2] < (1e-3 if name == "stiff" else 1e-5)  # forward error times condition
    assert errors[2] < min(errors[:2])


def test_refinement_is_worth_more_than_as_many_terms_of_a_series():
    given = problem("tanh").differentiable()
    wanted = whole(dense(given))
    refined, series = (
        cosine(whole(gradients(given, a)), wanted) for a in (Shine(refinement=2), NeumannSeries(4))
    )
    assert refined > series


def test_refinement_reports_and_costs_what_it_says():
    given = problem("tanh").differentiable()
    z = solve(given.f, given.z0, solver=Broyden(), adjoint=Shine(refinement=2), on_failure="raise")
    z.z.sum().backward()  # 2 steps miss any tolerance, which is no failure
    result = z.backward.result
    assert result.num_evals == 4
    assert (result.relative_residual < 0.2).all()
    plain = solve(given.f, given.z0, solver=Broyden(), adjoint=Shine())
    plain.z.sum().backward()
    assert plain.backward.result is None
    assert plain.backward.seconds > 0


def test_the_fallback_is_the_one_step_gradient_of_that_sample():
    """max_ratio decides; both sides of it are seen."""
    given = problem("symmetric").differentiable()  # norms of (I - J)^-1 from 1.1 to 5
    one_step, free, mixed = (
        gradients(given, adjoint)
        for adjoint in (OneStep(), Shine(fallback=False), Shine(max_ratio=1.5))
    )
    (c,) = (i for i, source in enumerate(given.sources) if source.shape == given.z0.shape)
    fell_back = (mixed[c] == one_step[c]).all(1)
    assert fell_back.any()
    assert not fell_back.all()
    assert torch.equal(mixed[c][~fell_back], free[c][~fell_back])
    assert torch.equal(gradients(given, Shine(max_ratio=1e-9))[c], one_step[c])


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_fallback_is_relative_to_the_cotangent(scale):
    given = problem("tanh").differentiable()
    z = solve(given.f, given.z0, solver=Broyden(), adjoint=Shine()).z
    g = torch.randn_like(z)
    plain = torch.autograd.grad(z, given.sources, g, retain_graph=True)
    scaled = torch.autograd.grad(z, given.sources, scale * g)
    assert relative_error(scaled, [scale * gradient for gradient in plain]) < 1e-12


def test_the_fallback_compares_with_the_size_of_the_cotangent():
    """(I - J)^-1 = 10, found exactly along the one direction that the solve went."""
    c = torch.zeros(1, 100, dtype=torch.float64)
    c[0, 0] = 1.0
    c.requires_grad_()

    def gradient(adjoint: Adjoint) -> float:
        z = solve(lambda z: 0.9 * z + c, torch.zeros_like(c), solver=Broyden(), adjoint=adjoint).z
        (found,) = torch.autograd.grad(z[0, 0], c)
        return float(found[0, 0])

    assert gradient(Shine(max_ratio=20.0)) == pytest.approx(10.0)
    assert gradient(Shine(max_ratio=5.0)) == 1.0


def test_on_a_singular_problem_the_fallback_keeps_the_gradient_small():
    given = problem("singular").differentiable()
    free, safe = (whole(gradients(given, Shine(fallback=b))) for b in (False, True))
    assert torch.isfinite(free).all()
    assert free.norm() > 1e3 * safe.norm()
    assert torch.equal(safe, whole(gradients(given, OneStep())))


@pytest.mark.parametrize("refinement", [0, 3])
@pytest.mark.parametrize("fallback", [True, False])
def test_never_nan(fallback, refinement):
    """Also where f breaks down on the way, or nothing was learnt."""
    adjoint = Shine(refinement=refinement, fallback=fallback)
    for name in PROBLEMS:
        given = problem(name).differentiable()
        if given.sources:
            assert torch.isfinite(whole(gradients(given, adjoint))).all(), name


def test_a_vanishing_cotangent():
    given = problem("tanh").differentiable()
    z = solve(given.f, given.z0, solver=Broyden(), adjoint=Shine(refinement=2)).z
    found = torch.autograd.grad(z, given.sources, torch.zeros_like(z))
    assert not any(gradient.any() for gradient in found)


def test_samples_of_different_length_in_the_gradient():
    """The estimate of an early sample survives the steps of the others, through the ring."""
    given = problem("tanh").differentiable()
    solver = Broyden(history_size=3)
    settings = {"termination": Residual(1e-3), "max_steps": 60}
    both = solve(given.f, given.z0, solver=solver, adjoint=Shine(), **settings)
    assert both.num_steps.max() - both.num_steps[3] > 3
    found = torch.autograd.grad(both.z[3].sum(), given.inputs[0])[0][3]
    last = given.rows(slice(3, 4))
    alone = solve(last.f, last.z0, solver=solver, adjoint=Shine(), **settings)
    wanted = torch.autograd.grad(alone.z.sum(), given.inputs[0])[0][3]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_intermediate_states_use_the_final_estimate():
    given = problem("tanh").differentiable()
    solution = solve(given.f, given.z0, solver=Broyden(), adjoint=Shine(fallback=False), states=[4])
    matrices = estimate(Broyden(), run(given.f, given.z0, Broyden(), termination=Residual()))
    state, _ = solution.states
    u = matrices @ torch.ones_like(state).unsqueeze(2)
    wanted = torch.autograd.grad(given.f(state.detach()), given.sources, u.squeeze(2))
    found = torch.autograd.grad(state.sum(), given.sources)
    assert relative_error(found, wanted) < 1e-9


def test_everything_is_freed_without_the_garbage_collector():
    def train_and_forget() -> list[weakref.ref[Any]]:
        module, closure = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
        solution = solve(
            lambda z: 0.1 * torch.tanh(module(z)) + closure,
            torch.zeros(2, 3),
            solver=Broyden(),
            adjoint=Shine(refinement=1),
        )
        solution.z.sum().backward()
        return [weakref.ref(module), weakref.ref(closure), weakref.ref(solution.z)]

    gc.collect()
    gc.disable()
    try:
        assert [ref() for ref in train_and_forget()] == [None, None, None]
    finally:
        gc.enable()


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [Anderson(), Fallback(Anderson(), Broyden())], ids=repr)
def test_only_with_a_solver_that_has_an_estimate(solver):
    name = type(solver).__name__
    message = f"Shine needs a forward solver.*{name} does not; give solver=Broyden"
    with pytest.raises(UserError, match=message):
        solve(torch.cos, torch.zeros(2, 3), solver=solver, adjoint=Shine())


def test_the_pair_is_refused_when_a_layer_is_made(make_deq):
    with pytest.raises(UserError, match="Anderson does not"):
        make_deq(solver=Anderson(), adjoint=Shine())


def test_second_derivatives_and_transforms_are_refused():
    given = problem("tanh").differentiable()

    def loss(x: Tensor) -> Tensor:
        return solve(
            lambda z: given.map(z, x, *given.weights), given.z0, solver=Broyden(), adjoint=Shine()
        ).z.sum()

    with pytest.raises(SecondDerivativeError, match="Shine has no right second"):
        torch.autograd.grad(loss(given.inputs[0]), given.sources, create_graph=True)
    with pytest.raises(TransformError, match="Shine has no derivative under"):
        torch.func.grad(loss)(given.inputs[0].detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refinement": -1}, "refinement=-1 must be an integer of at least 0"),
        ({"refinement": 1.0}, "refinement=1.0"),
        ({"refinement": True}, "refinement=True"),
        ({"fallback": 1}, "fallback=1 of Shine must be True or False"),
        ({"max_ratio": 0.0}, "max_ratio=0.0 must be a number above 0"),
        ({"max_ratio": float("nan")}, "max_ratio=nan"),
        ({"max_ratio": "1.3"}, "max_ratio='1.3'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        Shine(**options)


def test_several_cotangents_at_once_are_refused_where_a_solve_is_needed() -> None:
    """GMRES decides by the numbers of each, which cannot be batched afterwards."""
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    cotangents = torch.eye(6, dtype=torch.float64).view(6, 2, 3)

    def gradients(refinement: int) -> Tensor:
        z = solve(
            lambda z: torch.tanh(0.5 * z + x),
            torch.zeros_like(x),
            solver=Broyden(),
            adjoint=Shine(refinement),
        ).z
        return torch.autograd.grad(z, x, cotangents, is_grads_batched=True)[0]

    assert gradients(0).isfinite().all()
    with pytest.raises(TransformError, match="jacrev"):
        gradients(1)
