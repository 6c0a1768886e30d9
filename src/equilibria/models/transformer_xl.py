"""Transformer-XL: the explicit models that DEQ-Transformers are compared with.

    untied:        h_0 = x,  h_{l+1} = f_l(h_l)
    weight-tied:   h_0 = 0,  h_{l+1} = f(h_l, x)

f is the block of `models/deq_transformer.py`, with its input injected or, untied, without. Every
layer attends to its own inputs in the previous segments. Dropout masks are shared over time, and
drawn anew for every layer unless layers are tied.

Shape suffixes: B batch, L length of the segment, M length of the memory, D d_model, V vocabulary.

References: Dai et al., Transformer-XL, arXiv 1901.02860; Bai, Kolter, Koltun, Deep Equilibrium
Models, arXiv 1909.01377, table 3, for both as the DEQ's opponents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from equilibria.api import SolveSettings
from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer
from equilibria.models.decoding import Prediction
from equilibria.models.deq_transformer import (
    DEQTransformerCell,
    Injection,
    Past,
    last_positions,
)
from equilibria.models.explicit import refuse_solve
from equilibria.models.output import LanguageModelOutput
from equilibria.models.transformer import TransformerConfig, TransformerEnds
from equilibria.models.transformer_cache import Constants, KeyValues, TextCache, positions_kept


@dataclass(frozen=True)
class TransformerXLConfig(TransformerConfig):
    """Hyper-parameters of an explicit Transformer-XL language model."""

    num_layers: int = 4
    """Depth."""
    tied: bool = False
    """Whether all layers share their weights and see the input, as an unrolled DEQ does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_integer("num_layers", self.num_layers)

    def build(self, vocabulary_size: int) -> TransformerXL:
        """Make the model with freshly drawn parameters."""
        return TransformerXL(self, vocabulary_size)


class TransformerXL(TransformerEnds):
    """Language model: embedding, layers, softmax with the embedding's weights.

    Args:
        config: hyper-parameters.
        vocabulary_size: number of token ids (V).
    """

    def __init__(self, config: TransformerXLConfig, vocabulary_size: int) -> None:
        super().__init__(config, vocabulary_size)
        self.config = config
        count = 1 if config.tied else config.num_layers
        self.layers = nn.ModuleList(
            DEQTransformerCell(config, injected=config.tied) for _ in range(count)
        )

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
            memory: inputs (B, M, D) of all layers in the previous segments, and of tied layers the
                injection (B, M, 2D); None at the start of a text.
            targets: ids (B, L) to be predicted, whose losses are then returned, not the logits.
            memory_length: positions to keep for the next segment.
            settings: must be None, there is nothing to solve.
            trace: no effect, likewise.
        """
        refuse_solve(self, settings)
        x = self.embed(tokens)
        tied, depth = self.config.tied, self.config.num_layers
        # Of tied layers the last one is the injection, which they share.
        old: list[Tensor | None] = [None] * (depth + 1) if not memory else [*memory, None]
        kept: list[Tensor] = []
        h = torch.zeros_like(x) if tied else x
        injection: Injection | None = None
        for number in range(depth):
            layer = cast(DEQTransformerCell, self.layers[0 if tied else number])
            before = old[number]
            past = None if before is None else Past(before, old[depth] if tied else None)
            if injection is None or not tied:
                injection = layer.inject(x if tied else h, past)
            elif past is not None:
                injection = layer.with_memory(injection, past)
            kept.append(last_positions(before, h, memory_length))
            h = layer(h, injection)
        if injection is not None and injection.qkv is not None:
            kv_injection = injection.qkv[..., self.config.d_model :]
            kept.append(last_positions(old[depth], kv_injection, memory_length))
        hidden = self.dropout(h)
        return LanguageModelOutput.of(
            hidden, self.softmax, targets, tuple(kept) if memory_length else ()
        )

    def prefill(self, tokens: Tensor, memory_length: int) -> Prediction:
        """Read prompts (B, L); see models/decoding.py."""
        x = self.embed(tokens)
        kept = positions_kept(memory_length, self.config.attention_window)
        heads = x.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)
        nothing = KeyValues(heads[:, :, :0], heads[:, :, :0])
        return self._read(
            x,
            TextCache((nothing,) * self.config.num_layers, self._constants(x.shape[1], x), kept),
        )

    def step(self, tokens: Tensor, cache: TextCache) -> Prediction:
        """Read one more token of every text (B,)."""
        x = self.embed(tokens.unsqueeze(1))
        return self._read(x, cache.with_room(lambda num_keys: self._constants(num_keys, x)))

    def join(self, caches: Sequence[TextCache]) -> TextCache:
        """One batch of several."""
        return TextCache.join(caches)

    def _constants(self, num_keys: int, like: Tensor) -> tuple[Constants, ...]:
        return tuple(cast(DEQTransformerCell, b).constants(num_keys, like) for b in self.layers)

    def _read(self, x: Tensor, cache: TextCache) -> Prediction:
        """Read embedded tokens (B, L, D) after those in the cache."""
        tied = self.config.tied
        h, layers = torch.zeros_like(x) if tied else x, list[KeyValues]()
        for number, past in enumerate(cache.layers):
            block = 0 if tied else number
            layer = cast(DEQTransformerCell, self.layers[block])
            injection = layer.inject(x if tied else h, past, cache.constants[block])
            layers.append(past.append(layer.key_values(h, injection), cache.memory_length))
            h = layer(h, injection)
        logits = self.softmax.log_probabilities(self.dropout(h[:, -1:]))[:, 0]
        return Prediction(logits, cache._replace(layers=tuple(layers)))

    def memory_from(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Rebuild a memory from its tensors, in the order in which it iterates.

        Raises:
            UserError: other tensors than a memory of this model holds.
        """
        width = self.config.d_model
        widths = [width] * self.config.num_layers + [2 * width] * self.config.tied
        if [t.shape[-1] for t in tensors if t.dim() == 3] != widths:
            raise UserError(
                f"the saved memory has shapes {[tuple(t.shape) for t in tensors]}, this model "
                f"needs {len(widths)} of (batch, length, {width})"
                f"{f', the last of width {2 * width}' if self.config.tied else ''}; the checkpoint "
                "belongs to another model"
            )
        return tuple(tensors)
