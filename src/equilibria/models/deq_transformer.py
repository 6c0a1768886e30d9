"""DEQ-Transformer: one Transformer-XL block, applied until it no longer changes the sequence.

    z* = f(z*, x)        z, x: (batch, length, d_model)

Shape suffixes: B batch, L length of the segment, M length of the memory, K = M + L keys,
D d_model, H heads, E = D / H, V vocabulary.

Source: Bai, Kolter, Koltun, Deep Equilibrium Models, arXiv 1909.01377, section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.api import SolveSettings
from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer
from equilibria.deq import DEQ, Cell
from equilibria.layers.adaptive_embedding import AdaptiveEmbedding, cluster_widths
from equilibria.layers.adaptive_softmax import AdaptiveSoftmax
from equilibria.layers.relative_attention import future_mask, relative_attention, sinusoids
from equilibria.layers.variational_dropout import check_dropout, dropout_mask, variational_mask
from equilibria.models.config import ModelConfig, SolveConfig
from equilibria.models.output import FullSoftmax, LanguageModelOutput, Softmax
from equilibria.normalizations.weight_norm import add_weight_norm


@dataclass(frozen=True)
class DEQTransformerConfig(ModelConfig):
    """Hyper-parameters of a DEQ-Transformer language model."""

    d_model: int = 128
    """Width of embeddings and hidden states."""
    num_heads: int = 4
    """Attention heads; must divide d_model."""
    d_inner: int = 512
    """Width of the feed-forward layer."""
    norm: Literal["post", "pre"] = "post"
    """Layer norm after the second residual sum (as published) or instead before the attention.
    Pre-norm needs Jacobian regularisation or few steps to train stably."""
    weight_norm: bool = True
    """Split every weight of the block into direction and length; computed once per solve."""
    dropout: float = 0.05
    """Variational dropout on the sub-layers' outputs and inside the feed-forward layer; one mask
    per sample and solve, shared over time."""
    embedding_dropout: float = 0.05
    """Ordinary dropout on the embeddings and before the output layer."""
    attention_dropout: float = 0.0
    """Dropout of the attention's weights, one mask per solve; above 0 no fused kernels are used."""
    position_dropout: float = 0.0
    """Dropout of the embedded distances, one mask per solve."""
    attention_window: int | None = None
    """Positions a query attends to, itself included; None for all of segment and memory."""
    d_embed: int | None = None
    """Width of the embeddings; None for d_model. Another one is projected."""
    cutoffs: tuple[int, ...] = ()
    """Token ids at which clusters of rarer words begin: adaptive embedding and softmax."""
    div_val: int = 1
    """Every cluster's embedding is so many times narrower than the one before."""
    tie_first_projection: bool = True
    """Whether the softmax shares the first cluster's projection, too."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    solve: SolveConfig = SolveConfig()
    """How the equilibrium is found and differentiated."""

    def __post_init__(self) -> None:
        for name in ("d_model", "num_heads", "d_inner"):
            check_positive_integer(name, getattr(self, name))
        if self.d_model % self.num_heads:
            divisors = [n for n in range(1, self.d_model + 1) if self.d_model % n == 0]
            raise UserError(
                f"num_heads={self.num_heads} does not divide d_model={self.d_model}; choose a "
                f"divisor such as {min(divisors, key=lambda n: abs(n - self.num_heads))}, or "
                "another d_model"
            )
        if self.norm not in ("post", "pre"):
            raise UserError(f"norm={self.norm!r} is neither 'post' nor 'pre'")
        check_dropout("dropout", self.dropout)
        for name in ("embedding_dropout", "attention_dropout", "position_dropout"):
            check_dropout(name, getattr(self, name))
        for name in ("attention_window", "d_embed"):
            if getattr(self, name) is not None:
                check_positive_integer(name, getattr(self, name))
        cluster_widths(self.d_embed or self.d_model, len(self.cutoffs) + 1, self.div_val)
        if not self.tie_first_projection and not self.is_adaptive:
            raise UserError(
                "tie_first_projection=False, but without cutoffs or another d_embed there is no "
                "projection to tie; leave it out"
            )
        if not self.init_std > 0:
            raise UserError(f"init_std={self.init_std} must be above 0")

    @property
    def is_adaptive(self) -> bool:
        """Whether the embedding has clusters or a width of its own."""
        return bool(self.cutoffs) or self.d_embed not in (None, self.d_model)

    def build(self, vocabulary_size: int) -> DEQTransformer:
        """Make the model with freshly drawn parameters."""
        return DEQTransformer(self, vocabulary_size)


class Memory(NamedTuple):
    """What a segment leaves to the next: equilibrium (B, M, D) and its injection (B, M, 2D)."""

    z: Tensor
    kv_injection: Tensor

    @property
    def length(self) -> int:
        return int(self.z.shape[1])


class _Weights(NamedTuple):
    """The effective weights of the block, after weight norm; functions of parameters only."""

    qkv: Tensor
    output: Tensor
    expand: Tensor
    contract: Tensor


class _Masks(NamedTuple):
    """Variational dropout masks of one solve; None where nothing is dropped."""

    attention: Tensor | None
    inner: Tensor | None
    output: Tensor | None
    weights_BHLK: Tensor | None = None


class Injection(NamedTuple):
    """Everything one solve needs that does not depend on z."""

    qkv: Tensor
    memory_k: Tensor
    memory_v: Tensor
    position_HKE: Tensor
    future_LK: Tensor
    weights: _Weights
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

    def __init__(self, config: DEQTransformerConfig) -> None:
        super().__init__()
        width, inner = config.d_model, config.d_inner
        self.config = config
        self.injection = nn.Linear(width, 3 * width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.position = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
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

    def inject(self, x: Tensor, memory: Memory | None = None) -> Injection:
        """Project input (B, L, D) and memory, place positions, draw masks; once per solve."""
        weights = _Weights(
            self.qkv.weight, self.output.weight, self.expand.weight, self.contract.weight
        )
        qkv = self.injection(x)
        if memory is None:
            memory = self.empty_memory(x)
        kv_weight = weights.qkv[self.config.d_model :]
        memory_kv = F.linear(self._normalised(memory.z, "pre"), kv_weight) + memory.kv_injection
        memory_k, memory_v = memory_kv.chunk(2, dim=-1)
        length = x.shape[1]
        num_keys = memory.length + length
        config = self.config
        distances = sinusoids(num_keys, config.d_model, x)
        if self.training and config.position_dropout:
            distances = distances * dropout_mask(x, distances.shape, config.position_dropout)
        position = self.position(distances)
        weights_mask = None
        if self.training and config.attention_dropout:
            shape = (x.shape[0], config.num_heads, length, num_keys)
            weights_mask = dropout_mask(x, shape, config.attention_dropout)
        return Injection(
            qkv=qkv,
            memory_k=memory_k,
            memory_v=memory_v,
            position_HKE=position.unflatten(-1, (self.config.num_heads, -1)).transpose(0, 1),
            future_LK=future_mask(length, num_keys, x.device, config.attention_window),
            weights=weights,
            masks=_Masks(
                self._mask(x, self.config.d_model),
                self._mask(x, self.config.d_inner),
                self._mask(x, self.config.d_model),
                weights_mask,
            ),
        )

    def initial_state(self, injection: Injection) -> Tensor:
        """Zeros (B, L, D)."""
        return torch.zeros_like(injection.qkv[..., : self.config.d_model])

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
            qkv=injection.qkv[rows],
            memory_k=injection.memory_k[rows],
            memory_v=injection.memory_v[rows],
            masks=_Masks(*(None if mask is None else mask[rows] for mask in injection.masks)),
        )

    def empty_memory(self, x: Tensor) -> Memory:
        """A memory of length 0 for the batch of `x`."""
        batch, width = x.shape[0], self.config.d_model
        return Memory(x.new_zeros(batch, 0, width), x.new_zeros(batch, 0, 2 * width))

    def remember(
        self, z: Tensor, injection: Injection, memory: Memory | None, length: int
    ) -> Memory:
        """Append a solved segment to the memory and keep its last `length` positions."""
        new = Memory(z.detach(), injection.qkv[..., self.config.d_model :].detach())
        if memory is not None:
            new = Memory(*(torch.cat(pair, dim=1) for pair in zip(memory, new, strict=True)))
        start = max(new.length - length, 0)
        # Contiguous: a view would keep the whole of both segments alive, and a memory read back
        # from a checkpoint, which has other strides, could give other last digits.
        return Memory(*(tensor[:, start:].contiguous() for tensor in new))

    def _attend(self, z: Tensor, injection: Injection) -> Tensor:
        q, k, v = (F.linear(z, injection.weights.qkv) + injection.qkv).chunk(3, dim=-1)
        attended = relative_attention(
            self._heads(q),
            self._heads(torch.cat((injection.memory_k, k), dim=1)),
            self._heads(torch.cat((injection.memory_v, v), dim=1)),
            injection.position_HKE,
            self.content_bias,
            self.position_bias,
            injection.future_LK,
            injection.masks.weights_BHLK,
        )
        return F.linear(attended.transpose(1, 2).flatten(2), injection.weights.output)

    def _heads(self, x_BKD: Tensor) -> Tensor:
        return x_BKD.unflatten(-1, (self.config.num_heads, -1)).transpose(1, 2)

    def _normalised(self, x: Tensor, place: Literal["post", "pre"]) -> Tensor:
        """Layer norm if the block has one at this place, else nothing."""
        return _layer_norm(x) if self.config.norm == place else x

    def _mask(self, x: Tensor, width: int) -> Tensor | None:
        return variational_mask(x, width, self.config.dropout, self.training)


class DEQTransformer(nn.Module):
    """Language model: embedding, DEQ layer, softmax with the embedding's weights.

    With `cutoffs` or a `d_embed` of its own, embedding and softmax are adaptive.

    Args:
        config: hyper-parameters.
        vocabulary_size: number of token ids (V).
    """

    def __init__(self, config: DEQTransformerConfig, vocabulary_size: int) -> None:
        super().__init__()
        check_positive_integer("vocabulary_size", vocabulary_size)
        self.config = config
        self.embedding = _embedding(config, vocabulary_size)
        train, evaluation = config.solve.train_settings(), config.solve.eval_settings()
        self.deq = DEQ(
            DEQTransformerCell(config),
            solver=train.solver,
            termination=train.termination,
            adjoint=train.adjoint,
            max_steps=train.max_steps,
            on_failure=train.on_failure,
            eval_solver=evaluation.solver,
            eval_termination=evaluation.termination,
            eval_max_steps=evaluation.max_steps,
        )
        self.dropout = nn.Dropout(config.embedding_dropout)
        if isinstance(self.embedding, AdaptiveEmbedding):
            self.adaptive_softmax = AdaptiveSoftmax(
                self.embedding,
                tie_first_projection=config.tie_first_projection,
                init_std=config.init_std,
            )
        else:
            self.output_bias = nn.Parameter(torch.zeros(vocabulary_size))

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
        injection = self.cell.inject(self.dropout(self._embed(tokens)), memory)
        solution = self.deq.solve(injection, settings=settings, trace=trace)
        remembered = self.cell.remember(solution.z, injection, memory, memory_length)
        hidden = self.dropout(solution.z)
        return LanguageModelOutput.of(hidden, self.softmax, targets, remembered, solution)

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

    def num_parameters(self, *, embedding: bool = True) -> int:
        """Number of trainable scalars, with or without embedding and softmax.

        Without are the parameters of the block alone.
        """
        counted = self if embedding else self.deq
        return sum(p.numel() for p in counted.parameters() if p.requires_grad)

    @property
    def softmax(self) -> Softmax:
        """The last layer, which shares its weights with the embedding."""
        if isinstance(self.embedding, AdaptiveEmbedding):
            return self.adaptive_softmax
        return FullSoftmax(self.embedding.weight, self.output_bias)

    def _embed(self, tokens: Tensor) -> Tensor:
        if isinstance(self.embedding, AdaptiveEmbedding):
            return self.embedding(tokens)
        return self.embedding(tokens) * math.sqrt(self.config.d_model)


def _embedding(
    config: DEQTransformerConfig, vocabulary_size: int
) -> nn.Embedding | AdaptiveEmbedding:
    if config.is_adaptive:
        return AdaptiveEmbedding(
            vocabulary_size,
            config.d_model,
            d_embed=config.d_embed,
            cutoffs=config.cutoffs,
            div_val=config.div_val,
            init_std=config.init_std,
        )
    embedding = nn.Embedding(vocabulary_size, config.d_model)
    nn.init.normal_(embedding.weight, std=config.d_model**-0.5)
    return embedding


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _drop(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask
