"""A softmax over many tokens of which most are rare.

Shape suffixes: B batch, L length, D width of the model, V vocabulary, N = B L positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.core.errors import UserError
from equilibria.layers.adaptive_embedding import AdaptiveEmbedding, rows_of_cluster

IGNORE_INDEX = -100
"""Target at which there is nothing to predict, as in PyTorch's cross entropy."""


class AdaptiveSoftmax(nn.Module):
    """First whether a token is frequent or which cluster it is in, then which token of it.

        p(w | h) = softmax(h_0 [E_0; C]^T + b)[w]                              w frequent
        p(w | h) = softmax(h_0 [E_0; C]^T + b)[cluster i] softmax(h_i E_i^T + b_i)[w]

    with h_i = P_i^T h. The embeddings E_i are those of an `AdaptiveEmbedding`, and so are the
    projections P_i, unless they are untied. PyTorch's own `nn.AdaptiveLogSoftmaxWithLoss` cannot
    share weights with an embedding.

    Cost: the losses of N positions take the frequent tokens' logits for all of them, and those of a
    cluster for the positions alone whose target is in it.

    Args:
        embedding: whose weights are shared.
        tie_first_projection: whether P_0 is shared, too. Transformer-XL's WikiText-103 models have
            one of their own.
        tie_tail_projections: whether the P_i of all other clusters are shared.
        init_std: of what is not shared.

    Raises:
        UserError: a projection of one's own where the embedding has none.
        IndexError: in `losses`, a target outside of the vocabulary, as of PyTorch's cross entropy.

    References:
        Grave et al., Efficient softmax approximation for GPUs, arXiv 1609.04309. Dai et al.,
        Transformer-XL, arXiv 1901.02860.
    """

    def __init__(
        self,
        embedding: AdaptiveEmbedding,
        *,
        tie_first_projection: bool = True,
        tie_tail_projections: bool = True,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self._shared = (embedding,)  # in a tuple: its parameters are not ours
        num_clusters = len(embedding.weights) - 1
        self.bias = nn.Parameter(torch.zeros(embedding.edges[-1]))
        if not tie_first_projection and not embedding.projections:
            raise UserError(
                "tie_first_projection=False, but the embedding has the width of the model and no "
                "projection; give cutoffs or another d_embed, or leave it tied"
            )
        self.projection = None
        if not tie_first_projection:
            self.projection = nn.Parameter(torch.empty_like(embedding.projections[0]))
            nn.init.normal_(self.projection, std=init_std)
        if not tie_tail_projections and not num_clusters:
            raise UserError(
                "tie_tail_projections=False, but without cutoffs there are no clusters whose "
                "projections could be tied; give cutoffs, or leave it out"
            )
        self.tail_projections = None
        if not tie_tail_projections:
            self.tail_projections = nn.ParameterList(
                torch.empty_like(shared) for shared in embedding.projections[1:]
            )
            for own in self.tail_projections:
                nn.init.normal_(own, std=init_std)
        self.cluster_weight = self.cluster_bias = None
        if num_clusters:
            width = embedding.weights[0].shape[1]
            self.cluster_weight = nn.Parameter(torch.empty(num_clusters, width))
            nn.init.normal_(self.cluster_weight, std=init_std)
            self.cluster_bias = nn.Parameter(torch.zeros(num_clusters))

    @property
    def embedding(self) -> AdaptiveEmbedding:
        """Whose weights are shared."""
        return self._shared[0]

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihoods (B, L) of hidden states (B, L, D), in float32.

        0 where the target is `IGNORE_INDEX`.
        """
        shape, targets = targets.shape, targets.flatten()
        hidden = hidden.flatten(0, -2)
        edges = self.embedding.edges
        frequent = edges[1]
        head = self._head(hidden)
        # In the head a rare token is its cluster.
        cluster = torch.bucketize(
            targets, torch.tensor(edges[1:-1], device=targets.device), right=True
        )
        place = torch.where(cluster == 0, targets, frequent + cluster - 1)
        losses = F.nll_loss(head, place, ignore_index=IGNORE_INDEX, reduction="none")
        for i in range(1, len(self.embedding.weights)):
            rows = rows_of_cluster(i, targets, edges)
            tail = self._tail(i, hidden[rows])
            inside = F.nll_loss(tail, targets[rows] - edges[i], reduction="none")
            losses = losses.index_add(0, rows, inside)
        return losses.view(shape)

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Of every token (B, L, V), float32; for generation and a look, not for training."""
        shape, hidden = hidden.shape[:-1], hidden.flatten(0, -2)
        head, frequent = self._head(hidden), self.embedding.edges[1]
        tails = (
            head[:, frequent + i - 1].unsqueeze(1) + self._tail(i, hidden)
            for i in range(1, len(self.embedding.weights))
        )
        return torch.cat((head[:, :frequent], *tails), 1).view(*shape, -1)

    def _head(self, hidden: Tensor) -> Tensor:
        """Log-probabilities (N, frequent tokens and clusters)."""
        weight, bias = self.embedding.weights[0], self.bias[: self.embedding.edges[1]]
        if self.cluster_weight is not None and self.cluster_bias is not None:
            weight = torch.cat((weight, self.cluster_weight))
            bias = torch.cat((bias, self.cluster_bias))
        return F.linear(self._projected(0, hidden), weight, bias).float().log_softmax(-1)

    def _tail(self, i: int, hidden: Tensor) -> Tensor:
        """Log-probabilities (N, tokens of cluster i) within the cluster."""
        begin, end = self.embedding.edges[i : i + 2]
        logits = F.linear(
            self._projected(i, hidden), self.embedding.weights[i], self.bias[begin:end]
        )
        return logits.float().log_softmax(-1)

    def _projected(self, i: int, hidden: Tensor) -> Tensor:
        if not self.embedding.projections:
            return hidden
        tails = self.tail_projections
        own = self.projection if i == 0 else None if tails is None else tails[i - 1]
        return hidden @ (self.embedding.projections[i] if own is None else own)
