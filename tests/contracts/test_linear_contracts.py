"""What every solver of the backward system u = a(u) + b must do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from equilibria import (
    GMRES,
    Anderson,
    BiCGStab,
    Broyden,
    FixedPoint,
    LinearResult,
    LinearSolver,
    Neumann,
    Picard,
    Status,
    UserError,
)

PICARD, NEUMANN, RESTARTED = FixedPoint(Picard()), Neumann(), GMRES(restart=5)
SOLVERS = [
    PICARD,
    NEUMANN,
    FixedPoint(Anderson()),
    FixedPoint(Broyden()),
    GMRES(),
    RESTARTED,
    BiCGStab(),
]
MATRICES = ["contraction", "non-normal", "expansive", "nilpotent", "zero"]
# The Neumann series diverges; five vectors are too few for a six-dimensional non-normal system.
BEYOND = [(PICARD, "expansive"), (NEUMANN, "expansive"), (RESTARTED, "non-normal")]
BATCH, WIDTH = 4, 6


def matrices(name: str) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(
        torch.randn(BATCH, WIDTH, WIDTH, dtype=torch.float64, generator=draw)
    )[0]
    triangle = torch.triu(torch.randn(BATCH, WIDTH, WIDTH, dtype=torch.float64, generator=draw), 1)
    radius = torch.tensor([0.1, 0.5, 0.8, 0.9], dtype=torch.float64).view(BATCH, 1, 1)
    spread = torch.tensor([-3.0, -1.5, -0.5, 0.2, 0.6, 2.0], dtype=torch.float64)
    return {
        "contraction": radius * rotation,
        "non-normal": rotation @ (2 * triangle + 0.5 * torch.eye(WIDTH)) @ rotation.mT,
        "expansive": rotation @ torch.diag(spread) @ rotation.mT,
        "nilpotent": triangle,
        "zero": torch.zeros(BATCH, WIDTH, WIDTH, dtype=torch.float64),
    }[name]


class Product:
    """u -> A u, counting calls; gives NaN for one sample from a call on if asked to."""

    def __init__(self, matrix: Tensor, *, spoil: int | None = None, from_call: int = 0) -> None:
        self.matrix, self.spoil, self.from_call, self.num_calls = matrix, spoil, from_call, 0

    def __call__(self, u: Tensor) -> Tensor:
        product = (self.matrix * u.unsqueeze(1)).sum(2)
        if self.spoil is not None and self.num_calls >= self.from_call:
            product[self.spoil] = torch.nan
        self.num_calls += 1
        return product


def rms(x: Tensor) -> Tensor:
    return x.square().mean(1).sqrt()


@pytest.fixture
def b() -> Tensor:
    return torch.randn(BATCH, WIDTH, dtype=torch.float64)


@pytest.fixture(params=SOLVERS, ids=repr)
def solver(request: pytest.FixtureRequest) -> LinearSolver:
    return request.param


@pytest.fixture
def run(solver: LinearSolver) -> Callable[..., LinearResult]:
    def solve(a: Callable[[Tensor], Tensor], b: Tensor, **overrides: object) -> LinearResult:
        settings = {"rtol": 1e-11, "atol": 0.0, "max_steps": 300} | overrides
        return solver.solve(a, b, **settings)  # type: ignore[arg-type]

    return solve


@pytest.mark.parametrize("name", MATRICES)
def test_solves_the_system_and_reports_honestly(name, solver, run, b):
    matrix = matrices(name)
    a, given = Product(matrix), b.clone()
    result = run(a, b)
    assert torch.equal(b, given)
    assert result.num_evals == a.num_calls
    true_residual = rms(Product(matrix)(result.u) + b - result.u)
    torch.testing.assert_close(result.residual, true_residual, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(
        result.relative_residual, result.residual / rms(b), rtol=1e-12, atol=0.0
    )
    solved = result.status == Status.SUCCESS
    assert bool((true_residual <= 1e-11 * rms(b) + 1e-12)[solved].all())
    assert bool(solved.all()) == ((solver, name) not in BEYOND)
    wanted = torch.linalg.solve(torch.eye(WIDTH, dtype=torch.float64) - matrix, b)
    torch.testing.assert_close(result.u[solved], wanted[solved], rtol=1e-8, atol=1e-8)


def test_the_residual_is_honest_where_float32_cannot_reach_the_tolerance(run, b):
    matrix = matrices("contraction")
    result = run(Product(matrix.float()), b.float(), rtol=1e-12, max_steps=60)
    true_residual = rms(Product(matrix)(result.u.double()) + b.float().double() - result.u.double())
    assert bool(((result.residual - true_residual).abs() < 1e-6 * rms(b)).all())


def test_a_sample_does_not_depend_on_its_batch(run, b):
    matrix = matrices("contraction")
    together = run(Product(matrix), b)
    for row in range(BATCH):
        alone = run(Product(matrix[row : row + 1]), b[row : row + 1])
        assert torch.equal(alone.num_steps, together.num_steps[row : row + 1])
        torch.testing.assert_close(alone.u, together.u[row : row + 1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("from_call", [0, 3])
def test_a_nan_stays_in_its_sample(from_call, run, b):
    matrix = matrices("contraction")
    clean = run(Product(matrix), b)
    spoilt = run(Product(matrix, spoil=2, from_call=from_call), b)
    others = [0, 1, 3]
    assert torch.equal(spoilt.u[others], clean.u[others])
    assert torch.equal(spoilt.status[others], clean.status[others])
    assert spoilt.status[2] == Status.NONFINITE
    assert bool(torch.isfinite(spoilt.u).all())
    assert bool(spoilt.u[2].any())  # a silent gradient of zero would be the worst answer


def test_the_scale_of_b_changes_nothing(run, b):
    matrix = matrices("contraction")
    plain = run(Product(matrix), b, rtol=1e-5)
    scaled = run(Product(matrix), 2.0**-40 * b, rtol=1e-5)
    assert torch.equal(scaled.u, 2.0**-40 * plain.u)
    assert torch.equal(scaled.num_steps, plain.num_steps)


def test_nothing_to_solve(run, b):
    zero = b.clone()
    zero[1] = 0.0
    result = run(Product(matrices("contraction")), zero)
    assert result.status.tolist() == [Status.SUCCESS] * BATCH
    assert not bool(result.u[1].any())
    assert result.num_steps[1] == 0
    empty = run(Product(matrices("zero")[:0]), b[:0])
    assert empty.u.shape == (0, WIDTH)
    assert empty.status.shape == (0,)


def test_the_absolute_tolerance_counts(run, b):
    result = run(Product(matrices("contraction")), b, rtol=0.0, atol=0.1)
    assert bool((result.residual <= 0.1).all())
    tighter = run(Product(matrices("contraction")), b, rtol=0.0, atol=1e-6)
    assert bool((result.num_steps < tighter.num_steps).any())


@pytest.mark.parametrize("max_steps", [1, 3])
def test_the_step_limit_is_kept_and_reported(max_steps, solver, run, b):
    a = Product(matrices("contraction"))
    products = 2 if isinstance(solver, BiCGStab) else 1  # per step of the trace
    made = max_steps - max_steps % products
    result = run(a, b, max_steps=max_steps, trace=True)
    assert result.status.tolist() == [Status.MAX_STEPS] * BATCH
    assert result.num_steps.tolist() == [made] * BATCH
    assert a.num_calls <= max_steps + 1
    assert result.trace.shape == (made // products + 1, BATCH)
    torch.testing.assert_close(
        result.residual, rms(a(result.u) + b - result.u), rtol=1e-10, atol=0.0
    )


def test_a_singular_system_is_no_success(run, b):
    """I - A with a zero eigenvalue: u grows without bound, which a residual over u would hide."""
    matrix = torch.diag_embed(torch.tensor([1.0, 0.5, 0.2, 0.0, 0.1, 0.3]).double())
    result = run(Product(matrix.expand(BATCH, WIDTH, WIDTH)), b, rtol=1e-4)
    assert not bool((result.status == Status.SUCCESS).any())
    assert bool(torch.isfinite(result.u).all())


def test_no_method_needs_fewer_products_than_gmres(b):
    for name in MATRICES:
        counts = []
        for solver in [GMRES(), *SOLVERS]:
            a = Product(matrices(name))
            solver.solve(a, b, rtol=1e-8, atol=0.0, max_steps=300)
            counts.append(a.num_calls)
        assert counts[0] == min(counts) <= WIDTH + 1


def test_bad_arguments():
    with pytest.raises(UserError, match="restart=0"):
        GMRES(restart=0)
