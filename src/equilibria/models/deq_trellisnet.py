"""DEQ-TrellisNet: the cell of a TrellisNet, applied until it no longer changes the sequence.

    (h*, c*) = f(h*, c*, x)        h, c: (batch, length, d_state)

The equation of the cell is in models/trellis_cell.py.

Source: Bai, Kolter, Koltun, Deep Equilibrium Models, arXiv 1909.01377, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from equilibria.api import SolveSettings
from equilibria.core.adjoint import BackwardReport
from equilibria.core.linear import LinearResult
from equilibria.core.parameters import check_positive_integer
from equilibria.core.solution import Solution
from equilibria.models.config import SolveConfig
from equilibria.models.decoding import Prediction
from equilibria.models.output import LanguageModelOutput
from equilibria.models.trellis_cell import Memory, State, TrellisCell, TrellisConfig, last_position
from equilibria.models.trellis_ends import TrellisEnds


@dataclass(frozen=True)
class DEQTrellisNetConfig(TrellisConfig):
    """Hyper-parameters of a DEQ-TrellisNet language model."""

    subsequence_length: int | None = None
    """Positions solved at a time, the end of one part padding the next; None for the segment. The
    solution is the same; shorter ones need fewer steps each, and gradients pass from one to the
    other."""
    solve: SolveConfig = SolveConfig()
    """How the equilibrium is found and differentiated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subsequence_length is not None:
            check_positive_integer("subsequence_length", self.subsequence_length)

    def build(self, vocabulary_size: int) -> DEQTrellisNet:
        """Make the model with freshly drawn parameters."""
        return DEQTrellisNet(self, vocabulary_size)


class DEQTrellisNet(TrellisEnds):
    """Language model: embedding, DEQ layer, softmax with the embedding's weights.

    Args:
        config: hyper-parameters.
        vocabulary_size: number of token ids (V).
    """

    def __init__(self, config: DEQTrellisNetConfig, vocabulary_size: int) -> None:
        super().__init__(config, vocabulary_size)
        self._subsequence_length = config.subsequence_length
        self.deq = config.solve.layer(TrellisCell(config))

    @property
    def cell(self) -> TrellisCell:
        """The map whose fixed point is the hidden state."""
        return cast(TrellisCell, self.deq.cell)

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
            settings: of this solve only, instead of the layer's own.
            trace: record the residual of every solver step; of the last part, where there are
                several.
        """
        x = self.embed(tokens)
        solutions, memory = self._solved(x, memory, settings, trace)
        h = torch.cat([cast(State, solution.z)[0] for solution in solutions], dim=1)
        kept = Memory(*(t.detach() for t in memory)) if memory_length else ()
        return LanguageModelOutput.of(
            self.output_of(h), self.softmax, targets, kept, joined(solutions)
        )

    def prefill(self, tokens: Tensor, memory_length: int) -> Prediction:
        """Read prompts (B, L) by one solve; one position is kept, whatever `memory_length`."""
        x = self.embed(tokens)
        solutions, memory = self._solved(x, None)
        return self._predicted(memory, self.cell.convolution.weight, joined(solutions))

    def step(self, tokens: Tensor, cache: DEQTrellisCache) -> Prediction:
        """Read one more token of every text (B,): an equilibrium of one position."""
        x = self.embed(tokens.unsqueeze(1))
        solution = self.deq.solve(self.cell.inject_next(x, cache.memory, cache.weight))
        return self._predicted(last_position(cast(State, solution.z), x), cache.weight, solution)

    def join(self, caches: Sequence[DEQTrellisCache]) -> DEQTrellisCache:
        """One batch of several."""
        memory = Memory(*map(torch.cat, zip(*(cache.memory for cache in caches), strict=True)))
        return DEQTrellisCache(memory, caches[0].weight)

    def _predicted(self, memory: Memory, weight: Tensor, solution: Solution) -> Prediction:
        """Logits of the last position only."""
        logits = self.softmax.log_probabilities(self.output_of(memory.h))[:, 0]
        return Prediction(logits, DEQTrellisCache(memory, weight), solution)

    def _solved(
        self,
        x: Tensor,
        memory: Memory | None,
        settings: SolveSettings | None = None,
        trace: bool = False,
    ) -> tuple[list[Solution], Memory]:
        """Solve part after part; the solutions, and the end of the last with its graph."""
        solutions: list[Solution] = []
        for part in x.split(self._subsequence_length or x.shape[1], dim=1):
            injection = self.cell.inject(part, memory, continues=bool(solutions))
            solutions.append(self.deq.solve(injection, settings=settings, trace=trace))
            memory = last_position(cast(State, solutions[-1].z), part)
        return solutions, cast(Memory, memory)


class DEQTrellisCache(NamedTuple):
    """The last position of every text, and the weight of the convolution, normalised."""

    memory: Memory
    weight: Tensor

    def select(self, rows: Tensor) -> DEQTrellisCache:
        """Of some texts only."""
        return DEQTrellisCache(Memory(*(tensor[rows] for tensor in self.memory)), self.weight)


def joined(parts: Sequence[Solution]) -> Solution:
    """One report of solves that follow one another; z is that of the last.

    Steps are summed, the first evaluations of later solves included, residuals and codes are the
    worst of all.
    """
    if len(parts) == 1:
        return parts[0]
    last = parts[-1]
    return Solution(
        z=last.z,
        status=torch.stack([part.status for part in parts]).amax(0),
        residual=torch.stack([part.residual for part in parts]).amax(0),
        relative_residual=torch.stack([part.relative_residual for part in parts]).amax(0),
        num_steps=_summed([part.num_steps for part in parts]),
        num_evals=sum(part.num_evals for part in parts),
        seconds=sum(part.seconds for part in parts),
        backward=_JoinedReport([part.backward for part in parts]),
        trace=last.trace,
        problem=last.problem,
        solved=last.solved,
    )


class _JoinedReport(BackwardReport):
    """The backward solves of several parts, which are still to come when this is made."""

    def __init__(self, parts: Sequence[BackwardReport]) -> None:
        self._parts = parts

    @property
    def result(self) -> LinearResult | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        found = [part.result for part in self._parts if part.result is not None]
        if len(found) < len(self._parts):
            return None
        return replace(
            found[-1],
            status=torch.stack([one.status for one in found]).amax(0),
            relative_residual=torch.stack([one.relative_residual for one in found]).amax(0),
            num_steps=_summed([one.num_steps for one in found]),
        )

    @property
    def seconds(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return sum(part.seconds for part in self._parts)


def _summed(num_steps: Sequence[Tensor]) -> Tensor:
    """Of all parts, and the first evaluation of every part but one."""
    return torch.stack(list(num_steps)).sum(0) + len(num_steps) - 1
