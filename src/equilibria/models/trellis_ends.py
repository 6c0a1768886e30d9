"""What is before and after the cell of a TrellisNet language model.

Shape suffixes: B batch, L length, E d_embed, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer
from equilibria.layers.embedding_dropout import EmbeddingDropout
from equilibria.layers.mixture_of_softmaxes import MixtureOfSoftmaxes
from equilibria.layers.variational_dropout import variational_mask
from equilibria.models.output import FullSoftmax, Softmax
from equilibria.models.trellis_cell import Memory, TrellisConfig


class TrellisEnds(nn.Module):
    """Embedding in front, and a softmax with its weights on the last part of the hidden state.

    Args:
        config: hyper-parameters.
        vocabulary_size: number of token ids (V).
    """

    def __init__(self, config: TrellisConfig, vocabulary_size: int) -> None:
        super().__init__()
        check_positive_integer("vocabulary_size", vocabulary_size)
        self.config = config
        self.embedding = nn.Embedding(vocabulary_size, config.d_embed)
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        # In a tuple: it has the embedding inside, which is to have one name only.
        self._dropped = (EmbeddingDropout(self.embedding, config.embedding_dropout),)
        self.mixture = self.output_bias = None
        if config.num_softmaxes > 1:
            self.mixture = MixtureOfSoftmaxes(
                self.embedding,
                config.d_embed,
                config.num_softmaxes,
                dropout=config.mixture_dropout,
            )
        else:
            self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """Embeddings (B, L, E), some of which are dropped in training."""
        embedded = self._dropped[0].train(self.training)(tokens_BL)
        return self._drop(embedded, self.config.input_dropout)

    def output_of(self, h: Tensor) -> Tensor:
        """The part of the hidden state (B, L, E) that the softmax sees."""
        return self._drop(h[..., -self.config.d_embed :], self.config.output_dropout)

    @property
    def softmax(self) -> Softmax:
        """The last layer, which shares its weights with the embedding."""
        return (
            self.mixture
            if self.mixture is not None
            else FullSoftmax(self.embedding.weight, self.output_bias)
        )

    def memory_from(self, tensors: Sequence[Tensor]) -> Memory:
        """Rebuild a memory from its tensors, in the order in which it iterates.

        Raises:
            UserError: other tensors than a memory of this model holds.
        """
        state, embed = self.config.d_state, self.config.d_embed
        if [t.shape[-1] for t in tensors if t.dim() == 3] != [state, state, embed]:
            raise UserError(
                f"the saved memory has shapes {[tuple(t.shape) for t in tensors]}, this model "
                f"needs two of (batch, 1, {state}) and one of (batch, 1, {embed}); the checkpoint "
                "belongs to another model"
            )
        return Memory(*tensors)

    def num_parameters(self, *, embedding: bool = True) -> int:
        """Number of trainable scalars, with or without those of embedding and softmax."""
        total = sum(p.numel() for p in self.parameters() if p.requires_grad)
        if embedding:
            return total
        ends = [self.embedding.weight]
        if self.mixture is not None:
            ends += self.mixture.parameters()
        if self.output_bias is not None:
            ends.append(self.output_bias)
        return total - sum(p.numel() for p in ends if p.requires_grad)

    def _drop(self, x: Tensor, probability: float) -> Tensor:
        mask = variational_mask(x, x.shape[-1], probability, self.training)
        return x if mask is None else x * mask
