"""Drawn problems, solvers, gradients and states: a wrong answer that claims success is a failure.

What a report calls SUCCESS is computed again with dense float64 algebra and has to agree within
what tolerance and conditioning allow; everything else has to say what went wrong. The fast part
draws a few of each, the slow part 7,000 in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from equilibria import (
    GMRES,
    Anderson,
    AnyOf,
    BiCGStab,
    Broyden,
    Divergence,
    Fallback,
    FixedPoint,
    FixedSteps,
    Implicit,
    Neumann,
    NeumannSeries,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Residual,
    Reversible,
    ReversibleAdjoint,
    Shine,
    Solution,
    Solver,
    Stagnation,
    Status,
    Unrolled,
    solve,
)
from equilibria.core.state import Layout
from equilibria.testing import FixedPointProblem, Recorder
from equilibria.testing.dense import jacobian
from equilibria.testing.designed import designed_problem
from equilibria.testing.expect import rms, rows

NUM_CASES = {
    "forward": 2400,
    "implicit": 2000,
    "approximate": 600,
    "shine": 400,
    "unrolled": 400,
    "linear": 800,
    "trees": 400,
}
PARTS = {"few": (0, 12)} | {f"part{i}": (i, 0) for i in range(1, 9)}


def test_the_slow_part_draws_thousands() -> None:
    assert sum(NUM_CASES.values()) >= 5000


def draw_and_check(
    name: str, part: str, check: Callable[..., None], **strategies: st.SearchStrategy[Any]
) -> None:
    """Run `check` on one part of the drawn cases, and count them."""
    number, quota = PARTS[part]
    quota = quota or NUM_CASES[name] // (len(PARTS) - 1)
    num_cases = 0

    def counted(**drawn: Any) -> None:
        nonlocal num_cases
        check(**drawn)
        num_cases += 1

    run = settings(max_examples=quota, suppress_health_check=list(HealthCheck))(
        seed(number)(given(**strategies)(counted))
    )
    run()
    print(f"{name}, {part}: {num_cases} cases")
    assert num_cases >= quota


in_parts = pytest.mark.parametrize(
    "part",
    [pytest.param(name, marks=pytest.mark.slow if i else ()) for i, name in enumerate(PARTS)],
)

# --- what is drawn -----------------------------------------------------------------------------

RELAXATIONS = st.sampled_from([1.0, 1.0, 0.9, 0.6, 0.3])
SMOOTH = st.one_of(  # solvers whose steps can be unrolled
    st.builds(Picard, relaxation=RELAXATIONS),
    st.builds(
        Anderson,
        history_size=st.integers(1, 8),
        relaxation=RELAXATIONS,
        kind=st.sampled_from(["I", "II"]),
        restart=st.sampled_from([None, None, 1, 5]),
        safeguard=st.sampled_from([None, None, 1.0, 10.0]),
    ),
    st.builds(
        Broyden,
        history_size=st.sampled_from([None, 1, 3, 20]),
        relaxation=RELAXATIONS,
        kind=st.sampled_from(["good", "good", "bad"]),
        line_search=st.booleans(),
    ),
)
ALL_SOLVERS = st.one_of(
    SMOOTH,
    SMOOTH,
    st.builds(
        NewtonKrylov,
        products=st.sampled_from(["auto", "double_backward", "difference"]),
        line_search=st.booleans(),
        max_products=st.integers(1, 20),
    ),
    st.builds(
        Reversible, relaxation=st.sampled_from([0.3, 0.5]), reconstruction_tolerance=st.none()
    ),
    st.builds(Fallback, SMOOTH, SMOOTH, num_steps=st.integers(1, 8)),
)
LINEAR_SOLVERS = st.one_of(
    st.builds(GMRES, restart=st.integers(1, 40)),
    st.just(BiCGStab()),
    st.just(Neumann()),
    st.builds(FixedPoint, SMOOTH),
)
SHAPES = st.lists(st.integers(1, 3), max_size=3).map(tuple)
LAYOUTS = st.sampled_from(["plain", "plain", "transposed", "sliced", "expanded"])


@st.composite
def problems(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32)
) -> FixedPointProblem:
    return designed_problem(
        batch=draw(st.integers(0, 4)),
        shape=draw(SHAPES),
        spectral_radius=draw(st.floats(0.1, 1.5)),
        non_normality=draw(st.sampled_from([0.0, 0.0, 0.5, 2.0])),
        nonlinear=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 10_000)),
    )


@st.composite
def terminations(draw: st.DrawFn) -> Residual | AnyOf:
    tight = st.sampled_from([1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-7, 1e-9, 1e-12])
    residual = Residual(draw(tight), draw(st.sampled_from([0.0, 1e-12, 1e-6, 1e-3])))
    rules = draw(st.sampled_from([(), (Stagnation(),), (Stagnation(5), Divergence())]))
    return AnyOf(residual, *rules) if rules else residual


def laid_out(z: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides."""
    if layout == "transposed" and z.dim() > 1:
        return z.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.stack([z, z], dim=-1)[..., 0]
    if layout == "expanded":
        return z.new_zeros(()).expand(z.shape)
    return z


