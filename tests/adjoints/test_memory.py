"""What a training step keeps in memory, counted and not guessed."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from equilibria import (
    DEQ,
    Adjoint,
    Anderson,
    Broyden,
    FixedSteps,
    Implicit,
    OneStep,
    Phantom,
    Picard,
    Unrolled,
    solve,
)

ADJOINTS = [Implicit(), OneStep(), Phantom(), Unrolled()]
SOLVERS = [Picard(), Anderson(), Broyden(history_size=None)]


def saved_for_backward(deq: DEQ, x: Tensor) -> tuple[int, int]:
    """Number and bytes of the tensors that a forward pass saves."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        deq(x)
    return len(sizes), sum(sizes)


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    tensors = [obj for obj in gc.get_objects() if type(obj) in (Tensor, nn.Parameter)]
    tensors = [tensor for tensor in tensors if tensor.layout == torch.strided]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def with_steps(make_deq, num_steps: int, adjoint, solver) -> DEQ:
    return make_deq(
        solver=solver, termination=FixedSteps(num_steps), adjoint=adjoint, max_steps=num_steps
    )


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Phantom()], ids=repr)
def test_the_graph_does_not_grow_with_the_steps(adjoint, solver, make_deq, x):
    short, long = (saved_for_backward(with_steps(make_deq, n, adjoint, solver), x) for n in (2, 40))
    assert short == long


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_unrolled_graph_grows_with_the_steps(solver, make_deq, x):
    sizes = [
        saved_for_backward(with_steps(make_deq, n, Unrolled(), solver), x)[1] for n in (5, 10, 20)
    ]
    assert sizes[1] > 1.5 * sizes[0]
    assert sizes[2] > 1.5 * sizes[1]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_solution_holds_on_to_no_history(solver, make_deq, x):
    def held(num_steps: int) -> int:
        deq = with_steps(make_deq, num_steps, Implicit(), solver)
        before = live_bytes()
        _solution = deq(x)  # alive while counting
        return live_bytes() - before

    assert held(2) == held(40)


def train_and_forget(adjoint: Adjoint, run_backward: bool) -> list[weakref.ref]:
    """Solve, and return how to see whether what the graph held still lives."""
    module, closure = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    solution = solve(
        lambda z: 0.1 * torch.tanh(module(z)) + closure, torch.zeros(2, 3), adjoint=adjoint
    )
    if run_backward:
        solution.z.sum().backward()
    return [weakref.ref(module), weakref.ref(closure), weakref.ref(solution.z)]


@pytest.mark.parametrize("run_backward", [False, True])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_everything_is_freed_without_the_garbage_collector(adjoint, run_backward):
    gc.collect()
    gc.disable()
    try:
        held = train_and_forget(adjoint, run_backward)
        assert [ref() for ref in held] == [None, None, None]
    finally:
        gc.enable()
