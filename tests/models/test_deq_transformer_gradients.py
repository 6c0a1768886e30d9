"""Gradients of the DEQ-Transformer: complete, right, and in constant memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from equilibria import Adjoint, Anderson, Broyden, Implicit, OneStep, Phantom, Picard, Unrolled
from equilibria.models.config import SolveConfig, unrolled_settings
from equilibria.models.deq_transformer import DEQTransformer, Memory

ModelFactory = Callable[..., DEQTransformer]
NORMS = pytest.mark.parametrize("norm", ["post", "pre"])


def _loss(model: DEQTransformer, tokens: Tensor, memory: Memory | None = None) -> Tensor:
    logits = model(tokens[:, :-1], memory).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _gradients(model: DEQTransformer, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def _memory(model: DEQTransformer, tokens: Tensor) -> Memory:
    """The memory of a text other than `tokens`."""
    with torch.no_grad():
        return model.eval()(tokens.flip(1), memory_length=5).memory


@NORMS
@pytest.mark.parametrize("weight_norm", [True, False])
def test_every_parameter_gets_a_gradient(
    make_model: ModelFactory, tokens: Tensor, norm: str, weight_norm: bool
) -> None:
    """Weight norm too: computed without a graph, its parameters would silently get none."""
    model = make_model(norm=norm, weight_norm=weight_norm, dropout=0.1)
    memory = _memory(model, tokens)
    model.train()
    _loss(model, tokens, memory).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-9, name


@pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Phantom(), Unrolled()])
def test_every_gradient_method_reaches_every_parameter(
    make_model: ModelFactory, tokens: Tensor, adjoint: Adjoint
) -> None:
    model = make_model(solve=SolveConfig(solver=Anderson(), max_steps=20, adjoint=adjoint))
    _loss(model, tokens).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-9, name


@NORMS
def test_gradients_of_the_loss_against_finite_differences(
    make_model: ModelFactory, tokens: Tensor, norm: str
) -> None:
    """With memory and with dropout, whose masks the seed repeats for every evaluation."""
    model = make_model(norm=norm, dropout=0.2, embedding_dropout=0.1)
    memory = _memory(model, tokens)
    model.train()

    def loss() -> Tensor:
        torch.manual_seed(5)
        return _loss(model, tokens, memory)

    gradients = _gradients(model, loss())
    generator = torch.Generator().manual_seed(3)
    step = 1e-6
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = loss()
            parameter.add_(direction, alpha=-2 * step)
            below = loss()
            parameter.add_(direction, alpha=step)
        difference = ((above - below) / (2 * step)).item()
        expected = (gradients[name] * direction).sum().item()
        assert difference == pytest.approx(expected, rel=1e-5, abs=1e-8), name


@NORMS
def test_implicit_and_deep_unrolled_models_agree(
    make_model: ModelFactory, tokens: Tensor, norm: str
) -> None:
    model = make_model(norm=norm)
    memory = _memory(model, tokens)
    model.train()
    implicit = model(tokens, memory)
    assert implicit.solution.converged.all()
    exact = _gradients(model, implicit.logits.square().mean())
    errors = []
    for depth in (3, 12, 80):
        unrolled = model(tokens, memory, settings=unrolled_settings(depth))
        gradients = _gradients(model, unrolled.logits.square().mean())
        errors.append(
            max(((gradients[n] - exact[n]).norm() / exact[n].norm()).item() for n in exact)
        )
    torch.testing.assert_close(unrolled.logits, implicit.logits, rtol=0, atol=1e-10)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-8


@pytest.mark.parametrize("backward", [Picard(), Anderson(history_size=20), Broyden(None)])
def test_the_backward_solver_does_not_change_the_gradient(
    make_model: ModelFactory, tokens: Tensor, backward: Picard | Anderson | Broyden
) -> None:
    model = make_model()
    reference = _gradients(model, _loss(model, tokens))
    solve = replace(
        model.config.solve, adjoint=Implicit(solver=backward, rtol=1e-13, max_steps=300)
    )
    other = make_model(solve=solve)
    for name, gradient in _gradients(other, _loss(other, tokens)).items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-7, atol=1e-10)


def _saved_bytes(model: DEQTransformer, tokens: Tensor) -> tuple[int, int]:
    """Bytes that one training step keeps for its backward pass, and the evaluations it made."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(tokens)
        loss = output.logits.square().mean()
    saved = sum(storages.values())
    loss.backward()
    return saved, output.solution.num_evals


def test_memory_does_not_grow_with_the_number_of_steps(
    make_model: ModelFactory, tokens: Tensor
) -> None:
    def measure(adjoint: Adjoint, max_steps: int) -> tuple[int, int]:
        solve = SolveConfig(
            solver=Picard(), rtol=0.0, atol=1e-300, max_steps=max_steps, adjoint=adjoint
        )
        return _saved_bytes(make_model(solve=solve, dropout=0.1), tokens)

    implicit = Implicit(max_steps=5)
    few, num_few = measure(implicit, 3)
    many, num_many = measure(implicit, 60)
    assert (num_few, num_many) == (5, 62)  # the initial one, the steps, the recorded one
    assert many == few
    # the same measurement sees what unrolling keeps
    assert measure(Unrolled(), 60)[0] > 5 * measure(Unrolled(), 3)[0]


def test_a_step_leaves_nothing_behind(make_model: ModelFactory, tokens: Tensor) -> None:
    """The graph goes with the output: no hook, cache or cycle holds a solve."""
    import gc
    import weakref

    model = make_model()
    gc.disable()
    try:
        output = model(tokens, memory_length=4)
        output.logits.sum().backward()
        solution = weakref.ref(output.solution.z)
        del output
        assert solution() is None
    finally:
        gc.enable()


def test_gradients_add_up_over_two_segments(make_model: ModelFactory, tokens: Tensor) -> None:
    """The layer is used twice before one backward pass: nothing of a solve lives on the module."""
    model = make_model()
    first, second = _loss(model, tokens[:, :5]), _loss(model, tokens[:, 4:])
    separate = [_gradients(model, loss) for loss in (first, second)]
    joint = _gradients(model, _loss(model, tokens[:, :5]) + _loss(model, tokens[:, 4:]))
    for name, gradient in joint.items():
        torch.testing.assert_close(gradient, separate[0][name] + separate[1][name])
