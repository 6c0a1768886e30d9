"""Parameters, operations and memory of models, against counting by hand and by running."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from equilibria import UserError, recipes
from equilibria.models.accounting import cost
from equilibria.models.deq_transformer import DEQTransformerConfig
from equilibria.models.deq_trellisnet import DEQTrellisNetConfig
from equilibria.models.recurrent import RecurrentConfig
from equilibria.models.tcn import TCNConfig
from equilibria.models.transformer_xl import TransformerXLConfig
from equilibria.models.trellisnet import TrellisNetConfig

B, L, M, D, V = 3, 7, 5, 8, 11
TRANSFORMER: dict[str, Any] = {"d_model": D, "num_heads": 2, "d_inner": 20}
MODELS = [DEQTransformerConfig(**TRANSFORMER), DEQTrellisNetConfig(d_embed=4, d_hidden=6)]
EXPLICIT = [
    TransformerXLConfig(**TRANSFORMER, num_layers=3),
    TransformerXLConfig(**TRANSFORMER, num_layers=3, tied=True),
    TrellisNetConfig(d_embed=4, d_hidden=6, num_layers=3),
    TCNConfig(d_model=6, num_blocks=2),
]


def name_of(config: Any) -> str:
    return f"{type(config).__name__}{'-tied' if getattr(config, 'tied', False) else ''}"


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


@pytest.mark.parametrize("config", EXPLICIT, ids=name_of)
def test_operations_and_bytes_are_those_of_a_run(config):
    """Storages that a real graph saves, and operations that the counter sees on the CPU."""
    model = config.build(V).train()
    tokens = torch.zeros(B, L, dtype=torch.int64)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Any] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        FlopCounterMode(display=False) as counter,
    ):
        output = model(tokens, targets=tokens)
    assert output.losses is not None
    found = cost(model, B, L)
    assert found.flops() == counter.get_total_flops()
    assert sum(kept.values()) == pytest.approx(found.bytes_once, rel=0.1)


@pytest.mark.parametrize(
    ("deq", "layers"), [(MODELS[0], EXPLICIT[1]), (MODELS[1], EXPLICIT[2])], ids=["xl", "trellis"]
)
def test_a_deq_of_so_many_evaluations_is_a_model_of_so_many_tied_layers(deq, layers):
    one, other = cost(deq.build(V), B, L), cost(layers.build(V), B, L)
    assert one.flops(layers.num_layers) == other.flops_once
    kept = one.bytes_once + layers.num_layers * one.bytes_per_evaluation
    assert kept == pytest.approx(other.bytes_once, rel=0.15)  # the first layer needs less
    assert one.num_parameters == other.num_parameters


def test_operations_of_a_recurrent_network():
    """Whose layer is one fused call on the CPU, and taken apart on the meta device."""
    config = RecurrentConfig(unit="lstm", d_embedding=4, d_hidden=6)
    gates, softmax = 4 * 6 * (4 + 6), 6 * V
    assert cost(config.build(V), B, L).flops() == 2 * B * L * (gates + softmax)


def test_what_depends_on_the_text_is_an_upper_bound():
    config = DEQTransformerConfig(**TRANSFORMER, cutoffs=(4, 8), div_val=2)
    assert (
        cost(config.build(V), B, L).flops_once
        > cost(DEQTransformerConfig(**TRANSFORMER).build(V), B, L).flops_once * 0.5
    )


def test_large_models_take_no_memory():
    with torch.device("meta"):
        model = recipes.load("wt103-deq-transformer").experiment.model.build(267_735)
    found = cost(model, 1, 150, 150)
    assert found.num_parameters == model.num_parameters()
    assert found.flops_per_evaluation == pytest.approx(2 * 150 * 69.5e6, rel=0.05)
    with pytest.raises(UserError, match="batch=0"):
        cost(model, 0, 150)
