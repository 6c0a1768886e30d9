"""TCN: temporal convolutional network, the explicit convolutional baseline.

Residual blocks of two dilated causal convolutions each; the dilation doubles from block to block.

    y = relu(x + F(x)),   F = (dropout, relu, conv) o (dropout, relu, conv)

With kernel size k and n blocks, position t sees itself and 2 (k - 1) (2^n - 1) positions before.

Shape suffixes: B batch, L length, M length of the memory, D d_model, V vocabulary.

Source: Bai, Kolter, Koltun, An empirical evaluation of generic convolutional and recurrent
networks for sequence modeling, arXiv 1803.01271, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.api import SolveSettings
from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer
from equilibria.layers.variational_dropout import check_dropout
from equilibria.models.config import ModelConfig
from equilibria.models.explicit import count_parameters, refuse_solve
from equilibria.models.output import FullSoftmax, LanguageModelOutput
from equilibria.normalizations.weight_norm import add_weight_norm


@dataclass(frozen=True)
class TCNConfig(ModelConfig):
    """Hyper-parameters of a TCN of one width."""

    d_model: int = 64
    """Width of embeddings and hidden states."""
    num_blocks: int = 6
    """Residual blocks."""
    kernel_size: int = 8
    """Positions that a convolution sees, `dilation` apart."""
    dropout: float = 0.0
    """Ordinary dropout of whole channels after each convolution."""
    init_std: float = 0.01
    """Standard deviation of the initial kernels, as in the reference."""

    def __post_init__(self) -> None:
        for name in ("d_model", "num_blocks"):
            check_positive_integer(name, getattr(self, name))
        if self.kernel_size < 2:
            raise UserError(
                f"kernel_size={self.kernel_size} sees no earlier position; give at least 2"
            )
        check_dropout("dropout", self.dropout)
        if not self.init_std > 0:
            raise UserError(f"init_std={self.init_std} must be above 0")

    @property
    def receptive_field(self) -> int:
        """Positions that an output depends on, its own included."""
        return 1 + 2 * (self.kernel_size - 1) * (2**self.num_blocks - 1)

    def build(self, vocabulary_size: int) -> TCN:
        """Make the model with freshly drawn parameters."""
        return TCN(self, vocabulary_size)


class CausalConvolution(nn.Module):
    """A weight-normed convolution (B, D, L) -> (B, D, L) that never looks ahead."""

    def __init__(self, width: int, kernel_size: int, dilation: int, init_std: float) -> None:
        super().__init__()
        self.padding = (kernel_size - 1) * dilation
        self.convolution = nn.Conv1d(width, width, kernel_size, dilation=dilation)
        nn.init.normal_(self.convolution.weight, std=init_std)
        add_weight_norm(self.convolution)

    def forward(self, x: Tensor) -> Tensor:
        """Pad with zeros on the left only."""
        return self.convolution(F.pad(x, (self.padding, 0)))


class _Block(nn.Module):
    """Two causal convolutions and a residual."""

    def __init__(self, config: TCNConfig, dilation: int) -> None:
        super().__init__()
        size = (config.d_model, config.kernel_size, dilation, config.init_std)
        self.first = CausalConvolution(*size)
        self.second = CausalConvolution(*size)
        self.dropout = nn.Dropout1d(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: (B, D, L) -> (B, D, L)."""
        inner = self.dropout(F.relu(self.first(x)))
        return F.relu(x + self.dropout(F.relu(self.second(inner))))


class TCN(nn.Module):
    """Language model: embedding, residual blocks of causal convolutions, linear output layer.

    Args:
        config: hyper-parameters.
        vocabulary_size: number of token ids (V).
    """

    def __init__(self, config: TCNConfig, vocabulary_size: int) -> None:
        super().__init__()
        check_positive_integer("vocabulary_size", vocabulary_size)
        self.config = config
        self.embedding = nn.Embedding(vocabulary_size, config.d_model)
        self.blocks = nn.Sequential(*(_Block(config, 2**i) for i in range(config.num_blocks)))
        self.output = nn.Linear(config.d_model, vocabulary_size)

    def forward(
        self,
        tokens: Tensor,
        memory: Sequence[Tensor] | None = None,
        *,
        targets: Tensor | None = None,
        memory_length: int = 0,
        settings: SolveSettings | None = None,
        trace: bool = False,
    ) -> LanguageModelOutput:
        """Predict the token after each of `tokens` (B, L).

        Args:
            tokens: ids, int64.
            memory: ids (B, M) that came before, read again; None at the start of a text.
            targets: ids (B, L) to be predicted, whose losses are then returned, not the logits.
            memory_length: ids to keep for the next segment; the receptive field less one makes
                segments equal to the whole text.
            settings: must be None, there is nothing to solve.
            trace: no effect, likewise.
        """
        refuse_solve(self, settings)
        text = torch.cat((memory[0], tokens), dim=1) if memory else tokens
        hidden = self.blocks(self.embedding(text).transpose(1, 2)).transpose(1, 2)
        hidden = hidden[:, text.shape[1] - tokens.shape[1] :]
        kept = text[:, max(text.shape[1] - memory_length, 0) :].contiguous()
        softmax = FullSoftmax(self.output.weight, self.output.bias)
        return LanguageModelOutput.of(hidden, softmax, targets, (kept,) if memory_length else ())

    def memory_from(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Rebuild a memory from its ids (B, M).

        Raises:
            UserError: other tensors than a memory of this model holds.
        """
        if len(tensors) != 1 or tensors[0].dim() != 2 or tensors[0].is_floating_point():
            raise UserError(
                f"the saved memory has shapes {[tuple(t.shape) for t in tensors]}, this model "
                "needs ids (batch, length); the checkpoint belongs to another model"
            )
        ids, size = tensors[0], self.embedding.num_embeddings
        # Not on a GPU, which would be waited for in every step; saved ones are on the CPU first.
        if ids.dtype not in (torch.int64, torch.int32) or (
            ids.device.type == "cpu" and ((ids < 0) | (ids >= size)).any()
        ):
            raise UserError(
                f"the saved memory has other ids than 0 to {size - 1}; the checkpoint belongs to "
                "another model"
            )
        return tuple(tensors)

    def num_parameters(self, *, embedding: bool = True) -> int:
        """Number of trainable scalars, with or without the embedding."""
        return count_parameters(self, self.embedding, with_embedding=embedding)
