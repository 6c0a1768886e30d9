"""DEQ-Transformer: one Transformer-XL block, applied until it no longer changes the sequence.

    z* = f(z*, x)        z, x: (batch, length, d_model)

Shape suffixes: B batch, L length of the segment, M length of the memory, K = M + L keys,
D d_model, H heads, E = D / H, V vocabulary.

Source: Bai, Kolter, Koltun, Deep Equilibrium Models, arXiv 1909.01377, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.api import SolveSettings
from equilibria.core.errors import UserError
from equilibria.core.solution import Solution
from equilibria.deq import Cell
from equilibria.layers.relative_attention import (
    future_mask,
    relative_attention,
    relative_attention_of_next,
    sinusoids,
)
from equilibria.layers.variational_dropout import dropout_mask, variational_mask
from equilibria.models.config import SolveConfig
from equilibria.models.decoding import Prediction
from equilibria.models.output import LanguageModelOutput
from equilibria.models.transformer import TransformerConfig, TransformerEnds
from equilibria.models.transformer_cache import (
    Constants,
    KeyValues,
    TextCache,
    Weights,
    positions_kept,
)
from equilibria.normalizations.weight_norm import add_weight_norm


@dataclass(frozen=True)
class DEQTransformerConfig(TransformerConfig):
    """Hyper-parameters of a DEQ-Transformer language model."""

    solve: SolveConfig = SolveConfig()
    """How the equilibrium is found and differentiated."""

    def build(self, vocabulary_size: int) -> DEQTransformer:
        """Make the model with freshly drawn parameters."""
        return DEQTransformer(self, vocabulary_size)


class Memory(NamedTuple):
    """What a segment leaves to the next: equilibrium (B, M, D) and its injection (B, M, 2D)."""

    z: Tensor
    kv_injection: Tensor

    @property
    def length(self) -> int:
        """Positions (M)."""
        return int(self.z.shape[1])


class Past(NamedTuple):
    """What a block attends to besides the segment: as a `Memory`, which may have no injection."""

    z: Tensor
    kv_injection: Tensor | None


class _Masks(NamedTuple):
    """Variational dropout masks of one solve; None where nothing is dropped."""

    attention: Tensor | None
    inner: Tensor | None
    output: Tensor | None
    weights_BHLK: Tensor | None = None


class Injection(NamedTuple):
    """Everything one solve needs that does not depend on z."""

    qkv: Tensor | None
    memory_k: Tensor
    """(B, H, M, E), as memory_v."""
    memory_v: Tensor
    position_HKE: Tensor
    future_LK: Tensor
    """Of texts of different lengths (B, 1, L, K)."""
    weights: Weights
    masks: _Masks


class DEQTransformerCell(Cell):
    """Attention with relative positions and memory, then a feed-forward layer.

    Post-norm:  h = LN(z + A(z)),     f(z) = LN(h + FF(h))
    Pre-norm:   h = LN(z + A(LN z)),  f(z) = h + FF(h)

    where the input enters through queries, keys and values, qkv = W z + U x, and LN has no
    affine parameters. Either way f is bounded, so an equilibrium exists. The residual sum of an
    explicit pre-norm network, z + A(LN z) + FF(LN h), would have none: LN does not see a constant
    added to z, so f(z + c) = f(z) + c and I - J is singular everywhere.
    """

    def __init__(self, config: TransformerConfig, *, injected: bool = True) -> None:
        super().__init__()
        width, inner = config.d_model, config.d_inner
        self.config = config
        bias = config.attention_bias
        self.injection = nn.Linear(width, 3 * width, bias=bias) if injected else None
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.position = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=bias)
        self.expand = nn.Linear(width, inner)
        self.contract = nn.Linear(inner, width)
        shape = (config.num_heads, width // config.num_heads)
        self.content_bias = nn.Parameter(torch.empty(shape))
        self.position_bias = nn.Parameter(torch.empty(shape))
        for name, parameter in self.named_parameters():
            if name.endswith("bias") and parameter.dim() == 1:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=config.init_std)
        if config.weight_norm:
            for layer in (self.qkv, self.output, self.expand, self.contract):
                add_weight_norm(layer)

    def inject(
        self,
        x: Tensor,
        memory: Memory | Past | KeyValues | None = None,
        constants: Constants | None = None,
    ) -> Injection:
        """Project input (B, L, D) and memory, place positions, draw masks; once per solve.

        Args:
            x: input.
            memory: what came before, projected already where it is `KeyValues`.
            constants: of at least as many keys as there are, made before; not for training.
        """
        weights = self._weights() if constants is None else constants.weights
        if memory is None:
            memory = self._nothing(x)
        memory_k, memory_v = self._memory_kv(memory, weights)
        length = x.shape[1]
        num_keys = memory_k.shape[2] + length
        config = self.config
        if constants is None:
            position_HKE = self._positions(num_keys, x)
        else:
            position_HKE = constants.position_HKE[:, constants.num_keys - num_keys :]
        weights_mask = None
        if self.training and config.attention_dropout:
            shape = (x.shape[0], config.num_heads, length, num_keys)
            weights_mask = dropout_mask(x, shape, config.attention_dropout)
        future_LK = future_mask(length, num_keys, x.device, config.attention_window)
        if isinstance(memory, KeyValues) and memory.hidden is not None:
            future_LK = future_LK | memory.hidden
        return Injection(
            qkv=None if self.injection is None else self.injection(x),
            memory_k=memory_k,
            memory_v=memory_v,
            position_HKE=position_HKE,
            future_LK=future_LK,
            weights=weights,
            masks=_Masks(
                self._mask(x, self.config.d_model),
                self._mask(x, self.config.d_inner),
                self._mask(x, self.config.d_model),
                weights_mask,
            ),
        )

    def constants(self, num_keys: int, like: Tensor) -> Constants:
        """What `inject` can be spared as long as the parameters stay as they are."""
        return Constants(self._weights(), self._positions(num_keys, like))

    def _weights(self) -> Weights:
        return Weights(
            self.qkv.weight, self.output.weight, self.expand.weight, self.contract.weight
        )

    def _positions(self, num_keys: int, like: Tensor) -> Tensor:
        """Embedded and projected distances (H, K, E), the longest first."""
        distances = sinusoids(num_keys, self.config.d_model, like)
        if self.training and self.config.position_dropout:
            mask = dropout_mask(like, distances.shape, self.config.position_dropout)
            distances = distances * mask
        position = self.position(distances)
        return position.unflatten(-1, (self.config.num_heads, -1)).transpose(0, 1)

    def initial_state(self, injection: Injection) -> Tensor:
        """Zeros (B, L, D), in the precision of the parameters, whatever autocast computes in."""
        shape = (*_injected(injection.qkv).shape[:-1], self.config.d_model)
        return _injected(injection.qkv).new_zeros(shape, dtype=self.content_bias.dtype)

    def forward(self, z: Tensor, injection: Injection) -> Tensor:
        """Apply the block once: (B, L, D) -> (B, L, D)."""
        masks, weights = injection.masks, injection.weights
        attended = self._attend(self._normalised(z, "pre"), injection)
        h = _layer_norm(z + _drop(attended, masks.attention))
        inner = F.relu(F.linear(h, weights.expand, self.expand.bias))
        fed = F.linear(_drop(inner, masks.inner), weights.contract, self.contract.bias)
        return self._normalised(h + _drop(fed, masks.output), "post")

    def select(self, injection: Injection, rows: Tensor) -> Injection:
        """The injection of some sequences of the batch only."""
        return injection._replace(
            qkv=_injected(injection.qkv)[rows],
            memory_k=injection.memory_k[rows],
            memory_v=injection.memory_v[rows],
            future_LK=_of_rows(injection.future_LK, rows),
            masks=_Masks(*(None if mask is None else mask[rows] for mask in injection.masks)),
        )

    def _nothing(self, x: Tensor) -> Past:
        """A past of length 0 for the batch of `x`."""
        batch, width = x.shape[0], self.config.d_model
        injected = None if self.injection is None else x.new_zeros(batch, 0, 2 * width)
        return Past(x.new_zeros(batch, 0, width), injected)

    def with_memory(self, injection: Injection, memory: Memory | Past) -> Injection:
        """The same, but for another memory of the same length."""
        memory_k, memory_v = self._memory_kv(memory, injection.weights)
        return injection._replace(memory_k=memory_k, memory_v=memory_v)

    def remember(
        self, z: Tensor, injection: Injection, memory: Memory | None, length: int
    ) -> Memory:
        """Append a solved segment to the memory and keep its last `length` positions."""
        kv_injection = _injected(injection.qkv)[..., self.config.d_model :]
        old_z, old_injection = (None, None) if memory is None else memory
        return Memory(
            last_positions(old_z, z, length), last_positions(old_injection, kv_injection, length)
        )

    def _memory_kv(
        self, memory: Memory | Past | KeyValues, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, M, E) of a memory."""
        if isinstance(memory, KeyValues):
            return memory.k, memory.v
        kv = F.linear(self._normalised(memory.z, "pre"), weights.qkv[self.config.d_model :])
        if memory.kv_injection is not None:
            kv = kv + memory.kv_injection
        k, v = kv.chunk(2, dim=-1)
        return self._heads(k), self._heads(v)

    def key_values(self, z: Tensor, injection: Injection) -> KeyValues:
        """Keys and values of the positions of a segment (B, L, D) that has been solved."""
        qkv = injection.qkv
        past = Past(z, None if qkv is None else qkv[..., self.config.d_model :])
        return KeyValues(*self._memory_kv(past, injection.weights))

    def _attend(self, z: Tensor, injection: Injection) -> Tensor:
        qkv = F.linear(z, injection.weights.qkv)
        if injection.qkv is not None:
            qkv = qkv + injection.qkv
        q, k, v = map(self._heads, qkv.chunk(3, dim=-1))
        past_k, past_v = injection.memory_k, injection.memory_v
        about = (injection.position_HKE, self.content_bias, self.position_bias, injection.future_LK)
        dropped = injection.masks.weights_BHLK
        if z.shape[1] == 1 and dropped is None:
            attended = relative_attention_of_next(q, k, v, past_k, past_v, *about)
        else:
            k, v = _after(past_k, k), _after(past_v, v)
            attended = relative_attention(q, k, v, *about, dropped)
        heads = attended.transpose(1, 2).flatten(2)
        return F.linear(heads, injection.weights.output, self.output.bias)

    def _heads(self, x_BKD: Tensor) -> Tensor:
        return x_BKD.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)

    def _normalised(self, x: Tensor, place: Literal["post", "pre"]) -> Tensor:
        """Layer norm if the block has one at this place, else nothing."""
        return _layer_norm(x) if self.config.norm == place else x

    def _mask(self, x: Tensor, width: int) -> Tensor | None:
        return variational_mask(x, width, self.config.dropout, self.training)


