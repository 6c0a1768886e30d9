"""TrellisNet: the explicit model that the DEQ-TrellisNet is compared with.

L applications of one cell (models/trellis_cell.py); all layers are padded by what the last one had
at the end of the previous segment.

Reference: Bai, Kolter, Koltun, Trellis networks for sequence modeling, arXiv 1810.06682.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from equilibria.api import SolveSettings
from equilibria.core.parameters import check_positive_integer
from equilibria.models.explicit import refuse_solve
from equilibria.models.output import LanguageModelOutput
from equilibria.models.trellis_cell import Memory, TrellisCell, TrellisConfig, last_position
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