def rule_of(termination: Residual | AnyOf) -> Residual:
    rule = termination.rules[0] if isinstance(termination, AnyOf) else termination
    assert isinstance(rule, Residual)
    return rule


def resolution(problem: FixedPointProblem, z: Tensor) -> Tensor:
    """Rounding of one evaluation of the map at z, (B,)."""
    weight = problem.inputs[1].detach().double()
    size = rms(z).nan_to_num(0.0) * torch.linalg.matrix_norm(weight, "fro") + 1.0
    return 8.0 * torch.finfo(problem.z0.dtype).eps * size


# --- forward -----------------------------------------------------------------------------------


def check_forward(
    problem: FixedPointProblem,
    solver: Solver,
    termination: Residual | AnyOf,
    layout: str,
    keep: str,
    max_steps: int,
    spoilt: int | None,
) -> None:
    z0 = laid_out(problem.z0, layout)
    given_z0 = z0.clone()

    def f(z: Tensor) -> Tensor:
        image = problem.f(z)
        if spoilt is None:
            return image
        bad = (torch.arange(len(image)) == spoilt).view(-1, *(1,) * (image.dim() - 1))
        return torch.where(bad, torch.nan, image)

    recorder = Recorder(f)
    with torch.no_grad():
        solution = solve(
            recorder,
            z0,
            solver=solver,
            termination=termination,
            max_steps=max_steps,
            keep=keep,  # type: ignore[arg-type]
            on_failure="ignore",
        )
        image = f(solution.z)
    assert torch.equal(z0, given_z0)
    assert recorder.images_untouched
    assert solution.z.shape == z0.shape
    assert solution.z.dtype == z0.dtype
    assert solution.num_evals == recorder.num_calls
    assert set(solution.status.tolist()) <= {int(status) for status in Status}
    assert bool((solution.num_steps <= max_steps).all())
    expect_true_report(solution, image, resolution(problem, solution.z))

    rule, solved = rule_of(termination), solution.converged
    tolerance = rule.atol + rule.rtol * rms(image)
    slack = resolution(problem, solution.z)
    assert bool((rms(image - solution.z) <= 1.0001 * tolerance + slack)[solved].all())
    if spoilt is not None and spoilt < len(z0):
        assert solution.status[spoilt] == Status.NONFINITE
        assert torch.equal(solution.z[spoilt], z0[spoilt])
    if "linear" in problem.tags:
        # The error is at most the norm of (I - J)^-1 times the true residual, for any z.
        exact = problem.to(torch.float64)
        star = torch.as_tensor(problem.z_star)
        remaining = rms(exact.f(solution.z.double()) - solution.z.double())
        rounding = torch.finfo(z0.dtype).eps * rms(star) * 1e2
        bound = problem.conditioning * (remaining + rounding + 1e-13) * 1.01
        ill = problem.conditioning > 1e-3 / torch.finfo(z0.dtype).eps
        finite = torch.isfinite(rms(image))
        assert bool((rms(solution.z.double() - star) <= bound)[finite & ~ill].all())


def expect_true_report(solution: Solution, image: Tensor, rounding: Tensor) -> None:
    """Residuals are those of exactly what is returned."""
    true = rms(image - solution.z)
    known = torch.isfinite(true)
    error = (solution.residual.double() - true).abs()
    assert bool((error <= 1e-4 * true + rounding)[known].all())
    size = rms(image)
    relative = (solution.relative_residual.double() * size - true).abs()
    assert bool((relative <= 1e-4 * true + rounding)[known & (size > 1e-30)].all())