class DEQTransformer(TransformerEnds):
    """Language model: embedding, DEQ layer, softmax with the embedding's weights.

    Args:
        config: hyper-parameters.
        vocabulary_size: number of token ids (V).
    """

    def __init__(self, config: DEQTransformerConfig, vocabulary_size: int) -> None:
        super().__init__(config, vocabulary_size)
        self.config = config
        self.deq = config.solve.layer(DEQTransformerCell(config))

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
            memory: what the previous segment returned; None at the start of a text.
            targets: ids (B, L) to be predicted, whose losses are then returned, not the logits.
            memory_length: positions to keep for the next segment.
            settings: of this solve only, instead of the layer's own.
            trace: record the residual of every solver step.
        """
        injection = self.cell.inject(self.embed(tokens), memory)
        solution = self.deq.solve(injection, settings=settings, trace=trace)
        remembered = self.cell.remember(solution.z, injection, memory, memory_length)
        hidden = self.dropout(solution.z)
        return LanguageModelOutput.of(hidden, self.softmax, targets, remembered, solution)

    def prefill(self, tokens: Tensor, memory_length: int) -> Prediction:
        """Read prompts (B, L) by one solve; see models/decoding.py."""
        x = self.embed(tokens)
        constants = self.cell.constants(tokens.shape[1], x)
        injection = self.cell.inject(x, None, constants)
        solution = self.deq.solve(injection)
        kept = positions_kept(memory_length, self.config.attention_window)
        key_values = self.cell.key_values(solution.z, injection).last(kept)
        return self._predicted(solution, TextCache((key_values,), (constants,), kept))

    def step(self, tokens: Tensor, cache: TextCache) -> Prediction:
        """Read one more token of every text (B,): an equilibrium of one position.

        From the initial state: the equilibrium of the position before is no better a start
        (docs/language-models.md).
        """
        x = self.embed(tokens.unsqueeze(1))
        cache = cache.with_room(lambda num_keys: (self.cell.constants(num_keys, x),))
        injection = self.cell.inject(x, cache.layers[0], cache.constants[0])
        solution = self.deq.solve(injection)
        new = self.cell.key_values(solution.z, injection)
        layers = (cache.layers[0].append(new, cache.memory_length),)
        return self._predicted(solution, cache._replace(layers=layers))

    def join(self, caches: Sequence[TextCache]) -> TextCache:
        """One batch of several."""
        return TextCache.join(caches)

    def _predicted(self, solution: Solution, cache: TextCache) -> Prediction:
        """Logits of the last position only: those of a whole prompt are many."""
        hidden = self.dropout(cast(Tensor, solution.z)[:, -1:])
        return Prediction(self.softmax.log_probabilities(hidden)[:, 0], cache, solution)

    def memory_from(self, tensors: Sequence[Tensor]) -> Memory:
        """Rebuild a memory from its tensors, in the order in which it iterates.

        Raises:
            UserError: other tensors than a memory of this model holds.
        """
        widths = [self.config.d_model, 2 * self.config.d_model]
        if [t.shape[-1] for t in tensors if t.dim() == 3] != widths:
            raise UserError(
                f"the saved memory has shapes {[tuple(t.shape) for t in tensors]}, this model "
                f"needs (batch, length, {widths[0]}) and (batch, length, {widths[1]}); the "
                "checkpoint belongs to another model"
            )
        return Memory(*tensors)

    @property
    def cell(self) -> DEQTransformerCell:
        """The block whose fixed point is the hidden state."""
        return cast(DEQTransformerCell, self.deq.cell)


def last_positions(old: Tensor | None, new: Tensor, length: int) -> Tensor:
    """The last positions (B, M, ...) of a memory and a segment, without their graph."""
    whole = new.detach() if old is None else torch.cat((old, new.detach()), dim=1)
    start = max(whole.shape[1] - length, 0)
    # Contiguous: a view would keep the whole of both segments alive, and a memory read back from a
    # checkpoint, which has other strides, could give other last digits.
    return whole[:, start:].contiguous()


def _after(past_BHME: Tensor, new_BHLE: Tensor) -> Tensor:
    """Heads of keys or values (B, H, K, E) with the past in front, in memory position by position.

    In that order as the projections leave them, so that what is copied is copied in one piece.
    """
    return torch.cat((past_BHME.transpose(1, 2), new_BHLE.transpose(1, 2)), dim=1).transpose(1, 2)


def _of_rows(future: Tensor, rows: Tensor) -> Tensor:
    """Of some sequences, where the mask differs between them."""
    return future[rows] if future.dim() == 4 else future


def _injected(qkv: Tensor | None) -> Tensor:
    if qkv is None:
        raise RuntimeError("a block without injection has no equilibrium to solve for")
    return qkv


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _drop(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
