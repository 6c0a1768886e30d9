"""LSTM and GRU, the explicit recurrent baselines.

    h_t = unit(h_{t-1}, e(token_t)),     logits_t = W h_t + b

Shape suffixes: B batch, L length, N layers, D d_hidden, V vocabulary.

References: Hochreiter and Schmidhuber, Long short-term memory, Neural Computation 9 (1997);
Cho et al., Learning phrase representations using RNN encoder-decoder, arXiv 1406.1078.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from equilibria.api import SolveSettings
from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer
from equilibria.layers.variational_dropout import check_dropout
from equilibria.models.config import ModelConfig
from equilibria.models.decoding import Prediction, Rows
from equilibria.models.explicit import count_parameters, refuse_solve
from equilibria.models.output import FullSoftmax, LanguageModelOutput

Unit = Literal["lstm", "gru"]


@dataclass(frozen=True)
class RecurrentConfig(ModelConfig):
    """Hyper-parameters of a recurrent network."""

    unit: Unit = "lstm"
    """Kind of the recurrent unit."""
    d_embedding: int = 128
    """Width of the embeddings."""
    d_hidden: int = 256
    """Width of the hidden state."""
    num_layers: int = 1
    """Recurrent layers on top of each other."""
    dropout: float = 0.0
    """Ordinary dropout on the embeddings, between the layers and before the output layer."""
    forget_bias: float = 1.0
    """Of an LSTM at the start: above 0 it begins by remembering. No effect on a GRU."""

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise UserError(f"unit={self.unit!r} is neither 'lstm' nor 'gru'")
        for name in ("d_embedding", "d_hidden", "num_layers"):
            check_positive_integer(name, getattr(self, name))
        check_dropout("dropout", self.dropout)

    def build(self, vocabulary_size: int) -> Recurrent:
        """Make the model with freshly drawn parameters."""
        return Recurrent(self, vocabulary_size)


class Recurrent(nn.Module):
    """Language model: embedding, recurrent layers, linear output layer.

    Args:
        config: hyper-parameters.
        vocabulary_size: number of token ids (V).
    """

    def __init__(self, config: RecurrentConfig, vocabulary_size: int) -> None:
        super().__init__()
        check_positive_integer("vocabulary_size", vocabulary_size)
        self.config = config
        self.embedding = nn.Embedding(vocabulary_size, config.d_embedding)
        self.layers = (nn.LSTM if config.unit == "lstm" else nn.GRU)(
            config.d_embedding,
            config.d_hidden,
            config.num_layers,
            batch_first=True,
            # torch warns when there is nothing between the layers to drop
            dropout=config.dropout if config.num_layers > 1 else 0.0,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.d_hidden, vocabulary_size)
        if config.unit == "lstm":
            self._set_forget_bias(config.forget_bias)

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
            memory: the state after the previous segment; None at the start of a text.
            targets: ids (B, L) to be predicted, whose losses are then returned, not the logits.
            memory_length: 0 to forget the state; any other number keeps it, whatever it is.
            settings: must be None, there is nothing to solve.
            trace: no effect, likewise.
        """
        refuse_solve(self, settings)
        hidden, remembered = self._read(tokens, memory)
        softmax = FullSoftmax(self.output.weight, self.output.bias)
        memory = remembered if memory_length else ()
        return LanguageModelOutput.of(self.dropout(hidden), softmax, targets, memory)

    def prefill(self, tokens: Tensor, memory_length: int) -> Prediction:
        """Read prompts (B, L); the state is kept, whatever `memory_length`."""
        return self._predicted(*self._read(tokens, None))

    def step(self, tokens: Tensor, cache: Rows) -> Prediction:
        """Read one more token of every text (B,)."""
        return self._predicted(*self._read(tokens.unsqueeze(1), cache.tensors))

    def join(self, caches: Sequence[Rows]) -> Rows:
        """One batch of several."""
        return Rows.join(caches)

    def _predicted(self, hidden: Tensor, state: tuple[Tensor, ...]) -> Prediction:
        """Logits of the last position only."""
        return Prediction(self.output(self.dropout(hidden[:, -1])), Rows(state))

    def _read(
        self, tokens: Tensor, memory: Sequence[Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden states (B, L, D) and the state after the last token, as a memory."""
        hidden, state = self.layers(self.dropout(self.embedding(tokens)), self._state(memory))
        kept = cast(tuple[Tensor, ...], state if self.config.unit == "lstm" else (state,))
        return hidden, tuple(s.detach().transpose(0, 1).contiguous() for s in kept)

    def memory_from(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Rebuild a memory from its tensors (B, N, D).

        Raises:
            UserError: other tensors than a memory of this model holds.
        """
        count = 2 if self.config.unit == "lstm" else 1
        form = (self.config.num_layers, self.config.d_hidden)
        if [tuple(t.shape[1:]) for t in tensors] != [form] * count:
            raise UserError(
                f"the saved memory has shapes {[tuple(t.shape) for t in tensors]}, this model "
                f"needs {count} of (batch, {form[0]}, {form[1]}); the checkpoint belongs to "
                "another model"
            )
        return tuple(tensors)

    def num_parameters(self, *, embedding: bool = True) -> int:
        """Number of trainable scalars, with or without the embedding."""
        return count_parameters(self, self.embedding, with_embedding=embedding)

    def _state(self, memory: Sequence[Tensor] | None) -> Tensor | tuple[Tensor, ...] | None:
        """The memory in the form that torch's layers want: (N, B, D), in a pair for an LSTM."""
        if not memory:
            return None
        state = tuple(tensor.transpose(0, 1).contiguous() for tensor in memory)
        return state if self.config.unit == "lstm" else state[0]

    def _set_forget_bias(self, value: float) -> None:
        """Let the sum of torch's two biases of the forget gate be `value`."""
        width = self.config.d_hidden
        with torch.no_grad():
            for name, parameter in self.layers.named_parameters():
                if name.startswith("bias_"):
                    parameter[width : 2 * width] = value if name.startswith("bias_ih") else 0.0
