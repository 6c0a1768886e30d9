"""The two passes belong to one function, and what scales or stores it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equilibria import (
    DEQ,
    Anderson,
    Broyden,
    Cell,
    Implicit,
    NeumannSeries,
    OneStep,
    Phantom,
    Picard,
    Residual,
    Unrolled,
    solve,
)
from equilibria.layers.variational_dropout import VariationalDropout
from equilibria.linear.bicgstab import BiCGStab
from equilibria.linear.gmres import GMRES

BACKWARD_SOLVERS = [GMRES(), BiCGStab(), Anderson(), Broyden(), Picard()]
ADJOINTS = [Implicit(), OneStep(), Phantom(), NeumannSeries(), Unrolled()]


class NormCell(Cell):
    """Batch norm of the input in `inject`, or of the state in `forward`."""

    def __init__(self, *, of_the_state: bool = False) -> None:
        super().__init__()
        self.hidden = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)
        self.of_the_state = of_the_state
        with torch.no_grad():
            self.hidden.weight.mul_(0.1)

    def inject(self, x: Tensor) -> Tensor:
        return x if self.of_the_state else self.norm(x)

    def initial_state(self, injection: Tensor) -> Tensor:
        return torch.zeros_like(injection)

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        hidden = self.hidden(z)
        return torch.tanh((self.norm(hidden + injection) if self.of_the_state else hidden) * 0.5)


class DropoutCell(NormCell):
    """A mask drawn where f is evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = VariationalDropout(0.5)
        self.masked: list[Tensor] = []

    def inject(self, x: Tensor) -> Tensor:
        return x

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        ones = self.dropout(torch.ones_like(z))
        self.masked.append(ones.detach())
        return torch.tanh(self.hidden(z) * ones + injection)


# --- batch norm ---------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_batch_norm_of_the_injection_is_updated_once_per_training_forward(adjoint: Any) -> None:
    cell = NormCell()
    deq, x = DEQ(cell, adjoint=adjoint), torch.randn(8, 5) + 3.0
    twin = nn.BatchNorm1d(5)
    for num_forwards in (1, 2):
        twin(x)
        z = deq(x).z
        assert cell.norm.num_batches_tracked == num_forwards
        torch.testing.assert_close(cell.norm.running_mean, twin.running_mean)
        z.sum().backward()
        assert cell.norm.num_batches_tracked == num_forwards
        torch.testing.assert_close(cell.norm.running_mean, twin.running_mean)
        torch.testing.assert_close(cell.norm.running_var, twin.running_var)
    deq.eval()
    deq(x).z.sum().backward()
    assert cell.norm.num_batches_tracked == 2


@pytest.mark.parametrize(
    "adjoint",
    [*ADJOINTS, Implicit(Broyden()), Implicit(BiCGStab())],
    ids=str,
)
def test_batch_norm_inside_f_is_updated_per_evaluation_and_never_by_backward(adjoint: Any) -> None:
    """PyTorch updates whenever the module is called, so as often as f is; not once more."""
    cell = NormCell(of_the_state=True)
    deq = DEQ(cell, adjoint=adjoint, on_failure="ignore")
    solution = deq(torch.randn(8, 5))
    assert cell.norm.num_batches_tracked == solution.num_evals
    before = {name: value.clone() for name, value in cell.norm.named_buffers()}
    solution.z.square().sum().backward()
    for name, value in cell.norm.named_buffers():
        assert torch.equal(value, before[name]), name


# --- random draws -------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", [*ADJOINTS, Unrolled(checkpoint=True)], ids=str)
def test_one_mask_in_all_evaluations_of_both_passes(adjoint: Any) -> None:
    cell = DropoutCell()
    deq = DEQ(cell, adjoint=adjoint)
    deq(torch.randn(4, 5)).z.sum().backward()
    first, *others = cell.masked
    assert 0 < (first == 0).sum() < first.numel()
    assert all(torch.equal(first, other) for other in others)
    cell.masked.clear()
    deq(torch.randn(4, 5))
    assert not torch.equal(first, cell.masked[0])  # the next solve draws anew


@pytest.mark.parametrize("adjoint", [*ADJOINTS, Unrolled(checkpoint=True)], ids=str)
def test_backward_draws_nothing(adjoint: Any) -> None:
    solution = DEQ(DropoutCell(), adjoint=adjoint)(torch.randn(4, 5))
    before = torch.get_rng_state()
    solution.z.sum().backward()
    assert torch.equal(before, torch.get_rng_state())


def test_the_gradient_is_that_of_the_masked_function() -> None:
    cell = DropoutCell().double()
    deq = DEQ(cell, termination=Residual(1e-12, atol=0.0), adjoint=Implicit(rtol=1e-12))
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(deq(x).z.square().sum(), x)
    mask = cell.masked[0]
    z = solve(
        lambda z: torch.tanh(cell.hidden(z) * mask + x),
        torch.zeros(4, 5, dtype=torch.float64),
        termination=Residual(1e-12, atol=0.0),
        adjoint=Unrolled(),
    ).z
    torch.testing.assert_close(found, torch.autograd.grad(z.square().sum(), x)[0])


