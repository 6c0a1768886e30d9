"""What is worth remembering, and what the memory is to copies, graphs and modes."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch

from equilibria import (
    Cached,
    Divergence,
    FixedSteps,
    Implicit,
    Picard,
    Previous,
    Random,
    Residual,
    Reversible,
    SolveSettings,
    Stagnation,
    Status,
    Unrolled,
    UserError,
    WarmStart,
    WarmStartMemory,
    registry,
    solve,
)
from equilibria.adjoints.reversible_adjoint import ReversibleAdjoint
from equilibria.terminations.any_of import AnyOf

BOTH = pytest.mark.parametrize("warm_start", [Previous(), Cached(100)], ids=["previous", "cached"])


def indexed(x):
    return {"sample_index": range(len(x))}


@BOTH
def test_a_sample_that_ran_out_of_steps_goes_on(warm_start, loop):
    """Hard samples are worked on from call to call."""
    run = loop(warm_start, solver=Picard(), max_steps=3, on_failure="ignore")
    f, z0 = lambda z: 0.5 * z + 1.0, torch.zeros(2, 1, dtype=torch.float64)
    residuals = [run(f, z0, **indexed(z0)).residual.max().item() for _ in range(3)]
    assert residuals[1] == pytest.approx(residuals[0] / 8)
    assert residuals[2] == pytest.approx(residuals[0] / 64)


@BOTH
def test_bad_ends_are_forgotten_beside_good_ones(warm_start, loop):
    """Not finite, diverged, stalled: the next call starts cold, the others warm."""
    run = loop(
        warm_start,
        solver=Picard(),
        termination=AnyOf(Residual(1e-6), Divergence(), Stagnation()),
        on_failure="ignore",
    )
    slope = torch.tensor([[0.5], [torch.nan], [9.0], [-1.0]], dtype=torch.float64)
    z0 = torch.ones(4, 1, dtype=torch.float64)
    first = run(lambda z: slope * z + 1.0, z0, **indexed(z0))
    good = [Status.SUCCESS, Status.NONFINITE, Status.DIVERGED, Status.STALLED]
    assert first.status.tolist() == good
    second = run(lambda z: slope * z + 1.0, z0, **indexed(z0))
    assert second.warm_started.tolist() == [True, False, False, False]
    assert second.status.tolist() == good


@BOTH
def test_what_was_known_before_a_bad_end_is_forgotten_too(warm_start, loop):
    run = loop(warm_start, on_failure="ignore")
    z0 = torch.ones(2, 1)
    run(torch.cos, z0, **indexed(z0))
    spoiled = torch.tensor([[1.0], [torch.nan]])
    assert run(lambda z: torch.cos(z) * spoiled, z0, **indexed(z0)).warm_started.all()
    assert run(torch.cos, z0, **indexed(z0)).warm_started.tolist() == [True, False]


@BOTH
def test_points_worse_than_zero_are_not_remembered(warm_start, loop):
    """A fixed number of steps on an expansion: it would run away from call to call."""
    run = loop(warm_start, solver=Picard(), termination=FixedSteps(5))
    z0 = torch.ones(1, 1)
    for _ in range(3):
        solution = run(lambda z: -3.0 * z, z0, **indexed(z0))
        assert not solution.warm_started.any()
        assert solution.z.abs().max() < 1e3


@BOTH
def test_also_when_the_solve_raises(warm_start, loop):
    from equilibria import ConvergenceError

    run = loop(warm_start, on_failure="raise")
    z0 = torch.ones(2, 1)
    with pytest.raises(ConvergenceError):
        run(lambda z: z * torch.tensor([[0.5], [torch.nan]]), z0, **indexed(z0))
    assert run(torch.cos, z0, **indexed(z0)).warm_started.tolist() == [True, False]


@BOTH
@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled()], ids=["implicit", "unrolled"])
def test_no_graph_is_kept_from_call_to_call(warm_start, adjoint, loop):
    """What a call closed over is gone when its solution is, without the garbage collector."""
    run = loop(warm_start, adjoint=adjoint, termination=FixedSteps(3))
    for warm in (False, True, True):
        x = torch.ones(2, 3, requires_grad=True)
        solution = run(lambda z, x=x: torch.cos(x * z), torch.ones(2, 3), **indexed(x))
        solution.z.sum().backward()
        assert bool(solution.warm_started.all()) is warm
        gone = weakref.ref(x)
        del solution, x
        assert gone() is None


def test_a_remembered_start_carries_no_gradient_and_a_cold_one_its_own(loop):
    """Unrolled passes a gradient to z0, where the solve started from it."""
    run = loop(Cached(5), adjoint=Unrolled(), solver=Picard(), termination=FixedSteps(2))
    z0 = torch.ones(2, 1, requires_grad=True)
    run(lambda z: 0.5 * z + 1.0, z0, sample_index=[0, 1])
    run(lambda z: 0.5 * z + 1.0, z0, sample_index=[1, 2]).z.sum().backward()
    assert z0.grad.flatten().tolist() == [0.0, 0.25]


def test_each_warm_start_has_its_own_memory(loop):
    run = loop(Previous())
    z0 = torch.ones(2, 1)
    run(torch.cos, z0)
    assert not run(torch.cos, z0, warm_start=Previous(on_change="raise")).warm_started.any()
    assert run(torch.cos, z0).warm_started.all()
    assert "forward: Previous(on_change='cold')" in repr(run.memory)


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda memory: pickle.loads(pickle.dumps(memory))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_are_empty(duplicate, loop):
    """The states of a whole data set are no part of a model."""
    run = loop(Previous())
    run(torch.cos, torch.ones(2, 1))
    twin = duplicate(run.memory)
    assert repr(twin) == "WarmStartMemory()"
    assert run(torch.cos, torch.ones(2, 1)).warm_started.all()


@BOTH
def test_what_inference_mode_saw_is_good_for_training(warm_start, loop):
    run = loop(warm_start, adjoint=Unrolled(), termination=FixedSteps(20))
    weight, z0 = torch.tensor(0.5, requires_grad=True), torch.ones(2, 1)
    f = lambda z: torch.cos(weight * z)  # noqa: E731
    with torch.inference_mode():
        run(f, z0, **indexed(z0))
        assert run(f, z0, **indexed(z0)).warm_started.all()
    solution = run(f, z0, **indexed(z0))
    assert solution.warm_started.all()
    solution.z.sum().backward()
    assert torch.isfinite(weight.grad)


def test_under_transforms_nothing_is_recalled_or_remembered(loop):
    run = loop(Previous())
    z0 = torch.ones(2, 1, dtype=torch.float64)
    run(torch.cos, z0)
    gradient = torch.func.grad(lambda w: run(lambda z: torch.cos(w * z), z0).z.sum())
    assert torch.isfinite(gradient(torch.tensor(0.5, dtype=torch.float64)))
    assert not run(torch.cos, z0).num_steps.any()


@pytest.mark.parametrize("warm_start", [Previous(), Cached(3), Random(seed=1)], ids=repr)
def test_without_a_place_to_remember(warm_start):
    with pytest.raises(UserError, match=r"no place to remember .*memory = WarmStartMemory\(\)"):
        solve(torch.cos, torch.ones(2, 1), warm_start=warm_start, sample_index=[0, 1])


@pytest.mark.parametrize("warm_start", [Previous, "previous"])
def test_something_else_than_a_warm_start(warm_start):
    with pytest.raises(UserError, match=r"is no WarmStart.*warm_start=Previous\(\)"):
        solve(torch.cos, torch.ones(2, 1), warm_start=warm_start)


@BOTH
@pytest.mark.parametrize("adjoint", [Unrolled(), ReversibleAdjoint()], ids=repr)
def test_a_gradient_through_steps_that_are_saved(warm_start, adjoint):
    """A start at the solution leaves no step, so no gradient."""
    with pytest.raises(UserError, match=r"leaves few or none .*Implicit\(\).*FixedSteps\(k\)"):
        SolveSettings(Reversible(), adjoint=adjoint, warm_start=warm_start)
    SolveSettings(Reversible(), FixedSteps(5), adjoint, warm_start=warm_start)
    SolveSettings(Reversible(), adjoint=adjoint, warm_start=Random())


class Broken(WarmStart):
    """Says nonsense."""

    def start(self, samples, memory):
        rows = torch.full_like(samples.like, 0.5)
        rows[0] = torch.nan
        return rows, torch.ones(len(rows), dtype=torch.bool)


def test_nonsense_of_somebody_elses_warm_start_is_left_out():
    solution = solve(torch.cos, torch.ones(3, 1), warm_start=Broken())
    assert solution.warm_started.tolist() == [False, True, True]
    assert solution.converged.all()


@pytest.mark.parametrize(
    "warm_start",
    [Previous(), Cached(7, dtype=torch.bfloat16), Random(0.5, 0.5, 3)],
    ids=lambda warm_start: type(warm_start).__name__,
)
def test_warm_starts_are_values_with_names(warm_start):
    assert pickle.loads(pickle.dumps(warm_start)) == warm_start
    assert hash(copy.deepcopy(warm_start)) == hash(warm_start)
    text = registry.describe(warm_start)
    assert registry.parse(WarmStart, text) == warm_start


def test_the_remembered_point_is_the_returned_one():
    seen = []

    class Spy(Previous):
        def remember(self, rows, good, samples, memory):
            seen.append(rows)

    solution = solve(torch.cos, torch.ones(2, 1), warm_start=Spy(), memory=WarmStartMemory())
    assert torch.equal(seen[0], solution.z)
    assert not seen[0].requires_grad