@in_parts
def test_forward(part: str) -> None:
    draw_and_check(
        "forward",
        part,
        check_forward,
        problem=problems((torch.float64, torch.float32, torch.bfloat16, torch.float16)),
        solver=ALL_SOLVERS,
        termination=terminations(),
        layout=LAYOUTS,
        keep=st.sampled_from(["best", "best", "last"]),
        max_steps=st.one_of(st.integers(1, 10), st.integers(10, 80)),
        spoilt=st.sampled_from([None, None, None, 0, 2]),
    )


# --- gradients ---------------------------------------------------------------------------------


def solve_for(live: FixedPointProblem, layout: str, **settings: Any) -> Solution:
    return solve(live.f, laid_out(live.z0, layout), on_failure="ignore", **settings)


def dense_jacobian(live: FixedPointProblem, z: Tensor) -> tuple[Tensor, Tensor]:
    """J (B, D, D) and df/dx (B, D) at a given point, in float64."""
    exact = live.to(torch.float64)
    point = z.detach().double()
    slope = torch.ones_like(point) if "linear" in live.tags else 1.0 - exact.f(point).square()
    return jacobian(exact.f, point).detach(), rows(slope.detach())


def check_implicit(
    problem: FixedPointProblem,
    solver: Solver,
    termination: Residual | AnyOf,
    layout: str,
    backward: Any,
    rtol: float,
    backward_steps: int,
    log_scale: int,
) -> None:
    live = problem.differentiable()
    adjoint = Implicit(backward, rtol=rtol, max_steps=backward_steps)
    solution = solve_for(
        live, layout, solver=solver, termination=termination, adjoint=adjoint, max_steps=60
    )
    z = solution.z
    g = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z.dtype)
    g = g * 10.0**log_scale
    found = torch.autograd.grad(z, live.sources, g, materialize_grads=True)
    assert [t.shape for t in found] == [t.shape for t in live.sources]
    assert [t.dtype for t in found] == [t.dtype for t in live.sources]
    report = solution.backward.result
    assert report is not None
    assert report.status.shape == solution.status.shape
    usable = solution.converged & torch.isfinite(rms(z))
    assert all(bool(torch.isfinite(t[usable]).all()) for t in found)

    matrix, slope = dense_jacobian(live, z)
    system = torch.eye(matrix.shape[1], dtype=torch.float64) - matrix.mT
    conditioning = 1.0 / torch.linalg.svdvals(system)[:, -1]
    flat_g = rows(g.double())
    u = torch.linalg.solve_ex(system, flat_g)[0]
    wanted = slope * u
    eps = torch.finfo(z.dtype).eps
    length = torch.linalg.vector_norm(flat_g, dim=1)
    # What the tolerance leaves, and what rounding J to the dtype does to u.
    rounding = (
        30 * eps * (1.0 + torch.linalg.matrix_norm(matrix)) * torch.linalg.vector_norm(u, dim=1)
    )
    allowed = 1.01 * conditioning * (rtol * length + rounding) + 1e-14 * length
    error = torch.linalg.vector_norm(found[0].double() - wanted, dim=1)
    claimed = usable & (report.status == Status.SUCCESS) & (conditioning < 1e-2 / eps)
    assert bool((error <= allowed)[claimed].all()), (error, allowed)

    # The report of the backward solve is true, too, whatever its status.
    known = torch.isfinite(report.residual) & torch.isfinite(report.u).all(1) & usable
    recorded = rows(Layout.of(laid_out(live.z0, layout)).unpack(report.u)).double()
    true = rms((matrix.mT @ recorded.unsqueeze(2)).squeeze(2) + flat_g - recorded)
    size = rms(recorded) * (1.0 + torch.linalg.matrix_norm(matrix)) + rms(flat_g)
    drift = (report.residual.double() - true).abs()
    assert bool((drift <= 1e-3 * true + 1e2 * eps * size)[known].all()), (drift, true)