# --- memory format ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "memory_format", "convolution"),
    [
        ((2, 3, 4, 4), torch.channels_last, nn.Conv2d),
        ((2, 3, 4, 4, 4), torch.channels_last_3d, nn.Conv3d),
    ],
)
@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled()], ids=str)
def test_channels_last_is_what_f_sees_and_what_comes_back(
    shape: tuple[int, ...], memory_format: torch.memory_format, convolution: Any, adjoint: Any
) -> None:
    kernel = convolution(3, 3, 3, padding=1)
    with torch.no_grad():
        kernel.weight.mul_(0.2)
    kernel = kernel.to(memory_format=memory_format)
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    seen: list[bool] = []

    def f(z: Tensor) -> Tensor:
        seen.append(z.is_contiguous(memory_format=memory_format))
        return torch.tanh(kernel(z) + x)

    z0 = torch.zeros_like(x)
    solution = solve(f, z0, adjoint=adjoint, termination=Residual(1e-6), states="all")
    solution.z.square().sum().backward()
    assert all(seen)
    assert all(z.is_contiguous(memory_format=memory_format) for z in solution.states)
    assert x.grad is not None
    found, x.grad = x.grad, None
    plain = x.detach().contiguous().requires_grad_()
    z = solve(
        lambda z: torch.tanh(kernel(z) + plain),
        torch.zeros(shape),
        adjoint=adjoint,
        termination=Residual(1e-6),
    ).z
    torch.testing.assert_close(solution.z, z, rtol=1e-4, atol=1e-5)
    (expected,) = torch.autograd.grad(z.square().sum(), plain)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_each_tensor_of_a_tree_keeps_its_own_format() -> None:
    """In the order of its dimensions: one row after the other of the packed state lies between."""
    kernel = nn.Conv2d(3, 3, 1)

    def format_of(z: Tensor) -> torch.memory_format:
        image = kernel(z)
        last = image.is_contiguous(memory_format=torch.channels_last)
        return torch.channels_last if last else torch.contiguous_format

    def f(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        assert format_of(state[0]) == torch.channels_last
        assert format_of(state[1]) == torch.contiguous_format
        return 0.5 * torch.cos(state[1]), 0.5 * torch.cos(state[0])

    z0 = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.zeros(2, 3, 4, 4)
    with torch.no_grad():
        last, first = solve(f, z0).z
        assert format_of(last) == torch.channels_last
        assert format_of(first) == torch.contiguous_format


# --- scaling of the loss ------------------------------------------------------------------------


@pytest.mark.parametrize("solver", BACKWARD_SOLVERS, ids=str)
@pytest.mark.parametrize("power", [-40, -8, 8, 40])
def test_scaling_the_loss_scales_the_gradient_exactly(
    make_deq: Callable[..., DEQ], x: Tensor, solver: Any, power: int
) -> None:
    """By a power of two, which rounds nothing: the same steps, bit for bit."""
    deq = make_deq(adjoint=Implicit(solver, max_steps=300), termination=Residual(1e-10))
    z = deq(x).z
    parameters = list(deq.parameters())
    plain = torch.autograd.grad(z.square().sum(), parameters, retain_graph=True)
    scaled = torch.autograd.grad(z.square().sum() * 2.0**power, parameters)
    for one, other in zip(plain, scaled, strict=True):
        assert torch.equal(one * 2.0**power, other)


@pytest.mark.parametrize("solver", BACKWARD_SOLVERS, ids=str)
def test_a_mean_gives_the_sum_divided(make_deq: Callable[..., DEQ], x: Tensor, solver: Any) -> None:
    deq = make_deq(adjoint=Implicit(solver, max_steps=300), termination=Residual(1e-10))
    solution = deq(x)
    parameters = list(deq.parameters())
    total = torch.autograd.grad(solution.z.square().sum(), parameters, retain_graph=True)
    mean = torch.autograd.grad(solution.z.square().mean(), parameters)
    for one, other in zip(total, mean, strict=True):
        torch.testing.assert_close(one / solution.z.numel(), other, rtol=1e-4, atol=1e-9)


# --- z0 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adjoint", [adjoint for adjoint in ADJOINTS if not isinstance(adjoint, Unrolled)], ids=str
)
def test_z0_gets_no_gradient_where_the_fixed_point_does_not_depend_on_it(
    make_deq: Callable[..., DEQ], x: Tensor, adjoint: Any
) -> None:
    z0 = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    z = make_deq(adjoint=adjoint)(x, z0=z0).z
    (gradient,) = torch.autograd.grad(z.sum(), z0, allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize("solver", [Picard(), Picard(relaxation=0.5), Anderson(), Broyden()])
def test_z0_gets_the_right_gradient_when_unrolled(
    make_deq: Callable[..., DEQ], x: Tensor, solver: Any
) -> None:
    deq = make_deq(
        solver=solver,
        adjoint=Unrolled(),
        max_steps=3,
        keep="last",
        on_failure="ignore",
        termination=Residual(1e-12),
    )
    z0 = 0.1 * torch.randn(4, 5, dtype=torch.float64)
    z0.requires_grad_()
    assert torch.autograd.gradcheck(lambda z0: deq(x, z0=z0).z, (z0,))


# --- grad modes ---------------------------------------------------------------------------------


def test_gradients_in_eval_mode_are_those_of_training(
    make_deq: Callable[..., DEQ], x: Tensor
) -> None:
    deq = make_deq()
    parameters = list(deq.parameters())
    training = torch.autograd.grad(deq(x).z.square().sum(), parameters)
    evaluation = torch.autograd.grad(deq.eval()(x).z.square().sum(), parameters)
    torch.testing.assert_close(training, evaluation, rtol=0, atol=0)


def test_inference_mode(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    deq = make_deq()
    with torch.inference_mode():
        z = deq(x).z
    assert z.is_inference()
    torch.testing.assert_close(z.clone(), deq(x).z.detach(), rtol=0, atol=0)


def test_inputs_made_in_inference_mode(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    deq = make_deq()
    with torch.inference_mode():
        made_there = x * 1.0
    with torch.no_grad():
        torch.testing.assert_close(deq(made_there).z, deq(x).z)
    with pytest.raises(RuntimeError, match="[Ii]nference tensors"):  # PyTorch's own rule
        deq(made_there).z.sum().backward()
