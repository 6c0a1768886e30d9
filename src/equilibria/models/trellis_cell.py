"""The cell of TrellisNets: a causal convolution with LSTM gates.

    gates_t = W_0 h_{t-1} + W_1 h_t + U_0 x_{t-1} + U_1 x_t + b,      i, o, g, f = gates
    c'_t    = sigmoid(f) * c_{t-1} + sigmoid(i) * tanh(g)
    h'_t    = sigmoid(o) * tanh(c'_t)

Before the first position is the end of the previous segment. No position sees a later one, and at
the fixed point position t solves an equation in its own h_t alone, given those before it: a
recurrent network whose gates see the state that they make. Solving all positions at once takes far
fewer evaluations than there are positions.

Shape suffixes: B batch, L length, E width of the input, H width of the state.

References: Bai, Kolter, Koltun, Trellis networks for sequence modeling, arXiv 1810.06682, section
4; Deep equilibrium models, arXiv 1909.01377, section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from equilibria.core.errors import UserError
from equilibria.core.parameters import check_positive_integer
from equilibria.deq import Cell
from equilibria.layers.variational_dropout import check_dropout, dropout_mask, variational_mask
from equilibria.models.config import ModelConfig
from equilibria.normalizations.weight_norm import add_weight_norm

State = tuple[Tensor, Tensor]
"""Hidden and memory cells (B, L, H)."""


@dataclass(frozen=True)
class TrellisConfig(ModelConfig):
    """Hyper-parameters of a TrellisNet, at equilibrium or unrolled."""

    d_embed: int = 128
    """Width of embeddings, and of the part of the state that the softmax sees."""
    d_hidden: int = 256
    """Width of the rest of the state."""
    weight_norm: bool = True
    """Split the convolution of the state into direction and length; computed once per solve."""
    dropout: float = 0.1
    """Variational dropout of the hidden state, one mask per sample and solve, shared over time."""
    input_dropout: float = 0.1
    """Variational dropout of the embeddings, likewise."""
    output_dropout: float = 0.1
    """Variational dropout before the softmax, likewise."""
    embedding_dropout: float = 0.0
    """Share of the words whose embedding is dropped, all their occurrences alike."""
    weight_dropout: float = 0.0
    """DropConnect of the weights on the previous position, one mask per solve."""
    remember_input: bool = True
    """Whether the last input of a segment is seen by the first position of the next; the first
    public code has zeros there."""
    num_softmaxes: int = 1
    """Softmaxes that are mixed; 1 is an ordinary one."""
    mixture_dropout: float = 0.0
    """Variational dropout before the mixed softmaxes, one mask per sample, shared over time."""
    init_std: float = 0.05
    """Standard deviation of the initial weights."""
    embedding_std: float = 0.1
    """That of the initial embeddings."""

    def __post_init__(self) -> None:
        for name in ("d_embed", "d_hidden", "num_softmaxes"):
            check_positive_integer(name, getattr(self, name))
        for name in (
            "dropout", "input_dropout", "output_dropout", "embedding_dropout", "weight_dropout",
            "mixture_dropout",
        ):  # fmt: skip
            check_dropout(name, getattr(self, name))
        if self.mixture_dropout and self.num_softmaxes == 1:
            raise UserError(
                f"mixture_dropout={self.mixture_dropout}, but num_softmaxes=1 is no mixture; leave "
                "it out, or give more softmaxes"
            )
        for name in ("init_std", "embedding_std"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)} must be above 0")

    @property
    def d_state(self) -> int:
        """Width of hidden state and memory cells (H)."""
        return self.d_hidden + self.d_embed


class Memory(NamedTuple):
    """The end of the last segment: hidden and memory cells (B, 1, H), input (B, 1, E)."""

    h: Tensor
    c: Tensor
    x: Tensor


class Injection(NamedTuple):
    """Everything one solve needs that does not depend on the state."""

    gates: Tensor
    h: Tensor
    c: Tensor
    weight: Tensor
    mask: Tensor | None


class TrellisCell(Cell):
    """The map above, from (h, c) to (h', c')."""

    def __init__(self, config: TrellisConfig) -> None:
        super().__init__()
        self.config = config
        width = config.d_state
        self.injection = nn.Linear(2 * config.d_embed, 4 * width)
        self.convolution = nn.Linear(2 * width, 4 * width, bias=False)
        for layer in (self.injection, self.convolution):
            nn.init.normal_(layer.weight, std=config.init_std)
        nn.init.zeros_(self.injection.bias)
        if config.weight_norm:
            add_weight_norm(self.convolution)

    def inject(
        self, x: Tensor, memory: Memory | None = None, *, continues: bool = False
    ) -> Injection:
        """Convolve the input (B, L, E), draw masks; once per solve.

        Args:
            x: a segment, or a part of one.
            memory: the end of what comes before it; None at the start of a text.
            continues: whether that is of the same segment, within which the last input is seen
                whether or not segments remember it.
        """
        memory = self.empty_memory(x) if memory is None else memory
        weight, width = self.convolution.weight, self.config.d_state
        if self.training and self.config.weight_dropout:
            past = weight[:, :width]
            dropped = past * dropout_mask(past, past.shape, self.config.weight_dropout)
            weight = torch.cat((dropped, weight[:, width:]), 1)
        seen = continues or self.config.remember_input
        before = memory.x if seen else torch.zeros_like(memory.x)
        return self._injection(x, before, memory, weight)

    def inject_next(self, x: Tensor, memory: Memory, weight: Tensor) -> Injection:
        """The same for the next token (B, 1, E) of a segment, with its weight made before."""
        return self._injection(x, memory.x, memory, weight)

    def _injection(self, x: Tensor, before: Tensor, memory: Memory, weight: Tensor) -> Injection:
        return Injection(
            gates=self.injection(_with_previous(x, before)),
            h=memory.h,
            c=memory.c,
            weight=weight,
            mask=variational_mask(x, self.config.d_state, self.config.dropout, self.training),
        )

    def initial_state(self, injection: Injection) -> State:
        """Zeros (B, L, H), in the precision of the parameters, whatever autocast computes in."""
        shape = (*injection.gates.shape[:-1], self.config.d_state)
        h = injection.gates.new_zeros(shape, dtype=self.injection.bias.dtype)
        return h, torch.zeros_like(h)

    def forward(self, z: State, injection: Injection) -> State:
        """Apply the convolution once."""
        h, c = z
        before = injection.h
        if injection.mask is not None:
            h, before = h * injection.mask, before * injection.mask
        gates = F.linear(_with_previous(h, before), injection.weight) + injection.gates
        i, o, g, f = gates.chunk(4, dim=-1)
        past = torch.cat((injection.c, c[:, :-1]), dim=1)
        c = f.sigmoid() * past + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def select(self, injection: Injection, rows: Tensor) -> Injection:
        """The injection of some sequences of the batch only."""
        return injection._replace(
            gates=injection.gates[rows],
            h=injection.h[rows],
            c=injection.c[rows],
            mask=None if injection.mask is None else injection.mask[rows],
        )

    def empty_memory(self, x: Tensor) -> Memory:
        """What is before the beginning of a text: zeros."""
        state = x.new_zeros(x.shape[0], 1, self.config.d_state)
        return Memory(state, state, x.new_zeros(x.shape[0], 1, x.shape[2]))


def last_position(z: State, x: Tensor) -> Memory:
    """What a solved segment leaves to the next, with its graph."""
    return Memory(*(tensor[:, -1:].contiguous() for tensor in (*z, x)))


def _with_previous(x: Tensor, before: Tensor) -> Tensor:
    """Every position (B, L, D) beside the one before it: (B, L, 2D)."""
    return torch.cat((torch.cat((before, x[:, :-1]), dim=1), x), dim=-1)
