"""torchdeq's language model: a stack of pre-norm blocks, repeated a fixed number of times.

    z_{k+1} = f_n(... f_2(f_1(z_k, x), x) ..., x),    z_0 = 0
    f_i:  h = z + O LN(A(LN z)),   f_i(z) = h + FF(LN h)

with its own weights in every block, layer norms with affine parameters, and one injection for all:
the input enters through queries, keys and values. An explicit model: LN does not see a constant
added to z, so f(z + c) = f(z) + c, I - J is singular everywhere, and there is no equilibrium to
solve for. The published models take 12 steps, in training as in evaluation.

Source: Geng and Kolter, TorchDEQ: A library for deep equilibrium models, arXiv 2310.18605, and the
model in its public collection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equilibria.api import SolveSettings
from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer
from equilibria.layers.relative_attention import future_mask, relative_attention, sinusoids
from equilibria.layers.variational_dropout import dropout_mask, variational_mask
from equilibria.models.deq_transformer import Memory, last_positions
from equilibria.models.explicit import refuse_solve
from equilibria.models.output import LanguageModelOutput
from equilibria.models.transformer import TransformerConfig, TransformerEnds
from equilibria.normalizations.weight_norm import add_weight_norm


@dataclass(frozen=True)
class StackedTransformerConfig(TransformerConfig):
    """Hyper-parameters of torchdeq's language model."""

    norm: Literal["pre"] = "pre"
    """Of every block; there is no other."""
    attention_bias: bool = True
    """Biases of the injection and of the output of the attention."""
    num_blocks: int = 3
    """Blocks with weights of their own, that one step applies one after the other."""
    num_steps: int = 12
    """How often they are applied."""
    checkpoint: bool = True
    """Compute a step again in the backward pass, as published, instead of keeping what it needs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_integer("num_blocks", self.num_blocks)
        check_positive_integer("num_steps", self.num_steps)
        if self.norm != "pre":
            raise UserError(f"norm={self.norm!r}: the blocks of this model are pre-norm; leave it")

    def build(self, vocabulary_size: int) -> StackedTransformer:
        """Make the model with freshly drawn parameters."""
        return StackedTransformer(self, vocabulary_size)


class _Weights(NamedTuple):
    """Of one block, after weight norm; functions of parameters only."""

    qkv: Tensor
    output: Tensor
    expand: Tensor
    contract: Tensor


class _Masks(NamedTuple):
    """Variational dropout of one block; None where nothing is dropped."""

    attention: Tensor | None
    inner: Tensor | None
    output: Tensor | None
    weights_BHLK: Tensor | None


class Injection(NamedTuple):
    """Everything that does not depend on z; a tuple has an entry per block."""

    qkv: Tensor
    memory_z: Tensor
    memory_kv: Tensor
    positions: tuple[Tensor, ...]
    future_LK: Tensor
    weights: tuple[_Weights, ...]
    masks: tuple[_Masks, ...]


class Block(nn.Module):
    """Attention between two layer norms, then a feed-forward layer after another."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.d_model
        self.num_heads = config.num_heads
        self.norm_in, self.norm_heads = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_inner = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.position = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=config.attention_bias)
        self.expand = nn.Linear(width, config.d_inner)
        self.contract = nn.Linear(config.d_inner, width)
        shape = (config.num_heads, width // config.num_heads)
        self.content_bias = nn.Parameter(torch.empty(shape))
        self.position_bias = nn.Parameter(torch.empty(shape))
        for layer in (self.qkv, self.position, self.output, self.expand, self.contract):
            nn.init.normal_(layer.weight, std=config.init_std)
            if layer.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
                nn.init.zeros_(layer.bias)
        for bias in (self.content_bias, self.position_bias):
            nn.init.normal_(bias, std=config.init_std)
        if config.weight_norm:
            for layer in (self.qkv, self.output, self.expand, self.contract):
                add_weight_norm(layer)

    def weights(self) -> _Weights:
        """Of this moment."""
        return _Weights(
            self.qkv.weight, self.output.weight, self.expand.weight, self.contract.weight
        )

    def forward(self, z: Tensor, injection: Injection, number: int) -> Tensor:
        """Apply the block once: (B, L, D) -> (B, L, D)."""
        weights, masks = injection.weights[number], injection.masks[number]
        width = z.shape[-1]
        memory_kv = F.linear(self.norm_in(injection.memory_z), weights.qkv[width:])
        memory_k, memory_v = (memory_kv + injection.memory_kv).chunk(2, dim=-1)
        q, k, v = (F.linear(self.norm_in(z), weights.qkv) + injection.qkv).chunk(3, dim=-1)
        attended = relative_attention(
            self._heads(q),
            self._heads(torch.cat((memory_k, k), dim=1)),
            self._heads(torch.cat((memory_v, v), dim=1)),
            injection.positions[number],
            self.content_bias,
            self.position_bias,
            injection.future_LK,
            masks.weights_BHLK,
        )
        heads = self.norm_heads(attended.transpose(1, 2).flatten(2))
        h = z + _drop(F.linear(heads, weights.output, self.output.bias), masks.attention)
        inner = F.relu(F.linear(self.norm_inner(h), weights.expand, self.expand.bias))
        fed = F.linear(_drop(inner, masks.inner), weights.contract, self.contract.bias)
        return h + _drop(fed, masks.output)

    def _heads(self, x_BKD: Tensor) -> Tensor:
        return x_BKD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Stack(nn.Module):
    """All blocks, one after the other: one step."""

    def __init__(self, config: TransformerConfig, num_blocks: int) -> None:
        super().__init__()
        self.config = config
        width = config.d_model
        self.injection = nn.Linear(width, 3 * width, bias=config.attention_bias)
        nn.init.normal_(self.injection.weight, std=config.init_std)
        if self.injection.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            nn.init.zeros_(self.injection.bias)
        self.blocks = nn.ModuleList(Block(config) for _ in range(num_blocks))

    def inject(self, x: Tensor, memory: Memory | None = None) -> Injection:
        """Project input (B, L, D), place positions, draw masks; once for all steps."""
        config, blocks = self.config, cast(Sequence[Block], self.blocks)
        if memory is None:
            batch, width = x.shape[0], config.d_model
            memory = Memory(x.new_zeros(batch, 0, width), x.new_zeros(batch, 0, 2 * width))
        num_keys = memory.length + x.shape[1]
        distances = sinusoids(num_keys, config.d_model, x)
        if self.training and config.position_dropout:
            distances = distances * dropout_mask(x, distances.shape, config.position_dropout)
        return Injection(
            qkv=self.injection(x),
            memory_z=memory.z,
            memory_kv=memory.kv_injection,
            positions=tuple(
                block.position(distances).unflatten(-1, (config.num_heads, -1)).transpose(0, 1)
                for block in blocks
            ),
            future_LK=future_mask(x.shape[1], num_keys, x.device, config.attention_window),
            weights=tuple(block.weights() for block in blocks),
            masks=tuple(self._masks(x, num_keys) for _ in blocks),
        )

    def forward(self, z: Tensor, injection: Injection) -> Tensor:
        """Apply all blocks once: (B, L, D) -> (B, L, D)."""
        for number, block in enumerate(self.blocks):
            z = block(z, injection, number)
        return z

    def remember(
        self, z: Tensor, injection: Injection, memory: Memory | None, length: int
    ) -> Memory:
        """Append a segment to the memory and keep its last `length` positions."""
        old_z, old_kv = (None, None) if memory is None else memory
        kv = injection.qkv[..., self.config.d_model :]
        return Memory(last_positions(old_z, z, length), last_positions(old_kv, kv, length))

    def _masks(self, x: Tensor, num_keys: int) -> _Masks:
        config = self.config
        weights = None
        if self.training and config.attention_dropout:
            shape = (x.shape[0], config.num_heads, x.shape[1], num_keys)
            weights = dropout_mask(x, shape, config.attention_dropout)
        widths = (config.d_model, config.d_inner, config.d_model)
        attention, inner, output = (
            variational_mask(x, width, config.dropout, self.training) for width in widths
        )
        return _Masks(attention, inner, output, weights)


class StackedTransformer(TransformerEnds):
    """Language model: embedding, repeated stack, softmax with the embedding's weights.

    Args:
        config: hyper-parameters.
        vocabulary_size: number of token ids (V).
    """

    def __init__(self, config: StackedTransformerConfig, vocabulary_size: int) -> None:
        super().__init__(config, vocabulary_size)
        self.config = config
        self.stack = Stack(config, config.num_blocks)

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
            settings: must be None, there is nothing to solve.
            trace: no effect, likewise.
        """
        refuse_solve(self, settings)
        x = self.embed(tokens)
        injection = self.stack.inject(x, memory)
        z = torch.zeros_like(x)
        for _ in range(self.config.num_steps):
            if self.config.checkpoint and torch.is_grad_enabled():
                z = cast(Tensor, checkpoint(self.stack, z, injection, use_reentrant=False))
            else:
                z = self.stack(z, injection)
        remembered = self.stack.remember(z, injection, memory, memory_length)
        return LanguageModelOutput.of(self.dropout(z), self.softmax, targets, remembered)

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


def _drop(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
