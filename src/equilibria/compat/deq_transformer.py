"""DEQ-Transformers of the first public code, version 1 (.pkl) and 2 (.pth)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from equilibria.compat.tensors import OldTensors
from equilibria.core.errors import UserError
from equilibria.models.deq_transformer import DEQTransformerConfig

_BLOCK, _CELL = "func", "deq.cell"
_WEIGHTS = {
    "dec_attn.qkv_net": "qkv",
    "dec_attn.o_net": "output",
    "pos_ff.ff1_net": "expand",
    "pos_ff.ff2_net": "contract",
}
"""Weights that can be split into direction and length, with us as there."""


def is_transformer(old: OldTensors) -> bool:
    """Whether a checkpoint is one."""
    return "inject_conv.weight" in old.tensors


def convert_transformer(
    old: OldTensors, config: DEQTransformerConfig
) -> tuple[DEQTransformerConfig, dict[str, Tensor]]:
    """Configuration and weights of the same model here.

    What the tensors tell (widths, heads, clusters, weight norm, biases) replaces what is in
    `config`; the place of the layer norm, the attention window and the dropouts are taken from it,
    as no tensor tells.

    Raises:
        UserError: tensors are missing, foreign, or make a model that we do not have.
    """
    heads, d_head = old.take(f"{_BLOCK}.dec_attn.r_w_bias", f"{_CELL}.content_bias").shape
    d_model = heads * d_head
    weight_norm = f"{_BLOCK}.dec_attn.qkv_net.weight_g" in old.tensors
    expand = old.take(f"{_BLOCK}.pos_ff.ff1_net.bias", f"{_CELL}.expand.bias")
    weights = {
        **_block(old, weight_norm),
        f"{_CELL}.injection.weight": old.take(
            "inject_conv.weight", f"{_CELL}.injection.weight", (3 * d_model, d_model)
        ),
        f"{_CELL}.injection.bias": old.take("inject_conv.bias", f"{_CELL}.injection.bias"),
        f"{_CELL}.content_bias": old.tensors[f"{_BLOCK}.dec_attn.r_w_bias"],
        f"{_CELL}.position_bias": old.take(f"{_BLOCK}.dec_attn.r_r_bias", f"{_CELL}.position_bias"),
        f"{_CELL}.expand.bias": expand,
    }
    own_projection, ends = convert_ends(old, weights)
    old.leave("pos_emb.inv_freq", "a constant")
    for copied in ("func_copy.", "deq."):
        old.leave(copied, "a copy of the block")
    old.check_all_used()
    made = replace(
        config,
        d_model=d_model,
        num_heads=heads,
        d_inner=len(expand),
        weight_norm=weight_norm,
        attention_bias=True,
        tie_first_projection=not own_projection,
        **ends,
    )
    return made, weights


def _block(old: OldTensors, weight_norm: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for there, here in _WEIGHTS.items():
        name, becomes = f"{_BLOCK}.{there}.weight", f"{_CELL}.{here}.weight"
        if weight_norm:
            v, g = old.direction_and_length(name, becomes)
            split = f"{_CELL}.{here}.parametrizations.weight"
            found[f"{split}.original0"] = g.reshape(-1, 1)
            found[f"{split}.original1"] = v.reshape(v.shape[0], -1)
        else:
            weight = old.take(name, becomes)
            found[becomes] = weight.reshape(weight.shape[0], -1)
    for there, here in (("dec_attn.o_net", "output"), ("pos_ff.ff2_net", "contract")):
        found[f"{_CELL}.{here}.bias"] = old.take(f"{_BLOCK}.{there}.bias", f"{_CELL}.{here}.bias")
    position = old.weight(f"{_BLOCK}.dec_attn.r_net.weight", f"{_CELL}.position.weight")
    found[f"{_CELL}.position.weight"] = position.reshape(position.shape[0], -1)
    return found


def convert_ends(old: OldTensors, weights: dict[str, Tensor]) -> tuple[bool, dict[str, Any]]:
    """Put embedding and softmax beside the other weights.

    Whether the first projection of the softmax is its own, and the options of the configuration
    that the tensors tell.
    """
    embeddings = _numbered(old, "word_emb.emb_layers.{}.weight")
    projections = _numbered(old, "word_emb.emb_projs.{}.weight")
    if projections and len(projections) != len(embeddings):
        raise UserError(
            f"the embedding has {len(embeddings)} clusters and {len(projections)} projections; the "
            "checkpoint is damaged or belongs to another model"
        )
    options: dict[str, Any] = {
        "cutoffs": _cutoffs(embeddings, old),
        "d_embed": embeddings[0].shape[1],
        "div_val": _div_val(embeddings),
    }
    return _ends(old, weights, embeddings, projections), options


def _ends(
    old: OldTensors,
    weights: dict[str, Tensor],
    embeddings: list[Tensor],
    projections: list[Tensor],
) -> bool:
    """Embedding and softmax; whether the first projection of the softmax is its own."""
    if not projections:
        weights["embedding.weight"] = embeddings[0]
        weights["output_bias"] = old.take("crit.out_layers.0.bias", "output_bias")
        _same(old, "crit.out_layers.0.weight", embeddings[0], "embedding.weight")
        old.leave("crit.cluster", "there are no clusters")
        return False
    biases: list[Tensor] = []
    own = False
    for i, (embedding, projection) in enumerate(zip(embeddings, projections, strict=True)):
        weights[f"embedding.weights.{i}"] = embedding
        weights[f"embedding.projections.{i}"] = projection
        biases.append(old.take(f"crit.out_layers.{i}.bias", "adaptive_softmax.bias"))
        _same(old, f"crit.out_layers.{i}.weight", embedding, f"embedding.weights.{i}")
        name = f"crit.out_projs.{i}.weight"
        if i == 0 and not torch.equal(old.take(name, "adaptive_softmax.projection"), projection):
            weights["adaptive_softmax.projection"] = old.tensors[name]
            own = True
        elif i > 0:
            _same(old, name, projection, f"embedding.projections.{i}")
    weights["adaptive_softmax.bias"] = torch.cat(biases)
    if len(embeddings) > 1:
        # There the last cluster comes first.
        for part in ("weight", "bias"):
            becomes = f"adaptive_softmax.cluster_{part}"
            weights[becomes] = old.take(f"crit.cluster_{part}", f"{becomes}, in reverse").flip(0)
    return own


def _same(old: OldTensors, name: str, other: Tensor, becomes: str) -> None:
    """Take a tensor that is shared with another.

    Raises:
        UserError: it is not.
    """
    if not torch.equal(old.take(name, f"{becomes}, shared"), other):
        raise UserError(
            f"{name} is not {becomes}: the softmax has weights of its own, and ours shares them "
            "with the embedding. Models trained with --not_tied cannot be converted"
        )


def _numbered(old: OldTensors, pattern: str) -> list[Tensor]:
    found: list[Tensor] = []
    while (name := pattern.format(len(found))) in old.tensors:
        kind = "weights" if "emb_layers" in pattern else "projections"
        found.append(old.take(name, f"embedding.{kind}.{len(found)}"))
    return found


def _cutoffs(embeddings: list[Tensor], old: OldTensors) -> tuple[int, ...]:
    if not embeddings:
        old.take("word_emb.emb_layers.0.weight", "embedding")  # says that it is missing
    if len(embeddings) == 1 and "crit.cluster_weight" in old.tensors:
        raise UserError(
            "the checkpoint has clusters of one width (--adaptive without --div_val), whose "
            "cut-offs no tensor tells; this form is not converted"
        )
    ends = torch.tensor([len(embedding) for embedding in embeddings]).cumsum(0).tolist()
    return tuple(ends[:-1])


def _div_val(embeddings: list[Tensor]) -> int:
    """By how much each cluster is narrower than the one before, as widths are rounded down."""
    widths = [embedding.shape[1] for embedding in embeddings]
    for div_val in range(1, widths[0] + 1):
        if [widths[0] // div_val**i for i in range(len(widths))] == widths:
            return div_val
    raise UserError(f"embeddings of widths {widths} are not divided by one number")
