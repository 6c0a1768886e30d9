"""Parameters, operations and memory of models, against counting by hand and by running."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from equilibria import Picard, Unrolled, UserError, recipes
from equilibria.models.accounting import cost
from equilibria.models.config import SolveConfig
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.models.deq_trellisnet import DEQTrellisNetConfig
from equilibria.models.recurrent import RecurrentConfig
from equilibria.models.tcn import TCNConfig
from equilibria.models.transformer_xl import TransformerXLConfig
from equilibria.models.trellisnet import TrellisNetConfig

B, L, M, D, V = 3, 7, 5, 8, 11
TRANSFORMER: dict[str, Any] = {"d_model": D, "num_heads": 2, "d_inner": 20}
DEQS = [
    DEQTransformerConfig(**TRANSFORMER),
    DEQTransformerConfig(**TRANSFORMER, norm="pre"),
    DEQTransformerConfig(**TRANSFORMER, attention_window=4, attention_dropout=0.1),
    DEQTrellisNetConfig(d_embed=4, d_hidden=6),
]
EXPLICIT = [
    TransformerXLConfig(**TRANSFORMER, num_layers=3),
    TransformerXLConfig(**TRANSFORMER, num_layers=3, tied=True),
    TrellisNetConfig(d_embed=4, d_hidden=6, num_layers=3),
    TCNConfig(d_model=6, num_blocks=2),
    RecurrentConfig(unit="gru", d_embedding=4, d_hidden=6, num_layers=2),
]


def name_of(config: Any) -> str:
    kinds = ("tied", "attention_window")
    name = type(config).__name__ + ("-pre" if getattr(config, "norm", "") == "pre" else "")
    return name + "".join(f"-{kind}" for kind in kinds if getattr(config, kind, None))


def test_operations_of_a_deq_transformer_by_hand():
    found = cost(DEQTransformerConfig(**TRANSFORMER).build(V), B, L, M)
    keys = L + M
    projections = L * (3 * D * D + D * D + 2 * D * 20)
    attention = 2 * L * keys * D + L * keys * D  # scores, values; distances
    assert found.flops_per_evaluation == 2 * B * (projections + attention)
    injected = B * L * 3 * D * D
    memory = B * M * 2 * D * D
    positions = keys * D * D
    softmax = B * L * D * V
    assert found.flops_once == 2 * (injected + memory + positions + softmax)
    assert found.flops(10) == found.flops_once + 10 * found.flops_per_evaluation


def run(model: Any, memory_length: int = 0) -> tuple[Any, int]:
    """The output of a training step on the CPU, and the bytes that its graph saves."""
    tokens = torch.arange(B * L).view(B, L) % V
    memory = model(tokens, memory_length=memory_length).memory if memory_length else None
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Any] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(tokens, memory, targets=tokens)
    assert output.losses is not None
    return output, sum(kept.values())


def counted(model: Any, memory_length: int = 0) -> int:
    """Operations that the counter sees on the CPU, whose fused attention it does not know."""
    tokens = torch.arange(B * L).view(B, L) % V
    memory = model(tokens, memory_length=memory_length).memory if memory_length else None
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(tokens, memory, targets=tokens)
    return counter.get_total_flops()


@pytest.mark.parametrize("memory_length", [0, M])
@pytest.mark.parametrize("config", EXPLICIT, ids=name_of)
def test_operations_and_bytes_are_those_of_a_run(config, memory_length):
    model = config.build(V).train()
    found = cost(model, B, L, memory_length)
    assert found.flops() == counted(model, memory_length)
    _, kept = run(model, memory_length)
    assert found.bytes_per_evaluation == found.bytes_per_state == 0
    assert kept == pytest.approx(found.bytes_kept(), rel=0.01)


@pytest.mark.parametrize("memory_length", [0, M])
@pytest.mark.parametrize("config", DEQS, ids=name_of)
def test_an_implicit_step_keeps_one_evaluation(config, memory_length):
    """Whose solve takes several, by a solver that makes no matrix products of its own."""
    solve = SolveConfig(solver=Picard(), max_steps=4, rtol=1e-12)
    model = replace(config, solve=solve).build(V).train()
    found = cost(model, B, L, memory_length)
    output, kept = run(model, memory_length)
    assert output.solution.num_evals == 6
    assert kept == pytest.approx(found.bytes_kept(), rel=0.015)
    assert counted(model, memory_length) == found.flops(5)  # nothing is recorded without gradients


@pytest.mark.parametrize("config", DEQS, ids=name_of)
def test_unrolled_steps_keep_all_evaluations(config):
    solve = SolveConfig(solver=Picard(), max_steps=6, rtol=1e-12, adjoint=Unrolled())
    model = replace(config, solve=solve).build(V).train()
    output, kept = run(model)
    assert output.solution.num_steps.max() == 6
    found = cost(model, B, L).bytes_kept(6)
    # The first evaluation is of a state without a gradient and keeps less; on the other hand
    # a tape has the injection once and no state of its own.
    assert kept <= found <= 1.15 * kept


@pytest.mark.parametrize("length", [None, 3])
def test_bytes_of_a_state(length):
    """Hidden and memory cells, of all parts of a segment that is solved in parts."""
    config = DEQTrellisNetConfig(d_embed=4, d_hidden=6, subsequence_length=length)
    assert cost(config.build(V), B, L).bytes_per_state == 4 * B * L * 2 * 10
    assert cost(DEQS[0].build(V).double(), B, L).bytes_per_state == 8 * B * L * D


@pytest.mark.parametrize(
    ("deq", "layers"), [(DEQS[0], EXPLICIT[1]), (DEQS[-1], EXPLICIT[2])], ids=["xl", "trellis"]
)
def test_a_deq_of_so_many_evaluations_is_a_model_of_so_many_tied_layers(deq, layers):
    one, other = cost(deq.build(V), B, L), cost(layers.build(V), B, L)
    assert one.flops(layers.num_layers) == other.flops_once
    deeper = cost(replace(layers, num_layers=layers.num_layers + 1).build(V), B, L)
    assert deeper.bytes_once - other.bytes_once == one.bytes_per_evaluation
    assert one.num_parameters == other.num_parameters


def test_operations_of_a_recurrent_network():
    """Whose layer is one fused call on the CPU, and taken apart on the meta device."""
    config = RecurrentConfig(unit="lstm", d_embedding=4, d_hidden=6)
    gates, softmax = 4 * 6 * (4 + 6), 6 * V
    assert cost(config.build(V), B, L).flops() == 2 * B * L * (gates + softmax)


def test_what_depends_on_the_text_is_an_upper_bound():
    """Of a real text, in which no word is in all clusters."""
    solve = SolveConfig(solver=Picard(), max_steps=4, rtol=1e-12)
    config = DEQTransformerConfig(**TRANSFORMER, cutoffs=(4, 8), div_val=2, solve=solve)
    model = config.build(V).train()
    found = cost(model, B, L)
    assert counted(model) < found.flops(5) < 1.2 * counted(model)
    _, kept = run(model)
    assert kept < found.bytes_kept() < 1.3 * kept


def test_large_models_take_no_memory():
    """Nor does one that is solved in parts."""
    with torch.device("meta"):
        trellis = recipes.load("wt103-deq-trellisnet").experiment.model.build(267_735)
    convolution = 2 * (2 * 2_000) * (4 * 2_000)
    assert cost(trellis, 1, 100).flops_per_evaluation == 100 * convolution
    with torch.device("meta"):
        model = recipes.load("wt103-deq-transformer").experiment.model.build(267_735)
    found = cost(model, 1, 150, 150)
    assert found.num_parameters == model.num_parameters()
    assert found.flops_per_evaluation == pytest.approx(2 * 150 * 69.5e6, rel=0.05)
    with pytest.raises(UserError, match="batch=0"):
        cost(model, 0, 150)
