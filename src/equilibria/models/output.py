"""What language models return, and how their last layer is asked."""

from __future__ import annotations

from typing import NamedTuple, Protocol, Self

import torch.nn.functional as F
from torch import Tensor

from equilibria.core.errors import UserError
from equilibria.core.solution import Solution


class Softmax(Protocol):
    """The last layer of a language model; hidden states are (B, L, D)."""

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihoods (B, L) in float32, 0 at ignored targets."""
        ...

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """Of all tokens (B, L, V), up to a constant per position."""
        ...


class FullSoftmax(NamedTuple):
    """A linear layer and the softmax of all of it, by its weights (V, D) and bias (V,)."""

    weight: Tensor
    bias: Tensor | None

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihoods (B, L) in float32."""
        flat = self.log_probabilities(hidden).flatten(0, 1).float()
        losses = F.cross_entropy(flat, targets.flatten(), reduction="none")
        return losses.view(targets.shape)

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """The logits, which are log-probabilities up to a constant."""
        return F.linear(hidden, self.weight, self.bias)


class LanguageModelOutput(NamedTuple):
    """What a language model says of a segment."""

    memory: tuple[Tensor, ...]
    """For the next segment."""
    solution: Solution | None = None
    """How the solve went; None of an explicit model."""
    losses: Tensor | None = None
    """Negative log-likelihoods (B, L) of the targets, if there were any."""
    unnormalised: Tensor | None = None
    """What `logits` returns."""

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        softmax: Softmax,
        targets: Tensor | None,
        memory: tuple[Tensor, ...],
        solution: Solution | None = None,
    ) -> Self:
        """Losses where there are targets, for which not all logits may be needed, else logits."""
        if targets is None:
            return cls(memory, solution, unnormalised=softmax.log_probabilities(hidden))
        return cls(memory, solution, losses=softmax.losses(hidden, targets))

    @property
    def logits(self) -> Tensor:
        """Log-probabilities (B, L, V) up to a constant per position.

        Raises:
            UserError: the model was given targets.
        """
        if self.unnormalised is None:
            raise UserError(
                "the model was called with targets and has computed their losses, not the logits "
                "of the whole vocabulary; call it without targets"
            )
        return self.unnormalised
