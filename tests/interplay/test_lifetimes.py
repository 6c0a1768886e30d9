"""Checkpointing, copies, files, threads, and one layer used many times."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from equilibria import DEQ, Implicit, NeumannSeries, OneStep, Phantom, Residual, Unrolled, solve
from equilibria.layers.variational_dropout import VariationalDropout
from equilibria.normalizations.weight_norm import weight_norm

ADJOINTS = [
    Implicit(rtol=1e-12),
    OneStep(),
    Phantom(),
    NeumannSeries(),
    Unrolled(),
    Unrolled(checkpoint=True),
]


def gradients(layer: Callable[[Tensor], Tensor], deq: DEQ, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    z = layer(x)
    return [z.detach(), *torch.autograd.grad(z.square().sum(), [*deq.parameters(), x])]


# --- gradient checkpointing ---------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_checkpointing_around_the_layer(
    make_deq: Callable[..., DEQ], x: Tensor, adjoint: Any
) -> None:
    deq = make_deq(adjoint=adjoint)
    expected = gradients(lambda x: deq(x).z, deq, x)
    found = gradients(lambda x: checkpoint(lambda x: deq(x).z, x, use_reentrant=False), deq, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "adjoint", [adjoint for adjoint in ADJOINTS if adjoint != Unrolled(checkpoint=True)], ids=str
)
def test_reentrant_checkpointing_around_the_layer(
    make_deq: Callable[..., DEQ], x: Tensor, adjoint: Any
) -> None:
    deq = make_deq(adjoint=adjoint)
    inputs = x.clone().requires_grad_()
    deq(inputs).z.square().sum().backward()
    expected = [inputs.grad, *(parameter.grad for parameter in deq.parameters())]
    deq.zero_grad()
    inputs = x.clone().requires_grad_()
    checkpoint(lambda x: deq(x).z, inputs, use_reentrant=True).square().sum().backward()
    found = [inputs.grad, *(parameter.grad for parameter in deq.parameters())]
    # Unrolled up to rounding: the first pass records nothing and may take compiled steps.
    exactly = {} if adjoint == Unrolled() else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found, expected, **exactly)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_masks_again(
    make_deq: Callable[..., DEQ], x: Tensor, use_reentrant: bool
) -> None:
    deq = make_deq()
    deq.cell.recurrent = nn.Sequential(deq.cell.recurrent, VariationalDropout(0.5))
    found: list[Tensor | None] = []
    for layer in (
        lambda x: deq(x).z,
        lambda x: checkpoint(lambda x: deq(x).z, x, use_reentrant=use_reentrant),
    ):
        torch.manual_seed(3)
        inputs = x.clone().requires_grad_()
        layer(inputs).square().sum().backward()
        found.append(inputs.grad)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_checkpointing_a_stack(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    deq, back = make_deq(), nn.Linear(5, 3).double()

    def stack(x: Tensor) -> Tensor:
        return deq(back(deq(x).z)).z

    expected = gradients(stack, deq, x)
    found = gradients(lambda x: checkpoint(stack, x, use_reentrant=False), deq, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --- copies and files ---------------------------------------------------------------------------


@pytest.mark.parametrize("after_use", [False, True])
def test_deep_copies_are_equal_and_independent(
    make_deq: Callable[..., DEQ], x: Tensor, after_use: bool
) -> None:
    deq = make_deq()
    weight_norm(deq.cell.recurrent)
    if after_use:
        deq(x).z.sum().backward()
    twin = copy.deepcopy(deq)
    torch.testing.assert_close(twin(x).z, deq(x).z, rtol=0, atol=0)
    expected = deq(x).z.detach()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(deq(x).z, expected, rtol=0, atol=0)


def test_a_compiled_layer_copies_and_pickles(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    deq = make_deq()
    deq.cell.compile(backend="eager")
    expected = deq(x).z
    for twin in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        torch.testing.assert_close(twin(x).z, expected, rtol=0, atol=0)


def test_the_module_in_a_file(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    deq = make_deq()
    file = io.BytesIO()
    torch.save(deq, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.settings == deq.settings
    torch.testing.assert_close(loaded(x).z, deq(x).z, rtol=0, atol=0)


def test_its_weights_in_a_file(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    deq = make_deq()
    deq(x).z.sum().backward()
    file = io.BytesIO()
    torch.save(deq.state_dict(), file)
    file.seek(0)
    other = make_deq()
    with torch.no_grad():
        other.cell.recurrent.weight.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(x).z, deq(x).z, rtol=0, atol=0)


def test_moving_averages(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    deq = make_deq()
    averaged = AveragedModel(deq)
    deq(x).z.sum().backward()
    averaged.update_parameters(deq)
    torch.testing.assert_close(averaged(x).z, deq(x).z, rtol=0, atol=0)


# --- one layer, many uses -----------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_one_layer_three_times_in_one_graph(
    make_deq: Callable[..., DEQ], x: Tensor, adjoint: Any
) -> None:
    """As three layers with tied weights, whose gradients add up."""
    deq, back = make_deq(adjoint=adjoint), nn.Linear(5, 3).double()
    first, second, third = (copy.deepcopy(deq) for _ in range(3))

    def stack(one: DEQ, two: DEQ, three: DEQ) -> Tensor:
        return (three(back(two(back(one(x).z)).z)).z + one(x).z).square().sum()

    found = torch.autograd.grad(stack(deq, deq, deq), list(deq.parameters()))
    copies = [p for layer in (first, second, third) for p in layer.parameters()]
    each = torch.autograd.grad(stack(first, second, third), copies)
    num = len(found)
    expected = [sum(each[i::num][1:], each[i]) for i in range(num)]
    torch.testing.assert_close(list(found), expected)


def test_backward_in_the_opposite_order_of_forward(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    deq = make_deq()
    parameters = list(deq.parameters())
    losses = [deq(inputs).z.square().sum() for inputs in (x, -x)]
    later = [torch.autograd.grad(loss, parameters) for loss in reversed(losses)][::-1]
    at_once = [torch.autograd.grad(deq(inputs).z.square().sum(), parameters) for inputs in (x, -x)]
    torch.testing.assert_close(later, at_once, rtol=0, atol=0)


# --- threads ------------------------------------------------------------------------------------


def test_threads_do_not_see_each_other(make_deq: Callable[..., DEQ], x: Tensor) -> None:
    """Shared weights, own masks: each thread gets what it gets alone."""
    deq = make_deq(termination=Residual(1e-10))
    weight_norm(deq.cell.recurrent)
    batches = [x * scale for scale in (0.1, 0.5, 1.0, 2.0)]
    expected = [gradients(lambda x: deq(x).z, deq, batch) for batch in batches]
    found: dict[int, list[Tensor]] = {}
    together = threading.Barrier(len(batches))

    def work(number: int) -> None:
        together.wait()
        for _ in range(3):
            found[number] = gradients(lambda x: deq(x).z, deq, batches[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, wanted in enumerate(expected):
        torch.testing.assert_close(found[number], wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    "adjoint", [Implicit(), OneStep(), Phantom(), NeumannSeries(), Unrolled()], ids=repr
)
def test_a_state_of_inference_mode_starts_training(adjoint: Any) -> None:
    """Also where it is the solution already and no step is made."""
    weight = (0.2 * torch.randn(4, 4)).requires_grad_()
    with torch.inference_mode():
        z0 = solve(lambda z: torch.tanh(z @ weight + 1.0), torch.zeros(3, 4)).z
    solution = solve(lambda z: torch.tanh(z @ weight + 1.0), z0, adjoint=adjoint)
    assert solution.num_steps.tolist() == [0] * 3
    solution.z.sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
