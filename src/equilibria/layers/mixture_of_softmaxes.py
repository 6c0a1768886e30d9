"""A softmax of more than the rank of its input.

Shape suffixes: B batch, L length, D width of the model, K softmaxes, E width of the embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.core.parameters import check_positive_integer
from equilibria.layers.adaptive_softmax import IGNORE_INDEX
from equilibria.layers.variational_dropout import check_dropout, variational_mask


class MixtureOfSoftmaxes(nn.Module):
    """Several softmaxes over the same embedding, mixed by the input.

        p(w | h) = sum_k pi_k softmax(E tanh(W_k h) + b)[w],   pi = softmax(V h + a)

    The logarithm of a mixture is not linear in h, so that the matrix of log-probabilities over all
    contexts can have more than the rank of E. Cost: K times the logits of one softmax.

    Args:
        embedding: whose weight (V, E) is shared.
        d_model: width of the input (D).
        num_softmaxes: K.
        dropout: of what is inside tanh; one mask per sample and call, shared over time.

    Raises:
        UserError: a count below 1, or a dropout that is no probability.

    References:
        Yang et al., Breaking the softmax bottleneck, arXiv 1711.03953, section 3.
    """

    def __init__(
        self, embedding: nn.Embedding, d_model: int, num_softmaxes: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_positive_integer("num_softmaxes", num_softmaxes)
        self._embedding = (embedding,)  # in a tuple: its weight has a name elsewhere
        vocabulary, width = embedding.weight.shape
        self.prior = nn.Linear(d_model, num_softmaxes)
        self.latent = nn.Linear(d_model, num_softmaxes * width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        check_dropout("dropout", dropout)
        self.dropout = dropout

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihoods (B, L) of hidden states (B, L, D), in float32.

        0 where the target is `IGNORE_INDEX`.
        """
        found = self.log_probabilities(hidden).flatten(0, -2)
        losses = F.nll_loss(found, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        return losses.view(targets.shape)

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Of every token (B, L, V), float32."""
        prior = self.prior(hidden).float().log_softmax(-1)
        latent = self.latent(hidden)
        mask = variational_mask(latent, latent.shape[-1], self.dropout, self.training)
        latent = latent if mask is None else latent * mask
        seen = torch.tanh(latent).unflatten(-1, (prior.shape[-1], -1))
        logits = F.linear(seen, self._embedding[0].weight, self.bias)
        return torch.logsumexp(prior.unsqueeze(-1) + logits.float().log_softmax(-1), dim=-2)
