"""Language models of torchdeq's public collection."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from equilibria.compat.deq_transformer import convert_ends
from equilibria.compat.tensors import OldTensors
from equilibria.core.errors import UserError
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
    heads, d_head = old.tensors["func.dec_attn.0.r_w_bias"].shape
    weight_norm = "func.dec_attn.0.qkv_net.weight_g" in old.tensors
    weights: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        becomes = f"{_STACK}.injection.{kind}"
        weights[becomes] = _queries_first(old.take(f"injection.{kind}", becomes), heads)
    for i in range(num_blocks):
        weights |= _block(old, i, heads, weight_norm=weight_norm)
    own_projection, ends = convert_ends(old, weights)
    old.leave("pos_emb.inv_freq", "a constant")
    old.check_all_used()
    made = replace(
        config,
        d_model=heads * d_head,
        num_heads=heads,
        d_inner=len(weights[f"{_STACK}.blocks.0.expand.bias"]),
        num_blocks=num_blocks,
        weight_norm=weight_norm,
        attention_bias=True,
        tie_first_projection=not own_projection,
        **ends,
    )
    return made, weights


def _block(old: OldTensors, i: int, heads: int, *, weight_norm: bool) -> dict[str, Tensor]:
    attention, feed = f"func.dec_attn.{i}", f"func.pos_ff.{i}"
    here = f"{_STACK}.blocks.{i}"
    found: dict[str, Tensor] = {}
    for there, name in (("r_w_bias", "content_bias"), ("r_r_bias", "position_bias")):
        found[f"{here}.{name}"] = old.take(f"{attention}.{there}", f"{here}.{name}")
    norms = (
        (f"{attention}.ln1", "norm_in"),
        (f"{attention}.ln2", "norm_heads"),
        (f"{feed}.ln", "norm_inner"),
    )
    biases = (
        (f"{attention}.o_net", "output"),
        (f"{feed}.ff1_net", "expand"),
        (f"{feed}.ff2_net", "contract"),
    )
    for there, name in norms:
        found[f"{here}.{name}.weight"] = old.take(f"{there}.weight", f"{here}.{name}.weight")
    for there, name in (*norms, *biases):
        found[f"{here}.{name}.bias"] = old.take(f"{there}.bias", f"{here}.{name}.bias")
    for there, name in ((f"{attention}.qkv_net", "qkv"), *biases):
        becomes, order = f"{here}.{name}.weight", name == "qkv"
        if not weight_norm:
            weight = old.take(f"{there}.weight", becomes)
            found[becomes] = _queries_first(weight, heads) if order else weight
            continue
        v, g = old.direction_and_length(f"{there}.weight", becomes)
        if g.numel() != len(v):
            raise UserError(
                f"{there}.weight_g has shape {tuple(g.shape)}, which is no length per row; models "
                "normalised along another dimension cannot be converted"
            )
        split = f"{here}.{name}.parametrizations.weight"
        g = g.reshape(-1, 1)
        found[f"{split}.original0"] = _queries_first(g, heads) if order else g
        found[f"{split}.original1"] = _queries_first(v, heads) if order else v
    position = f"{here}.position.weight"
    # There it is normalised, too; here it is not, and has the product.
    found[position] = old.weight(f"{attention}.r_net.weight", position)
    return found


def _queries_first(rows: Tensor, heads: int) -> Tensor:
    """Rows ordered by head and then query, key, value, in the other order: (3 D, ...)."""
    split = rows.unflatten(0, (heads, 3, -1))
    return torch.cat([split[:, i].flatten(0, 1) for i in range(3)])
