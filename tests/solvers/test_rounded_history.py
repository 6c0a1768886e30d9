"""A history kept in bfloat16: half the memory, nearly the same steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from equilibria import (
    Anderson,
    Broyden,
    Implicit,
    Residual,
    Shine,
    Status,
    Unrolled,
    UserError,
    solve,
)
from equilibria.core import history
from equilibria.core.history import Ring, add_mixture, inner_products
from equilibria.core.iterate import Iterate

ROUNDED = [
    pytest.param(Anderson(6, history_dtype="bfloat16"), id="anderson-I"),
    pytest.param(Anderson(6, 0.7, kind="II", history_dtype="bfloat16"), id="anderson-II"),
    pytest.param(Broyden(10, history_dtype="bfloat16"), id="broyden"),
    pytest.param(Broyden(10, kind="bad", history_dtype="bfloat16"), id="broyden-bad"),
]
rounded = pytest.mark.parametrize("solver", ROUNDED)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["single", "double"])
def tanh(request):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 30, generator=draw, dtype=request.param) * 0.15
    x = torch.randn(5, 30, generator=draw, dtype=request.param)
    return lambda z: torch.tanh(z @ weight + x), torch.zeros_like(x)


@rounded
def test_the_fixed_point_is_as_exact_as_the_state(solver, tanh):
    f, z0 = tanh
    rtol = 1e-5 if z0.dtype == torch.float32 else 1e-10
    solution = solve(f, z0, solver=solver, termination=Residual(rtol), max_steps=80)
    assert (solution.status == Status.SUCCESS).all()
    assert solution.z.dtype == z0.dtype
    off = (f(solution.z) - solution.z).norm(dim=1) / solution.z.norm(dim=1)
    assert (off <= 1.1 * rtol).all()


@rounded
def test_the_history_takes_half_the_memory(solver, tanh):
    f, z0 = tanh
    state = solver.init(Iterate(z0, f(z0)), 20)
    rings = [value for value in vars(state).values() if isinstance(value, Ring)]
    assert len(rings) == 2
    assert all(ring.buffer.dtype == torch.bfloat16 for ring in rings)


def gradient(f, z0, solver, adjoint):
    """Of a loss with respect to a factor of f."""
    scale = torch.ones((), dtype=z0.dtype, requires_grad=True)
    solution = solve(
        lambda z: scale * f(z), z0, solver=solver, termination=Residual(1e-5), adjoint=adjoint
    )
    return torch.autograd.grad(solution.z.square().sum(), scale)[0].item()


@rounded
def test_backward_solves_can_have_it(solver, tanh):
    exact = gradient(*tanh, Anderson(), Implicit())
    assert gradient(*tanh, solver, Implicit(solver)) == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_the_estimate_of_the_inverse_is_nearly_the_same(kind, tanh):
    plain = Broyden(10, kind=kind)
    wanted = gradient(*tanh, plain, Shine())
    assert gradient(*tanh, replace(plain, history_dtype="bfloat16"), Shine()) == pytest.approx(
        wanted, rel=2e-2
    )


@rounded
def test_it_can_be_unrolled(solver, tanh):
    exact = gradient(*tanh, Anderson(), Implicit())
    assert gradient(*tanh, solver, Unrolled()) == pytest.approx(exact, rel=1e-2)


def test_an_unknown_precision_is_refused():
    with pytest.raises(UserError, match=r"history_dtype='bfloat'.*did you mean 'bfloat16'"):
        Anderson(history_dtype="bfloat")
    with pytest.raises(UserError, match="history_dtype='float16'"):
        Broyden(history_dtype="float16")


def test_compiled_steps_on_the_cpu_do_not_know_it(tanh):
    f, z0 = tanh
    solver = Anderson(fused=True, history_dtype="bfloat16")
    with pytest.raises(UserError, match="no steps for torch.bfloat16 on cpu"), torch.no_grad():
        solve(f, z0, solver=solver)


@pytest.mark.parametrize("part", [1, 7, 10**6])
def test_parts_make_no_difference(part, monkeypatch):
    monkeypatch.setattr(history, "PART", part)
    x = torch.randn(3, 20)
    vectors = torch.randn(3, 4, 20).to(torch.bfloat16)
    weights = torch.randn(3, 1, 4)
    torch.testing.assert_close(
        inner_products(x, vectors), torch.einsum("bd,bnd->bn", x, vectors.float())
    )
    torch.testing.assert_close(
        add_mixture(x, weights, vectors, alpha=-2.0),
        x - 2.0 * torch.einsum("bn,bnd->bd", weights[:, 0], vectors.float()),
    )


def test_what_is_multiplied_is_what_is_kept():
    ring = Ring(torch.zeros(2, 6), 3, torch.bfloat16)
    new, old = torch.randn(2, 2, 6)
    kept = ring.push_difference(new, old)
    assert kept.dtype == torch.float32
    assert torch.equal(kept, (new - old).to(torch.bfloat16).float())
    assert torch.equal(ring.vectors[:, 0].float(), kept)
