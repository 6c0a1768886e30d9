"""What a language model costs: parameters, operations, memory of a training step.

Counted by running the model on the meta device, where tensors have shapes and no numbers: exact for
whatever the model does, at any size, in no memory. Operations are those of matrix products and
attention, a multiplication and an addition as two, as PyTorch's `FlopCounterMode` has them.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.fx.experimental._config as fx_config
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from equilibria.core.adjoint import BackwardReport
from equilibria.core.parameters import check_positive_integer
from equilibria.core.solution import Solution
from equilibria.deq import DEQ, Cell


class Counted(Protocol):
    """A language model that counts its parameters."""

    def num_parameters(self, *, embedding: bool = True) -> int: ...


@dataclass(frozen=True)
class Cost:
    """Of one segment.

    Args:
        num_parameters: all of them.
        num_block_parameters: without embedding and softmax.
        flops_once: of everything that is done once per segment, forward.
        flops_per_evaluation: of one evaluation of a DEQ's map, forward; 0 of an explicit model.
        bytes_once: what a training step keeps besides parameters and evaluations: of a DEQ also its
            injection and the weights that weight norm makes, which all evaluations share.
        bytes_per_evaluation: what one recorded evaluation keeps.
        bytes_per_state: of one state of a DEQ; 0 of an explicit model. While it solves, Anderson
            holds `history_size` states and as many residuals.
    """

    num_parameters: int
    num_block_parameters: int
    flops_once: int
    flops_per_evaluation: int
    bytes_once: int
    bytes_per_evaluation: int
    bytes_per_state: int = 0

    def flops(self, num_evals: float = 0) -> float:
        """Of a forward pass with so many evaluations; a training step takes about three times."""
        return self.flops_once + num_evals * self.flops_per_evaluation

    def bytes_kept(self, num_recorded: int = 1) -> int:
        """For the backward pass of a training step, by a DEQ with so many recorded evaluations.

        `Implicit` records one, unrolled gradients record all. Not counted: parameters, their
        gradients, the optimiser, and what a solver holds while it solves.
        """
        return self.bytes_once + num_recorded * self.bytes_per_evaluation + self.bytes_per_state


def cost(model: nn.Module, batch: int, length: int, memory_length: int = 0) -> Cost:
    """Count one segment (batch, length) that follows a memory of a given length.

    Solver arithmetic is not counted, which is no matrix product of the model's. An adaptive
    embedding and softmax are counted as if every token were in every cluster, since which it is in
    depends on the text: an upper bound. What fused kernels keep for themselves is not counted;
    of a small LSTM on the CPU that is more than everything else.

    Raises:
        UserError: a count below 1.
    """
    check_positive_integer("batch", batch)
    check_positive_integer("length", length)
    ghost = copy.deepcopy(model).to("meta").train()
    counted = cast(Counted, model)
    flops, held, state = 0, 0, 0
    if isinstance(deq := getattr(ghost, "deq", None), DEQ):
        # Every further layer costs one evaluation.
        ghost.deq = layers = _Layers(deq.cell)
        once = _run(ghost, batch, length, memory_length)
        layers.number = 2
        twice = _run(ghost, batch, length, memory_length)
        flops, held = twice[0] - once[0], twice[1] - once[1]
        once = once[0] - flops, once[1] - held
        state = sum(tensor.numel() * tensor.element_size() for tensor in layers.states)
    else:
        once = _run(ghost, batch, length, memory_length)
    return Cost(
        num_parameters=counted.num_parameters(),
        num_block_parameters=counted.num_parameters(embedding=False),
        flops_once=once[0],
        flops_per_evaluation=flops,
        bytes_once=once[1],
        bytes_per_evaluation=held,
        bytes_per_state=state,
    )


class _Layers(nn.Module):
    """Stands in for a DEQ layer: applies the cell, which needs no numbers, where a solve does."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.cell, self.number = cell, 1
        self.states: list[Tensor] = []
        self.injected: list[Tensor] = []

    def solve(self, injection: Any, *, settings: None = None, trace: bool = False) -> Solution:
        # With a gradient, as the evaluation has that Implicit records.
        z = pytree.tree_map_only(
            Tensor, lambda leaf: leaf.requires_grad_(), self.cell.initial_state(injection)
        )
        # Of all parts, where a segment is solved in several.
        self.states += _tensors(z)
        self.injected += _tensors(injection)
        for _ in range(self.number):
            z = self.cell(z, injection)
        # Its figures mean nothing, but are what a model may put together with those of others.
        nothing = _tensors(z)[0].new_zeros(len(_tensors(z)[0]))
        return Solution(
            z=z,
            status=nothing.to(torch.int8),
            residual=nothing,
            relative_residual=nothing,
            num_steps=nothing.to(torch.int64),
            num_evals=self.number,
            seconds=0.0,
            backward=BackwardReport(),
        )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _every_cluster() -> AbstractContextManager[object]:
    """Let `nonzero`, which depends on numbers, find everything."""
    return fx_config.patch(meta_nonzero_assume_all_nonzero=True)  # pyright: ignore[reportAttributeAccessIssue]


def _run(model: nn.Module, batch: int, length: int, memory_length: int) -> tuple[int, int]:
    """Operations forward, and bytes that the graph keeps."""
    tokens = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    memory: Any = None
    if memory_length:
        before = torch.zeros(batch, memory_length, dtype=torch.int64, device="meta")
        with _every_cluster():
            memory = model(before, memory_length=memory_length).memory
    layers = getattr(model, "deq", None)
    if isinstance(layers, _Layers):
        layers.states, layers.injected = [], []
    known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}  # pyright: ignore[reportPrivateUsage]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:  # pyright: ignore[reportPrivateUsage]
            kept[storage._cdata] = storage.nbytes()  # pyright: ignore[reportPrivateUsage]
        return tensor

    with (
        _every_cluster(),
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = model(tokens, memory, targets=tokens)
        loss = output.losses.sum()  # held, so that what is kept is kept
        if isinstance(layers, _Layers):
            for tensor in layers.injected:  # held by the implicit edge
                pack(tensor)
    return counter.get_total_flops(), sum(kept.values()) + 0 * loss.dim()
