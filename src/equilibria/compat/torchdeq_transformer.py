"""Language models of torchdeq's public collection."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from equilibria.compat.deq_transformer import convert_ends
from equilibria.compat.tensors import OldTensors
from equilibria.models.stacked_transformer import StackedTransformerConfig

_STACK = "stack"


def is_torchdeq_transformer(old: OldTensors) -> bool:
    """Whether a checkpoint is one."""
    return "func.dec_attn.0.r_w_bias" in old.tensors


def convert_torchdeq_transformer(
    old: OldTensors, config: StackedTransformerConfig
) -> tuple[StackedTransformerConfig, dict[str, Tensor]]:
    """Configuration and weights of the same model here.

    There queries, keys and values of a head lie side by side; here all queries come first.

    Raises:
        UserError: tensors are missing, foreign, or make a model that we do not have.
    """
    num_blocks = 0
    while f"func.dec_attn.{num_blocks}.r_w_bias" in old.tensors:
        num_blocks += 1
    heads, d_head = old.tell("func.dec_attn.0.r_w_bias", "heads", "width of a head")
    d_model = heads * d_head
    (d_inner,) = old.tell("func.pos_ff.0.ff1_net.bias", "inner width")
    weight_norm = "func.dec_attn.0.qkv_net.weight_g" in old.tensors
    weights: dict[str, Tensor] = {}
    for kind, shape in (("weight", (3 * d_model, d_model)), ("bias", (3 * d_model,))):
        becomes = f"{_STACK}.injection.{kind}"
        taken = old.take(f"injection.{kind}", becomes, shape)
        weights[becomes] = _queries_first(taken, heads)
    for i in range(num_blocks):
        weights |= _block(old, i, (heads, d_head), d_inner, weight_norm=weight_norm)
    ends = convert_ends(old, weights, d_model)
    old.leave("pos_emb.inv_freq", "a constant")
    old.check_all_used()
    made = replace(
        config,
        d_model=d_model,
        num_heads=heads,
        d_inner=d_inner,
        num_blocks=num_blocks,
        weight_norm=weight_norm,
        attention_bias=True,
        **ends,
    )
    return made, weights


def _block(
    old: OldTensors, i: int, heads: tuple[int, int], d_inner: int, *, weight_norm: bool
) -> dict[str, Tensor]:
    attention, feed = f"func.dec_attn.{i}", f"func.pos_ff.{i}"
    here, width = f"{_STACK}.blocks.{i}", heads[0] * heads[1]
    found: dict[str, Tensor] = {}
    for there, name in (("r_w_bias", "content_bias"), ("r_r_bias", "position_bias")):
        found[f"{here}.{name}"] = old.take(f"{attention}.{there}", f"{here}.{name}", heads)
    norms = (
        (f"{attention}.ln1", "norm_in"),
        (f"{attention}.ln2", "norm_heads"),
        (f"{feed}.ln", "norm_inner"),
    )
    for there, name in norms:
        for part in ("weight", "bias"):
            becomes = f"{here}.{name}.{part}"
            found[becomes] = old.take(f"{there}.{part}", becomes, (width,))
    layers = (
        (f"{attention}.qkv_net", "qkv", (3 * width, width)),
        (f"{attention}.o_net", "output", (width, width)),
        (f"{feed}.ff1_net", "expand", (d_inner, width)),
        (f"{feed}.ff2_net", "contract", (width, d_inner)),
    )
    for there, name, shape in layers:
        becomes, order = f"{here}.{name}", name == "qkv"
        if not order:
            found[f"{becomes}.bias"] = old.take(f"{there}.bias", f"{becomes}.bias", shape[:1])
        if not weight_norm:
            weight = old.take(f"{there}.weight", f"{becomes}.weight", shape)
            found[f"{becomes}.weight"] = _queries_first(weight, heads[0]) if order else weight
            continue
        v, g = old.direction_and_length(f"{there}.weight", f"{becomes}.weight", shape)
        split = f"{becomes}.parametrizations.weight"
        found[f"{split}.original0"] = _queries_first(g, heads[0]) if order else g
        found[f"{split}.original1"] = _queries_first(v, heads[0]) if order else v
    position = f"{here}.position.weight"
    # There it is normalised, too; here it is not, and has the product.
    found[position] = old.weight(f"{attention}.r_net.weight", position, (width, width))
    return found


def _queries_first(rows: Tensor, heads: int) -> Tensor:
    """Rows ordered by head and then query, key, value, in the other order: (3 D, ...)."""
    split = rows.unflatten(0, (heads, 3, -1))
    return torch.cat([split[:, i].flatten(0, 1) for i in range(3)])
