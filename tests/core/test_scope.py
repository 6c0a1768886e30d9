"""Values made once per solve: the same in every evaluation, gone with the solution."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equilibria import (
    DEQ,
    Adjoint,
    Cell,
    FixedSteps,
    Implicit,
    OneStep,
    Phantom,
    Picard,
    Residual,
    SolveScope,
    Unrolled,
    once,
    solve,
    solve_scope,
)
from equilibria.testing import implicit_gradients


class Noisy(nn.Module):
    """Adds noise that is drawn once per solve, and counts the draws."""

    def __init__(self) -> None:
        super().__init__()
        self.num_draws = 0
        self.last: Tensor | None = None

    def forward(self, z: Tensor) -> Tensor:
        self.last = once(self, lambda: self._draw(z))
        return z + self.last

    def _draw(self, z: Tensor) -> Tensor:
        self.num_draws += 1
        return torch.randn_like(z)


class NoisyCell(Cell):
    """tanh(W (z + noise) + x) with W made from a parameter once per solve."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.raw = nn.Parameter(0.4 * torch.randn(width, width, dtype=torch.float64))
        self.noise = Noisy()
        self.num_weights = 0

    def inject(self, x: Tensor) -> Tensor:
        return x

    def initial_state(self, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        weight = once((self, "weight"), self._weight)
        return torch.tanh(self.noise(z) @ weight.mT + injection)

    def _weight(self) -> Tensor:
        self.num_weights += 1
        return self.raw * 0.5


def test_outside_of_a_solve_every_call_makes_its_own() -> None:
    assert once("key", object) is not once("key", object)


def test_inside_a_scope_the_first_one_is_kept() -> None:
    with solve_scope() as scope:
        first = once("key", object)
        assert once("key", object) is first
        assert once("other", object) is not first
        with solve_scope() as inner:
            assert inner is scope
    assert once("key", object) is not first
    with scope.active():
        assert once("key", object) is first


def test_the_scope_ends_with_an_error_too() -> None:
    with pytest.raises(KeyError), solve_scope():
        raise KeyError
    assert once("key", object) is not once("key", object)


def test_threads_have_their_own() -> None:
    found: list[object] = []
    with solve_scope():
        mine = once("key", object)
        thread = threading.Thread(target=lambda: found.append(once("key", object)))
        thread.start()
        thread.join()
    assert found[0] is not mine


ADJOINTS: list[Adjoint] = [
    Implicit(rtol=1e-10),
    OneStep(),
    Phantom(),
    Unrolled(),
    Unrolled(checkpoint=True),
]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_one_draw_per_solve_and_gradients_for_what_was_made(adjoint: Adjoint) -> None:
    cell = NoisyCell()
    layer = DEQ(cell, adjoint=adjoint, termination=Residual(1e-12, 1e-12), max_steps=200)
    solution = layer(torch.randn(3, 4, dtype=torch.float64))
    solution.z.sum().backward()
    assert (cell.noise.num_draws, cell.num_weights) == (1, 1)
    assert cell.raw.grad is not None
    assert cell.raw.grad.abs().sum() > 0
    layer(torch.randn(3, 4, dtype=torch.float64))
    assert (cell.noise.num_draws, cell.num_weights) == (2, 2)


@pytest.mark.parametrize("adjoint", [ADJOINTS[0], *ADJOINTS[3:]], ids=repr)
def test_gradients_are_those_of_the_function_that_was_solved(adjoint: Adjoint) -> None:
    cell = NoisyCell()
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 4, dtype=torch.float64)
    layer = DEQ(cell, adjoint=adjoint, termination=Residual(1e-13, 1e-13), max_steps=300)
    z = layer(x).z
    found = torch.autograd.grad(z, (cell.raw, x), g)
    noise = cell.noise.last
    assert noise is not None
    wanted = implicit_gradients(
        lambda z: torch.tanh((z + noise) @ (0.5 * cell.raw).mT + x), z.detach(), g, (cell.raw, x)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


def test_second_derivatives_use_the_same_draws() -> None:
    cell = NoisyCell()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    layer = DEQ(
        cell, adjoint=Implicit(rtol=1e-12), termination=Residual(1e-13, 1e-13), max_steps=300
    )
    (gradient,) = torch.autograd.grad(layer(x).z.sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert cell.noise.num_draws == 1
    assert cell.raw.grad is not None


def test_a_checkpoint_around_the_layer_draws_the_same_again() -> None:
    cell = NoisyCell()
    layer = DEQ(cell, termination=Residual(1e-12, 1e-12), adjoint=Implicit(rtol=1e-12))
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    (plain,) = torch.autograd.grad(layer(x).z.sum(), x)
    torch.manual_seed(0)
    z = checkpoint(lambda x: layer(x).z, x, use_reentrant=False)
    (again,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(plain, again)


def test_a_layer_used_twice_draws_twice() -> None:
    cell = NoisyCell()
    layer = DEQ(cell, termination=Residual(1e-10, 1e-10))
    x = torch.randn(3, 4, dtype=torch.float64)
    (layer(x).z + layer(x).z).sum().backward()
    assert cell.noise.num_draws == 2


class Outer(Cell):
    """A map with an equilibrium inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DEQ(NoisyCell(), termination=Residual(1e-13, 1e-13), max_steps=200)

    def inject(self, x: Tensor) -> Tensor:
        return x

    def initial_state(self, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return 0.5 * self.inner(z + injection).z


def test_a_layer_inside_a_map_belongs_to_the_outer_solve() -> None:
    outer = Outer()
    layer = DEQ(outer, termination=Residual(1e-9, 1e-9), max_steps=100, on_failure="raise")
    layer(torch.randn(2, 4, dtype=torch.float64)).z.sum().backward()
    inner: Any = outer.inner.cell
    assert inner.noise.num_draws == 1
    assert inner.raw.grad is not None


def test_nothing_is_left_on_modules() -> None:
    cell = NoisyCell()
    cell.noise.last = None
    layer = DEQ(cell)
    before = set(vars(cell)), set(layer.state_dict())
    solution = layer(torch.randn(3, 4, dtype=torch.float64))
    cell.noise.last = None
    assert (set(vars(cell)), set(layer.state_dict())) == before
    copy.deepcopy(layer)
    del solution


def test_values_die_with_the_graph() -> None:
    kept: list[weakref.ref[Tensor]] = []
    x = torch.randn(2, 3, requires_grad=True)

    def draw() -> Tensor:
        value = torch.rand(2, 3)
        kept.append(weakref.ref(value))
        return value

    gc.disable()
    try:
        z = solve(lambda z: 0.5 * torch.tanh(z) * once("mask", draw) + x, torch.zeros(2, 3)).z
        assert kept[0]() is not None
        z.sum().backward()
        del z
        assert kept[0]() is None
    finally:
        gc.enable()


def test_the_scope_can_be_compiled() -> None:
    weight = torch.tensor(0.5)

    def run(x: Tensor) -> Tensor:
        with solve_scope():
            z = torch.zeros_like(x)
            for _ in range(3):
                z = torch.tanh(once("weight", lambda: weight * 1.0) * z + x)
            return z

    with torch.no_grad():
        compiled = torch.compile(run, backend="eager")
        torch.testing.assert_close(compiled(torch.ones(3)), run(torch.ones(3)))


def test_plain_solve_opens_one_as_well() -> None:
    noise = Noisy()
    with torch.no_grad():
        solve(lambda z: 0.5 * torch.tanh(noise(z)), torch.zeros(2, 3))
    assert noise.num_draws == 1


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_values_are_followed_under_transforms(transform: str) -> None:
    raw = torch.tensor(0.5, dtype=torch.float64)

    def loss(raw: Tensor) -> Tensor:
        def f(z: Tensor) -> Tensor:
            return torch.tanh(once("weight", lambda: 0.8 * raw) * z + 1.0)

        z0 = torch.zeros(1, 1, dtype=torch.float64)
        return solve(
            f, z0, termination=Residual(1e-13, 1e-13), adjoint=Implicit(rtol=1e-12), max_steps=100
        ).z.sum()

    if transform == "grad":
        found = torch.func.grad(loss)(raw)
    else:
        _, found = torch.func.jvp(loss, (raw,), (torch.ones_like(raw),))
    free = raw.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(free), free)
    torch.testing.assert_close(found, wanted)
    assert wanted.abs() > 0.1


def test_unrolled_fixed_steps_see_one_mask() -> None:
    noise = Noisy()
    x = torch.randn(2, 3, requires_grad=True)
    solution = solve(
        lambda z: 0.5 * torch.tanh(noise(z)) + x,
        torch.zeros(2, 3),
        solver=Picard(),
        termination=FixedSteps(4),
        max_steps=4,
        adjoint=Unrolled(),
        on_failure="ignore",
    )
    solution.z.sum().backward()
    assert noise.num_draws == 1


def test_a_scope_can_be_left_and_entered_again() -> None:
    """As a backward pass does, long after the solve; each keeps its own values."""
    first, second = SolveScope(), SolveScope()
    with first.active():
        value = once("key", object)
        with second.active():
            assert once("key", object) is not value
        assert once("key", object) is value
    assert once("key", object) is not value  # outside of both
    with first.active():
        assert once("key", object) is value
        once("other", object)
    assert (len(first), len(second)) == (2, 1)


def test_a_scope_makes_values_in_the_grad_mode_it_began_in() -> None:
    weight = torch.ones(2, requires_grad=True)
    recording = SolveScope()
    with torch.no_grad():
        silent = SolveScope()
        assert recording.once("w", lambda: 2 * weight).requires_grad
    assert not silent.once("w", lambda: 2 * weight).requires_grad


def test_values_by_sample_are_kept_apart_by_their_number_of_rows() -> None:
    with solve_scope() as scope:
        two, three = (once("mask", lambda n=n: torch.randn(n, 4), rows=n) for n in (2, 3))
        assert (two.shape, three.shape) == ((2, 4), (3, 4))
        assert once("mask", lambda: torch.zeros(2, 4), rows=2) is two
        part = scope.of_samples(torch.tensor([1]), 2)
        with part.active():
            assert torch.equal(once("mask", lambda: torch.zeros(1, 4), rows=1), two[1:])