@in_parts
def test_implicit_gradients(part: str) -> None:
    draw_and_check(
        "implicit",
        part,
        check_implicit,
        problem=problems(),
        solver=ALL_SOLVERS,
        termination=terminations(),
        layout=LAYOUTS,
        backward=st.one_of(LINEAR_SOLVERS, SMOOTH),
        rtol=st.sampled_from([1e-1, 1e-2, 1e-4, 1e-6, 1e-9]),
        backward_steps=st.integers(1, 80),
        log_scale=st.sampled_from([0, 0, -6, 4]),
    )


def check_approximate(
    problem: FixedPointProblem, solver: Solver, layout: str, adjoint: Any
) -> None:
    """OneStep, Phantom and NeumannSeries are the sums that they say, whatever the radius."""
    live = problem.differentiable()
    solution = solve_for(
        live, layout, solver=solver, termination=Residual(1e-3, 1e-3), adjoint=adjoint, max_steps=40
    )
    z = solution.z
    assume(bool(torch.isfinite(z).all()))
    g = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z.dtype)
    (found,) = torch.autograd.grad(z, live.inputs[:1], g, materialize_grads=True)
    matrix, slope = dense_jacobian(live, z)
    u, exact_here = dense_sum(adjoint, matrix, rows(g.double())), solution.converged
    if isinstance(adjoint, Phantom) and adjoint.num_steps > 1:
        # Its later steps are recorded where they lead, which is z* only if z is.
        exact_here = exact_here & (solution.residual <= 1e-7)
    growth = (1.0 + torch.linalg.matrix_norm(matrix)) ** 6
    eps = torch.finfo(z.dtype).eps
    error = torch.linalg.vector_norm(found.double() - slope * u, dim=1)
    allowed = (
        1e2 * growth * (eps + solution.residual.double()) * (1.0 + rows(g.double()).norm(dim=1))
    )
    assert bool((error <= allowed)[exact_here].all()), (error, allowed)
    assert solution.backward.result is None


def dense_sum(adjoint: Any, matrix: Tensor, g: Tensor) -> Tensor:
    def product(v: Tensor) -> Tensor:
        return (matrix.mT @ v.unsqueeze(2)).squeeze(2)

    if isinstance(adjoint, Phantom):
        term, total = adjoint.relaxation * g, torch.zeros_like(g)
        for _ in range(adjoint.num_steps):
            total = total + term
            term = (1.0 - adjoint.relaxation) * term + adjoint.relaxation * product(term)
        return total
    total = term = g
    for _ in range(adjoint.num_terms if isinstance(adjoint, NeumannSeries) else 0):
        term = product(term)
        if adjoint.clip is not None:
            longest = adjoint.clip * torch.linalg.vector_norm(g, dim=1, keepdim=True)
            length = torch.linalg.vector_norm(term, dim=1, keepdim=True)
            term = torch.where(length > longest, term * longest / length, term)
        total = total + term
    return total


@in_parts
def test_approximate_gradients(part: str) -> None:
    draw_and_check(
        "approximate",
        part,
        check_approximate,
        problem=problems(),
        solver=ALL_SOLVERS,
        layout=LAYOUTS,
        adjoint=st.one_of(
            st.just(OneStep()),
            st.builds(Phantom, num_steps=st.integers(1, 5), relaxation=st.floats(0.1, 1.0)),
            st.builds(
                NeumannSeries,
                num_terms=st.integers(1, 5),
                clip=st.sampled_from([None, None, 0.5, 2.0]),
            ),
        ),
    )


def check_shine(
    problem: FixedPointProblem, solver: Solver, layout: str, adjoint: Shine, log_scale: int
) -> None:
    """Never too long nor NaN; refined, as near to the exact gradient as the report says."""
    live = problem.differentiable()
    solution = solve_for(
        live, layout, solver=solver, termination=Residual(1e-3, 1e-3), adjoint=adjoint, max_steps=40
    )
    z = solution.z
    assume(bool(torch.isfinite(z).all()))
    g = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z.dtype)
    g = g * 10.0**log_scale
    (found,) = torch.autograd.grad(z, live.inputs[:1], g, materialize_grads=True)
    assert bool(torch.isfinite(found).all())
    matrix, slope = dense_jacobian(live, z)
    flat_g, eps = rows(g.double()), torch.finfo(z.dtype).eps
    length = flat_g.norm(dim=1)
    if not adjoint.refinement:
        assert solution.backward.result is None
        longest = slope.abs().amax(1) * length * max(adjoint.max_ratio, 1.0)
        assert not adjoint.fallback or bool((found.double().norm(dim=1) <= 1.001 * longest).all())
        return
    report = solution.backward.result
    assert report is not None
    system = torch.eye(matrix.shape[1], dtype=torch.float64) - matrix.mT
    conditioning = 1.0 / torch.linalg.svdvals(system)[:, -1]
    u = torch.linalg.solve_ex(system, flat_g)[0]
    left = report.relative_residual.double() * length
    # H^T, which is applied to the solution found, rounds at its own size.
    rounding = 1e3 * eps * (1.0 + conditioning * torch.linalg.matrix_norm(system)) ** 2 * length
    error = (found.double() - slope * u).norm(dim=1)
    known = (report.relative_residual < 0.99) & (conditioning < 1e-2 / eps)
    allowed = 1.01 * conditioning * left + rounding
    assert bool((error <= allowed)[known].all()), (error, allowed)


