"""The compiled steps for the CPU against the plain operations that they replace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equilibria import GMRES, Anderson, Broyden, Implicit, Residual, Solver, UserError, solve
from equilibria.core.fused import kernels
from equilibria.core.iterate import Iterate, Limits, Measurement, measure
from equilibria.core.linear import LinearResult

pytest.importorskip("numba")

ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-3}
"""How far one step may be off, relative to its length; small systems magnify rounding."""


def sine(batch: int, width: int, dtype: torch.dtype) -> Any:
    """A map whose samples and components converge at different speeds."""
    rates = torch.linspace(-0.9, 0.9, width, dtype=dtype)
    draw = torch.Generator().manual_seed(batch + width)
    x = torch.randn(batch, width, dtype=dtype, generator=draw)
    return lambda z: torch.sin(rates * z + x) + 0.3 * torch.roll(z, 1, 1).cos()


def steps_side_by_side(
    plain: Solver,
    fused: Solver,
    f: Any,
    z0: Tensor,
    num_steps: int,
    rounding: float | None = None,
    resting_from: int | None = None,
) -> None:
    """Give both the same points; what they propose must agree after every step.

    The first sample rests from a step on, as the loop makes finished samples do.
    """
    rounding = rounding or ROUNDING[z0.dtype]
    with torch.no_grad():
        here = Iterate(z0, f(z0))
        states = [solver.init(here, num_steps + 1) for solver in (plain, fused)]
        assert states[0].fused is None
        assert states[1].fused is not None
        for step in range(num_steps):
            wanted, found = (
                solver.propose(here, state)[0]  # type: ignore[attr-defined]
                for solver, state in zip((plain, fused), states, strict=True)
            )
            length = torch.linalg.vector_norm(wanted - here.z, dim=1)
            off = torch.linalg.vector_norm(found - wanted, dim=1)
            assert bool((off <= rounding * length + 1e-12).all()), (off, length)
            if resting_from is not None and step >= resting_from:
                wanted = torch.cat((here.z[:1], wanted[1:]))
            here = Iterate(wanted, f(wanted))


SHAPES = st.sampled_from([(1, 1), (1, 7), (3, 40), (2, 2048), (2, 5000), (33, 128)])
DTYPES = st.sampled_from([torch.float32, torch.float64])
RELAXATIONS = st.sampled_from([1.0, 0.7])


@settings(max_examples=40)
@given(SHAPES, DTYPES, st.integers(1, 5), st.sampled_from(["I", "II"]), RELAXATIONS)
def test_anderson(shape, dtype, history_size, kind, relaxation):
    options = {"history_size": history_size, "kind": kind, "relaxation": relaxation}
    plain, fused = Anderson(**options, fused=False), Anderson(**options, fused=True)
    f = sine(*shape, dtype)
    # beyond the ring's size, so that slots are used again
    steps_side_by_side(plain, fused, f, torch.zeros(shape, dtype=dtype), min(shape[1], 8))


@settings(max_examples=40)
@given(SHAPES, DTYPES, st.integers(1, 5), st.sampled_from(["good", "bad"]), RELAXATIONS)
def test_broyden(shape, dtype, history_size, kind, relaxation):
    options = {"history_size": history_size, "kind": kind, "relaxation": relaxation}
    plain, fused = Broyden(**options, fused=False), Broyden(**options, fused=True)
    f = sine(*shape, dtype)
    steps_side_by_side(plain, fused, f, torch.zeros(shape, dtype=dtype), min(shape[1], 8))


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("min_angle", [0.0, 0.01, 0.5])
def test_anderson_leaves_out_what_newer_differences_span(kind, min_angle):
    """More differences than dimensions: which ones count goes by age, around the ring."""
    options = {"history_size": 4, "kind": kind, "min_angle": min_angle, "ridge": 1e-3}
    plain, fused = Anderson(**options, fused=False), Anderson(**options, fused=True)
    rates = torch.tensor([[0.9, -0.8, 0.7]], dtype=torch.float64)
    x = torch.randn(9, 3, dtype=torch.float64)
    f = lambda z: torch.sin(rates * z.roll(1, 1) + x)  # noqa: E731
    # systems that are nearly singular magnify rounding further
    steps_side_by_side(plain, fused, f, torch.zeros_like(x), 7, rounding=1e-6)


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_broyden_with_room_for_every_pair(kind):
    plain, fused = (Broyden(None, kind=kind, fused=fused) for fused in (False, True))
    f = sine(5, 90, torch.float64)
    steps_side_by_side(plain, fused, f, torch.zeros(5, 90, dtype=torch.float64), 30)


@pytest.mark.parametrize("kind", ["good", "bad"])
@pytest.mark.parametrize("history_size", [3, 20])
def test_broyden_with_a_sample_that_rests(kind, history_size):
    plain, fused = (Broyden(history_size, kind=kind, fused=fused) for fused in (False, True))
    f, z0 = sine(3, 40, torch.float64), torch.zeros(3, 40, dtype=torch.float64)
    steps_side_by_side(plain, fused, f, z0, 9, resting_from=4)


@pytest.mark.parametrize("solver", [Anderson(3), Anderson(3, kind="II"), Broyden(3)], ids=repr)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_broken_sample_does_not_touch_the_others(solver, bad):
    def f(z: Tensor) -> Tensor:
        image = torch.cos(z) * 0.8
        return torch.where(torch.arange(3).unsqueeze(1) == 1, bad, image) if broken else image

    broken = False
    alone = solve(f, torch.zeros(3, 50), solver=solver, on_failure="ignore")
    broken = True
    found = solve(f, torch.zeros(3, 50), solver=solver, on_failure="ignore")
    assert found.status.tolist() == [0, 4, 0]
    assert torch.equal(found.z[[0, 2]], alone.z[[0, 2]])


@pytest.mark.parametrize("solver", [Anderson(3), Anderson(3, kind="II"), Broyden(3)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_gives_the_same_bits_whatever_it_is_batched_with(solver, dtype):
    f, z0 = sine(6, 3000, dtype), torch.zeros(6, 3000, dtype=dtype)

    def alone(z: Tensor) -> Tensor:
        return f(z.expand(6, -1))[2:3]

    together = solve(f, z0, solver=solver, termination=Residual(1e-5), on_failure="ignore")
    single = solve(alone, z0[:1], solver=solver, termination=Residual(1e-5), on_failure="ignore")
    assert torch.equal(together.z[2], single.z[0])


def test_threads_change_no_bit():
    f, z0 = sine(4, 60_000, torch.float32), torch.zeros(4, 60_000)
    found: list[Tensor] = []
    threads = torch.get_num_threads()
    for number in (1, 2):
        try:
            torch.set_num_threads(number)
            found += [
                solve(f, z0, solver=solver, max_steps=8, on_failure="ignore").z
                for solver in (Anderson(4), Broyden(4))
            ]
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("restart", [4, 100])
def test_gmres(dtype, restart):
    draw = torch.Generator().manual_seed(0)
    matrices = torch.randn(5, 30, 30, dtype=dtype, generator=draw) / 30**0.5
    matrices[1] = 0.0  # the space is exhausted after one vector
    b = torch.randn(5, 30, dtype=dtype, generator=draw)
    b[2] = torch.nan
    plain, fused = (run_gmres(GMRES(restart, fused=fused), matrices, b) for fused in (False, True))
    assert torch.equal(plain.status, fused.status)
    near = plain.num_steps - fused.num_steps
    assert bool((near.abs() <= 1).all())
    good = plain.status == 0
    torch.testing.assert_close(fused.u[good], plain.u[good], rtol=1e-3, atol=1e-4)


def run_gmres(solver: GMRES, matrices: Tensor, b: Tensor) -> LinearResult:
    with torch.no_grad():
        return solver.solve(
            lambda u: torch.bmm(matrices, u.unsqueeze(2)).squeeze(2) * 0.9,
            b,
            rtol=1e-5,
            atol=0.0,
            max_steps=60,
        )


@given(st.floats(1e-30, 1e30), st.sampled_from([(1, 1), (3, 40), (2, 5000), (0, 4), (2, 0)]))
def test_norms(scale, shape):
    z, fz = torch.randn(shape) * scale, torch.randn(shape) * scale
    with torch.no_grad():
        compiled = kernels("bookkeeping", z, True)
        found = measure(Iterate(z, fz), fused=compiled)
        wanted = measure(Iterate(z.double(), fz.double()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=0.0)


@given(
    st.lists(st.sampled_from([0.0, 1e-4, 0.1, 1.0, 2.0, float("nan"), float("inf")]), min_size=3)
)
def test_questions_are_answered_as_by_torch(numbers):
    values = torch.tensor(numbers)
    limits = Limits(values.flip(0).clone(), values.roll(1))
    both = [Measurement(values, values.roll(2)) for _ in range(2)]
    with torch.no_grad():
        both[0].kernels = kernels("bookkeeping", torch.zeros(1, 1), True)
    for rtol, atol in ((1e-3, 0.0), (0.0, 0.1), (0.1, 1e-4)):
        answers = [one.all_go_on(rtol, atol, limits) for one in both]
        assert answers[0] == answers[1]
    assert both[0].all_improve_on(Measurement(*limits)) == both[1].all_improve_on(
        Measurement(*limits)
    )


@given(
    st.lists(st.sampled_from([0.0, 1e-9, 1e-4, 1.0, 1e3, 1e6, 1e20]), min_size=4, max_size=4),
    st.lists(st.sampled_from([0.0, 1.0, 1e3, 1e6, 1e20]), min_size=4, max_size=4),
    st.sampled_from([1e-6, 1e-3, 0.5]),
    st.sampled_from([0.0, 1e-2]),
)
def test_the_criterion_is_judged_as_by_torch(residuals, images, rtol, atol):
    """Images that outgrow the problem, residuals that do, and both."""
    rule = Residual(rtol, atol)
    start = Measurement(torch.tensor([1.0, 1e-3, 1.0, 2.0]), torch.tensor([1.0, 1.0, 0.0, 1e3]))
    plain, fused = (Measurement(torch.tensor(residuals), torch.tensor(images)) for _ in range(2))
    with torch.no_grad():
        fused.kernels = kernels("bookkeeping", torch.zeros(1, 1), True)
    found, wanted = (rule.check(one, 3, rule.init(start)) for one in (fused, plain))
    assert (found[0] is None) == (wanted[0] is None)
    if found[0] is not None and wanted[0] is not None:
        assert torch.equal(found[0], wanted[0])
    for one, other in zip(found[1], wanted[1], strict=True):
        assert torch.equal(one, other)


def test_a_residual_beyond_its_limit_is_looked_at():
    measured = Measurement(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 1.0]))
    with torch.no_grad():
        measured.kernels = kernels("bookkeeping", torch.zeros(1, 1), True)
    assert not measured.all_go_on(1e-3, 0.0, Limits(torch.tensor([2.0, 2.0]), torch.ones(2)))
    assert measured.all_go_on(1e-3, 0.0, Limits(torch.tensor([5.0, 5.0]), torch.ones(2)))


@pytest.mark.parametrize("fused", [True, False])
def test_zero_is_no_solution_however_loose_the_tolerance(fused):
    b = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        result = GMRES(fused=fused).solve(lambda u: 0.5 * u, b, rtol=2.0, atol=0.0, max_steps=9)
    assert bool((result.u.abs().sum(1) > 0).all())
    assert result.num_steps.tolist() == [1, 1, 1]


def test_recorded_transformed_and_compiled_solves_take_the_plain_steps():
    like = torch.zeros(2, 3)
    assert kernels("anderson", like, None) is None  # gradients are recorded
    with torch.no_grad():
        assert kernels("anderson", like, None) is not None
        assert kernels("anderson", like, False) is None
        assert kernels("anderson", like.half(), None) is None
        assert torch.vmap(lambda x: x if kernels("anderson", x, None) else x + 1)(like).sum() == 6


def test_what_does_not_exist_is_refused_only_if_it_is_insisted_on():
    with torch.no_grad(), pytest.raises(UserError, match=r"float16 on cpu.*fused=None"):
        kernels("anderson", torch.zeros(2, 3, dtype=torch.float16), True)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("equilibria.core.fused._is_installed", lambda package: False)
        assert kernels("anderson", torch.zeros(2, 3), None) is None
        with pytest.raises(UserError, match=r"needs the package numba.*pip install numba"):
            kernels("anderson", torch.zeros(2, 3), True)


def test_gradients_are_the_same_fused_or_not():
    weight = torch.nn.Parameter(0.5 * torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0])
    x, found = torch.randn(5, 8, dtype=torch.float64), []
    for fused in (True, False):
        adjoint = Implicit(GMRES(fused=fused), rtol=1e-12)
        solution = solve(
            lambda z: torch.tanh(z @ weight + x), torch.zeros_like(x), solver=Anderson(fused=fused),
            termination=Residual(1e-12), adjoint=adjoint,
        )  # fmt: skip
        found.append(torch.autograd.grad(solution.z.square().sum(), weight)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)
