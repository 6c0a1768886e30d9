"""The guarantee of monotone cells, for drawn parameters and not only for initial ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equilibria import (
    DEQ,
    Anderson,
    Broyden,
    Cell,
    Implicit,
    OneStep,
    Picard,
    Residual,
    Unrolled,
    UserError,
)
from equilibria.layers.monotone import (
    MonotoneCell,
    MonotoneConvCell,
    convolution_norm_bound,
    operator_norm_bound,
)
from equilibria.testing.cell_contract import CellContract
from equilibria.testing.dense import implicit_gradients, relative_error

SIZE = 5  # of the images


class TestMonotoneCell(CellContract):
    max_spectral_radius = 1.0

    def make_cell(self) -> Cell:
        return MonotoneCell(3, 8)

    def make_inputs(self, batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 3),)


class TestMonotoneConvCell(CellContract):
    max_spectral_radius = 1.0

    def make_cell(self) -> Cell:
        return MonotoneConvCell(2, 3)

    def make_inputs(self, batch: int) -> tuple[Tensor]:
        return (torch.randn(batch, 2, SIZE, SIZE),)


def drawn(kind: str, scale: float = 1.0, seed: int = 0, **options: float) -> DEQ:
    """A cell whose parameters lie `scale` times as far out as fresh ones, solved by Picard."""
    torch.manual_seed(seed)
    cell = MonotoneCell(3, 7, **options) if kind == "dense" else MonotoneConvCell(2, 3, **options)
    cell = cell.double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(scale)
    return DEQ(
        cell,
        solver=Picard(),
        termination=Residual(1e-13, 1e-13),
        adjoint=Implicit(rtol=1e-13, max_steps=400),
        max_steps=40_000,
        on_failure="raise",
    )


def inputs(kind: str, batch: int = 3) -> Tensor:
    shape = (3,) if kind == "dense" else (2, SIZE, SIZE)
    draw = torch.Generator().manual_seed(5)
    return torch.randn(batch, *shape, generator=draw, dtype=torch.float64)


def operator_of(cell: MonotoneCell | MonotoneConvCell) -> Tensor:
    """I - W written out."""
    if isinstance(cell, MonotoneCell):
        return cell.operator().detach()
    size = 3 * SIZE * SIZE
    basis = torch.eye(size, dtype=torch.float64).view(size, 3, SIZE, SIZE)
    return cell.apply_operator(basis).reshape(size, size).T.detach()


def relu_equation(cell: MonotoneCell | MonotoneConvCell, z: Tensor, x: Tensor) -> Tensor:
    """relu(W z + U x + b), the equation that the cell stands for."""
    flat = z.flatten(1)
    return torch.relu((flat - flat @ operator_of(cell).mT).view_as(z) + cell.input(x))


KINDS = pytest.mark.parametrize("kind", ["dense", "convolution"])


@KINDS
@settings(max_examples=15)
@given(scale=st.floats(0.0, 30.0), seed=st.integers(0, 999), margin=st.floats(1e-3, 5.0))
def test_the_symmetric_part_is_at_least_the_margin(kind, scale, seed, margin):
    """Whatever the parameters; and L is no less than the norm."""
    cell = drawn(kind, scale, seed, margin=margin).cell
    operator = operator_of(cell)
    smallest = torch.linalg.eigvalsh((operator + operator.mT) / 2.0)[0]
    norm = torch.linalg.matrix_norm(operator, 2)
    assert smallest >= margin - 1e-12 * norm
    with torch.no_grad():
        assert cell.norm_bound() >= norm * (1.0 - 1e-12)


def test_the_weight_is_the_published_one():
    cell = drawn("dense", margin=0.4).cell
    A, B = cell.damping_DD, cell.rotation_DD
    wanted = 0.6 * torch.eye(7) - A.T @ A + B - B.T
    torch.testing.assert_close(cell.weight(), wanted.double())


@KINDS
def test_one_fixed_point_from_wherever_it_starts(kind):
    """With a W on which plain iteration runs away."""
    deq, x = drawn(kind, scale=2.5), inputs(kind)
    identity = torch.eye(len(operator_of(deq.cell)), dtype=torch.float64)
    assert torch.linalg.eigvals(identity - operator_of(deq.cell)).abs().max() > 1.5
    start = torch.randn_like(deq.cell.initial_state(deq.cell.inject(x)))
    with torch.no_grad():
        solutions = [deq(x, z0=scale * start).z for scale in (0.0, 1.0, 100.0)]
    for z in solutions[1:]:
        torch.testing.assert_close(z, solutions[0], rtol=0.0, atol=1e-9)
    z = solutions[0]
    torch.testing.assert_close(relu_equation(deq.cell, z, x), z, rtol=0.0, atol=1e-9)
    assert 0.1 < float((z > 0).double().mean()) < 0.9  # else a linear problem was solved


@KINDS
@settings(max_examples=10)
@given(relative_step=st.floats(0.01, 1.99), scale=st.floats(0.1, 10.0), seed=st.integers(0, 999))
def test_every_step_in_the_proven_range_contracts(kind, relative_step, scale, seed):
    cell = drawn(kind, scale, seed, relative_step=relative_step).cell
    with torch.no_grad():
        injection, rate = cell.inject(inputs(kind, 200)), cell.contraction_rate()
        assert 0.0 < rate < 1.0
        z, y = (scale * torch.randn_like(cell.initial_state(injection)) for _ in range(2))
        shrunk = (cell(z, injection) - cell(y, injection)).flatten(1).norm(dim=1)
        assert bool((shrunk <= rate * (z - y).flatten(1).norm(dim=1)).all())


def test_a_step_outside_of_the_range_does_not_contract():
    """The bound 2 m / L^2 is where it ends: a rotation with m I reaches it."""
    cell = drawn("dense", 0.0).cell
    with torch.no_grad():
        cell.rotation_DD[0, 1] = 3.0  # I - W = I + [[0, -3], [3, 0]] on two coordinates
        L = torch.linalg.matrix_norm(cell.operator(), 2)
        step = torch.eye(7) - 2.0 / L.square() * cell.operator()
    assert math.isclose(float(torch.linalg.matrix_norm(step, 2)), 1.0, rel_tol=1e-9)


@KINDS
def test_the_fixed_point_does_not_depend_on_the_step(kind):
    states = []
    for relative_step in (0.3, 1.0, 1.9):
        deq = drawn(kind, 2.0, relative_step=relative_step)
        states.append(deq(inputs(kind)).z)
    for z in states[1:]:
        torch.testing.assert_close(z, states[0], rtol=0.0, atol=1e-9)


@KINDS
@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Picard()], ids=repr)
def test_any_solver_finds_it(kind, solver):
    deq, x = drawn(kind, 1.5), inputs(kind)
    wanted = deq(x).z
    found = DEQ(deq.cell, solver=solver, termination=Residual(1e-9, 0.0), max_steps=500)(x)
    torch.testing.assert_close(found.z, wanted, rtol=1e-6, atol=1e-6)


@KINDS
def test_gradients_are_those_of_the_undamped_equation(kind):
    """Implicit and unrolled; parameters and inputs; against the dense solve on relu(W z + ...)."""
    deq, x = drawn(kind, 2.0), inputs(kind).requires_grad_()
    leaves = [x, *deq.parameters()]
    z = deq(x).z.detach()
    cotangent = torch.randn_like(z)
    cell = deq.cell

    def plain(state: Tensor) -> Tensor:
        if isinstance(cell, MonotoneCell):
            return torch.relu(state @ cell.weight().mT + cell.input(x))
        return torch.relu(state - cell.apply_operator(state) + cell.input(x))

    wanted = implicit_gradients(plain, z, cotangent, leaves)
    for adjoint in (Implicit(rtol=1e-13, max_steps=400), Unrolled()):
        again = DEQ(
            cell,
            solver=Picard(),
            termination=Residual(1e-13, 1e-13),
            adjoint=adjoint,
            max_steps=40_000,
            on_failure="raise",
        )
        found = torch.autograd.grad(again(x).z, leaves, cotangent)
        assert relative_error(found, wanted) < 1e-8


@KINDS
def test_the_distance_bound_holds_and_means_something(kind):
    deq, x = drawn(kind, 1.0), inputs(kind)
    wanted = deq(x).z
    loose = DEQ(deq.cell, solver=Picard(), termination=Residual(1e-3))(x)
    distance = (loose.z - wanted).flatten(1).square().mean(1).sqrt()
    bound = deq.cell.distance_bound(loose)
    assert bool((distance <= bound).all())
    assert bool((bound <= 100.0 * distance).all())


@KINDS
def test_parameters_are_used_in_inject_only(kind):
    """So that W is made once per solve."""
    deq, x = drawn(kind), inputs(kind)
    injection = deq.cell.inject(x)
    z = torch.rand_like(deq.cell.initial_state(injection))
    before = deq.cell(z, injection)
    with torch.no_grad():
        for parameter in deq.cell.parameters():
            parameter.fill_(torch.nan)
    assert torch.equal(deq.cell(z, injection), before)


@KINDS
def test_autocast_keeps_the_guarantee_out_of_half_precision(kind):
    cell = drawn(kind).cell.float()
    with torch.autocast("cpu", torch.bfloat16):
        injection = cell.inject(inputs(kind).bfloat16())
    wanted = cell.inject(inputs(kind).bfloat16().float())
    for found, exact in zip(injection, wanted, strict=True):
        assert torch.equal(found, exact)


@KINDS
def test_training_never_leaves_the_guarantee(kind):
    """A learning rate that is far too large: the parameters run away, the solves do not fail."""
    deq, x = drawn(kind), inputs(kind)
    loose = DEQ(deq.cell, solver=Picard(), adjoint=OneStep(), max_steps=20_000, on_failure="raise")
    optimizer = torch.optim.SGD(deq.parameters(), lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        (loose(x).z - 2.0).square().mean().backward()
        optimizer.step()
    assert bool(loose(x).converged.all())


@pytest.mark.parametrize("size", [1, 2, 30])
def test_the_norm_bound_is_one_and_is_tight(size):
    matrices = torch.randn(4, size, size, dtype=torch.float64)
    matrices = torch.cat((matrices, 1e-150 * matrices, 1e150 * matrices, 0.0 * matrices))
    found, norm = operator_norm_bound(matrices), torch.linalg.matrix_norm(matrices, 2)
    assert bool((found >= norm * (1.0 - 1e-12)).all())
    assert bool((found <= norm * size ** (2.0**-7) * (1.0 + 1e-12) + 1e-300).all())


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_the_norm_bound_of_a_convolution(kernel_size):
    kernel = torch.randn(2, 2, kernel_size, kernel_size, dtype=torch.float64)
    found, size = convolution_norm_bound(kernel), 12
    basis = torch.eye(2 * size * size, dtype=torch.float64).view(-1, 2, size, size)
    dense = torch.nn.functional.conv2d(basis, kernel, padding=kernel_size // 2).flatten(1)
    norm = torch.linalg.matrix_norm(dense, 2)
    assert norm * (1.0 - 1e-12) <= found <= 1.2 * norm  # exact up to rounding for a 1 x 1 kernel


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MonotoneCell(3, 4, margin=0.0), "margin=0.0 must be positive"),
        (lambda: MonotoneCell(3, 4, margin=math.nan), "margin=nan must be positive"),
        (lambda: MonotoneCell(3, 4, relative_step=2.0), "must lie between 0 and 2"),
        (lambda: MonotoneCell(0, 4), "num_inputs=0"),
        (lambda: MonotoneCell(3, 0), "width=0"),
        (lambda: MonotoneConvCell(3, 4, kernel_size=4), "kernel_size=4 is even"),
        (lambda: MonotoneConvCell(3, 4, margin=-1.0), "margin=-1.0 must be positive"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(UserError, match=message):
        make()
