"""Embeddings that are wide for frequent tokens and narrow for rare ones.

Shape suffixes: B batch, L length, D width of the model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer


class AdaptiveEmbedding(nn.Module):
    """Clusters of tokens by frequency, each with an embedding of its own width.

        embed(w) = sqrt(D) P_i E_i[w],   w in cluster i = [cutoff_{i-1}, cutoff_i),
        E_i: (size_i, d_embed / div_val^i),   P_i: (D, d_embed / div_val^i)

    Token ids have to be sorted by frequency. Without cut-offs it is one embedding, with a
    projection only if its width is not that of the model.

    Args:
        vocabulary_size: number of token ids (V).
        d_model: width of what comes out (D).
        d_embed: width of the first cluster's embedding; None for that of the model.
        cutoffs: where the second and all other clusters begin, ascending.
        div_val: every cluster's embedding is so many times narrower than the one before.
        init_std: of the initial embeddings and projections.

    Raises:
        UserError: cut-offs that are not ascending within the vocabulary, a width that is no
            positive integer or that div_val brings to nothing.
        IndexError: in a call, an id outside of the vocabulary, as of `nn.Embedding`.

    References:
        Baevski and Auli, Adaptive input representations for neural language modeling, arXiv
        1809.10853, section 3. Dai et al., Transformer-XL, arXiv 1901.02860, for the projections.
    """

    def __init__(
        self,
        vocabulary_size: int,
        d_model: int,
        *,
        d_embed: int | None = None,
        cutoffs: Sequence[int] = (),
        div_val: int = 1,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_positive_integer("vocabulary_size", vocabulary_size)
        check_positive_integer("d_model", d_model)
        check_cutoffs(cutoffs, vocabulary_size)
        self.edges = (0, *cutoffs, vocabulary_size)
        self.d_model = d_model
        d_embed = d_model if d_embed is None else d_embed
        widths = cluster_widths(d_embed, len(cutoffs) + 1, div_val)
        self.weights = nn.ParameterList(
            torch.empty(end - begin, width)
            for (begin, end), width in zip(pairwise(self.edges), widths, strict=True)
        )
        projected = len(widths) > 1 or widths[0] != d_model
        self.projections = nn.ParameterList(
            torch.empty(d_model, width) for width in (widths if projected else ())
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=init_std)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Embed ids (B, L) to (B, L, D)."""
        if not self.projections:
            return F.embedding(tokens_BL, self.weights[0]) * math.sqrt(self.d_model)
        tokens = tokens_BL.flatten()
        embedded = self.projections[0].new_zeros(tokens.shape[0], self.d_model)
        for i, begin in enumerate(self.edges[:-1]):
            rows = rows_of_cluster(i, tokens, self.edges)
            # Also where there are none, so that every parameter has a gradient on every rank.
            vectors = F.linear(
                F.embedding(tokens[rows] - begin, self.weights[i]), self.projections[i]
            )
            embedded = embedded.index_copy(0, rows, vectors.to(embedded.dtype))
        return embedded.view(*tokens_BL.shape, self.d_model) * math.sqrt(self.d_model)


def rows_of_cluster(i: int, ids: Tensor, edges: Sequence[int]) -> Tensor:
    """Places (n,) of the ids (N,) that are in cluster i, which ends at edges[i + 1].

    Ids outside of the vocabulary are in the first or the last cluster, whose table refuses them.
    """
    inside = torch.ones_like(ids, dtype=torch.bool)
    if i > 0:
        inside = ids >= edges[i]
    if i + 2 < len(edges):
        inside = inside & (ids < edges[i + 1])
    return inside.nonzero().squeeze(1)


def check_cutoffs(cutoffs: Sequence[int], vocabulary_size: int) -> None:
    """Raise UserError unless they are ascending and inside of the vocabulary."""
    for cutoff in cutoffs:
        check_positive_integer("a cutoff", cutoff)
    edges = (0, *cutoffs, vocabulary_size)
    if any(one >= other for one, other in pairwise(edges)):
        raise UserError(
            f"cutoffs={tuple(cutoffs)} do not cut a vocabulary of {vocabulary_size} into clusters; "
            f"give ascending numbers between 1 and {vocabulary_size - 1}, or none"
        )


def cluster_widths(d_embed: int, num_clusters: int, div_val: int) -> list[int]:
    """Widths of the clusters' embeddings.

    Raises:
        UserError: one of them would be 0.
    """
    check_positive_integer("d_embed", d_embed)
    check_positive_integer("div_val", div_val)
    widths = [d_embed // div_val**i for i in range(num_clusters)]
    if widths[-1] < 1:
        raise UserError(
            f"div_val={div_val} leaves nothing of d_embed={d_embed} for cluster {num_clusters}; "
            "give a smaller div_val or fewer cutoffs"
        )
    return widths