@in_parts
def test_shared_estimates(part: str) -> None:
    draw_and_check(
        "shine",
        part,
        check_shine,
        problem=problems(),
        solver=st.builds(
            Broyden,
            history_size=st.sampled_from([None, 1, 3, 20]),
            relaxation=RELAXATIONS,
            kind=st.sampled_from(["good", "good", "bad"]),
            line_search=st.booleans(),
        ),
        layout=LAYOUTS,
        adjoint=st.builds(
            Shine,
            refinement=st.sampled_from([0, 0, 1, 5, 40]),
            fallback=st.booleans(),
            max_ratio=st.sampled_from([0.5, 1.3, 5.0]),
        ),
        log_scale=st.sampled_from([0, 0, -6, 4]),
    )


def check_unrolled(
    problem: FixedPointProblem,
    method: tuple[Solver, Unrolled | ReversibleAdjoint],
    layout: str,
    num_steps: int,
) -> None:
    """Against a difference quotient of the very steps that were made."""
    solver, adjoint = method

    def run(shift: Tensor) -> Solution:
        return solve(
            lambda z: problem.map(z, shift, problem.inputs[1]),
            laid_out(problem.z0 + 0.1, layout if layout != "expanded" else "plain"),
            solver=solver,
            adjoint=adjoint,
            termination=FixedSteps(num_steps),
            max_steps=num_steps,
            keep="last",
            on_failure="ignore",
        )

    shift = problem.inputs[0]
    draw = torch.Generator().manual_seed(2)
    direction = torch.randn(shift.shape, dtype=torch.float64, generator=draw)
    live = shift.clone().requires_grad_()
    solution = run(live)
    z = solution.z
    assume(z.numel() > 0)
    g = torch.randn(z.shape, dtype=torch.float64, generator=draw)
    (found,) = torch.autograd.grad(z, live, g, materialize_grads=True)

    def quotient(step: float) -> Tensor:
        with torch.no_grad():
            change = run(shift + step * direction).z - run(shift - step * direction).z
        return rows(change * g).sum(1) / (2.0 * step)

    coarse, fine = quotient(2e-5), quotient(1e-5)
    # Where the quotient itself does not settle, the steps are not smooth there: nothing to check.
    settled = (coarse - fine).abs() <= 1e-5 * (1.0 + fine.abs())
    error = (rows(found * direction).sum(1) - fine).abs()
    report = solution.backward.result
    if report is not None:  # of a way back, which may say that it was lost
        settled &= report.status == Status.SUCCESS
    assert bool((error <= 1e-3 * (1.0 + fine.abs()))[settled].all()), (error, fine)


@in_parts
def test_unrolled_gradients(part: str) -> None:
    draw_and_check(
        "unrolled",
        part,
        check_unrolled,
        problem=problems((torch.float64,)),
        method=st.one_of(
            st.tuples(SMOOTH, st.builds(Unrolled, checkpoint=st.booleans())),
            st.tuples(
                st.builds(Reversible, relaxation=st.floats(0.1, 0.6)), st.just(ReversibleAdjoint())
            ),
        ),
        layout=LAYOUTS,
        num_steps=st.integers(1, 7),
    )


# --- linear systems ----------------------------------------------------------------------------


