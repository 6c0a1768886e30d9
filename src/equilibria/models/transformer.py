"""What Transformer language models share, explicit or not: options, embedding and softmax.

Shape suffixes: B batch, L length, D d_model, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer
from equilibria.layers.adaptive_embedding import AdaptiveEmbedding, cluster_widths
from equilibria.layers.adaptive_softmax import AdaptiveSoftmax
from equilibria.layers.variational_dropout import check_dropout
from equilibria.models.config import ModelConfig
from equilibria.models.output import FullSoftmax, Softmax


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """Hyper-parameters of a block and of what is before and after it."""

    d_model: int = 128
    """Width of embeddings and hidden states."""
    num_heads: int = 4
    """Attention heads; must divide d_model."""
    d_inner: int = 512
    """Width of the feed-forward layer."""
    norm: Literal["post", "pre"] = "post"
    """Layer norm after the second residual sum (as published) or instead before the attention.
    Pre-norm needs Jacobian regularisation or few steps to train stably."""
    weight_norm: bool = True
    """Split every weight of the block into direction and length; computed once per solve."""
    dropout: float = 0.05
    """Variational dropout on the sub-layers' outputs and inside the feed-forward layer; one mask
    per sample and solve, shared over time."""
    embedding_dropout: float = 0.05
    """Ordinary dropout on the embeddings and before the output layer."""
    attention_dropout: float = 0.0
    """Dropout of the attention's weights, one mask per solve; above 0 no fused kernels are used."""
    position_dropout: float = 0.0
    """Dropout of the embedded distances, one mask per solve."""
    attention_window: int | None = None
    """Positions a query attends to, itself included; None for all of segment and memory."""
    d_embed: int | None = None
    """Width of the embeddings; None for d_model. Another one is projected."""
    cutoffs: tuple[int, ...] = ()
    """Token ids at which clusters of rarer words begin: adaptive embedding and softmax."""
    div_val: int = 1
    """Every cluster's embedding is so many times narrower than the one before."""
    attention_bias: bool = False
    """Biases of the injection and of the attention's output, which the first public code has."""
    tie_first_projection: bool = True
    """Whether the softmax shares the first cluster's projection, too."""
    tie_tail_projections: bool = True
    """Whether the softmax shares the projections of all other clusters."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    embedding_std: float | None = None
    """That of an embedding that is not adaptive; None: d_model^-0.5, by which its output, which is
    multiplied with the root of d_model, has variance 1."""

    def __post_init__(self) -> None:
        for name in ("d_model", "num_heads", "d_inner"):
            check_positive_integer(name, getattr(self, name))
        if self.d_model % self.num_heads:
            # Bounded, because a file of somebody else may say any size.
            largest = min(self.d_model, 2**16)
            divisors = [n for n in range(1, largest + 1) if self.d_model % n == 0]
            raise UserError(
                f"num_heads={self.num_heads} does not divide d_model={self.d_model}; choose a "
                f"divisor such as {min(divisors, key=lambda n: abs(n - self.num_heads))}, or "
                "another d_model"
            )
        if self.norm not in ("post", "pre"):
            raise UserError(f"norm={self.norm!r} is neither 'post' nor 'pre'")
        check_dropout("dropout", self.dropout)
        for name in ("embedding_dropout", "attention_dropout", "position_dropout"):
            check_dropout(name, getattr(self, name))
        for name in ("attention_window", "d_embed"):
            if getattr(self, name) is not None:
                check_positive_integer(name, getattr(self, name))
        cluster_widths(self.d_embed or self.d_model, len(self.cutoffs) + 1, self.div_val)
        if not self.tie_first_projection and not self.is_adaptive:
            raise UserError(
                "tie_first_projection=False, but without cutoffs or another d_embed there is no "
                "projection to tie; leave it out"
            )
        if not self.tie_tail_projections and not self.cutoffs:
            raise UserError(
                "tie_tail_projections=False, but without cutoffs there are no clusters whose "
                "projections could be tied; leave it out"
            )
        for name in ("init_std", "embedding_std"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}={value} must be above 0")

    @property
    def is_adaptive(self) -> bool:
        """Whether the embedding has clusters or a width of its own."""
        return bool(self.cutoffs) or self.d_embed not in (None, self.d_model)


class TransformerEnds(nn.Module):
    """Embedding in front, and a softmax with its weights at the end.

    With `cutoffs` or a `d_embed` of its own, both are adaptive.

    Args:
        config: hyper-parameters.
        vocabulary_size: number of token ids (V).
    """

    def __init__(self, config: TransformerConfig, vocabulary_size: int) -> None:
        super().__init__()
        check_positive_integer("vocabulary_size", vocabulary_size)
        self._d_model = config.d_model
        self.embedding = _embedding(config, vocabulary_size)
        self.dropout = nn.Dropout(config.embedding_dropout)
        if isinstance(self.embedding, AdaptiveEmbedding):
            self.adaptive_softmax = AdaptiveSoftmax(
                self.embedding,
                tie_first_projection=config.tie_first_projection,
                tie_tail_projections=config.tie_tail_projections,
                init_std=config.init_std,
            )
        else:
            self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """Embeddings (B, L, D), some of which are dropped in training."""
        embedded = self.embedding(tokens_BL)
        if not isinstance(self.embedding, AdaptiveEmbedding):
            embedded = embedded * math.sqrt(self._d_model)
        return self.dropout(embedded)

    @property
    def softmax(self) -> Softmax:
        """The last layer, which shares its weights with the embedding."""
        if isinstance(self.embedding, AdaptiveEmbedding):
            return self.adaptive_softmax
        return FullSoftmax(self.embedding.weight, self.output_bias)

    def num_parameters(self, *, embedding: bool = True) -> int:
        """Number of trainable scalars, with or without those of embedding and softmax."""
        total = sum(p.numel() for p in self.parameters() if p.requires_grad)
        if embedding:
            return total
        ends = [*self.embedding.parameters()]
        if isinstance(self.embedding, AdaptiveEmbedding):
            ends += self.adaptive_softmax.parameters()
        else:
            ends.append(self.output_bias)
        return total - sum(p.numel() for p in ends if p.requires_grad)


def _embedding(config: TransformerConfig, vocabulary_size: int) -> nn.Embedding | AdaptiveEmbedding:
    if config.is_adaptive:
        return AdaptiveEmbedding(
            vocabulary_size,
            config.d_model,
            d_embed=config.d_embed,
            cutoffs=config.cutoffs,
            div_val=config.div_val,
            init_std=config.init_std,
        )
    embedding = nn.Embedding(vocabulary_size, config.d_model)
    nn.init.normal_(embedding.weight, std=config.embedding_std or config.d_model**-0.5)
    return embedding
