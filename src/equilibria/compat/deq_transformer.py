"""DEQ-Transformers of the first public code, version 1 (.pkl) and 2 (.pth)."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from equilibria.compat.tensors import OldTensors
from equilibria.core.errors import UserError
from equilibria.models.deq_transformer import DEQTransformerConfig

_BLOCK, _CELL = "func", "deq.cell"
_LAYERS = {
    "dec_attn.qkv_net": "qkv",
    "dec_attn.o_net": "output",
    "pos_ff.ff1_net": "expand",
    "pos_ff.ff2_net": "contract",
}
"""Whose weights can be split into direction and length, with us as there."""


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
    heads, d_head = old.tell(f"{_BLOCK}.dec_attn.r_w_bias", "heads", "width of a head")
    d_model = heads * d_head
    (d_inner,) = old.tell(f"{_BLOCK}.pos_ff.ff1_net.bias", "inner width")
    weight_norm = f"{_BLOCK}.dec_attn.qkv_net.weight_g" in old.tensors
    weights = _block(old, (heads, d_head), d_inner, weight_norm=weight_norm)
    for part, shape in (("weight", (3 * d_model, d_model)), ("bias", (3 * d_model,))):
        becomes = f"{_CELL}.injection.{part}"
        weights[becomes] = old.take(f"inject_conv.{part}", becomes, shape)
    ends = convert_ends(old, weights, d_model)
    old.leave("pos_emb.inv_freq", "a constant")
    for copied in ("func_copy.", "deq."):
        old.leave(copied, "a copy of the block")
    old.check_all_used()
    made = replace(
        config,
        d_model=d_model,
        num_heads=heads,
        d_inner=d_inner,
        weight_norm=weight_norm,
        attention_bias=True,
        **ends,
    )
    return made, weights


def _block(
    old: OldTensors, heads: tuple[int, int], d_inner: int, *, weight_norm: bool
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for there, here in (("r_w_bias", "content_bias"), ("r_r_bias", "position_bias")):
        becomes = f"{_CELL}.{here}"
        found[becomes] = old.take(f"{_BLOCK}.dec_attn.{there}", becomes, heads)
    width = heads[0] * heads[1]
    shapes = {
        "qkv": (3 * width, width),
        "output": (width, width),
        "expand": (d_inner, width),
        "contract": (width, d_inner),
    }
    for there, here in _LAYERS.items():
        name, becomes, shape = f"{_BLOCK}.{there}", f"{_CELL}.{here}", shapes[here]
        if weight_norm:
            v, g = old.direction_and_length(f"{name}.weight", f"{becomes}.weight", shape)
            split = f"{becomes}.parametrizations.weight"
            found[f"{split}.original0"], found[f"{split}.original1"] = g, v
        else:
            found[f"{becomes}.weight"] = old.take(f"{name}.weight", f"{becomes}.weight", shape)
        if here != "qkv":
            found[f"{becomes}.bias"] = old.take(f"{name}.bias", f"{becomes}.bias", shape[:1])
    becomes = f"{_CELL}.position.weight"
    found[becomes] = old.weight(f"{_BLOCK}.dec_attn.r_net.weight", becomes, (width, width))
    return found


def convert_ends(old: OldTensors, weights: dict[str, Tensor], d_model: int) -> dict[str, Any]:
    """Put embedding and softmax beside the other weights.

    The options of the configuration that the tensors tell.
    """
    projected = "word_emb.emb_projs.0.weight" in old.tensors
    embeddings = _embeddings(old, d_model, projected=projected)
    own = _projected(old, weights, embeddings, d_model) if projected else False
    if not projected:
        weights["embedding.weight"] = embeddings[0]
        weights["output_bias"] = _output(old, 0, embeddings[0], "output_bias", "embedding.weight")
        old.leave("crit.cluster", "there are no clusters")
    d_embed = embeddings[0].shape[1]
    if projected and len(embeddings) == 1 and d_embed == d_model:
        d_embed = _widened(old, weights)
    return {
        "cutoffs": _cutoffs(embeddings),
        "d_embed": d_embed,
        "div_val": _div_val(embeddings),
        "tie_first_projection": not own,
        "tie_tail_projections": True,
    }


def _embeddings(old: OldTensors, d_model: int, *, projected: bool) -> list[Tensor]:
    """Of all clusters."""
    found: list[Tensor] = []
    while (name := f"word_emb.emb_layers.{len(found)}.weight") in old.tensors or not found:
        tokens, width = old.tell(name, "tokens", "width")
        becomes = f"embedding.weights.{len(found)}" if projected else "embedding.weight"
        found.append(old.take(name, becomes, (tokens, width if projected else d_model)))
    if len(found) == 1 and "crit.cluster_weight" in old.tensors:
        raise UserError(
            "the checkpoint has clusters of one width (--adaptive without --div_val), whose "
            "cut-offs no tensor tells; this form is not converted"
        )
    number = sum(name.startswith("word_emb.emb_projs.") for name in old.tensors)
    if len(found) != number and (number or len(found) > 1):
        raise UserError(
            f"the embedding has {len(found)} clusters (word_emb.emb_layers) and {number} "
            "projections (word_emb.emb_projs); the checkpoint is damaged or belongs to another "
            "model"
        )
    return found


def _projected(
    old: OldTensors, weights: dict[str, Tensor], embeddings: list[Tensor], d_model: int
) -> bool:
    """Clusters with projections; whether the first of the softmax is its own."""
    biases: list[Tensor] = []
    own = False
    for i, embedding in enumerate(embeddings):
        shape = (d_model, embedding.shape[1])
        here, there = f"embedding.projections.{i}", f"crit.out_projs.{i}.weight"
        projection = old.take(f"word_emb.emb_projs.{i}.weight", here, shape)
        weights[f"embedding.weights.{i}"], weights[here] = embedding, projection
        biases.append(_output(old, i, embedding, "adaptive_softmax.bias", f"embedding.weights.{i}"))
        if i > 0:
            _same(old, there, projection, here)
            continue
        first = old.take(there, "adaptive_softmax.projection", shape)
        own = not torch.equal(first, projection)
        if own:
            weights["adaptive_softmax.projection"] = first
        else:
            old.mapped[there] = f"{here}, shared"
    weights["adaptive_softmax.bias"] = torch.cat(biases)
    if len(embeddings) > 1:
        # There the last cluster comes first.
        number, width = len(embeddings) - 1, embeddings[0].shape[1]
        for part, shape in (("weight", (number, width)), ("bias", (number,))):
            becomes = f"adaptive_softmax.cluster_{part}"
            taken = old.take(f"crit.cluster_{part}", f"{becomes}, in reverse", shape)
            weights[becomes] = taken.flip(0)
    return own


def _widened(old: OldTensors, weights: dict[str, Tensor]) -> int:
    """Another width of the embedding, by a column of zeros here and in the projections.

    A single cluster that is as wide as the model has no projection with us. The old code has one
    (--div_val without --adaptive); with the column the model computes the same.
    """
    wide = ("embedding.weights.0", "embedding.projections.0", "adaptive_softmax.projection")
    for name in wide:
        if name in weights:
            weights[name] = F.pad(weights[name], (0, 1))
    for name, becomes in old.mapped.items():
        if becomes in wide:
            old.mapped[name] = f"{becomes}, and a column of zeros"
    return weights[wide[0]].shape[1]


def _output(old: OldTensors, i: int, embedding: Tensor, becomes: str, shared: str) -> Tensor:
    """The bias of a cluster of the softmax, whose weight is the embedding's."""
    _same(old, f"crit.out_layers.{i}.weight", embedding, shared)
    return old.take(f"crit.out_layers.{i}.bias", becomes, (len(embedding),))


def _same(old: OldTensors, name: str, other: Tensor, becomes: str) -> None:
    """Take a tensor that is shared with another.

    Raises:
        UserError: it is not.
    """
    if not torch.equal(old.take(name, f"{becomes}, shared", tuple(other.shape)), other):
        raise UserError(
            f"{name} is not {becomes}: the softmax has weights of its own, and ours shares them "
            "with the embedding. Models trained with --not_tied cannot be converted"
        )


def _cutoffs(embeddings: list[Tensor]) -> tuple[int, ...]:
    """Where the second and all other clusters begin."""
    ends = accumulate(len(embedding) for embedding in embeddings)
    return tuple(ends)[:-1]


def _div_val(embeddings: list[Tensor]) -> int:
    """By how much each cluster is narrower than the one before, as widths are rounded down."""
    widths = [embedding.shape[1] for embedding in embeddings]
    for div_val in range(1, widths[0] + 1):
        if [widths[0] // div_val**i for i in range(len(widths))] == widths:
            return div_val
    raise UserError(
        f"the embeddings of the clusters (word_emb.emb_layers) have widths {widths}, which are not "
        "divided by one number; the checkpoint belongs to another model"
    )