def check_linear(
    problem: FixedPointProblem, backward: Any, rtol: float, atol: float, max_steps: int, trace: bool
) -> None:
    dtype = problem.z0.dtype
    matrix = problem.inputs[1]
    draw = torch.Generator().manual_seed(3)
    b = torch.randn(matrix.shape[:2], dtype=torch.float64, generator=draw).to(dtype)
    given_b = b.clone()
    a = Recorder(lambda u: (matrix * u.unsqueeze(1)).sum(2))
    with torch.no_grad():
        result = backward.solve(a, b, rtol=rtol, atol=atol, max_steps=max_steps, trace=trace)
    assert torch.equal(b, given_b)
    assert a.images_untouched
    assert result.num_evals == a.num_calls
    assert bool((result.num_steps <= max_steps).all())
    assert (result.trace is not None) == trace
    exact = matrix.double()
    u = result.u.double()
    true = rms((exact @ u.unsqueeze(2)).squeeze(2) + b.double() - u)
    eps = torch.finfo(dtype).eps
    size = (1.0 + torch.linalg.matrix_norm(exact)) * rms(u) + rms(b)
    known = torch.isfinite(result.residual) & torch.isfinite(true)
    drift = (result.residual.double() - true).abs()
    assert bool((drift <= 1e-3 * true + 1e2 * eps * size)[known].all()), (drift, true)
    solved = result.status == Status.SUCCESS
    limit = atol + rtol * rms(b)
    assert bool((true <= 1.01 * limit + 1e2 * eps * size)[solved].all()), (true, limit)


@in_parts
def test_linear_systems(part: str) -> None:
    draw_and_check(
        "linear",
        part,
        check_linear,
        problem=problems(),
        backward=LINEAR_SOLVERS,
        rtol=st.sampled_from([1e-1, 1e-3, 1e-6, 1e-10, 1e-13]),
        atol=st.sampled_from([0.0, 0.0, 1e-3]),
        max_steps=st.integers(1, 80),
        trace=st.booleans(),
    )


# --- trees -------------------------------------------------------------------------------------


def check_trees(
    solver: Solver,
    batch: int,
    shapes: list[tuple[int, ...]],
    dtypes: list[torch.dtype],
    radius: float,
    case: int,
) -> None:
    """f(z) = z* + radius P (z - z*), P a permutation within each part."""
    draw = torch.Generator().manual_seed(case)
    kinds = [dtypes[i % len(dtypes)] for i in range(len(shapes))]
    z_star = [
        torch.randn(batch, *shape, dtype=torch.float64, generator=draw).to(dtype)
        for shape, dtype in zip(shapes, kinds, strict=True)
    ]
    narrow = torch.float32 in kinds
    rtol = 1e-5 if narrow else 1e-10
    num_calls = 0

    def f(z: list[Tensor]) -> list[Tensor]:
        nonlocal num_calls
        num_calls += 1
        dims = [tuple(range(1, part.dim())) for part in z]
        return [s + radius * (part - s).flip(d) for s, part, d in zip(z_star, z, dims, strict=True)]

    with torch.no_grad():
        solution = solve(
            f,
            [torch.zeros_like(part) for part in z_star],
            solver=solver,
            termination=Residual(rtol, rtol),
            max_steps=400,
            on_failure="ignore",
        )
    assert solution.num_evals == num_calls
    assert solution.status.shape == (batch,)
    solved = solution.converged
    for found, wanted, dtype in zip(solution.z, z_star, kinds, strict=True):
        assert found.dtype == dtype
        assert found.shape == wanted.shape
        # rms residual / (1 - radius) bounds the rms error of a sample over all of its parts
        error = rows((found - wanted).double()).abs().amax(1) if found.numel() else solved * 0.0
        assert bool((error <= 1e3 * rtol)[solved].all())
    if isinstance(solver, Anderson | Broyden) and solver.relaxation == 1.0:
        assert bool(solved.all()), (solution.status, solution.residual)


@in_parts
def test_any_tree_of_any_shapes(part: str) -> None:
    draw_and_check(
        "trees",
        part,
        check_trees,
        solver=ALL_SOLVERS,
        batch=st.integers(0, 4),
        shapes=st.lists(SHAPES, min_size=1, max_size=3),
        dtypes=st.lists(st.sampled_from([torch.float32, torch.float64]), min_size=1, max_size=2),
        radius=st.floats(0.0, 0.9),
        case=st.integers(0, 99),
    )
