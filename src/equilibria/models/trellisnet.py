"""TrellisNet: the explicit model that the DEQ-TrellisNet is compared with.

L applications of one cell (models/trellis_cell.py); all layers are padded by what the last one had
at the end of the previous segment.

Shape suffixes: B batch, N layers, H width of the state.

Reference: Bai, Kolter, Koltun, Trellis networks for sequence modeling, arXiv 1810.06682.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from equilibria.api import SolveSettings
from equilibria.core.parameters import check_positive_integer
from equilibria.models.decoding import Prediction
from equilibria.models.explicit import refuse_solve
from equilibria.models.output import LanguageModelOutput
from equilibria.models.trellis_cell import (
    Injection,
    Memory,
    State,
    TrellisCell,
    TrellisConfig,
    last_position,
)
from equilibria.models.trellis_ends import TrellisEnds


@dataclass(frozen=True)
class TrellisNetConfig(TrellisConfig):
    """Hyper-parameters of an explicit TrellisNet language model."""

    num_layers: int = 40
    """Applications of the cell."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_integer("num_layers", self.num_layers)

    def build(self, vocabulary_size: int) -> TrellisNet:
        """Make the model with freshly drawn parameters."""
        return TrellisNet(self, vocabulary_size)


class TrellisNet(TrellisEnds):
    """Language model: embedding, layers of one weight, softmax with the embedding's weights.

    Args:
        config: hyper-parameters.
        vocabulary_size: number of token ids (V).
    """

    def __init__(self, config: TrellisNetConfig, vocabulary_size: int) -> None:
        super().__init__(config, vocabulary_size)
        self.num_layers = config.num_layers
        self.cell = TrellisCell(config)

    def forward(
        self,
        tokens: Tensor,
        memory: Memory | None = None,
        *,
        targets: Tensor | None = None,
        memory_length: int = 0,
        settings: SolveSettings | None = None,
        trace: bool = False,
    ) -> LanguageModelOutput:
        """Predict the token after each of `tokens` (B, L).

        Args:
            tokens: ids, int64.
            memory: the end of the last segment; None at the start of a text.
            targets: ids (B, L) to be predicted, whose losses are then returned, not the logits.
            memory_length: 0 to forget the end of this segment; any other number keeps it.
            settings: must be None, there is nothing to solve.
            trace: no effect, likewise.
        """
        refuse_solve(self, settings)
        x = self.embed(tokens)
        injection = self.cell.inject(x, memory)
        z = self.cell.initial_state(injection)
        for _ in range(self.num_layers):
            z = self.cell(z, injection)
        kept = Memory(*(t.detach() for t in last_position(z, x))) if memory_length else ()
        return LanguageModelOutput.of(self.output_of(z[0]), self.softmax, targets, kept)

    def prefill(self, tokens: Tensor, memory_length: int) -> Prediction:
        """Read prompts (B, L); one position of every layer is kept, whatever `memory_length`."""
        x = self.embed(tokens)
        injection = self.cell.inject(x)
        return self._read(x, injection, None)

    def step(self, tokens: Tensor, cache: TrellisCache) -> Prediction:
        """Read one more token of every text (B,)."""
        x = self.embed(tokens.unsqueeze(1))
        before = Memory(cache.h_BNH[:, :1], cache.c_BNH[:, :1], cache.x)
        return self._read(x, self.cell.inject_next(x, before, cache.weight), cache)

    def join(self, caches: Sequence[TrellisCache]) -> TrellisCache:
        """One batch of several."""
        h, c, x = (torch.cat([cache[i] for cache in caches]) for i in range(3))
        return TrellisCache(h, c, x, caches[0].weight)

    def _read(self, x: Tensor, injection: Injection, cache: TrellisCache | None) -> Prediction:
        """Apply all layers, each padded by its own input at the position before.

        As a text that is read at once: there the first layer is padded by zeros and every other one
        by what the layer below has at the position before, and not, as a segment is, by what the
        last one had.
        """
        z, inputs = self.cell.initial_state(injection), list[State]()
        for number in range(self.num_layers):
            inputs.append((z[0][:, -1:], z[1][:, -1:]))
            if cache is not None:
                place = slice(number, number + 1)
                injection = injection._replace(h=cache.h_BNH[:, place], c=cache.c_BNH[:, place])
            z = self.cell(z, injection)
        h_BNH, c_BNH = (torch.cat([state[i] for state in inputs], dim=1) for i in range(2))
        logits = self.softmax.log_probabilities(self.output_of(z[0][:, -1:]))[:, 0]
        return Prediction(logits, TrellisCache(h_BNH, c_BNH, x[:, -1:], injection.weight))


class TrellisCache(NamedTuple):
    """The last position of every text: the state that goes into every layer (B, N, H), the input.

    Besides, the weight of the convolution, normalised.
    """

    h_BNH: Tensor
    c_BNH: Tensor
    x: Tensor
    weight: Tensor

    def select(self, rows: Tensor) -> TrellisCache:
        """Of some texts only."""
        return TrellisCache(self.h_BNH[rows], self.c_BNH[rows], self.x[rows], self.weight)
