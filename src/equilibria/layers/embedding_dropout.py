"""Embedding dropout: whole words are dropped, the same ones during a whole solve."""

from __future__ import annotations

from torch import Tensor, nn

from equilibria.core.errors import UserError
from equilibria.core.scope import once
from equilibria.layers.variational_dropout import dropout_mask


class EmbeddingDropout(nn.Module):
    """An embedding some of whose words are zero in training mode, all their occurrences alike.

        out[b, l] = embedding[token[b, l]] * mask[token[b, l]]

    The softmax that shares the embedding's weight is not touched. One mask for the batch, drawn
    once per solve where it is used in one, else at every call.

    Args:
        embedding: the table (V, D).
        p: probability that a word is dropped, 0 to 1.

    Shape:
        Tokens (B, L) int64 to (B, L, D).

    References:
        Gal and Ghahramani, arXiv 1512.05287, section 4.2.
    """

    def __init__(self, embedding: nn.Embedding, p: float = 0.1) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise UserError(f"p={p} is no probability; give a number from 0 to 1")
        self.embedding = embedding
        self.p = p

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed and drop."""
        embedded = self.embedding(tokens)
        if not self.training or self.p == 0.0:
            return embedded
        weight = self.embedding.weight
        mask = once(self, lambda: dropout_mask(weight, (weight.shape[0],), self.p))
        return embedded * mask[tokens].unsqueeze(-1)
